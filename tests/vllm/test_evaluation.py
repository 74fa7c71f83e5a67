"""`eval` and `calibrate` in vLLM: the same answers and the same verdict as in transformers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.vllm_engine import ENVIRONMENT, ROOT

pytest.importorskip("vllm")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

COMMON = "--model reasoner --max-new-tokens 200 --problems reasoner:chains-4 --batch-size 50"
ARMS = ["--arm", "base", "--arm", "strong=stepflow:tau_max=0.3,alpha=0.3,smi_layers=[5,6,7]", "--arm", "own=stepflow"]
VLLM = ["--engine", "vllm", "--engine-args", "enforce_eager=true,max_model_len=1024"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "hf_stepflow.cli", *words]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=1000
    )


def results(path: Path) -> tuple[dict[str, Any], dict[tuple[str, str], dict[str, Any]]]:
    header, *rows = map(json.loads, path.read_text().splitlines())
    return header, {(row["arm"], row["problem"]): row for row in rows}


def test_answers_and_verdict_are_those_of_transformers(tmp_path: Path) -> None:
    """A hundred problems; the run in vLLM is killed on its way and goes on."""
    words = ["eval", *COMMON.split(), "--limit", "100", *ARMS, "--json"]
    one, other = tmp_path / "transformers.jsonl", tmp_path / "vllm.jsonl"
    plain = run(*words, "--out", str(one))
    assert plain.returncode == 0, plain.stderr[-3000:]

    with (tmp_path / "log").open("w") as log:
        killed = subprocess.Popen(
            command(*words, *VLLM, "--out", str(other)), cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=log, stderr=log
        )
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline and (not other.exists() or other.read_bytes().count(b"\n") < 60):
            assert killed.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    begun = len(results(other)[1])
    assert 50 <= begun < 300
    served = run(*words, *VLLM, "--out", str(other))
    assert served.returncode == 0, served.stderr[-3000:]

    (header, there), (own_header, here) = results(one), results(other)
    assert own_header["run"]["engine"] == "vllm"
    assert own_header["about"]["engine"].startswith("vllm 0.")
    assert "engine" not in header["run"]
    assert there.keys() == here.keys()
    assert {key: row["text"] for key, row in there.items()} == {key: row["text"] for key, row in here.items()}
    kept = ("outcome", "right", "answer", "tokens", "steps")
    assert all(there[key][name] == here[key][name] for key in there for name in kept)
    told = [json.loads(done.stdout[done.stdout.index("{") :])["verdicts"] for done in (plain, served)]
    verdicts = [[line.partition(", time x")[0] for line in lines] for lines in told]
    assert verdicts[0] == verdicts[1]


def test_what_an_engine_cannot_do_is_refused() -> None:
    budget = run("eval", *COMMON.split(), "--limit", "2", *VLLM, "--with", "budget-forcing:min_steps=3")
    assert budget.returncode == 2
    assert "forces a budget of steps" in budget.stderr
    device = run("eval", *COMMON.split(), "--limit", "2", "--engine", "vllm", "--device", "cuda")
    assert "vLLM finds its devices" in device.stderr
    alone = run("eval", *COMMON.split(), "--limit", "2", "--engine-args", "max_model_len=64")
    assert "are for --engine vllm" in alone.stderr


def test_verify_compares_the_engines() -> None:
    done = run("verify", "reasoner", *VLLM, "--stepflow", "tau_max=0.3,alpha=0.3", "--json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["engine"].startswith("vllm 0.")
    assert all(check["passed"] for check in found["checks"])
    assert {check["name"] for check in found["checks"]} > {"vLLM counts what it does", "StepFlow is active in vLLM"}
    assert found["cost"]["ratio"] > 0


def test_calibration_answers_in_vllm(tmp_path: Path) -> None:
    words = (
        "calibrate reasoner --problems reasoner:chains-2 --limit 24 --budget 2 --max-new-tokens 60 --scored 8 --force"
    )
    found = []
    for engine in ([], VLLM):
        folder = tmp_path / f"work{len(engine)}"
        done = run(*words.split(), *engine, "--work", str(folder), "--json")
        assert done.returncode in (0, 3), done.stderr[-3000:]
        found.append(json.loads(done.stdout[done.stdout.index("{") :]))
    assert found[0]["preset"]["settings"] == found[1]["preset"]["settings"]
    assert found[0]["verdict"] == found[1]["verdict"]
