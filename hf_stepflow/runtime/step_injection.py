"""Step Momentum Injection inside attention: at the first token of each step, the mean value of the step before it.

Source: METHOD section 4 (docs/method.md). Shapes: B batch, q queries, H query heads, Hkv key-value heads, K keys.
"""

from typing import Any

import torch

from .flow_masks import visible_keys
from .flow_pass import FlowPass
from .step_record import SUMMARY, Field

# Memberships of a chunk of queries, in elements, where they are worked out for all keys at once.
_CHUNK_ELEMENTS = 1 << 24

# Steps of one row whose means are taken by one product.
_TOGETHER = 32


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
            triggered_here = [query for query, record in enumerate(records) if record[Field.TRIGGER]]
            for start in range(0, len(triggered_here), _TOGETHER):
                some = triggered_here[start : start + _TOGETHER]
                means = _means_of_row(flow, row, some, output.shape[1], value, mask)
                spread = means.repeat_interleave(heads // value.shape[1], 0).transpose(0, 1)
                addition[row, some] = flow.plan.settings.alpha * spread.to(output.device, output.dtype)
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


def _means_of_row(
    flow: FlowPass, row: int, some: list[int], queries: int, value: torch.Tensor, mask: Any
) -> torch.Tensor:
    """Mean values [Hkv, n, Dv] of the steps before those that open at n queries: only those steps' slots are read."""
    assert flow.host is not None
    records = [flow.host[row][query] for query in some]
    keys = value.shape[2]
    offset = flow.offset(keys)
    left = max(min(record[Field.PREVIOUS_START] for record in records) - offset, 0)
    right = max(max(record[Field.PREVIOUS_END] for record in records) - offset, left)
    labels, steps = (
        column[row, left:right].to(value.device) for column in flow.key_columns(keys, Field.LABEL, Field.STEP)
    )
    wanted = [(one[Field.LABEL] - int(one[Field.LABEL] % 3 == SUMMARY), one[Field.STEP] - 1) for one in records]
    label, previous = torch.tensor(wanted, device=value.device).T[..., None]
    members = (labels == label) & (steps == previous)
    if flow.plan.settings.smi_window is not None:
        members = members & (_from_the_end(members) <= flow.plan.settings.smi_window)
    if mask is not None:
        rows = [visible_keys(flow, mask, query, query + 1, queries, keys)[0] for query in some]
        visible = torch.cat([one[row if one.shape[0] > 1 else 0, 0, :, left:right] for one in rows])
        members = members & visible.to(value.device)
    return mean_of_members(members, value[row, :, left:right])


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
        means.append(mean_of_members(members, value).transpose(1, 2))
    return torch.cat(means, 1)


def _from_the_end(members: torch.Tensor) -> torch.Tensor:
    """How many members there are from each slot on."""
    return members.flip(-1).cumsum(-1).flip(-1)


def mean_of_members(members: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Averages the value vectors of some slots, for any number of such sets.

    Args:
        members: Bool [..., n, K]: the slots of each set.
        value: Value vectors [..., Hkv, K, D]. Half precision is accumulated in float32.

    Returns:
        The means [..., Hkv, n, D] of the dtype of `value`; zeros for a set without a slot.
    """
    # One weight, rounded to the dtype of the values, serves all slots of a set: dividing by the sum of the weights
    # takes its rounding out again, and the product reads the cache once, without a float32 copy of it.
    accumulator = torch.promote_types(value.dtype, torch.float32)
    number = members.sum(-1, keepdim=True).clamp(min=1).to(accumulator)
    weight = number.reciprocal().to(value.dtype)
    total = torch.matmul((members * weight).unsqueeze(-3), value)
    return (total.to(accumulator) / (number * weight.to(accumulator)).unsqueeze(-3)).to(value.dtype)
