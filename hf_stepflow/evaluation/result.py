"""The result of an evaluation, as numbers, as a table, and as one sentence for each arm."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .answers import NO_ANSWER
from .arms import Arm
from .damage import ArmDamage, NextTokenKL, damage_of
from .matched_tokens import ArmCompute, CurvePoint, compute_of
from .statistics import (
    CONFIDENCE,
    Estimate,
    PairedComparison,
    adjust,
    compare,
    mean,
    proportion,
    ratio,
    sequential_p_value,
)
from .store import read_results

# Results of one arm, by problem and sample.
Results = dict[tuple[str, int], dict[str, Any]]


# Arms beside each other in the table.
_COLUMNS = 4


@dataclass(frozen=True)
class ArmSummary:
    """One arm by itself.

    Attributes:
        name: The name of the arm.
        accuracy: The share of right responses, with Wilson's interval, or a bootstrap over problems if each was
            answered more than once.
        outcomes: The number of responses by outcome.
        loops: The number of responses that end in a loop; None where results of an earlier release do not say.
        tokens: The mean tokens of a response.
        steps: The mean thinking steps of a response.
        seconds: The time of all batches.
    """

    name: str
    accuracy: Estimate
    outcomes: dict[str, int]
    loops: int | None
    tokens: float
    steps: float
    seconds: float


@dataclass(frozen=True)
class ArmComparison:
    """One arm compared with the first.

    Attributes:
        name: The name of the arm.
        paired: The paired comparison of right responses.
        adjusted_p_value: The p-value after Holm's adjustment for the number of arms.
        tokens_ratio: The tokens, relative to those of the first arm.
        seconds_ratio: The time, relative to that of the first arm, over batches.
        changed: The share of responses whose text differs.
    """

    name: str
    paired: PairedComparison
    adjusted_p_value: float
    tokens_ratio: Estimate
    seconds_ratio: Estimate
    changed: float


class EvaluationResult:
    """The results of a run; `print(result)` gives the table and the verdicts.

    Only problems and samples that every arm has answered count, so an unfinished run can be read too.

    Args:
        run: Everything that was asked for.
        about: Versions and the machine.
        results: One dict for each response.

    Example:
        >>> from hf_stepflow import EvaluationResult
        >>> print(EvaluationResult.load("results.jsonl"))  # doctest: +SKIP
    """

    def __init__(self, run: dict[str, Any], about: dict[str, Any], results: list[dict[str, Any]]):
        self.run = run
        self.about = about
        self.results = results

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationResult":
        """Loads a results file, finished or not.

        Raises:
            StepFlowFileError: The file is not a results file.
        """
        header, results, _ = read_results(Path(path))
        return cls(header["run"], header.get("about", {}), results)

    @cached_property
    def _by_arm(self) -> dict[str, Results]:
        found: dict[str, Results] = {name: {} for name in self.run["arms"]}
        for result in self.results:
            found[result["arm"]][result["problem"], result["sample"]] = result
        shared = sorted(set.intersection(*(set(own) for own in found.values())))
        return {name: {key: own[key] for key in shared} for name, own in found.items()}

    def responses(self, arm: str) -> Results:
        """The results of an arm by problem and sample."""
        return self._by_arm[arm]

    @property
    def is_complete(self) -> bool:
        """Whether every arm has answered everything."""
        return len(self._by_arm[self.reference]) == self.run["n_problems"] * self.run["n_samples"]

    @property
    def is_sequential(self) -> bool:
        """Whether the run stops as soon as it is decided, so that p-values must hold at any time."""
        return self.run.get("until") is not None

    @property
    def is_decided(self) -> bool:
        """Whether every arm is measurably better or worse than the first, by a test that holds at any time."""
        first, *others = ([row["right"] for row in own.values()] for own in self._by_arm.values())
        pairs = [list(zip(own, first, strict=True)) for own in others]
        p_values = [sequential_p_value(pair.count((True, False)), pair.count((False, True))) for pair in pairs]
        return self.is_sequential and all(value < 1 - CONFIDENCE for value in adjust(p_values))

    @property
    def reference(self) -> str:
        """The arm with which the others are compared: the first."""
        return next(iter(self.run["arms"]))

    @property
    def facts(self) -> list[str]:
        """The model, the run and the versions, for the head of a page."""
        run, about = self.run, self.about
        return [
            str(about.get("model") or "model without a name"),
            str(run["dtype"]),
            f"{run['n_problems']} problems",
            f"{run['n_samples']} sample{'s' * (run['n_samples'] > 1)} each",
            f"at most {run['max_new_tokens']} tokens",
            f"seed {run['seed']}",
            *(f"{name} {about[name]}" for name in ("torch", "transformers") if about.get(name)),
            *([] if self.is_complete else ["not finished"]),
        ]

    def arms(self) -> list[ArmSummary]:
        """Summarizes each arm by itself."""
        return [_summary(name, own, self.run) for name, own in self._by_arm.items() if own]

    @cached_property
    def comparisons(self) -> list[ArmComparison]:
        """The comparisons of the other arms with the first."""
        first, seed = self._by_arm[self.reference], self.run["seed"]
        others = {name: own for name, own in self._by_arm.items() if name != self.reference and own}
        paired = {
            name: compare(
                _grouped(first, "problem", "right"),
                _grouped(own, "problem", "right"),
                seed,
                len(others),
                self.is_sequential,
            )
            for name, own in others.items()
        }
        adjusted = adjust([one.p_value for one in paired.values()])
        return [
            ArmComparison(
                name,
                paired[name],
                p_value,
                _ratio(own, first, "problem", "tokens", seed),
                _ratio(own, first, "batch", "seconds", seed),
                sum(own[key]["text"] != first[key]["text"] for key in own) / len(own),
            )
            for (name, own), p_value in zip(others.items(), adjusted, strict=True)
        ]

    @cached_property
    def damage(self) -> list[ArmDamage]:
        """The damage of every arm, the first included."""
        first, seed = self._by_arm[self.reference], self.run["seed"]
        length = {one.name: one.tokens_ratio for one in self.comparisons}
        kl = {name: NextTokenKL(**one) for name, one in self.about.get("kl", {}).get("arms", {}).items()}
        return [
            damage_of(
                one.name, one.accuracy, length.get(one.name), self._by_arm[one.name], first, seed, kl.get(one.name)
            )
            for one in self.arms()
        ]

    @cached_property
    def compute(self) -> "tuple[list[CurvePoint], list[ArmCompute]] | None":
        """Accuracy against generated tokens: the first arm's curve, and every arm compared with it.

        None if no arm has a method beside StepFlow, or if the arms share no answered problem.
        """
        arms = {name: Arm(**arm) for name, arm in self.run["arms"].items()}
        if all(arm.method == Arm() for arm in arms.values()) or not self._by_arm[self.reference]:
            return None
        return compute_of(arms, self._by_arm, self.run["seed"])

    def verdicts(self) -> list[str]:
        """One sentence for each arm but the first."""
        return [_verdict(one, self.reference, self.run["dtype"]) for one in self.comparisons]

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON-ready data; the responses stay in the results file."""
        compute = None
        if self.compute is not None:
            curve, arms = self.compute
            compute = {
                "unit": "generated tokens of a problem, all samples of a vote together",
                "curve": [asdict(one) for one in curve],
                "arms": [asdict(one) for one in arms],
            }
        return {
            "run": self.run,
            "about": self.about,
            "is_complete": self.is_complete,
            "is_decided": self.is_decided,
            "arms": [asdict(one) for one in self.arms()],
            "comparisons": [asdict(one) for one in self.comparisons],
            "damage": [asdict(one) for one in self.damage],
            "verdicts": self.verdicts(),
            "compute": compute,
        }

    def __str__(self) -> str:
        lines = []
        asked = self.run["n_problems"] * self.run["n_samples"]
        shared = len(self._by_arm[self.reference])
        if not self.is_complete and self.is_decided:
            saved = (asked - shared) * len(self.run["arms"])
            lines.append(
                f"Decided after {shared} of {asked} problems, which saved {saved} responses. The test (p below) holds "
                "at any time; the intervals are those of a run of this length."
            )
        elif not self.is_complete:
            lines.append(f"Not finished: {shared} of {asked} responses are there for every arm.")
        width = max(20, *map(len, self.run["arms"]))
        lines += _arm_lines(self.arms(), self.damage, self.reference)
        lines += describe_kl(self)
        if self.compute is not None:
            lines += ["", *_compute_lines(*self.compute, self.reference, width)]
        return "\n".join([*lines, "", *self.verdicts()])


def _summary(name: str, own: Results, run: dict[str, Any]) -> ArmSummary:
    rows = list(own.values())
    if run["n_samples"] == 1:
        accuracy = proportion(sum(row["right"] for row in rows), len(rows))
    else:
        accuracy = mean([sum(group) / len(group) for group in _grouped(own, "problem", "right")], run["seed"])
    return ArmSummary(
        name,
        accuracy,
        dict(Counter(row["outcome"] for row in rows)),
        sum(row["loops"] for row in rows) if all("loops" in row for row in rows) else None,
        sum(row["tokens"] for row in rows) / len(rows),
        sum(row["steps"] for row in rows) / len(rows),
        sum(row["seconds"] for row in rows),
    )


def _arm_lines(arms: list[ArmSummary], damage: list[ArmDamage], reference: str) -> list[str]:
    """Every arm with its damage: a row for each measure, and a column for each arm, so that lines stay short."""
    has_kl = any(one.kl is not None for one in damage)
    names = ["", "right %", "breaks %", "length", "loops %", "unfinished %", "no answer", "tokens", "steps", "seconds"]
    names += ["KL median", "KL p95"] if has_kl else []
    columns = []
    for one, its in zip(arms, damage, strict=True):
        cells = [
            one.name,
            percent(one.accuracy),
            "" if its.harm_rate is None else percent(its.harm_rate),
            "" if its.length is None else amount(its.length, 2),
            "" if its.loop_rate is None else f"{100 * its.loop_rate.value:.1f}",
            f"{100 * its.unfinished.value:.1f}",
            str(one.outcomes.get(NO_ANSWER, 0)),
            f"{one.tokens:.1f}",
            f"{one.steps:.1f}",
            f"{one.seconds:.1f}",
        ]
        columns.append(cells + (list(nats(its.kl)) if has_kl else []))
    lines: list[str] = []
    for start in range(0, len(columns), _COLUMNS):
        widths = [max(map(len, column)) for column in columns[start : start + _COLUMNS]]
        rows = zip(names, *columns[start : start + _COLUMNS], strict=True)
        text = [
            f"{name:<12}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            for name, *cells in rows
        ]
        lines += [*([""] if lines else []), text[0], "-" * len(text[0]), *(line.rstrip() for line in text[1:])]
    chance = next((one.harm_rate for one in damage if one.name == reference), None)
    if chance is not None:
        lines.append(
            f"The column of {reference} has what chance alone breaks, between its own samples. An arm harms by what "
            "it breaks beyond that."
        )
    return lines


def _compute_lines(curve: list[CurvePoint], arms: list[ArmCompute], reference: str, width: int) -> list[str]:
    """Accuracy against tokens as a table, with differences in points."""
    heads = [f"to {reference}", "to the method alone", f"to {reference}, same tokens"]
    head = f"{'Generated tokens':<{width}} {'tokens':>7} {'95 %':>18} " + " ".join(f"{text:>21}" for text in heads)
    lines = [head, "-" * len(head)]
    for one in arms:
        differences = (one.to_first, one.to_method, one.to_matched)
        cells = " ".join(f"{'' if value is None else percent(value, '+'):>21}" for value in differences)
        interval = amount(one.tokens).partition(" ")[2]
        lines.append(f"{one.name:<{width}} {one.tokens.value:>7.1f} {interval:>18} {cells}")
    if len(curve) == 1:
        return [*lines, f"No arm is a vote of {reference}, so its tokens end with one response."]
    points = [f"{one.samples} at {one.tokens.value:.0f} tokens {100 * one.accuracy.value:.1f} %" for one in curve]
    return [*lines, f"{reference} with more samples: {'; '.join(points)}."]


def _grouped(own: Results, unit: str, field: str) -> list[list[Any]]:
    """A field of the results, grouped by problem or batch."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for result in own.values():
        groups[result[unit]].append(result[field])
    return [groups[key] for key in sorted(groups)]


def _ratio(own: Results, first: Results, unit: str, field: str, seed: int) -> Estimate:
    """The ratio of an amount to the first arm's, over problems or batches."""
    above, below = ([sum(group) for group in _grouped(results, unit, field)] for results in (own, first))
    return ratio(above, below, seed)


def amount(one: Estimate, digits: int = 1) -> str:
    """Formats an amount or a ratio with its interval."""
    interval = "" if one.low is None or one.high is None else f" [{one.low:.{digits}f}, {one.high:.{digits}f}]"
    return f"{one.value:.{digits}f}{interval}"


def nats(kl: NextTokenKL | None) -> tuple[str, str]:
    """Formats the median and the 95th percentile of a divergence, if it was measured."""
    return ("", "") if kl is None else (f"{kl.median:.2g}", f"{kl.high:.2g}")


def describe_kl(result: EvaluationResult) -> list[str]:
    """Says in one sentence how the divergence was measured, or why not; nothing if no arm could have any."""
    about = result.about.get("kl", {})
    if "reason" in about:
        return [f"KL was not measured: {about['reason']}."]
    found = [NextTokenKL(**one) for one in about.get("arms", {}).values()]
    if not found:
        return []
    where = "as thinking" if all(one.is_thinking for one in found) else "not in every arm as thinking"
    return [
        "KL: nats a token, median and 95th percentile, of the next token to the model without an intervention, on "
        f"{found[0].tokens} tokens of {about['texts']}, {where}."
    ]


def percent(one: Estimate, sign: str = "") -> str:
    """Formats a share in percent, or a difference in points, with its interval."""
    if one.low is None or one.high is None:
        return f"{100 * one.value:{sign}.1f}"
    return f"{100 * one.value:{sign}.1f} [{100 * one.low:{sign}.1f}, {100 * one.high:{sign}.1f}]"


def _verdict(one: ArmComparison, reference: str, dtype: str) -> str:
    paired, delta, p_value = one.paired, one.paired.delta, one.adjusted_p_value
    if p_value < 0.05:
        found = f"measurably {'better' if delta.value > 0 else 'worse'} than {reference}"
    elif paired.smallest_delta is None:
        found = f"no measurable difference from {reference}; n = {paired.problems} could not have shown any"
    else:
        could = f"n = {paired.problems} could have shown {100 * paired.smallest_delta:.1f} points"
        found = f"no measurable difference from {reference}; {could}"
    harm = "" if paired.harm_rate is None else f", breaks {paired.harm_rate.value:.1%} of what {reference} solves"
    rounding = "" if dtype in ("float32", "float64") else f" ({dtype}: rounding alone flips results too)"
    p_text = f"{p_value:.3f}" if p_value >= 0.001 else f"{p_value:.1e}"
    return (
        f"{one.name}: {percent(delta, '+')} points, n = {paired.problems}, gained {paired.gained}, "
        f"lost {paired.lost}{harm}, p = {p_text}: {found}{rounding}. "
        f"Tokens x{one.tokens_ratio.value:.2f}, time x{one.seconds_ratio.value:.2f}."
    )
