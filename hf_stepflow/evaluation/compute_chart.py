"""Accuracy against generated tokens as a chart: one panel a method, the first arm's curve in each of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .compute import CurvePoint
from .statistics import Estimate

_WIDTH, _HEIGHT, _LEFT, _TOP, _COLUMNS = 360, 230, 44, 26, 3
_APART = 9  # between points that would cover each other
# Of the settings, in their order; each readable on white and on black.
_COLOURS = ("#1098ad", "#e8590c", "#845ef7", "#2f9e44", "#e64980", "#a07c00")

STYLE = """svg .reference { stroke: var(--soft); fill: none; stroke-dasharray: 5 3; }
svg .knot { fill: var(--paper); stroke: var(--soft); } svg .grid { stroke: var(--line); }
svg .panel { font-weight: 600; } svg .tick { fill: var(--soft); font-size: 11px; }"""


@dataclass(frozen=True)
class ChartPoint:
    """One arm in the chart.

    Attributes:
        panel: the method, which gives the panel.
        setting: the StepFlow setting, which gives the colour.
        accuracy: with its interval.
        tokens: with their interval.
    """

    panel: str
    setting: str
    accuracy: Estimate
    tokens: Estimate


def chart(points: Sequence[ChartPoint], curve: Sequence[CurvePoint]) -> str:
    """The chart as SVG, with the legend of its colours.

    Args:
        points: the arms.
        curve: what the first arm does with more samples.
    """
    panels = list(dict.fromkeys(point.panel for point in points))
    settings = list(dict.fromkeys(point.setting for point in points))
    colour = {setting: _COLOURS[index % len(_COLOURS)] for index, setting in enumerate(settings)}
    axes = _Axes.around(
        _ends([*(one.accuracy for one in points), *(one.accuracy for one in curve)]),
        _ends([*(one.tokens for one in points), *(one.tokens for one in curve)]),
    )
    rows = math.ceil(len(panels) / _COLUMNS)
    height = rows * (_HEIGHT + _TOP + 40)
    parts = [
        f'<svg viewBox="0 0 {min(len(panels), _COLUMNS) * (_WIDTH + _LEFT)} {height + 24}" role="img" '
        'aria-label="accuracy against generated tokens">'
    ]
    for index, panel in enumerate(panels):
        x, y = index % _COLUMNS * (_WIDTH + _LEFT), index // _COLUMNS * (_HEIGHT + _TOP + 40)
        own = [point for point in points if point.panel == panel]
        parts.append(f'<g transform="translate({x + _LEFT} {y + _TOP})">')
        parts.append(f'<text class="panel" x="0" y="-9">{escape(_short(panel))}</text>')
        parts += axes.drawn()
        parts += _curve(axes, curve)
        for place, point in zip(_side_by_side([axes.x(one.tokens.value) for one in own]), own, strict=True):
            parts += _point(axes, place, point, colour[point.setting])
        parts.append("</g>")
    place = float(_LEFT)
    for setting in settings:
        parts.append(f'<circle cx="{place:.0f}" cy="{height + 10}" r="5" style="fill:{colour[setting]}"/>')
        parts.append(f'<text x="{place + 10:.0f}" y="{height + 14}">{escape(_short(setting))}</text>')
        place += 40 + 7.5 * len(_short(setting))
    if len(curve) > 1:
        parts.append(
            f'<line class="reference" x1="{place:.0f}" x2="{place + 30:.0f}" y1="{height + 10}" y2="{height + 10}"/>'
        )
        parts.append(f'<text x="{place + 38:.0f}" y="{height + 14}">the first arm with more samples</text>')
    return "".join(parts) + "</svg>"


@dataclass(frozen=True)
class _Axes:
    """Tokens on a logarithmic axis, accuracy on a linear one: the same in every panel."""

    tokens: tuple[float, float]
    accuracy: tuple[float, float]

    @classmethod
    def around(cls, accuracies: list[float], tokens: list[float]) -> "_Axes":
        low, high = max(0.0, min(accuracies) - 0.03), min(1.0, max(accuracies) + 0.03)
        return cls((max(min(tokens), 0.5) / 1.2, max(*tokens, 1.0) * 1.2), (low, high))

    def x(self, tokens: float) -> float:
        low, high = map(math.log, self.tokens)
        return _WIDTH * (math.log(max(tokens, self.tokens[0])) - low) / (high - low)

    def y(self, accuracy: float) -> float:
        low, high = self.accuracy
        return _HEIGHT * (high - accuracy) / (high - low)

    def drawn(self) -> list[str]:
        parts = []
        step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if self.accuracy[1] - self.accuracy[0] <= 6 * step)
        for number in range(math.ceil(self.accuracy[0] / step - 1e-9), math.floor(self.accuracy[1] / step + 1e-9) + 1):
            y = self.y(number * step)
            parts.append(f'<line class="grid" x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="tick" x="-6" y="{y + 4:.1f}" text-anchor="end">{100 * number * step:.0f} %</text>'
            )
        for tokens in _ticks(*self.tokens):
            x = self.x(tokens)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_HEIGHT}" y2="{_HEIGHT + 4}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT + 16}" text-anchor="middle">{tokens:,}</text>')
        parts.append(f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>')
        parts.append(f'<text class="tick" x="{_WIDTH}" y="{_HEIGHT + 30}" text-anchor="end">tokens a problem</text>')
        return parts


def _ends(estimates: list[Estimate]) -> list[float]:
    return [end for one in estimates for end in (one.low, one.value, one.high) if end is not None]


def _ticks(low: float, high: float) -> list[int]:
    """Round numbers of tokens between two."""
    powers = range(max(math.floor(math.log10(low)), 0), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 2, 3, 4, 6, 8)):
        ticks = [digit * 10**power for power in powers for digit in digits if low <= digit * 10**power <= high]
        if len(ticks) > 3:
            break
    return ticks


def _curve(axes: _Axes, curve: Sequence[CurvePoint]) -> list[str]:
    places = [(axes.x(one.tokens.value), axes.y(one.accuracy.value)) for one in curve]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline class="reference" points="{line}"/>'] if len(places) > 1 else []
    return parts + [f'<circle class="knot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]


def _side_by_side(places: list[float]) -> list[float]:
    """Places at least `_APART` from each other, each group of close ones around where it was."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    groups: list[list[int]] = []
    for index in order:
        if groups and places[index] - places[groups[-1][-1]] < _APART:
            groups[-1].append(index)
        else:
            groups.append([index])
    moved = list(places)
    for group in groups:
        middle = sum(places[index] for index in group) / len(group)
        for number, index in enumerate(sorted(group)):
            moved[index] = middle + _APART * (number - (len(group) - 1) / 2)
    return moved


def _point(axes: _Axes, place: float, point: ChartPoint, colour: str) -> list[str]:
    y = axes.y(point.accuracy.value)
    told = f"{point.setting}: {100 * point.accuracy.value:.1f} % at {point.tokens.value:.1f} tokens"
    parts = [f'<g style="stroke:{colour};fill:{colour};stroke-width:2"><title>{escape(told)}</title>']
    if point.accuracy.low is not None and point.accuracy.high is not None:
        low, high = axes.y(point.accuracy.low), axes.y(point.accuracy.high)
        parts.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
    if point.tokens.low is not None and point.tokens.high is not None:
        shift = place - axes.x(point.tokens.value)
        left, right = axes.x(point.tokens.low) + shift, axes.x(point.tokens.high) + shift
        parts.append(f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return [*parts, f'<circle cx="{place:.1f}" cy="{y:.1f}" r="4" style="fill:{colour}"/></g>']


def _short(text: str) -> str:
    return text if len(text) <= 46 else text[:45] + "…"
