"""The command `hf-stepflow`.

Each subcommand is a module of this package, listed in `SUBCOMMANDS` and imported only when it runs. It defines
`configure(parser)`, which adds the description, the arguments and an example, and `run(args)`, which returns the exit
status. `arguments` holds the arguments that subcommands share, and `terminal` the way answers are printed.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from hf_stepflow.runtime.errors import StepFlowError

SUBCOMMANDS = {
    "app": "open a page on which a model answers with and without StepFlow, in the browser",
    "calibrate": "find settings that beat the base model on your problems, and judge them on held-out ones",
    "demo": "watch a small model answer a problem with and without StepFlow",
    "diagnose": "show which steps of a trace draw on which (Step-Saliency)",
    "doctor": "show what is installed here, and whether StepFlow runs on a model",
    "eval": "compare StepFlow settings and other methods on the same problems",
    "export": "write a preset as a folder that transformers loads",
    "generate": "answer one prompt with StepFlow, step by step",
    "presets": "list, show and check presets (settings for models), and write their cards",
    "push": "upload a preset's repository to the Hub",
    "serve": "serve a model with StepFlow over HTTP, with the OpenAI-compatible routes of transformers",
    "verify": "prove that StepFlow acts on a model and computes what it should, on this machine",
    "view": "write one HTML page that shows every response of a run, step by step",
}
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # the status that shells use


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: The words after the program's name; None takes `sys.argv[1:]`.

    Returns:
        The exit status: 0 for success, 2 for bad input, 130 for an interruption. The help of a subcommand names any
        others.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="hf-stepflow", description="StepFlow for transformers.", epilog="example: hf-stepflow doctor"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {metadata.version('hf-stepflow')}")
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    chosen = next((word for word in words if not word.startswith("-")), None)
    runs = {}
    for name, summary in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if name == chosen:
            try:
                module = import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                return _refuse_without(error, name)
            module.configure(subparser)
            runs[name] = module.run
    args = parser.parse_args(words)
    try:
        return runs[args.subcommand](args)
    except StepFlowError as error:
        return _refuse(error.message, error.hint)
    except KeyboardInterrupt:
        print("\nhf-stepflow: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        return _refuse_without(error, args.subcommand)


def _refuse_without(error: ModuleNotFoundError, subcommand: str) -> int:
    """Names the extra that installs a missing module; raises the error again if there is none."""
    extra = _extra_with(error.name, subcommand)
    if extra is None:
        raise error
    return _refuse(f"{error.name} is not installed", f"pip install 'hf-stepflow[{extra}]'")


def _extra_with(module: str | None, subcommand: str) -> str | None:
    """The extra that installs a module, that of the subcommand's own name if several do; None if none does."""
    extras = []
    for requirement in metadata.requires("hf-stepflow") or []:
        found = re.match(r"([\w.-]+).*;.*extra == ['\"]([\w-]+)['\"]", requirement)
        if found and found[1].replace("-", "_") == module and found[2] not in ("all", "test"):
            extras.append(found[2])
    return subcommand if subcommand in extras else next(iter(extras), None)


def _refuse(message: str, hint: str | None) -> int:
    print(f"hf-stepflow: error: {' '.join(message.split())}", file=sys.stderr)
    if hint is not None:
        print(f"hint: {hint}", file=sys.stderr)
    return EXIT_ERROR
