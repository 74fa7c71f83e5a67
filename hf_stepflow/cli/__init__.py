"""The command `hf-stepflow`.

Each subcommand is one file of this package, named in `SUBCOMMANDS` and imported only when it is asked for. It defines
`configure(parser)`, which adds the description, the arguments and an example, and `run(args)`, which returns the exit
status.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from hf_stepflow.runtime.errors import StepFlowError

SUBCOMMANDS = {
    "calibrate": "settings for a model that are better than the base, found and judged on your problems",
    "demo": "a small model on this machine, with and without StepFlow",
    "diagnose": "which steps of a trace draw on which: Step-Saliency",
    "doctor": "what is installed here and what of it StepFlow can use",
    "eval": "StepFlow settings and baselines, compared on the same problems",
    "export": "a preset as a folder that transformers loads",
    "generate": "one answer of a model with StepFlow, as it is written",
    "presets": "settings for models and where they come from: list, show, card, validate",
    "push": "a preset's repository on the Hub",
}
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # as shells have it

# Modules that come with an extra, by the name under which they are imported.
_EXTRAS = {
    "datasets": "eval",
    "matplotlib": "saliency",
    "optuna": "calibrate",
    "math_verify": "eval",
    "rich": "demo",
    "scipy": "eval",
    "statsmodels": "eval",
    "tqdm": "eval",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: The words after the program's name; `sys.argv[1:]` if not given.

    Returns:
        The exit status: 0 for success, 2 for bad input, 130 where it was interrupted, else what the subcommand says
        in its help.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="hf-stepflow",
        description="StepFlow for transformers.",
        epilog="example: hf-stepflow doctor",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {metadata.version('hf-stepflow')}")
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    asked_for = next((word for word in words if not word.startswith("-")), None)
    runs = {}
    for name, summary in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if name == asked_for:
            module = import_module(f"{__name__}.{name}")
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
        if error.name not in _EXTRAS:
            raise
        return _refuse(f"{error.name} is not installed", f"pip install 'hf-stepflow[{_EXTRAS[error.name]}]'")


def _refuse(message: str, hint: str | None) -> int:
    print(f"hf-stepflow: error: {' '.join(message.split())}", file=sys.stderr)
    if hint is not None:
        print(f"hint: {hint}", file=sys.stderr)
    return EXIT_ERROR
