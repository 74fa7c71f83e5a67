"""Presets are found by the metadata of their cards, and lock files pin a preset, its code and its base model."""

import json

import pytest
import torch
from huggingface_hub import HfApi

from hf_stepflow import StepFlowModelForCausalLM, load_preset
from hf_stepflow.cli import main
from hf_stepflow.hub.export import export_preset
from hf_stepflow.hub.lock import lock_preset
from hf_stepflow.hub.push import push_preset
from hf_stepflow.hub.search import search_presets
from hf_stepflow.presets import lock as lock_module
from hf_stepflow.reasoner import FOLDER
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowFileError, StepFlowInputError
from tests.support.flow import byte_tokenizer
from tests.support.presets import MEASURED, tiny_preset
from tests.support.tiny_models import tiny_model

BASE, PRESET = "org/Tiny", "test-org/preset"


@pytest.fixture
def pushed(hub, tmp_path):
    """A base model and a preset for it, on the Hub."""
    tiny_model("llama").push_to_hub(BASE, token=hub.token)
    byte_tokenizer().push_to_hub(BASE, token=hub.token)
    push_preset(tiny_preset(tmp_path, provenance=MEASURED), PRESET, token=hub.token)
    return hub


def test_search(pushed, tmp_path, capsys):
    push_preset(tiny_preset(tmp_path, provenance=MEASURED), "test-org/secret", private=True, token=pushed.token)
    push_preset("qwen3-8b", "test-org/other", token=pushed.token)
    broken = {"README.md": f"---\ntags: [stepflow]\nbase_model: {BASE}\n---\n", "config.json": "{}"}
    api = HfApi(token=pushed.token)
    api.create_repo("test-org/a-broken-one")
    for name, text in broken.items():
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id="test-org/a-broken-one")
    first, second = search_presets(BASE)
    assert (first.source, first.preset) == ("test-org/a-broken-one", None)
    assert "expected a preset" in first.problem
    assert (second.source, second.preset.kind) == (PRESET, "measured")
    assert [one.source for one in search_presets("Qwen/Qwen3-8B")] == ["qwen3-8b", "test-org/other"]
    assert main(["presets", "search", BASE]) == 0
    text = capsys.readouterr().out
    assert f"{PRESET}\n  measured (no measurable gain; math500, n = 500, 2026-03-01)" in text
    assert "test-org/a-broken-one\n  cannot be read: " in text
    assert main(["presets", "search", BASE, "--json", "--limit", "1"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["preset"] is None
    pushed.fail_next("GET /api/models", 503, times=10)
    with pytest.raises(StepFlowFileError, match="could not be asked"):
        search_presets(BASE)


def test_a_lock_pins_all_three(pushed, tmp_path, capsys):
    file = tmp_path / "stepflow.lock.json"
    assert main(["presets", "lock", PRESET, "--out", str(file)]) == 0
    base_commit, preset_commit = pushed.repos[BASE].main.id, pushed.repos[PRESET].main.id
    assert f"wrote {file}: {PRESET} at {preset_commit}" in capsys.readouterr().out
    data = json.loads(file.read_text())
    assert data["base"] == {"model": BASE, "revision": base_commit}

    # Both repositories go on; the lock stays where it is.
    push_preset(tiny_preset(tmp_path, provenance=MEASURED, settings__tau_max=0.4), PRESET, token=pushed.token)
    other = tiny_model("llama")
    torch.nn.init.ones_(other.lm_head.weight)
    other.push_to_hub(BASE, token=pushed.token)
    preset = load_preset(file)
    assert (preset.settings.tau_max, preset.base_model_revision) == (0.15, base_commit)
    model = StepFlowModelForCausalLM.from_pretrained(BASE, stepflow=str(file))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert torch.equal(model.lm_head.weight, tiny_model("llama").lm_head.weight)
    assert model.stepflow_runtime.settings.tau_max == 0.15
    with pytest.raises(StepFlowConfigError, match=f"pins org/Tiny at commit {base_commit}, but this is"):
        StepFlowModelForCausalLM.from_pretrained(BASE, stepflow=file, revision="main")
    with pytest.raises(StepFlowConfigError, match="at no known commit"):
        StepFlowModelForCausalLM.from_pretrained(FOLDER, stepflow=file)
    with pytest.raises(StepFlowInputError, match="does not tell which one"):
        StepFlowModelForCausalLM.attach(tiny_model("llama"), str(file), tokenizer=byte_tokenizer())

    export_preset(file, tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["base_model_revision"], config["tau_max"]) == (base_commit, 0.15)
    with pytest.raises(StepFlowInputError, match="another base was asked for"):
        export_preset(file, tmp_path / "other", base="org/Other")


def test_what_differs_from_a_lock_is_refused(pushed, tmp_path, monkeypatch):
    mine, file = tiny_preset(tmp_path, provenance=MEASURED), tmp_path / "stepflow.lock.json"
    lock = lock_preset(mine, file)
    assert (lock.source, lock.revision) == (str(mine), None)
    assert load_preset(file).lock == lock
    changed = tiny_preset(tmp_path, provenance=MEASURED, settings__alpha=0.1)
    with pytest.raises(StepFlowConfigError, match="its contents have changed"):
        load_preset(file)
    assert changed == tiny_preset(tmp_path, provenance=MEASURED)
    with monkeypatch.context() as patch:
        patch.setattr(lock_module, "code_sha256", lambda: 64 * "0")
        with pytest.raises(StepFlowConfigError, match="pins the code of hf-stepflow"):
            load_preset(file)
    with pytest.raises(StepFlowInputError, match="is a lock file itself"):
        lock_preset(file, tmp_path / "again.json")
    with pytest.raises(StepFlowInputError, match="has no revision 'v1'"):
        lock_preset(mine, file, revision="v1")
    with pytest.raises(StepFlowFileError, match=r"the commit of 'Qwen/Qwen3-8B' cannot be had"):
        lock_preset("qwen3-8b", tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("base", {"model": BASE}, "base must hold model, revision"),
        ("code", None, "code must hold version, sha256"),
        ("more", 1, "unknown field 'more'"),
        ("preset", {"source": "qwen3-8b", "revision": "main", "sha256": 64 * "0"}, "preset.revision is 'main'"),
        ("preset", {"source": "qwen3-8b", "revision": None, "sha256": "0"}, "preset.sha256 is '0'"),
    ],
)
def test_hostile_lock_files(path, value, words, tmp_path):
    data = {
        "format": lock_module.FORMAT,
        "preset": {"source": "qwen3-8b", "revision": None, "sha256": 64 * "0"},
        "code": {"version": "0.1.0", "sha256": 64 * "0"},
        "base": {"model": BASE, "revision": 40 * "0"},
    }
    file = tmp_path / "a.json"
    file.write_text(json.dumps(data | {path: value}))
    with pytest.raises(StepFlowConfigError, match=words):
        load_preset(file)
