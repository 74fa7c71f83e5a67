"""What holds whatever is asked: off is off, nothing outside the model changes, and memory and host reads stay bounded."""

import copy
import io
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from flow_support import IMPLEMENTATIONS, VARIANTS, Script, attach, attached, batch, byte_tokenizer, encode, error
from tiny_models import tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.runtime import flow_attention, flow_masks
from hf_stepflow.runtime.errors import StepFlowError, StepFlowInputError, StepFlowUnsupportedError

TEXT = "Two eggs?<think>Add one. Then two.\n\nSo now.</think>Two.\n\nBye."
IDS = torch.tensor([encode(TEXT)])
PROMPT = torch.tensor([encode("Two eggs?<think>Add one. Th")])
OFF = VARIANTS["paper"].replace(tau_max=0.0, alpha=0.0)


def run(model, ids: torch.Tensor = IDS, **options) -> torch.Tensor:
    """Logits of a teacher-forced pass and of a token-by-token one, after each other."""
    with torch.no_grad():
        logits = [model(ids, use_cache=False, **options).logits[0]]
        cache = DynamicCache(config=model.config)
        for slot in range(ids.shape[1]):
            logits.append(model(ids[:, slot : slot + 1], past_key_values=cache, **options).logits[0])
    return torch.cat(logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_off_is_the_base_model_bit_for_bit(family: str, implementation: str) -> None:
    implementation = IMPLEMENTATIONS.get(family, implementation)
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    plain = run(model)
    made = model.generate(PROMPT, max_new_tokens=8, do_sample=False)

    assert torch.equal(run(attach(model, OFF)), plain)
    model.detach_stepflow()
    assert torch.equal(run(model), plain)
    attach(model, "paper")
    assert not torch.equal(run(model), plain)
    with model.disable_stepflow():
        assert torch.equal(run(model), plain)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8, do_sample=False, stepflow=False), made)
    off = {"tau_max": 0.0, "alpha": 0.0}
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8, do_sample=False, stepflow=off), made)


def test_layers_outside_the_bands_run_the_base_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("sdpa")
    attach(model, VARIANTS["paper"].replace(oeb_layers=[0], smi_layers=[3]))
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls: Counter[int] = Counter()

    def spy(module, *args, **kwargs):
        calls[module.layer_idx] += 1
        return kernel(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
    with torch.no_grad():
        cache = model(torch.tensor([encode("Only a question.")]), use_cache=True).past_key_values
        assert calls == {0: 1, 1: 1, 2: 1, 3: 1}
        model(torch.tensor([encode("<think>Now")]), past_key_values=cache)
        assert calls == {0: 2, 1: 2, 2: 2, 3: 2}
        model(torch.tensor([encode("x")]), past_key_values=cache)
        assert calls == {0: 2, 1: 3, 2: 3, 3: 3}


class _Largest(TorchDispatchMode):
    """The largest tensor, in elements, that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@torch.no_grad()
def test_memory_is_linear_in_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """No H x T x T in a prefill (not even T x T here), and no copy of the KV cache per query head in decode."""
    for module in (flow_attention, flow_masks):
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1 << 17)
    model = tiny_model("llama", max_position_embeddings=4096)
    model.set_attn_implementation("sdpa")
    attach(model, VARIANTS["step"].replace(oeb_layers="all", length_temperature=0.5, length_temperature_base=64))
    length = 1024
    ids = torch.tensor([(encode(TEXT[:16]) + encode("Then it is so, and on. ") * 100)[:length]])
    cache = DynamicCache(config=model.config)
    with _Largest() as prefill:
        model(ids, past_key_values=cache, logits_to_keep=1)
    assert prefill.elements < length * length
    model(torch.tensor([encode("x")]), past_key_values=cache)
    config = model.config
    repeated = config.num_attention_heads * (length + 2) * config.head_dim
    with _Largest() as decode:
        model(torch.tensor([encode("y")]), past_key_values=cache)
    assert decode.elements < repeated


@contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """Counts what would wait for a device: reads of tensor values by Python."""
    counts: Counter[str] = Counter()
    names = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")
    originals = {name: getattr(torch.Tensor, name) for name in names}

    def counting(name: str):
        def read(self, *args, **kwargs):
            counts[name] += 1
            return originals[name](self, *args, **kwargs)

        return read

    for name in names:
        setattr(torch.Tensor, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)


@pytest.mark.parametrize("kind", ["plain", "padded", "reordered", "static"])
@torch.no_grad()
def test_a_decode_step_reads_the_device_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU, where a read is free, decode takes a form that reads more; this is the form of all other devices.
    monkeypatch.setattr(flow_attention._Call, "decode", lambda call: call.rows(0, 1))
    model = attached("llama", "step", "sdpa")
    ids, mask = batch(["Two eggs?<think>Add one. Then two is", "Why?<think>So it is. "])
    cache = StaticCache(config=model.config, max_cache_len=64) if kind == "static" else DynamicCache()
    padding = {"attention_mask": mask} if kind == "padded" else {}
    model(ids, past_key_values=cache, **padding)
    if kind == "reordered":
        cache.reorder_cache(torch.tensor([1, 1]))
    if padding:
        padding["attention_mask"] = torch.nn.functional.pad(mask, (0, 1), value=1)
    reads = []
    for rules in (model.stepflow_runtime.rules, None):
        state = copy.deepcopy(cache)
        with model.stepflow_runtime.override(rules), counted_reads() as counts:
            model(ids[:, -1:], past_key_values=state, **padding)
        reads.append(counts.total())
    # A static cache keeps its length on the device: outside of compiled steps, that is a second one.
    assert reads[0] - reads[1] == 1 + (kind == "static")


def test_other_models_are_untouched() -> None:
    config = tiny_config("llama")
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one, other, third = (AutoModelForCausalLM.from_config(config).eval() for _ in range(3))
    plain = run(other)
    attach(one, "paper")
    assert torch.equal(run(other), plain)
    attach(third, "step")
    with_stepflow = run(third)
    one.detach_stepflow()
    assert torch.equal(run(third), with_stepflow)
    assert torch.equal(run(other), plain)
    third.detach_stepflow()
    assert torch.equal(run(other), plain)


def appearance(model) -> list:
    """Everything that attaching could leave behind."""
    modules = [
        (name, type(module), id(getattr(module, "config", None)), sorted(module.__dict__), sorted(vars(type(module))))
        for name, module in model.named_modules()
    ]
    hooks = [
        len(value) for name, value in vars(model).items() if name.endswith("_hooks") and hasattr(value, "__len__")
    ]
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [modules, hooks, [vars(config) for config in configs.values()], vars(model.generation_config), str(model)]


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_detach_gives_back_the_very_model(family: str) -> None:
    model = tiny_model(family)
    run(model)
    before = copy.deepcopy(appearance(model))
    kind = type(model)
    attach(model, "paper")
    assert isinstance(model, StepFlowModelForCausalLM)
    assert isinstance(model, kind)
    assert type(model).__name__ == kind.__name__
    run(model)
    with pytest.raises(StepFlowInputError, match="already attached.*\n.*detach_stepflow"):
        attach(model, "paper")
    assert model.detach_stepflow() is model
    assert type(model) is kind
    assert appearance(model) == before


def test_copies_and_pickles_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(tiny_model("gemma3_text"), "step")
    expected = run(model)
    copied = copy.deepcopy(model)
    model.detach_stepflow()
    assert torch.equal(run(copied), expected)
    assert copied.stepflow_report().rows

    file = io.BytesIO()
    torch.save(copied, file)
    name = copied.model.layers[0].self_attn.config._attn_implementation
    monkeypatch.delitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name)  # as in a process that attaches nothing
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(run(loaded), expected)
    loaded.detach_stepflow()
    assert not torch.equal(run(loaded), expected)


def test_a_cache_survives_a_pickle_and_other_settings() -> None:
    model = attach(tiny_model("llama"), "paper")
    with torch.no_grad():
        expected = model(IDS).logits[0, 30:]
        cache = model(IDS[:, :30], use_cache=True).past_key_values
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        torch.testing.assert_close(model(IDS[:, 30:], past_key_values=loaded).logits[0], expected)
        # Other step rules label the cached tokens anew.
        model.stepflow_config = VARIANTS["paper"].replace(min_step_chars=4, oeb_span=1000)
        torch.testing.assert_close(model(IDS[:, 30:], past_key_values=cache).logits[0], expected)


def script_of(prompt: torch.Tensor, text: str) -> dict:
    """Arguments that make `generate` write a text."""
    script = Script(prompt.shape[1], [text])
    return {"logits_processor": [script], "max_new_tokens": len(script.rows[0]), "do_sample": False}


def made(model, **options) -> torch.Tensor:
    """Logits of a generation."""
    output = model.generate(
        PROMPT,
        **script_of(PROMPT, "en two.</think>Two."),
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.cat(output.logits)


def test_threads_have_their_own_settings() -> None:
    model = attached("llama", "paper", "sdpa")
    calls = [
        {"stepflow": False},
        {},
        {"stepflow": {"tau_max": 0.9}},
        {"stepflow": {"alpha": 3.0, "min_step_chars": 2}},
    ]
    expected = [made(model, **call) for call in calls]
    assert all(not torch.equal(one, other) for one, other in zip(expected, expected[1:], strict=False))
    wrong: list[int] = []
    barrier = threading.Barrier(len(calls))

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(3):
            if not torch.equal(made(model, **calls[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_settings_of_a_call() -> None:
    """The preset, under the model's generation config, under the call's generation config, under the call."""
    model = attach(tiny_model("llama"), "paper")
    plain, weak = made(model), made(model, stepflow={"tau_max": 0.2})
    both = made(model, stepflow={"tau_max": 0.2, "alpha": 0.1})
    assert not torch.equal(plain, weak)
    assert torch.equal(made(model, stepflow=None), plain)
    assert torch.equal(made(model, stepflow=VARIANTS["paper"].replace(tau_max=0.2)), weak)
    model.generation_config.stepflow = {"tau_max": 0.2}
    assert torch.equal(made(model), weak)
    assert torch.equal(made(model, stepflow={"alpha": 0.1}), both)
    assert torch.equal(made(model, stepflow={"tau_max": 0.4}), plain)
    model.generation_config.stepflow["tau_max"] = 0.4
    assert torch.equal(made(model), plain)

    config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=2)
    config.stepflow = {"tau_max": 0.2}
    arguments = script_of(PROMPT, "en two.</think>Two.")
    for name in ("max_new_tokens", "do_sample"):
        setattr(config, name, arguments.pop(name))
    config.output_logits = config.return_dict_in_generate = True
    assert torch.equal(torch.cat(model.generate(PROMPT, generation_config=config, **arguments).logits), weak)
    assert torch.equal(made(model), plain)
    assert model.stepflow_config.tau_max == 0.4


def test_saved_and_loaded(tmp_path) -> None:
    """A saved model is a plain one for whoever knows nothing of StepFlow, and has its settings for whoever does."""
    model = attach(tiny_model("gemma3_text"), "heads")
    expected = run(model)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = StepFlowModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.stepflow_config.settings == VARIANTS["heads"]
    assert error(run(loaded), expected) < 1e-6
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(plain) is type(model.detach_stepflow())
    assert error(run(plain), run(model)) < 1e-6


@pytest.mark.parametrize(("family", "variant"), [("llama", "step"), ("gpt_oss", "paper"), ("gemma2", "heads")])
def test_gradients_are_those_of_the_function(family: str, variant: str) -> None:
    model = attach(tiny_model(family, dtype=torch.float64), VARIANTS[variant])
    ids = IDS[:, :40]

    def loss() -> torch.Tensor:
        logits = model(ids, use_cache=False).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:])

    loss().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    for projection in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(model.model.layers[1].self_attn, projection).weight
        direction = torch.randn_like(weight)
        values = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                weight.add_(direction, alpha=sign * 1e-3)
                values.append(float(loss()))
                weight.sub_(direction, alpha=sign * 1e-3)
        numeric = (values[0] - values[1]) / 2e-3
        # Norms and rotary angles are in float32, which gives the loss a grain of about 1e-7.
        assert float((weight.grad * direction).sum()) == pytest.approx(numeric, rel=2e-3, abs=2e-4)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = attach(tiny_model("llama", dtype=torch.float64), "paper")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            new = hasattr(model, "activation_checkpointing_enable")
            (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)()
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert error(gradients[1], gradients[0]) < 1e-12


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_bfloat16_is_as_close_as_the_base_model_is(family: str) -> None:
    exact = attach(tiny_model(family), "paper")
    rounded = attach(tiny_model(family).to(torch.bfloat16), "paper")
    with exact.disable_stepflow(), rounded.disable_stepflow():
        usual = error(run(rounded), run(exact))
    assert error(run(rounded), run(exact)) < 1.5 * usual


def test_dropout_is_refused() -> None:
    model = attach(tiny_model("llama", attention_dropout=0.1), "paper")
    model(IDS)
    model.train()
    with pytest.raises(StepFlowUnsupportedError, match="without dropout, got dropout=0.1.*\n.*model.eval"):
        model(IDS)
    model.detach_stepflow()
    model(IDS)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@torch.no_grad()
def test_attention_weights_are_those_that_were_used(family: str) -> None:
    settings = VARIANTS["paper"].replace(oeb_layers=[0], alpha=0.0)
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    before = model(IDS, output_attentions=True).attentions[0][0]
    attach(model, settings)
    cache = DynamicCache(config=model.config)
    model(IDS[:, :-1], past_key_values=cache)
    prefill = model(IDS, output_attentions=True).attentions[0][0]
    decode = model(IDS[:, -1:], past_key_values=cache, output_attentions=True).attentions[0][0]
    torch.testing.assert_close(decode[:, 0], prefill[:, -1, -decode.shape[-1] :])
    if family == "llama":
        torch.testing.assert_close(prefill.sum(-1), torch.ones_like(prefill.sum(-1)))
    torch.testing.assert_close(prefill.sum(-1), before.sum(-1))
    thinking = encode(TEXT).index(3) + 1
    query = thinking + 12
    visible = before[0, query] > 0
    bridge = visible & (torch.arange(visible.shape[0]) < thinking)
    floor = min((bridge.sum() / visible.sum()).sqrt().item(), settings.tau_max)
    held = prefill[:, query, bridge].sum(-1) / prefill[:, query].sum(-1)
    asked = before[:, query, bridge].sum(-1) / before[:, query].sum(-1)
    assert (asked < floor).any()
    torch.testing.assert_close(held, asked.clamp(min=floor))


def test_lora_inside_and_outside() -> None:
    peft = pytest.importorskip("peft")
    model = attach(tiny_model("llama"), "paper")
    expected = made(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=True))
    wrapped.eval()
    assert torch.equal(made(wrapped), expected)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted = made(wrapped)
    assert error(adapted, expected) > 0.01
    merged = wrapped.merge_and_unload()
    assert isinstance(merged, StepFlowModelForCausalLM)
    assert error(made(merged), adapted) < 1e-5

    outer = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    outer.eval()
    attach(outer.get_base_model(), "paper")
    assert torch.equal(made(outer), expected)
