"""What holds whatever is asked: off is off, memory and host reads stay bounded, gradients are the function's."""

import contextlib
import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_stepflow.runtime import attention
from hf_stepflow.runtime.errors import StepFlowUnsupportedError
from tests.support.counting import counted_reads
from tests.support.flow import IMPLEMENTATIONS, SHORT_TEXT, VARIANTS, attach, attached, batch, encode, error, logits_of
from tests.support.tiny_models import tiny_model

IDS = torch.tensor([encode(SHORT_TEXT)])
PROMPT = torch.tensor([encode("Two eggs?<think>Add one. Th")])
OFF = VARIANTS["paper"].replace(tau_max=0.0, alpha=0.0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_off_is_the_base_model_bit_for_bit(family: str, implementation: str) -> None:
    implementation = IMPLEMENTATIONS.get(family, implementation)
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    plain = logits_of(model, IDS)
    made = model.generate(PROMPT, max_new_tokens=8, do_sample=False)

    assert torch.equal(logits_of(attach(model, OFF), IDS), plain)
    model.detach_stepflow()
    assert torch.equal(logits_of(model, IDS), plain)
    attach(model, "paper")
    assert not torch.equal(logits_of(model, IDS), plain)
    with model.disable_stepflow():
        assert torch.equal(logits_of(model, IDS), plain)
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
        assert calls == {0: 1, 1: 2, 2: 2, 3: 2}
        model(torch.tensor([encode("x")]), past_key_values=cache)
        assert calls == {0: 1, 1: 3, 2: 3, 3: 3}


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
    monkeypatch.setattr(attention, "_CHUNK_ELEMENTS", 1 << 17)
    model = tiny_model("llama", max_position_embeddings=4096)
    model.set_attn_implementation("sdpa")
    attach(model, VARIANTS["step"].replace(oeb_layers="all", length_temperature=0.5, length_temperature_base=64))
    length = 1024
    ids = torch.tensor([(encode(SHORT_TEXT[:16]) + encode("Then it is so, and on. ") * 100)[:length]])
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


@pytest.mark.parametrize("kind", ["plain", "padded", "reordered", "static"])
@torch.no_grad()
def test_a_decode_step_reads_the_device_once(kind: str) -> None:
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
    assert reads[0] - reads[1] == 1


@pytest.mark.parametrize(("family", "variant"), [("llama", "step"), ("gpt_oss", "paper"), ("gemma2", "heads")])
def test_gradients_are_those_of_the_function(family: str, variant: str) -> None:
    every_expert = {"num_experts_per_tok": 4} if family == "gpt_oss" else {}  # choosing among them makes a jump
    model = attach(tiny_model(family, dtype=torch.float64, **every_expert), variant)
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
                weight.add_(direction, alpha=sign * 3e-4)
                values.append(float(loss()))
                weight.sub_(direction, alpha=sign * 3e-4)
        numeric = (values[0] - values[1]) / 6e-4
        # Norms and rotary angles are in float32, which gives the loss a grain of about 1e-7.
        assert float((weight.grad * direction).sum()) == pytest.approx(numeric, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("is_on", [True, False])
def test_gradient_checkpointing_changes_nothing(is_on: bool) -> None:
    model = attach(tiny_model("llama", dtype=torch.float64), "paper")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            new = hasattr(model, "activation_checkpointing_enable")
            (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)()
        model.zero_grad()
        with contextlib.nullcontext() if is_on else model.disable_stepflow():
            loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert error(gradients[1], gradients[0]) < 1e-12


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_bfloat16_is_as_close_as_the_base_model_is(family: str) -> None:
    exact = attach(tiny_model(family), "paper")
    rounded = attach(tiny_model(family).to(torch.bfloat16), "paper")
    with exact.disable_stepflow(), rounded.disable_stepflow():
        usual = error(logits_of(rounded, IDS), logits_of(exact, IDS))
    assert error(logits_of(rounded, IDS), logits_of(exact, IDS)) < 1.5 * usual


def test_dropout_is_refused() -> None:
    model = attach(tiny_model("llama", attention_dropout=0.1), "paper")
    model(IDS)
    model.train()
    with pytest.raises(StepFlowUnsupportedError, match=r"without dropout, got dropout=0.1.*\n.*model.eval"):
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
    thinking = encode(SHORT_TEXT).index(3) + 1
    query = thinking + 12
    visible = before[0, query] > 0
    bridge = visible & (torch.arange(visible.shape[0]) < thinking)
    floor = min((bridge.sum() / visible.sum()).sqrt().item(), settings.tau_max)
    held = prefill[:, query, bridge].sum(-1) / prefill[:, query].sum(-1)
    asked = before[:, query, bridge].sum(-1) / before[:, query].sum(-1)
    assert (asked < floor).any()
    torch.testing.assert_close(held, asked.clamp(min=floor))
