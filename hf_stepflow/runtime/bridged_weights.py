"""Attention weights of many queries with the bridge, from their logits and key groups.

Two forms of the same function (METHOD section 3). In probabilities: one softmax, two sums, one factor a group; for the
CPU, where asking whether a mass is too small for the number format costs nothing. In log space: for any mass, for
other devices, and for compiled code. Shapes: B batch, H query heads, c queries, K keys.
"""

import torch

from .bridge_shifts import bridge_shifts

SMALLEST_MASS = 1e-30

Bridged = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def bridged_weights(
    logits: torch.Tensor,
    same: torch.Tensor,
    bridge: torch.Tensor,
    tau_max: "float | torch.Tensor",
    floor: str,
    sink_logits: torch.Tensor | None,
) -> Bridged:
    """The attention weights of some queries.

    Args:
        logits: [B, H, c, K], after scaling, softcap and mask; -inf where a key is not visible.
        same: bool, broadcastable to them: visible keys of the current segment.
        bridge: bool, broadcastable to them: visible keys of the bridge.
        tau_max: the cap of the floor, or one value for each head, [H, 1].
        floor: "share" or "absolute".
        sink_logits: learned sinks [H], in the denominator only.

    Returns:
        The weights [B, H, c, K], and the mass of the bridge before and after, [B, H, c].
    """
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        done = _in_probabilities(logits, same, bridge, tau_max, floor, sink_logits)
        if done is not None:
            return done
    return _in_log_space(logits, same, bridge, tau_max, floor, sink_logits)


def _in_probabilities(
    logits: torch.Tensor,
    same: torch.Tensor,
    bridge: torch.Tensor,
    tau_max: "float | torch.Tensor",
    floor: str,
    sink_logits: torch.Tensor | None,
) -> Bridged | None:
    """None where the mass of a group is too small for this form."""
    # A finite stand-in for -inf: a query that sees no key at all gets weights that nobody uses, instead of NaN.
    logits = logits.clamp(min=torch.finfo(logits.dtype).min / 2)
    weights = torch.softmax(logits, -1)
    outside: torch.Tensor | float = 1.0
    if sink_logits is not None:
        log_total = logits.amax(-1) - weights.amax(-1).log()
        outside = torch.sigmoid(log_total - sink_logits.to(logits.dtype)[None, :, None])
    # Products, not torch.where: on a CPU that takes several times as long, and all weights are finite.
    of_same_keys, of_bridge_keys = same.to(logits.dtype), bridge.to(logits.dtype)
    mass_same = (weights * of_same_keys).sum(-1)
    mass_bridge = (weights * of_bridge_keys).sum(-1)
    n_same, n_bridge = same.sum(-1), bridge.sum(-1)
    usable = (n_same > 0) & (n_bridge > 0)
    smallest = torch.where(usable, torch.minimum(mass_same, mass_bridge).detach(), 1.0)
    if float(smallest.min()) < SMALLEST_MASS:
        return None
    cap = torch.as_tensor(tau_max, dtype=logits.dtype, device=logits.device)
    n_same, n_both = n_same.to(logits.dtype), (n_same + n_bridge).clamp(min=1).to(logits.dtype)
    root = (n_bridge.to(logits.dtype) / n_both).sqrt()
    tau = torch.minimum(root, cap)
    # 1 - sqrt(r) = (1 - r) / (1 + sqrt(r)) keeps its digits where sqrt(r) is near 1.
    rest = torch.maximum(n_same / (n_both * (1 + root)), 1 - cap)
    held = torch.where(usable, mass_same + mass_bridge, 1.0)
    if floor == "absolute":
        tau = torch.where(tau < held * outside, tau / (held * outside), 0.0)
        rest = 1 - tau
    share = mass_bridge / held  # of the bridge in what bridge and segment hold together
    lifted = usable & (share < tau)
    of_bridge = torch.where(lifted, tau * held / torch.where(lifted, mass_bridge, 1.0), 1.0)
    of_same = torch.where(lifted, rest * held / torch.where(lifted, mass_same, 1.0), 1.0)
    # No key is in both groups: each factor is one of the three, to the last bit.
    factor = (1 - of_same_keys - of_bridge_keys).addcmul(of_same_keys, of_same[..., None])
    factor = factor.addcmul(of_bridge_keys, of_bridge[..., None])
    weights = weights * factor if sink_logits is None else weights * (factor * torch.as_tensor(outside)[..., None])
    return weights, mass_bridge * outside, mass_bridge * of_bridge * outside


def _in_log_space(
    logits: torch.Tensor,
    same: torch.Tensor,
    bridge: torch.Tensor,
    tau_max: "float | torch.Tensor",
    floor: str,
    sink_logits: torch.Tensor | None,
) -> Bridged:
    nothing = torch.finfo(logits.dtype).min / 2
    log_same = logits.masked_fill(~same, nothing).logsumexp(-1)
    log_bridge = logits.masked_fill(~bridge, nothing).logsumexp(-1)
    log_total = logits.clamp(min=nothing).logsumexp(-1)
    if sink_logits is not None:
        log_total = torch.logaddexp(log_total, sink_logits.to(logits.dtype)[None, :, None])
    shift_same, shift_bridge, bridged = bridge_shifts(
        log_same, log_bridge, log_total, same.sum(-1), bridge.sum(-1), tau_max=tau_max, floor=floor
    )
    shift = torch.where(same, shift_same[..., None], torch.where(bridge, shift_bridge[..., None], 0.0))
    weights = torch.exp(logits + shift - log_total[..., None])
    before = torch.exp(log_bridge - log_total)
    return weights, before, torch.where(bridged, torch.exp(log_bridge - log_total + shift_bridge), before)
