"""Pushing presets to a Hub and loading them from it by id, in fresh processes with empty caches."""

import json
import shutil

import pytest
import torch
from flow_support import SHORT_TEXT, byte_tokenizer, encode
from hub_support import SETTINGS, save_base, strong_preset
from tiny_models import tiny_model
from transformers import AutoTokenizer

from hf_stepflow import StepFlowModelForCausalLM, load_preset
from hf_stepflow.cli import main
from hf_stepflow.hub.push import push_custom_generate, push_preset
from hf_stepflow.runtime.errors import StepFlowError, StepFlowFileError, StepFlowInputError

IDS = torch.tensor([encode(SHORT_TEXT)])

# By id: the preset, a branch of it, a pipeline, and custom_generate.
LOADING = """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

torch.set_num_threads(1)
ids = torch.tensor(json.loads('IDS'))
told = {}


def load(name, path, **options):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)
    told[name] = model(ids).logits.tolist()
    return model


load("preset", "org/preset")
load("pinned", "org/preset", revision="old")
pipe = pipeline("text-generation", model="org/preset", trust_remote_code=True)
told["pipeline"] = pipe("Two eggs?<think>", max_new_tokens=8)[0]["generated_text"]
base = AutoModelForCausalLM.from_pretrained("org/Tiny")
told["plain"] = base(ids).logits.tolist()
tokenizer = AutoTokenizer.from_pretrained("org/preset", trust_remote_code=True)
call = {"custom_generate": "org/generate", "trust_remote_code": True, "stepflow": json.loads('SETTINGS')}
told["custom"] = base.generate(ids, tokenizer=tokenizer, max_new_tokens=8, **call).tolist()
try:
    AutoModelForCausalLM.from_pretrained("org/preset", trust_remote_code=False)
except ValueError as error:
    told["no trust"] = str(error)
print("TOLD" + json.dumps(told))
"""


@pytest.fixture
def preset(tmp_path):
    return strong_preset(tmp_path)


def push_base(hub, folder, seed=0, repo_id="org/Tiny"):
    """A tiny model on the Hub, as `save_base` writes it; returns the commit."""
    shutil.rmtree(folder, ignore_errors=True)
    save_base(folder, seed=seed)
    hub.api().create_repo(repo_id, exist_ok=True)
    return hub.api().upload_folder(repo_id=repo_id, folder_path=folder).oid


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def attached(seed=0):
    return StepFlowModelForCausalLM.attach(tiny_model("llama", seed=seed), SETTINGS, tokenizer=byte_tokenizer())


def test_from_a_push_to_a_fresh_process(hub, preset, tmp_path):
    first = push_base(hub, tmp_path / "base", seed=1)
    second = push_base(hub, tmp_path / "base", seed=0)
    assert first != second
    # The branch goes with an older base, by a revision of the base's own.
    pinned = push_preset(preset, "org/preset", token=hub.token, revision="old", base_revision=first)
    push = push_preset(preset, "org/preset", token=hub.token)
    assert set(hub.repos["org/preset"].files) == {".gitattributes", *push.export.files}
    assert (pinned.revision, push.revision) == ("old", None)
    push_custom_generate("org/generate", token=hub.token)

    script = LOADING.replace("IDS", json.dumps(IDS.tolist())).replace("SETTINGS", json.dumps(SETTINGS.to_dict()))
    done = hub.run(script, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.rsplit("TOLD", 1)[1])
    new, old = attached(), attached(seed=1)
    assert told["preset"] == logits(new).tolist()
    assert told["pinned"] == logits(old).tolist()
    assert told["plain"] == logits(tiny_model("llama")).tolist() != told["preset"]
    inputs = byte_tokenizer()("Two eggs?<think>", return_tensors="pt", add_special_tokens=False)
    written = new.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    assert told["pipeline"].replace("<think>", "") == byte_tokenizer().decode(written, skip_special_tokens=True)
    assert told["custom"] == new.generate(IDS, max_new_tokens=8, do_sample=False).tolist()
    assert "trust_remote_code=True" in told["no trust"]
    # The base never saw a revision of the preset's, nor does it hold one.
    assert not [request.path for request in hub.asked("org/Tiny") if "/old" in request.path]
    assert not [request.path for request in hub.asked("org/Tiny") if str(push.commit) in request.path]


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


def test_a_private_preset_needs_a_token(hub, preset, tmp_path):
    push_base(hub, tmp_path / "base")
    hub.api().update_repo_settings("org/Tiny", private=True)
    push_preset(preset, "org/secret", token=hub.token, private=True)
    assert hub.repos["org/secret"].private
    with pytest.raises(OSError, match="org/secret"):
        StepFlowModelForCausalLM.from_pretrained("org/secret")
    with pytest.raises(StepFlowFileError, match="org/secret"):
        load_preset("org/secret")
    # The token is for the preset, its base and the base's tokenizer.
    model = StepFlowModelForCausalLM.from_pretrained("org/secret", token=hub.token, cache_dir=tmp_path / "cache")
    assert torch.equal(logits(model), logits(attached()))
    assert load_preset("org/secret", token=hub.token).name == "tiny"


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
        file.name for file in (tmp_path / "saved").iterdir()
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
