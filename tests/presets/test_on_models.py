"""Presets on models: attaching them, refusing other architectures, and what "auto" takes."""

import json

import pytest
from transformers import PretrainedConfig

from hf_stepflow import StepFlowConfig, StepFlowModelForCausalLM, list_presets, load_preset
from hf_stepflow.presets import checks
from hf_stepflow.presets import preset as preset_module
from hf_stepflow.runtime import repository
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowFileError
from hf_stepflow.runtime.settings import StepFlowSettings
from tests.runtime.test_bad_input import snapshot
from tests.support.flow import byte_tokenizer
from tests.support.presets import MEASURED, attached, edited, heard, tiny_preset, written
from tests.support.tiny_models import tiny_config, tiny_model

PRESETS = {preset.name: preset for preset in list_presets()}


def test_attaching_by_name_and_object(tmp_path):
    path = tiny_preset(tmp_path, settings__thinking_start=["<think>", "[THINK]"])
    for source in (str(path), path, load_preset(path)):
        model = attached(tiny_model("llama"), source)
        assert model.stepflow_config.thinking_start == ["<think>", "[THINK]"]
        assert model.stepflow_config.base_model_name_or_path == "org/Tiny"
    other = tiny_model("llama")
    other.config._name_or_path = "me/fine-tuned"
    assert attached(other, path).stepflow_config.base_model_name_or_path is None


def test_from_pretrained(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    path = tiny_preset(tmp_path, settings__min_step_chars=7)
    model = StepFlowModelForCausalLM.from_pretrained(folder, stepflow=str(path), tokenizer=byte_tokenizer())
    assert model.stepflow_config.min_step_chars == 7
    with pytest.raises(StepFlowConfigError, match=r"is for qwen3 with 36 layers.*this model is llama with 4 layers"):
        StepFlowModelForCausalLM.from_pretrained(folder, stepflow="qwen3-8b", tokenizer=byte_tokenizer())
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(StepFlowFileError, match="there is no preset 'qwen3-9b'"):
        StepFlowModelForCausalLM.from_pretrained(folder, stepflow="qwen3-9b")


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 5}, {"num_attention_heads": 8}, {"num_key_value_heads": 4}, {"attention_layers": [0, 2]}],
)
def test_another_architecture_is_refused(tmp_path, changes):
    model = tiny_model("llama")
    before = snapshot(model)
    path = tiny_preset(tmp_path)
    data = json.loads(path.read_text())
    data["architecture"] |= changes
    written(tmp_path, data, "tiny.json")
    for source in (path, "qwen3-8b", "Qwen/QwQ-32B", PRESETS["gpt-oss-20b"]):
        with pytest.raises(StepFlowConfigError, match=r"is for .* but this model is llama with 4 layers"):
            attached(model, source)
        assert snapshot(model) == before


def test_a_hybrid(tmp_path):
    architecture = {
        "model_type": "nemotron_h", "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "attention_layers": [2],
    }  # fmt: skip
    preset = load_preset(written(tmp_path, edited(name="tiny", architecture=architecture), "tiny.json"))
    preset.check_model(tiny_model("nemotron_h"))
    preset.check_model(tiny_config("nemotron_h"))
    assert preset_module.rule_preset(tiny_model("nemotron_h")).architecture == preset.architecture


def test_auto_with_a_preset(tmp_path, monkeypatch, caplog):
    (tmp_path / "schema.json").write_text("{}")
    tiny_preset(tmp_path, settings__step_rule="cue")
    monkeypatch.setattr(preset_module, "calibrations_folder", lambda: tmp_path)
    model = tiny_model("llama")
    model.config._name_or_path = "org/tiny"
    with heard(caplog, monkeypatch):
        assert attached(model, "auto").stepflow_config.step_rule == "cue"
    assert "preset" not in caplog.text
    other = tiny_model("llama", num_hidden_layers=2)
    other.config._name_or_path = "org/Tiny"
    with pytest.raises(StepFlowConfigError, match=r"llama with 4 layers.*llama with 2 layers"):
        attached(other, "auto")


def test_auto_takes_no_preset_that_harms(tmp_path, monkeypatch, caplog):
    (tmp_path / "schema.json").write_text("{}")
    harm = MEASURED | {"verdict": "harm", "deltas": [MEASURED["deltas"][0] | {"delta": -9, "low": -12, "high": -6}]}
    tiny_preset(tmp_path, provenance=harm, settings__tau_max=0.9)
    monkeypatch.setattr(preset_module, "calibrations_folder", lambda: tmp_path)
    model = tiny_model("llama")
    model.config._name_or_path = "org/tiny"
    with heard(caplog, monkeypatch):
        assert attached(model, "auto").stepflow_config.tau_max == 0.15
    assert "preset 'tiny' for 'org/tiny' was measured to harm; taking the rule" in caplog.text
    for name in ("tiny", "org/tiny"):
        assert attached(tiny_model("llama"), name).stepflow_config.tau_max == 0.9


@pytest.mark.parametrize(("family", "marker"), [("llama", "<think>"), ("gpt_oss", "<|channel|>analysis<|message|>")])
def test_auto_without_a_preset(monkeypatch, caplog, family, marker):
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    model.config._name_or_path = "me/my-model"
    with heard(caplog, monkeypatch):
        attached(model, "auto")
    assert "no StepFlow preset for 'me/my-model'" in caplog.text
    assert "NOT calibrated" in caplog.text
    assert model.stepflow_runtime.settings == StepFlowSettings(
        thinking_start=marker, summary_start=marker.replace("analysis", "final").replace("<think>", "</think>")
    )
    preset = preset_module.rule_preset(model)
    assert (preset.kind, preset.name, preset.path) == ("rule", "rule", None)
    assert not checks.schema_problems(preset.to_dict() | {"name": "my-model"})


def test_a_config_without_layers():
    with pytest.raises(StepFlowConfigError, match="names no number of layers"):
        preset_module.rule_preset(PretrainedConfig())


def test_model_folders_are_no_presets(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(StepFlowConfigError, match="type 'llama', expected a preset"):
        attached(model, str(tmp_path))
    with pytest.raises(StepFlowFileError, match="no StepFlow settings at"):
        attached(model, tmp_path / "none")
    assert snapshot(model) == before


def test_plain_settings_need_no_package(tmp_path, monkeypatch):
    """The runtime travels alone: only a preset asks for hf_stepflow, and says so where it is missing."""

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="hf_stepflow")

    monkeypatch.setattr(repository.importlib, "import_module", missing)
    plain = written(tmp_path, {"tau_max": 0.3}, "plain.json")
    StepFlowConfig(tau_max=0.3).save_pretrained(tmp_path / "folder")
    for source in (str(plain), plain, str(tmp_path / "folder"), {"tau_max": 0.3}, StepFlowConfig(tau_max=0.3)):
        assert attached(tiny_model("llama"), source).stepflow_config.tau_max == 0.3
    for source in ("qwen3-8b", "auto", "org/preset", str(tiny_preset(tmp_path))):
        with pytest.raises(StepFlowConfigError, match=r"hf_stepflow package.*not installed here\n.*pip install"):
            attached(tiny_model("llama"), source)


def test_a_broken_installation_is_not_hidden(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.setattr(repository.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="yaml"):
        repository.find_preset("qwen3-8b")
