"""How the responses that a subcommand asks for are drawn."""

import argparse
import math
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError

from .seeds import read_seed

_TEMPERATURE = 0.7  # where sampling is asked for and nothing says how


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how long responses are and how they are drawn."""
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="of a response (default: 2048)")
    parser.add_argument(
        "--temperature", type=float, help="sample at this temperature (default: greedy decoding, as at 0)"
    )
    parser.add_argument("--top-p", type=float, help=f"nucleus of the sampling (temperature then: {_TEMPERATURE})")
    parser.add_argument("--seed", type=read_seed, default=0, help="of everything that is drawn (default: 0)")


def sampling_of(args: argparse.Namespace, is_needed: bool = False) -> dict[str, Any]:
    """The arguments of `generate` that say how responses are drawn; empty for greedy decoding.

    Args:
        args: of the command.
        is_needed: greedy decoding makes no sense here, so sample unless a temperature of 0 is asked for.

    Raises:
        StepFlowInputError: values that make no sense.
    """
    if args.max_new_tokens < 1:
        raise StepFlowInputError(f"--max-new-tokens must be 1 or more, got {args.max_new_tokens}")
    if args.temperature is not None and not 0 <= args.temperature < math.inf:
        raise StepFlowInputError(f"--temperature must be 0 or more, got {args.temperature}", hint="0 is greedy")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise StepFlowInputError(f"--top-p must be above 0 and at most 1, got {args.top_p}", hint="for instance 0.95")
    if args.temperature == 0 or not (is_needed or args.temperature is not None or args.top_p is not None):
        return {}
    sampling = {"do_sample": True, "temperature": _TEMPERATURE if args.temperature is None else args.temperature}
    return sampling if args.top_p is None else sampling | {"top_p": args.top_p}
