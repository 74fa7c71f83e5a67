"""Presets without code: the code is pushed once, and transformers fetches it from there, pinned or not at all."""

import json

import pytest
import torch

from hf_stepflow import StepFlowModelForCausalLM, load_preset
from hf_stepflow.cli import main
from hf_stepflow.hub.export import export_code, export_preset
from hf_stepflow.hub.push import push_code, push_preset
from hf_stepflow.hub.verify import verify_code
from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError
from hf_stepflow.runtime.repository import PRESET_CODE, code_files
from tests.hub.test_life_cycle import TRACES, attached_logits, base, told  # noqa: F401
from tests.support.hub_models import SETTINGS, save_base, strong_preset
from tests.support.test_hub_server import contents

CODE, PRESET = "test-org/code", "test-org/preset"
OTHER = "0123456789abcdef0123456789abcdef01234567"
CODE_NAMES = {file.name for file in code_files(*PRESET_CODE)}


@pytest.fixture
def preset(tmp_path):
    return strong_preset(tmp_path)


def test_the_files(hub, preset, tmp_path):
    folder = save_base(tmp_path / "base")
    export = export_preset(preset, tmp_path / "out", base=folder, code_repo=f"{CODE}@{OTHER}")
    assert set(export.files) == {"README.md", "config.json", "generation_config.json", "tokenizer_config.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": f"{CODE}--configuration_stepflow.StepFlowConfig",
        "AutoModelForCausalLM": f"{CODE}--modeling_stepflow.StepFlowModelForCausalLM",
    }
    assert config["stepflow_code_revision"] == OTHER
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["auto_map"] == {"AutoTokenizer": [f"{CODE}--tokenization_stepflow.StepFlowTokenizer", None]}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'"code_revision": "{OTHER}"' in card
    assert f"commit `{OTHER}`" in card
    assert load_preset(tmp_path / "out").settings.tau_max == SETTINGS.tau_max
    # The package needs none of the code; and each kind of export takes the other's place.
    assert StepFlowModelForCausalLM.from_pretrained(tmp_path / "out").stepflow_config.tau_max == SETTINGS.tau_max
    export_preset(preset, tmp_path / "out", base=folder)
    assert set(contents(tmp_path / "out")) >= CODE_NAMES
    export_preset(preset, tmp_path / "out", base=folder, code_repo=f"{CODE}@{OTHER}")
    assert not set(contents(tmp_path / "out")) & CODE_NAMES


def test_what_is_refused(hub, preset, tmp_path):
    for name in ("code", "org/a/b", "../code", "org/na--me", "org/name@", "/code", ""):
        with pytest.raises(StepFlowInputError, match="expected a repository on the Hub"):
            export_preset(preset, tmp_path / "out", code_repo=name)
    with pytest.raises(StepFlowInputError, match="do not go together"):
        export_preset(preset, tmp_path / "out", code_repo=CODE, merge_weights=True)
    with pytest.raises(StepFlowFileError, match="cannot be pinned to 'v1'"):
        export_preset(preset, tmp_path / "out", code_repo=f"{CODE}@v1")
    assert not (tmp_path / "out").exists()
    export = export_preset(preset, tmp_path / "out", code_repo=CODE)
    assert "the commit of the code in 'test-org/code' is not recorded" in export.warnings[0]
    assert "stepflow_code_revision" not in json.loads((tmp_path / "out" / "config.json").read_text())
    hub.api().create_repo("test-org/notes")
    hub.api().upload_file(repo_id="test-org/notes", path_in_repo="notes.py", path_or_fileobj=b"")
    with pytest.raises(StepFlowFileError, match=r"holds something else already \(notes\.py\)"):
        push_code("test-org/notes", token=hub.token)


LOADING = """
code = {"trust_remote_code": True}
def logits_of(model):
    ids = tokenizer(given["text"], return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids).logits.tolist()
def error_of(load, *arguments, **how):
    try:
        load(*arguments, **code, **how)
    except Exception as error:
        return [type(error).__name__, str(error)]

pin = {"revision": given["revision"], "code_revision": given["code_revision"], **code}
tokenizer = AutoTokenizer.from_pretrained(given["preset"], **pin)
told["tokens"] = tokenizer(given["text"])["input_ids"]
told["config"] = AutoConfig.from_pretrained(given["preset"], **pin).tau_max
model = AutoModelForCausalLM.from_pretrained(given["preset"], **pin)
told["kinds"] = [kind.__name__ for kind in type(model).__mro__[:2]]
told["module"] = type(model).__mro__[1].__module__
told["logits"] = logits_of(model)
greedy = {"max_new_tokens": 5, "do_sample": False}
ids = tokenizer(given["text"], return_tensors="pt").input_ids
told["generated"] = model.generate(ids, **greedy)[0].tolist()
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
told["pipeline"] = pipe(given["text"], return_tensors=True, **greedy)[0]["generated_token_ids"]
pipe = pipeline("text-generation", model=given["loose"], **code)
told["newest pipeline"] = pipe(given["text"], return_tensors=True, **greedy)[0]["generated_token_ids"]
for name, load in (("config", AutoConfig), ("tokenizer", AutoTokenizer), ("model", AutoModelForCausalLM)):
    told[f"{name}, newest"] = error_of(load.from_pretrained, given["preset"])
    told[f"{name}, wrong"] = error_of(load.from_pretrained, given["preset"], code_revision=given["wrong"])
told["pipeline, newest"] = error_of(pipeline, "text-generation", model=given["preset"])
"""


def test_life_cycle(hub, base, preset, tmp_path):  # noqa: F811
    first = push_code(CODE, token=hub.token)
    assert set(first.export.files) == {"README.md", *CODE_NAMES}
    assert push_code(CODE, token=hub.token).commit == first.commit
    hub.api().create_tag(CODE, tag="v1")
    pushed = push_preset(preset, PRESET, code_repo=f"{CODE}@v1", token=hub.token)
    assert not set(hub.repos[PRESET].files) & CODE_NAMES
    assert json.loads(hub.repos[PRESET].files["config.json"])["stepflow_code_revision"] == first.commit
    # The code moves on: whoever does not pin it gets an error, not another program.
    hub.api().upload_file(repo_id=CODE, path_in_repo="LICENSE", path_or_fileobj=b"newer")
    push_preset(preset, "test-org/loose", code_repo=CODE, token=hub.token)
    assert json.loads(hub.repos["test-org/loose"].files["config.json"])["stepflow_code_revision"] != first.commit

    found = told(
        hub, LOADING, tmp_path / "empty", text=TRACES[0], preset=PRESET, loose="test-org/loose", wrong=OTHER,
        revision=pushed.commit, code_revision=first.commit,
    )  # fmt: skip

    settings = SETTINGS.replace(base_model_name_or_path=None).to_dict()
    torch.testing.assert_close(torch.tensor(found["logits"]), attached_logits(base, settings, TRACES[0]))
    assert found["kinds"] == ["LlamaForCausalLM", "StepFlowModelForCausalLM"]
    assert first.commit in found["module"]
    assert found["config"] == SETTINGS.tau_max
    assert found["pipeline"] == found["newest pipeline"] == found["generated"]
    for name in ("config", "tokenizer", "model", "pipeline"):
        kind, message = found[f"{name}, newest"]
        assert kind in ("StepFlowConfigError", "ValueError", "OSError"), name
        assert f"pass code_revision='{first.commit}'" in message, name
    for name in ("config", "tokenizer", "model"):
        assert found[f"{name}, wrong"][0] == "OSError", name
        assert OTHER in found[f"{name}, wrong"][1]


def test_a_pushed_preset_drops_the_code_it_brought(hub, base, preset):  # noqa: F811
    push_preset(preset, PRESET, token=hub.token)
    assert set(hub.repos[PRESET].files) >= CODE_NAMES
    push_code(CODE, token=hub.token)
    push_preset(preset, PRESET, code_repo=CODE, token=hub.token)
    assert not set(hub.repos[PRESET].files) & CODE_NAMES
    found = verify_code(PRESET, token=hub.token)
    assert (found.files, found.named[0].source) == ((), CODE)
    assert found.is_released
    assert {file.path for file in found.named[0].files} == CODE_NAMES


def test_the_commands(hub, preset, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert main(["push", "--code", CODE, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["kind"], data["preset"]) == ("code", None)
    assert main(["export", str(preset), str(tmp_path / "out"), "--code-repo", f"{CODE}@main"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["stepflow_code_revision"] == data["commit"]
    for words in (["--code", CODE, str(preset)], ["--code", CODE, "--custom-generate", "org/generate"]):
        assert main(["push", *words]) == 2
    assert "stands for itself" in capsys.readouterr().err


def test_the_code_in_a_folder(tmp_path):
    export = export_code(tmp_path / "code", repo_id=CODE)
    assert set(export.files) == {"README.md", *CODE_NAMES}
    assert export_code(tmp_path / "code").files.keys() == export.files.keys()
    assert verify_code(tmp_path / "code").is_released
    assert "presets verify-code YOUR-NAME/stepflow-code" in (tmp_path / "code" / "README.md").read_text()
