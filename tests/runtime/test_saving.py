"""Saving: whole models that load on their own, presets alone, checkpoints of training, adapters; all of it exact."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Trainer, TrainingArguments

from hf_stepflow import StepFlowConfig, StepFlowModelForCausalLM, load_preset
from hf_stepflow.hub.export import export_preset
from hf_stepflow.runtime import repository
from hf_stepflow.runtime.configuration_stepflow import read_settings
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowFileError, StepFlowInputError
from hf_stepflow.runtime.settings import StepFlowSettings
from tests.support.flow import SHORT_TEXT, VARIANTS, attach, byte_tokenizer, encode
from tests.support.hub_models import SETTINGS, save_base, strong_preset
from tests.support.tiny_models import tiny_model

IDS = torch.tensor([encode(SHORT_TEXT)])


def contents(folder) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    found = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    if b"tokenizer_class" in found.get("tokenizer_config.json", b""):
        data = json.loads(found["tokenizer_config.json"])
        for name in ("is_local", "local_files_only"):  # how transformers came by the tokenizer
            data.pop(name, None)
        found["tokenizer_config.json"] = json.dumps(data).encode()
    return found


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base model, a preset for it, and the preset's export."""
    folder = tmp_path_factory.mktemp("home")
    save_base(folder / "base")
    export_preset(strong_preset(folder), folder / "preset", base=folder / "base")
    return folder


# Whole models


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma3_text"])
def test_a_whole_model_loads_on_its_own(tmp_path, family):
    """Gemma ties its weights, GPT-OSS converts them; both ways of loading, and the base without StepFlow."""
    options = {"experts_implementation": "eager"} if family == "gpt_oss" else {}
    model = attach(tiny_model(family), "step")
    expected = logits(model)
    model.save_pretrained(tmp_path / "one")
    for load in (loaded, StepFlowModelForCausalLM.from_pretrained):
        again = load(tmp_path / "one", **options)
        assert torch.equal(logits(again), expected)
        assert read_settings(again.stepflow_config) == model.stepflow_config.settings == VARIANTS["step"]
        again.save_pretrained(tmp_path / "two")
        assert contents(tmp_path / "two") == contents(tmp_path / "one")
        assert not hasattr(again.config, "auto_map")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "one", **options)
    assert type(plain) is type(model.detach_stepflow())
    assert torch.equal(logits(plain), logits(model))
    assert torch.equal(logits(attach(plain, "step")), expected)
    assert not [name for name in contents(tmp_path / "one") if name.endswith((".bin", ".pt", ".pkl"))]


ASKED = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}


def generated(model, *args, **options) -> torch.Tensor:
    return torch.cat(model.generate(*(args or (IDS,)), **ASKED, **options).logits)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether logits are equal, but for the order of sums, which depends on where the weights lie in memory."""
    return torch.allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_class_of_transformers_generates_with_stepflow(tmp_path, family):
    """A saved model brings its own `generate`, so a class that knows no auto_map does not drop StepFlow from it."""
    model = attach(tiny_model(family), "step")
    model.save_pretrained(tmp_path)
    expected, weak = generated(model), generated(model, stepflow={"tau_max": 0.1})
    plain = type(model.detach_stepflow())
    base = generated(model)
    assert not same(expected, base)
    assert not same(expected, weak)

    own = plain.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(own) is plain
    assert same(generated(own), expected)
    assert same(torch.cat(own.generate(input_ids=IDS, **ASKED).logits), expected)
    assert same(generated(own, IDS, GenerationConfig(eos_token_id=None), stepflow=True), expected)
    assert same(generated(own, stepflow={"tau_max": 0.1}), weak)  # merged over what was saved
    assert same(generated(own, stepflow=False), base)
    off = GenerationConfig(stepflow=False)
    assert same(generated(own, generation_config=off), base)
    # The forward of such a model is the base's, as docs/hub.md says; attaching puts StepFlow on it too.
    assert same(logits(own), logits(model))
    attached = StepFlowModelForCausalLM.attach(own)
    assert same(generated(attached), expected)
    assert same(generated(attached, stepflow=False), base)
    assert same(logits(attached), logits(attach(model, "step")))

    # Without trust none of the code runs; with the class of the repository it is that class's own `generate`.
    assert same(generated(plain.from_pretrained(tmp_path)), base)
    for load in (loaded, StepFlowModelForCausalLM.from_pretrained):
        again = load(tmp_path)
        assert "generate" not in vars(again)
        assert same(generated(again), expected)


def test_every_copy_of_the_code_writes_the_same_generate(home, tmp_path):
    """The copy in a preset repository has no file of that name."""
    assert (Path(repository.__file__).with_name("generate.py")).read_text() == repository.GENERATE
    assert not (home / "preset" / "generate.py").exists()
    loaded(home / "preset").save_pretrained(tmp_path / "there")
    StepFlowModelForCausalLM.from_pretrained(home / "preset").save_pretrained(tmp_path / "here")
    here, there = (os.listdir(tmp_path / name / "custom_generate") for name in ("here", "there"))
    assert sorted(here) == sorted(there)
    assert "generate.py" in here
    kind = type(AutoModelForCausalLM.from_pretrained(home / "base"))
    own = kind.from_pretrained(tmp_path / "there", trust_remote_code=True)
    assert same(generated(own), generated(loaded(home / "preset")))


def test_a_detached_model_is_saved_as_what_it_is(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "before")
    attach(model, "paper").save_pretrained(tmp_path / "attached")
    model.detach_stepflow().save_pretrained(tmp_path / "after")
    assert contents(tmp_path / "after") == contents(tmp_path / "before")
    again = StepFlowModelForCausalLM.from_pretrained(tmp_path / "attached").detach_stepflow()
    again.save_pretrained(tmp_path / "later")
    assert b"auto_map" not in (tmp_path / "later" / "config.json").read_bytes()


def test_shards(tmp_path):
    model = attach(tiny_model("llama"), "paper")
    model.save_pretrained(tmp_path, max_shard_size="100kB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(logits(loaded(tmp_path)), logits(model))


def test_settings_that_were_changed_are_saved_as_they_are_in_force(tmp_path):
    model = attach(tiny_model("llama"), VARIANTS["paper"].replace(base_model_name_or_path="org/Tiny"))
    model.generation_config.stepflow = {"tau_max": 0.2}
    model.save_pretrained(tmp_path)
    assert model.generation_config.stepflow == {"tau_max": 0.2}
    assert read_settings(loaded(tmp_path).stepflow_config) == VARIANTS["paper"].replace(tau_max=0.2)
    model.stepflow_config = VARIANTS["heads"]
    model.save_pretrained(tmp_path)
    assert read_settings(loaded(tmp_path).stepflow_config) == VARIANTS["heads"]


def test_the_tokenizer_is_saved_where_there_is_none(tmp_path):
    model = attach(tiny_model("llama"), "paper")
    (tmp_path / "own").mkdir()
    tokenizer = AutoTokenizer.from_pretrained(save_base(tmp_path / "base"))
    tokenizer.add_tokens("<extra>")
    tokenizer.save_pretrained(tmp_path / "own")
    kept = (tmp_path / "own" / "tokenizer.json").read_bytes()
    model.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "tokenizer.json").read_bytes() == kept
    model.save_pretrained(tmp_path / "without")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "without")) == len(byte_tokenizer())


def test_a_model_with_code_of_its_own_keeps_it(tmp_path):
    """What its folder loads with trust_remote_code is its own class; StepFlow is put on it from outside."""
    code = tmp_path / "source"
    tiny_model("llama").save_pretrained(code)
    (code / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    data = json.loads((code / "config.json").read_text())
    data["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (code / "config.json").write_text(json.dumps(data))
    model = attach(loaded(code), "paper")
    assert type(model).__name__ == "OwnForCausalLM"
    if not type(model).is_remote_code():
        pytest.skip("this release of transformers does not save code that it loaded")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_own.py").is_file()
    assert not (tmp_path / "saved" / "modeling_stepflow.py").exists()
    assert not hasattr(loaded(tmp_path / "saved"), "stepflow_runtime")
    again = StepFlowModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(again).__name__ == "OwnForCausalLM"
    assert torch.equal(logits(again), logits(model))


def test_nothing_of_the_call_is_written(home, tmp_path):
    model = loaded(home / "preset", token="hf_verysecret", cache_dir=tmp_path / "cachehere")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "preset", preset_only=True)
    for folder, secrets in (
        ("whole", ["verysecret", "cachehere", str(home)]),
        ("preset", ["verysecret", "cachehere"]),
    ):
        for file in filter(Path.is_file, (tmp_path / folder).rglob("*")):
            assert not [text for text in secrets if text.encode() in file.read_bytes()], file


# Presets


def test_a_preset_alone(home, tmp_path):
    model = loaded(home / "preset")
    model.save_pretrained(tmp_path / "one", preset_only=True)
    exported = contents(home / "preset")
    del exported["README.md"]
    assert contents(tmp_path / "one") == exported
    again = loaded(tmp_path / "one")
    assert torch.equal(logits(again), logits(model))
    assert load_preset(tmp_path / "one").provenance == load_preset(home / "tiny.json").provenance

    # Other settings are no longer those that the provenance speaks of.
    model.generation_config.stepflow = {"tau_max": 0.1}
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(tmp_path / "one", preset_only=True)
    preset = load_preset(tmp_path / "one")
    assert (preset.kind, preset.settings.tau_max) == ("unstated", 0.1)
    again = loaded(tmp_path / "one")
    assert again.generation_config.max_new_tokens == 77
    assert torch.equal(logits(again), logits(attach(again.detach_stepflow(), SETTINGS.replace(tau_max=0.1))))


def test_a_preset_of_an_attached_model_names_its_base(home, tmp_path, caplog, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    StepFlowModelForCausalLM.attach(model, home / "tiny.json")
    model.save_pretrained(tmp_path / "one", preset_only=True)
    assert load_preset(tmp_path / "one").base_model == str(home / "base")
    with pytest.raises(StepFlowInputError, match="folder of this machine"):
        model.push_to_hub("org/one", preset_only=True)
    nameless = attach(tiny_model("llama"), "paper")
    with pytest.raises(StepFlowInputError, match=r"names its base model.*\n.*base_model_name_or_path"):
        nameless.save_pretrained(tmp_path / "two", preset_only=True)
    assert not (tmp_path / "two").exists()


def test_a_preset_takes_no_models_place(home, tmp_path):
    model = loaded(home / "preset")
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(OSError, match=r"holds weights \(model.safetensors\)"):
        model.save_pretrained(tmp_path, preset_only=True)
    assert contents(tmp_path) == before
    model.save_pretrained(tmp_path / "preset", preset_only=True)
    model.save_pretrained(tmp_path / "preset")  # the other way round nothing is lost
    assert torch.equal(logits(loaded(tmp_path / "preset")), logits(model))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "preset")) == len(byte_tokenizer())


def test_arguments_of_loading_reach_the_base(home):
    model = loaded(home / "preset", dtype="bfloat16", attn_implementation="eager", max_position_embeddings=99)
    assert model.dtype == torch.bfloat16
    assert model.stepflow_runtime.base_implementation == "eager"
    assert model.config.max_position_embeddings == 99
    assert loaded(home / "preset", device_map="meta").device.type == "meta"
    model, info = loaded(home / "preset", output_loading_info=True)
    assert info["missing_keys"] == set()
    assert model.stepflow_config.settings.tau_max == SETTINGS.tau_max
    with pytest.raises(TypeError, match="no_such"):
        loaded(home / "preset", no_such=1)
    assert loaded(home / "preset", tau_max=0.1).stepflow_config.tau_max == 0.1
    model = StepFlowModelForCausalLM.from_pretrained(home / "preset", stepflow={"alpha": 0.1})
    assert model.stepflow_config.settings == read_settings(loaded(home / "preset", alpha=0.1).stepflow_config)
    config = StepFlowConfig.from_pretrained(home / "preset", dtype="float64")
    config.rope_parameters = {"rope_type": "default", "rope_theta": 77.0}
    model = StepFlowModelForCausalLM.from_pretrained(home / "preset", config=config)
    assert (model.dtype, model.config.rope_parameters["rope_theta"]) == (torch.float64, 77.0)
    whole = StepFlowModelForCausalLM.from_pretrained(home / "base", attn_implementation="eager", dtype="float64")
    assert (whole.dtype, whole.stepflow_runtime.base_implementation) == (torch.float64, "eager")


def test_presets_that_lead_nowhere(home, tmp_path):
    def changed(**fields):
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        for file in (home / "preset").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        data = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(data))
        return folder

    load = StepFlowModelForCausalLM.from_pretrained
    with pytest.raises(StepFlowConfigError, match="names no base model"):
        load(changed(base_model_name_or_path=None))
    with pytest.raises(StepFlowConfigError, match="is a StepFlow preset itself"):
        load(changed(base_model_name_or_path=str(home / "preset")))
    with pytest.raises(StepFlowFileError, match=r"base model 'org/nowhere' of the preset.*could not be loaded"):
        load(changed(base_model_name_or_path="org/nowhere"))
    with pytest.raises(StepFlowConfigError, match="tau_max"):
        load(changed(tau_max=7))
    for make in (StepFlowModelForCausalLM, StepFlowModelForCausalLM._from_config):
        with pytest.raises(NotImplementedError, match="not made from a config"):
            make(StepFlowConfig())


def test_the_preset_goes_over_the_generation_config_of_its_base(home, tmp_path):
    folder = tmp_path / "preset"
    loaded(home / "preset").save_pretrained(folder, preset_only=True)
    data = json.loads((folder / "generation_config.json").read_text())
    assert (data["max_new_tokens"], data["stepflow"]["tau_max"]) == (12, SETTINGS.tau_max)
    data |= {"temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(data))
    config = loaded(folder).generation_config
    assert (config.temperature, config.do_sample, config.eos_token_id) == (0.6, True, 2)
    assert GenerationConfig.from_pretrained(folder).stepflow == config.stepflow


# Training


def test_checkpoints_of_a_trainer(tmp_path):
    def trainer(model, **options):
        arguments = TrainingArguments(
            str(tmp_path / "run"), per_device_train_batch_size=2, max_steps=4, save_steps=2, learning_rate=1e-3,
            report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=0, **options,
        )  # fmt: skip
        rows = [{"input_ids": encode(SHORT_TEXT)[:48], "labels": encode(SHORT_TEXT)[:48]} for _ in range(8)]
        return Trainer(model, arguments, train_dataset=rows)

    model = attach(tiny_model("llama"), "paper")
    before = logits(model)
    trainer(model).train()
    trained = logits(model)
    assert not torch.equal(trained, before)
    for folder in (tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "checkpoint-2"):
        again = loaded(folder)
        assert read_settings(again.stepflow_config) == VARIANTS["paper"]
        assert torch.equal(logits(again), trained) is (folder.name == "checkpoint-4")
    other = attach(tiny_model("llama"), "paper")
    trainer(other).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(logits(other), trained)
    # From the checkpoint's own folder too, which its model was loaded from.
    third = loaded(tmp_path / "run" / "checkpoint-2")
    trainer(third).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(logits(third), trained)


# Adapters


def adapted(model):
    """A LoRA on a model, with weights that show."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return wrapped


@pytest.fixture(scope="module")
def adapter(home):
    """An adapter that was trained on the base without StepFlow."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted(AutoModelForCausalLM.from_pretrained(home / "base")).save_pretrained(home / "adapter")
    return home / "adapter"


def test_an_adapter_over_an_attached_model(home, tmp_path):
    peft = pytest.importorskip("peft")
    model = loaded(home / "preset")
    without = logits(model)
    wrapped = adapted(model)
    expected = logits(wrapped)
    assert not torch.equal(expected, without)
    wrapped.save_pretrained(tmp_path / "adapter")
    data = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert data["base_model_name_or_path"] == str(home / "base")
    again = peft.PeftModel.from_pretrained(loaded(home / "preset"), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)

    merged = wrapped.merge_and_unload()
    assert isinstance(merged, type(model))
    expected = logits(merged)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded(tmp_path / "merged")), expected)
    assert not torch.equal(expected, without)


def test_an_adapter_of_the_base_on_an_attached_model(home, adapter):
    peft = pytest.importorskip("peft")
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), adapter)
    StepFlowModelForCausalLM.attach(wrapped.get_base_model(), SETTINGS)
    expected = logits(wrapped)
    for model in (loaded(home / "preset"), StepFlowModelForCausalLM.from_pretrained(home / "base", stepflow=SETTINGS)):
        without = logits(model)
        assert torch.equal(logits(peft.PeftModel.from_pretrained(model, adapter)), expected)
        assert not torch.equal(expected, without)
    model = loaded(home / "preset")
    model.load_adapter(str(adapter))
    assert torch.equal(logits(model), expected)


def test_a_preset_whose_base_is_an_adapter(home, adapter, tmp_path):
    pytest.importorskip("peft")
    export_preset(home / "tiny.json", tmp_path / "preset", base=adapter)
    model = loaded(tmp_path / "preset")
    direct = loaded(home / "preset")
    direct.load_adapter(str(adapter))
    assert torch.equal(logits(model), logits(direct))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "preset", trust_remote_code=True)) == len(byte_tokenizer())
    model.save_pretrained(tmp_path / "again", preset_only=True)
    assert load_preset(tmp_path / "again").base_model == str(adapter)
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(model))


def test_settings_of_a_block_hold_in_generate():
    model = attach(tiny_model("llama"), "paper")
    asked = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    weak = torch.cat(model.generate(IDS[:, :30], stepflow={"tau_max": 0.1}, **asked).logits)
    with model.use_stepflow({"tau_max": 0.1}):
        inside = torch.cat(model.generate(IDS[:, :30], **asked).logits)
    assert torch.equal(inside, weak)
    model.generation_config.stepflow = {"alpha": 0.1}
    both = torch.cat(model.generate(IDS[:, :30], stepflow={"tau_max": 0.1}, **asked).logits)
    with model.use_stepflow({"tau_max": 0.1}):
        assert torch.equal(torch.cat(model.generate(IDS[:, :30], **asked).logits), both)
    assert not torch.equal(both, weak)
    assert isinstance(model.stepflow_config.settings, StepFlowSettings)
