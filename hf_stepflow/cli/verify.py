"""`hf-stepflow verify`: proves on this machine that StepFlow acts on a model and computes what it should."""

import argparse
import json

from .arguments import (
    add_engine_arguments,
    add_model_arguments,
    demand_no_engine_args,
    find_stepflow,
    load_engine,
    load_with_stepflow,
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the description, the arguments and an example."""
    parser.description = (
        "Loads a model with StepFlow, lets it read a short trace at once and token by token, and checks:\n"
        "every bridge holds its floor, every injection arrives, every output of attention equals the reference, and\n"
        "with StepFlow off the logits are the base model's bit for bit. It also measures the cost of a token. With\n"
        "`--engine vllm`, vLLM then reads the same trace and writes after it, and is compared with all that. The\n"
        "report can be pasted into an issue as it is.\n\n"
        "MODEL is a preset's repository, a model that was saved with StepFlow, or any other model that StepFlow runs\n"
        "on; a folder, a Hub id, or `reasoner`. CONFIG is as for `hf-stepflow serve`.\n"
        "Exit status: 0 all checks hold, 1 one fails, 2 an error."
    )
    parser.epilog = "example: hf-stepflow verify Qwen/Qwen3-0.6B --stepflow tau_max=0.3"
    add_model_arguments(parser, positional=True)
    parser.add_argument("--stepflow", "--preset", metavar="CONFIG", help="the settings (default: as for `serve`)")
    add_engine_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 1 if a check fails."""
    from hf_stepflow.verification import verify_model

    demand_no_engine_args(args)
    model, _ = load_with_stepflow(args, find_stepflow(args.stepflow))
    if args.engine == "transformers":
        found = verify_model(model, args.model)
    else:
        from hf_stepflow.vllm.verification import verify_engine

        found = verify_engine(load_engine(args, model.stepflow_runtime.settings), model, args.model)
    print(json.dumps(found.to_dict(), indent=2) if args.json else f"```\n{found}\n```")
    return 0 if found.passed else 1
