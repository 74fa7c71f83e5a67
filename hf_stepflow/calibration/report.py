"""The HTML report of a calibration: one page, no network, light and dark."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from hf_stepflow.evaluation.result import percent
from hf_stepflow.presets.preset import Preset
from hf_stepflow.report import forest
from hf_stepflow.report.page import STYLE
from hf_stepflow.runtime.errors import StepFlowFileError

from .bands import LEVEL, Bands
from .candidates import EMPTY
from .gate import Gate
from .heads import Heads
from .result import Calibration, sentence_of
from .search import Trial
from .verdict import GAIN

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 300, 70, 32, 40
_SHOWN = 15

_STYLE = """
.verdict { font-size: 1.25rem; font-weight: 600; } .gain { color: var(--good); } .none { color: var(--bad); }
svg { max-width: 46rem; width: 100%; height: auto; } svg .grid { stroke: var(--line); } svg .small { font-size: 11px; }
svg.map { width: auto; max-width: 100%; } svg .soft { fill: var(--soft); }
th { white-space: normal; vertical-align: bottom; } tr:has(+ tr.below) td { border-bottom: none; padding-bottom: 0; }
tr.below td { text-align: left; white-space: normal; overflow-wrap: anywhere; color: var(--soft); font-size: 13px;
              padding-top: .1rem; } tr.below b { color: var(--bad); font-weight: 600; }
svg circle.good { fill: var(--good); } svg circle.bad { fill: var(--bad); }
svg circle.ring { fill: none; stroke: var(--ink); stroke-width: 2; } svg .column { fill: var(--line); }
svg .column.separates { fill: var(--mark); }
svg rect.raises { fill: var(--good); } svg rect.lowers { fill: var(--bad); }
svg rect.raises, svg rect.lowers { stroke: var(--line); }
svg rect.chosen { fill: none; stroke: var(--ink); stroke-width: 2; } pre { background: none; }
@media (max-width: 45rem) {
  th, td { padding: .3rem; font-size: 13px; white-space: normal; } svg.chart text { font-size: 16px; }
  .wide svg { min-width: 40rem; } .wide svg text { font-size: 13px; }
}"""

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>StepFlow calibration: $name</title>
<style>
$style
</style></head><body>
<h1>StepFlow calibration: $name</h1>
<p class="soft">$about</p>
<p class="verdict $kind">$verdict</p>
$sentences
<h2>Gate: do errors rise with length?</h2>
$gate
<h2>Bands: what Step-Saliency proposes</h2>
$bands
<h2>Heads: what each gains alone</h2>
$heads
<h2>Search: the proxy over tau_max and alpha</h2>
$search
<h2>Proxy against generation</h2>
$proxy
<h2>Verdict on the held-out problems</h2>
$measured
<h2>Ablations on the held-out problems</h2>
$ablations
<h2>Preset</h2>
<details><summary>$name.json</summary><pre>$preset</pre></details>
</body></html>
""")


def write_report(result: Calibration, path: str | Path, preset: Preset) -> None:
    """Writes the page.

    Args:
        result: what was found.
        path: the file to write.
        preset: what was made of it.

    Raises:
        StepFlowFileError: a path that cannot be written.
    """
    run, about = result.run, result.about
    facts = [
        preset.base_model,
        run["dtype"],
        f"{run['n_problems']} problems, {result.held_out} of them held out",
        f"seed {run['seed']}",
        f"{result.seconds:.0f} s",
        f"torch {about.get('torch')}",
        f"transformers {about.get('transformers')}",
    ]
    page = _PAGE.substitute(
        style=STYLE + _STYLE,
        name=escape(preset.name),
        about=escape(" · ".join(map(str, facts))),
        kind="gain" if result.verdict == GAIN else "none",
        verdict=escape(result.verdict),
        sentences="".join(f"<p>{escape(text)}</p>" for text in result.sentences()),
        gate=_gate(result.gate),
        bands=_not_reached() if result.bands is None else _bands(result.bands),
        heads=_heads(result) if result.heads else _not_reached(),
        search=_search(result) if result.trials else _not_reached(),
        proxy=_proxy(result) if result.points else _not_reached(),
        measured=_measured(result),
        ablations=_ablations(result),
        preset=escape(json.dumps(preset.to_dict(), indent=2)),
    )
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise StepFlowFileError(f"{str(path)!r} cannot be written: {error}") from error


def _not_reached() -> str:
    return "<p class='soft'>Not reached.</p>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], below: Sequence[str] = ()) -> str:
    """A table.

    Args:
        heads: of the columns.
        rows: texts of the cells.
        below: for each row HTML that stands under it over the whole width; none for none.
    """
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = ""
    for at, row in enumerate(rows):
        body += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        if below:
            body += f"<tr class='below'><td colspan='{len(heads)}'>{below[at]}</td></tr>"
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def _gate(gate: Gate) -> str:
    rows = [
        [
            one.measure,
            f"{one.short:.1%}",
            f"{one.long:.1%}",
            "no bound" if one.odds_ratio is None else f"{one.odds_ratio:.2f}",
            f"{one.p_value:.4f}",
        ]
        for one in gate.trends
    ]
    heads = "length by,errors in the shortest third,in the longest,odds of an error per doubling,p (one-sided)"
    facts = f"<p class='soft'>{gate.problems} problems of the calibration split, {gate.errors:.1%} wrong.</p>"
    return facts + (_table(heads.split(","), rows) if rows else "")


@dataclass(frozen=True)
class _Axis:
    """Places values on one axis of a chart."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> "_Axis":
        low, high = min([0.0, *values]), max([0.0, *values])
        margin = 0.08 * (high - low) or 1.0
        return cls(low - margin, high + margin, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self, gap: float) -> list[float]:
        """Zero, and those ends whose numbers have room beside its own."""
        return [value for value in (self.low, 0.0, self.high) if not value or abs(self(value) - self(0.0)) >= gap]


def _frame(
    x: _Axis, y: _Axis, x_label: str, y_label: str, marks: Sequence[str], names: Sequence[int] | None = None
) -> str:
    """A chart with both axes, ticks at their ends and at zero, or on the x axis at whole numbers that have names."""
    label = f"{escape(y_label)} over {escape(x_label)}"
    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">']
    every = 1 if names is None else -(-len(names) // 16)
    ticks = (
        [(value, f"{value:.3g}") for value in x.ticks(64)]
        if names is None
        else [(float(at), str(name)) for at, name in enumerate(names) if at % every == 0]
    )
    below = y.start + 19
    for value, told in ticks:
        place = x(value)
        if names is None:
            parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{y.start:.1f}" y2="{y.end:.1f}"/>')
        anchor = "end" if place > x.end - 20 and names is None else "middle"
        parts.append(f'<text class="small" x="{place:.1f}" y="{below:.1f}" text-anchor="{anchor}">{told}</text>')
    for value in y.ticks(18):
        place = y(value)
        parts.append(f'<line class="grid" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(
            f'<text class="small" x="{x.start - 6:.1f}" y="{place + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    parts += marks
    parts.append(
        f'<text class="small soft" x="{x.end:.1f}" y="{_HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>'
    )
    parts.append(f'<text class="small soft" x="4" y="12">{escape(y_label)}</text>')
    return "".join(parts) + "</svg>"


def _bands(bands: Bands) -> str:
    names = {
        "lock_in": "Lock-in: wrong traces minus right ones, in standard deviations",
        "decay_share": "The summary's share on the thinking: wrong traces minus right ones, in standard deviations",
    }
    rows = [[one.name, str(one.oeb_layers), str(one.smi_layers)] for one in bands.proposals]
    rows.append(["empty", "[]", "[]"])
    parts = [_table(["proposal", "bridge", "injection"], rows)]
    for index, effects in bands.effects.items():
        values = [row["effect"] or 0.0 for row in effects]
        x = _Axis(-0.5, len(values) - 0.5, _LEFT, _WIDTH - 10)
        y = _Axis.over(values, _HEIGHT - _BOTTOM, _TOP)
        width = 0.7 * (x.end - x.start) / len(values)
        marks = []
        for at, (row, value) in enumerate(zip(effects, values, strict=True)):
            top, bottom = sorted((y(value), y(0.0)))
            kind = "column separates" if row["separates"] else "column"
            marks.append(
                f'<rect class="{kind}" x="{x(at) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{max(bottom - top, 1):.1f}"><title>layer {bands.layers[at]}: {value:+.2f}, '
                f"p = {row['p_value'] if row['p_value'] is not None else float('nan'):.4f}</title></rect>"
            )
        parts.append(f"<h3>{names[index]}</h3>" + _frame(x, y, "layer", "effect", marks, bands.layers))
    right, wrong = bands.traces
    parts.append(
        f"<p class='soft'>{right} right and {wrong} wrong traces; blue columns separate them "
        f"(adjusted p of at most {LEVEL:g}). A proposal is a correlation: interventions decide.</p>"
    )
    return "".join(parts)


def _heads(result: Calibration) -> str:
    parts = []
    for mechanism, heads in result.heads.items():
        parts.append(f"<h3>{escape(mechanism[0].upper() + mechanism[1:])}</h3>")
        if heads.gains:
            parts.append(head_map(mechanism, heads))
        chosen = ", ".join(f"layer {layer} head {head}" for layer, head in heads.chosen) or "none"
        told = f"{len(heads.gains)} heads tried, {heads.untried} untried. Those that profit together: {chosen}."
        parts.append(f"<p class='soft'>{told}</p>")
    return "".join(parts)


def _search(result: Calibration) -> str:
    trials = result.trials
    x = _Axis.over([one.settings["tau_max"] for one in trials], _LEFT, _WIDTH - 10)
    y = _Axis.over([one.settings["alpha"] for one in trials], _HEIGHT - _BOTTOM, _TOP)
    marks = [_dot(one, x, y, result) for one in reversed(trials)]
    chart = _frame(x, y, "tau_max", "alpha", marks)
    rows = [
        [
            str(one.number),
            f"{one.score.value:+.3f} ± {one.score.error:.3f}",
            f"{one.score.likelihood:+.3f}",
            f"{one.score.margin:+.3f}",
            "" if one.score.short is None else f"{one.score.short:+.3f}",
        ]
        for one in trials[:_SHOWN]
    ]
    below = [
        ("" if one.score.is_harmless else "<b>harms short problems</b> · ") + escape(_short(one))
        for one in trials[:_SHOWN]
    ]
    heads = "trial,proxy (nats),right traces,margin over wrong ones,short and easy"
    told = (
        f"<p class='soft'>{len(trials)} different candidates. Green: better than the base by the proxy; red: worse, "
        "or harmful to short problems. Where both are 0, a length temperature acts. "
        f"The {min(_SHOWN, len(trials))} best:</p>"
    )
    return chart + told + _table(heads.split(","), rows, below)


def _dot(one: Trial, x: _Axis, y: _Axis, result: Calibration) -> str:
    colour = "good" if one.score.objective > 0 else "bad"
    place = f'cx="{x(one.settings["tau_max"]):.1f}" cy="{y(one.settings["alpha"]):.1f}"'
    title = f"<title>trial {one.number}: {one.score.value:+.3f} nats, {escape(_short(one))}</title>"
    ring = ""
    if result.winner is not None and result.winner.number == one.number:
        ring = f'<circle class="ring" {place} r="9"/>'
    return f'<circle class="{colour}" {place} r="5">{title}</circle>{ring}'


def _short(one: Trial) -> str:
    """Settings that are not off, numbers to three digits."""
    acting = {name: value for name, value in one.settings.items() if value != EMPTY[name]}
    told = [f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {json.dumps(value)}"
            for name, value in acting.items()]  # fmt: skip
    return ", ".join(told) or "the base"


def _proxy(result: Calibration) -> str:
    x = _Axis.over([one[1] for one in result.points], _LEFT, _WIDTH - 10)
    y = _Axis.over([100 * one[2] for one in result.points], _HEIGHT - _BOTTOM, _TOP)
    marks = [
        f'<circle cx="{x(proxy):.1f}" cy="{y(100 * delta):.1f}" r="5"><title>trial {number}</title></circle>'
        f'<text class="small" x="{x(proxy) + 8:.1f}" y="{y(100 * delta) + 4:.1f}">{number}</text>'
        for number, proxy, delta in result.points
    ]
    correlation, number = result.correlation
    told = "has no value" if correlation is None else f"{correlation.value:.2f}"
    if correlation is not None and correlation.low is not None and correlation.high is not None:
        told += f" [{correlation.low:.2f}, {correlation.high:.2f}]"
    chart = _frame(x, y, "proxy, nats", "points of accuracy on the first rung, less the base's", marks)
    return chart + f"<p class='soft'>Rank correlation over {number} candidates: {told}.</p>" + _rungs(result)


def _rungs(result: Calibration) -> str:
    halving = result.halving
    if halving is None:
        return ""
    rows = [
        [str(place + 1), str(row.trial), str(row.problems), f"{100 * row.delta:+.1f}", f"{row.lost_easy:+g}",
         "stays" if row.stays else "stops"]
        for place, rung in enumerate(halving.rungs)
        for row in rung
    ]  # fmt: skip
    heads = "rung,trial,problems,points against the base,short and easy lost,"
    return _table(heads.split(","), rows)


def _measured(result: Calibration) -> str:
    if result.measured is None:
        return "<p>There was nothing to measure: the empty preset is the base model.</p>"
    one = result.measured
    rows = [
        ["accuracy, base", percent(one.base)],
        ["accuracy, StepFlow", percent(one.accuracy)],
        ["difference, points", percent(one.delta, "+")],
        ["exact p", f"{one.p_value:.4g}"],
        ["gained / lost", f"{one.gained} / {one.lost}"],
        ["broken, of what the base solves", "" if one.harm_rate is None else f"{percent(one.harm_rate)} %"],
        ["tokens per answer, ratio", f"{one.tokens_ratio.value:.3f}"],
        ["time, ratio", f"{one.seconds_ratio.value:.3f}"],
        ["responses changed", f"{one.changed:.1%}"],
    ]
    return f"<p>{escape(sentence_of(one))}</p>" + _table([f"{one.problems} problems", ""], rows)


def _ablations(result: Calibration) -> str:
    if result.measured is None:
        return _not_reached()
    rows = [("the winner", result.measured.delta)]
    rows += [(name, one.base.delta) for name, one in result.ablations.items()]
    table = _table(
        ["ablation", "problems", "against the base", "gained / lost", "the winner against it"],
        [
            [
                name,
                str(one.base.problems),
                percent(one.base.delta, "+"),
                f"{one.base.gained} / {one.base.lost}",
                percent(one.winner.delta, "+"),
            ]
            for name, one in result.ablations.items()
        ],
    )
    left_out = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in result.left_out.items())
    told = (
        "<p class='soft'>Points of accuracy against the base, with 95 % intervals, not adjusted for their number.</p>"
    )
    picture = f"<div class='wide'>{forest([(name, delta, percent(delta, '+')) for name, delta in rows])}</div>"
    return told + picture + table + (f"<p>Left out:</p><ul>{left_out}</ul>" if left_out else "")


_CELL, _LEFT, _TOP, _WIDTH = 16, 40, 6, 640


def head_map(mechanism: str, heads: Heads) -> str:
    """The SVG picture of the heads that were tried.

    Green cells raise the proxy and red ones lower it, the deeper the more; a ring marks the heads that were chosen
    together.

    Args:
        mechanism: its name.
        heads: what was found.
    """
    layers = sorted({layer for layer, _ in heads.gains})
    rows = max(head for _, head in heads.gains) + 1
    strongest = max(map(abs, heads.gains.values())) or 1.0
    cell = max(4.0, min(float(_CELL), (_WIDTH - _LEFT) / len(layers)))
    height = _TOP + rows * cell
    # Wide enough for the words below.
    size = (max(_LEFT + len(layers) * cell, 240.0), height + 34)
    parts = [
        f'<svg class="map" viewBox="0 0 {size[0]:.0f} {size[1]:.0f}" width="{size[0]:.0f}" role="img" '
        f'aria-label="{escape(mechanism)}: proxy by layer and head">'
    ]
    for (layer, head), gain in sorted(heads.gains.items()):
        x, y = _LEFT + layers.index(layer) * cell, _TOP + head * cell
        place = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell - 2:.1f}" height="{cell - 2:.1f}"'
        kind = "raises" if gain > 0 else "lowers"
        chosen = (layer, head) in heads.chosen
        title = f"layer {layer}, head {head}: {gain:+.3f} nats{', chosen' * chosen}"
        parts.append(
            f'<rect class="{kind}" {place} fill-opacity="{abs(gain) / strongest:.2f}"><title>{title}</title></rect>'
        )
        if chosen:
            parts.append(f'<rect class="chosen" {place}/>')
    every, each = -(-len(layers) // 16), -(-rows // 8)
    for at in range(0, len(layers), every):
        x = _LEFT + (at + 0.5) * cell
        parts.append(f'<text class="small" x="{x:.1f}" y="{height + 14:.1f}" text-anchor="middle">{layers[at]}</text>')
    for head in range(0, rows, each):
        y = _TOP + (head + 0.5) * cell + 4
        parts.append(f'<text class="small" x="{_LEFT - 8}" y="{y:.1f}" text-anchor="end">{head}</text>')
    parts.append(f'<text class="small soft" x="{_LEFT}" y="{height + 29:.1f}">layer; rows are its query heads</text>')
    return "".join(parts) + "</svg>"
