"""The wheel holds every file of the package and every preset, and works without the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hf_stepflow import list_presets

ROOT = Path(__file__).resolve().parents[2]
# Uses everything that reads files beside its code: presets, a schema, the text of cards, pages of reports, weights.
SCRIPT = """
import json, sys
import hf_stepflow
from hf_stepflow import list_presets, load_preset
from hf_stepflow.cli import main
from hf_stepflow.hub.cards import custom_generate_card, preset_card
from hf_stepflow.reasoner import load_reasoner
names = [preset.name for preset in list_presets()]
status = main(["presets", "validate", sys.argv[1]])
card = str(preset_card(load_preset(names[0]))) + str(custom_generate_card())
model, tokenizer = load_reasoner()
parameters = sum(parameter.numel() for parameter in model.parameters())
result = {"file": hf_stepflow.__file__, "names": names, "status": status, "card": len(card), "parameters": parameters}
print("RESULT" + json.dumps(result))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as opened:
        yield opened


def files_of(folder: str) -> set[str]:
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_it_is_complete(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files_of("hf_stepflow") | {f"hf_stepflow/{name}" for name in files_of("calibrations")}
    assert {Path(name).suffix for name in names} >= {".css", ".html", ".js", ".json", ".md", ".py", ".safetensors"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_it_works_without_the_checkout(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    preset = ROOT / "calibrations" / "qwen3-8b.json"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(preset)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.rsplit("RESULT", 1)[1])
    assert Path(result["file"]).is_relative_to(tmp_path)
    assert result["names"] == [preset.name for preset in list_presets()]
    assert result["status"] == 0
    assert result["card"] > 8000
    assert result["parameters"] > 1_000_000
