"""The momentum of Step Momentum Injection (SMI) as a plain function: the mean value vector of the previous step.

Source: "Reasoning Fails Where Step Flow Breaks" (arXiv 2604.06695), Step Momentum Injection. At the first token of a
step, every head output (before the output projection) receives alpha times the mean value vector of the previous step.

Shapes: B batch, Hkv key-value heads, K cache slots, D width of a value vector.
"""

import torch
from torch import Tensor

from .step_injection import mean_of_members


def step_momentum(
    value: Tensor, start: Tensor, end: Tensor, window: int | None = None, *, members: Tensor | None = None
) -> Tensor:
    """Averages the value vectors of the previous step, row by row.

    Args:
        value: Value vectors [B, Hkv, K, D] of every cache slot, all finite. Half precision is accumulated in float32.
        start: First slot of the previous step, long [B]. Negative means that the row has no previous step; where part
            of a step has left the cache, clamp to 0.
        end: The slot after the last one of the previous step, long [B], at most K.
        window: Use only the last `window` slots of the step; None uses the whole step (the paper's rule).
        members: Bool [B, K] of the slots that may count, or None for all; applied within the window.

    Returns:
        The mean [B, Hkv, D] of the dtype of `value`; zeros for the rows in which no slot counts.

    Raises:
        ValueError: If `window` is negative.
    """
    if window is not None and window < 0:
        raise ValueError(f"window must be None or at least 0, got {window}")
    batch, heads, length, width = value.shape
    if window == 0 or length == 0:
        return value.new_zeros(batch, heads, width)

    start, end = start[:, None], end[:, None]
    if window is None:
        slots = torch.arange(length, device=value.device)[None, :]
    else:
        # Only the window is read: [B, w] slots that end with the step.
        window = min(window, length)
        slots = end - window + torch.arange(window, device=value.device)
        within = slots.clamp(0, length - 1)
        value = value.gather(2, within[:, None, :, None].expand(batch, heads, window, width))
        members = None if members is None else members.gather(1, within)
    counts = (slots >= start) & (slots < end) & (start >= 0)
    if members is not None:
        counts = counts & members

    return mean_of_members(counts[:, None], value)[:, :, 0]
