"""`hf-stepflow app`: the page on which a model answers with and without StepFlow, in the browser."""

import argparse
import socket

from hf_stepflow.runtime.errors import StepFlowInputError


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the description, the arguments and an example."""
    parser.description = (
        "Serves a page: a problem, typed or drawn, is answered with and without StepFlow, step by step; sliders set\n"
        "StepFlow; a second tab shows which steps draw on which (Step-Saliency), a third compares both on more\n"
        "problems while you watch. Nothing is downloaded for the model that comes with this package.\n\n"
        "MODEL is a folder or Hub id, or `reasoner` (the default): the model that comes with this package."
    )
    parser.epilog = "example: hf-stepflow app\n         hf-stepflow app Qwen/Qwen3-0.6B --port 8001"
    parser.add_argument("model", metavar="MODEL", nargs="?", default="reasoner", help="the model to start with")
    parser.add_argument("--revision", help="revision of the model on the Hub")
    parser.add_argument("--dtype", default="float32", help="dtype of the weights (default: float32)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ..., or auto (needs accelerate)")
    parser.add_argument("--stepflow", metavar="CONFIG", help="settings to start from, as for `hf-stepflow generate`")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(args: argparse.Namespace) -> int:
    """Serves the page until it is interrupted."""
    if not 0 < args.port < 65536:
        raise StepFlowInputError(f"--port must be from 1 to 65535, got {args.port}", hint="--port 7860")
    import gradio  # noqa: F401  # its absence is reported before the model is loaded

    _demand_free(args.host, args.port)

    from hf_stepflow.app import launch_app, load_model, make_app

    placing = {"dtype": args.dtype, "device": args.device}
    first = load_model(args.model, args.stepflow, revision=args.revision, **placing)
    page = make_app(first, load=lambda name: load_model(name, **placing))
    try:
        where = {"server_name": args.host, "server_port": args.port}
        launch_app(page, inbrowser=args.open, prevent_thread_lock=True, quiet=True, **where)
    except OSError as error:
        raise StepFlowInputError(
            f"the page cannot be served on {args.host}:{args.port}: {error}", hint="choose another --port"
        ) from error
    print(f"http://{args.host}:{args.port}  (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0


def _demand_free(host: str, port: int) -> None:
    """Checks that nothing listens on an address yet, before a model is loaded.

    Raises:
        StepFlowInputError: The port is taken, or the host is none of this machine's.
    """
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise StepFlowInputError(
            f"the page cannot be served on {host}:{port}: {reason}",
            hint=f"choose another --port, such as --port {port % 65535 + 1}, or another --host",
        ) from error
