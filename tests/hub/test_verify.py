"""`hf-stepflow presets verify-code`: code of a release is recognised, anything else is named, and nothing is run."""

import json
import shutil
from pathlib import Path

import pytest

import hf_stepflow
from hf_stepflow.cli import main
from hf_stepflow.hub import verify
from hf_stepflow.hub.export import export_custom_generate, export_preset
from hf_stepflow.hub.verify import RELEASES, code_hashes, record_release, verify_code
from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError
from hf_stepflow.runtime.repository import PRESET_CODE, code_files
from tests.support.hub_models import save_base, strong_preset

VERSION = hf_stepflow.__version__
RUN = "raise SystemExit('this file was run')\n"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    export_preset(strong_preset(home), home / "preset", base=save_base(home / "base"))
    return home / "preset"


@pytest.fixture
def preset(export, tmp_path):
    return Path(shutil.copytree(export, tmp_path / "preset"))


@pytest.fixture
def releases(tmp_path, monkeypatch):
    """A record of releases of the test's own."""
    file = tmp_path / "code_hashes.json"
    file.write_text("{}")
    monkeypatch.setattr(verify, "RELEASES", file)
    return file


def problems(found) -> set[str]:
    return {file.path for file in found.files if not file.versions}


def test_a_release_holds_the_files_that_were_recorded_for_it():
    """After a release, other code needs another version: raise it in pyproject.toml."""
    recorded = json.loads(RELEASES.read_text())
    assert recorded.get(VERSION) in (None, verify._own_hashes())
    assert ("not released" in list(code_hashes())[-1]) is (VERSION not in recorded)
    assert all(len(digest) == 64 for files in recorded.values() for digest in files.values())


def test_what_is_exported_is_the_release(preset, tmp_path, capsys):
    export_custom_generate(tmp_path / "generate")
    for folder, entries in ((preset, PRESET_CODE), (tmp_path / "generate", ("generate",))):
        found = verify_code(folder)
        assert found.is_released
        assert [version.split()[0] for version in found.versions] == [VERSION]
        assert {Path(file.path).name for file in found.files} == {file.name for file in code_files(*entries)}
        assert main(["presets", "verify-code", str(folder)]) == 0
        assert f"hf-stepflow {VERSION}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bridge.py", "extra.py", "sub/bridge.py", "EXTRA.PY", ".hidden.py"])
def test_any_other_code_is_named(preset, name, capsys):
    (preset / name).parent.mkdir(exist_ok=True)
    (preset / name).write_text(RUN)
    found = verify_code(preset)
    assert not found.is_released
    assert problems(found) == {name}
    assert main(["presets", "verify-code", str(preset)]) == 2
    line = next(line for line in capsys.readouterr().out.splitlines() if "NOT" in line)
    assert line.split() == [name, *"NOT a file of any release".split()]
    assert main(["presets", "verify-code", str(preset), "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert not told["released"]
    assert told["files"][name]["versions"] == []


def test_one_byte_and_another_name_count(preset):
    code = (preset / "bridge.py").read_bytes()
    (preset / "bridge.py").write_bytes(code + b"\n")
    assert problems(verify_code(preset)) == {"bridge.py"}
    (preset / "bridge.py").unlink()
    (preset / "momentum.py").write_bytes(code)
    assert problems(verify_code(preset)) == {"momentum.py"}


def test_files_of_two_releases_are_no_release(preset, releases, capsys):
    (preset / "bridge.py").write_text("# an earlier bridge\n")
    earlier = verify._own_hashes() | {"bridge.py": verify._sha256(preset / "bridge.py"), "errors.py": "0" * 64}
    releases.write_text(json.dumps({"0.0.9": earlier}))
    found = verify_code(preset)
    assert problems(found) == set()
    assert found.versions == ()
    assert not found.is_released
    assert main(["presets", "verify-code", str(preset)]) == 2
    assert "no version holds all of them" in capsys.readouterr().out
    (preset / "errors.py").unlink()
    assert verify_code(preset).versions == ("0.0.9",)


def test_recording_a_release(preset, releases):
    assert record_release() == VERSION
    assert record_release() == VERSION
    assert json.loads(releases.read_text()) == {VERSION: verify._own_hashes()} == code_hashes()
    releases.write_text(json.dumps({VERSION: {"bridge.py": "0" * 64}}))
    assert not verify_code(preset).is_released
    with pytest.raises(StepFlowInputError, match="released, with other files"):
        record_release()


def test_code_in_other_repositories_is_followed(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, reference in (("a", "b--modeling_stepflow.X"), ("b", "a--modeling_stepflow.X")):
        (tmp_path / name).mkdir()
        data = {"auto_map": {"AutoTokenizer": [reference, None]}, "model_type": "llama"}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(data))
    shutil.copy(preset / "bridge.py", tmp_path / "b")
    found = verify_code("a")
    assert [each.source for each in found.named] == ["b"]
    assert found.is_released
    (tmp_path / "b" / "evil.py").write_text(RUN)
    assert not verify_code("a").is_released
    assert "evil.py    NOT a file" in str(verify_code("a"))


def test_what_cannot_be_read_is_refused(preset, tmp_path, capsys):
    (preset / "tokenizer_config.json").write_text("[")
    with pytest.raises(StepFlowFileError, match=r"tokenizer_config\.json of .* is not JSON"):
        verify_code(preset)
    with pytest.raises(StepFlowFileError, match="cannot be fetched"):
        verify_code(str(tmp_path / "missing"))
    assert main(["presets", "verify-code", "no/such"]) == 2
    assert "hint:" in capsys.readouterr().err


def test_a_repository_on_the_hub(hub, preset, tmp_path):
    api = hub.api()
    api.create_repo("org/preset")
    first = api.upload_folder(repo_id="org/preset", folder_path=preset).oid
    (tmp_path / "evil.py").write_text(RUN)
    api.upload_file(repo_id="org/preset", path_or_fileobj=tmp_path / "evil.py", path_in_repo="evil.py")
    found = verify_code("org/preset", revision=first, token=hub.token)
    assert found.is_released
    assert found.revision == first
    assert problems(verify_code("org/preset", token=hub.token)) == {"evil.py"}
