"""Statistics of paired comparisons, by scipy and statsmodels: intervals, exact tests, and the power of a test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8
_RESAMPLES = 9999


@dataclass(frozen=True)
class Estimate:
    """A number and its interval at `CONFIDENCE`, which is None if there are too few values for one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PairedComparison:
    """One arm compared with another on the same problems.

    Attributes:
        problems: The number of problems, n.
        delta: The difference in accuracy (second minus first), with a bootstrap interval over problems.
        p_value: McNemar's exact test if each problem was answered once, else an exact or resampled sign-flip test.
        gained: The number of results that only the second arm has right.
        lost: The number of results that only the first arm has right.
        harm_rate: The share of the problems solved by the first arm that the second one breaks, with Wilson's
            interval; None if the first solves none, and for sampled responses, some of which break by chance.
        smallest_delta: The true difference that this n would have shown with `POWER`, given how often the arms
            differ; None if n could not have shown any.
    """

    problems: int
    delta: Estimate
    p_value: float
    gained: int
    lost: int
    harm_rate: Estimate | None
    smallest_delta: float | None


def proportion(hits: int, n: int) -> Estimate:
    """A share with Wilson's interval."""
    interval = stats.binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(hits / n, float(interval.low), float(interval.high))


def clustered_share(hits: Sequence[float], counts: Sequence[int], seed: int = 0) -> Estimate:
    """A share of responses of which several may belong to one problem, so that they are not independent.

    Args:
        hits: For each problem, the number of its responses that count; a fraction if each counts in part.
        counts: For each problem, the number of its responses, at least one.
        seed: The seed of the resampling.

    Returns:
        The ratio of the sums. If each problem has one response, which counts wholly or not at all, with Wilson's
        interval; else with a bootstrap interval over problems, or, if all problems have the same share, with an exact
        bound on the share of problems that could differ.

    Example:
        >>> one = clustered_share([1, 0, 1], [1, 1, 1])
        >>> one == proportion(2, 3)
        True
    """
    above, below = np.asarray(hits, float), np.asarray(counts, float)
    if np.all(below == 1) and np.all((above == 0) | (above == 1)):
        return proportion(int(above.sum()), len(above))
    shares = above / below
    return ratio(above, below, seed) if np.ptp(shares) > 0 else _bounded_mean(shares, 0.0, 1.0, seed)


def mean(values: "Sequence[float] | np.ndarray", seed: int = 0) -> Estimate:
    """A mean of shares over problems, with its bootstrap interval."""
    return _bounded_mean(np.asarray(values, float), 0.0, 1.0, seed)


def mean_difference(values: "Sequence[float] | np.ndarray", seed: int = 0) -> Estimate:
    """A mean of differences between two accuracies over problems, with its bootstrap interval."""
    return _bounded_mean(np.asarray(values, float), -1.0, 1.0, seed)


def mean_amount(values: "Sequence[float] | np.ndarray", seed: int = 0) -> Estimate:
    """A mean of amounts over problems, with its bootstrap interval if there is more than one problem."""
    return ratio(values, [1.0] * len(values), seed)


def ratio(
    numerator: "Sequence[float] | np.ndarray", denominator: "Sequence[float] | np.ndarray", seed: int = 0
) -> Estimate:
    """A ratio of two sums over the same units, with its bootstrap interval if there is more than one unit."""
    pairs = np.asarray(numerator, float), np.asarray(denominator, float)
    if len(pairs[0]) < 2:
        return Estimate(float(pairs[0].sum() / pairs[1].sum()), None, None)
    return _bootstrap(pairs, lambda x, y, axis: np.sum(x, axis=axis) / np.sum(y, axis=axis), seed)


def compare(
    first: Sequence[Sequence[bool]],
    second: Sequence[Sequence[bool]],
    seed: int = 0,
    comparisons: int = 1,
    is_sequential: bool = False,
) -> PairedComparison:
    """Compares two arms; resampling draws problems, so that the samples of one problem stay together.

    Args:
        first: For each problem, whether each of its samples was right in the reference arm.
        second: The same problems and samples in the other arm.
        seed: The seed of the resampling.
        comparisons: The number of comparisons made at once, for which `smallest_delta` allows.
        is_sequential: Whether somebody looked before the end and may have stopped: the p-value is then that of
            `sequential_p_value`.
    """
    one, other = ([np.asarray(row, float) for row in rows] for rows in (first, second))
    differences = np.array([b.mean() - a.mean() for a, b in zip(one, other, strict=True)])
    flat_one, flat_other = np.concatenate(one), np.concatenate(other)
    gained, lost = int((flat_other > flat_one).sum()), int((flat_other < flat_one).sum())
    right, is_single = int(flat_one.sum()), all(len(row) == 1 for row in one)
    return PairedComparison(
        problems=len(differences),
        delta=mean_difference(differences, seed),
        p_value=sequential_p_value(int((differences > 0).sum()), int((differences < 0).sum()))
        if is_sequential
        else paired_p_value(differences, is_single, seed),
        gained=gained,
        lost=lost,
        harm_rate=proportion(lost, right) if right and is_single else None,
        smallest_delta=smallest_delta(differences, is_single, (1 - CONFIDENCE) / comparisons),
    )


def adjust(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment for several comparisons at once."""
    if len(p_values) < 2:
        return list(p_values)
    from statsmodels.stats.multitest import multipletests

    return [float(value) for value in multipletests(p_values, method="holm")[1]]


def paired_p_value(differences: np.ndarray, is_single: bool, seed: int = 0) -> float:
    """A two-sided test that neither arm is better.

    Args:
        differences: The difference of the arms' accuracies on each problem.
        is_single: Whether each problem was answered once: then McNemar's exact test, else a sign-flip test.
        seed: The seed of the resampling, if there are too many sign patterns to try all.
    """
    up, down = int((differences > 0).sum()), int((differences < 0).sum())
    if up + down == 0:
        return 1.0
    if is_single:
        return float(stats.binomtest(up, up + down, 0.5).pvalue)
    if up + down == 1:
        return 1.0  # both signs are as extreme, and permutation_test refuses a single observation
    test = stats.permutation_test(
        (differences[differences != 0],),
        np.mean,
        permutation_type="samples",
        n_resamples=_RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def sequential_p_value(gained: int, lost: int) -> float:
    """A p-value that holds whenever one looks, and however often: that neither arm is better on a problem.

    Where the arms differ on a problem, either is right with probability 1/2 if neither is better. The likelihood ratio
    to that of all other probabilities at once, each equally likely before, is a martingale then, which exceeds 1 / p
    at any time with probability p at most (Ville's inequality; the mixture is Robbins', 1970).

    Args:
        gained: The number of problems that only the second arm has solved so far.
        lost: The number of those that only the first arm has.

    Example:
        >>> [round(sequential_p_value(gained, 0), 4) for gained in (0, 4, 8, 12)]
        [1.0, 0.3125, 0.0352, 0.0032]
    """
    logarithm = math.lgamma(gained + 1) + math.lgamma(lost + 1) - math.lgamma(gained + lost + 2)
    return min(1.0, math.exp(-logarithm - (gained + lost) * math.log(2)))


def smallest_delta(differences: np.ndarray, is_single: bool, level: float = 1 - CONFIDENCE) -> float | None:
    """The true difference that would have been found with `POWER`, or None; given how often the arms differ.

    Args:
        differences: The difference of the arms' accuracies on each problem.
        is_single: Whether each problem was answered once: then by the exact power of McNemar's test, else by the
            normal approximation from the spread of the differences.
        level: The level of the test.
    """
    n = len(differences)
    if is_single:
        return _smallest_by_power(n, float(np.mean(differences != 0)), level)
    spread = float(np.sqrt(np.mean(differences**2))) or math.sqrt(1 / n)
    delta = float((stats.norm.ppf(1 - level / 2) + stats.norm.ppf(POWER)) * spread / math.sqrt(n))
    return delta if delta <= 1 else None


def _smallest_by_power(n: int, often: float, level: float) -> float | None:
    """By bisection; the arms differ on a share `often` of the problems, or on `delta` of them if that is more."""
    counts = np.arange(n + 1)
    # For each number of differing problems: how many may go the other way at this level, -1 for none.
    critical = stats.binom.ppf(level / 2, counts, 0.5) - 1
    critical = np.where(stats.binom.cdf(critical + 1, counts, 0.5) <= level / 2, critical + 1, critical)

    def power(delta: float) -> float:
        share = max(often, delta)
        seen = stats.binom.cdf(critical, counts, (1 - delta / share) / 2)
        return float(np.sum(stats.binom.pmf(counts, n, share) * seen))

    if power(1.0) < POWER:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def _bounded_mean(values: np.ndarray, lowest: float, highest: float, seed: int) -> Estimate:
    """A mean with its bootstrap interval, or with an exact bound if all values are equal."""
    if np.ptp(values) > 0:
        return _bootstrap((values,), lambda x, axis: np.mean(x, axis=axis), seed)
    share = 1 - ((1 - CONFIDENCE) / 2) ** (1 / len(values))
    value = float(values[0])
    return Estimate(value, value - share * (value - lowest), value + share * (highest - value))


def _bootstrap(samples: tuple[np.ndarray, ...], statistic: object, seed: int) -> Estimate:
    value = float(statistic(*samples, axis=-1))  # type: ignore[operator]
    interval = stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=_RESAMPLES,
        batch=500,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))
