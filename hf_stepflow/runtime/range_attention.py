"""Bridged attention of one query per row where the key groups are ranges: the decode route on the host's knowledge.

Each group is a slice of the KV cache, so keys and values are read once, no mask is built and no head is repeated: per
group one softmax, its log mass, and one weighted sum of values, merged with the masses that the bridge asks for (the
log-sum-exp merge of flash decoding). Shapes: B batch, H query heads, Hkv key-value heads, G = H / Hkv, D, Dv widths.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .bridge import bridge_shifts
from .flow_pass import FlowPass
from .step_record import SUMMARY, Field

# Rows are looped over; larger batches take the general form.
_MAX_ROWS = 16


@dataclass(frozen=True)
class RowRanges:
    """Columns of one row's keys: others, bridge and current segment are [start, bridge), [bridge, same), [same, end).

    Where `is_active` is False the row has one group, [start, end).
    """

    start: int
    bridge: int
    same: int
    end: int
    is_active: bool


def row_ranges(flow: FlowPass, keys: int, mask: Any, kwargs: dict[str, Any]) -> list[RowRanges] | None:
    """The ranges of every row for a decode step, or None where the groups of some row are not ranges.

    They are not where a round holds tool results, where padding stands among the tokens or a window cuts keys that the
    cache still holds, and where logits carry a bias.
    """
    if flow.host is None or isinstance(flow.total, torch.Tensor) or len(flow.host) > _MAX_ROWS:
        return None
    if kwargs.get("position_bias") is not None:
        return None
    remembered = flow.memo("ranges", mask, keys)
    if remembered is not None:
        return remembered or None
    ranges = _row_ranges(flow, flow.total, keys, mask)
    flow.remember(ranges or [], "ranges", mask, keys)
    return ranges


def _row_ranges(flow: FlowPass, total: int, keys: int, mask: Any) -> list[RowRanges] | None:
    assert flow.host is not None
    settings = flow.plan.settings
    offset = max(total - keys, 0)
    ranges = []
    for (record,) in flow.host:
        start = max(record[Field.FIRST_SLOT] if mask is not None else 0, offset)
        if record[Field.HAS_ASIDE]:
            return None
        if record[Field.LABEL] % 3 == SUMMARY:
            bridge, same = record[Field.THINKING_SLOT], record[Field.SUMMARY_SLOT]
        else:
            bridge, same = max(record[Field.FIRST_SLOT], 0) + settings.sink_tokens, record[Field.THINKING_SLOT]
            bridge = bridge if settings.sink_tokens else 0
            if settings.bridge_scope == "step":
                same = max(same, record[Field.STEP_SLOT])
        same = max(same, start)
        bridge = min(max(bridge, start), same)
        ranges.append(
            RowRanges(start - offset, bridge - offset, same - offset, total - offset, bool(record[Field.ACTIVE]))
        )
    if mask is None:
        return ranges
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[1] != 1 or mask.device.type != "cpu":
        return None
    is_visible = mask if mask.dtype == torch.bool else mask == 0
    numbers = is_visible[:, 0, 0, :keys].sum(-1).tolist()
    is_whole = all(number == row.end - row.start for number, row in zip(numbers, ranges, strict=False))
    return ranges if is_whole and len(numbers) in (1, len(ranges)) else None


def range_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: list[RowRanges],
    *,
    tau: "float | torch.Tensor",
    floor: str,
    scaling: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    wants_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...]]:
    """Attention of one query per row with the bridge (METHOD section 3).

    Args:
        query: [B, H, 1, D].
        key, value: [B, Hkv, K, D], [B, Hkv, K, Dv].
        ranges: the key groups of each row.
        tau: tau_max, or [H, 1] of it.
        floor: "share" or "absolute".
        scaling: factor of the logits.
        softcap: logits become softcap * tanh(logits / softcap).
        sink_logits: learned sinks [H], in the denominator only.
        wants_weights: whether to return the probabilities.

    Returns:
        The output [B, 1, H, Dv]; the probabilities [B, H, 1, K] or None; and for the report log p(B) before, its shift,
        where bridged (each [B, H, 1]) and which rows could be bridged [B, 1, 1].
    """
    batch, heads, _, _ = query.shape
    groups = key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    packed = (query * scaling).reshape(batch, groups, heads // groups, -1).to(dtype)
    nothing = torch.finfo(dtype).min / 2
    masses, outputs, probabilities = [], [], []
    for row, part in enumerate(ranges):
        logits = torch.matmul(packed[row], key[row, :, part.start : part.end].to(dtype).transpose(1, 2))
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        cuts = (part.start, part.bridge, part.same, part.end) if part.is_active else (part.start,) * 3 + (part.end,)
        for left, right in zip(cuts, cuts[1:], strict=False):
            if left == right:
                masses.append(logits.new_full((groups, heads // groups), nothing))
                outputs.append(None)
                continue
            piece = logits[..., left - part.start : right - part.start]
            share = torch.softmax(piece, -1)
            masses.append(piece.amax(-1) - share.amax(-1).log())
            outputs.append(torch.matmul(share.to(value.dtype), value[row, :, left:right]))
            probabilities.append((row, left, right, share))
    log_mass = torch.stack(masses).view(batch, 3, heads)
    log_other, log_bridge, log_same = (mass[..., None] for mass in log_mass.unbind(1))
    log_total = torch.logsumexp(log_mass, 1)[..., None]
    if sink_logits is not None:
        log_total = torch.logaddexp(log_total, sink_logits.to(dtype)[None, :, None])
    numbers = torch.tensor(
        [(part.end - part.same, part.same - part.bridge) if part.is_active else (0, 0) for part in ranges]
    ).to(query.device)
    n_same, n_bridge = (column[:, None, None] for column in numbers.unbind(1))
    shift_same, shift_bridge, bridged = bridge_shifts(
        log_same, log_bridge, log_total, n_same, n_bridge, tau_max=tau, floor=floor
    )
    shifts = torch.cat((torch.zeros_like(shift_same), shift_bridge, shift_same), 2)
    share_of = torch.exp(torch.cat((log_other, log_bridge, log_same), 2) + shifts - log_total)
    parts = share_of.view(batch, groups, heads // groups, 3)
    rows = []
    for row in range(batch):
        pieces = [
            parts[row, :, :, column, None].to(value.dtype) * piece
            for column, piece in enumerate(outputs[3 * row : 3 * row + 3])
            if piece is not None
        ]
        rows.append(sum(pieces[1:], pieces[0]))
    output = torch.stack(rows).view(batch, 1, heads, -1)
    weights = None
    if wants_weights:
        weights = query.new_zeros(batch, groups, heads // groups, key.shape[2])
        for row, left, right, share in probabilities:
            column = 0 if left < ranges[row].bridge else 1 if left < ranges[row].same else 2
            column = column if ranges[row].is_active else 2
            weights[row, :, :, left:right] = share * parts[row, :, :, column, None]
        weights = weights.view(batch, heads, 1, -1)
    usable = (n_same > 0) & (n_bridge > 0)
    return output, weights, (log_bridge - log_total, shift_bridge, bridged, usable)
