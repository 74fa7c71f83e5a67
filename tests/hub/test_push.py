"""Pushing: what it makes of repositories and what it leaves alone; test_hub_life_cycle loads what was pushed."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from hf_stepflow import StepFlowModelForCausalLM, load_preset
from hf_stepflow.cli import main
from hf_stepflow.hub.push import push_custom_generate, push_preset
from hf_stepflow.runtime.errors import StepFlowError, StepFlowFileError, StepFlowInputError
from tests.support.flow import SHORT_TEXT, byte_tokenizer, encode
from tests.support.hub_models import SETTINGS, save_base, strong_preset
from tests.support.tiny_models import tiny_model

IDS = torch.tensor([encode(SHORT_TEXT)])


@pytest.fixture
def preset(tmp_path):
    return strong_preset(tmp_path)


def push_base(hub, folder):
    """The base model of the preset on the Hub."""
    hub.api().create_repo("org/Tiny", exist_ok=True)
    hub.api().upload_folder(repo_id="org/Tiny", folder_path=save_base(folder))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def attached():
    return StepFlowModelForCausalLM.attach(tiny_model("llama"), SETTINGS, tokenizer=byte_tokenizer())


def test_loading_by_id_with_the_package(hub, preset, tmp_path):
    """The package runs its own code: trust_remote_code is not needed."""
    push_base(hub, tmp_path / "base")
    push_preset(preset, "org/preset", token=hub.token)
    push_preset(preset, "org/whole", token=hub.token, merge_weights=True)
    expected = logits(attached())
    for repo_id in ("org/preset", "org/whole"):
        model = StepFlowModelForCausalLM.from_pretrained(repo_id, cache_dir=tmp_path / "cache")
        assert torch.equal(logits(model), expected)
        assert type(model).__mro__[1] is StepFlowModelForCausalLM
    assert load_preset("org/preset").provenance == load_preset(preset).provenance
    model = StepFlowModelForCausalLM.from_pretrained("org/Tiny", stepflow="org/preset")
    assert torch.equal(logits(model), expected)
    assert model.stepflow_config.settings.base_model_name_or_path == "org/Tiny"


def test_a_second_push_changes_nothing(hub, preset):
    first = push_preset(preset, "org/preset", token=hub.token)
    second = push_preset(preset, "org/preset", token=hub.token)
    assert first.commit == second.commit
    assert len(hub.asked("POST .*/commit/")) == 1
    changed = json.loads(preset.read_text())
    changed["settings"]["tau_max"] = 0.2
    preset.write_text(json.dumps(changed))
    assert push_preset(preset, "org/preset", token=hub.token).commit != first.commit
    assert load_preset("org/preset").settings.tau_max == 0.2


def test_the_bases_commit_is_recorded(hub, preset, tmp_path):
    push = push_preset(preset, "org/preset", token=hub.token)
    assert push.export.preset.base_model_revision is None
    assert "the revision of 'org/Tiny' is not recorded, since it cannot be had: 404" in push.export.warnings[0]
    push_base(hub, tmp_path / "base")
    older = hub.repos["org/Tiny"].main.id
    push = push_preset(preset, "org/preset", token=hub.token)
    assert not push.export.warnings
    hub.api().upload_file(repo_id="org/Tiny", path_in_repo="config.json", path_or_fileobj=b"{}")
    assert load_preset("org/preset").base_model_revision == older
    card = hub.repos["org/preset"].files["README.md"].decode()
    assert f"[org/Tiny](https://huggingface.co/org/Tiny) at revision `{older}`,\n" in card
    assert f'stepflow=repo, revision="{older}")' in card
    assert torch.equal(logits(StepFlowModelForCausalLM.from_pretrained("org/preset")), logits(attached()))
    for named in ("main", older):
        assert (
            push_preset(preset, "org/preset", base_revision=named, token=hub.token, dry_run=True).to_dict()[
                "base_model_revision"
            ]
            == named
        )


@pytest.mark.parametrize("performed", [False, True])
@pytest.mark.parametrize("what", ["POST .*/commit/", "POST .*/preupload/", "POST /api/repos/create", "PUT /storage/"])
def test_an_interrupted_push_is_completed_by_the_same_again(hub, preset, tmp_path, what, performed):
    push_base(hub, tmp_path / "base")
    number = len(hub.asked("POST .*/commit/"))
    hub.fail_next(what, 400, performed=performed)
    with pytest.raises(StepFlowFileError, match=r"'org/whole' could not be pushed.*\n.*the same again"):
        push_preset(preset, "org/whole", token=hub.token, merge_weights=True)
    push = push_preset(preset, "org/whole", token=hub.token, merge_weights=True)
    assert set(hub.repos["org/whole"].files) == {".gitattributes", *push.export.files}
    assert len(hub.asked("POST .*/commit/")) - number <= 2
    assert torch.equal(logits(StepFlowModelForCausalLM.from_pretrained("org/whole")), logits(attached()))


def test_repositories_that_hold_something_else(hub, preset, tmp_path):
    push_base(hub, tmp_path / "base")
    push_preset(preset, "org/preset", token=hub.token)
    push_preset(preset, "org/whole", token=hub.token, merge_weights=True)
    push_custom_generate("org/generate", token=hub.token)
    hub.api().create_repo("org/notes")
    hub.api().upload_file(repo_id="org/notes", path_in_repo="notes.txt", path_or_fileobj=b"mine")
    before = {name: repository.main for name, repository in hub.repos.items()}

    def pushes(repo_id, **options):
        push_preset(preset, repo_id, token=hub.token, **options)

    for repo_id, options, named in (
        ("org/Tiny", {}, "model.safetensors"),
        ("org/Tiny", {"merge_weights": True}, "model.safetensors"),
        ("org/whole", {}, "model.safetensors"),
        ("org/generate", {}, "custom_generate/"),
        ("org/notes", {}, "notes.txt"),
    ):
        with pytest.raises(StepFlowFileError, match=rf"holds something else already \({named}.*\n.*of its own"):
            pushes(repo_id, **options)
    for repo_id in ("org/Tiny", "org/preset", "org/notes"):
        with pytest.raises(StepFlowFileError, match="holds something else already"):
            push_custom_generate(repo_id, token=hub.token)
    with pytest.raises(StepFlowInputError, match=r"is public, but --private"):
        pushes("org/preset", private=True)
    assert {name: repository.main for name, repository in hub.repos.items()} == before


def test_what_is_refused(hub, preset, tmp_path):
    base = save_base(tmp_path / "base")
    with pytest.raises(StepFlowInputError, match="folder of this machine"):
        push_preset(preset, "org/preset", base=str(base), token=hub.token)
    with pytest.raises(StepFlowInputError, match="which the Hub refuses"):
        push_preset(preset, "../preset", token=hub.token)
    with pytest.raises(StepFlowFileError, match=r"could not be pushed.*\n.*HF_TOKEN"):
        push_preset(preset, "org/preset")
    with pytest.raises(StepFlowFileError, match="could not be pushed"):
        push_preset(preset, "org/preset", token=hub.add_user("stranger"))
    assert not hub.repos


def test_saved_models_are_pushed(hub, preset, tmp_path):
    push_base(hub, tmp_path / "base")
    push_preset(preset, "org/preset", token=hub.token)
    model = StepFlowModelForCausalLM.from_pretrained("org/preset")
    expected = logits(model)
    model.push_to_hub("org/again", preset_only=True, token=hub.token, private=True)
    assert hub.repos["org/again"].private
    assert "model.safetensors" not in hub.repos["org/again"].files
    assert hub.repos["org/again"].files["config.json"] == hub.repos["org/preset"].files["config.json"]
    model.push_to_hub("org/full", token=hub.token, tags=["tiny"])
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="org/saved", token=hub.token)
    assert set(hub.repos["org/saved"].files) - {".gitattributes", "README.md"} == {
        file.relative_to(tmp_path / "saved").as_posix() for file in (tmp_path / "saved").rglob("*") if file.is_file()
    }
    assert not [name for name, content in hub.repos["org/saved"].files.items() if hub.token.encode() in content]
    for repo_id in ("org/again", "org/full", "org/saved"):
        again = StepFlowModelForCausalLM.from_pretrained(repo_id, token=hub.token)
        assert torch.equal(logits(again), expected)
        assert again.stepflow_config.tau_max == SETTINGS.tau_max
    assert len(AutoTokenizer.from_pretrained("org/saved")) == len(byte_tokenizer())


def test_the_command(hub, preset, capsys, monkeypatch):
    def run(*words):
        status = main(["push", *map(str, words)])
        return status, *capsys.readouterr()

    status, out, _ = run(preset, "org/preset", "--dry-run")
    assert (status, hub.repos) == (0, {})
    assert "config.json" in out
    assert out.endswith("Nothing was uploaded: this was a dry run.\n")
    status, out, err = run(preset, "org/preset")
    assert (status, out) == (2, "")
    assert "hint: `hf auth login`, or a token" in err
    monkeypatch.setenv("HF_TOKEN", hub.token)
    status, out, _ = run(preset, "org/preset", "--private", "--revision", "v1")
    assert status == 0
    assert f"Pushed to {hub.endpoint}/org/preset, commit " in out
    status, out, _ = run("--custom-generate", "org/generate", "--json")
    data = json.loads(out)
    assert (status, data["repo_id"], data["kind"], data["dry_run"]) == (0, "org/generate", "custom_generate", False)
    assert hub.token not in out
    for words in ([preset], ["--custom-generate", "org/generate", preset], [preset, "org/a/b"]):
        status, out, err = run(*words)
        assert (status, out) == (2, "")
        assert err.count("\n") == 2
    with pytest.raises(SystemExit, match="2"):
        run(preset, "org/preset", "--token", "hf_secret")
    assert issubclass(StepFlowFileError, StepFlowError)
