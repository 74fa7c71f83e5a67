"""The proxy: how settings change the likelihood of right and wrong responses, one forward pass a response.

Every needed token counts: the whole right trace and its answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .traces import Row

# A response changes the proxy by this much at most, in nats: one that becomes impossible does not outvote all others.
CLIP = 10.0

# What right traces of short and easy problems may lose on average, in nats a trace.
TOLERANCE = 0.02


@dataclass(frozen=True)
class ProxyScore:
    """What settings change, in nats a response, relative to other settings (the base).

    Attributes:
        value: mean of `likelihood` and `margin`: what the search maximises.
        error: its standard error over problems.
        likelihood: change of the log-likelihood of right responses.
        margin: the same, less the change of wrong ones.
        short: change on the right responses of short and easy problems; None where there are none.
    """

    value: float
    error: float
    likelihood: float
    margin: float
    short: float | None

    @property
    def is_harmless(self) -> bool:
        """Whether short and easy problems lose nothing to speak of."""
        return self.short is None or self.short >= -TOLERANCE

    @property
    def objective(self) -> float:
        """The value, below zero (the base's) where short and easy problems are harmed."""
        if self.is_harmless or self.short is None:
            return self.value
        return min(self.value, 0.0) + self.short


def proxy_score(rows: Sequence[Row], before: Sequence[float], after: Sequence[float], short: set[str]) -> ProxyScore:
    """Holds the likelihoods of the same responses under two settings against each other.

    Args:
        rows: the responses; of each kind, those of one problem share its weight.
        before: log-likelihoods under the settings that are held against, in nats.
        after: those under the others.
        short: ids of the short and easy problems.
    """
    changes = _changes(rows, np.asarray(before, float), np.asarray(after, float))
    problems = list(dict.fromkeys(row.problem for row in rows))
    weights = np.array([next(row.weight for row in rows if row.problem == name) for name in problems])
    right, wrong = (_by_problem(rows, changes, problems, kind) for kind in (True, False))
    likelihood, of_right = _mean(right, weights)
    lost, of_wrong = _mean(wrong, weights)
    easy, _ = _mean(np.where(np.isin(problems, sorted(short)), right, np.nan), weights)
    # Each problem's part in the error of the value, its right and wrong responses together.
    parts = of_right - 0.5 * of_wrong
    return ProxyScore(
        value=likelihood - 0.5 * lost,
        error=float(np.sqrt((parts**2).sum())),
        likelihood=likelihood,
        margin=likelihood - lost,
        short=None if np.isnan(right[np.isin(problems, sorted(short))]).all() else easy,
    )


def _changes(rows: Sequence[Row], before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Change of each response, within the clip.

    Settings that leave no number where there was one (an overflow) count as the worst that they could do to this
    response. One that had none before tells nothing.
    """
    worst = np.where([row.is_right for row in rows], -CLIP, CLIP)
    changes = np.subtract(after, before, where=np.isfinite(after), out=worst)
    return np.where(np.isfinite(before), np.clip(changes, -CLIP, CLIP), 0.0)


def _by_problem(rows: Sequence[Row], changes: np.ndarray, problems: list[str], is_right: bool) -> np.ndarray:
    """Mean change of each problem's responses of one kind; NaN where it has none."""
    sums, counts = np.zeros(len(problems)), np.zeros(len(problems))
    place = {name: at for at, name in enumerate(problems)}
    for row, change in zip(rows, changes, strict=True):
        if row.is_right is is_right:
            sums[place[row.problem]] += change
            counts[place[row.problem]] += 1
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _mean(values: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Weighted mean over the problems that have a value, and each problem's part in its error."""
    some = ~np.isnan(values)
    if not some.any():
        return 0.0, np.zeros(len(values))
    shares = np.where(some, weights, 0.0) / weights[some].sum()
    mean = float((shares[some] * values[some]).sum())
    return mean, np.where(some, shares * (np.nan_to_num(values) - mean), 0.0)
