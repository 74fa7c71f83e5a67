"""The scripts behind the published figures keep the machine of each row, and stop where a part fails."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import (
    decode_launches,
    decode_overhead,
    faithfulness,
    gpu,
    profile_generate,
    reasoner_calibration,
    saliency_scale,
    smollm2_saliency,
)
from benchmarks.measurements import Measurements
from hf_stepflow.runtime import flow_state
from scripts import evidence, performance
from scripts.pages import page_text

ROOT = Path(__file__).parents[2]


def test_rows_keep_the_machine_that_they_were_measured_on(tmp_path: Path, monkeypatch) -> None:
    kept = tmp_path / "scale.json"
    monkeypatch.setattr(saliency_scale, "WAYS", ())
    monkeypatch.setattr(saliency_scale, "model", lambda: None)
    for processor, lengths in (("this one", ["512", "1024"]), ("another", ["1024"])):
        monkeypatch.setattr(saliency_scale, "machine", lambda processor=processor: {"processor": processor})
        monkeypatch.setattr(sys, "argv", ["saliency_scale", "--json", str(kept), "--lengths", *lengths])
        saliency_scale.main()
    rows = json.loads(kept.read_text())["rows"]
    assert {row["tokens"]: row["machine"]["processor"] for row in rows} == {512: "this one", 1024: "another"}


def test_published_rows_name_their_machine() -> None:
    rows = json.loads(Path(saliency_scale.__file__).with_suffix(".json").read_text())["rows"]
    assert all({"processor", "threads", "torch", "transformers"} <= row["machine"].keys() for row in rows)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="contextlib.chdir")
def test_saliency_fails_where_diagnose_does(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(smollm2_saliency, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(smollm2_saliency, "unpacked", lambda folder: folder)  # a model that is not there
    monkeypatch.setattr(sys, "argv", ["smollm2_saliency"])
    with pytest.raises(SystemExit) as ended:
        smollm2_saliency.main()
    assert ended.value.code == 2


def test_p_values_of_the_levels_are_adjusted() -> None:
    row = {"n": 100, "base": [0.5, 0.4, 0.6], "delta": [0.05, 0.01, 0.09], "gained": 6, "lost": 1}
    rows = [{**row, "level": name, "p_value": value} for name, value in (("a", 0.02), ("b", 0.5), ("c", 0.03))]
    lines = reasoner_calibration.difficulties_table(rows).splitlines()[-3:]
    assert [line.strip("| ").rpartition("| ")[2] for line in lines] == ["0.06", "0.5", "0.06"]
    assert lines[0].startswith("| a | 100 | 50.0 | +5.0 [+1.0, +9.0] | 6 | 1 |")


def test_the_page_on_saliency_has_the_measured_tables() -> None:
    found = json.loads((faithfulness.FOLDER / "reasoner.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "saliency.md").read_text(encoding="utf-8")
    for table in faithfulness.table(found).split("\n\n"):
        assert table in page
    right = sum(one["right"] for one in found["traces"])
    assert f"{len(found['traces'])} traces, {right} right and {len(found['traces']) - right} wrong" in page


def test_faithfulness_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(faithfulness, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(faithfulness, "RESPONSES", tmp_path / "build")
    problems = "--problems reasoner:chains-4 --limit 3 --max-new-tokens 120"

    def measured(traces: int, more: str = "") -> list[dict]:
        monkeypatch.setattr(sys, "argv", f"faithfulness run --traces {traces} {problems} {more}".split())
        faithfulness.main()
        return json.loads((tmp_path / "kept" / "reasoner.json").read_text())["traces"]

    first = measured(1)
    assert len(first) == 1
    assert -1 <= first[0]["thinking"]["saliency"][-1] <= 1
    assert "| Step-Saliency |" in capsys.readouterr().out
    assert measured(2)[:1] == first
    with pytest.raises(SystemExit, match="holds another run"):
        measured(2, "--max-new-tokens 121")


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["results"]


@pytest.fixture
def tiny_steps(monkeypatch) -> None:
    """The single steps on a model of four layers."""
    shape = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    monkeypatch.setattr(decode_overhead, "SHAPE", shape)


def overhead(monkeypatch, path: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["decode_overhead", "--json", str(path), *arguments])
    decode_overhead.main()


@pytest.mark.usefixtures("tiny_steps")
def test_decode_overhead_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch) -> None:
    kept = tmp_path / "overhead.json"
    small = ("--tokens", "3", "--calls", "1", "--new-tokens", "4")
    steps = ("--parts", "steps", "--batch", "1", "2", "--context")
    overhead(monkeypatch, kept, *small, *steps, "64", "--dtype", "bfloat16")
    first = rows_of(kept)
    overhead(monkeypatch, kept, *small, *steps, "64", "100000", "--memory", "0.05")
    overhead(monkeypatch, kept, *small, "--parts", "generate", "--dtype", "float32", "--batch", "2")
    rows = rows_of(kept)
    assert rows[:2] == first  # not measured again
    assert [(row["part"], row["dtype"], row["batch"], row.get("context")) for row in rows] == [
        ("steps", "bfloat16", 1, 64),
        ("steps", "bfloat16", 2, 64),
        ("steps", "float32", 1, 64),
        ("steps", "float32", 1, 100000),
        ("steps", "float32", 2, 64),
        ("steps", "float32", 2, 100000),
        ("steps", "bfloat16", 1, 100000),
        ("steps", "bfloat16", 2, 100000),
        ("generate", "float32", 2, None),
    ]
    for row in rows:
        assert ("skipped" in row) == (row.get("context") == 100000)
        if "skipped" not in row:
            assert row["median_ms"].keys() == {"base", "off", "on"}
            assert 0 < row["on_to_base_95"][0] <= row["on_to_base"] <= row["on_to_base_95"][1]
    assert rows[-1]["new_tokens"] == 4


def test_measurements_are_made_again_under_other_conditions(tmp_path: Path) -> None:
    path, name, settings = tmp_path / "rows.json", {"batch": 1}, {"tokens": 3}
    on = {"card": "this one", "stepflow": "1", "driver": "5"}
    Measurements(path, on, ("card", "stepflow")).add(name, settings, {"n": 3})
    assert Measurements(path, on | {"driver": "6"}, ("card", "stepflow")).has(name, settings)
    assert not Measurements(path, on | {"stepflow": "2"}, ("card", "stepflow")).has(name, settings)
    other = Measurements(path, on | {"card": "another"}, ("card", "stepflow"))
    assert not other.has(name, settings)
    other.add(name, settings, {"n": 4})
    other.add({"batch": 2}, settings, {"skipped": "needs more"})
    assert [(row["batch"], row.get("n"), row["measured_on"]["card"]) for row in rows_of(path)] == [
        (1, 4, "another"),
        (2, None, "another"),
    ]
    assert not Measurements(path, on | {"card": "another"}, ("card", "stepflow")).has({"batch": 2}, settings)


def test_gpu_benchmark_in_toy_sizes(tmp_path: Path, monkeypatch, capsys) -> None:
    """Decoding without compilation, Step-Saliency, a shape that does not fit, and one that fails."""
    kept = tmp_path / "gpu.json"
    plan = gpu.quick_plan()
    plan.shapes = {"qwen3-8b": plan.shapes["qwen3-8b"]}
    plan.modes, plan.contexts, plan.memory, plan.rounds = ["eager"], [64, 1 << 20], 1e8, 1
    assert gpu.measure(plan, Measurements(kept, {}, ())) == []
    decode, too_long, saliency = rows_of(kept)
    assert decode["arms"] == ["base", "off", "on"]
    assert decode["n"] == 1
    assert decode["peak_bytes"] == {"base": None, "off": None, "on": None}
    assert "needs" in too_long["skipped"]
    assert saliency["median_ms"].keys() == {"plain", "checkpointed", "saliency"}

    def fail(*arguments: object) -> dict:
        raise ArithmeticError("measured again")

    monkeypatch.setattr(gpu, "decode", fail)
    assert gpu.measure(plan, Measurements(kept, {}, ())) == []  # all is there
    plan.batches = [3]
    assert gpu.measure(plan, Measurements(kept, {}, ())) == ["decode cpu qwen3-8b eager 3 64"]
    assert "measured again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "result",
    [
        {"arms": ["base", "off"]},
        {"arms": ["base", "off", "on"], "median_ms": {"base": 1.0, "off": 0.0, "on": 1.0}},
        {"arms": ["base", "off", "on"], "on_to_base_95": [1.0, float("nan")]},
    ],
)
def test_gpu_benchmark_checks_what_it_measured(result: dict) -> None:
    with pytest.raises(ValueError, match=r"missing|finite"):
        gpu.check("decode", result)


@pytest.mark.slow
def test_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    """The whole script, compiled decode steps included; it writes what it is asked to write and nothing else."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick"]
    root = Path(gpu.__file__).parents[1]
    before = {file.name for file in Path(gpu.__file__).parent.iterdir()}
    subprocess.run([*command, "--json", str(tmp_path / "gpu.json")], cwd=root, check=True)
    assert {file.name for file in Path(gpu.__file__).parent.iterdir()} - before <= {"__pycache__"}
    rows = rows_of(tmp_path / "gpu.json")
    assert [(row["model"], row["part"], row.get("mode")) for row in rows] == [
        (model, part, mode)
        for model in ("qwen2-7b", "qwen3-8b")
        for part, mode in (("decode", "eager"), ("decode", "compiled"), ("saliency", None))
    ]
    for row in rows:
        if row.get("mode") == "compiled":
            assert row["graphs"] == {"base": 1, "off": 1, "on": 1}


@pytest.mark.parametrize(("route", "batch"), [("host", 1), ("host", 8), ("device", 1)])
def test_decode_launches_are_those_of_the_output(route: str, batch: int, monkeypatch) -> None:
    """Counts of the installed torch and transformers; others may start other operations."""
    kept = json.loads((ROOT / "benchmarks" / "decode_launches.json").read_text(encoding="utf-8"))
    if kept["versions"] != decode_launches.versions():
        pytest.skip(f"counted with {kept['versions']}")
    monkeypatch.setenv("HF_STEPFLOW_ROUTE", route)
    monkeypatch.setattr(flow_state, "_KERNELS", {})
    (row,) = (
        row
        for row in kept["results"]
        if (row["route"], row["dtype"], row["batch"], row["first_of_step"]) == (route, "bfloat16", batch, False)
    )
    arms = decode_launches.models(torch.bfloat16)
    with torch.no_grad():
        counted = {arm: decode_launches.count(arms[arm], arm == "off", batch, False) for arm in decode_launches.ARMS}
    assert counted == {arm: row[arm] for arm in decode_launches.ARMS}


def test_the_parts_of_the_added_time_add_up(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "parts.json"
    arguments = ["--batch", "1", "--calls", "1", "--new-tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["profile_generate", "--json", str(path), *arguments])
    before = [owner.__dict__[name] for places in profile_generate.CLOCKED.values() for owner, name in places]
    profile_generate.main()
    assert before == [owner.__dict__[name] for places in profile_generate.CLOCKED.values() for owner, name in places]
    (row,) = rows_of(path)
    assert sum(row["added_us"].values()) == pytest.approx(row["on_us"] - row["base_us"], abs=1)
    assert min(row["added_us"][part] for part in ("labelling", "ranges", "report")) > 0


@pytest.mark.parametrize(
    ("script", "page"),
    [(script, page) for script in (performance, evidence) for page in script.PAGES],
    ids=lambda one: getattr(one, "name", None) or one.__name__,
)
def test_the_figures_are_those_of_the_outputs(script: Any, page: Path) -> None:
    assert page.read_text(encoding="utf-8") == page_text(page, script.PAGES[page])
