"""Stage 0, the gate: only errors that rise with length or depth are of the kind that StepFlow could repair."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

# Trends with p-values of at most so much, adjusted for their number, open the gate.
LEVEL = 0.05

# Problems that must be solved, and that must be missed, for a trend to be looked for.
FEWEST = 5

_RESAMPLES = 9999


@dataclass(frozen=True)
class Trend:
    """How errors depend on one measure of length.

    Attributes:
        measure: what it is.
        odds_ratio: what a doubling multiplies the odds of an error by, by logistic regression; None where the errors
            are all on one side of a length, so that it has no bound.
        p_value: of the one-sided permutation test that errors rise with it.
        short: share of errors in the shortest third.
        long: share of errors in the longest third.
    """

    measure: str
    odds_ratio: float | None
    p_value: float
    short: float
    long: float


@dataclass(frozen=True)
class Gate:
    """What the gate found.

    Attributes:
        is_open: whether errors rise with length or depth.
        problems: how many were looked at.
        errors: mean share of wrong responses.
        trends: by measure.
        reason: one sentence.
    """

    is_open: bool
    problems: int
    errors: float
    trends: list[Trend]
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)


def look_for_trend(errors: Sequence[float], measures: Mapping[str, Sequence[float]], seed: int = 0) -> Gate:
    """Tests whether errors rise with any measure of length, with Holm's adjustment for their number.

    Args:
        errors: share of wrong responses to each problem.
        measures: lengths of each problem by their names, above zero; one that does not vary is left out.
        seed: of the permutations.
    """
    wrong = np.asarray(errors, float)
    n, share = len(wrong), float(np.mean(wrong)) if len(wrong) else 0.0
    missed, solved = int((wrong > 0).sum()), int((wrong < 1).sum())
    if min(missed, solved) < FEWEST:
        few = f"{missed} of {n} problems are missed" if missed < solved else f"{solved} of {n} problems are solved"
        return Gate(False, n, share, [], f"{few}, too few to tell whether errors rise with length")
    trends = []
    for name, lengths in measures.items():
        logs = np.log2(np.asarray(lengths, float))
        if np.ptp(logs) > 0:
            trends.append(_trend(name, wrong, logs, seed))
    if not trends:
        return Gate(False, n, share, [], "all traces are of one length, so that no trend can be seen")
    best = min(trends, key=lambda one: one.p_value)
    # The smallest of k p-values times k: Holm's first step, which alone decides whether any trend is there.
    adjusted = min(1.0, len(trends) * best.p_value)
    told = f"errors in the shortest third by {best.measure}: {best.short:.1%}, in the longest: {best.long:.1%}"
    if adjusted <= LEVEL:
        return Gate(True, n, share, trends, f"errors rise with {best.measure} ({told}, p = {adjusted:.4f})")
    return Gate(False, n, share, trends, f"errors do not rise measurably with length ({told}, p = {adjusted:.2f})")


def _trend(measure: str, wrong: np.ndarray, logs: np.ndarray, seed: int) -> Trend:
    # The score statistic of the logistic regression, up to constants that permutations do not change.
    test = stats.permutation_test(
        (wrong,),
        lambda values, axis: (values * (logs - logs.mean())).sum(axis),
        permutation_type="pairings",
        alternative="greater",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=500,
        rng=np.random.default_rng(seed),
    )
    low, high = np.quantile(logs, [1 / 3, 2 / 3])
    return Trend(
        measure,
        odds_ratio(wrong, logs),
        float(test.pvalue),
        float(wrong[logs <= low].mean()),
        float(wrong[logs >= high].mean()),
    )


def odds_ratio(wrong: np.ndarray, x: np.ndarray) -> float | None:
    """The exponential of the slope of a logistic regression of errors on x; None where it has no bound.

    Args:
        wrong: share of errors, [n].
        x: [n], not all equal.
    """
    design = np.stack([np.ones_like(x), x - x.mean()], 1)
    beta = np.zeros(2)
    for _ in range(50):
        chance = 1 / (1 + np.exp(-np.clip(design @ beta, -30, 30)))
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design
        if np.linalg.cond(curvature) > 1e12:
            return None
        step = np.linalg.solve(curvature, design.T @ (wrong - chance))
        beta += step
        if np.abs(step).max() < 1e-9:
            return float(math.exp(beta[1])) if abs(beta[1]) < 30 else None
    return None
