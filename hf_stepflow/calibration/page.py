"""The HTML page of a calibration: the verdict, and the evidence of every stage."""

import json
from html import escape
from pathlib import Path
from typing import Any

from hf_stepflow.evaluation.result import amount, percent
from hf_stepflow.presets.preset import Preset
from hf_stepflow.report import PLOT_X, PLOT_Y, Axis, element, forest, frame, page, svg, table, write_page

from .bands import LEVEL, Bands
from .gate import Gate
from .heads import Heads
from .result import Calibration, acting
from .search import Trial
from .verdict import GAIN, OPEN

_ROWS = 15  # candidates in the table of the search
_CELL, _LEFT, _TOP, _MAP_WIDTH = 16.0, 40.0, 6.0, 640.0  # of the map of heads

_INDICES = {
    "lock_in": "Lock-in: wrong traces minus right ones, in standard deviations",
    "decay_share": "The summary's share on the thinking: wrong traces minus right ones, in standard deviations",
}


def write_report(result: Calibration, path: str | Path, preset: Preset) -> None:
    """Writes the page.

    Args:
        result: The result.
        path: The file to write.
        preset: The preset made from the result.

    Raises:
        StepFlowFileError: The path cannot be written.
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
    lead = element("p", text=result.verdict, class_=f"lead {'good' if result.verdict == GAIN else 'bad'}")
    lead += "".join(element("p", text=text) for text in result.sentences())
    not_reached = _soft("Not reached.")
    data = json.dumps(preset.to_dict(), indent=2)
    file = element("details", element("summary", text=f"{preset.name}.json"), element("pre", text=data))
    sections = [
        ("Gate: do errors rise with length?", _gate(result.gate)),
        ("Bands: what Step-Saliency proposes", _bands(result.bands) if result.bands else not_reached),
        ("Heads: what each gains alone", _heads(result) if result.heads else not_reached),
        ("Search: the proxy over tau_max and alpha", _search(result) if result.trials else not_reached),
        ("Proxy against generation", _proxy(result) if result.points else not_reached),
        ("Candidates that no other beats", _front(result) if result.front else not_reached),
        ("Verdict on the held-out problems", _measured(result)),
        ("Every kind of problems", _strata(result) if result.strata else not_reached),
        ("Ablations on the held-out problems", _ablations(result) if result.measured else not_reached),
        ("Preset", file),
    ]
    write_page(path, page(f"StepFlow calibration: {preset.name}", facts, sections, lead))


def _soft(text: str) -> str:
    return element("p", text=text, class_="soft")


def _gate(gate: Gate) -> str:
    facts = _soft(f"{gate.problems} problems of the calibration split, {gate.errors:.1%} wrong.")
    if not gate.trends:
        return facts
    heads = "source,length by,errors in the shortest third,in the longest,odds of an error per doubling,p (one-sided)"
    rows = []
    for one in gate.trends:
        odds = (
            "no bound"
            if one.odds_ratio is None
            else "over 1,000"
            if one.odds_ratio > 1000
            else f"{one.odds_ratio:.2f}"
        )
        rows.append([one.source, one.measure, f"{one.short:.1%}", f"{one.long:.1%}", odds, f"{one.p_value:.4f}"])
    return facts + table(heads.split(","), rows)


def _bands(bands: Bands) -> str:
    rows = [[one.name, str(one.oeb_layers), str(one.smi_layers)] for one in bands.proposals]
    parts = [table(["proposal", "bridge", "injection"], [*rows, ["empty", "[]", "[]"]])]
    every = -(-len(bands.layers) // 16)
    ticks = [(float(at), str(layer)) for at, layer in enumerate(bands.layers) if at % every == 0]
    for index, effects in bands.effects.items():
        values = [row["effect"] or 0.0 for row in effects]
        x, y = Axis(-0.5, len(values) - 0.5, *PLOT_X), Axis.over(values, *PLOT_Y)
        columns = []
        for at, (row, value) in enumerate(zip(effects, values, strict=True)):
            p_value = "no test" if row["p_value"] is None else f"p = {row['p_value']:.4f}"
            columns.append(
                element(
                    "rect",
                    class_="mark" if row["separates"] else "pale",
                    x=x(at - 0.35),
                    width=x(0.7) - x(0.0),
                    y=y(max(value, 0.0)),
                    height=max(abs(y(value) - y(0.0)), 1.0),
                    title=f"layer {bands.layers[at]}: {value:+.2f}, {p_value}",
                )
            )
        chart = svg(_INDICES[index], frame(x, y, "layer", "effect", ticks), *columns)
        parts.append(element("h3", text=_INDICES[index]) + chart)
    right, wrong = bands.traces
    evidence = f"{right} right and {wrong} wrong traces; blue columns separate them (adjusted p of at most {LEVEL:g})."
    return "".join(parts) + _soft(f"{evidence} A proposal is a correlation: interventions decide.")


def _heads(result: Calibration) -> str:
    parts = []
    for mechanism, heads in result.heads.items():
        parts.append(element("h3", text=mechanism[0].upper() + mechanism[1:]))
        if heads.gains:
            parts.append(_head_map(mechanism, heads))
        chosen = ", ".join(f"layer {layer} head {head}" for layer, head in heads.chosen) or "none"
        tried = f"{len(heads.gains)} heads tried, {heads.untried} untried"
        parts.append(_soft(f"{tried}. Those that profit together: {chosen}."))
    return "".join(parts)


def _head_map(mechanism: str, heads: Heads) -> str:
    """A cell for each head, a column for each layer: green raises the proxy, red lowers it, a ring is chosen."""
    layers = sorted({layer for layer, _ in heads.gains})
    rows = max(head for _, head in heads.gains) + 1
    strongest = max(map(abs, heads.gains.values())) or 1.0
    cell = max(4.0, min(_CELL, (_MAP_WIDTH - _LEFT) / len(layers)))
    bottom = _TOP + rows * cell
    parts = []
    for (layer, head), gain in sorted(heads.gains.items()):
        x, y = _LEFT + layers.index(layer) * cell, _TOP + head * cell
        place: dict[str, Any] = {"x": x + 1, "y": y + 1, "width": cell - 2, "height": cell - 2}
        is_chosen = (layer, head) in heads.chosen
        title = f"layer {layer}, head {head}: {gain:+.3f}{', chosen' * is_chosen}"
        shade, opacity = "good grid" if gain > 0 else "bad grid", f"{abs(gain) / strongest:.2f}"
        parts.append(element("rect", class_=shade, **place, fill_opacity=opacity, title=title))
        if is_chosen:
            parts.append(element("rect", class_="ring", **place))
    for at in range(0, len(layers), -(-len(layers) // 16)):
        place = {"x": _LEFT + (at + 0.5) * cell, "y": bottom + 14}
        parts.append(element("text", class_="small", **place, text_anchor="middle", text=layers[at]))
    for head in range(0, rows, -(-rows // 8)):
        place = {"x": _LEFT - 8, "y": _TOP + (head + 0.5) * cell + 4}
        parts.append(element("text", class_="small", **place, text_anchor="end", text=head))
    caption = "layer; rows are its query heads"
    parts.append(element("text", class_="small soft", x=_LEFT, y=bottom + 29, text=caption))
    width = max(_LEFT + len(layers) * cell, 240.0)  # at least as wide as the caption
    return svg(f"{mechanism}: proxy by layer and head", *parts, width=width, height=bottom + 34, kind="map")


def _search(result: Calibration) -> str:
    trials = result.trials
    unit = trials[0].score.unit
    x = Axis.over([one.settings["tau_max"] for one in trials], *PLOT_X)
    y = Axis.over([one.settings["alpha"] for one in trials], *PLOT_Y)
    dots = []
    for one in reversed(trials):
        place: dict[str, Any] = {"cx": x(one.settings["tau_max"]), "cy": y(one.settings["alpha"])}
        title = f"trial {one.number}: {one.score.value:+.3f} {one.score.unit}, {_short(one)}"
        shade = "good" if one.score.objective > 0 else "bad"
        dots.append(element("circle", class_=shade, **place, r=5, title=title))
        if result.winner is not None and result.winner.number == one.number:
            dots.append(element("circle", class_="ring", **place, r=9))
    shown = trials[:_ROWS]
    rows = [
        [
            str(one.number),
            f"{one.score.value:+.3f} ± {one.score.error:.3f}",
            "" if one.score.whole is None else f"{one.score.whole:+.2f}",
            "" if one.score.tokens is None else f"{one.score.tokens:+.3f}",
            f"{one.score.likelihood:+.3f}",
            f"{one.score.margin:+.3f}",
            "" if one.score.worst is None else f"{one.score.worst:+.3f}",
        ]
        for one in shown
    ]
    below = ["" if one.score.is_harmless else f"<b>harms {escape(one.score.stratum or '')}</b> · " for one in shown]
    below = [warning + escape(_short(one)) for warning, one in zip(below, shown, strict=True)]
    heads = f"trial,proxy ({unit}),whole traces,tokens,likelihood (nats),margin (nats),worst stratum"
    caption = (
        f"{len(trials)} different candidates. Green: better than the base by the proxy; red: worse, or harmful to "
        f"a stratum. Where both are 0, a length temperature acts. The {len(shown)} best:"
    )
    chart = svg("alpha over tau_max", frame(x, y, "tau_max", "alpha"), *dots)
    return chart + _soft(caption) + table(heads.split(","), rows, below)


def _short(one: Trial) -> str:
    """The settings that act, with numbers to three digits."""
    texts = [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {json.dumps(value)}"
        for name, value in acting(one.settings).items()
    ]
    return ", ".join(texts) or "the base"


def _proxy(result: Calibration) -> str:
    x = Axis.over([proxy for _, proxy, _ in result.points], *PLOT_X)
    y = Axis.over([100 * delta for _, _, delta in result.points], *PLOT_Y)
    marks = []
    for number, proxy, delta in result.points:
        place = x(proxy), y(100 * delta)
        marks.append(element("circle", cx=place[0], cy=place[1], r=5, title=f"trial {number}"))
        marks.append(element("text", class_="small", x=place[0] + 8, y=place[1] + 4, text=number))
    points = "points of accuracy on the first rung, less the base's"
    chart = svg("accuracy over the proxy", frame(x, y, f"proxy, {result.trials[0].score.unit}", points), *marks)
    correlation, number = result.correlation
    rho = "has no value" if correlation is None else amount(correlation, 2)
    chart += _soft(f"Rank correlation over {number} candidates: {rho}.")
    if result.halving is None:
        return chart
    rows = [
        [
            str(rung),
            str(row.trial),
            str(row.problems),
            f"{100 * row.delta:+.1f}",
            "" if row.worst is None else f"{row.stratum}: {100 * row.worst:+.1f}",
            "stays" if row.stays else "stops",
        ]
        for rung, alive in enumerate(result.halving.rungs, 1)
        for row in alive
    ]
    return chart + table("rung,trial,problems,points against the base,worst stratum plus its error,".split(","), rows)


def _front(result: Calibration) -> str:
    x = Axis.over([100 * one.damage for one in result.front], *PLOT_X)
    y = Axis.over([100 * one.gain for one in result.front], *PLOT_Y)
    marks = [element("circle", class_="grid", cx=x(0.0), cy=y(0.0), r=5, title="the base")]
    for one in result.front:
        place: dict[str, Any] = {"cx": x(100 * one.damage), "cy": y(100 * one.gain)}
        title = f"candidate {one.trial}: {one.words}"
        marks.append(element("circle", class_="bad" if one.harmed else "good", **place, r=6, title=title))
        if one.trial == result.chosen:
            marks.append(element("circle", class_="ring", **place, r=10))
        text = f"#{one.trial}, tokens x{one.cost:.2f}"
        marks.append(element("text", class_="small", x=place["cx"] + 12, y=place["cy"] + 4, text=text))
    chart = svg("gain over damage", frame(x, y, "broken, % of what the base solves", "points gained"), *marks)
    rows = [
        [
            f"#{one.trial}",
            str(one.problems),
            f"{100 * one.gain:+.1f}",
            f"{100 * one.damage:.1f}",
            f"{one.cost:.2f}",
            "judged" if one.trial == result.chosen else "",
            "the rule's" if one.trial == result.default else "",
        ]
        for one in result.front
    ]
    below = [escape(one.words) for one in result.front]
    caption = _soft("On the calibration split. Nobody is better in gain, damage and tokens at once. Ring: judged.")
    heads = "candidate,problems,points,broken (%),tokens (ratio),,".split(",")
    return caption + element("div", chart, class_="wide") + table(heads, rows, below)


def _measured(result: Calibration) -> str:
    one = result.measured
    if one is None:
        return "<p>There was nothing to measure: the empty preset is the base model.</p>"
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
    return element("p", text=one) + table([f"{one.problems} problems", ""], rows)


def _strata(result: Calibration) -> str:
    chart = forest([(one.name, one.delta, percent(one.delta, "+")) for one in result.strata])
    heads = ["stratum", "problems", "base, %", "points", "gained / lost", "p (Holm)", "p of harm", "verdict"]
    rows = [
        [
            one.name,
            str(one.problems),
            f"{100 * one.base:.1f}",
            percent(one.delta, "+"),
            f"{one.gained} / {one.lost}",
            f"{one.adjusted_p_value:.3g}",
            f"{one.harm_p_value:.3g}",
            one.verdict if one.needed is None or one.verdict != OPEN else f"{one.verdict}: about {one.needed} needed",
        ]
        for one in result.strata
    ]
    caption = (
        f"Sources and terciles of length. The p of harm is one-sided: that {result.run['bound']:g} points or more are "
        "lost. Every stratum has to pass it, each at 5 %."
    )
    return _soft(caption) + element("div", chart, class_="wide") + table(heads, rows)


def _ablations(result: Calibration) -> str:
    assert result.measured is not None
    deltas = {"the winner": result.measured.delta} | {name: one.base.delta for name, one in result.ablations.items()}
    chart = forest([(name, delta, percent(delta, "+")) for name, delta in deltas.items()])
    heads = ["ablation", "problems", "against the base", "gained / lost", "the winner against it"]
    rows = [
        [
            name,
            str(one.base.problems),
            percent(one.base.delta, "+"),
            f"{one.base.gained} / {one.base.lost}",
            percent(one.winner.delta, "+"),
        ]
        for name, one in result.ablations.items()
    ]
    caption = _soft("Points of accuracy against the base, with 95 % intervals, not adjusted for their number.")
    text = caption + element("div", chart, class_="wide") + table(heads, rows)
    if result.left_out:
        reasons = [element("li", text=f"{name}: {why}") for name, why in result.left_out.items()]
        text += "<p>Left out:</p>" + element("ul", *reasons)
    return text
