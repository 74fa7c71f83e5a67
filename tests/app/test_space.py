"""The app as a Space: its files, and that they start where nothing else is."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from hf_stepflow.app.space import GRADIO, export_space
from hf_stepflow.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_its_files(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "space"
    assert main(["export", "--space", str(folder)]) == 0
    assert "app.py, requirements.txt, README.md" in capsys.readouterr().out
    assert {one.name for one in folder.iterdir()} == {"app.py", "requirements.txt", "README.md"}
    assert (folder / "requirements.txt").read_text() == f"hf-stepflow[app]=={metadata.version('hf-stepflow')}\n"
    compile((folder / "app.py").read_text(), "app.py", "exec")
    assert 'make_app("reasoner", may_load=False)' in (folder / "app.py").read_text()
    _, front, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    assert (card["sdk"], card["app_file"], card["license"]) == ("gradio", "app.py", "apache-2.0")
    assert card["sdk_version"] == GRADIO
    assert len(card["short_description"]) <= 60  # the Hub's bound
    assert "models" not in card
    assert "# StepFlow" in body
    # An earlier Space is written again, for another model.
    assert main(["export", "--space", str(folder), "--model", 'org/"Model', "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "space"
    assert yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])["models"] == [
        'org/"Model'
    ]
    compile((folder / "app.py").read_text(), "app.py", "exec")


def test_its_gradio_is_the_one_that_is_tested() -> None:
    assert f"gradio=={GRADIO}\n" in (ROOT / "constraints.txt").read_text()
    assert re.search(rf'"gradio>={re.escape(GRADIO.rpartition(".")[0])},<7"', (ROOT / "pyproject.toml").read_text())


def test_bad_input(tmp_path: Path, capsys) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["export", "--space", str(tmp_path)]) == 2
    assert "holds notes.txt" in capsys.readouterr().err
    assert main(["export", "--space", str(tmp_path / "notes.txt")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["export", "--space", str(tmp_path / "new"), "--model", str(tmp_path)]) == 2
    assert "is a folder of this machine" in capsys.readouterr().err
    for words in (["qwen3-8b", "--space", "new"], ["--model", "a/b"], ["--space", "new", "--merge-weights"]):
        assert main(["export", *words]) == 2
        assert "--space DIR stands for itself" in capsys.readouterr().err


@pytest.mark.slow
def test_it_starts_in_a_fresh_environment(tmp_path: Path) -> None:
    """From its folder alone, with the wheel of this tree in place of the released one; pip fetches the rest."""
    export_space(tmp_path / "written")
    shutil.copytree(tmp_path / "written", tmp_path / "space")
    shutil.rmtree(tmp_path / "written")
    wheels = tmp_path / "wheels"
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(wheels)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    install = [python, "-m", "pip", "install", "-qq", "--no-compile", "--disable-pip-version-check"]
    install += [
        "--find-links",
        wheels,
        "-c",
        ROOT / "constraints.txt",
        f"gradio=={GRADIO}",
        "-r",
        "requirements.txt",
    ]  # as a Space does
    subprocess.run(install, cwd=tmp_path / "space", env=environment, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([python, "app.py"], cwd=tmp_path / "space", env=environment) as server:
        try:
            config = _read(f"http://127.0.0.1:{port}/config", server)
        finally:
            server.terminate()
    assert config["title"] == "StepFlow"
    assert "Draw a problem" in json.dumps(config)


def _read(url: str, server: subprocess.Popen) -> dict:
    """What a server answers, once it does."""
    for _ in range(90):
        assert server.poll() is None
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)
        except OSError:
            time.sleep(2)
    raise TimeoutError(url)
