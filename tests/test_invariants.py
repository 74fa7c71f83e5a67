"""What holds however StepFlow is used: off means off, other models stay untouched, nothing large is ever built."""

import copy
import io
import pickle
import threading

import pytest
import torch
from flow_support import TRACES, byte_tokenizer, encode
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM

from hf_stepflow import StepFlowConfig, StepFlowModelForCausalLM
from hf_stepflow.runtime import flow_attention
from hf_stepflow.runtime.errors import StepFlowUnsupportedError

SETTINGS = {"oeb_layers": [0, 1], "smi_layers": [2, 3], "tau_max": 0.4, "alpha": 0.3}
IDS = torch.tensor([encode(TRACES[0])])


def attach(model, settings=SETTINGS):
    return StepFlowModelForCausalLM.attach(model, settings, tokenizer=byte_tokenizer())


@torch.no_grad()
def logits(model, **how):
    return model(IDS, **how).logits


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("llama", "sdpa"), ("llama", "eager"), ("gpt_oss", "eager"), ("gemma3_text", "sdpa")],
)
def test_off_means_off(family, implementation):
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    expected = logits(model)
    generated = model.generate(IDS[:, :60], max_new_tokens=8, do_sample=False)
    attach(model)
    changed = logits(model)
    assert not torch.equal(changed, expected)
    with model.disable_stepflow():
        assert torch.equal(logits(model), expected)
    assert torch.equal(model.generate(IDS[:, :60], max_new_tokens=8, do_sample=False, stepflow=False), generated)
    none = {"tau_max": 0, "alpha": 0}
    assert torch.equal(model.generate(IDS[:, :60], max_new_tokens=8, do_sample=False, stepflow=none), generated)
    model.stepflow_config = {**SETTINGS, **none}
    assert torch.equal(logits(model), expected)
    model.stepflow_config = SETTINGS
    assert torch.equal(logits(model), changed)
    assert torch.equal(logits(model.detach_stepflow()), expected)


def test_layers_outside_the_bands_run_the_base_kernel(monkeypatch):
    model = attach(tiny_model("llama"), {"oeb_layers": [1], "smi_layers": [3]})
    calls = []
    kernel = flow_attention.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, *rest, **named):
        calls.append((module.layer_idx, sorted(named)))
        return kernel(module, *rest, **named)

    monkeypatch.setitem(flow_attention.ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    output = model(IDS[:, :60])
    calls.clear()
    model(IDS[:, 60:61], past_key_values=output.past_key_values)
    assert [layer for layer, _ in calls] == [0, 2, 3]
    assert not any("stepflow_pass" in names for _, names in calls)
    calls.clear()
    model(IDS[:, :10])  # a prefill without thinking
    assert [layer for layer, _ in calls] == [0, 1, 2, 3]


def test_detach_restores_everything():
    model = tiny_model("llama")
    before = (type(model), model.config._attn_implementation, set(model.__dict__), model.generation_config.to_dict())
    modules = {name: set(module.__dict__) for name, module in model.named_modules()}
    attach(model)
    assert isinstance(model, StepFlowModelForCausalLM)
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    logits(model)
    assert model.detach_stepflow() is model
    assert (
        type(model), model.config._attn_implementation, set(model.__dict__), model.generation_config.to_dict()
    ) == before  # fmt: skip
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == modules
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    attach(model).detach_stepflow()


def test_another_model_is_untouched_even_with_the_same_config_object():
    config = tiny_model("llama").config
    torch.manual_seed(0)
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    expected = logits(other)
    attach(one)
    assert torch.equal(logits(other), expected)
    stop = threading.Event()
    wrong = []

    def run_other():
        while not stop.is_set():
            if not torch.equal(logits(other), expected):
                wrong.append(1)

    thread = threading.Thread(target=run_other)
    thread.start()
    for _ in range(5):
        logits(one)
    stop.set()
    thread.join()
    assert not wrong
    one.detach_stepflow()
    assert torch.equal(logits(other), expected)


def test_threads_have_their_own_settings():
    model = attach(tiny_model("llama"))
    variants = [{"tau_max": 0.4, "alpha": 0.0}, {"tau_max": 0.0, "alpha": 0.5}, {"tau_max": 0.9, "alpha": 0.1}, False]

    def run(stepflow):
        arguments = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return torch.cat(model.generate(IDS[:, :80], stepflow=stepflow, **arguments).logits)

    alone = [run(stepflow) for stepflow in variants]
    together = [None] * len(variants)

    def work(index):
        together[index] = run(variants[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(variants))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, (first, second) in enumerate(zip(alone, together, strict=True)):
        assert torch.equal(first, second), variants[index]
    assert not torch.equal(alone[0], alone[1])


class Largest(TorchDispatchMode):
    """The number of elements of the largest floating-point tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.elements = max(self.elements, value.numel())
        return result


def test_no_square_tensor_and_no_key_copy_per_head(monkeypatch):
    length, heads, kv_heads, width = 2048, 4, 2, 16
    monkeypatch.setattr(flow_attention, "_CHUNK_ELEMENTS", 1 << 17)
    model = attach(tiny_model("llama", max_position_embeddings=4096), {**SETTINGS, "smi_layers": "none"})
    text = "Q" * 300 + "<think>" + "We add the next number here. " * 60
    ids = torch.tensor([encode(text)[:length]])
    with torch.no_grad(), Largest() as seen:
        cache = model(ids, past_key_values=DynamicCache(), logits_to_keep=1).past_key_values
    assert seen.elements < length * length  # less than one head's square, let alone all of them
    with torch.no_grad(), Largest() as seen:
        model(ids[:, :1], past_key_values=cache)
    assert seen.elements <= kv_heads * (length + 1) * width < heads * length * width


def test_decode_reads_the_host_once(monkeypatch):
    model = attach(tiny_model("llama"))
    cache = model(IDS[:, :60]).past_key_values
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, real=real: reads.append(self.numel()) or real(self, *args)
        )
    monkeypatch.setattr("hf_stepflow.runtime.flow_attention.decode_attention", lambda *args, **kwargs: None)
    model(IDS[:, 60:61], past_key_values=cache)
    assert reads == [1]


def test_copies_and_pickles():
    model = attach(tiny_model("llama"))
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    twin.detach_stepflow()
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), expected)


def test_settings_are_saved_with_the_model(tmp_path):
    model = attach(tiny_model("llama"), {**SETTINGS, "sink_tokens": 2})
    expected = logits(model)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    again = StepFlowModelForCausalLM.from_pretrained(tmp_path)
    assert again.stepflow_config.sink_tokens == 2
    assert torch.equal(logits(again), expected)
    other = StepFlowModelForCausalLM.from_pretrained(tmp_path, stepflow=StepFlowConfig(tau_max=0.0, alpha=0.0))
    assert other.stepflow_config.tau_max == 0
    assert not torch.equal(logits(other), expected)


def test_settings_of_a_call():
    model = attach(tiny_model("llama"))
    arguments = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def run(**how):
        return torch.cat(model.generate(IDS[:, :80], **arguments, **how).logits)

    preset = run()
    stronger = run(stepflow={"tau_max": 0.9})
    assert not torch.equal(preset, stronger)
    assert torch.equal(run(), preset)
    assert torch.equal(run(generation_config=GenerationConfig(stepflow={"tau_max": 0.9})), stronger)
    model.generation_config.stepflow = {**model.generation_config.stepflow, "tau_max": 0.9}
    assert torch.equal(run(), stronger)
    assert torch.equal(run(stepflow={"tau_max": 0.4}), preset)


def test_gradients():
    model = attach(tiny_model("llama", dtype=torch.float64))
    embeddings = model.get_input_embeddings().weight

    def loss():
        return torch.nn.functional.cross_entropy(model(IDS).logits[0, :-1], IDS[0, 1:])

    loss().backward()
    slope = embeddings.grad[IDS[0, 5]].clone()
    assert torch.isfinite(embeddings.grad).all()
    step = 1e-4  # norms are computed in float32, so a smaller one would measure rounding
    with torch.no_grad():
        direction = slope / slope.norm()
        embeddings[IDS[0, 5]] += step * direction
        up = loss()
        embeddings[IDS[0, 5]] -= 2 * step * direction
        down = loss()
    assert float((up - down) / (2 * step)) == pytest.approx(float(slope.norm()), rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    expected = logits(attach(tiny_model("llama")))
    got = logits(attach(tiny_model("llama", dtype=dtype))).float()
    plain = logits(tiny_model("llama", dtype=dtype)).float()
    noise = (plain - logits(tiny_model("llama"))).norm()
    assert (got - expected).norm() < 2 * noise


def test_dropout_is_refused():
    model = attach(tiny_model("llama", attention_dropout=0.1))
    model.train()
    with pytest.raises(StepFlowUnsupportedError, match=r"dropout=0\.1"):
        model(IDS)
    model.eval()
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_attention_weights_are_the_intervened_ones(family):
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    base = model(IDS, output_attentions=True).attentions
    attach(model, {**SETTINGS, "tau_max": 0.9, "alpha": 0.0})
    output = model(IDS, output_attentions=True)
    weights = output.attentions[0]
    assert weights.shape == base[0].shape
    assert torch.allclose(weights.sum(-1), base[0].sum(-1), atol=1e-5)
    assert not torch.allclose(weights, base[0], atol=1e-3)
    cache = model(IDS[:, :-1], output_attentions=True).past_key_values
    last = model(IDS[:, -1:], past_key_values=cache, output_attentions=True).attentions[0]
    assert torch.allclose(last[:, :, 0], weights[:, :, -1, -last.shape[-1] :], atol=1e-5)


def test_lora_over_an_attached_model():
    model = attach(tiny_model("llama"))
    expected = logits(model)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
    adapted = tuned(IDS).logits
    assert not torch.allclose(adapted, expected)
    with tuned.disable_adapter():
        assert torch.allclose(tuned(IDS).logits, expected, atol=1e-6)
    assert torch.allclose(tuned.merge_and_unload()(IDS).logits, adapted, atol=1e-4)
    assert model.stepflow_report().rows[0].layers


def test_report():
    model = attach(tiny_model("llama"))
    model(IDS)
    report = model.stepflow_report()
    assert report.to_dict()["rows"][0]["steps"][0]["label"] == "question"
    layers = {layer.layer: layer for layer in report.rows[0].layers}
    assert list(layers) == [0, 1, 2, 3]
    assert layers[0].mass_after > layers[0].mass_before > 0
    assert 0 < layers[0].bridged_share < 1
    assert layers[2].injections == layers[3].injections == 4  # thinking steps 2, 3, 4 and the summary's first
    text = str(report)
    assert "Yes it is right." in text
    assert "heads bridged" in text
