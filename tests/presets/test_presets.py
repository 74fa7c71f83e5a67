"""Presets: the committed ones are right, names find them, and the command shows them."""

import json
import os

import pytest
from transformers import DeepseekV3Config, GptOssConfig, Olmo3Config, SmolLM3Config

from hf_stepflow import Preset, StepFlowConfig, list_presets, load_preset
from hf_stepflow.cli import main
from hf_stepflow.presets import preset as preset_module
from hf_stepflow.presets.differences import differences
from hf_stepflow.presets.strict_json import calibrations_folder
from hf_stepflow.runtime.configuration_stepflow import read_settings
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowFileError
from hf_stepflow.runtime.settings import resolve_layers
from tests.support.presets import MEASURED, RULE, edited, written
from tests.support.tiny_models import tiny_config

PRESETS = {preset.name: preset for preset in list_presets()}


# The committed presets


@pytest.mark.parametrize("name", PRESETS)
def test_committed_presets(name):
    preset = PRESETS[name]
    assert preset_module.find_problems(preset.path) == []
    assert preset_module.validate_preset(preset.path) == preset == load_preset(name)
    assert preset.path == calibrations_folder() / f"{name}.json"
    assert str(preset).startswith(preset.kind)
    assert preset.settings.base_model_name_or_path == preset.base_model
    assert preset.to_dict().items() <= (json.loads(preset.path.read_text()) | {"base_model_revision": None}).items()
    layers = preset.architecture.layers
    shallow = resolve_layers("oeb_layers", preset.settings.oeb_layers, layers)
    deep = resolve_layers("smi_layers", preset.settings.smi_layers, layers)
    if preset.kind != "measured":  # those have the layers that were found
        assert len(shallow) == len(deep) == max(1, len(layers) // 4)
        assert max(shallow) < min(deep)
    start, end = preset.settings.markers("thinking_start"), preset.settings.markers("summary_start")
    assert start
    assert end
    assert set(start).isdisjoint(end)


def test_committed_kinds():
    kinds = {name: preset.kind for name, preset in PRESETS.items()}
    paper = {"deepseek-r1-distill-qwen-7b": 28, "deepseek-r1-distill-qwen-14b": 48,
             "deepseek-r1-distill-qwen-32b": 64, "gpt-oss-20b": 24, "qwq-32b": 64}  # fmt: skip
    assert {name for name, kind in kinds.items() if kind == "paper"} == set(paper)
    for name, layers in paper.items():
        assert PRESETS[name].architecture.num_hidden_layers == layers
        assert PRESETS[name].settings.bridge_floor == "absolute"
        assert "the paper's" in PRESETS[name].claim
    measured = [preset for preset in PRESETS.values() if preset.kind == "measured"]
    assert all(preset.provenance["command"].startswith("hf-stepflow calibrate ") for preset in measured)
    assert all("NOT calibrated" in str(preset) for preset in PRESETS.values() if preset.kind == "rule")
    bases = [preset.base_model.casefold() for preset in PRESETS.values()]
    assert len(set(bases)) == len(bases)


@pytest.mark.parametrize("name", PRESETS)
def test_architectures_are_those_of_transformers(name):
    """A config of the stated size is met by its preset; no other preset's size is."""
    stated = PRESETS[name].architecture
    config = tiny_config(stated.model_type)
    text = config.get_text_config(decoder=True)
    if stated.attention_layers is None:
        for key, value in stated.to_dict().items():
            if key != "model_type":
                setattr(text, key, value)
    else:
        kinds = ["full_attention" if layer in stated.attention_layers else "mlp" for layer in range(56)]
        text.layers_block_type, text.num_attention_heads, text.num_key_value_heads = kinds, 40, 8
    PRESETS[name].check_model(config)
    with pytest.raises(StepFlowConfigError, match="4 layers"):
        PRESETS[name].check_model(tiny_config(stated.model_type))


def test_known_checkpoints_of_transformers():
    """Where the defaults of transformers are those of a checkpoint, the preset says the same."""
    for name, config in {
        "gpt-oss-120b": GptOssConfig(),
        "smollm3-3b": SmolLM3Config(),
        "olmo-3-7b-think": Olmo3Config(),
        "deepseek-r1": DeepseekV3Config(),
    }.items():
        PRESETS[name].check_model(config)


# Finding them


def test_names_ids_and_paths(tmp_path):
    assert load_preset("qwen3-8b") == load_preset("Qwen/Qwen3-8B") == load_preset("qwen/qwen3-8b")
    assert load_preset("OpenAI/GPT-OSS-20B").name == "gpt-oss-20b"
    assert load_preset(PRESETS["qwq-32b"]) is PRESETS["qwq-32b"]
    path = written(tmp_path, edited(provenance=MEASURED, settings__tau_max=0.3))
    preset = load_preset(str(path))
    assert preset == load_preset(path)
    assert load_preset(os.path.relpath(path)).settings == preset.settings
    assert (preset.kind, preset.settings.tau_max, preset.path) == ("measured", 0.3, path)
    assert "no measurable gain" in str(preset)


@pytest.mark.parametrize("name", ["qwen3-9b", "", "no such thing", "../calibrations/qwen3-8b", "a/../b", "/etc/none"])
def test_names_of_nothing(name):
    with pytest.raises(StepFlowFileError, match=r"there is no preset .*\n.*presets list"):
        load_preset(name)


def test_a_close_name_is_suggested():
    with pytest.raises(StepFlowFileError, match="did you mean 'qwen3-8b'"):
        load_preset("qwen3_8b")


def test_folders(tmp_path):
    with pytest.raises(StepFlowFileError, match="neither"):
        load_preset(tmp_path)
    preset = PRESETS["gpt-oss-20b"]
    preset.to_config().save_pretrained(tmp_path)
    found = load_preset(tmp_path)
    assert found == Preset(**(vars(preset) | {"path": tmp_path / "config.json"}))
    assert read_settings(tmp_path) == preset.settings
    written(tmp_path, RULE, "preset.json")
    assert load_preset(str(tmp_path)).name == "qwen3-8b"


def test_a_config_without_provenance_is_unstated(tmp_path):
    folder = tmp_path / "mine"
    StepFlowConfig(tau_max=0.3, oeb_heads={1: [0]}).save_pretrained(folder)
    preset = load_preset(folder)
    assert (preset.name, preset.kind, preset.settings.tau_max) == ("mine", "unstated", 0.3)
    assert str(preset).startswith("unstated")
    assert "stepflow_preset" not in preset.to_config().to_dict()
    assert preset_module.find_problems(folder) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "type 'llama'"),
        ({"tau_max": "much"}, "tau_max"),
        ({"alpha": True}, "alpha"),
        ({"thinking_start": "x" * 201}, "thinking_start"),
        ({"base_model_name_or_path": {"a": 1}}, "base_model_name_or_path"),
        ({"stepflow_preset": {"name": "x"}}, "stepflow_preset.architecture"),
        ({"stepflow_preset": []}, "stepflow_preset"),
        ({"tau_max": 0.5}, "settings.tau_max"),
        ({"oeb_layers": [99]}, "oeb_layers"),
    ],
)
def test_hostile_configs(tmp_path, changes, words):
    data = PRESETS["qwen3-8b"].to_config().to_dict() | {"model_type": "stepflow"} | changes
    with pytest.raises(StepFlowConfigError, match=words):
        load_preset(written(tmp_path, data, "config.json").parent)


def test_the_hub(tmp_path, monkeypatch):
    asked = []
    cache = tmp_path / "models--org--preset"
    snapshot_folder = cache / "snapshots" / "0123"
    snapshot_folder.mkdir(parents=True)
    (cache / "blobs").mkdir()
    blob = written(cache / "blobs", json.dumps(PRESETS["qwen3-8b"].to_config().to_dict() | {"model_type": "stepflow"}))
    (snapshot_folder / "config.json").symlink_to(blob)

    def download(*args, **kwargs):
        asked.append((args, kwargs))
        return str(snapshot_folder / "config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    preset = load_preset("org/preset", revision="v1", token="t")
    assert asked == [(("org/preset", "config.json"), {"revision": "v1", "token": "t"})]
    assert (preset.name, preset.kind, preset.settings) == ("qwen3-8b", "rule", PRESETS["qwen3-8b"].settings)
    assert load_preset(snapshot_folder).settings == preset.settings  # the cache's own links stay inside it
    blob.write_text(json.dumps({"model_type": "qwen3", "num_hidden_layers": 36}))
    with pytest.raises(StepFlowConfigError, match=r"model of type 'qwen3', expected a preset\n.*auto"):
        load_preset("org/Qwen3-999B")


def test_the_hub_out_of_reach():
    with pytest.raises(StepFlowFileError, match=r"no config\.json could be fetched"):
        load_preset("org/not-there-at-all")


def test_missing_data(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_stepflow.presets.strict_json.__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(StepFlowFileError, match="are missing"):
        calibrations_folder()


# The command


def test_list(capsys, monkeypatch):
    assert main(["presets", "list"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    lines = text.splitlines()
    assert lines[0].split() == ["kind", "name", "base", "model", "layers"]
    assert lines[1].startswith("paper")
    assert "NOT calibrated" in text
    assert all(name in text for name in PRESETS)
    assert main(["presets", "list", "--json", "--kind", "rule"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {each["provenance"]["kind"] for each in data} == {"rule"}
    assert all(next(iter(each)) == "provenance" for each in data)
    monkeypatch.setattr(preset_module, "list_presets", lambda: [PRESETS["qwq-32b"]])
    assert main(["presets", "list", "--kind", "measured"]) == 0
    assert "no preset of the kind measured" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*PRESETS, "Qwen/Qwen3-8B"])
def test_show(capsys, name):
    preset = load_preset(name)
    assert main(["presets", "show", name]) == 0
    text = capsys.readouterr().out
    assert text.startswith(preset.kind)
    assert preset.base_model in text
    assert max(map(len, text.splitlines())) <= 100
    assert main(["presets", "show", name, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["provenance"] == preset.provenance
    assert data["settings"]["thinking_start"] == preset.settings.thinking_start


def test_show_measured_and_unstated(capsys, tmp_path):
    path = written(tmp_path, edited(provenance=MEASURED, notes="Mind the gap.", base_model_revision="v1"))
    assert main(["presets", "show", str(path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("measured (no measurable gain; math500, n = 500, 2026-03-01)")
    assert "+0.4 points [-1.2, +2] at 0.95" in text
    assert "Mind the gap." in text
    StepFlowConfig().save_pretrained(tmp_path / "folder")
    assert main(["presets", "show", str(tmp_path / "folder")]) == 0
    assert capsys.readouterr().out.startswith("unstated")


def test_show_nothing(capsys):
    assert main(["presets", "show", "qwen3-9b"]) == 2
    error = capsys.readouterr().err
    assert "error: there is no preset 'qwen3-9b'" in error
    assert "hint: did you mean 'qwen3-8b'" in error


def test_presets_of_a_base_model():
    assert [preset.name for preset in list_presets(base_model="qwen/qwen3-8b")] == ["qwen3-8b"]
    assert list_presets(base_model="org/none") == []


def test_diff(capsys, tmp_path):
    file = written(tmp_path, edited(name="mine", settings__tau_max=0.1, provenance=MEASURED), "mine.json")
    found = differences(load_preset("qwen3-8b"), load_preset(file))
    assert ("settings.tau_max", 0.15, 0.1) in [(each.field, each.first, each.second) for each in found]
    assert found[0].field.startswith("provenance.")
    assert found[-1].field == "name"
    assert main(["presets", "diff", "qwen3-8b", str(file)]) == 1
    text = capsys.readouterr().out
    assert text.index("NOT calibrated") < text.index("settings.tau_max")
    assert "0.15" in text
    assert main(["presets", "diff", "qwen3-8b", str(file), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[-1] == {"field": "name", "first": "qwen3-8b", "second": "mine"}
    assert main(["presets", "diff", "qwen3-8b", "Qwen/Qwen3-8B"]) == 0
    assert "hold the same" in capsys.readouterr().out


def test_search_offline(capsys):
    assert main(["presets", "search", "Qwen/Qwen3-8B", "--offline"]) == 0
    assert "qwen3-8b (this package)\n  rule (NOT calibrated" in capsys.readouterr().out
    assert main(["presets", "search", "org/none", "--offline"]) == 0
    assert "no preset for org/none in this package" in capsys.readouterr().out
    assert main(["presets", "search", "org/none", "--limit", "0"]) == 2


def test_validate(capsys, tmp_path):
    good = written(tmp_path, RULE)
    bad = written(tmp_path, edited(name="bad", settings__tau_max=7, extra=1), "bad.json")
    assert main(["presets", "validate", str(good)]) == 0
    assert capsys.readouterr().out == f"{good}: valid\n"
    assert main(["presets", "validate", str(good), str(bad), str(tmp_path / "none.json")]) == 2
    out, error = capsys.readouterr()
    assert f"{good}: valid" in out
    assert [line.startswith(("hf-stepflow: error: ", "hint: ")) for line in error.splitlines()] == [True] * 5
    assert "settings.tau_max is 7, expected a number in [0, 1]" in error
    assert "extra is unknown" in error
    assert "there is no file" in error
    assert main(["presets", "validate", "--json", str(good), str(bad)]) == 2
    data = json.loads(capsys.readouterr().out)
    assert data[str(good)] == []
    assert len(data[str(bad)]) == 2


@pytest.mark.parametrize("words", [[], ["list"], ["show"], ["validate"]])
def test_help(capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(["presets", *words, "--help"])
    assert caught.value.code == 0
    assert "example: hf-stepflow presets" in capsys.readouterr().out
