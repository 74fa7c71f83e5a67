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
    "demo": "a small model on this machine, with and without StepFlow",
    "doctor": "what is installed here and what of it StepFlow can use",
}
EXIT_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: The words after the program's name; `sys.argv[1:]` if not given.

    Returns:
        The exit status: 0 for success, 2 for bad input, else what the subcommand says in its help.
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
        print(f"hf-stepflow: error: {' '.join(error.message.split())}", file=sys.stderr)
        if error.hint is not None:
            print(f"hint: {error.hint}", file=sys.stderr)
        return EXIT_ERROR
