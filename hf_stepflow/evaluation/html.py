"""The HTML report of an evaluation: one page, no network, light and dark."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from .arms import Arm
from .compute_chart import STYLE as CHART_STYLE
from .compute_chart import ChartPoint, chart
from .problems import EvalProblem
from .result import ArmComparison, EvaluationResult, amount, percent
from .statistics import Estimate

_SHOWN = 30  # gained and lost problems of each arm, each

STYLE = """:root { --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --paper: #ffffff; --good: #1a7f37; --bad: #c62828;
        --mark: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --line: #3d444d; --paper: #0d1117; --good: #3fb950; --bad: #ff7b72;
          --mark: #58a6ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem;
       margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { white-space: nowrap; text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 600; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .axis { stroke: var(--line); } svg .zero { stroke: var(--soft); stroke-dasharray: 4 3; }
svg .bar { stroke: var(--mark); stroke-width: 2; } svg circle { fill: var(--mark); }
details { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem; margin: .5rem 0; }
.wide { overflow-x: auto; } summary { cursor: pointer; } .gained { color: var(--good); } .lost { color: var(--bad); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; } .soft { color: var(--soft); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; margin: .3rem 0; }
@media (max-width: 45rem) { .pair { grid-template-columns: 1fr; } }"""

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>StepFlow evaluation</title>
<style>
$style
</style></head><body>
<h1>StepFlow evaluation</h1>
<p class="soft">$about</p>
$verdicts
<h2>Difference from $reference</h2>
<p class="soft">Points of accuracy on the same problems, with the 95 % bootstrap interval.</p>
$forest
$compute<h2>Arms</h2>
$arms
<h2>What changed</h2>
$changes
</body></html>
""")


def write_report(result: EvaluationResult, problems: Sequence[EvalProblem], path: str | Path) -> None:
    """Writes the page.

    Args:
        result: the result.
        problems: what was asked, for the texts of the questions.
        path: the file to write.
    """
    comparisons = result.comparisons
    run, about = result.run, result.about
    facts = [
        about.get("model") or "model without a name",
        run["dtype"],
        f"{run['n_problems']} problems",
        f"{run['n_samples']} sample{'s' * (run['n_samples'] > 1)} each",
        f"seed {run['seed']}",
        f"torch {about.get('torch')}",
        f"transformers {about.get('transformers')}",
    ]
    page = _PAGE.substitute(
        style=f"{STYLE}\n{CHART_STYLE}",
        about=escape(" · ".join(facts)) + ("" if result.is_complete else " · <b>not finished</b>"),
        verdicts="".join(f"<p>{escape(text)}</p>" for text in result.verdicts()),
        reference=escape(result.reference),
        forest=_forest(comparisons),
        compute=_compute(result),
        arms=_arms(result),
        changes="".join(_changes(result, one.name, problems) for one in comparisons),
    )
    Path(path).write_text(page, encoding="utf-8")


def _ratio(one: Estimate) -> str:
    interval = "" if one.low is None or one.high is None else f" [{one.low:.2f}, {one.high:.2f}]"
    return f"{one.value:.2f}{interval}"


def _arms(result: EvaluationResult) -> str:
    compared = {one.name: one for one in result.comparisons}
    rows = []
    for arm in result.arms():
        one = compared.get(arm.name)
        cells = [
            escape(arm.name),
            percent(arm.accuracy),
            str(arm.outcomes.get("no answer", 0)),
            str(arm.outcomes.get("unfinished", 0)),
            f"{arm.tokens:.1f}",
            f"{arm.steps:.1f}",
            "" if one is None else _ratio(one.tokens_ratio),
            "" if one is None else _ratio(one.seconds_ratio),
            "" if one is None else f"{100 * one.changed:.1f}",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = "arm,right %,no answer,unfinished,tokens,steps,tokens ratio,time ratio,texts changed %".split(",")
    head = "".join(f"<th>{head}</th>" for head in heads)
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _compute(result: EvaluationResult) -> str:
    """Accuracy against generated tokens: the chart and the table, where an arm has a method beside StepFlow."""
    if result.compute is None:
        return ""
    curve, found = result.compute
    accuracy = {arm.name: arm.accuracy for arm in result.arms()}
    arms = {name: Arm(**arm) for name, arm in result.run["arms"].items()}
    # A method goes by the name of the arm that has it alone, a setting by that of the arm that has nothing else.
    names = {arm.method: name for name, arm in reversed(arms.items()) if arm.stepflow is False}
    names |= {Arm(): "no other method"}
    settings = {_key(arm): name for name, arm in reversed(arms.items()) if arm.method == Arm()}
    points = [
        ChartPoint(
            names.get(arms[one.name].method, one.name),
            settings.get(_key(arms[one.name]), one.name),
            accuracy[one.name],
            one.tokens,
        )
        for one in found
    ]
    reference = escape(result.reference)
    heads = ["arm", "right %", "tokens", f"to {reference}", "to the method alone", f"to {reference}, same tokens"]
    rows = []
    for one in found:
        differences = (one.to_first, one.to_method, one.to_matched)
        cells = [escape(one.name), percent(accuracy[one.name]), amount(one.tokens)]
        cells += ["" if value is None else percent(value, "+") for value in differences]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{head}</th>" for head in heads)
    if len(curve) > 1:
        matched = f"With the same tokens, {reference} votes with as many samples as they pay for (the dashed line)."
    else:
        matched = f"No arm is {reference} voting, so that its tokens end with one response."
    return (
        "<h2>Accuracy against generated tokens</h2><p class='soft'>Tokens are those of a whole answer: of a vote, of "
        f"all its samples. {matched} Points that would cover each other are drawn side by side. Differences are in "
        f"points, paired, with 95 % bootstrap intervals.</p>{chart(points, curve)}"
        f"<div class='wide'><table><tr>{head}</tr>{''.join(rows)}</table></div>"
    )


def _key(arm: Arm) -> str:
    """What tells the StepFlow settings of arms apart."""
    return repr(arm.stepflow)


def _forest(comparisons: list[ArmComparison]) -> str:
    """Every arm's difference and interval."""
    if not comparisons:
        return "<p>There is only one arm.</p>"
    return forest([(one.name, one.paired.delta) for one in comparisons])


def forest(rows: Sequence[tuple[str, Estimate]]) -> str:
    """Differences in points with their intervals, on one axis.

    Args:
        rows: a label and a difference each.
    """
    ends = [end for _, delta in rows for end in (delta.low, delta.high) if end is not None]
    low, high = min(0.0, *ends), max(0.0, *ends)
    margin = 0.05 * (high - low) or 0.01
    low, high = low - margin, high + margin
    left, width, row = 260, 480, 30
    height = row * len(rows) + 34

    def place(value: float) -> float:
        return left + width * (value - low) / (high - low)

    parts = [f'<svg viewBox="0 0 {left + width + 180} {height}" role="img" aria-label="differences with intervals">']
    parts.append(f'<line class="zero" x1="{place(0):.1f}" x2="{place(0):.1f}" y1="0" y2="{height - 26}"/>')
    for index, (name, delta) in enumerate(rows):
        y = row * index + 16
        label = name if len(name) <= 36 else name[:35] + "…"
        parts.append(f'<text x="0" y="{y + 4}">{escape(label)}</text>')
        if delta.low is not None and delta.high is not None:
            start, end = place(delta.low), place(delta.high)
            parts.append(f'<line class="bar" x1="{start:.1f}" x2="{end:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle cx="{place(delta.value):.1f}" cy="{y}" r="4"/>')
        parts.append(f'<text x="{left + width + 12}" y="{y + 4}">{percent(delta, "+")}</text>')
    y = height - 26
    parts.append(f'<line class="axis" x1="{left}" x2="{left + width}" y1="{y}" y2="{y}"/>')
    for value in (low, 0.0, high):
        parts.append(f'<text x="{place(value):.1f}" y="{y + 18}" text-anchor="middle">{100 * value:.1f}</text>')
    return "".join(parts) + "</svg>"


def _changes(result: EvaluationResult, name: str, problems: Sequence[EvalProblem]) -> str:
    """The problems that an arm gained or lost, both responses side by side."""
    questions = {problem.id: problem.prompt for problem in problems}
    own = {(one["problem"], one["sample"]): one for one in result.results if one["arm"] == name}
    first = {(one["problem"], one["sample"]): one for one in result.results if one["arm"] == result.reference}
    parts = [f"<h3>{escape(name)}</h3>"]
    for kind, sign in (("gained", True), ("lost", False)):
        keys = [
            key
            for key, one in own.items()
            if key in first and one["right"] is sign and first[key]["right"] is not sign
        ]
        shown = f", the first {_SHOWN} are shown" if len(keys) > _SHOWN else ""
        parts.append(f'<p class="{kind}">{kind}: {len(keys)}{shown}</p>')
        for key in keys[:_SHOWN]:
            sides = "".join(
                f"<div><b>{escape(arm)}</b> <span class='soft'>{escape(one['outcome'])}</span>"
                f"<pre>{escape(one['text'])}</pre></div>"
                for arm, one in ((result.reference, first[key]), (name, own[key]))
            )
            question = escape(questions.get(key[0], ""))
            parts.append(
                f"<details><summary>{escape(key[0])}</summary><pre>{question}</pre>"
                f"<div class='pair'>{sides}</div></details>"
            )
    return "".join(parts)
