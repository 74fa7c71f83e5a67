"""The state on a cache where tokens were unseen, rules change, slots are reused, and layers lie on other devices."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_stepflow.runtime.attention import BridgedCall
from hf_stepflow.runtime.errors import StepFlowConfigError
from hf_stepflow.runtime.flow_state import FlowState
from hf_stepflow.runtime.forward import FlowPass
from hf_stepflow.runtime.settings import FlowPlan
from hf_stepflow.runtime.step_detector import THINKING, Field
from tests.support.flow import SHORT_TEXT, TRACES, VARIANTS, attach, batch, encode
from tests.support.tiny_models import tiny_model

IMPLICIT = VARIANTS["paper"].replace(implicit_thinking=True)
IDS = torch.tensor([encode(SHORT_TEXT)])
GREEDY = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}


def cached(model, *parts: torch.Tensor, unseen: int) -> DynamicCache:
    """A cache of several passes, one of which StepFlow did not see."""
    cache = DynamicCache(config=model.config)
    for number, part in enumerate(parts):
        with model.use_stepflow(False if number == unseen else None):
            model(part, past_key_values=cache)
    return cache


def labels(cache) -> list[int]:
    state = cache.stepflow_state
    return state.records[0, : state.count, Field.LABEL].tolist()


@torch.no_grad()
def test_the_report_passes_over_tokens_without_an_id() -> None:
    model = attach(tiny_model("llama"), "paper")
    ids = IDS[:, :6]
    cached(model, ids, ids, ids, unseen=1)
    (step,) = model.stepflow_report().rows[0].steps
    assert (step.label, step.start, step.end) == ("question", 0, 18)
    assert step.text == 2 * SHORT_TEXT[:6]

    first, mask = batch(["A question?", "One more question?"])
    cache = DynamicCache(config=model.config)
    model(first, attention_mask=mask, past_key_values=cache)
    again, more = batch(["No.", "Once more?"])
    model(again, attention_mask=torch.cat((mask, more), 1), past_key_values=cache)
    texts = [[step.text for step in row.steps] for row in model.stepflow_report().rows]
    assert texts == [["A question?No."], ["One more question?Once more?"]]


@torch.no_grad()
def test_other_rules_leave_unseen_tokens_question() -> None:
    model = attach(tiny_model("llama"), "paper")
    parts = torch.tensor([encode("Two?<think>One is")]), IDS[:, :8], torch.tensor([encode(" there. It")])
    cache = cached(model, *parts, unseen=1)
    start, end = parts[0].shape[1], parts[0].shape[1] + parts[1].shape[1]
    before = labels(cache)
    assert set(before[start:end]) == {3}
    with model.use_stepflow({"min_step_chars": 1}):
        model(torch.tensor([encode(".")]), past_key_values=cache)
    assert labels(cache)[: len(before)] == before


@torch.no_grad()
def test_a_cache_that_is_reset_forgets_where_thinking_started() -> None:
    model = attach(tiny_model("llama"), IMPLICIT)
    fresh, used = (StaticCache(config=model.config, max_cache_len=40) for _ in range(2))
    model.generate(IDS[:, :20], past_key_values=used, **GREEDY)
    used.reset()
    expected = model(IDS[:, :30], past_key_values=fresh).logits
    assert torch.equal(model(IDS[:, :30], past_key_values=used).logits, expected)
    assert labels(used) == labels(fresh) == [0] * 30


@torch.no_grad()
def test_implicit_thinking_starts_after_virtual_tokens_and_the_prompt() -> None:
    peft = pytest.importorskip("peft")
    model = attach(tiny_model("llama"), IMPLICIT)
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")).eval()
    output = tuned.generate(input_ids=IDS[:, :20], return_dict_in_generate=True, **GREEDY)
    found = labels(output.past_key_values)
    assert found == [0] * 25 + [3 + THINKING] * (len(found) - 25)
    assert len(found) > 25


def some_pass(text: str, settings, heads: dict[int, int]) -> FlowPass:
    """The pass of a text in one piece."""
    model = attach(tiny_model("llama"), settings)
    ids = torch.tensor([encode(text)])
    state = FlowState(model.stepflow_runtime.rules.vocabulary, 1, ids.device)
    records, host = state.append(state.read(ids, None), None, ids.device)
    return FlowPass.of(FlowPlan.resolve(settings, heads), state, records, host, state.count)


@pytest.mark.parametrize("variant", ["paper", "step"])
def test_layers_on_another_device_than_the_token_ids(variant) -> None:
    """As under a device map; "meta" stands for the other device, and only shapes come back."""
    flow = some_pass(TRACES[0], VARIANTS[variant], dict.fromkeys(range(4), 4))
    total = flow.state.count
    same, bridge = flow.key_groups(flow.records.to("meta"), total, None)
    assert same.device.type == bridge.device.type == "meta"
    query, key = torch.empty(1, 4, total, 8, device="meta"), torch.empty(1, 2, total, 8, device="meta")
    for mask in (None, torch.ones(1, 1, total, total, dtype=torch.bool).tril(), torch.zeros(1, 1, total, total)):
        call = BridgedCall(0, query, key, key, mask, {}, "sdpa", flow, 0.4)
        (weights, *_), usable = call.weights(query, 0)
        assert weights.device.type == usable.device.type == "meta"
        assert weights.shape == (1, 4, total, total)
    call = BridgedCall(0, query[:, :, :1], key, key, None, {}, "sdpa", flow.last(1), 0.4)
    assert not call.has_ranges
    output, _ = call.rows(0, 1)
    assert (output.device.type, output.shape) == ("meta", (1, 1, 4, 8))


@torch.no_grad()
def test_layers_with_other_numbers_of_key_value_heads() -> None:
    """They have masks and groups in common, and each head keeps its own floor."""
    settings = VARIANTS["paper"].replace(oeb_layers=[0, 1], oeb_heads={0: [0, 2], 1: [0, 2]})
    flow = some_pass(TRACES[0], settings, {0: 4, 1: 4}).last(1)
    query, keys = torch.randn(1, 4, 1, 8), torch.randn(1, 4, flow.state.count, 8)
    for shared in (1, 2, 4):
        key = keys[:, ::shared]
        output = BridgedCall(0, query, key, key, None, {}, "sdpa", flow, flow.plan.tau[0]).decode()
        whole = key.repeat_interleave(shared, 1)
        expected, _ = BridgedCall(0, query, whole, whole, None, {}, "sdpa", flow, flow.plan.tau[0]).rows(0, 1)
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"oeb_heads": {3: [0]}, "oeb_layers": [0, 1]}, r"oeb_heads names heads of layer 3, .* \[0, 1\]"),
        (
            {"length_temperature_heads": {2: [1]}, "length_temperature_layers": "bottom:0.25"},
            r"length_temperature_heads names heads of layer 2, .*\n.*in length_temperature_layers",
        ),
    ],
)
def test_heads_of_layers_that_nothing_is_done_in_are_refused(settings, told) -> None:
    given = VARIANTS["paper"].replace(length_temperature=1.0, length_temperature_base=8, **settings)
    heads = dict.fromkeys(range(4), 4)
    with pytest.raises(StepFlowConfigError, match=told):
        FlowPlan.resolve(given, heads)
    off = given.replace(tau_max=0.0, length_temperature=0.0)
    assert not FlowPlan.resolve(off, heads).tau
