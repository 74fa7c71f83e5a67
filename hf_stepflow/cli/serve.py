"""`hf-stepflow serve`: transformers' OpenAI-compatible server, with StepFlow on its model."""

import argparse
import socket
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError

from .arguments import add_model_arguments, find_stepflow, load_with_stepflow


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the description, the arguments and an example."""
    parser.description = (
        "Serves a model with StepFlow over HTTP, with the routes of `transformers serve`: /v1/chat/completions,\n"
        "/v1/completions and /v1/responses, streamed or not. A request may have the field `stepflow`: false for the\n"
        "base model, true, or an object of settings for this request.\n\n"
        "MODEL is a preset's repository, a model that was saved with StepFlow, or any other model that StepFlow runs\n"
        "on; a folder, a Hub id, or `reasoner`. Code of a repository of StepFlow is not run: the package's is.\n"
        "CONFIG is a preset (name, base model, path, or Hub id), a JSON file or folder with settings, settings as\n"
        "KEY=VALUE,..., or `auto`. Without it, the settings of the repository apply, or else `auto`: MODEL's preset,\n"
        "or the rule."
    )
    parser.epilog = (
        "examples:\n"
        "  hf-stepflow serve your-name/qwen3-8b-stepflow --dtype auto --device cuda\n"
        "  hf-stepflow serve Qwen/Qwen3-8B --stepflow qwen3-8b --port 8001"
    )
    add_model_arguments(parser, positional=True)
    parser.add_argument("--stepflow", "--preset", metavar="CONFIG", help="the settings: see above")
    parser.add_argument("--host", default="localhost", help="address to listen on (default: localhost)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")


def run(args: argparse.Namespace) -> int:
    """Loads the model, and serves it until it is interrupted."""
    import fastapi  # noqa: F401  what is missing is found before the model is loaded
    import openai  # noqa: F401
    import pydantic  # noqa: F401
    import uvicorn

    from hf_stepflow.serving import build_app

    model, tokenizer = load_with_stepflow(args, find_stepflow(args.stepflow))
    app = build_app(model.eval(), tokenizer, args.model)
    with _listen(args.host, args.port) as listening:
        port = listening.getsockname()[1]
        print(f"Serving {args.model} with StepFlow at http://{args.host}:{port}/v1", flush=True)
        print(_settings_of(model), flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise StepFlowInputError(
            f"cannot listen on --host {host} --port {port}: {error}", hint="--port 0 takes a free port"
        ) from error


def _settings_of(model: Any) -> str:
    from hf_stepflow.runtime.settings import StepFlowSettings

    defaults = vars(StepFlowSettings())
    changed = {name: value for name, value in vars(model.stepflow_runtime.settings).items() if value != defaults[name]}
    changed = {name: value for name, value in changed.items() if not name.startswith("base_model")}
    return "Settings: " + (", ".join(f"{name}={value}" for name, value in changed.items()) or "the defaults")
