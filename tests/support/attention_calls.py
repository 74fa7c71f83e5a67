"""What attention did in one forward pass, call by call, and what StepFlow should have done there.

The bridge and the injection of docs/method.md, written as sums and loops on the family's own attention.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_stepflow.runtime.trace import Trace


@dataclass
class AttentionCall:
    """One call of attention: its layer, values [Hkv, T, D], and weights [H, T, T] and outputs [T, H, D] of both."""

    layer: int
    value: torch.Tensor
    base_weights: torch.Tensor
    base_output: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor


@contextmanager
def recorded_calls(model: Any) -> Iterator[list[AttentionCall]]:
    """Records the calls of StepFlow's eager attention, with what the family's own would have given."""
    calls: list[AttentionCall] = []
    (name,) = {module.config._attn_implementation for module in model.modules() if hasattr(module, "stepflow_link")}
    original = ALL_ATTENTION_FUNCTIONS[name]

    def spy(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        output, weights = original(module, query, key, value, attention_mask, **kwargs)
        if hasattr(module, "stepflow_link"):
            kwargs.pop("stepflow_pass", None)
            eager = sys.modules[type(module).__module__].eager_attention_forward
            base_output, base_weights = eager(module, query, key, value, attention_mask, **kwargs)
            layer = module.stepflow_link.layer
            calls.append(AttentionCall(layer, value[0], base_weights[0], base_output[0], weights[0], output[0]))
        return output, weights

    AttentionInterface.register(name, spy)
    try:
        yield calls
    finally:
        AttentionInterface.register(name, original)


def normal(weights: torch.Tensor) -> torch.Tensor:
    """Weights that sum to 1, whether or not a family leaves the share of its sinks out of them."""
    return weights / weights.sum(-1, keepdim=True)


def expected_call(
    call: AttentionCall, trace: Trace, tau_max: float, alpha: float
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int, int]]:
    """The weights and outputs that StepFlow should have given.

    Args:
        call: the call.
        trace: the trace of its tokens.
        tau_max: 0 where the layer is not bridged.
        alpha: 0 where nothing is injected.

    Returns:
        Weights [H, T, T]; outputs [T, H, D]; and the numbers of (head, query) that the bridge looks at, of those that
        it lifts, and of tokens with an injection.
    """
    weights, usable, lifted = _bridged(call.base_weights, trace, tau_max)
    addition, injections = _injected(call, trace, alpha)
    value = call.value.repeat_interleave(len(weights) // len(call.value), 0)
    mixed, base_output = call.base_weights @ value, call.base_output.transpose(0, 1)
    # 1, unless a family applies its sinks to the output and not to the weights.
    scale = ((base_output * mixed).sum(-1, keepdim=True) / (mixed * mixed).sum(-1, keepdim=True)).nan_to_num(1.0)
    return weights, (weights @ value * scale).transpose(0, 1) + addition, (usable, lifted, injections)


def _bridged(weights: torch.Tensor, trace: Trace, tau_max: float) -> tuple[torch.Tensor, int, int]:
    """The Odds-Equal Bridge on attention weights [H, T, T], and how many (head, query) it looked at and lifted."""
    labels = trace.segment_ids
    weights, usable, lifted = weights.clone(), 0, 0
    if tau_max == 0:
        return weights, usable, lifted
    for query in ((labels > 0) & (trace.step_ids > 0)).nonzero().flatten().tolist():
        row = weights[:, query]
        in_same, in_bridge = ((row > 0) & (labels == label) for label in (labels[query], labels[query] - 1))
        n_same, n_bridge = in_same.sum(-1), in_bridge.sum(-1)
        same, bridge = (row * in_same).sum(-1), (row * in_bridge).sum(-1)
        floor = (n_bridge / (n_bridge + n_same)).sqrt().clamp(max=tau_max) * (same + bridge)
        is_usable = (n_same > 0) & (n_bridge > 0)
        is_lifted = is_usable & (bridge < floor)
        factor = torch.where(in_bridge, (floor / bridge)[:, None], ((same + bridge - floor) / same)[:, None])
        weights[:, query] = torch.where(is_lifted[:, None] & (in_same | in_bridge), row * factor, row)
        usable, lifted = usable + int(is_usable.sum()), lifted + int(is_lifted.sum())
    return weights, usable, lifted


def _injected(call: AttentionCall, trace: Trace, alpha: float) -> tuple[torch.Tensor, int]:
    """What Step Momentum Injection adds to the head outputs [T, H, D], and at how many tokens."""
    addition, number = torch.zeros_like(call.output), 0
    if alpha == 0:
        return addition, number
    thinking, summary = ([step for step in trace.steps if step.label == name] for name in ("thinking", "summary"))
    for before, step in zip(thinking, [*thinking[1:], summary[0]], strict=True):
        seen = call.base_weights[0, step.start, before.start : before.end] > 0
        if seen.any():
            mean = call.value[:, before.start : before.end][:, seen].mean(1)
            addition[step.start] = alpha * mean.repeat_interleave(addition.shape[1] // len(mean), 0)
            number += 1
    return addition, number
