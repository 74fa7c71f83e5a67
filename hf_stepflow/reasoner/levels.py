"""Named difficulties of the reasoner's problems."""

import random
from collections.abc import Callable
from functools import partial

from hf_stepflow.runtime.errors import StepFlowInputError

from . import chains
from .problems import Drawn, Problem, draw

# Chains by the number of quantities to be known; the longest that is trained on has six.
# Errands by the number of counting sentences in between; a problem of the training has thirty at most.
LEVELS: dict[str, Callable[[random.Random], Drawn]] = {
    **{f"chains-{n}": partial(chains.make, people=n, distractors=n // 2 + 1) for n in (2, 4, 6, 7, 8)},
    **{
        f"errands-{n}": partial(chains.make, people=5, distractors=3, counts=4, sentences=n)
        for n in (10, 30, 60, 90, 120, 180)
    },
}


def problems_of(level: str, split: str, number: int, start: int = 0) -> list[Problem]:
    """Problems of a level, the same on every machine.

    Args:
        level: a key of `LEVELS`.
        split: `train`, `calibration` or `test`.
        number: how many.
        start: the first of them.

    Raises:
        StepFlowInputError: no such level or split.
    """
    if level not in LEVELS:
        raise StepFlowInputError(f"there is no level {level!r}", hint=f"levels: {', '.join(LEVELS)}")
    return [draw(level, LEVELS[level], split, one) for one in range(start, start + number)]
