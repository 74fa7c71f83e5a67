"""Names that come from outside (chat templates, weights, presets, auto_map) write nothing outside the folder."""

import copy
import json
from pathlib import Path

import pytest

from hf_stepflow import StepFlowModelForCausalLM, load_preset
from hf_stepflow.hub.export import export_preset
from hf_stepflow.runtime.errors import StepFlowError, StepFlowFileError
from hf_stepflow.runtime.repository import MODEL_CODE, PRESET_CODE, code_files
from tests.support.flow import byte_tokenizer
from tests.support.hub_models import SETTINGS, save_base, strong_preset
from tests.support.presets import tiny_preset
from tests.support.tiny_models import tiny_model

NAMES = ["../evil", "../../evil", "a/../../../evil", "{outside}/evil"]


@pytest.fixture
def inside(tmp_path):
    """A folder whose neighbours are watched."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "home" / "deep").mkdir(parents=True)
    return tmp_path / "home" / "deep"


def written(root: Path, *allowed: Path) -> list[Path]:
    """The files below a folder, except those below the folders that may be written to."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return [path for path in files if not any(folder in path.parents for folder in allowed)]


@pytest.mark.parametrize("name", NAMES)
def test_chat_templates(name, inside, tmp_path):
    """Transformers refuses them from 5.10.1 on, which is the lowest release that is supported."""
    name = name.format(outside=tmp_path / "outside")
    tokenizer = copy.deepcopy(byte_tokenizer())  # the tests share theirs
    tokenizer.chat_template = {"default": "{{ messages }}", name: "evil"}
    model = StepFlowModelForCausalLM.attach(tiny_model("llama"), SETTINGS, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="Invalid chat template name"):
        model.save_pretrained(inside / "whole")
    assert written(tmp_path, inside / "whole") == []


@pytest.mark.parametrize("name", NAMES)
def test_a_base_with_such_names(name, inside, tmp_path):
    """Templates in a tokenizer's config stay text in it; weights that lie elsewhere are missing weights."""
    name = name.format(outside=tmp_path / "outside")
    base, preset = save_base(tmp_path / "base"), strong_preset(inside)
    file = base / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["chat_template"] = [{"name": "default", "template": "x"}, {"name": name, "template": "evil"}]
    file.write_text(json.dumps(config))
    before = written(tmp_path)
    export_preset(preset, inside / "merged", base=base, merge_weights=True)
    export_preset(preset, inside / "preset", base=base)
    assert written(tmp_path, inside / "merged", inside / "preset") == before
    assert (inside / "merged" / "tokenizer_config.json").read_bytes() == file.read_bytes()
    index = {"weight_map": {"model.embed_tokens.weight": f"{name}.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    before = written(tmp_path)
    with pytest.raises(StepFlowFileError, match="lacks weights"):
        export_preset(preset, inside / "again", base=base, merge_weights=True)
    assert written(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
def test_presets(name, inside, tmp_path):
    """No name of a preset is a path."""
    name = name.format(outside=tmp_path / "outside")
    preset = tiny_preset(inside)
    data = json.loads(preset.read_text())
    preset.write_text(json.dumps(data | {"name": name}))
    before = written(tmp_path)
    with pytest.raises(StepFlowError, match="name"):
        load_preset(preset)
    with pytest.raises(StepFlowError):
        export_preset(preset, inside / "preset")
    assert written(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
def test_an_auto_map(name, inside, tmp_path):
    """The package follows none: it loads with its own classes, and writes its own auto_map."""
    folder = inside / "preset"
    export_preset(strong_preset(inside), folder, base=save_base(tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text("raise SystemExit('this file was run')\n")
    config["auto_map"] = {"AutoConfig": f"{name}--evil.X", "AutoModelForCausalLM": "evil.X"}
    (folder / "config.json").write_text(json.dumps(config))
    before = written(tmp_path)
    model = StepFlowModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(inside / "again", preset_only=True)
    model.save_pretrained(inside / "whole")
    assert written(tmp_path, inside / "again", inside / "whole") == before
    for saved, modules in (("again", PRESET_CODE), ("whole", MODEL_CODE)):
        assert "evil.X" not in (inside / saved / "config.json").read_text()
        assert {file.name for file in (inside / saved).glob("*.py")} == {file.name for file in code_files(*modules)}
