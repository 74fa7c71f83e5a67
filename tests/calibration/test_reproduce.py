"""reproduce.json: what it holds, what a replay compares, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from hf_stepflow.calibration import calibrate
from hf_stepflow.calibration.reproduce import (
    FORMAT,
    code_digest,
    differences,
    read_record,
    record_of,
    reproduce,
    weights_digest,
)
from hf_stepflow.cli import main
from hf_stepflow.hub.export import export_preset
from hf_stepflow.reasoner import FOLDER
from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError
from tests.support.scripted import PLAIN_CHAT, scripted_model

PROBLEMS = [
    {"id": at, "question": f"How many are {at}?", "answer": "B", "choices": ["one", "two"]} for at in range(40)
]
OPTIONS = {"budget": 1, "max_new_tokens": 100, "batch_size": 8, "progress": False}


@pytest.fixture(scope="module")
def model():
    return scripted_model(lambda _: "There is one. So it is \\boxed{B}", PLAIN_CHAT)


@pytest.fixture(scope="module")
def record(model):
    result = calibrate(*model, PROBLEMS, stepflow={"implicit_thinking": True}, **OPTIONS)
    return json.loads(json.dumps(record_of(result, model[0], PROBLEMS, {"model": "org/scripted"})))


def test_a_replay_finds_the_same(model, record, tmp_path: Path) -> None:
    (tmp_path / "reproduce.json").write_text(json.dumps(record))
    read = read_record(tmp_path / "reproduce.json")
    assert read == record
    found = reproduce(read, *model, PROBLEMS, work=tmp_path / "work", progress=False)
    assert found.is_same
    assert found.circumstances == []
    assert str(found) == "Reproduced: gate, settings, answers and verdict are the same."
    assert record_of(found.result, model[0], PROBLEMS, record["origin"]) == record


def test_a_replay_says_what_differs(model, record) -> None:
    changed = json.loads(json.dumps(record))
    changed["found"]["verdict"] = "gain"
    changed["hashes"]["code"] = "0" * 16
    changed["versions"]["torch"] = "1.0"
    changed["machine"]["threads"] = 99
    found = reproduce(changed, *model, PROBLEMS, progress=False)
    assert not found.is_same
    assert found.findings == ['verdict is "gain" in the record, "no measurable gain" here']
    assert [one.split(":")[0] for one in found.circumstances] == ["code", "torch", "threads"]


def test_another_model_or_other_problems_are_refused(model, record) -> None:
    with pytest.raises(StepFlowInputError, match=r"another calibration: problems [0-9a-f]{16} there"):
        reproduce(record, *model, PROBLEMS[:-1], progress=False)
    parameter = next(model[0].parameters())
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.flatten()[-1] += 1  # one weight, far from the first
    try:
        with pytest.raises(StepFlowInputError, match="another calibration: model"):
            reproduce(record, *model, PROBLEMS, progress=False)
    finally:
        with torch.no_grad():
            parameter.copy_(kept)
    assert weights_digest(model[0]) == record["hashes"]["model"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has the format None"),
        ("{", "cannot be read"),
        (json.dumps({"format": "hf-stepflow-reproduce/9"}), "expected 'hf-stepflow-reproduce/1'"),
        (json.dumps({"format": FORMAT, "origin": {}}), "no object 'arguments'"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "reproduce.json").write_text(text)
    with pytest.raises(StepFlowFileError, match=message):
        read_record(tmp_path / "reproduce.json")


def test_arguments_of_another_type_are_refused(record, tmp_path: Path) -> None:
    for name, value in (("seed", "0"), ("force", 1), ("batch_size", True), ("bound", None)):
        changed = {**record, "arguments": {**record["arguments"], name: value}}
        (tmp_path / "reproduce.json").write_text(json.dumps(changed))
        with pytest.raises(StepFlowFileError, match=f"arguments.{name} is"):
            read_record(tmp_path / "reproduce.json")


def test_differences_are_sentences() -> None:
    there = {"gate": "shut", "settings": {"tau_max": 0.1}, "lost": None}
    assert differences(there, there) == []
    assert differences(there, {**there, "lost": 3}) == ["lost is null in the record, 3 here"]


def test_the_code_is_hashed_once_and_for_all() -> None:
    assert code_digest() == code_digest()


def test_the_command_replays(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["calibrate", "reasoner", "--problems", "reasoner:chains-2", "--limit", "24", "--batch-size", "8"]
    assert main([*words, "--out", "mine.json"]) == 3
    assert "calibrate --reproduce mine-calibration/reproduce.json" in capsys.readouterr().out
    assert main(["calibrate", "--reproduce", "mine-calibration/reproduce.json"]) == 0
    assert "Reproduced:" in capsys.readouterr().out
    assert json.loads(Path("mine.reproduce.json").read_text())["origin"]["model"] == "reasoner"
    assert main(["presets", "replay", "mine.json", "--limit", "4"]) == 0
    assert "too few to confirm the verdict" in capsys.readouterr().out
    export_preset("mine.json", "export", base=str(FOLDER))
    assert main(["presets", "replay", "export", "--limit", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["n"], told["same_code"], told["verdict"]) == (4, True, "no measurable gain")
    assert main(["presets", "replay", "qwen3-8b"]) == 2
    assert "reproduce.json" in capsys.readouterr().err
    changed = json.loads(Path("mine-calibration/reproduce.json").read_text())
    changed["found"]["gate"] = "another"
    Path("changed.json").write_text(json.dumps(changed))
    assert main(["calibrate", "--reproduce", "changed.json"]) == 1
    assert 'Differs: gate is "another" in the record' in capsys.readouterr().out
    assert main(["calibrate"]) == 2
    assert "needs a model" in capsys.readouterr().err
