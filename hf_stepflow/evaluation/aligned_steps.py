"""Two answers side by side: which step of one stands beside which step of the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import takewhile, zip_longest


@dataclass(frozen=True)
class StepPair:
    """Two steps that stand side by side.

    Attributes:
        first: The place of the first answer's step, or None.
        other: The place of the other answer's step, or None.
        is_same: Whether both are there and read the same, white space aside.
    """

    first: int | None
    other: int | None
    is_same: bool


def align_steps(first: Sequence[str], other: Sequence[str]) -> list[StepPair]:
    """Aligns the steps of two answers.

    Up to the first difference every step stands beside its like; after it, steps that both answers have in the same
    order stand side by side again.

    Args:
        first: The texts of the steps of one answer.
        other: Those of the other.

    Returns:
        Every step of both, in order. The first pair that is not the same is the first difference.

    Example:
        >>> from hf_stepflow.evaluation.aligned_steps import align_steps
        >>> [(pair.first, pair.other) for pair in align_steps(["a", "b", "c"], ["a", "x", "y", "c"])]
        [(0, 0), (1, 1), (None, 2), (2, 3)]
    """
    ours, theirs = ([" ".join(text.split()) for text in side] for side in (first, other))
    start = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))))
    pairs = [StepPair(place, place, True) for place in range(start)]
    matcher = SequenceMatcher(None, ours[start:], theirs[start:], autojunk=False)
    for kind, *places in matcher.get_opcodes():
        begin, end, begin_other, end_other = (start + place for place in places)
        for one, two in zip_longest(range(begin, end), range(begin_other, end_other)):
            pairs.append(StepPair(one, two, kind == "equal"))
    return pairs
