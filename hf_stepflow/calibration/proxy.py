"""The proxy: how settings change the likelihood of right and wrong responses, by one forward pass per response.

It scores whole responses, the reasoning and the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .traces import Row

# The most by which one response changes the proxy, in nats: a single impossible response does not outvote all others.
CLIP = 10.0

# The mean loss on right traces of short and easy problems that is tolerated, in nats per trace.
TOLERANCE = 0.02


@dataclass(frozen=True)
class ProxyScore:
    """The change from other settings (the base) to these, in nats per response.

    Attributes:
        value: The mean of `likelihood` and `margin`, which the search maximises.
        error: The standard error of the value over problems.
        likelihood: The change in log-likelihood of right responses.
        margin: The same minus the change of wrong responses.
        short: The change on right responses of short and easy problems; None if there are none.
    """

    value: float
    error: float
    likelihood: float
    margin: float
    short: float | None

    @property
    def is_harmless(self) -> bool:
        """Whether short and easy problems lose no more than the tolerance."""
        return self.short is None or self.short >= -TOLERANCE

    @property
    def objective(self) -> float:
        """The value; below zero, the base's, if short and easy problems are harmed."""
        if self.is_harmless or self.short is None:
            return self.value
        return min(self.value, 0.0) + self.short


def proxy_score(rows: Sequence[Row], before: Sequence[float], after: Sequence[float], short: set[str]) -> ProxyScore:
    """Compares the likelihoods of the same responses under two settings.

    Args:
        rows: The responses; the right ones of a problem share its weight, and so do the wrong ones.
        before: Log-likelihoods under the settings to compare with, in nats.
        after: Log-likelihoods under the settings to score, in nats.
        short: The ids of the short and easy problems.
    """
    changes = _changes(rows, np.asarray(before, float), np.asarray(after, float))
    weights = {row.problem: row.weight for row in rows}
    problems, weight = list(weights), np.array(list(weights.values()))
    places = {name: place for place, name in enumerate(problems)}
    place = np.array([places[row.problem] for row in rows], int)
    is_right = np.array([row.is_right for row in rows], bool)
    right, wrong = (_by_problem(changes[kind], place[kind], len(problems)) for kind in (is_right, ~is_right))
    easy = np.where(np.isin(problems, sorted(short)), right, np.nan)
    likelihood, right_parts = _mean(right, weight)
    lost, wrong_parts = _mean(wrong, weight)
    # The right and wrong responses of a problem enter the error of the value together.
    parts = right_parts - 0.5 * wrong_parts
    return ProxyScore(
        value=likelihood - 0.5 * lost,
        error=float(np.sqrt((parts**2).sum())),
        likelihood=likelihood,
        margin=likelihood - lost,
        short=None if np.isnan(easy).all() else _mean(easy, weight)[0],
    )


def _changes(rows: Sequence[Row], before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The clipped change of each response.

    A likelihood that overflows counts as the worst that settings can do to the response; a response whose likelihood
    overflowed before counts as unchanged.
    """
    worst = np.where([row.is_right for row in rows], -CLIP, CLIP)
    changes = np.subtract(after, before, where=np.isfinite(after), out=worst)
    return np.where(np.isfinite(before), np.clip(changes, -CLIP, CLIP), 0.0)


def _by_problem(changes: np.ndarray, place: np.ndarray, problems: int) -> np.ndarray:
    """The mean change of each problem's responses; NaN if it has none."""
    counts = np.bincount(place, minlength=problems)
    return np.where(counts > 0, np.bincount(place, changes, problems) / np.maximum(counts, 1), np.nan)


def _mean(values: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """The weighted mean over problems with a value, and each problem's part in its error."""
    known = ~np.isnan(values)
    if not known.any():
        return 0.0, np.zeros(len(values))
    shares = np.where(known, weights, 0.0) / weights[known].sum()
    mean = float((shares[known] * values[known]).sum())
    return mean, np.where(known, shares * (np.nan_to_num(values) - mean), 0.0)
