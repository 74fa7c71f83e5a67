"""Step Momentum Injection (SMI): at the first token of each step, the mean value vector of the step before it.

Source: "Reasoning Fails Where Step Flow Breaks" (arXiv 2604.06695); docs/method.md, "Step Momentum Injection". Every
head output of that token, before the output projection, receives alpha times the mean.

* `step_momentum` is the mean of a step given by its slots: the reference.
* `inject` is what models run, on the records of a pass; `inject_by_kernel` is the same on an accelerator.

Shapes: B batch, q queries, n some of them, H query heads, Hkv key-value heads, K keys, D width of a value vector.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .forward import FlowPass
from .step_detector import SUMMARY, Field

# Memberships of a chunk of queries, in elements, where they are worked out for all keys at once.
_CHUNK_ELEMENTS = 1 << 24

# Steps of one row whose means are taken by one product.
_TOGETHER = 32

# Which keys queries [start, end) see, bool broadcastable to [B, 1, end - start, K].
Visible = Callable[[int, int], Tensor]


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
        members: bool [B, K] of the slots that may count, or None for all; applied within the window.

    Returns:
        The mean [B, Hkv, D] of the dtype of `value`; zeros for the rows in which no slot counts.

    Raises:
        ValueError: If `window` is negative.

    Example:
        >>> import torch
        >>> value = torch.tensor([[[[1.0], [3.0], [8.0]]]])
        >>> step_momentum(value, torch.tensor([0]), torch.tensor([2]))
        tensor([[[2.]]])
    """
    if window is not None and window < 0:
        raise ValueError(f"window must be None or at least 0, got {window}")
    slots, start, end = torch.arange(value.shape[2], device=value.device), start[:, None], end[:, None]
    counts = (slots >= start) & (slots < end) & (start >= 0)
    if window is not None:
        counts = counts & (slots >= end - window)
    if members is not None:
        counts = counts & members
    return mean_of_members(counts[:, None], value)[:, :, 0]


def inject(
    flow: FlowPass, layer: int, output: Tensor, value: Tensor, visible: Visible | None, mask: Any = None
) -> Tensor:
    """Adds alpha times the previous step's mean value at the first token of each step.

    Args:
        flow: The pass.
        layer: Index of the layer, for the report.
        output: Head outputs before the output projection, [B, q, H, D].
        value: [B, Hkv, K, D].
        visible: Which keys queries see; None where every query sees all steps before it.
        mask: What `visible` reads, by whose identity layers share what they find.

    Returns:
        The new head outputs, [B, q, H, D].
    """
    alpha, shared = flow.plan.settings.alpha, output.shape[2] // value.shape[1]
    if flow.host is not None and output.shape[1] == 1:
        return _injected_decode(flow, layer, output, value, visible, mask)
    if flow.host is None:
        means = _means_of_all(flow, output.shape[1], value, visible)
        triggered = flow.records[:, :, Field.TRIGGER].to(output.device) > 0
        spread = means.repeat_interleave(shared, 2).to(output.device, output.dtype)
        addition = torch.where(triggered[:, :, None, None], alpha * spread, 0.0)
    else:
        addition = torch.zeros_like(output)
        for row, records in enumerate(flow.host):
            triggered_here = [query for query, record in enumerate(records) if record[Field.TRIGGER]]
            for start in range(0, len(triggered_here), _TOGETHER):
                some = triggered_here[start : start + _TOGETHER]
                opening = [records[query] for query in some]
                members, left = _members_of(flow, [row], opening, value.shape[2], value.device)
                if visible is not None:
                    part = slice(left, left + members.shape[1])
                    seen = torch.cat([visible(query, query + 1)[:, 0, :, part] for query in some], 1)
                    members = members & seen[row if seen.shape[0] > 1 else 0].to(members.device)
                means = mean_of_members(members, value[row, :, left : left + members.shape[1]])
                spread = means.repeat_interleave(shared, 0).transpose(0, 1)
                addition[row, some] = alpha * spread.to(output.device, output.dtype)
    if flow.state.tally is not None:
        with torch.no_grad():
            flow.state.tally.add_injections(layer, *_effect(addition, output))
    return output + addition


def _injected_decode(
    flow: FlowPass, layer: int, output: Tensor, value: Tensor, visible: Visible | None, mask: Any
) -> Tensor:
    """One query a row: all rows at once, with weights that layers share."""
    keys, heads = value.shape[2], value.shape[1]

    def find() -> tuple[int, Tensor, Tensor]:
        """First key, weights [B, 1, 1, n] and the factors of the sums, [B, 1, 1, 1]."""
        assert flow.host is not None
        rows = [row for row, (record,) in enumerate(flow.host) if record[Field.TRIGGER]]
        members, first = _members_of(flow, rows, [flow.host[row][0] for row in rows], keys, value.device)
        counts = members
        if len(rows) < len(flow.host):
            counts = members.new_zeros(len(flow.host), members.shape[1])
            counts[rows] = members
        if visible is not None:
            counts = counts & visible(0, 1)[:, 0, 0, first : first + members.shape[1]].to(counts.device)
        weights, rest = _weights(counts[:, None, None], value.dtype)
        return first, weights, flow.plan.settings.alpha / rest

    first, weights, factor = flow.found(mask, ("step", keys, value.dtype, value.device), find)
    sums = torch.matmul(weights, value[:, :, first : first + weights.shape[3]])
    addition = (sums * factor).to(output.device, output.dtype)
    if flow.state.tally is not None:
        with torch.no_grad():
            repeats = (output.shape[2] // heads) ** 0.5
            dtype = torch.promote_types(output.dtype, torch.float32)
            size = torch.linalg.vector_norm(addition, dim=(1, 2, 3), dtype=dtype) * repeats
            whole = torch.linalg.vector_norm(output, dim=(1, 2, 3), dtype=dtype).clamp(min=torch.finfo(dtype).tiny)
            flow.state.tally.add_injections(layer, size > 0, size / whole)
    return (output.view(len(output), heads, -1, output.shape[3]) + addition).view(output.shape)


def inject_by_kernel(
    kernels: Any, flow: FlowPass, layer: int, output: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """As `inject`, by one kernel and in place; rows that begin no step cost a read of their record.

    Args:
        kernels: The kernels of the device.
        flow: The pass.
        layer: Index of the layer, for the report.
        output: [B, q, H, D], contiguous.
        value: [B, Hkv, K, D].
        mask: Which keys queries see, [B or 1, 1, q, K], bool or to be added, or None.
    """
    settings, output = flow.plan.settings, output.contiguous()
    sums = None if flow.state.tally is None else flow.state.tally.sums_on(output.device, layer, 1)
    window = -1 if settings.smi_window is None else settings.smi_window
    kernels.inject(output, value, mask, *flow.on(output.device), sums, *flow.counted, settings.alpha, window)
    return output


def _effect(addition: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Number of injections, and the sum of their norms relative to the head output, [B] each."""
    accumulator = torch.promote_types(output.dtype, torch.float32)
    size = addition.to(accumulator).flatten(2).norm(dim=-1)
    ratio = size / output.to(accumulator).flatten(2).norm(dim=-1).clamp(min=torch.finfo(accumulator).tiny)
    return (size > 0).sum(1), ratio.sum(1)


def _members_of(
    flow: FlowPass, rows: list[int], opening: list[list[int]], keys: int, device: torch.device
) -> tuple[Tensor, int]:
    """The keys of the steps before those that n queries open: bool [n, K'], and the first of the K' keys.

    Args:
        flow: The pass.
        rows: The row of each query, or the one row of all.
        opening: The records of the queries.
        keys: Number of keys.
        device: Where the result is wanted.
    """
    offset = int(flow.offset(keys))
    left = max(min(record[Field.PREVIOUS_START] for record in opening) - offset, 0)
    right = max(max(record[Field.PREVIOUS_END] for record in opening) - offset, left)
    columns = flow.key_columns(keys, Field.LABEL, Field.STEP)
    chosen = torch.tensor(rows, device=columns[0].device)
    labels, steps = (column[:, left:right].index_select(0, chosen).to(device) for column in columns)
    wanted = [(one[Field.LABEL] - int(one[Field.LABEL] % 3 == SUMMARY), one[Field.STEP] - 1) for one in opening]
    label, previous = torch.tensor(wanted, device=device).T[..., None]
    return _last_of((labels == label) & (steps == previous), flow.plan.settings.smi_window), left


def _means_of_all(flow: FlowPass, queries: int, value: Tensor, visible: Visible | None) -> Tensor:
    """The same for every query, [B, q, Hkv, D], where the host knows nothing: membership is a mask over all keys."""
    keys = value.shape[2]
    labels, steps = (column.to(value.device)[:, None] for column in flow.key_columns(keys, Field.LABEL, Field.STEP))
    records = flow.records.to(value.device)
    label = (records[:, :, Field.LABEL] - (records[:, :, Field.LABEL] % 3 == SUMMARY).int())[:, :, None]
    previous = records[:, :, Field.STEP, None] - 1
    chunk = max(1, _CHUNK_ELEMENTS // (value.shape[0] * keys))
    means = []
    for start in range(0, queries, chunk):
        end = min(start + chunk, queries)
        members = (labels == label[:, start:end]) & (steps == previous[:, start:end])
        members = _last_of(members, flow.plan.settings.smi_window)
        if visible is not None:
            members = members & visible(start, end)[:, 0].to(value.device)
        means.append(mean_of_members(members, value).transpose(1, 2))
    return torch.cat(means, 1)


def _last_of(members: Tensor, window: int | None) -> Tensor:
    """The last members of each set, [..., K], or all."""
    return members if window is None else members & (members.flip(-1).cumsum(-1).flip(-1) <= window)


def mean_of_members(members: Tensor, value: Tensor) -> Tensor:
    """Averages the value vectors of some slots, for any number of such sets.

    Args:
        members: bool [..., n, K]: the slots of each set.
        value: Value vectors [..., Hkv, K, D]. Half precision is accumulated in float32.

    Returns:
        The means [..., Hkv, n, D] of the dtype of `value`; zeros for a set without a slot.
    """
    weights, rest = _weights(members, value.dtype)
    return (torch.matmul(weights.unsqueeze(-3), value) / rest.unsqueeze(-3)).to(value.dtype)


def _weights(members: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights of the slots of each set, and what divides their sums, at least float32.

    One weight, rounded to the dtype of the values, serves all slots of a set: dividing by the sum of the weights takes
    its rounding out again, and the product reads the cache once, without a float32 copy of it.
    """
    accumulator = torch.promote_types(dtype, torch.float32)
    number = members.sum(-1, keepdim=True).clamp(min=1).to(accumulator)
    weight = number.reciprocal().to(dtype)
    return members * weight, number * weight.to(accumulator)
