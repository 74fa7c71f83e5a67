"""The figures of Step-Saliency: what is drawn, on which scale, and that nothing is left behind."""

import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError
from hf_stepflow.saliency import plot as plot_module
from hf_stepflow.saliency.compare import compare
from hf_stepflow.saliency.maps import INDICES
from hf_stepflow.saliency.plot import BLOCK_COLOURS, plot_maps, plot_profile
from hf_stepflow.saliency.result import StepSaliency
from tests.support.synthetic_saliency import (
    ABOUT,
    CONTROL,
    QUESTION,
    SUMMARY,
    THINKING,
    random_saliency,
    simple_trace,
    trace_of,
    with_indices,
)

NAMES = list(INDICES)
TO = "\N{EN DASH}"


def panels(figure: Figure) -> list:
    """The axes of maps; the last axes are the colour bar's."""
    return figure.axes[:-1]


def cells(axes) -> np.ma.MaskedArray:
    """What is drawn in colour."""
    return axes.images[1].get_array()


def text_of(figure: Figure) -> list[str]:
    from matplotlib.text import Text

    return [one.get_text() for one in figure.findobj(Text) if one.get_text()]


@pytest.mark.parametrize(
    ("layers", "layer", "titles"),
    [
        (8, "bands", [f"bottom quarter: layers 0{TO}1", f"middle half: layers 2{TO}5", f"top quarter: layers 6{TO}7"]),
        (3, "bands", ["bottom quarter: layer 0", "middle half: layer 1", "top quarter: layer 2"]),
        (2, "bands", ["bottom quarter: layer 0", "top quarter: layer 1"]),
        (1, "bands", ["layer 0"]),
        (5, "grid", [f"layer {number}" for number in range(5)]),
        (5, 3, ["layer 3"]),
    ],
)
def test_panels(layers: int, layer: "int | str", titles: list[str]) -> None:
    saliency = random_saliency(simple_trace(3, 1), layers)
    figure = saliency.plot(layer)
    assert isinstance(figure, Figure)
    assert [axes.get_title() for axes in panels(figure)] == titles
    # One colour scale for all, which reaches from the strongest cell to the weakest that it can tell.
    norms = [axes.images[1].norm for axes in panels(figure)]
    assert all(norm is norms[0] for norm in norms)
    shown = np.concatenate([cells(axes).compressed() for axes in panels(figure)])
    assert shown.max() == pytest.approx(norms[0].vmax)
    assert norms[0].vmin == pytest.approx(min(max(shown.min(), shown.max() / 1e5), shown.max() / 10))


def test_bands_are_means_of_maps() -> None:
    saliency = random_saliency(simple_trace(4, 2), layers=6)
    heads = StepSaliency(
        torch.stack([saliency.sums * 0.5, saliency.sums * 1.5], 1), [1, 3, 5, 7, 9, 11], saliency.trace
    )
    lower = np.tri(7, dtype=bool)
    for one in (saliency, heads):
        middle = cells(panels(one.plot())[1])
        assert np.array_equal(~middle.mask, lower)
        assert middle[lower].data == pytest.approx(saliency.maps[1:5].mean(0).numpy()[lower])
    assert panels(heads.plot())[1].get_title() == f"middle half: layers 3{TO}9"
    assert cells(panels(heads.plot(9))[0])[lower].data == pytest.approx(saliency.maps[4].numpy()[lower])


def test_scales() -> None:
    saliency = random_saliency(simple_trace(3, 1), layers=2)
    log, linear = (panels(saliency.plot(0, scale=scale))[0].images[1].norm for scale in ("log", "linear"))
    assert type(log) is LogNorm
    assert type(linear) is Normalize
    assert linear.vmin == 0
    # Layers fall by ten each: nine decades, of which five can be told apart.
    deep = random_saliency(simple_trace(3, 1), layers=9).plot("grid")
    norm = panels(deep)[0].images[1].norm
    assert norm.vmax / norm.vmin == pytest.approx(1e5)
    # Cells that are all alike still have a scale.
    flat = StepSaliency(torch.ones(1, 2, 2), [0], simple_trace(1, 0)).plot(0, scale="log")
    assert panels(flat)[0].images[1].norm.vmin < panels(flat)[0].images[1].norm.vmax


def test_cells_without_saliency_are_apart_from_small_ones() -> None:
    saliency = random_saliency(simple_trace(5, 1), layers=1, zero_beyond=2)
    figure = saliency.plot(0)
    nothing, something = (image.get_array() for image in panels(figure)[0].images)
    lower = np.tri(7, dtype=bool)
    empty = lower & (saliency.maps[0].numpy() == 0)
    assert empty.any()
    assert np.array_equal(~nothing.mask, empty)
    assert np.array_equal(~something.mask, lower & ~empty)
    assert "no saliency" in text_of(figure)
    assert "no saliency" not in text_of(random_saliency(simple_trace(5, 1), layers=1).plot(0))


@pytest.mark.filterwarnings("error")
def test_maps_without_any_number(tmp_path: Path) -> None:
    trace = simple_trace(3, 1)
    for value in (0.0, float("nan"), float("inf")):
        saliency = StepSaliency(torch.full((2, 5, 5), value).tril(), [0, 1], trace)
        for scale in ("log", "linear"):
            saliency.plot(1, scale=scale, path=tmp_path / "one.png")


def test_blocks_are_marked() -> None:
    trace = trace_of(
        [(QUESTION, 3), (CONTROL, 1), *[(THINKING, 2)] * 4, (CONTROL, 1), *[(SUMMARY, 2)] * 2],
        [(QUESTION, 3), *[(THINKING, 2)] * 3, (SUMMARY, 2)],
    )
    saliency = random_saliency(trace, layers=4)
    for layer in ("bands", "grid", 2):
        figure = saliency.plot(layer)
        for axes in panels(figure):
            edges = {line.get_xdata()[1] for line in axes.lines if line.get_gid() == "block"}
            assert edges == {0.5, 4.5, 6.5, 7.5, 10.5}
            assert len(axes.patches) == 2 * 6  # a strip for each block along either axis
            assert axes.get_xlim() == (-0.5, 11.5)
            assert axes.get_ylim() == (11.5, -0.5)  # the first step is on top
        assert set(BLOCK_COLOURS) <= set(text_of(figure))
        assert {"step that reads", "step drawn on"} <= set(text_of(figure))


def test_names_of_blocks_keep_clear_of_one_another() -> None:
    figure = random_saliency(simple_trace(298, 1, tokens=1), layers=1).plot(0)
    figure.canvas.draw()
    boxes = [
        text.get_window_extent() for text in panels(figure)[0].texts if text.get_rotation() == 0 and text.get_text()
    ]
    assert len(boxes) == 3
    boxes.sort(key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_files_are_written(tmp_path: Path, suffix: str) -> None:
    saliency = random_saliency(simple_trace(3, 1), layers=3)
    maps, profile = tmp_path / f"maps.{suffix}", tmp_path / f"profile.{suffix}"
    saliency.plot(path=maps)
    saliency.plot_profile(path=str(profile), indices=["lock_in", "decay_slope"])
    assert min(path.stat().st_size for path in (maps, profile)) > 2000


def test_large_and_small_traces_are_drawn(tmp_path: Path) -> None:
    large = random_saliency(simple_trace(290, 9, tokens=1), layers=12, zero_beyond=60)
    large.plot("grid", path=tmp_path / "large.png")
    small = random_saliency(trace_of([(QUESTION, 1), (THINKING, 1)]), layers=1)
    small.plot(path=tmp_path / "small.png")
    random_saliency(trace_of([(QUESTION, 1)]), layers=1).plot("grid", path=tmp_path / "one.png")


def test_titles() -> None:
    saliency = random_saliency(simple_trace(2, 1), about={"model": "made/up", "loss": [5, 9]})
    assert "made/up, logit of token 9 at 5" in text_of(saliency.plot())
    assert "loss on the summary" in text_of(random_saliency(simple_trace(2, 1), about={"loss": "summary"}).plot())
    figure = saliency.plot_profile(title="Fig. 1")
    assert "Fig. 1" in text_of(figure)
    assert not any("made/up" in text for text in text_of(figure))
    random_saliency(simple_trace(2, 1), about={"other": 1}).plot()


def line(axes, place: int) -> np.ndarray:
    """The values of one group's mean, over depth."""
    return np.asarray([one for one in axes.lines if one.get_marker() == "os"[place]][-1].get_ydata(), float)


def test_profile_of_one_trace() -> None:
    saliency = random_saliency(simple_trace(4, 2), layers=8)
    figure = saliency.plot_profile()
    assert len(figure.axes) == len(INDICES)
    for axes, name in zip(figure.axes, NAMES, strict=True):
        assert line(axes, 0) == pytest.approx(saliency.indices[name].numpy())
        assert not figure.legends
    chosen = saliency.plot_profile(indices=["question", "lock_in"])
    assert [axes.get_title(loc="left") for axes in chosen.axes] == [
        "Thinking on question",
        "Lock-in (current + previous)",
    ]


@pytest.mark.parametrize("layers", [1, 4, 40])
def test_profile_of_groups(layers: int, tmp_path: Path) -> None:
    from scipy import stats

    generator = np.random.default_rng(0)
    x = generator.normal(1, 0.1, (9, len(NAMES), layers))
    y = generator.normal(1, 0.1, (7, len(NAMES), layers))
    y[:, 0, : (layers + 1) // 2] += 1
    x[2, 0, 0] = np.nan
    x[:, 7] = y[:, 7] = np.nan
    correct, wrong = ([with_indices(one) for one in values] for values in (x, y))
    comparison = compare(correct, wrong, resamples=299)
    figure = plot_profile(correct, wrong, comparison=comparison, path=tmp_path / "one.png")
    first, last = figure.axes[0], figure.axes[-1]
    assert line(first, 0) == pytest.approx(np.nanmean(x[:, 0], 0))
    assert line(first, 1) == pytest.approx(np.nanmean(y[:, 0], 0))
    spans = sorted(patch.get_x() + 0.5 for patch in first.patches)
    assert spans == pytest.approx(comparison.separating("lock_in"))
    assert set(range((layers + 1) // 2)) <= set(spans)
    assert "no trace has it" in [text.get_text() for text in last.texts]
    assert {"correct (n = 9)", "wrong (n = 7)", "95 % interval of the mean"} <= set(text_of(figure))
    interval = stats.t.interval(0.95, 6, y[:, 0, 0].mean(), stats.sem(y[:, 0, 0]))
    if layers > 6:
        band = next(one for one in first.collections[1:] if isinstance(one, PolyCollection))
        low, high = (pick(band.get_paths()[0].vertices[:, 1]) for pick in (np.min, np.max))
        assert low <= interval[1]
        assert high >= interval[0]
    else:
        bars = first.collections[-1].get_segments()
        assert bars[0][:, 1] == pytest.approx(interval)


def test_profile_of_groups_of_one_and_of_one_group(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = (random_saliency(simple_trace(3, 1), 3, seed) for seed in (0, 1))
        pair = plot_profile(one, other, path=tmp_path / "pair.png")
        assert "95 % interval of the mean" not in text_of(pair)
        assert "wrong (n = 1)" in text_of(pair)
        assert "mean (n = 2)" in text_of(plot_profile([one, other]))


def test_nothing_is_left_behind() -> None:
    random_saliency(simple_trace(2, 1)).plot()
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot_module, "find_spec", lambda name: None if name == "matplotlib" else object())
    saliency = random_saliency(simple_trace(2, 1))
    for draw in (saliency.plot, saliency.plot_profile):
        with pytest.raises(StepFlowInputError, match="needs matplotlib, which is not installed") as caught:
            draw()
        assert caught.value.hint == 'pip install "hf-stepflow[saliency]"'


def test_bad_input(tmp_path: Path) -> None:
    saliency = random_saliency(simple_trace(2, 1), layers=2)
    for layer in (2, -1, "deep", True, 0.5):
        with pytest.raises(StepFlowInputError, match=r"layer must be .* \(0, 1\), got"):
            saliency.plot(layer)
    with pytest.raises(StepFlowInputError, match='scale must be "log" or "linear"'):
        saliency.plot(scale="cubic")
    for path in (tmp_path / "missing" / "one.png", tmp_path / "one.doc"):
        with pytest.raises(StepFlowFileError, match="cannot be written"):
            saliency.plot(path=path)
    with pytest.raises(StepFlowInputError, match="got 'heat'"):
        saliency.plot_profile(indices=["heat"])
    with pytest.raises(StepFlowInputError, match="one index or more"):
        saliency.plot_profile(indices=[])
    with pytest.raises(StepFlowInputError, match="one trace or more"):
        plot_profile([], [saliency])
    with pytest.raises(StepFlowInputError, match="same model"):
        plot_profile([saliency], [random_saliency(simple_trace(2, 1), 2, about={**ABOUT, "model": "another"})])
    groups = [random_saliency(simple_trace(2, 1), 3, seed) for seed in range(4)]
    with pytest.raises(StepFlowInputError, match="the comparison must be of the traces' layers"):
        plot_profile([saliency], comparison=compare(groups[:2], groups[2:], resamples=9))
    empty = StepSaliency(torch.ones(0, 1, 1), [], trace_of([(QUESTION, 1)]))
    with pytest.raises(StepFlowInputError, match="a layer and a step to draw"):
        plot_maps(empty)
