"""Step Momentum Injection inside attention: at the first token of each step, the mean value of the step before it.

Source: METHOD section 4 (docs/method.md). Shapes: B batch, q queries, H query heads, Hkv key-value heads, K keys.
"""

from typing import Any

import torch

from .flow_masks import visible_keys
from .flow_pass import FlowPass
from .momentum import step_momentum
from .step_record import SUMMARY, Field

# Memberships of a chunk of queries, in elements, where they are worked out for all keys at once.
_CHUNK_ELEMENTS = 1 << 24


def inject(flow: FlowPass, layer: int, output: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
    """Adds alpha times the previous step's mean value at the first token of each step.

    Args:
        flow: the pass.
        layer: index of the layer, for the report.
        output: head outputs before the output projection, [B, q, H, Dv].
        value: [B, Hkv, K, Dv].
        mask: the mask of the base implementation.

    Returns:
        The new head outputs, [B, q, H, Dv].
    """
    heads = output.shape[2]
    if flow.host is None:
        means = _means_of_all(flow, output.shape[1], value, mask)
        triggered = flow.records[:, :, Field.TRIGGER].to(output.device) > 0
        spread = means.repeat_interleave(heads // value.shape[1], 2).to(output.device, output.dtype)
        addition = torch.where(triggered[:, :, None, None], flow.plan.settings.alpha * spread, 0.0)
    else:
        addition = torch.zeros_like(output)
        for row, records in enumerate(flow.host):
            for query, record in enumerate(records):
                if record[Field.TRIGGER]:
                    mean = _mean(flow, row, query, output.shape[1], value, mask)
                    spread = mean.repeat_interleave(heads // value.shape[1], 0).to(output.device, output.dtype)
                    addition[row, query] = flow.plan.settings.alpha * spread
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


def _mean(flow: FlowPass, row: int, query: int, queries: int, value: torch.Tensor, mask: Any) -> torch.Tensor:
    """Mean value [Hkv, Dv] of the step before the one that opens at a query: only that step's slots are read."""
    assert flow.host is not None
    record = flow.host[row][query]
    keys = value.shape[2]
    offset = flow.offset(keys)
    left = max(record[Field.PREVIOUS_START] - offset, 0)
    right = max(record[Field.PREVIOUS_END] - offset, left)
    labels, steps = (
        column[row, left:right].to(value.device) for column in flow.key_columns(keys, Field.LABEL, Field.STEP)
    )
    label = record[Field.LABEL] - int(record[Field.LABEL] % 3 == SUMMARY)
    members = (labels == label) & (steps == record[Field.STEP] - 1)
    if flow.plan.settings.smi_window is not None:
        members = members & (_from_the_end(members) <= flow.plan.settings.smi_window)
    if mask is not None:
        visible, _ = visible_keys(flow, mask, query, query + 1, queries, keys)
        members = members & visible[row if visible.shape[0] > 1 else 0, 0, 0, left:right].to(value.device)
    edge = torch.zeros(1, dtype=torch.long, device=value.device)
    return step_momentum(value[row : row + 1, :, left:right], edge, edge + (right - left), members=members[None])[0]


def _means_of_all(flow: FlowPass, queries: int, value: torch.Tensor, mask: Any) -> torch.Tensor:
    """The same for every query, [B, q, Hkv, Dv], where the host knows nothing: membership is a mask over all keys."""
    keys = value.shape[2]
    labels, steps = (column.to(value.device)[:, None] for column in flow.key_columns(keys, Field.LABEL, Field.STEP))
    records = flow.records.to(value.device)
    label = (records[:, :, Field.LABEL] - (records[:, :, Field.LABEL] % 3 == SUMMARY).int())[:, :, None]
    previous = records[:, :, Field.STEP, None] - 1
    chunk = max(1, _CHUNK_ELEMENTS // (value.shape[0] * keys))
    means = []
    for start in range(0, queries, chunk):
        end = min(start + chunk, queries)
        visible, _ = visible_keys(flow, mask, start, end, queries, keys)
        members = (labels == label[:, start:end]) & (steps == previous[:, start:end]) & visible[:, 0].to(value.device)
        if flow.plan.settings.smi_window is not None:
            members = members & (_from_the_end(members) <= flow.plan.settings.smi_window)
        accumulator = torch.promote_types(value.dtype, torch.float32)
        number = members.sum(-1, keepdim=True).clamp(min=1).to(accumulator)
        weight = number.reciprocal().to(value.dtype)
        total = torch.matmul((members * weight)[:, None], value).to(accumulator)
        means.append((total / (number * weight.to(accumulator))[:, None]).to(value.dtype).transpose(1, 2))
    return torch.cat(means, 1)


def _from_the_end(members: torch.Tensor) -> torch.Tensor:
    """How many members there are from each slot on."""
    return members.flip(-1).cumsum(-1).flip(-1)
