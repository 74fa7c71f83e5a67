"""Stage 4: the winner against the base on the held-out problems, once."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_stepflow.evaluation.result import ArmComparison, EvaluationResult
from hf_stepflow.evaluation.statistics import Estimate

GAIN, NO_GAIN, HARM = "gain", "no measurable gain", "harm"
LEVEL = 0.05

BASE = "base"


@dataclass(frozen=True)
class Measured:
    """One set of settings against the base, on the same problems.

    Attributes:
        name: of the settings.
        problems: n.
        base: the base's accuracy.
        accuracy: that of the settings.
        delta: their difference, with a bootstrap interval over problems.
        p_value: exact McNemar test (of several samples a problem: a sign-flip test).
        gained, lost: responses that only one of both has right.
        harm_rate: share of the problems that the base solves and the settings break; None for several samples.
        tokens_ratio: tokens per answer, relative to the base's.
        seconds_ratio: time, relative to the base's.
        changed: share of the responses whose text differs.
        smallest_delta: the true difference that n could have shown four times in five; None for none.
    """

    name: str
    problems: int
    base: Estimate
    accuracy: Estimate
    delta: Estimate
    p_value: float
    gained: int
    lost: int
    harm_rate: Estimate | None
    tokens_ratio: Estimate
    seconds_ratio: Estimate
    changed: float
    smallest_delta: float | None

    @property
    def verdict(self) -> str:
        """A gain or a harm only where both the interval and the exact test say so."""
        low, high = self.delta.low, self.delta.high
        if low is None or high is None or low <= 0 <= high or self.p_value >= LEVEL:
            return NO_GAIN
        return GAIN if low > 0 else HARM

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data, with the verdict."""
        return asdict(self) | {"verdict": self.verdict}


def measure(
    results: Mapping[str, Sequence[dict[str, Any]]], name: str, *, against: str = BASE, samples: int = 1, seed: int = 0
) -> Measured:
    """Compares two arms.

    Args:
        results: responses by arm, as the laboratory gives them.
        name: the arm.
        against: what it is held against.
        samples: responses to each problem.
        seed: of the resampling.
    """
    rows = [{**row, "arm": arm} for arm in (against, name) for row in results[arm]]
    run = {
        "arms": {against: {}, name: {}},
        "n_problems": len({row["problem"] for row in rows}),
        "n_samples": samples,
        "seed": seed,
    }
    result = EvaluationResult(run, {}, rows)
    base, own = result.arms()
    (found,) = result.comparisons
    return _measured(found, base.accuracy, own.accuracy)


def _measured(found: ArmComparison, base: Estimate, accuracy: Estimate) -> Measured:
    paired = found.paired
    return Measured(
        name=found.name,
        problems=paired.problems,
        base=base,
        accuracy=accuracy,
        delta=paired.delta,
        p_value=paired.p_value,
        gained=paired.gained,
        lost=paired.lost,
        harm_rate=paired.harm_rate,
        tokens_ratio=found.tokens_ratio,
        seconds_ratio=found.seconds_ratio,
        changed=found.changed,
        smallest_delta=paired.smallest_delta,
    )
