"""Charts in SVG: axes that place values, a frame with grid and numbers, and the forest of intervals."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .page import element

_WIDTH, _HEIGHT = 640, 300
# Where the axes of a chart of this size start and end: to the right, and upwards.
PLOT_X, PLOT_Y = (70.0, 630.0), (260.0, 32.0)


@dataclass(frozen=True)
class Axis:
    """Places values along one axis.

    Attributes:
        low: The value at the start.
        high: The value at the end.
        start: The coordinate of the start, in pixels.
        end: The coordinate of the end.
        is_log: Whether equal steps are equal factors; then low is above zero.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float) -> "Axis":
        """The linear axis that holds zero and all values, with a margin."""
        known = [0.0, *values]
        margin = 0.08 * (max(known) - min(known)) or 1.0
        return cls(min(known) - margin, max(known) + margin, start, end)

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values along the axis, seven at most on a linear one."""
        if not self.is_log:
            power = 10.0 ** math.floor(math.log10((self.high - self.low) / 6))
            step = next(digit * power for digit in (1, 2, 5, 10) if self.high - self.low <= 6 * digit * power)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [number * step for number in range(first, last + 1)]
        ticks: list[float] = []
        for digits in ((1, 2, 5), (1, 2, 3, 4, 6, 8)):
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            ticks = [digit * 10.0**power for power in powers for digit in digits]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(ticks) > 3:
                break
        return ticks


Ticks = Sequence[tuple[float, str]]


def frame(
    x: Axis, y: Axis, x_label: str, y_label: str = "", x_ticks: Ticks | None = None, y_ticks: Ticks | None = None
) -> str:
    """Renders the grid, numbers and labels of a chart, over which its marks are drawn.

    Args:
        x: The horizontal axis.
        y: The vertical axis, from below upwards.
        x_label: The quantity on the horizontal axis.
        y_label: The quantity on the vertical axis.
        x_ticks: Values and texts on the horizontal axis; None takes round values.
        y_ticks: Values and texts on the vertical axis; None takes round values.
    """
    parts = []
    for value, text in _numbers(y) if y_ticks is None else y_ticks:
        parts.append(element("line", class_="grid", x1=x.start, x2=x.end, y1=y(value), y2=y(value)))
        parts.append(element("text", class_="small soft", x=x.start - 6, y=y(value) + 4, text_anchor="end", text=text))
    parts.append(element("line", class_="grid", x1=x.start, x2=x.end, y1=y.start, y2=y.start))
    for value, text in _numbers(x) if x_ticks is None else x_ticks:
        parts.append(element("line", class_="grid", x1=x(value), x2=x(value), y1=y.start, y2=y.start + 4))
        parts.append(element("text", class_="small soft", x=x(value), y=y.start + 17, text_anchor="middle", text=text))
    parts.append(element("text", class_="small soft", x=x.end, y=y.start + 33, text_anchor="end", text=x_label))
    if y_label:
        parts.append(element("text", class_="small soft", x=4, y=12, text=y_label))
    return "".join(parts)


def _numbers(axis: Axis) -> Ticks:
    return [(tick, f"{tick:,.6g}") for tick in axis.ticks()]


def svg(label: str, *parts: str, width: float = _WIDTH, height: float = _HEIGHT, kind: str = "chart") -> str:
    """Renders a picture.

    Args:
        label: What it shows, for those who do not see it.
        *parts: Its elements.
        width: Its width in pixels; it shrinks with the page.
        height: Its height in pixels.
        kind: Its class: numbers of a `chart` grow where the page is narrow.
    """
    box = f"0 0 {width:.0f} {height:.0f}"
    return element("svg", *parts, class_=kind, viewBox=box, width=round(width), role="img", aria_label=label)


def forest(rows: Sequence[tuple[str, Any, str]]) -> str:
    """Renders differences of shares with their intervals, in points, along one axis through zero.

    Args:
        rows: For each, a label, a difference (`value`, and `low` and `high` or None) and its text.
    """
    ends = [end for _, delta, _ in rows for end in (delta.low, delta.value, delta.high) if end is not None]
    low, high = min(0.0, *ends), max(0.0, *ends)
    margin = 0.05 * (high - low) or 0.01
    x = Axis(low - margin, high + margin, 260.0, 740.0)
    bottom = 30.0 * len(rows) + 8
    parts = [element("line", class_="zero", x1=x(0), x2=x(0), y1=0, y2=bottom)]
    for index, (name, delta, text) in enumerate(rows):
        y = 30 * index + 16
        parts.append(element("text", x=0, y=y + 4, text=name if len(name) <= 36 else name[:35] + "…"))
        if delta.low is not None and delta.high is not None:
            parts.append(element("line", class_="bar", x1=x(delta.low), x2=x(delta.high), y1=y, y2=y))
        parts.append(element("circle", cx=x(delta.value), cy=y, r=4))
        parts.append(element("text", x=x.end + 12, y=y + 4, text=text))
    parts.append(element("line", class_="grid", x1=x.start, x2=x.end, y1=bottom, y2=bottom))
    for tick in x.ticks():
        parts.append(element("text", x=x(tick), y=bottom + 18, text_anchor="middle", text=f"{100 * tick:.4g}"))
    return svg("differences with intervals", *parts, width=920, height=bottom + 26, kind="forest")
