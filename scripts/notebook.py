"""Runs examples/stepflow.ipynb and writes its outputs into it.

Run: python -m scripts.notebook
"""

import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "stepflow.ipynb"
# What differs from run to run or machine to machine, and means nothing.
_BARS = re.compile(r"^.*(Loading weights|it/s\]).*$\n?", re.MULTILINE)


def executed(path: Path = NOTEBOOK) -> Any:
    """Runs all cells but those that install something, in a kernel of this interpreter.

    Args:
        path: The notebook.

    Returns:
        The notebook with its outputs, without progress bars and without marks of time.

    Raises:
        CellExecutionError: A cell raised an error.
    """
    notebook = nbformat.read(path, as_version=4)
    installing = {place: cell for place, cell in enumerate(notebook.cells) if cell.source.startswith("%pip")}
    notebook.cells = [cell for place, cell in enumerate(notebook.cells) if place not in installing]
    NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False).execute()
    for place, cell in installing.items():
        notebook.cells.insert(place, cell)
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [one for one in map(_cleaned, cell.outputs) if one.get("text") != ""]
    return notebook


def _cleaned(output: Any) -> Any:
    if output.output_type == "stream":
        output.text = "" if output.name == "stderr" else _BARS.sub("", output.text)
    return output


if __name__ == "__main__":
    start = time.perf_counter()
    nbformat.write(executed(), NOTEBOOK)
    print(f"{NOTEBOOK.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
