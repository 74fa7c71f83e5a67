"""Step Momentum Injection inside attention: at the first token of each step, the mean value of the step before it.

Source: METHOD section 4 (docs/method.md). Shapes: B batch, q queries, H query heads, Hkv key-value heads, K keys.
"""

from typing import Any

import torch

from .flow_masks import visible_keys
from .flow_pass import FlowPass
from .momentum import step_momentum
from .step_record import SUMMARY, Field


def inject(
    flow: FlowPass, layer: int, output: torch.Tensor, value: torch.Tensor, mask: Any, window: int | None
) -> torch.Tensor:
    """Adds alpha times the previous step's mean value at the first token of each step.

    Args:
        flow: the pass.
        layer: index of the layer, for the report.
        output: head outputs before the output projection, [B, q, H, Dv].
        value: [B, Hkv, K, Dv].
        mask: the mask of the base implementation.
        window: sliding window of the layer, or None.

    Returns:
        The new head outputs, [B, q, H, Dv].
    """
    batch, queries, heads, width = output.shape
    if flow.host is None:
        places = [(slice(None), query) for query in range(queries)]
    else:
        places = [
            (slice(row, row + 1), query)
            for row, records in enumerate(flow.host)
            for query, record in enumerate(records)
            if record[Field.TRIGGER]
        ]
    addition = torch.zeros_like(output)
    for rows, query in places:
        mean = _mean(flow, rows, query, queries, value[rows], mask, window)
        spread = mean.repeat_interleave(heads // value.shape[1], 1).to(output.device, output.dtype)
        triggered = flow.records[rows, query, Field.TRIGGER].to(output.device) > 0
        addition[rows, query] = torch.where(triggered[:, None, None], flow.plan.settings.alpha * spread, 0.0)
    if flow.state.tally is not None:
        with torch.no_grad():
            flow.state.tally.add_injections(layer, *_effect(addition, output))
    return output + addition


def _effect(addition: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of injections, and the sum of their norms relative to the head output, [B] each."""
    accumulator = torch.promote_types(output.dtype, torch.float32)
    size = addition.to(accumulator).flatten(2).norm(dim=-1)
    ratio = size / output.to(accumulator).flatten(2).norm(dim=-1).clamp(min=torch.finfo(accumulator).tiny)
    return (size > 0).sum(1), ratio.sum(1)


def _mean(
    flow: FlowPass, rows: slice, query: int, queries: int, value: torch.Tensor, mask: Any, window: int | None
) -> torch.Tensor:
    """Mean value [B', Hkv, Dv] of the step before the one that opens at a query, for one row or all.

    On the host's knowledge only the step's own slots are read; otherwise membership is a mask over all keys.
    """
    keys = value.shape[2]
    record = flow.records[rows, query].to(value.device)
    left, right = 0, keys
    offset = flow.offset(keys)
    if flow.host is not None and isinstance(offset, int):
        (known,) = flow.host[rows]
        left = max(known[query][Field.PREVIOUS_START] - offset, 0)
        right = max(known[query][Field.PREVIOUS_END] - offset, left)
    labels, steps = (
        column[rows, left:right].to(value.device) for column in flow.key_columns(keys, Field.LABEL, Field.STEP)
    )
    label = record[:, Field.LABEL] - (record[:, Field.LABEL] % 3 == SUMMARY).int()
    members = (labels == label[:, None]) & (steps == record[:, Field.STEP, None] - 1)
    if flow.plan.settings.smi_window is not None:
        from_the_end = members.flip(1).cumsum(1).flip(1)
        members = members & (from_the_end <= flow.plan.settings.smi_window)
    if mask is not None or window is not None:
        visible, _ = visible_keys(flow, mask, query, query + 1, queries, keys, window)
        assert visible is not None
        visible = visible[rows] if visible.shape[0] > 1 else visible
        members = members & visible[:, 0, 0, left:right].to(value.device)
    batch = record.shape[0]
    edge = torch.zeros(batch, dtype=torch.long, device=value.device)
    return step_momentum(value[:, :, left:right], edge, edge + (right - left), members=members)
