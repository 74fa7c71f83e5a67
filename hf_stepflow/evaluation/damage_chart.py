"""The chart of accuracy against damage: a panel for each kind of damage, a point for each arm."""

import math
from collections.abc import Callable, Sequence

from hf_stepflow.report import Axis, element, frame, svg

from .charts import apart, colours_of, legend, mark
from .damage import ArmDamage
from .statistics import Estimate

_WIDTH, _HEIGHT, _LEFT, _TOP = 330, 230, 50, 30


def _high_kl(one: ArmDamage) -> Estimate | None:
    return None if one.kl is None else Estimate(one.kl.high, None, None)


# For each panel: its title, the value of an arm, and the text of a tick. The first arm has no harm and the length 1.
_PANELS: tuple[tuple[str, Callable[[ArmDamage], Estimate | None], Callable[[float], str]], ...] = (
    ("breaks", lambda one: one.harm_rate or Estimate(0.0, None, None), lambda value: f"{100 * value:.4g} %"),
    ("tokens, relative", lambda one: one.length or Estimate(1.0, None, None), lambda value: f"{value:.4g}"),
    ("unfinished", lambda one: one.unfinished, lambda value: f"{100 * value:.4g} %"),
    (
        "KL, 95th percentile, nats",
        _high_kl,
        lambda value: f"{value:.2g}",
    ),
)


def damage_chart(damage: Sequence[ArmDamage]) -> str:
    """Renders accuracy against each kind of damage that was measured; the first arm's accuracy is a dashed line.

    Args:
        damage: The arms, the first one first.
    """
    colours = colours_of(one.name for one in damage)
    y = _shares([one.accuracy for one in damage])
    y_ticks = [(tick, f"{100 * tick:.4g} %") for tick in y.ticks()]
    parts, column = [], 0
    for title, value_of, text_of in _PANELS:
        values = {one.name: value_of(one) for one in damage}
        known = {name: value for name, value in values.items() if value is not None}
        if not known:
            continue
        x = _axis(title, list(known.values()))
        ticks = [(tick, text_of(tick)) for tick in (_decades(x) if x.is_log else x.ticks())]
        accuracy = {one.name: one.accuracy.value for one in damage}
        places = apart([(x(value.value), y(accuracy[name])) for name, value in known.items()])
        level = y(damage[0].accuracy.value)
        own = [one for one in damage if one.name in known]
        points = [
            mark(x, y, place, known[one.name], one.accuracy, colours[one.name], _title(one, title, known, text_of))
            for place, one in zip(places, own, strict=True)
        ]
        parts.append(
            element(
                "g",
                element("text", class_="strong", x=0, y=-11, text=title),
                frame(x, y, "", x_ticks=ticks, y_ticks=y_ticks),
                element("line", class_="dashed", x1=0, x2=_WIDTH, y1=level, y2=level),
                *points,
                transform=f"translate({column * (_WIDTH + _LEFT) + _LEFT} {_TOP})",
            )
        )
        column += 1
    bottom, width = _TOP + _HEIGHT + 34, column * (_WIDTH + _LEFT)
    keys, _, end = legend(colours, float(_LEFT), bottom, width - _LEFT)
    return svg("accuracy against damage", *parts, keys, width=width + 24, height=end + 6, kind="panels")


def _title(one: ArmDamage, title: str, known: dict[str, Estimate], text_of: Callable[[float], str]) -> str:
    return f"{one.name}: {100 * one.accuracy.value:.1f} % right, {title} {text_of(known[one.name].value)}"


def _shares(values: Sequence[Estimate]) -> Axis:
    ends = [end for one in values for end in (one.low, one.value, one.high) if end is not None]
    return Axis(max(0.0, min(ends) - 0.03), min(1.0, max(ends) + 0.03), _HEIGHT, 0.0)


def _axis(title: str, values: Sequence[Estimate]) -> Axis:
    ends = [end for one in values for end in (one.low, one.value, one.high) if end is not None]
    if title.startswith("KL"):
        some = [end for end in ends if end > 0] or [1e-9]
        return Axis(min(some) / 3, max(some) * 3, 0.0, _WIDTH, is_log=True)
    margin = 0.06 * (max(ends) - min(ends)) or 0.05
    return Axis(min(ends) - margin, max(ends) + margin, 0.0, _WIDTH)


def _decades(axis: Axis) -> list[float]:
    """At most six powers of ten along a logarithmic axis."""
    first, last = math.ceil(math.log10(axis.low)), math.floor(math.log10(axis.high))
    step = max(1, math.ceil((last - first + 1) / 6))
    return [10.0**power for power in range(first, last + 1, step)]
