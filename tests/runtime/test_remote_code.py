"""An exported preset where hf_stepflow is not installed: transformers alone loads it, and gives the same logits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.hub.export import export_custom_generate, export_preset
from tests.support.flow import SHORT_TEXT, TRACES, batch, byte_tokenizer, encode
from tests.support.hub_models import SETTINGS, bare_environment, run_script, save_base, strong_preset

SCRIPT = """
import importlib.util, json, pickle, sys, threading
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, TextStreamer, pipeline

preset, merged, generate, folder = sys.argv[1:]
assert importlib.util.find_spec("hf_stepflow") is None
assert importlib.util.find_spec("peft") is None
torch.set_num_threads(1)
given, out, told = load_file(f"{folder}/given.safetensors"), {}, {}

try:
    AutoModelForCausalLM.from_pretrained(preset, trust_remote_code=False)
except ValueError as error:
    told["refusal"] = str(error)
config = AutoConfig.from_pretrained(preset, trust_remote_code=True)
told["config"] = [config.model_type, config.vocab_size, config.max_position_embeddings, config.tau_max]
tokenizer = AutoTokenizer.from_pretrained(preset, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(preset, trust_remote_code=True, attn_implementation="eager")
told["model"] = [type(model).__name__, model.config.model_type, type(tokenizer).__module__.split(".")[0]]
try:
    AutoModelForCausalLM.from_config(config, trust_remote_code=True)
except NotImplementedError as error:
    told["shell"] = str(error)
try:
    AutoModelForCausalLM.from_pretrained(preset, trust_remote_code=True, stepflow="qwen3-8b")
except ValueError as error:
    told["preset"] = str(error)
with torch.no_grad():
    out["row"] = model(given["row"]).logits
    out["batch"] = model(given["batch"], attention_mask=given["mask"]).logits
    out["half"] = AutoModelForCausalLM.from_pretrained(
        preset, trust_remote_code=True, dtype=torch.bfloat16, config=config
    )(given["row"]).logits
told["report"] = str(model.stepflow_report())
model.save_pretrained(f"{folder}/again", preset_only=True)
model.save_pretrained(f"{folder}/whole")
with torch.no_grad():
    for name, path in (("whole", f"{folder}/whole"), ("merged", merged)):
        loaded = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, attn_implementation="eager")
        out[name] = loaded(given["row"]).logits
        plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        assert not hasattr(plain, "stepflow_runtime")
        out[f"{name} plain"] = plain(given["row"]).logits
plain.name_or_path = ""
with torch.no_grad():
    before = plain(given["row"]).logits
    settings = {name: getattr(config, name) for name in model.stepflow_config.settings.to_dict()} | {
        "base_model_name_or_path": None
    }
    asked = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    call = {"custom_generate": generate, "trust_remote_code": True, "stepflow": settings, "tokenizer": tokenizer}
    out["custom"] = torch.cat(plain.generate(given["row"], **asked, **call).logits)
    out["generate"] = torch.cat(model.generate(given["row"], **asked).logits)
    assert torch.equal(plain(given["row"]).logits, before)

pipe = pipeline("text-generation", model=preset, trust_remote_code=True)
greedy = {"max_new_tokens": 12, "do_sample": False}
told["single"] = pipe("Two eggs?<think>", **greedy)[0]["generated_text"]
told["chat"] = pipe([{"role": "user", "content": "Two eggs?"}], **greedy)[0]["generated_text"]
rows = pipe(["Two eggs?<think>", "Hi.<think>"], batch_size=2, **greedy)
told["rows"] = [row[0]["generated_text"] for row in rows]
inputs = tokenizer("Two eggs?<think>", return_tensors="pt", add_special_tokens=False)
pipe.model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_prompt=True))
streamer = TextIteratorStreamer(tokenizer)
thread = threading.Thread(target=pipe.model.generate, kwargs={**inputs, "streamer": streamer})
thread.start()
told["streamed"] = "".join(streamer)
thread.join()
# Of the first model that a process loads, transformers makes the class a subclass of the repository's.
with torch.no_grad():
    detached = [pickle.loads(pickle.dumps(model)).detach_stepflow(), model.detach_stepflow()]
    told["detached"] = [f"{type(each).__module__}.{type(each).__name__}" for each in detached]
    out["detached"] = torch.cat([each(given["row"]).logits for each in detached])
save_file({name: value.contiguous() for name, value in out.items()}, f"{folder}/out.safetensors")
print("TOLD" + json.dumps(told))
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """What the script saw, and what there is here in its place."""
    folder = tmp_path_factory.mktemp("bare")
    base = save_base(folder / "base")
    preset = strong_preset(folder)
    export_preset(preset, folder / "preset", base=base)
    export_preset(preset, folder / "merged", base=base, merge_weights=True)
    export_custom_generate(folder / "generate")
    ids, mask = batch(list(TRACES[:3]))
    given = {"row": torch.tensor([encode(SHORT_TEXT)]), "batch": ids, "mask": mask}
    from safetensors.torch import save_file

    save_file(given, folder / "given.safetensors")
    printed = run_script(
        bare_environment(folder / "venv"), SCRIPT, folder / "home",
        folder / "preset", folder / "merged", folder / "generate", folder,
    )  # fmt: skip
    told = json.loads(printed.rsplit("TOLD", 1)[1])
    return folder, given, load_file(folder / "out.safetensors"), told


def attached(base, **options):
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", **options)
    return StepFlowModelForCausalLM.attach(model, SETTINGS, tokenizer=byte_tokenizer())


@torch.no_grad()
def test_the_logits_are_those_of_attach(bare):
    folder, given, out, _ = bare
    model = attached(folder / "base")
    row = model(given["row"]).logits
    for name in ("row", "whole", "merged"):
        assert torch.equal(out[name], row), name
    assert torch.equal(out["batch"], model(given["batch"], attention_mask=given["mask"]).logits)
    with model.disable_stepflow():
        plain = model(given["row"]).logits
    assert not torch.equal(plain, row)
    assert torch.equal(out["whole plain"], plain)
    assert torch.equal(out["merged plain"], plain)
    assert torch.equal(out["detached"], torch.cat([plain, plain]))
    half = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    half = StepFlowModelForCausalLM.attach(half, SETTINGS, tokenizer=byte_tokenizer())
    assert torch.equal(out["half"], half(given["row"]).logits)
    asked = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    assert torch.equal(out["generate"], torch.cat(model.generate(given["row"], **asked).logits))
    assert torch.equal(out["custom"], out["generate"])


def test_what_is_refused_there(bare):
    *_, told = bare
    assert "trust_remote_code=True" in told["refusal"]
    assert "not made from a config" in told["shell"]
    assert "AutoModelForCausalLM.from_pretrained" in told["shell"]
    assert "hf_stepflow package, which is not installed here" in told["preset"]


def test_what_is_loaded_there(bare):
    *_, told = bare
    assert told["config"] == ["stepflow", 320, 512, SETTINGS.tau_max]
    assert told["model"] == ["LlamaForCausalLM", "llama", "transformers"]
    assert "steps" in told["report"]
    assert told["detached"] == ["transformers.models.llama.modeling_llama.LlamaForCausalLM"] * 2


def test_pipelines_and_streams_there(bare):
    folder, _, _, told = bare
    model = StepFlowModelForCausalLM.from_pretrained(folder / "base", stepflow=SETTINGS)
    tokenizer = model.stepflow_runtime.tokenizer

    def written(text):
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        return tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True)

    assert told["single"].replace("<think>", "") == written("Two eggs?<think>")
    assert told["chat"][-1]["role"] == "assistant"
    assert "Two eggs?" + told["chat"][-1]["content"] == written("Two eggs?<think>")
    assert [row.replace("<think>", "") for row in told["rows"]] == [
        written("Two eggs?<think>"), written("Hi.<think>"),
    ]  # fmt: skip
    assert told["streamed"].replace("<think>", "").startswith(written("Two eggs?<think>"))


def test_what_is_saved_there_is_what_was_exported(bare):
    folder, *_ = bare
    exported = {file.name: file.read_bytes() for file in (folder / "preset").iterdir()}
    again = {file.name: file.read_bytes() for file in (folder / "again").iterdir()}
    del exported["README.md"]
    assert again == exported
