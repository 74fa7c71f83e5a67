"""The scripts of examples/ run, and print what they promise."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A line that each prints.
LINES = {
    "attach_and_generate": r"the base model: True",
    "batched_pipeline": r"right:  70, given: 70\. +thinking: Zoe has 3 more than Hal\..*",
    "evaluate_paired": r"stepflow: [+-]\d.* points, n = 40, .*",
    "preset_repository": r"the same model: True",
    "step_budget": r"ended summary 4: tokens \d+-\d+",
    "step_saliency_map": r"open file://.*/step_saliency\.html",
}


def test_each_is_short_and_listed_here() -> None:
    scripts = sorted((ROOT / "examples").iterdir())
    assert [script.stem for script in scripts if script.suffix == ".py"] == sorted(LINES)
    for script in scripts:
        if script.suffix == ".py":
            source = script.read_text(encoding="utf-8")
            assert len(source.splitlines()) < 60
            assert ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize("name", LINES)
def test_it_runs(name: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "temporary"),
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any(re.fullmatch(LINES[name], line) for line in done.stdout.splitlines()), done.stdout
    assert not list((tmp_path / "here").iterdir())  # it leaves nothing behind
