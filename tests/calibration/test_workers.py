"""A calibration shared by two processes: the same result as one finds, and a worker that is killed loses a batch."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_stepflow.calibration.result import NOTHING_FOUND

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def command(folder: Path) -> list[str]:
    return [
        "-m", "hf_stepflow.cli", "calibrate", "reasoner", "--problems", "reasoner:chains-2", "--limit", "32",
        "--max-new-tokens", "44", "--batch-size", "4", "--scored", "2", "--budget", "2", "--force", "--json",
        "--work", str(folder / "work"), "--out", str(folder / "mine.json"),
    ]  # fmt: skip


def start(folder: Path, processes: int) -> list[subprocess.Popen]:
    """The processes as a launcher starts them."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {
            **os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1",
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
        started.append(
            subprocess.Popen(
                [sys.executable, *command(folder)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def result_of(processes: list[subprocess.Popen]) -> dict:
    """What the first process prints, without what depends on the clock and on where it ran."""
    printed = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [NOTHING_FOUND, 0][: len(processes)], printed
    assert all(not out for out, _ in printed[1:])
    data = json.loads(printed[0][0])
    for name in ("seconds", "about", "preset"):
        del data[name]
    return json.loads(re.sub(r'"seconds_ratio": (\{[^{}]*\}|null)', '"seconds_ratio": 0', json.dumps(data)))


def done(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "work").glob("*/*.json")}


def test_two_processes_one_of_them_killed(tmp_path: Path) -> None:
    alone = result_of(start(tmp_path / "one", 1))
    two = tmp_path / "two"
    first = start(two, 2)
    while len(done(two)) < 25 and all(process.poll() is None for process in first):
        time.sleep(0.02)
    first[1].send_signal(signal.SIGKILL)
    _, told = first[0].communicate(timeout=300)  # it finds nobody to wait for
    assert first[0].returncode == 2, told
    assert "another process of this calibration is gone" in told
    first[1].communicate()
    kept = done(two)
    assert len(kept) >= 25
    assert result_of(start(two, 2)) == alone
    assert {path: stamp for path, stamp in done(two).items() if path in kept} == kept


def test_accelerate_launches_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ]  # fmt: skip
    words = [word for word in command(tmp_path) if word != "--force"]
    made = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True, check=False)
    preset = json.loads((tmp_path / "mine.json").read_text())
    assert preset["provenance"]["verdict"] == "no measurable gain", made.stderr
    assert len(list((tmp_path / "work" / "answers").iterdir())) >= 4
