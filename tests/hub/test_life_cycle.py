"""A preset from push to use, over the Hub's own protocol: every way in by id, in processes that know nothing else."""

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from hf_stepflow import StepFlowModelForCausalLM, load_preset
from hf_stepflow.hub.export import export_preset
from hf_stepflow.hub.push import push_custom_generate, push_preset
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowFileError
from hf_stepflow.runtime.tokenization_stepflow import StepFlowTokenizer
from tests.support.flow import TRACES, byte_tokenizer
from tests.support.presets import MEASURED, tiny_preset
from tests.support.tiny_models import tiny_model

BASE, PRESET = "org/Tiny", "test-org/preset"
# A fresh process without this package, as that of a user who has transformers only.
ALONE = """
import json, sys
sys.modules["hf_stepflow"] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
torch.set_num_threads(1)
torch.manual_seed(0)
told = {}
"""


@pytest.fixture
def base(hub):
    """A tiny model with weights and a tokenizer, on the Hub."""
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    model.push_to_hub(BASE, token=hub.token)
    tokenizer.push_to_hub(BASE, token=hub.token)
    return model


def pushed(hub, folder: Path, repo_id: str = PRESET, settings: dict | None = None, **how):
    changes = {f"settings__{name}": value for name, value in (settings or {}).items()}
    return push_preset(tiny_preset(folder, provenance=MEASURED, **changes), repo_id, token=hub.token, **how)


def told(hub, script: str, cache: Path, **given) -> dict:
    """What a script in a fresh process found out."""
    done = hub.run(f"{ALONE}\ngiven = {given!r}\n{script}\nprint(json.dumps(told))", cache)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def exported(hub, folder: Path) -> dict[str, bytes]:
    """The files of the preset's repository, by name."""
    made = tiny_preset(folder, provenance=MEASURED)
    export_preset(made, folder / "export", base_revision=hub.repos[BASE].main.id, repo_id=PRESET)
    return {path.name: path.read_bytes() for path in (folder / "export").iterdir()}


def attached_logits(model, settings: dict | str | Path, text: str) -> torch.Tensor:
    attached = StepFlowModelForCausalLM.attach(model, settings, tokenizer=byte_tokenizer())
    ids = byte_tokenizer()(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = attached(ids).logits
    attached.detach_stepflow()
    return logits


EVERY_WAY = """
def looked_at(model):
    ids = tokenizer(given["text"], return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits.tolist()
    kinds = [kind.__name__ for kind in type(model).__mro__[:2]]
    config = getattr(model, "stepflow_config", None)
    return {"kinds": kinds, "tau_max": config and config.tau_max, "logits": logits}

code = {"trust_remote_code": True}
greedy = {"max_new_tokens": 5, "do_sample": False}
tokenizer = AutoTokenizer.from_pretrained(given["preset"], **code)
told["tokens"] = tokenizer(given["text"])["input_ids"]
config = AutoConfig.from_pretrained(given["preset"], **code)
told["config"] = [config.model_type, config.tau_max, config.vocab_size]
model = AutoModelForCausalLM.from_pretrained(given["preset"], **code)
told["model"] = looked_at(model)
ids = tokenizer(given["text"], return_tensors="pt").input_ids
told["generated"] = model.generate(ids, **greedy)[0].tolist()
pipe = pipeline("text-generation", model=given["preset"], **code)
told["pipeline"] = pipe(given["text"], return_tensors=True, **greedy)[0]["generated_token_ids"]

for name, revision in given["revisions"].items():
    told[name] = looked_at(AutoModelForCausalLM.from_pretrained(given["preset"], revision=revision, **code))
    told[name]["config"] = AutoConfig.from_pretrained(given["preset"], revision=revision, **code).tau_max
    older_code = AutoModelForCausalLM.from_pretrained(given["preset"], code_revision=revision, **code)
    told[name]["code alone"] = older_code.stepflow_config.tau_max

plain = AutoModelForCausalLM.from_pretrained(given["base"])
told["plain"] = looked_at(plain)
called = {"custom_generate": given["generate"], "stepflow": given["settings"], **code, **greedy}
told["custom"] = plain.generate(ids, tokenizer=tokenizer, **called).tolist()
told["custom without tokenizer"] = plain.generate(ids, **called).tolist()
told["custom off"] = plain.generate(ids, **{**called, "stepflow": False}).tolist()
told["off"] = plain.generate(ids, **greedy).tolist()
told["afterwards"] = looked_at(plain)

for name in ("test-org/merged", "test-org/whole"):
    told[name] = looked_at(AutoModelForCausalLM.from_pretrained(name, **code))
    told[f"{name} without code"] = looked_at(AutoModelForCausalLM.from_pretrained(name))
"""


def test_every_way_in_by_id(hub, base, tmp_path):
    older = {"tau_max": 0.3, "oeb_layers": "bottom:0.5"}
    newer = {"tau_max": 0.4, "oeb_layers": "bottom:0.5"}
    first = pushed(hub, tmp_path, settings=older).commit
    hub.api().create_tag(PRESET, tag="v1")
    assert pushed(hub, tmp_path, settings=newer).commit != first
    pushed(hub, tmp_path, "test-org/merged", settings=newer, merge_weights=True)
    push_custom_generate("test-org/generate", token=hub.token)
    whole = StepFlowModelForCausalLM.attach(tiny_model("llama"), newer, tokenizer=byte_tokenizer())
    whole.push_to_hub("test-org/whole", token=hub.token)

    found = told(
        hub, EVERY_WAY, tmp_path / "empty", text=TRACES[0], preset=PRESET, base=BASE, generate="test-org/generate",
        settings=newer, revisions={"commit": first, "tag": "v1"},
    )  # fmt: skip

    text = TRACES[0]
    logits = {0.3: attached_logits(base, older, text), 0.4: attached_logits(base, newer, text)}
    with torch.no_grad():
        logits[None] = base(byte_tokenizer()(text, return_tensors="pt").input_ids).logits
    assert not torch.allclose(logits[0.3], logits[0.4])
    assert not torch.allclose(logits[None], logits[0.4])
    expected = {
        "model": 0.4, "commit": 0.3, "tag": 0.3, "plain": None, "afterwards": None, "test-org/merged": 0.4,
        "test-org/merged without code": None, "test-org/whole": 0.4, "test-org/whole without code": None,
    }  # fmt: skip
    for name, tau_max in expected.items():
        assert found[name]["tau_max"] == tau_max, name
        assert found[name]["kinds"][0] == "LlamaForCausalLM"
        assert (found[name]["kinds"][1] == "StepFlowModelForCausalLM") is (tau_max is not None)
        torch.testing.assert_close(torch.tensor(found[name]["logits"]), logits[tau_max], msg=name)
    assert found["tokens"] == byte_tokenizer()(text)["input_ids"]
    assert found["config"] == ["stepflow", 0.4, 320]
    assert found["commit"]["config"] == found["tag"]["config"] == 0.3
    # The code of one commit and the settings of another: that is what code_revision asks for.
    assert found["commit"]["code alone"] == 0.4
    assert [found["pipeline"]] == [found["generated"]] == found["custom"] == found["custom without tokenizer"]
    assert found["custom off"] == found["off"]


PRIVATE = """
import os
from transformers.utils import logging
logging.set_verbosity_error()
loaders = {
    "config": lambda **how: AutoConfig.from_pretrained(given["preset"], trust_remote_code=True, **how),
    "tokenizer": lambda **how: AutoTokenizer.from_pretrained(given["preset"], trust_remote_code=True, **how),
    "model": lambda **how: AutoModelForCausalLM.from_pretrained(given["preset"], trust_remote_code=True, **how),
    "pipeline": lambda **how: pipeline("text-generation", model=given["preset"], trust_remote_code=True, **how),
}
for name, load in loaders.items():
    try:
        load()
    except Exception as error:
        told[name] = [type(error).__name__, str(error)]
loaded = {name: load(token=given["token"]) for name, load in loaders.items()}
told["by argument"] = [loaded["config"].tau_max, loaded["model"].stepflow_config.tau_max, len(loaded["tokenizer"])]
os.environ["HF_TOKEN"] = given["token"]
told["by environment"] = loaders["model"](force_download=True).stepflow_config.tau_max
"""


def test_a_private_preset_opens_with_a_token_only(hub, base, tmp_path):
    pushed(hub, tmp_path, settings={"tau_max": 0.3}, private=True)
    assert hub.repos[PRESET].private
    hub.api().update_repo_settings(BASE, private=True)

    found = told(hub, PRIVATE, tmp_path / "empty", preset=PRESET, token=hub.token)

    for name in ("config", "tokenizer", "model", "pipeline"):
        kind, message = found[name]
        assert kind == "OSError"
        assert message.startswith(f"{PRESET} is not a local folder"), name
        assert "passing `token=<your_token>`" in message
    assert found["by argument"] == [0.3, 0.3, 261]
    assert found["by environment"] == 0.3


@pytest.mark.parametrize(("closed", "reason"), [("private", "not a valid model identifier"), ("gated", "gated repo")])
def test_a_base_that_is_closed_is_named(hub, base, tmp_path, closed, reason):
    pushed(hub, tmp_path)
    hub.api().update_repo_settings(BASE, **({"private": True} if closed == "private" else {"gated": "manual"}))
    with pytest.raises(
        StepFlowFileError, match=f"the base model '{BASE}' of the preset '{PRESET}'.*{reason}"
    ) as caught:
        StepFlowModelForCausalLM.from_pretrained(PRESET, cache_dir=tmp_path / "empty")
    assert "pass token=" in caught.value.hint
    with pytest.raises(StepFlowConfigError, match=f"from '{BASE}'") as caught:
        StepFlowTokenizer.from_pretrained(PRESET, cache_dir=tmp_path / "empty")
    assert "pass token=" in caught.value.hint
    assert StepFlowModelForCausalLM.from_pretrained(PRESET, token=hub.token).stepflow_config.tau_max == 0.15


def test_a_preset_can_pin_the_revision_of_its_base(hub, base, tmp_path):
    older = hub.repos[BASE].main.id
    pushed(hub, tmp_path, base_revision=older)
    tiny_model("llama", seed=1).push_to_hub(BASE, token=hub.token)
    ids = byte_tokenizer()(TRACES[0], return_tensors="pt").input_ids
    model = StepFlowModelForCausalLM.from_pretrained(PRESET)
    with torch.no_grad(), model.disable_stepflow():
        assert torch.equal(model(ids).logits, base(ids).logits)
        assert not torch.allclose(AutoModelForCausalLM.from_pretrained(BASE)(ids).logits, base(ids).logits)


def test_a_preset_by_its_id_on_a_model(hub, base, tmp_path):
    older = pushed(hub, tmp_path, settings={"tau_max": 0.3}, private=True).commit
    pushed(hub, tmp_path, settings={"tau_max": 0.4})
    with pytest.raises(StepFlowFileError, match=f"no preset '{PRESET}'.*401.*Repository Not Found") as caught:
        load_preset(PRESET)
    assert "a private repository needs a token" in caught.value.hint
    preset = load_preset(PRESET, token=hub.token)
    assert (preset.base_model, preset.settings.tau_max, preset.kind) == (BASE, 0.4, "measured")
    assert load_preset(PRESET, revision=older, token=hub.token).settings.tau_max == 0.3
    with pytest.raises(StepFlowFileError, match="no preset 'test-org/absent'"):
        load_preset("test-org/absent", token=hub.token)
    with pytest.raises(StepFlowConfigError, match=f"{hub.endpoint}/{BASE}.*model of type .llama., expected a preset"):
        load_preset(BASE)

    hub.api().update_repo_settings(PRESET, private=False)
    model = StepFlowModelForCausalLM.from_pretrained(BASE, stepflow=PRESET)
    assert model.stepflow_config.tau_max == 0.4
    on_another = StepFlowModelForCausalLM.attach(tiny_model("llama", seed=1), PRESET, tokenizer=byte_tokenizer())
    assert on_another.stepflow_config.tau_max == 0.4
    with pytest.raises(StepFlowConfigError, match=r"is for llama.*this model is qwen3"):
        StepFlowModelForCausalLM.attach(tiny_model("qwen3"), PRESET, tokenizer=byte_tokenizer())


@pytest.mark.parametrize("branch", [None, "new"])
def test_an_attached_model_pushes_its_preset_to_no_models_place(hub, base, branch):
    model = StepFlowModelForCausalLM.from_pretrained(BASE, stepflow={"tau_max": 0.3})
    how = {"preset_only": True, "token": hub.token, "revision": branch}
    files = hub.repos[BASE].files
    with pytest.raises(StepFlowFileError, match=f"'{BASE}' holds a model of type 'llama'"):
        model.push_to_hub(BASE, **how)
    assert hub.repos[BASE].files == files
    for _ in range(2):
        model.push_to_hub(PRESET, **how)
    assert StepFlowModelForCausalLM.from_pretrained(PRESET, revision=branch).stepflow_config.tau_max == 0.3


@pytest.mark.parametrize("performed", [False, True])
@pytest.mark.parametrize("request_", ["POST /api/repos/create", "POST .*/preupload/", "POST .*/commit/"])
@pytest.mark.parametrize("status", [None, 500])
def test_a_push_that_breaks_off_is_completed_by_the_next(hub, base, tmp_path, request_, status, performed):
    hub.fail_next(f"{request_}", status, times=6 if "preupload" in request_ else 1, performed=performed)
    with pytest.raises(StepFlowFileError, match="running the same again completes an interrupted push"):
        pushed(hub, tmp_path)

    done = pushed(hub, tmp_path)

    expected = exported(hub, tmp_path)
    repository = hub.repos[PRESET]
    assert repository.files.items() >= expected.items()
    assert set(repository.files) - set(expected) == {".gitattributes"}
    assert done.commit == repository.main.id == pushed(hub, tmp_path).commit
    # Created, and all files at once: nobody ever saw half a preset.
    assert len(repository.commits) == 2


def test_a_push_is_one_commit_where_the_client_has_xet_too(hub, base, tmp_path, monkeypatch):
    """Its upload_folder would then try again with fewer and fewer files a commit."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.fail_next(f"POST .*/{PRESET}/commit/", 500)
    with pytest.raises(StepFlowFileError, match="could not be pushed"):
        pushed(hub, tmp_path)
    assert len(hub.asked(f"POST .*/{PRESET}/commit/")) == 1
    pushed(hub, tmp_path)
    assert len(hub.repos[PRESET].commits) == 2


def test_a_merge_leaves_no_shards_of_another_model(hub, base, tmp_path):
    pushed(hub, tmp_path, merge_weights=True)
    files = hub.repos[PRESET].files
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        hub.api().upload_file(repo_id=PRESET, path_in_repo=name, path_or_fileobj=b"{}")
    pushed(hub, tmp_path, merge_weights=True)
    assert hub.repos[PRESET].files == files


def test_weights_that_break_off_are_completed_by_the_next_push(hub, base, tmp_path):
    hub.fail_next(f"PUT /storage/{PRESET}/", times=6)
    with pytest.raises(StepFlowFileError, match=r"could not be pushed: Error while uploading 'model\.safetensors'"):
        pushed(hub, tmp_path, merge_weights=True)
    assert list(hub.repos[PRESET].files) == [".gitattributes"]
    pushed(hub, tmp_path, merge_weights=True)
    assert hub.repos[PRESET].files["model.safetensors"] == hub.repos[BASE].files["model.safetensors"]
    assert len(hub.repos[PRESET].commits) == 2


def test_weights_are_merged_from_a_cache_that_shares_them(hub, base, tmp_path):
    """A download from Xet storage is a file that all repositories of the cache share, behind two links."""
    fetched = Path(hub.api().hf_hub_download(BASE, "model.safetensors"))
    blob = fetched.resolve()
    shared = Path(constants.HF_HUB_CACHE) / "blobs" / blob.name[:2] / blob.name
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    pushed(hub, tmp_path, merge_weights=True)
    assert hub.repos[PRESET].files["model.safetensors"] == hub.repos[BASE].files["model.safetensors"]
