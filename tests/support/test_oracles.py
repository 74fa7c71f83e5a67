"""The oracle of the whole model, held against the models themselves and against a trace worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface

from tests.support.oracles import OracleSettings, OracleStepFlow, OracleTrace, oracle_groups, oracle_previous_step
from tests.support.tiny_models import tiny_model

# Question 0-2, think marker 3, step one 4-6, tool result 7, step two 8-9, end marker 10, summary steps 11-12 and
# 13-14, end of turn 15, think marker 16, a blank 17, end marker 18, summary of an empty thinking 19.
TRACE = OracleTrace(
    segment=[0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 2, 2, 2, 2, 2, 0, 1, 1, 2],
    round=[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2],
    step=[0, 0, 0, -1, 1, 1, 1, 0, 2, 2, -1, 3, 3, 4, 4, -1, -1, -1, -1, 1],
    control=[token in (3, 10, 15, 16, 18) for token in range(20)],
)
ALL_LAYERS = [0, 1, 2, 3]


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(4, 320, (1, 20), generator=torch.Generator().manual_seed(1))


# gemma2 (softcap, sliding windows) and deepseek_v3 (MLA) take parts of their attention in float32.
@pytest.mark.parametrize(
    ("model_type", "rtol"), [("llama", 1e-9), ("gpt_oss", 1e-9), ("gemma2", 1e-4), ("deepseek_v3", 1e-4)]
)
def test_without_intervention_it_is_the_model(model_type: str, rtol: float, input_ids: torch.Tensor) -> None:
    model = tiny_model(model_type, dtype=torch.float64)
    if model_type == "gemma2":
        model.set_attn_implementation("eager")  # sdpa knows no softcap, and older releases choose it all the same
    settings = OracleSettings(tau_max=0.0, alpha=0.0, oeb_layers=ALL_LAYERS, smi_layers=ALL_LAYERS)
    with torch.no_grad():
        expected = model(input_ids=input_ids, use_cache=False).logits[0]
    logits = OracleStepFlow(model, settings)(input_ids, TRACE)
    torch.testing.assert_close(logits, expected, rtol=rtol, atol=rtol * 1e-2)
    assert OracleStepFlow.NAME not in AttentionInterface()


def test_groups_by_hand() -> None:
    segment, step = OracleSettings(), OracleSettings(bridge_scope="step")
    assert oracle_groups(TRACE, segment, 9) == ([4, 5, 6, 8, 9], [0, 1, 2, 3, 7])
    assert oracle_groups(TRACE, step, 9) == ([8, 9], [0, 1, 2, 3, 4, 5, 6, 7])
    assert oracle_groups(TRACE, replace(step, sink_tokens=2), 9) == ([8, 9], [2, 3, 4, 5, 6, 7])
    for settings in (segment, step):
        assert oracle_groups(TRACE, settings, 12) == ([11, 12], [4, 5, 6, 8, 9, 10])
        assert oracle_groups(TRACE, settings, 17) == ([17], list(range(17)))
        for untouched in (2, 3, 7, 10, 15, 16, 18, 19):
            assert oracle_groups(TRACE, settings, untouched) is None
    span = OracleSettings(oeb_span=1)
    assert [query for query in range(20) if oracle_groups(TRACE, span, query)] == [4, 8, 11, 13]


def test_previous_steps_by_hand() -> None:
    settings = OracleSettings()
    injected = {query: oracle_previous_step(TRACE, settings, query) for query in range(20)}
    assert {query: tokens for query, tokens in injected.items() if tokens} == {8: [4, 5, 6], 11: [8, 9]}
    assert oracle_previous_step(TRACE, replace(settings, smi_window=2), 8) == [5, 6]
    assert oracle_previous_step(TRACE, replace(settings, smi_window=0), 8) == []


@pytest.mark.parametrize("floor", ["share", "absolute"])
@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma2"])
def test_bridged_masses(model_type: str, floor: str, input_ids: torch.Tensor) -> None:
    settings = OracleSettings(tau_max=0.4, alpha=0.0, oeb_layers=[0, 1], oeb_heads={0: [0, 1, 2, 3], 1: [2]})
    oracle = OracleStepFlow(tiny_model(model_type), replace(settings, bridge_floor=floor))
    oracle(input_ids, TRACE)
    assert {(layer, head) for layer, head, _ in oracle.bridges} == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 2)}
    lifted = 0
    for (_, _, query), record in oracle.bridges.items():
        assert record.after[2] == pytest.approx(record.before[2], abs=1e-12)
        assert record.after[1] >= record.before[1]
        if record.after != record.before:
            lifted += 1
            same, bridge = oracle_groups(TRACE, settings, query)
            # A sliding layer may see less of the bridge than the row holds, never more.
            tau = min(math.sqrt(len(bridge) / (len(bridge) + len(same))), 0.4)
            assert record.after[1] <= tau * (1 - record.before[2] if floor == "share" else 1) + 1e-12
    assert lifted > 5


def test_momentum_reaches_the_output_projection(input_ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    seen: dict[str, torch.Tensor] = {}
    attention = model.model.layers[3].self_attn
    attention.v_proj.register_forward_hook(lambda _module, _args, output: seen.update(value=output))
    attention.o_proj.register_forward_pre_hook(lambda _module, args: seen.update(output=args[0]))
    OracleStepFlow(model, OracleSettings(tau_max=0.0, alpha=0.0))(input_ids, TRACE)
    plain = seen["output"]
    oracle = OracleStepFlow(model, OracleSettings(tau_max=0.0, alpha=0.5, smi_layers=[3]))
    oracle(input_ids, TRACE)
    added = (seen["output"] - plain).view(20, 4, 16)
    value = seen["value"].view(20, 2, 16).repeat_interleave(2, dim=1)
    expected = torch.zeros_like(added)
    expected[8], expected[11] = 0.5 * value[4:7].mean(0), 0.5 * value[8:10].mean(0)
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-12)
    assert oracle.injections == {(3, 8): [4, 5, 6], (3, 11): [8, 9]}


def test_length_temperature_starts_past_its_base(input_ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    off = OracleSettings(tau_max=0.0, alpha=0.0)
    plain = OracleStepFlow(model, off)(input_ids, TRACE)
    warm = replace(off, length_temperature=1.0, length_temperature_base=12, length_temperature_heads={2: [1]})
    logits = OracleStepFlow(model, warm)(input_ids, TRACE)
    assert torch.equal(logits[:12], plain[:12])
    assert not (logits[12:] == plain[12:]).all(-1).any()


def test_a_layer_outside_the_interface_is_refused(input_ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="only \\[0, 1, 2, 3\\] of LlamaForCausalLM"):
        OracleStepFlow(tiny_model("llama"), OracleSettings(oeb_layers=[7]))(input_ids, TRACE)
