"""Exports: what is written and what never is, folders that are left alone, bases that do not fit, and the command."""

import json
import os
import shutil
import sys

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_stepflow import StepFlowModelForCausalLM, list_presets, load_preset
from hf_stepflow.cli import main
from hf_stepflow.hub import export as export_module
from hf_stepflow.hub.cards import custom_generate_card, preset_card
from hf_stepflow.hub.export import export_custom_generate, export_preset, with_base
from hf_stepflow.runtime import attention_interface
from hf_stepflow.runtime.configuration_stepflow import BASE_FIELDS, read_settings
from hf_stepflow.runtime.errors import (
    StepFlowConfigError,
    StepFlowFileError,
    StepFlowInputError,
    StepFlowUnsupportedError,
)
from hf_stepflow.runtime.repository import PRESET_CODE, code_files
from tests.support.flow import byte_tokenizer
from tests.support.hub_models import SETTINGS, save_base, strong_preset
from tests.support.presets import MEASURED, edited, written
from tests.support.test_hub_server import contents

SOURCES = {file.name: file for file in code_files(*PRESET_CODE, "generate")}
RUNTIME = {name: file.read_bytes() for name, file in SOURCES.items()}
DATA = {"README.md", "config.json", "generation_config.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("home") / "base")


@pytest.fixture
def preset(tmp_path):
    return strong_preset(tmp_path)


def code(folder) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name.endswith(".py")}


# What is written


def test_the_files_of_a_preset(base, preset, tmp_path):
    export = export_preset(preset, tmp_path / "out", base=base)
    found = contents(tmp_path / "out")
    assert {name for name in found if not name.endswith(".py")} == DATA
    assert code(tmp_path / "out").items() <= RUNTIME.items()
    assert set(RUNTIME) - set(found) == {"generate.py"}
    assert export.files == {name: len(content) for name, content in sorted(found.items())}
    assert len(found["config.json"]) < 3000
    config = json.loads(found["config.json"])
    assert config["model_type"] == "stepflow"
    assert read_settings(tmp_path / "out") == SETTINGS.replace(base_model_name_or_path=str(base))
    own = AutoConfig.from_pretrained(base)
    assert {name: config[name] for name in BASE_FIELDS} == {name: getattr(own, name) for name in BASE_FIELDS}
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.stepflow["tau_max"] == SETTINGS.tau_max
    assert generation.max_new_tokens == 12
    loaded = load_preset(tmp_path / "out")
    assert loaded.architecture == load_preset(preset).architecture
    assert loaded.provenance == MEASURED
    # All by relative imports: whoever copies by following them misses nothing.
    assert {file.name for file in code_files("modeling_stepflow")} == set(code(tmp_path / "out"))


@pytest.mark.parametrize("name", [preset.name for preset in list_presets()])
def test_every_committed_preset_can_be_exported_offline(name, tmp_path):
    export = export_preset(name, tmp_path / "out", repo_id=f"me/{name}-stepflow")
    assert load_preset(tmp_path / "out").settings == load_preset(name).settings
    (warning,) = export.warnings
    assert "vocab_size" in warning
    assert "cannot be had here" in warning
    assert "vocab_size" not in json.loads((tmp_path / "out" / "config.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert card == str(preset_card(load_preset(name), f"me/{name}-stepflow"))
    assert str(tmp_path) not in "".join(
        content.decode() for key, content in contents(tmp_path / "out").items() if key.endswith(("json", "md"))
    )


def test_a_merged_repository(base, preset, tmp_path):
    source = tmp_path / "base"
    shutil.copytree(base, source)
    data = json.loads((source / "config.json").read_text())
    elsewhere = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    data |= {"_name_or_path": "/home/someone/model", "auto_map": elsewhere}
    (source / "config.json").write_text(json.dumps(data))
    for name in ("evil.py", "notes.txt", "training_args.bin", "optimizer.pt"):
        (source / name).write_text("not ours")
    (source / "LICENSE").write_text("the licence")
    export = export_preset(preset, tmp_path / "out", base=source, merge_weights=True)
    found = contents(tmp_path / "out")
    inner = code(tmp_path / "out" / "custom_generate")
    assert {
        name: content for name, content in code(tmp_path / "out").items() if "/" not in name
    }.items() <= RUNTIME.items()
    assert inner == RUNTIME
    rest = {name: content for name, content in found.items() if not name.endswith(".py")}
    kept = {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"}
    assert set(rest) == {*DATA, *kept}
    assert {name: rest[name] for name in kept} == {name: contents(source)[name] for name in kept}
    assert not export.warnings
    config = json.loads(found["config.json"])
    del data["_name_or_path"]
    assert config == data | {"auto_map": {"AutoModelForCausalLM": "modeling_stepflow.StepFlowModelForCausalLM"}}
    assert b"/home/someone" not in b"".join(found.values())
    shutil.rmtree(source)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert read_settings(model.stepflow_config) == SETTINGS
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_the_repository_of_custom_generate(tmp_path):
    export = export_custom_generate(tmp_path / "out", repo_id="me/stepflow-generate")
    found = contents(tmp_path / "out")
    assert {name for name in found if not name.endswith(".py")} == {"README.md", "custom_generate/requirements.txt"}
    assert {f"custom_generate/{name}": content for name, content in RUNTIME.items()} == code(tmp_path / "out")
    assert found["README.md"].decode() == str(custom_generate_card("me/stepflow-generate"))
    assert (export.kind, export.preset) == ("custom_generate", None)


def test_code_travels_verbatim_in_all_five_ways(base, preset, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    StepFlowModelForCausalLM.attach(model, SETTINGS, tokenizer=byte_tokenizer())
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "preset", preset_only=True)
    export_preset(preset, tmp_path / "exported", base=base)
    export_preset(preset, tmp_path / "merged", base=base, merge_weights=True)
    export_custom_generate(tmp_path / "generate")
    inner = ("generate/custom_generate", "whole/custom_generate", "merged/custom_generate")
    for name in ("whole", "preset", "exported", "merged", *inner):
        found = code(tmp_path / name)
        brought = {path: found.pop(path) for path in list(found) if path.startswith("custom_generate/")}
        assert bool(brought) is (name in ("whole", "merged"))
        assert found.items() <= RUNTIME.items()
        assert len(found.keys() - {"generate.py"}) <= 19
        assert "modeling_stepflow.py" in found


# Folders


def test_an_earlier_export_is_replaced_and_nothing_else_is(base, preset, tmp_path):
    out = tmp_path / "out"
    export_preset(preset, out, base=base)
    # Of an older release: a file that this one no longer has.
    modeling = out / "modeling_stepflow.py"
    modeling.write_text(modeling.read_text() + "\nfrom .old import thing\n")
    (out / "old.py").write_text("thing = 1\n")
    export_preset(preset, out, base=base)
    assert "old.py" not in contents(out)
    export_custom_generate(out)
    assert not (out / "config.json").exists()
    export_custom_generate(out)
    (tmp_path / "empty").mkdir()
    export_preset(preset, tmp_path / "empty", base=base)

    for folder in (base, tmp_path):
        before = contents(folder)
        with pytest.raises(StepFlowFileError, match=r"no export of settings and code writes\n.*a new folder"):
            export_preset(preset, folder, base=base)
        assert contents(folder) == before
    for name in ("mine.py", "notes.md", ".git/config", "model.safetensors", "custom_generate/mine.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        before = contents(out)
        with pytest.raises(StepFlowFileError, match=name.split("/")[-1]):
            export_custom_generate(out)
        assert contents(out) == before
        (out / name).unlink()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StepFlowFileError, match="is a file"):
        export_preset(preset, tmp_path / "file", base=base)
    (tmp_path / "readme").mkdir()
    (tmp_path / "readme" / "README.md").write_text("mine")
    with pytest.raises(StepFlowFileError, match=r"README\.md"):
        export_preset(preset, tmp_path / "readme", base=base)


def test_merged_weights_are_never_replaced(base, preset, tmp_path):
    export_preset(preset, tmp_path / "out", base=base, merge_weights=True)
    before = contents(tmp_path / "out")
    for merge in (False, True):
        with pytest.raises(StepFlowFileError, match="no export of settings and code"):
            export_preset(preset, tmp_path / "out", base=base, merge_weights=merge)
    assert contents(tmp_path / "out") == before


def test_nothing_is_left_half_written(base, preset, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "out"
    export_preset(preset, out, base=base)
    before = contents(out)

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(export_module, "preset_card", fails)
    for folder in (out, tmp_path / "deep" / "new"):
        with pytest.raises(OSError, match="disk full"):
            export_preset(preset, folder, base=base)
    assert contents(tmp_path / "deep") == {f"out/{name}": content for name, content in before.items()}
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_a_folder_that_is_a_link_is_followed(base, preset, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export_preset(preset, tmp_path / "link", base=base)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()


# Bases and presets


def test_bases_that_do_not_fit(base, preset, tmp_path):
    with pytest.raises(StepFlowConfigError, match="is for qwen3 with 36 layers"):
        export_preset("qwen3-8b", tmp_path / "out", base=base)
    with pytest.raises(StepFlowInputError, match="neither a Hub id nor a folder"):
        export_preset(preset, tmp_path / "out", base="no such place")
    nameless = written(tmp_path, json.dumps({"model_type": "stepflow"}), "config.json")
    with pytest.raises(StepFlowConfigError, match=r"names no base model\n.*--base"):
        export_preset(nameless, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_claims_stay_with_their_base():
    paper = load_preset("gpt-oss-20b")
    assert with_base(paper, None, "abc").settings.base_model_revision == "abc"
    assert with_base(paper, "OpenAI/gpt-oss-20b", None).kind == "paper"
    other = with_base(paper, "me/fine-tuned", None)
    assert (other.kind, other.settings.base_model_name_or_path) == ("unstated", "me/fine-tuned")
    assert "gpt-oss-20b" in other.notes
    assert with_base(load_preset("qwen3-8b"), "me/fine-tuned", None).kind == "rule"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks weights: 'model.safetensors'"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "no tokenizer_config.json"),
        (lambda folder: alter(folder / "config.json", model_type="own"), "brings code of its own"),
        (
            lambda folder: alter(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}),
            "tokenizer",
        ),
        (lambda folder: linked(folder / "tokenizer.json"), "is a link out of its folder"),
        (lambda folder: linked(folder / "config.json"), "is a link out of its folder"),
        (lambda folder: index(folder, "../secret.safetensors"), "lacks weights: '../secret.safetensors'"),
        (lambda folder: shutil.move(folder / "config.json", folder / "adapter_config.json"), "it is an adapter"),
    ],
)
def test_weights_that_are_not_copied(base, preset, tmp_path, change, words):
    source = tmp_path / "base"
    shutil.copytree(base, source)
    change(source)
    with pytest.raises((StepFlowFileError, StepFlowUnsupportedError, StepFlowConfigError), match=words):
        export_preset(preset, tmp_path / "out", base=source, merge_weights=True)
    assert not (tmp_path / "out").exists()


def alter(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def linked(file) -> None:
    target = file.parent.parent / f"secret-{file.name}"
    shutil.move(file, target)
    file.symlink_to(target)


def index(folder, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))


def test_a_presets_data_brings_no_code_and_no_paths(base, tmp_path):
    """What stands in a preset from elsewhere ends as a value of a setting, or is refused."""
    evil = {
        "model_type": "stepflow", "base_model_name_or_path": "org/Tiny", "tau_max": 0.2,
        "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "../../evil.Config"},
        "token": "hf_secret", "_name_or_path": "/home/someone",
    }  # fmt: skip
    source = tmp_path / "source"
    source.mkdir()
    (source / "evil.py").write_text("raise SystemExit")
    written(source, json.dumps(evil), "config.json")
    export_preset(source, tmp_path / "out")
    found = contents(tmp_path / "out")
    assert {name for name in found if name not in RUNTIME} == DATA
    data = json.loads(found["config.json"])
    assert data["auto_map"]["AutoModelForCausalLM"] == "modeling_stepflow.StepFlowModelForCausalLM"
    assert not [text for text in (b"evil", b"hf_secret", b"/home/someone") if text in b"".join(found.values())]
    for name in ("../out", "a/b", "/etc/x", ".."):
        with pytest.raises(StepFlowConfigError, match="name"):
            export_preset(written(tmp_path, edited(name=name), "bad.json"), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_copies_of_the_code_have_names_of_their_own(tmp_path):
    """Attention is registered under a name that tells copies with other code apart, wherever it differs."""
    assert len(attention_interface.STAMP) == 8
    for file in code_files("modeling_stepflow"):
        shutil.copy(file, tmp_path)
    (tmp_path / "bridge.py").write_text((tmp_path / "bridge.py").read_text() + "\n")
    copied = get_class_from_dynamic_module("modeling_stepflow.StepFlowModelForCausalLM", str(tmp_path))
    folder, _, _ = copied.__module__.rpartition(".")
    assert sys.modules[f"{folder}.attention_interface"].STAMP != attention_interface.STAMP


# The command


def run(capsys, *words) -> tuple[int, str, str]:
    status = main(["export", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command(base, preset, tmp_path, capsys):
    status, out, _ = run(capsys, preset, tmp_path / "out", "--base", base)
    assert status == 0
    assert out.startswith(f"{tmp_path / 'out'}: ")
    assert "base     " + str(base) in out
    assert "trust_remote_code=True" in out
    status, out, _ = run(capsys, "qwen3-8b", tmp_path / "json", "--json", "--base-revision", "v1")
    data = json.loads(out)
    assert (status, data["base_model"], data["base_model_revision"]) == (0, "Qwen/Qwen3-8B", "v1")
    assert data["bytes"] == sum(data["files"].values())
    assert json.loads((tmp_path / "json" / "config.json").read_text())["base_model_revision"] == "v1"
    status, out, _ = run(capsys, "--custom-generate", tmp_path / "generate")
    assert status == 0
    assert "custom_generate=" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qwen3-8b"], "expected PRESET DIR"),
        ([], "expected PRESET DIR"),
        (["qwen3_8b", "OUT"], "did you mean 'qwen3-8b'"),
        (["--custom-generate", "OUT", "--merge-weights"], "stands for itself"),
        (["qwen3-8b", "--custom-generate", "OUT"], "stands for itself"),
        (["qwen3-8b", "OUT", "--merge-weights"], "could not be fetched"),
        (["qwen3-8b", "OUT", "--base", "no base"], "neither a Hub id nor a folder"),
    ],
)
def test_bad_input_of_the_command(words, message, tmp_path, capsys):
    status, out, err = run(capsys, *(tmp_path / word if word == "OUT" else word for word in words))
    assert (status, out) == (2, "")
    assert err.startswith("hf-stepflow: error: ")
    assert message in err
    assert "\nhint: " in err
    assert list(tmp_path.iterdir()) == []


def test_help(capsys):
    for name in ("export", "push"):
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        _, _, examples = capsys.readouterr().out.partition("\nexample")
        assert f" hf-stepflow {name} qwen3-8b" in examples


def test_the_tokenizer_is_the_bases(base, preset, tmp_path):
    export_preset(preset, tmp_path / "out", base=base)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True, padding_side="right")
    assert (tokenizer.padding_side, len(tokenizer)) == ("right", len(byte_tokenizer()))
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(base))
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == byte_tokenizer().get_vocab()
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
