"""The slopes of the bridge against finite differences in float64, and the order that they give."""

import pytest
import torch

from hf_stepflow.calibration.order import bridge_slopes, by_slope, steepest_band
from hf_stepflow.runtime.trace import segment_trace
from tests.support.flow import attach, byte_tokenizer, encode
from tests.support.tiny_models import tiny_model

TEXT = "Ann has 4 eggs.<think>Bob has three more than her. So it is seven.</think>It is 7."


def moved_loss(model, ids: list[int], start: int, trace, head: tuple[int, int], mass: float) -> float:
    """The mean loss of the response in float64, with mass moved to the bridge in one head: weights written out."""
    layer, number = head
    segments, steps = trace.segment_ids, trace.step_ids
    original = torch.nn.functional.scaled_dot_product_attention
    calls = [0]

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **rest):
        groups = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        tokens = query.shape[2]
        logits = query @ key.mT * scale
        visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        if calls[0] == layer:
            for at in range(tokens):
                if segments[at] < 1 or steps[at] < 0:
                    continue
                bridge = [k for k in range(at + 1) if segments[k] == segments[at] - 1]
                own = [k for k in range(at + 1) if segments[k] == segments[at]]
                if not bridge or not own:
                    continue
                row = weights[0, number, at]
                p_bridge, p_own = row[bridge].sum(), row[own].sum()
                row[bridge] = row[bridge] * (1 + mass / p_bridge)
                row[own] = row[own] * (1 - mass / p_own)
        calls[0] += 1
        return weights @ value

    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
    chances = logits.double().log_softmax(-1)
    return -sum(float(chances[at - 1, ids[at]]) for at in range(start, len(ids))) / (len(ids) - start)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_slopes_are_derivatives(kind: str) -> None:
    model = tiny_model(kind, seed=3).double()
    tokenizer = byte_tokenizer()
    ids = encode(TEXT)
    start = ids.index(3) + 1
    trace = segment_trace(tokenizer, ids, None, start)
    found = bridge_slopes(model, [(ids, start)], tokenizer)
    heads = model.config.num_attention_heads
    assert sorted(found) == [(layer, head) for layer in range(model.config.num_hidden_layers) for head in range(heads)]
    step = 1e-3  # norms round to float32, so a smaller step would measure their rounding
    for head in [(0, 0), (0, heads - 1), (1, 1), (model.config.num_hidden_layers - 1, 2)]:
        up, down = (moved_loss(model, ids, start, trace, head, sign * step) for sign in (1, -1))
        assert found[head] == pytest.approx((up - down) / (2 * step), rel=1e-3, abs=1e-7)


def test_slopes_are_means_over_traces_and_leave_the_model_as_it_was() -> None:
    model = attach(tiny_model("llama"), "paper")
    tokenizer, ids = byte_tokenizer(), encode(TEXT)
    start = ids.index(3) + 1
    other = encode(TEXT.replace("three", "nine"))
    before = model.stepflow_runtime.settings
    one, two = (bridge_slopes(model, [(trace, start)], tokenizer) for trace in (ids, other))
    both = bridge_slopes(model, [(ids, start), (other, start)], tokenizer)
    for head, value in both.items():
        assert value == pytest.approx((one[head] + two[head]) / 2, rel=1e-5, abs=1e-8)
    assert model.stepflow_runtime.settings == before
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_orders() -> None:
    slopes = {(0, 0): 0.2, (0, 1): -0.1, (1, 0): -0.5, (1, 1): 0.1, (2, 0): -0.3, (2, 1): 0.0, (3, 0): 0.4}
    assert by_slope(list(slopes), slopes)[:3] == [(1, 0), (2, 0), (0, 1)]
    assert steepest_band([0, 1, 2, 3], slopes, 2) == [1, 2]
    assert steepest_band([0, 1, 2, 3], slopes, 1) == [1]
    assert steepest_band([0, 1], {(0, 0): 0.1, (1, 0): 0.0}, 1) == []
