"""Accuracy against generated tokens: compares every arm with the first one at the same number of tokens.

Tokens are the unit of compute: everything that the answer to a problem cost, so a vote counts all its samples. With
more tokens than one response needs, the first arm can vote. If the run holds such a vote, the votes of its first two,
three, ... samples are the further points of the first arm's curve. Between two points lies a mix, in which some
problems, drawn at random, get one more sample; so the first arm is known at exactly the tokens of any other arm.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arms import Arm
from .statistics import Estimate, mean, mean_amount, mean_difference, proportion

# By problem and sample.
Results = Mapping[tuple[str, int], Mapping[str, Any]]


@dataclass(frozen=True)
class CurvePoint:
    """The first arm with a number of samples.

    Attributes:
        samples: The number of responses that vote.
        accuracy: The share of right votes, with Wilson's interval, or a bootstrap over problems if each was answered
            more than once.
        tokens: The mean tokens of a problem, all samples together.
    """

    samples: int
    accuracy: Estimate
    tokens: Estimate


@dataclass(frozen=True)
class ArmCompute:
    """One arm and its tokens; differences are paired, with bootstrap intervals over problems.

    Attributes:
        name: The name of the arm.
        tokens: The mean tokens of a problem, all samples together.
        to_first: The difference in accuracy from the first arm; None for the first arm itself.
        method: The arm with the same method and without StepFlow, if this arm has StepFlow and a method.
        to_method: The difference from that arm.
        to_matched: The difference from the first arm with as many tokens; None for points of its curve.
        matched_tokens: The tokens of the first arm in `to_matched`, which are limited to the ends of its curve: one
            response, and the largest vote.
    """

    name: str
    tokens: Estimate
    to_first: Estimate | None
    method: str | None
    to_method: Estimate | None
    to_matched: Estimate | None
    matched_tokens: float | None


class Curve:
    """The first arm with one response, and with more.

    Args:
        first: The results of the first arm.
        vote: The results of its largest vote, or none.
    """

    def __init__(self, first: Results, vote: Results):
        self.samples = [1]
        self._right = [_by_problem(first, (one["right"] for one in first.values()))]
        self._tokens = [_by_problem(first, (one["tokens"] for one in first.values()))]
        self._is_single = len(first) == len(self._right[0])
        votes = [one["votes"] for one in vote.values()]
        for samples in range(2, 1 + max(map(len, votes), default=1)):
            tokens = _by_problem(vote, (sum(one["tokens"] for one in own[:samples]) for own in votes))
            if tokens.mean() > self._tokens[0].mean():  # several short samples may cost less than the first arm's one
                self.samples.append(samples)
                self._right.append(_by_problem(vote, (own[samples - 1]["right"] for own in votes)))
                self._tokens.append(tokens)
        self._costs = [float(tokens.mean()) for tokens in self._tokens]

    def points(self, seed: int) -> list[CurvePoint]:
        """The points, by tokens."""
        return [
            CurvePoint(
                samples,
                proportion(int(right.sum()), len(right)) if self._is_single else mean(right, seed),
                mean_amount(tokens, seed),
            )
            for samples, right, tokens in zip(self.samples, self._right, self._tokens, strict=True)
        ]

    def at(self, tokens: float) -> tuple[np.ndarray, float]:
        """The accuracy on each problem with a number of tokens, and that number, limited to the curve's ends."""
        spent = float(np.clip(tokens, self._costs[0], self._costs[-1]))
        after = min(int(np.searchsorted(self._costs, spent, "right")), len(self._costs) - 1)
        before = max(after - 1, 0)
        if before == after:
            return self._right[0], spent
        share = (spent - self._costs[before]) / (self._costs[after] - self._costs[before])
        return (1 - share) * self._right[before] + share * self._right[after], spent


def compute_of(
    arms: Mapping[str, Arm], results: Mapping[str, Results], seed: int
) -> tuple[list[CurvePoint], list[ArmCompute]]:
    """Computes the first arm's curve and compares every arm with it.

    Args:
        arms: The arms by name, the first one first.
        results: The results of each arm, for the same problems and samples.
        seed: The seed of the resampling.
    """
    first = next(iter(arms))
    vote = _largest_vote(arms)
    curve = Curve(results[first], {} if vote is None else results[vote])
    right = {name: _by_problem(own, (one["right"] for one in own.values())) for name, own in results.items()}
    found = []
    for name, arm in arms.items():
        tokens = mean_amount(_by_problem(results[name], (one["tokens"] for one in results[name].values())), seed)
        method = _method_of(arm, arms)
        to_matched = matched_tokens = None
        if name not in (first, vote):
            matched, matched_tokens = curve.at(tokens.value)
            to_matched = mean_difference(right[name] - matched, seed)
        found.append(
            ArmCompute(
                name,
                tokens,
                None if name == first else mean_difference(right[name] - right[first], seed),
                method,
                None if method is None else mean_difference(right[name] - right[method], seed),
                to_matched,
                matched_tokens,
            )
        )
    return curve.points(seed), found


def _largest_vote(arms: Mapping[str, Arm]) -> str | None:
    """The arm that is the first one voting, with the most samples."""
    voting = {"samples": 1, "temperature": 1.0}
    first = next(iter(arms.values()))
    own = {
        name: arm.samples
        for name, arm in arms.items()
        if arm.samples > 1 and vars(arm) | voting == vars(first) | voting
    }
    return max(own, key=lambda name: own[name]) if own and first.samples == 1 else None


def _method_of(arm: Arm, arms: Mapping[str, Arm]) -> str | None:
    """The arm with the same method, without StepFlow and without a rival."""
    if arm.method in (arm, Arm()):
        return None
    return next((name for name, other in arms.items() if other == arm.method), None)


def _by_problem(results: Results, amounts: Iterable[float]) -> np.ndarray:
    """The mean of each problem's amounts, of which there is one for each result; problems in order of the results."""
    groups: dict[str, list[float]] = {}
    for (problem, _), amount in zip(results, amounts, strict=True):
        groups.setdefault(problem, []).append(float(amount))
    return np.array([sum(own) / len(own) for own in groups.values()])
