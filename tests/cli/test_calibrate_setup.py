"""What the command finds out by itself, and how it ends when it is interrupted."""

import importlib
import json
from pathlib import Path

import pytest

from hf_stepflow.calibration import stages
from hf_stepflow.calibration.work_folder import SETUP
from hf_stepflow.cli import EXIT_INTERRUPTED, calibration_setup, main
from hf_stepflow.cli.calibration_setup import _families
from hf_stepflow.evaluation.suite import SUITE
from hf_stepflow.problems import load_problems


@pytest.fixture
def quick(tmp_path: Path, monkeypatch):
    """Probes of two problems, of easy levels."""
    monkeypatch.chdir(tmp_path)
    bars = importlib.import_module("huggingface_hub.utils.tqdm")
    monkeypatch.setattr(bars, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(calibration_setup, "PROBED", 2)
    monkeypatch.setattr(calibration_setup, "MOST", 4)
    monkeypatch.setattr(calibration_setup, "_families", lambda model: [["reasoner:chains-2", "reasoner:chains-4"]])
    return ["calibrate", "reasoner", "--limit", "24", "--budget", "1", "--scored", "2"]


def test_nothing_but_the_model_is_needed(quick: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    assert main(quick) == 3
    printed = capsys.readouterr()
    assert "reasoner:chains-4: 2 of 2 solved" in printed.err
    assert "Batch size " in printed.err
    assert "Forecast, if the gate opens: traces 0:" in printed.err
    assert "The base solves " in printed.err
    work = tmp_path / "reasoner-calibration"
    setup, run = (json.loads((work / name).read_text()) for name in (SETUP, "run.json"))
    assert setup["problems"] == ["reasoner:chains-2", "reasoner:chains-4"]
    assert run["run"]["sampling"]["batch_size"] == setup["batch_size"]
    longest = max(len(one.trace.split()) for one in load_problems("reasoner:chains-4", 24, split="calibration"))
    assert longest < run["run"]["sampling"]["max_new_tokens"] < 2 * longest
    monkeypatch.setattr(calibration_setup, "suggest_sources", None)  # neither is looked for again
    monkeypatch.setattr(calibration_setup, "find_batch_size", None)
    assert main(quick) == 3
    assert "Batch size" not in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(quick: list[str], monkeypatch, capsys) -> None:
    words = [*quick, "--problems", "reasoner:chains-2", "--batch-size", "8"]
    monkeypatch.setattr("sys.argv", ["hf-stepflow", *words])
    original = stages.look_for_trend

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "look_for_trend", interrupted)
    assert main(words) == EXIT_INTERRUPTED
    message = capsys.readouterr().err
    assert f"the same command goes on from there:\n  hf-stepflow {' '.join(words)}" in message
    monkeypatch.setattr(stages, "look_for_trend", original)
    assert main(words) == 3


def test_several_processes_look_for_nothing(quick: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(quick) == 2
    assert "pass --problems" in capsys.readouterr().err


def test_other_models_are_probed_on_the_suite() -> None:
    assert _families("org/model")[0] == [f"stepflow-suite:sums@{one}" for one in ("short", "medium", "long")]
    assert len(_families("org/model")) == len(SUITE)
    families = _families("reasoner")
    assert [levels[-1] for levels in families] == ["reasoner:chains-8", "reasoner:errands-180"]
