"""Figures of Step-Saliency: the maps of some layers, and the indices over depth.

Figures are made without pyplot: nothing global is touched, no window opens, and the drawing is freed with its figure.
Shapes: L layers, S steps, n traces.
"""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError

from .maps import INDICES, StepMaps

if TYPE_CHECKING:
    from .compare import SaliencyComparison

# Colours of Okabe and Ito, which colour-blind readers can tell apart.
BLOCK_COLOURS = {"question": "#0072B2", "thinking": "#E69F00", "summary": "#009E73"}
_BLOCK_INKS = {"question": "#005A8F", "thinking": "#8F5E00", "summary": "#00664B"}
_GROUP_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o", "linewidth": 1.3},
    {"color": "#D55E00", "linestyle": (0, (4, 1.2)), "marker": "s", "linewidth": 1.3},
)
_INK = "#333333"
_SEPARATING = "#e6e6e6"
_NOTHING = "#d0d0d0"

# Decades that a log scale of colours covers at most.
_DECADES = 5

# Title and unit of each index in a profile.
_PANELS = {
    "lock_in": ("Lock-in (current + previous)", "share"),
    "current_step": ("Thinking on current step", "share"),
    "previous_step": ("Thinking on previous step", "share"),
    "earlier_steps": ("Thinking on earlier steps", "share"),
    "question": ("Thinking on question", "share"),
    "decay_share": ("Summary on thinking", "share"),
    "decay_slope": ("Summary's decay over thinking", "nats a step of age"),
    "block_ratio": ("Summary block / thinking block", "ratio of means per pair"),
}


def plot_maps(
    saliency: StepMaps,
    layer: "int | str" = "bands",
    *,
    scale: str = "log",
    path: "str | Path | None" = None,
    title: str | None = None,
    colormap: str = "viridis",
) -> Any:
    """Draws step maps: rows are the steps that read, columns the steps drawn on; heads are averaged.

    All panels share one colour scale. Cells without any saliency, for instance outside a sliding window, are grey.

    Args:
        saliency: The maps of one trace.
        layer: The index of a layer in the model; "bands" for the mean maps of the bottom quarter, the middle half and
            the top quarter of the layers; "grid" for every layer.
        scale: The scale of the colours, "log" or "linear"; a log scale covers five decades at most.
        path: The file to write, as png, pdf or svg by its suffix; None writes none.
        title: The title above the panels; None takes the model and the loss.
        colormap: The name of a matplotlib colormap, best a perceptually uniform one.

    Returns:
        A matplotlib Figure.

    Raises:
        StepFlowInputError: If the maps lack the layer, the scale is unknown, or matplotlib is not installed.
        StepFlowFileError: If the file cannot be written.
    """
    _check_extra()
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    panels = _panels(saliency, layer)
    lower = np.tri(len(saliency.steps), dtype=bool)
    values = np.stack([panel[lower] for _, panel in panels])
    norm, extend = _norm(values, scale)
    is_grid = layer == "grid"
    columns = _columns(len(panels)) if is_grid else len(panels)
    rows = -(-len(panels) // columns)
    # In inches: a layout engine that measures the panels takes seconds for many layers.
    side = 4.2 if len(panels) == 1 else (1.3 if len(panels) > 6 else 2.2) if is_grid else 2.9
    left, right, above, gap = (0.35 if is_grid else 0.8), 1.0, 0.5, 0.2
    keys = _keys(saliency, side, with_blocks=is_grid, with_nothing=bool((values == 0).any()))
    below = (0.45 if is_grid else 0.7) + 0.22 * bool(keys)
    width, height = left + columns * (side + gap) - gap + right, below + rows * (side + gap) - gap + above
    figure: Any = Figure(figsize=(width, height))
    for number, (name, panel) in enumerate(panels):
        row, column = divmod(number, columns)
        x, y = left + column * (side + gap), below + (rows - 1 - row) * (side + gap)
        axes = figure.add_axes((x / width, y / height, side / width, side / height))
        _draw_map(axes, panel, norm, colormap)
        _draw_blocks(axes, saliency, side)
        if not is_grid:
            _name_blocks(axes, saliency, side, axis_y=number == 0)
        axes.set_title(name, fontsize=7 if is_grid else 9, color=_INK, pad=3)
    middle = (left + width - right) / 2 / width, (below + height - above) / 2 / height
    figure.supxlabel("step drawn on", x=middle[0], y=(0.05 + 0.22 * bool(keys)) / height, fontsize=9, color=_INK)
    figure.supylabel("step that reads", x=0.06 / width, y=middle[1], fontsize=9, color=_INK)
    place = ((width - right + 0.15) / width, below / height, 0.13 / width, 1 - (below + above) / height)
    bar = figure.colorbar(ScalarMappable(norm, colormap), cax=figure.add_axes(place), extend=extend, extendfrac=0.03)
    pairs = "causal token pairs" if saliency.pooling == "causal" else "all token pairs"
    bar.set_label(f"saliency, mean over {pairs}", fontsize=8, color=_INK)
    bar.ax.tick_params(which="both", labelsize=8, colors=_INK)
    bar.ax.yaxis.get_offset_text().set_fontsize(8)
    bar.outline.set_linewidth(0.6)
    _draw_legend(figure, keys, 1.1, loc="lower center", bbox_to_anchor=(middle[0], 0.02 / height), borderaxespad=0)
    _draw_title(figure, saliency, title, x=middle[0], y=1 - 0.06 / height)
    return _written(figure, path)


def plot_profile(
    saliency: "StepMaps | Sequence[StepMaps]",
    wrong: "StepMaps | Sequence[StepMaps] | None" = None,
    *,
    indices: Sequence[str] | None = None,
    comparison: "SaliencyComparison | None" = None,
    path: "str | Path | None" = None,
    title: str | None = None,
) -> Any:
    """Draws the indices over depth, for one trace or for groups of traces.

    A group is drawn as its mean with a 95 % interval (Student's t), over the traces in which the index is a number.

    Args:
        saliency: The maps of one trace or of a group; with `wrong`, those of the traces with the right answer.
        wrong: The maps of the traces with a wrong answer.
        indices: Names from `INDICES`; None draws all.
        comparison: A comparison of the groups, whose separating layers are marked.
        path: The file to write, as png, pdf or svg by its suffix; None writes none.
        title: The title above the panels; None takes the model and the loss.

    Returns:
        A matplotlib Figure.

    Raises:
        StepFlowInputError: If a group is empty, the traces differ in model, loss, layers or pooling, the comparison
            has other layers, an index is unknown, or matplotlib or scipy is not installed.
        StepFlowFileError: If the file cannot be written.
    """
    _check_extra()
    from matplotlib.figure import Figure

    from .compare import check_comparable, index_values

    groups = [[one] if isinstance(one, StepMaps) else list(one) for one in (saliency, wrong) if one is not None]
    if not all(groups):
        raise StepFlowInputError("there must be one trace or more in each group, got none")
    check_comparable([one for group in groups for one in group])
    first = groups[0][0]
    names = list(INDICES) if indices is None else list(indices)
    unknown = [name for name in names if name not in INDICES]
    if unknown:
        raise StepFlowInputError(f"index must be one of {', '.join(INDICES)}, got {unknown[0]!r}")
    if not names:
        raise StepFlowInputError("indices must name one index or more, got none")
    if comparison is not None and comparison.layers != first.layers:
        raise StepFlowInputError(
            f"the comparison must be of the traces' layers {first.layers}, got {comparison.layers}"
        )
    columns = len(names) if len(names) <= 3 else -(-len(names) // 2)
    rows = -(-len(names) // columns)
    figure: Any = Figure(figsize=(columns * 2.7 + 0.2, rows * 2.1 + 0.7), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05)
    values = [index_values(group) for group in groups]
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, number + 1)
        if comparison is not None:
            for layer in comparison.separating(name):
                axes.axvspan(layer - 0.5, layer + 0.5, color=_SEPARATING, linewidth=0, zorder=0)
        for place, group in enumerate(values):
            _draw_profile(axes, first.layers, group[name], place, len(groups))
        if all(np.isnan(group[name]).all() for group in values):
            axes.set_yticks([])
            axes.text(0.5, 0.5, "no trace has it", transform=axes.transAxes, ha="center", fontsize=8, color=_INK)
        _dress_profile(axes, name, first.layers, is_last=number + columns >= len(names))
    _legend_of_groups(figure, groups, comparison)
    _draw_title(figure, first, title)
    return _written(figure, path)


def _panels(saliency: StepMaps, layer: "int | str") -> list[tuple[str, np.ndarray]]:
    """The title and the map of each panel, float64 [S, S]."""
    maps = saliency.mean_maps.double().cpu().numpy()
    layers = saliency.layers
    if not layers or not saliency.steps:
        raise StepFlowInputError(f"there must be a layer and a step to draw, got {saliency!r}")
    if layer == "grid":
        return [(f"layer {number}", panel) for number, panel in zip(layers, maps, strict=True)]
    if layer == "bands":
        if len(layers) == 1:
            return _panels(saliency, layers[0])
        quarter = max(1, len(layers) // 4)
        cuts = [0, quarter, max(quarter, len(layers) - quarter), len(layers)]
        found = []
        for name, start, end in zip(("bottom quarter", "middle half", "top quarter"), cuts, cuts[1:], strict=False):
            if start < end:
                own = layers[start:end]
                ends = f"layer {own[0]}" if len(own) == 1 else f"layers {own[0]}\N{EN DASH}{own[-1]}"
                found.append((f"{name}: {ends}", maps[start:end].mean(0)))
        return found
    if isinstance(layer, bool) or layer not in layers:
        raise StepFlowInputError(
            f'layer must be "bands", "grid" or one of the layers looked at ({", ".join(map(str, layers))}), '
            f"got {layer!r}"
        )
    return [(f"layer {layer}", maps[layers.index(int(layer))])]


def _columns(panels: int) -> int:
    """The columns of a grid that is as wide as high or a little wider, with the fewest empty places."""
    widths = range(math.ceil(math.sqrt(panels)), math.ceil(math.sqrt(2 * panels)) + 1)
    return min(widths, key=lambda columns: (-panels % columns, columns))


def _norm(cells: np.ndarray, scale: str) -> tuple[Any, str]:
    """One colour scale for all panels, and the end at which it is cut."""
    from matplotlib.colors import LogNorm, Normalize

    if scale not in ("log", "linear"):
        raise StepFlowInputError(f'scale must be "log" or "linear", got {scale!r}')
    values = cells[np.isfinite(cells) & (cells > 0)]
    if not len(values):
        return Normalize(0, 1), "neither"
    low, high = float(values.min()), float(values.max())
    if scale == "linear":
        return Normalize(0, high), "neither"
    is_cut = low < high / 10**_DECADES
    return LogNorm(high / 10**_DECADES if is_cut else min(low, high / 10), high), "min" if is_cut else "neither"


def _draw_map(axes: Any, panel: np.ndarray, norm: Any, colormap: str) -> None:
    """Draws one heat map; the cells above the diagonal stay blank."""
    from matplotlib.colors import ListedColormap

    shown = np.tri(len(panel), dtype=bool) & np.isfinite(panel)
    nothing = shown & (panel == 0)
    axes.imshow(np.ma.masked_where(~nothing, nothing.astype(float)), cmap=ListedColormap([_NOTHING]))
    axes.imshow(np.ma.masked_where(~shown | nothing, panel), cmap=colormap, norm=norm)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_blocks(axes: Any, saliency: StepMaps, side: float) -> None:
    """Draws lines where blocks meet and strips in their colours along the axes of a map `side` inches wide."""
    from matplotlib.patches import Rectangle

    steps, runs = len(saliency.steps), _blocks(saliency)
    # Thin where steps are: a line must not hide a question among hundreds of steps.
    line = min(0.8, max(0.35, 0.3 * 72 * side / max(1, steps)))
    for _, start, _ in runs[1:]:
        for colour, width in (("white", line + 0.6), (_INK, line)):
            edge = start - 0.5
            axes.plot([-0.5, edge, edge], [edge, edge, steps - 0.5], color=colour, linewidth=width, gid="block")
    across, along = axes.get_xaxis_transform(), axes.get_yaxis_transform()
    deep = 0.06 / side
    for label, start, end in runs:
        kind: dict[str, Any] = {"color": BLOCK_COLOURS[label], "linewidth": 0, "clip_on": False}
        axes.add_patch(Rectangle((start - 0.5, -deep), end - start, deep, transform=across, **kind))
        axes.add_patch(Rectangle((-deep, start - 0.5), deep, end - start, transform=along, **kind))
    axes.set_xlim(-0.5, steps - 0.5)
    axes.set_ylim(steps - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])


def _name_blocks(axes: Any, saliency: StepMaps, side: float, axis_y: bool) -> None:
    """Writes step numbers and the blocks' names along the horizontal axis and, with `axis_y`, the vertical one."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if axis_y:
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(length=0, pad=6.5, labelsize=8, colors=_INK)
    across, along = axes.get_xaxis_transform(), axes.get_yaxis_transform()
    for label, place in _name_places(_blocks(saliency), len(saliency.steps) / side):
        style = {"color": _BLOCK_INKS[label], "fontsize": 8, "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(label, (place, 0), (0, -18), xycoords=across, ha="center", va="top", **style)
        if axis_y:
            axes.annotate(label, (0, place), (-27, 0), xycoords=along, ha="right", va="center", rotation=90, **style)


def _blocks(saliency: StepMaps) -> list[tuple[str, int, int]]:
    """Runs of steps with one label, as (label, first, last + 1)."""
    found: list[tuple[str, int, int]] = []
    for label, steps in groupby(saliency.steps, lambda step: step.label):
        start = found[-1][2] if found else 0
        found.append((label, start, start + len(list(steps))))
    return found


def _name_places(runs: list[tuple[str, int, int]], steps_per_inch: float) -> list[tuple[str, float]]:
    """Places the blocks' names on an axis, inside it and without overlap, long blocks first."""
    found: list[tuple[str, float, float]] = []
    length = runs[-1][2] if runs else 0
    for label, start, end in sorted(runs, key=lambda run: run[1] - run[2]):
        half = 0.034 * len(label) * steps_per_inch
        place = min(max((start + end) / 2, half), length - half) if length > 2 * half else length / 2
        if all(abs(place - other) >= half + wide for _, other, wide in found):
            found.append((label, place, half))
    return [(label, place - 0.5) for label, place, _ in found]


def _draw_profile(axes: Any, layers: list[int], values: np.ndarray, place: int, groups: int) -> None:
    """Draws a group's mean over depth and its interval, from [L, n]."""
    from scipy import stats

    known = np.ma.masked_invalid(values)
    mean, deviation = known.mean(-1).filled(np.nan), known.std(-1, ddof=1).filled(np.nan)
    n = known.count(-1)
    half = stats.t.ppf(0.975, n - 1) * deviation / np.sqrt(n)
    style = _GROUP_STYLES[place]
    # With few layers there is room to set the groups apart, and a band between them would be a meaningless wedge.
    is_few = len(layers) <= 6
    shift = 0.1 * (place - (groups - 1) / 2) if is_few else 0.0
    x = np.array(layers) + shift
    if is_few:
        bars = n > 1
        axes.errorbar(x[bars], mean[bars], half[bars], fmt="none", ecolor=style["color"], elinewidth=1, capsize=2.5)
    else:
        axes.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.22, linewidth=0)
    axes.plot(x, mean, markersize=4 if is_few else 2.2, **style)


def _dress_profile(axes: Any, name: str, layers: list[int], is_last: bool) -> None:
    """Writes titles and ticks, and leaves two thin lines of the axes."""
    from matplotlib.ticker import MaxNLocator

    title, unit = _PANELS[name]
    axes.set_title(title, fontsize=9, color=_INK, loc="left")
    axes.set_ylabel(unit, fontsize=8, color=_INK)
    axes.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
    if len(layers) <= 6:
        axes.set_xticks(layers)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if is_last:
        axes.set_xlabel("layer", fontsize=8, color=_INK)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=_INK, linewidth=0.6)
    axes.tick_params(labelsize=8, colors=_INK, width=0.6)


def _keys(saliency: StepMaps, side: float, with_blocks: bool, with_nothing: bool) -> list[Any]:
    """The legend's entries for maps: blocks without a name on the axis, and cells without saliency."""
    from matplotlib.patches import Patch

    runs = _blocks(saliency)
    with_blocks |= len(_name_places(runs, len(saliency.steps) / side)) < len(runs)
    present = {run[0] for run in runs} if with_blocks else set()
    colours = {label: colour for label, colour in BLOCK_COLOURS.items() if label in present}
    if with_nothing:
        colours["no saliency"] = _NOTHING
    return [Patch(color=colour, label=label) for label, colour in colours.items()]


def _legend_of_groups(figure: Any, groups: list[list[StepMaps]], comparison: "SaliencyComparison | None") -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    is_mean = any(len(group) > 1 for group in groups)
    names = ("correct", "wrong") if len(groups) == 2 else ("mean",)
    for name, group, style in zip(names, groups, _GROUP_STYLES, strict=False):
        handles.append(Line2D([], [], markersize=4, label=f"{name} (n = {len(group)})", **style))
    if is_mean:
        colour = _GROUP_STYLES[0]["color"]
        handles.append(Patch(color=colour, alpha=0.22, linewidth=0, label="95 % interval of the mean"))
    if comparison is not None:
        label = f"groups differ (adjusted p \N{LESS-THAN OR EQUAL TO} {comparison.level:g})"
        handles.append(Patch(color=_SEPARATING, label=label))
    if is_mean or len(groups) > 1 or comparison is not None:
        _draw_legend(figure, handles, 1.9, loc="outside lower center")


def _check_extra() -> None:
    """Checks that matplotlib and scipy are installed."""
    missing = [name for name in ("matplotlib", "scipy") if find_spec(name) is None]
    if missing:
        raise StepFlowInputError(
            f"drawing Step-Saliency needs {' and '.join(missing)}, which is not installed",
            hint='pip install "hf-stepflow[saliency]"',
        )


def _draw_legend(figure: Any, handles: list[Any], inches: float, **place: Any) -> None:
    """Draws a legend, in one row if entries of this many inches fit."""
    if not handles:
        return
    columns = len(handles) if len(handles) * inches <= figure.get_figwidth() else 2
    figure.legend(
        handles=handles,
        ncols=columns,
        fontsize=8,
        labelcolor=_INK,
        frameon=False,
        handlelength=1.8,
        columnspacing=1.5,
        **place,
    )


def _draw_title(figure: Any, saliency: StepMaps, title: str | None, **place: float) -> None:
    """Writes the title, or the model and the loss as far as they are known."""
    if title is None:
        model, loss = saliency.about.get("model"), saliency.about.get("loss")
        named = f"loss on the {loss}" if isinstance(loss, str) else loss and f"logit of token {loss[1]} at {loss[0]}"
        title = ", ".join(str(part) for part in (model, named) if part)
    if title:
        size = min(10.0, 120 * figure.get_figwidth() / len(title))
        figure.suptitle(title, fontsize=size, color=_INK, **place)


def _written(figure: Any, path: "str | Path | None") -> Any:
    """Returns the figure, after writing it if there is a path."""
    if path is not None:
        try:
            figure.savefig(path, dpi=200)
        except (OSError, ValueError) as error:
            raise StepFlowFileError(
                f"{str(path)!r} cannot be written: {error}", hint="give a file ending in .png, .pdf or .svg"
            ) from error
    return figure
