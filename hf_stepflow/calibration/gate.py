"""The gate: StepFlow can only repair errors that become more frequent as traces of one source get longer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# The largest p-value, adjusted for the number of trends, that opens the gate.
LEVEL = 0.05

# The fewest problems of a source that must be solved, and that must be missed, to test for a trend.
FEWEST = 5

_RESAMPLES = 9999


@dataclass(frozen=True)
class Trend:
    """How errors depend on one measure of length within one source.

    Attributes:
        measure: The name of the measure.
        source: The source of the problems.
        odds_ratio: The factor on the odds of an error for each doubling of the length, by logistic regression; None if
            all errors are on one side of some length, so that the factor has no bound.
        p_value: The p-value of the one-sided permutation test that errors rise with length.
        short: The share of errors in the shortest third.
        long: The share of errors in the longest third.
    """

    measure: str
    source: str
    odds_ratio: float | None
    p_value: float
    short: float
    long: float


@dataclass(frozen=True)
class Gate:
    """The result of the gate.

    Attributes:
        is_open: Whether errors rise with length or depth within any source.
        problems: The number of problems.
        errors: The mean share of wrong responses.
        trends: One trend for each source and measure.
        reason: The reason in one sentence.
    """

    is_open: bool
    problems: int
    errors: float
    trends: list[Trend]
    reason: str


def look_for_trend(
    errors: Sequence[float],
    measures: Mapping[str, Sequence[float]],
    seed: int = 0,
    sources: Sequence[str] | None = None,
) -> Gate:
    """Tests whether errors rise with any measure of length within any source, with Holm's adjustment for all tests.

    Short problems of a hard source do not hide that the long ones of another fail.

    Args:
        errors: The share of wrong responses to each problem.
        measures: {name: length of each problem}, above zero; a measure that does not vary in a source is left out.
        seed: The seed of the permutations.
        sources: The source of each problem; None for one source.
    """
    wrong = np.asarray(errors, float)
    own_source = np.array(["all problems"] * len(wrong) if sources is None else list(sources), dtype=object)
    n, share = len(wrong), float(np.mean(wrong)) if len(wrong) else 0.0
    trends, is_enough = [], False
    for source in dict.fromkeys(own_source.tolist()):
        part = own_source == source
        if min((wrong[part] > 0).sum(), (wrong[part] < 1).sum()) < FEWEST:
            continue
        is_enough = True
        for name, lengths in measures.items():
            logs = np.log2(np.asarray(lengths, float))[part]
            if np.ptp(logs) > 0:
                trends.append(_trend(name, source, wrong[part], logs, seed))
    if not is_enough:
        missed, solved = int((wrong > 0).sum()), int((wrong < 1).sum())
        few = f"{missed} of {n} problems are missed" if missed < solved else f"{solved} of {n} problems are solved"
        each = " in any one source" * (min(missed, solved) >= FEWEST)
        return Gate(False, n, share, [], f"{few}, too few{each} to test whether errors rise with length")
    if not trends:
        return Gate(False, n, share, [], "all traces of a source have one length, so there is no trend to test")
    best = min(trends, key=lambda one: one.p_value)
    # Holm's first step, the smallest of k p-values times k, alone decides whether there is any trend.
    adjusted = min(1.0, len(trends) * best.p_value)
    thirds = f"errors in the shortest third by {best.measure}: {best.short:.1%}, in the longest: {best.long:.1%}"
    if adjusted <= LEVEL:
        place = f" in {best.source}" * (sources is not None)
        return Gate(True, n, share, trends, f"errors rise with {best.measure}{place} ({thirds}, p = {adjusted:.4f})")
    return Gate(False, n, share, trends, f"errors do not rise measurably with length ({thirds}, p = {adjusted:.2f})")


def _trend(measure: str, source: str, wrong: np.ndarray, logs: np.ndarray, seed: int) -> Trend:
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
    short, long = float(wrong[logs <= low].mean()), float(wrong[logs >= high].mean())
    return Trend(measure, source, odds_ratio(wrong, logs), float(test.pvalue), short, long)


def odds_ratio(wrong: np.ndarray, x: np.ndarray) -> float | None:
    """Fits a logistic regression of errors on x and returns the exponential of its slope; None if it has no bound.

    Args:
        wrong: Shares of errors, [n].
        x: Values of the regressor, [n], not all equal.
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
