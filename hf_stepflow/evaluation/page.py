"""The HTML page of an evaluation: verdicts, differences, accuracy against tokens, and what each arm changed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from hf_stepflow.report import Axis, element, forest, frame, page, svg, table, write_page

from .answers import NO_ANSWER
from .arms import Arm
from .charts import colours_of, legend, mark, short, side_by_side
from .damage_chart import damage_chart
from .matched_tokens import CurvePoint
from .problem import EvalProblem
from .result import EvaluationResult, amount, describe_kl, nats, percent
from .statistics import Estimate

_SHOWN = 30  # problems that each arm gained, and that it lost
_WIDTH, _HEIGHT, _LEFT, _TOP, _COLUMNS = 360, 230, 44, 26, 3  # of the panels of the chart


def write_report(result: EvaluationResult, problems: Sequence[EvalProblem], path: str | Path) -> None:
    """Writes the page.

    Args:
        result: The result.
        problems: The problems that were asked, for the texts of the questions.
        path: The file to write.

    Raises:
        StepFlowFileError: The path cannot be written.
    """
    sections = [(f"Difference from {result.reference}", _differences(result))]
    if result.compute is not None:
        sections.append(("Accuracy against generated tokens", _tokens(result)))
    sections.append(("Accuracy and damage", _damage(result)))
    sections.append(("What changed", "".join(_changes(result, one.name, problems) for one in result.comparisons)))
    verdicts = "".join(element("p", text=text) for text in result.verdicts())
    write_page(path, page("StepFlow evaluation", result.facts, sections, verdicts))


def _differences(result: EvaluationResult) -> str:
    if not result.comparisons:
        return "<p>There is only one arm.</p>"
    rows = [(one.name, one.paired.delta, percent(one.paired.delta, "+")) for one in result.comparisons]
    note = "Points of accuracy on the same problems, with the 95 % bootstrap interval."
    return element("p", class_="soft", text=note) + element("div", forest(rows), class_="wide")


def _damage(result: EvaluationResult) -> str:
    """Accuracy against damage: a chart, and a table of everything."""
    compared = {one.name: one for one in result.comparisons}
    damage = result.damage
    has_kl = any(one.kl is not None for one in damage)
    heads = "arm,right %,breaks %,tokens ratio,loops %,unfinished %" + ",KL,KL p95" * has_kl
    heads += ",no answer,tokens,steps,time ratio,texts changed %"
    rows = []
    for arm, its in zip(result.arms(), damage, strict=True):
        one = compared.get(arm.name)
        rows.append(
            [
                arm.name,
                percent(arm.accuracy),
                "" if its.harm_rate is None else percent(its.harm_rate),
                "" if its.length is None else amount(its.length, 2),
                "" if its.loop_rate is None else percent(its.loop_rate),
                percent(its.unfinished),
                *(nats(its.kl) if has_kl else ()),
                str(arm.outcomes.get(NO_ANSWER, 0)),
                f"{arm.tokens:.1f}",
                f"{arm.steps:.1f}",
                "" if one is None else amount(one.seconds_ratio, 2),
                "" if one is None else f"{100 * one.changed:.1f}",
            ]
        )
    below = [
        f"Breaks: of what {result.reference} has right, the share that an arm has wrong. The dashed lines are "
        f"the accuracy of {result.reference}. Intervals are at 95 %; the samples of a problem count as one.",
        *describe_kl(result),
    ]
    chart = element("div", damage_chart(damage), class_="wide") if len(damage) > 1 else ""
    return element("p", class_="soft", text=" ".join(below)) + chart + table(heads.split(","), rows)


def _tokens(result: EvaluationResult) -> str:
    """Accuracy against generated tokens: a chart and a table."""
    assert result.compute is not None
    curve, found = result.compute
    accuracy = {arm.name: arm.accuracy for arm in result.arms()}
    arms = {name: Arm(**arm) for name, arm in result.run["arms"].items()}
    # A method is named by the arm that has it alone, StepFlow settings and rivals by the arm that has nothing else.
    methods = {arm.method: name for name, arm in reversed(arms.items()) if arm == arm.method}
    methods |= {Arm(): "no other method"}
    steering = {name: repr((arm.stepflow, arm.rival, arm.rival_parameters)) for name, arm in arms.items()}
    settings = {steering[name]: name for name, arm in reversed(arms.items()) if arm.method == Arm()}
    points = [
        ChartPoint(
            methods.get(arms[one.name].method, one.name),
            settings.get(steering[one.name], one.name),
            accuracy[one.name],
            one.tokens,
        )
        for one in found
    ]
    reference = result.reference
    heads = ["arm", "right %", "tokens", f"to {reference}", "to the method alone", f"to {reference}, same tokens"]
    rows = [
        [one.name, percent(accuracy[one.name]), amount(one.tokens)]
        + ["" if value is None else percent(value, "+") for value in (one.to_first, one.to_method, one.to_matched)]
        for one in found
    ]
    if len(curve) > 1:
        matched = f"At equal tokens, {reference} votes with as many samples as they pay for (the dashed line)."
    else:
        matched = f"No arm is a vote of {reference}, so its tokens end with one response."
    note = (
        f"Tokens are those of a whole answer; a vote counts all its samples. {matched} Points that would cover each "
        "other are drawn side by side. Differences are in points, paired, with 95 % bootstrap intervals."
    )
    chart = element("div", tokens_chart(points, curve), class_="wide")
    return element("p", class_="soft", text=note) + chart + table(heads, rows)


@dataclass(frozen=True)
class ChartPoint:
    """One arm in the chart: its method has a panel, its StepFlow setting has a colour."""

    panel: str
    setting: str
    accuracy: Estimate
    tokens: Estimate


def tokens_chart(points: Sequence[ChartPoint], curve: Sequence[CurvePoint]) -> str:
    """Renders accuracy against tokens: one panel for each method, the first arm's curve in all of them."""
    x, y = _axes([*points, *curve])
    y_ticks = [(tick, f"{100 * tick:.4g} %") for tick in y.ticks()]
    colour = colours_of(point.setting for point in points)
    panels = list(dict.fromkeys(point.panel for point in points))
    width, height = _WIDTH + _LEFT, _HEIGHT + _TOP + 40
    parts = []
    for index, panel in enumerate(panels):
        own = [point for point in points if point.panel == panel]
        columns = side_by_side([x(point.tokens.value) for point in own])
        row, column = divmod(index, _COLUMNS)
        parts.append(
            element(
                "g",
                element("text", class_="strong", x=0, y=-9, text=short(panel)),
                frame(x, y, "tokens a problem", y_ticks=y_ticks),
                *_curve(x, y, curve),
                *(
                    mark(x, y, at, point.tokens, point.accuracy, colour[point.setting], _title(point))
                    for at, point in zip(columns, own, strict=True)
                ),
                transform=f"translate({column * width + _LEFT} {row * height + _TOP})",
            )
        )
    bottom = math.ceil(len(panels) / _COLUMNS) * height
    keys, place, _ = legend(colour, float(_LEFT), bottom)
    parts.append(keys)
    if len(curve) > 1:
        parts.append(element("line", class_="dashed", x1=place, x2=place + 30, y1=bottom + 10, y2=bottom + 10))
        parts.append(element("text", x=place + 38, y=bottom + 14, text="the first arm with more samples"))
    label = "accuracy against generated tokens"
    return svg(label, *parts, width=min(len(panels), _COLUMNS) * width, height=bottom + 24, kind="panels")


def _title(point: ChartPoint) -> str:
    return f"{point.setting}: {100 * point.accuracy.value:.1f} % at {point.tokens.value:.1f} tokens"


def _axes(points: Sequence[ChartPoint | CurvePoint]) -> tuple[Axis, Axis]:
    """Tokens on a logarithmic axis and accuracy on a linear one, the same in every panel."""
    tokens, shares = (
        [end for one in estimates for end in (one.low, one.value, one.high) if end is not None]
        for estimates in ([point.tokens for point in points], [point.accuracy for point in points])
    )
    x = Axis(max(min(tokens), 0.5) / 1.2, max(*tokens, 1.0) * 1.2, 0.0, _WIDTH, is_log=True)
    return x, Axis(max(0.0, min(shares) - 0.03), min(1.0, max(shares) + 0.03), _HEIGHT, 0.0)


def _curve(x: Axis, y: Axis, curve: Sequence[CurvePoint]) -> list[str]:
    places = [(x(one.tokens.value), y(one.accuracy.value)) for one in curve]
    line = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
    parts = [element("polyline", class_="dashed", points=line)] if len(places) > 1 else []
    return parts + [element("circle", class_="knot", cx=left, cy=top, r=3) for left, top in places]


def _changes(result: EvaluationResult, name: str, problems: Sequence[EvalProblem]) -> str:
    """The problems that an arm gained or lost, both responses side by side."""
    questions = {problem.id: problem.prompt for problem in problems}
    first, own = result.responses(result.reference), result.responses(name)
    parts = [element("h3", text=name)]
    for kind, colour, is_gain in (("gained", "good", True), ("lost", "bad", False)):
        keys = [key for key in own if own[key]["right"] is is_gain and first[key]["right"] is not is_gain]
        shown = f", the first {_SHOWN} are shown" if len(keys) > _SHOWN else ""
        parts.append(element("p", class_=colour, text=f"{kind}: {len(keys)}{shown}"))
        for key in keys[:_SHOWN]:
            sides = [_response(result.reference, first[key]), _response(name, own[key])]
            parts.append(
                element(
                    "details",
                    element("summary", text=key[0]),
                    element("pre", text=questions.get(key[0], "")),
                    element("div", *sides, class_="pair"),
                )
            )
    return "".join(parts)


def _response(arm: str, one: dict) -> str:
    head = f"<b>{escape(arm)}</b> <span class='soft'>{escape(one['outcome'])}</span>"
    return element("div", head, element("pre", text=one["text"]))
