"""The Odds-Equal Bridge (OEB) as a plain function on dense attention logits.

What it does, and its source: `bridge_shifts`. Models compute the same by key groups, without dense logits for all
queries (`bridged_weights`, `decode_attention`). Shapes: B batch, H query heads, q queries, K keys.
"""

import torch
from torch import Tensor

from .bridge_shifts import bridge_shifts


def odds_equal_bridge(
    logits: Tensor,
    same: Tensor,
    bridge: Tensor,
    *,
    tau_max: float | Tensor,
    floor: str = "share",
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Applies the Odds-Equal Bridge to dense attention logits.

    A query and head without a visible key in S or in B, or whose bridge mass already holds the floor, keeps its logits
    bit for bit.

    Args:
        logits: Attention logits [B, H, q, K] after scaling, softcap and mask; -inf marks an invisible key. Pass
            float32 or float64 for an exact floor: half-precision logits are shifted in float32, then rounded.
        same: Bool, broadcastable to [B, H, q, K]: the keys of S. Invisible keys may be set and never count.
        bridge: Bool, broadcastable to [B, H, q, K]: the keys of B. No key may be in both groups.
        tau_max: The cap of the floor, in [0, 1]; a float or a tensor broadcastable to [B, H, q] (for instance [H, 1],
            with 0 for the heads to be left alone).
        floor: "share" sets the floor as a share of the mass that S and B hold together; "absolute" is the paper's
            rule, which leaves a head alone where the floor reaches that mass.
        sink_logits: Learned sink logits [H], part of the softmax denominator, or None.

    Returns:
        Logits [B, H, q, K] of the dtype of `logits`. Their softmax, sinks included, is the projected attention.

    Raises:
        ValueError: If `tau_max` is a float outside [0, 1], or `floor`, the masks' dtype or the sinks' shape are wrong.
    """
    for name, mask in (("same", same), ("bridge", bridge)):
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} must be a bool mask, got {mask.dtype}")
    if sink_logits is not None and sink_logits.shape != logits.shape[1:2]:
        raise ValueError(
            f"sink_logits must hold one logit for each of the {logits.shape[1]} heads, got {list(sink_logits.shape)}"
        )

    work = logits.to(torch.promote_types(logits.dtype, torch.float32))
    visible = work > float("-inf")
    # An empty group gets a finite mass far below any real one, because log-sum-exp of -inf alone has a NaN gradient.
    nothing = torch.finfo(work.dtype).min / 2
    same, bridge = same & visible, bridge & visible
    log_same = work.masked_fill(~same, nothing).logsumexp(-1)
    log_bridge = work.masked_fill(~bridge, nothing).logsumexp(-1)
    log_total = None
    if floor == "absolute":
        log_total = work.masked_fill(~visible, nothing).logsumexp(-1)
        if sink_logits is not None:
            log_total = torch.logaddexp(log_total, sink_logits.to(work.dtype)[None, :, None])

    shift_same, shift_bridge, active = bridge_shifts(
        log_same, log_bridge, log_total, same.sum(-1), bridge.sum(-1), tau_max=tau_max, floor=floor
    )
    shift = torch.where(same, shift_same[..., None], shift_bridge[..., None])
    shifted = torch.where(active[..., None] & (same | bridge), work + shift, work)
    return shifted.to(logits.dtype)
