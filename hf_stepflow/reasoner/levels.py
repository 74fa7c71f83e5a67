"""Named difficulties of the reasoner's problems."""

import random
from collections.abc import Callable
from functools import partial

from hf_stepflow.runtime.errors import StepFlowInputError

from . import chains
from .problems import Drawn, Problem, draw

# chains-N: N quantities must be known; training goes up to 6.
# errands-N: about N sentences of counting; training goes up to 30.
LEVELS: dict[str, Callable[[random.Random], Drawn]] = {
    **{f"chains-{n}": partial(chains.make, people=n, distractors=n // 2 + 1) for n in (2, 4, 6, 7, 8)},
    **{
        f"errands-{n}": partial(chains.make, people=5, distractors=3, counts=4, sentences=n)
        for n in (10, 30, 60, 90, 120, 180)
    },
}


def problems_of(level: str, split: str, number: int, start: int = 0) -> list[Problem]:
    """Draws problems of a level, the same on every machine.

    Args:
        level: A key of `LEVELS`.
        split: `train`, `calibration` or `test`.
        number: The number of problems.
        start: The index of the first one.

    Raises:
        StepFlowInputError: The level or the split does not exist.

    Example:
        >>> from hf_stepflow.reasoner.levels import problems_of
        >>> [problem.id for problem in problems_of("chains-4", "test", 2)]
        ['chains-4/test/0', 'chains-4/test/1']
    """
    if level not in LEVELS:
        raise StepFlowInputError(f"there is no level {level!r}", hint=f"levels: {', '.join(LEVELS)}")
    return [draw(level, LEVELS[level], split, one) for one in range(start, start + number)]
