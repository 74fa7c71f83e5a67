"""The work folder, and a calibration shared by two processes: the result of one, whichever of them is killed."""

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
from hf_stepflow.calibration.work_folder import Workers, WorkFolder
from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError


def test_a_folder_keeps_what_was_found(tmp_path: Path) -> None:
    run = {"seed": 0, "sampling": {"samples": 1}}
    folder = WorkFolder(tmp_path / "work", run, {})
    assert folder.get("answers", {"tau_max": 0.1}, "batch") is None
    folder.put("answers", [{"right": True}], {"tau_max": 0.1}, "batch")
    again = WorkFolder(tmp_path / "work", run, {"torch": "another version"})
    assert again.get("answers", {"tau_max": 0.1}, "batch") == [{"right": True}]
    assert again.get("answers", {"tau_max": 0.2}, "batch") is None
    with pytest.raises(StepFlowInputError, match=r"sampling.samples: 1 there, 2 now"):
        WorkFolder(tmp_path / "work", {"seed": 0, "sampling": {"samples": 2}}, {})


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StepFlowFileError, match="other files"):
        WorkFolder(tmp_path, {}, {})
    with pytest.raises(StepFlowFileError, match="cannot be used"):
        WorkFolder(tmp_path / "thesis.tex", {}, {})
    (tmp_path / "run.json").write_text('{"format": "hf-stepflow-calibration/1", "run": {}}')
    with pytest.raises(StepFlowFileError, match="calibration/1', expected 'hf-stepflow-calibration/2'"):
        WorkFolder(tmp_path, {}, {})
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(StepFlowFileError, match="expected an object"):
        WorkFolder(tmp_path, {}, {})


def test_what_a_kill_left_half_written_is_not_read(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "work", {}, {})
    folder.put("answers", [1], "a")
    (file,) = (tmp_path / "work" / "answers").iterdir()
    (file.parent / f".{file.name}.123").write_text('{"seconds": 1, "fou')
    assert WorkFolder(tmp_path / "work", {}, {}).get("answers", "a") == [1]


def test_time_is_counted_over_all_runs(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "work", {}, {}, processes=2)
    folder.put("answers", [1], "a")
    (file,) = (tmp_path / "work" / "answers").iterdir()
    file.write_text(json.dumps({"seconds": 100.0, "found": [1]}))
    assert 100 <= WorkFolder(tmp_path / "work", {}, {}).spent() < 101


def test_a_process_alone_does_all() -> None:
    workers = Workers.join()
    assert list(workers.share([1, 2, 3])) == [1, 2, 3]
    assert workers.is_first
    workers.wait()
    shared = [Workers(rank, 3).share(range(10)) for rank in range(3)]
    assert sorted(item for part in shared for item in part) == list(range(10))


# Several processes


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
    for name in ("seconds", "about", "preset", "timing"):
        del data[name]
    return json.loads(re.sub(r'"seconds_ratio": (\{[^{}]*\}|null)', '"seconds_ratio": 0', json.dumps(data)))


def done(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "work").glob("*/*.json")}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_one_of_them_killed(tmp_path: Path) -> None:
    alone = result_of(start(tmp_path / "one", 1))
    two = tmp_path / "two"
    first = start(two, 2)
    while len(done(two)) < 25 and all(process.poll() is None for process in first):
        time.sleep(0.02)
    first[1].send_signal(signal.SIGKILL)
    _, error = first[0].communicate(timeout=300)  # it finds nobody to wait for
    assert first[0].returncode == 2, error
    assert "another process of this calibration is gone" in error
    first[1].communicate()
    kept = done(two)
    assert len(kept) >= 25
    assert result_of(start(two, 2)) == alone
    assert {path: stamp for path, stamp in done(two).items() if path in kept} == kept


@pytest.mark.slow
@pytest.mark.timeout(1200)
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
