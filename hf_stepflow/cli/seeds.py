"""The option `--seed` of subcommands, read the same by all."""

import argparse


def read_seed(text: str) -> int:
    """The type of the option: a whole number from 0 on, below 2^63, as the generators of random numbers take it.

    Args:
        text: what was typed.

    Raises:
        argparse.ArgumentTypeError: it is no such number; argparse ends the command with it, before any work is done.
    """
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(
            f"a seed is a whole number from 0 on, below 2^63, got {text!r}: pass for instance 0"
        )
    return number
