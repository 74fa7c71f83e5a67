"""The kit of the pages: what is text is escaped, what is drawn is where its value belongs, and nothing is loaded."""

import doctest
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hf_stepflow.report
from hf_stepflow.evaluation.statistics import Estimate
from hf_stepflow.report import PLOT_X, Axis, element, forest, frame, page, svg, table, write_page
from hf_stepflow.runtime.errors import StepFlowFileError

EVIL = "<b>&\"'"


def test_the_example_runs() -> None:
    assert doctest.testmod(hf_stepflow.report) == (0, 5)


def test_texts_are_escaped(tmp_path: Path) -> None:
    body = table([EVIL], [[EVIL]], below=["<i>below</i>"]) + svg(EVIL, element("text", x=1.25, text=EVIL, title=EVIL))
    text = page(EVIL, [EVIL], [(EVIL, body)])
    assert "<b>" not in text
    assert "<i>below</i>" in text
    assert "default-src 'none'" in text
    (root,) = ET.fromstring(f"<div>{body}</div>").iter("svg")
    assert root.get("aria-label") == EVIL
    assert ET.tostring(root[0], encoding="unicode", method="text") == EVIL + EVIL
    assert root[0].get("x") == "1.2"
    write_page(tmp_path / "page.html", text)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text
    with pytest.raises(StepFlowFileError, match="cannot be written"):
        write_page(tmp_path / "none" / "page.html", text)


@given(st.floats(1e-3, 1e6), st.floats(1.01, 1e4), st.booleans())
def test_ticks_are_few_and_on_the_axis(low: float, factor: float, is_log: bool) -> None:
    axis = Axis(low, low * factor, *PLOT_X, is_log=is_log)
    assert axis(axis.low) == PLOT_X[0]
    assert axis(axis.high) == pytest.approx(PLOT_X[1])
    ticks = axis.ticks()
    assert ticks == sorted(ticks)
    assert all(PLOT_X[0] - 1e-6 <= axis(tick) <= PLOT_X[1] + 1e-6 for tick in ticks)
    if not is_log:
        assert 2 <= len(ticks) <= 7


def test_an_axis_over_equal_values_has_a_length() -> None:
    axis = Axis.over([0.0, 0.0], 0.0, 10.0)
    assert axis(0.0) == 5.0
    assert not math.isnan(axis(3.0))


def test_the_forest() -> None:
    rows = [("a & b", Estimate(0.1, -0.2, 0.3), "+10.0"), ("c" * 40, Estimate(-0.4, None, None), "-40.0")]
    picture = ET.fromstring(forest(rows))
    zero, (up, down) = next(picture.iter("line")), list(picture.iter("circle"))
    assert float(down.get("cx")) < float(zero.get("x1")) < float(up.get("cx"))
    assert len([line for line in picture.iter("line") if line.get("class") == "bar"]) == 1
    texts = [text.text for text in picture.iter("text")]
    assert texts[:4] == ["a & b", "+10.0", "c" * 35 + "…", "-40.0"]


def test_a_frame_with_named_ticks() -> None:
    x, y = Axis(0.0, 2.0, *PLOT_X), Axis.over([1.0], 260.0, 32.0)
    picture = ET.fromstring(f"<g>{frame(x, y, 'layer', 'effect', x_ticks=[(1.0, 'second')])}</g>")
    texts = {text.text: text for text in picture.iter("text")}
    assert float(texts["second"].get("x")) == 350.0
    assert {"layer", "effect", "0", "1"} <= set(texts)
