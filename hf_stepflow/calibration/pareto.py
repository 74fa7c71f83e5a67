"""The choice: candidates that no other beats in gain, damage and cost at once."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """The results of a candidate on the last calibration problems that it answered.

    Attributes:
        trial: The number of the candidate.
        problems: The number of problems.
        gain: The difference in accuracy from the base, a share.
        damage: The share of the problems solved by the base that it breaks.
        cost: The tokens of its answers, relative to the base's, to two decimals.
        harmed: The strata that measurably lose.
        words: Its settings in words.
    """

    trial: int
    problems: int
    gain: float
    damage: float
    cost: float
    harmed: list[str]
    words: str = ""

    def beats(self, other: "Outcome") -> bool:
        """Whether this one is at least as good in gain, damage and cost, and better in one of them."""
        own, their = (self.gain, -self.damage, -self.cost), (other.gain, -other.damage, -other.cost)
        return own != their and all(one >= two for one, two in zip(own, their, strict=True))


def front(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Returns the candidates that neither another one nor the base beats, the largest gain first.

    Args:
        outcomes: The outcomes of all candidates, in the order that decides between equals.

    Example:
        >>> from hf_stepflow.calibration.pareto import Outcome, front
        >>> made = [Outcome(1, 99, 0.04, 0.01, 1.0, []), Outcome(2, 99, 0.03, 0.02, 1.0, [])]
        >>> [one.trial for one in front(made)]
        [1]
    """
    base = Outcome(-1, 0, 0.0, 0.0, 1.0, [])
    kept = [one for one in outcomes if not any(other.beats(one) for other in (base, *outcomes))]
    return sorted(kept, key=lambda one: -one.gain)
