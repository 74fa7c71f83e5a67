"""The parts that charts of arms share: their colours, points with two intervals, and the legend."""

from collections.abc import Iterable, Mapping, Sequence

from hf_stepflow.report import Axis, element

from .statistics import Estimate

_APART = 9  # pixels between points that would cover each other
# In the order of the arms; readable on white and on black.
_COLOURS = ("#1098ad", "#e8590c", "#845ef7", "#2f9e44", "#e64980", "#a07c00", "#c92a2a", "#1971c2")


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """Gives each name a colour, in order; after eight they come again."""
    return {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(dict.fromkeys(names))}


def mark(x: Axis, y: Axis, place: float, across: Estimate, up: Estimate, colour: str, title: str) -> str:
    """Renders a point and its two intervals.

    Args:
        x: The horizontal axis.
        y: The vertical axis.
        place: The horizontal coordinate of the point, which may be beside its own.
        across: The value on the horizontal axis.
        up: The value on the vertical axis.
        colour: The colour.
        title: The tooltip.
    """
    top = y(up.value)
    parts = []
    if up.low is not None and up.high is not None:
        parts.append(element("line", x1=place, x2=place, y1=y(up.low), y2=y(up.high)))
    if across.low is not None and across.high is not None:
        shift = place - x(across.value)
        parts.append(element("line", x1=x(across.low) + shift, x2=x(across.high) + shift, y1=top, y2=top))
    parts.append(element("circle", cx=place, cy=top, r=4, style=f"fill:{colour}"))
    return element("g", *parts, title=title, style=f"stroke:{colour};fill:{colour};stroke-width:2")


def side_by_side(places: Sequence[float]) -> list[float]:
    """Moves places apart that are closer than nine pixels, each group of them around its mean."""
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


def apart(points: Sequence[tuple[float, float]]) -> list[float]:
    """The horizontal coordinates of points, moved where one would cover another; points at other heights stay."""
    order = sorted(range(len(points)), key=lambda index: points[index][1])
    levels: list[list[int]] = []
    for index in order:
        if levels and points[index][1] - points[levels[-1][-1]][1] < _APART:
            levels[-1].append(index)
        else:
            levels.append([index])
    moved = [across for across, _ in points]
    for level in map(sorted, levels):
        for index, place in zip(level, side_by_side([moved[index] for index in level]), strict=True):
            moved[index] = place
    return moved


def legend(
    colours: Mapping[str, str], left: float, top: float, width: float | None = None
) -> tuple[str, float, float]:
    """Renders the names beside their colours, in lines if a width is given.

    Args:
        colours: The colour of each name.
        left: The coordinate of the left end.
        top: The upper coordinate.
        width: The width of a line; None for one line.

    Returns:
        The picture, and the coordinates at which its last line ends and at which it ends below.
    """
    place, parts = left, []
    for name, colour in colours.items():
        room = 40 + 7.5 * len(short(name))
        if width is not None and place > left and place + room > left + width:
            place, top = left, top + 20
        parts.append(element("circle", cx=place, cy=top + 10, r=5, style=f"fill:{colour}"))
        parts.append(element("text", x=place + 10, y=top + 14, text=short(name)))
        place += room
    return "".join(parts), place, top + 20


def short(text: str) -> str:
    """A name, cut where it would cover its neighbours."""
    return text if len(text) <= 46 else text[:45] + "…"
