"""Non-inferiority: whether settings lose less than a stated bound, by tests that hold for any number of problems."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import stats

# The most accuracy that settings may lose in a stratum, as a share, and the level of the one-sided test.
BOUND = 0.01
LEVEL = 0.05
POWER = 0.8

# Values of the nuisance parameter that are tried, and the rounds of trying closer ones.
_GRID, _ROUNDS = 64, 3

# Stakes of the betting test, as shares of the largest one.
_STAKES = np.linspace(0.02, 1.0, 50)

# Numbers of problems beyond this are not looked for.
_MOST = 1 << 20


def non_inferiority(differences: Sequence[float], bound: float = BOUND) -> float:
    """A one-sided p-value that settings lose the bound or more, on average over problems.

    A small value shows that they lose less. If every problem was answered once, the test is exact and unconditional,
    on the restricted score statistic (`exact_p_value`); of several samples, a bet (`betting_p_value`).

    Args:
        differences: For each problem, the accuracy under the settings minus the base's, in [-1, 1].
        bound: The loss to exclude, a share in (0, 1).

    Example:
        >>> from hf_stepflow.calibration.non_inferiority import non_inferiority
        >>> [round(non_inferiority([0.0] * n), 3) for n in (100, 300, 500)]
        [0.366, 0.049, 0.013]
    """
    values = np.asarray(differences, float)
    if not len(values):
        return 1.0
    if np.isin(values, (-1.0, 0.0, 1.0)).all():
        return exact_p_value(int((values > 0).sum()), int((values < 0).sum()), len(values), bound)
    return betting_p_value(values, bound)


def score(gained: np.ndarray, lost: np.ndarray, n: int, bound: float) -> np.ndarray:
    """Tango's score statistic of paired shares against a loss of `bound` (Statistics in Medicine 17, 1998, p. 891).

    The variance is that of the likeliest probabilities under which exactly `bound` is lost.

    Args:
        gained: The numbers of problems that only the settings solve, any shape.
        lost: The numbers of problems that only the base solves, the same shape.
        n: The number of problems.
        bound: The loss, a share.

    Returns:
        The statistic, float64 in the same shape: large where less is lost.
    """
    gained, lost = np.asarray(gained, float), np.asarray(lost, float)
    # The probability of a loss, likeliest under the restriction: the larger root of 2n q^2 + b q + c.
    b = -(gained + lost) - (2 * n - gained + lost) * bound
    c = lost * bound * (1 + bound)
    share = (np.sqrt(np.maximum(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * np.maximum(2 * share - bound * (1 + bound), 0.0)
    return (gained - lost + n * bound) / np.sqrt(np.maximum(variance, 1e-300))


@lru_cache(maxsize=4096)
def exact_p_value(gained: int, lost: int, n: int, bound: float = BOUND) -> float:
    """The largest probability, over all ways to lose `bound`, of a score as favourable as the one observed.

    This is the unconditional exact test of Hsueh, Liu and Chen (Biometrics 57, 2001, p. 478) on Tango's statistic.
    Where exactly `bound` is lost, the probability of a loss is the only unknown; more losses make the score smaller.

    Args:
        gained: The number of problems that only the settings solve.
        lost: The number of problems that only the base solves.
        n: The number of problems.
        bound: The loss to exclude, a share in (0, 1).
    """
    counts = np.arange(n + 1)
    least = _least_gains(float(score(np.array(gained), np.array(lost), n, bound)), n, bound)

    def probability(shares: np.ndarray) -> np.ndarray:
        of_losses = stats.binom.pmf(counts, n, shares[:, None])
        gains = np.clip((shares[:, None] - bound) / np.maximum(1 - shares[:, None], 1e-300), 0.0, 1.0)
        return (of_losses * stats.binom.sf(least - 1, n - counts, gains)).sum(-1)

    low, high = bound, (1 + bound) / 2
    best = 0.0
    for _ in range(_ROUNDS):
        shares = low + (high - low) * np.linspace(0.0, 1.0, _GRID) ** 2
        found = probability(shares)
        at = int(found.argmax())
        best = max(best, float(found[at]))
        low, high = float(shares[max(at - 1, 0)]), float(shares[min(at + 1, _GRID - 1)])
    return min(1.0, best)


def _least_gains(observed: float, n: int, bound: float) -> np.ndarray:
    """For each number of losses, 0 to n, the fewest gains with a score of at least `observed`; n + 1 for none."""
    lost = np.arange(n + 1)
    low, high = np.zeros(n + 1, int), np.full(n + 1, n + 1)
    while (low < high).any():
        middle = (low + high) // 2
        is_enough = (middle <= n - lost) & (score(middle, lost, n, bound) >= observed - 1e-9)
        is_too_many = middle > n - lost
        high = np.where(is_enough | is_too_many, np.minimum(middle, high), high)
        low = np.where(is_enough | is_too_many, low, middle + 1)
    return np.where(low > n - lost, n + 1, low)


def betting_p_value(differences: np.ndarray, bound: float = BOUND) -> float:
    """The p-value of a bet against a loss of `bound`, for differences of any size in [-1, 1].

    Whoever stakes a fixed share on every problem multiplies their money by `1 + stake * (difference + bound)`. If the
    mean loss is `bound` or more, they expect to win nothing at any stake up to `1 / (1 - bound)`; money spread over
    stakes exceeds 1 / p with probability p at most (Waudby-Smith and Ramdas, JRSS B 86, 2024, p. 1).

    Args:
        differences: For each problem, the accuracy under the settings minus the base's.
        bound: The loss to exclude, a share in (0, 1).
    """
    stakes = _STAKES / (1 - bound)
    with np.errstate(divide="ignore"):
        money = np.log1p(stakes[:, None] * (np.asarray(differences, float) + bound)).sum(-1)
    return min(1.0, math.exp(-float(np.logaddexp.reduce(money)) + math.log(len(stakes))))


def problems_needed(differing: float, bound: float = BOUND) -> int:
    """How many problems it takes to exclude a loss of `bound` with a chance of 80 %, if nothing is lost on average.

    Args:
        differing: The share of problems on which the settings and the base differ.
        bound: The loss to exclude, a share in (0, 1).

    Example:
        >>> from hf_stepflow.calibration.non_inferiority import problems_needed
        >>> [problems_needed(share) for share in (0.0, 0.05, 0.1)]
        [299, 3092, 6183]
    """
    spread = (stats.norm.ppf(1 - LEVEL) + stats.norm.ppf(POWER)) / bound
    return max(_fewest(bound), math.ceil(spread**2 * differing))


@lru_cache(maxsize=64)
def _fewest(bound: float) -> int:
    """The fewest problems with which settings that change no result pass."""
    low, high = 0, max(1, math.ceil(1 / bound))
    while exact_p_value(0, 0, high, bound) > LEVEL and high < _MOST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if exact_p_value(0, 0, middle, bound) <= LEVEL else (middle, high)
    return high
