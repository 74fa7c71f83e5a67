"""EvaluationResult: what a run found, as numbers, as a table, and as one honest sentence for each arm."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .answers import NO_ANSWER, UNFINISHED
from .arms import Arm
from .matched_tokens import ArmCompute, CurvePoint, compute_of, spends_otherwise
from .statistics import Estimate, PairedComparison, adjust, compare, mean, proportion, ratio
from .store import read_results


@dataclass(frozen=True)
class ArmSummary:
    """One arm by itself.

    Attributes:
        name: of the arm.
        accuracy: share of right responses: Wilson's interval, or a bootstrap over problems where each was answered
            more than once.
        outcomes: number of responses by outcome.
        tokens: mean tokens of a response.
        steps: mean thinking steps of a response.
        seconds: time of all batches.
    """

    name: str
    accuracy: Estimate
    outcomes: dict[str, int]
    tokens: float
    steps: float
    seconds: float


@dataclass(frozen=True)
class ArmComparison:
    """One arm held against the first.

    Attributes:
        name: of the arm.
        paired: the comparison of what was right.
        adjusted_p_value: after Holm's adjustment for the number of arms.
        tokens_ratio: tokens, relative to the first arm's.
        seconds_ratio: time, relative to the first arm's, over batches.
        changed: share of the responses whose text differs.
    """

    name: str
    paired: PairedComparison
    adjusted_p_value: float
    tokens_ratio: Estimate
    seconds_ratio: Estimate
    changed: float


class EvaluationResult:
    """The results of a run; `print(result)` gives the table and the verdicts.

    Args:
        run: what was asked for.
        about: versions and machine.
        results: one dict a response.
    """

    def __init__(self, run: dict[str, Any], about: dict[str, Any], results: list[dict[str, Any]]):
        self.run = run
        self.about = about
        self.results = results

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationResult":
        """Reads a results file, finished or not.

        Raises:
            StepFlowFileError: it is no results file.
        """
        header, results = read_results(path)
        return cls(header["run"], header.get("about", {}), results)

    @cached_property
    def _by_arm(self) -> dict[str, dict[tuple[str, int], dict[str, Any]]]:
        """Results by arm and by (problem, sample), of what every arm has answered."""
        found: dict[str, dict[tuple[str, int], dict[str, Any]]] = {name: {} for name in self.run["arms"]}
        for result in self.results:
            found[result["arm"]][result["problem"], result["sample"]] = result
        shared = set.intersection(*(set(own) for own in found.values()))
        return {name: {key: own[key] for key in sorted(shared)} for name, own in found.items()}

    def responses(self, arm: str) -> dict[tuple[str, int], dict[str, Any]]:
        """The results of an arm by problem and sample, where every arm has answered."""
        return self._by_arm[arm]

    @property
    def is_complete(self) -> bool:
        """Whether every arm has answered everything."""
        asked = self.run["n_problems"] * self.run["n_samples"]
        return all(len(own) == asked for own in self._by_arm.values())

    @property
    def reference(self) -> str:
        """The arm that the others are held against: the first."""
        return next(iter(self.run["arms"]))

    def arms(self) -> list[ArmSummary]:
        """Each arm by itself, over what every arm has answered."""
        summaries = []
        for name, own in self._by_arm.items():
            rows = list(own.values())
            if not rows:
                continue
            if self.run["n_samples"] == 1:
                accuracy = proportion(sum(row["right"] for row in rows), len(rows))
            else:
                accuracy = mean([sum(group) / len(group) for group in _right(own)], self.run["seed"])
            summaries.append(
                ArmSummary(
                    name,
                    accuracy,
                    dict(Counter(row["outcome"] for row in rows)),
                    sum(row["tokens"] for row in rows) / len(rows),
                    sum(row["steps"] for row in rows) / len(rows),
                    sum(row["seconds"] for row in rows),
                )
            )
        return summaries

    @cached_property
    def comparisons(self) -> list[ArmComparison]:
        """The other arms held against the first."""
        first, seed = self._by_arm[self.reference], self.run["seed"]
        others = {name: own for name, own in self._by_arm.items() if name != self.reference and own}
        paired = {name: compare(_right(first), _right(own), seed, len(others)) for name, own in others.items()}
        adjusted = adjust([one.p_value for one in paired.values()])
        return [
            ArmComparison(
                name,
                paired[name],
                p_value,
                ratio(_sums(own, "problem", "tokens"), _sums(first, "problem", "tokens"), seed),
                ratio(_sums(own, "batch", "seconds"), _sums(first, "batch", "seconds"), seed),
                sum(own[key]["text"] != first[key]["text"] for key in own) / len(own),
            )
            for (name, own), p_value in zip(others.items(), adjusted, strict=True)
        ]

    @cached_property
    def compute(self) -> "tuple[list[CurvePoint], list[ArmCompute]] | None":
        """Accuracy against generated tokens: the first arm's curve, and every arm beside it.

        None where no arm has a method beside StepFlow, or nothing has been answered by every arm.
        """
        arms = {name: Arm(**arm) for name, arm in self.run["arms"].items()}
        if not spends_otherwise(arms) or not self._by_arm[self.reference]:
            return None
        return compute_of(arms, self._by_arm, self.run["seed"])

    def verdicts(self) -> list[str]:
        """One sentence for each arm but the first."""
        return [_verdict(one, self.reference, self.run["dtype"]) for one in self.comparisons]

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON-ready data; the responses stay in the results file."""
        return {
            "run": self.run,
            "about": self.about,
            "is_complete": self.is_complete,
            "arms": [asdict(one) for one in self.arms()],
            "comparisons": [asdict(one) for one in self.comparisons],
            "verdicts": self.verdicts(),
            "compute": None if self.compute is None else _compute_dict(*self.compute),
        }

    def __str__(self) -> str:
        lines = []
        if not self.is_complete:
            asked = self.run["n_problems"] * self.run["n_samples"]
            shared = len(next(iter(self._by_arm.values())))
            lines.append(f"Not finished: {shared} of {asked} responses are there for every arm.")
        width = max(20, *map(len, self.run["arms"]))
        head = f"{'arm':<{width}} {'right':>5} {'95 %':>13} {'no ans.':>7} {'unfin.':>6} "
        head += f"{'tokens':>7} {'steps':>5} {'s':>7}"
        lines += [head, "-" * len(head)]
        for one in self.arms():
            value, _, interval = percent(one.accuracy).partition(" ")
            lines.append(
                f"{one.name:<{width}} {value:>5} {interval:>13} {one.outcomes.get(NO_ANSWER, 0):>7} "
                f"{one.outcomes.get(UNFINISHED, 0):>6} {one.tokens:>7.1f} {one.steps:>5.1f} {one.seconds:>7.1f}"
            )
        if self.compute is not None:
            lines += ["", *_compute_lines(*self.compute, self.reference, width)]
        return "\n".join([*lines, "", *self.verdicts()])


def _compute_dict(curve: list[CurvePoint], arms: list[ArmCompute]) -> dict[str, Any]:
    return {
        "unit": "generated tokens of a problem, all samples of a vote together",
        "curve": [asdict(one) for one in curve],
        "arms": [asdict(one) for one in arms],
    }


def _compute_lines(curve: list[CurvePoint], arms: list[ArmCompute], reference: str, width: int) -> list[str]:
    """Accuracy against tokens as a table: differences in points."""
    heads = [f"to {reference}", "to the method alone", f"to {reference}, same tokens"]
    head = f"{'Generated tokens':<{width}} {'tokens':>7} {'95 %':>18} " + " ".join(f"{text:>21}" for text in heads)
    lines = [head, "-" * len(head)]
    for one in arms:
        differences = (one.to_first, one.to_method, one.to_matched)
        cells = " ".join(f"{'' if value is None else percent(value, '+'):>21}" for value in differences)
        interval = amount(one.tokens).partition(" ")[2]
        lines.append(f"{one.name:<{width}} {one.tokens.value:>7.1f} {interval:>18} {cells}")
    if len(curve) == 1:
        return [*lines, f"No arm is {reference} voting, so that its tokens end with one response."]
    points = [f"{one.samples} at {one.tokens.value:.0f} tokens {100 * one.accuracy.value:.1f} %" for one in curve]
    return [*lines, f"{reference} with more samples: {'; '.join(points)}."]


def amount(one: Estimate, digits: int = 1) -> str:
    """An estimate of an amount or a ratio, with its interval."""
    interval = "" if one.low is None or one.high is None else f" [{one.low:.{digits}f}, {one.high:.{digits}f}]"
    return f"{one.value:.{digits}f}{interval}"


def _right(own: dict[tuple[str, int], dict[str, Any]]) -> list[list[bool]]:
    """Whether each sample was right, grouped by problem."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for (problem, _), result in own.items():
        groups[problem].append(result["right"])
    return list(groups.values())


def _sums(own: dict[tuple[str, int], dict[str, Any]], unit: str, amount: str) -> list[float]:
    sums: dict[Any, float] = defaultdict(float)
    for result in own.values():
        sums[result[unit]] += result[amount]
    return [sums[key] for key in sorted(sums)]


def percent(one: Estimate, sign: str = "") -> str:
    """An estimate in points, with its interval."""
    if one.low is None or one.high is None:
        return f"{100 * one.value:{sign}.1f}"
    return f"{100 * one.value:{sign}.1f} [{100 * one.low:{sign}.1f}, {100 * one.high:{sign}.1f}]"


def _verdict(one: ArmComparison, reference: str, dtype: str) -> str:
    paired, delta = one.paired, one.paired.delta
    p_value = one.adjusted_p_value
    if p_value < 0.05:
        found = f"measurably {'better' if delta.value > 0 else 'worse'} than {reference}"
    elif paired.smallest_delta is None:
        found = f"no measurable difference from {reference}; n = {paired.problems} could not have shown any"
    else:
        could = f"n = {paired.problems} could have shown {100 * paired.smallest_delta:.1f} points"
        found = f"no measurable difference from {reference}; {could}"
    harm = "" if paired.harm_rate is None else f", breaks {paired.harm_rate.value:.1%} of what {reference} solves"
    rounding = "" if dtype in ("float32", "float64") else f" ({dtype}: rounding alone flips results too)"
    return (
        f"{one.name}: {percent(delta, '+')} points, n = {paired.problems}, gained {paired.gained}, "
        f"lost {paired.lost}{harm}, p = {_p_text(p_value)}: {found}{rounding}. "
        f"Tokens x{one.tokens_ratio.value:.2f}, time x{one.seconds_ratio.value:.2f}."
    )


def _p_text(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"
