"""Bridged attention of one query per row, in probabilities: the decode route where a small host read costs nothing.

Softmax first, the masses of the groups by one product with their indicators, then one factor a group. Nothing of the
size of the KV cache is read twice or copied per query head, and what depends on the labels alone is made once a pass
and shared by the layers. A mass too small for the number format would lose the proportions inside its group; such a
step is left to the log-space form (`flow_attention`). Shapes: B batch, H query heads, Hkv key-value heads,
G = H / Hkv, K keys, D and Dv widths of keys and values.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .bridged_weights import SMALLEST_MASS
from .flow_masks import visible_keys
from .flow_pass import FlowPass, key_groups


@dataclass(frozen=True)
class DecodeGroups:
    """The key groups of a decode step.

    Attributes:
        indicator: [B, K, 2] of 0 and 1: which keys are bridge, which are current segment. In rows where there is
            nothing to lift, all keys are both, and no mass moves.
        bias: [B, 1, 1, K] to add to the logits (-inf where a key is not visible), or None.
        floor: tau_B, [B, 1, 1] or [B, Hkv, G] where tau_max depends on the head; 0 where there is nothing to do.
    """

    indicator: torch.Tensor
    bias: torch.Tensor | None
    floor: torch.Tensor


def decode_groups(
    flow: FlowPass, mask: Any, keys: int, tau: "float | tuple[float, ...]", like: torch.Tensor
) -> DecodeGroups:
    """The key groups of this pass, for all layers with the same mask and tau_max.

    Args:
        flow: the pass.
        mask: the mask of the base implementation.
        keys: K.
        tau: tau_max, or one value for each query head.
        like: the keys [B, Hkv, K, D], for dtype and device.
    """
    key = keys, tau, like.dtype, like.shape[1]  # key-value heads may be fewer in some layers
    known = flow.memo("decode", mask, *key)
    if known is not None:
        return known
    dtype = torch.promote_types(like.dtype, torch.float32)
    visible, bias = None, None
    if mask is not None:
        visible, bias = visible_keys(flow, mask, 0, 1, 1, keys)
        visible = visible.to(like.device)
        bias = torch.zeros((), dtype=dtype) if bias is None else bias.to(like.device, dtype)
        bias = torch.where(visible, bias, float("-inf"))
        visible = None if bool(visible.all()) and not bool(bias.any()) else visible
        bias = None if visible is None else bias
    same, bridge = key_groups(flow, flow.records.to(like.device), keys, visible)
    indicator = torch.stack((bridge[:, 0, 0], same[:, 0, 0]), -1)
    number = indicator.sum(1, keepdim=True)
    usable = number.amin(-1, keepdim=True) > 0
    caps = torch.tensor(tau, dtype=dtype, device=like.device)
    caps = caps.view((1, 1, 1) if isinstance(tau, float) else (1, like.shape[1], -1))
    floor = torch.minimum((number[..., :1] / number.sum(-1, keepdim=True).clamp(min=1)).sqrt(), caps) * usable
    indicator = (indicator | ~usable).to(dtype)
    return flow.remember(DecodeGroups(indicator, bias, floor), "decode", mask, *key)


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: DecodeGroups,
    *,
    is_absolute: bool,
    scaling: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Attention of one query per row with the bridge (METHOD section 3).

    Args:
        query: [B, H, 1, D].
        key: [B, Hkv, K, D].
        value: [B, Hkv, K, Dv].
        groups: the key groups.
        is_absolute: whether the floor is one under p(B) (the paper), or a share of what S and B hold together.
        scaling: factor of the logits.
        softcap: logits become softcap * tanh(logits / softcap).
        sink_logits: learned sinks [H], in the denominator only.

    Returns:
        The output [B, 1, H, Dv]; the probabilities [B, H, 1, K]; and the mass of the bridge before and after [B, H].
        None where a mass is too small for this form.
    """
    batch, heads = query.shape[:2]
    shape = (batch, key.shape[1], heads // key.shape[1], -1)
    dtype = groups.indicator.dtype
    logits = torch.matmul((query * scaling).view(shape).to(dtype), key.to(dtype).transpose(2, 3))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if groups.bias is not None:
        logits = logits + groups.bias
    weights = torch.softmax(logits, -1)
    outside = None
    if sink_logits is not None:
        log_total = logits.amax(-1) - weights.amax(-1).log()
        outside = torch.sigmoid(log_total - sink_logits.to(dtype).view(shape[1:3]))
    mass = torch.matmul(weights.view(batch, heads, -1), groups.indicator).view(*shape[:3], 2)
    if float(mass.detach().min()) < SMALLEST_MASS:
        return None
    bridge, held, floor = mass[..., 0], mass.sum(-1), groups.floor
    if is_absolute:
        whole = held if outside is None else held * outside
        floor = torch.where(floor < whole, floor / whole, 0.0)
    lifted = torch.maximum(bridge / held, floor)  # share of the bridge in what bridge and segment hold together
    after = lifted * held
    change = torch.stack((after, held - after), -1) / mass - 1
    factors = torch.matmul(change.view(batch, heads, 2), groups.indicator.transpose(1, 2)).view_as(weights)
    weights = torch.addcmul(weights, weights, factors)
    if outside is not None:
        weights = weights * outside[..., None]
        bridge, after = bridge * outside, after * outside
    output = torch.matmul(weights.to(value.dtype), value).view(batch, 1, heads, -1)
    return output, weights.view(batch, heads, 1, -1), bridge.view(batch, heads), after.view(batch, heads)
