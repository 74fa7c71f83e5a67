"""The notebook of examples/ runs, and shows what it promises."""

import json
from pathlib import Path

import pytest

from scripts.notebook import NOTEBOOK, executed


def test_it_is_committed_with_its_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    first, *others = (cell for cell in cells if cell["cell_type"] == "code")
    assert "%pip install" in "".join(first["source"])  # what a hosted notebook needs
    assert all(cell["outputs"] for cell in others)
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_runs() -> None:
    texts = [
        output.get("text", "") or "".join(output.get("data", {}))
        for cell in executed().cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    shown = "\n".join(texts)
    for words in ("Row 0: ", "image/png", "stepflow: ", "p = ", "the same logits: True"):
        assert words in shown
