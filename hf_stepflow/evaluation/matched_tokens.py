"""Accuracy against generated tokens: every arm beside the first one that was given as many tokens.

Tokens are the unit of compute: all that a problem's answer cost, so that of a vote every sample counts. What the first
arm does with more tokens than one response needs is vote: where the run holds a vote of the first arm, the votes of
its first two, three, ... samples are the other points of the first arm's curve. Between two of them lies a mix: some
problems, drawn at random, get one sample more. So an arm can be held against the first at exactly its tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arms import Arm
from .statistics import Estimate, mean, mean_amount, mean_difference, proportion

Results = Mapping[tuple[str, int], Mapping[str, Any]]


@dataclass(frozen=True)
class CurvePoint:
    """What the first arm does with so many samples.

    Attributes:
        samples: number of responses of which the answer given most often counts.
        accuracy: share of responses that are right so: Wilson's interval, or a bootstrap over problems where each was
            answered more than once.
        tokens: mean tokens of a problem, all samples together.
    """

    samples: int
    accuracy: Estimate
    tokens: Estimate


@dataclass(frozen=True)
class ArmCompute:
    """What one arm does with its tokens; differences are paired, with bootstrap intervals over problems.

    Attributes:
        name: of the arm.
        tokens: mean tokens of a problem, all samples together.
        to_first: difference in accuracy from the first arm; None for the first arm itself.
        method: the arm that does the same without StepFlow, where this one has StepFlow and a method.
        to_method: difference from that.
        to_matched: difference from the first arm with as many tokens as this one; None for points of its curve.
        matched_tokens: tokens that the first arm has there: those of one response for an arm with fewer, and those of
            the largest vote for an arm with more.
    """

    name: str
    tokens: Estimate
    to_first: Estimate | None
    method: str | None
    to_method: Estimate | None
    to_matched: Estimate | None
    matched_tokens: float | None


class Curve:
    """The first arm with one response, and with more of them.

    Args:
        first: results of the first arm.
        vote: results of its largest vote, or None.
    """

    def __init__(self, first: Results, vote: Results | None):
        self.samples = [1]
        self._right = [_by_problem(first, lambda one: one["right"])]
        self._tokens = [_by_problem(first, lambda one: one["tokens"])]
        self._is_single = len(first) == len(self._right[0])
        for samples, right, tokens in [] if vote is None else _votes_of(vote):
            if tokens.mean() > self._tokens[0].mean():  # several short samples may cost less than the first arm's one
                self.samples.append(samples)
                self._right.append(right)
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
        """How often each problem is right for so many tokens, and the tokens themselves, kept to the curve's ends."""
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
    """The first arm's curve, and every arm beside it.

    Args:
        arms: the arms by name, the first first.
        results: of each arm, by problem and sample: the same problems and samples of each.
        seed: of the resampling.
    """
    first = next(iter(arms))
    vote = _largest_vote(arms)
    curve = Curve(results[first], None if vote is None else results[vote])
    right = {name: _by_problem(own, lambda one: one["right"]) for name, own in results.items()}
    found = []
    for name, arm in arms.items():
        tokens = mean_amount(_by_problem(results[name], lambda one: one["tokens"]), seed)
        method = _method_of(arm, arms)
        to_first = to_matched = matched_tokens = None
        if name != first:
            to_first = mean_difference(right[name] - right[first], seed)
        if name not in (first, vote):
            matched, matched_tokens = curve.at(tokens.value)
            to_matched = mean_difference(right[name] - matched, seed)
        found.append(
            ArmCompute(
                name,
                tokens,
                to_first,
                method,
                None if method is None else mean_difference(right[name] - right[method], seed),
                to_matched,
                matched_tokens,
            )
        )
    return curve.points(seed), found


def spends_otherwise(arms: Mapping[str, Arm]) -> bool:
    """Whether any arm is more than the model with its settings, so that tokens have to be looked at."""
    return any(arm.method != Arm() for arm in arms.values())


def _largest_vote(arms: Mapping[str, Arm]) -> str | None:
    """The arm that is the first one voting, with the most samples."""
    first = next(iter(arms.values()))
    own = {
        name: arm.samples
        for name, arm in arms.items()
        if arm.samples > 1 and vars(arm) | _VOTING == vars(first) | _VOTING
    }
    return max(own, key=lambda name: own[name]) if own and first.samples == 1 else None


_VOTING = {"samples": 1, "temperature": 1.0}


def _votes_of(vote: Results) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Of the votes of the first two, three, ... samples: their number, what is right by problem, and its tokens."""
    largest = len(next(iter(vote.values()))["votes"])
    return [
        (
            samples,
            _by_problem(vote, lambda one, last=samples - 1: one["votes"][last]["right"]),
            _by_problem(vote, lambda one, samples=samples: sum(own["tokens"] for own in one["votes"][:samples])),
        )
        for samples in range(2, largest + 1)
    ]


def _method_of(arm: Arm, arms: Mapping[str, Arm]) -> str | None:
    """The arm that does without StepFlow what this one does with it."""
    if arm.stepflow is False or arm.method == Arm():
        return None
    return next((name for name, other in arms.items() if other == arm.method), None)


def _by_problem(results: Results, amount: Any) -> np.ndarray:
    """The mean amount of each problem's results, problems in the order of the results."""
    groups: dict[str, list[float]] = {}
    for (problem, _), result in results.items():
        groups.setdefault(problem, []).append(float(amount(result)))
    return np.array([sum(own) / len(own) for own in groups.values()])
