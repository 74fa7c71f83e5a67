"""The wheel holds every file of the package and every preset, and works without the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from hf_stepflow import list_presets
from hf_stepflow.cli import SUBCOMMANDS
from tests.support.hub_models import bare_environment

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


# A short command of every verb, the extra that it needs, and its status where that extra is there; None: not run then.
QUESTION = "Ben has 4 points. How many points does Ben have?"
COMMANDS = {
    "app": (["reasoner"], "app", None),
    "calibrate": (["MODEL", "--problems", "reasoner:chains-2"], "calibrate", None),
    "demo": (["--difficulty", "chains-2", "--problems", "2"], "demo", 0),
    "diagnose": (["--model", "reasoner", "--trace", "TRACE"], None, 0),
    "doctor": (["reasoner"], None, 0),
    "eval": (
        ["--model", "reasoner", "--problems", "reasoner:chains-2", "--limit", "2", "--max-new-tokens", "60"],
        "eval",
        0,
    ),
    "export": (["qwen3-8b", "OUT"], None, 0),
    "generate": (["--model", "reasoner", "--prompt", QUESTION, "--max-new-tokens", "3"], None, 0),
    "presets": (["show", "qwen3-8b"], None, 0),
    "push": (["qwen3-8b", "your-name/preset", "--dry-run"], None, 0),
    "serve": (["reasoner"], "serve", None),
    "verify": (["reasoner"], None, 0),
    "view": (["RESULTS"], None, 2),  # there is no such file
}
EVERY_COMMAND = """
import contextlib, io, json, sys
from hf_stepflow.cli import main
told = {}
for verb, words in json.loads(sys.argv[1]).items():
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        status = main([verb, *words])
    told[verb] = status, error.getvalue()
print("RESULT" + json.dumps(told))
"""


def test_every_verb_has_a_command_here():
    assert list(COMMANDS) == list(SUBCOMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [None, "saliency", "eval", "calibrate", "hub", "demo", "serve", "app"])
def test_each_extra_alone(wheel, extra, tmp_path):
    site = tmp_path / "site"
    wheel.extractall(site)
    (file,) = site.glob("*.dist-info/METADATA")
    stated = Metadata.from_email(file.read_bytes()).requires_dist or []
    added = [one.name for one in stated if one.marker and extra and one.marker.evaluate({"extra": extra})]
    python = bare_environment(tmp_path / "environment", *added)
    (tmp_path / "trace.txt").write_text(f"<|user|> {QUESTION}<|end|><|assistant|><think> Ben has 4 points. Ben has 4.")
    places = {"MODEL": "reasoner", "OUT": str(tmp_path / "out"), "TRACE": str(tmp_path / "trace.txt")}
    places["RESULTS"] = str(tmp_path / "results.jsonl")
    asked = {
        verb: [places.get(word, word) for word in words]
        for verb, (words, needed, status) in COMMANDS.items()
        if needed not in (None, extra) or status is not None
    }
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(site), "HF_HOME": str(tmp_path / "cache")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(python), "-c", EVERY_COMMAND, json.dumps(asked)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb, (status, error) in json.loads(done.stdout.rsplit("RESULT", 1)[1]).items():
        needed = COMMANDS[verb][1]
        if needed in (None, extra):
            assert status == COMMANDS[verb][2], (verb, error)
        elif status:
            assert f"pip install 'hf-stepflow[{needed}]'" in error, (verb, error)
