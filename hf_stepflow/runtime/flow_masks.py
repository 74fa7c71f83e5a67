"""Which keys a query sees, read from whatever mask the base implementation was given.

Masks come as None (plain causal attention: no padding, no window that cuts), bool [B, 1, q, K] (sdpa), float
[B, 1, q, K] (eager), a BlockMask (flex), or an object whose `rows(start, end)` writes out the rows that are asked for.
"""

from typing import Any

import torch

from .flow_pass import FlowPass

# Entries of a chunk of the mask, where it is counted for all queries.
_CHUNK_ELEMENTS = 1 << 24


def visible_keys(
    flow: FlowPass | None, mask: Any, start: int, end: int, queries: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which keys queries [start, end) see.

    Args:
        flow: the pass; without one there must be a mask.
        mask: the mask as the base implementation has it.
        start: the first query asked for.
        end: the one after the last.
        queries: number of queries of the pass.
        keys: number of keys of the layer.

    Returns:
        visible: bool broadcastable to [B, 1, c, K]; and an additive bias on the logits or None.
    """
    if isinstance(mask, torch.Tensor):
        rows = mask[:, :, start:end, :keys]
        if mask.dtype == torch.bool:
            return rows, None
        visible = rows > torch.finfo(mask.dtype).min / 2
        return visible, torch.where(visible, rows, 0.0)
    if mask is None:
        assert flow is not None
        return _causal(flow, start, end, queries, keys), None
    if hasattr(mask, "mask_mod"):
        return _dense_block_mask(mask, start, end, keys), None
    return mask.rows(start, end), None


def _causal(flow: FlowPass, start: int, end: int, queries: int, keys: int) -> torch.Tensor:
    device = flow.records.device
    query_slots = torch.arange(start, end, device=device) + (flow.total - queries)
    key_slots = torch.arange(keys, device=device) + flow.offset(keys)
    return (key_slots <= query_slots[:, None])[None, None]


def _dense_block_mask(mask: Any, start: int, end: int, keys: int) -> torch.Tensor:
    """Rows of a flex BlockMask, written out."""
    from torch.nn.attention.flex_attention import create_mask

    def shifted(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return mask.mask_mod(batch, head, query + start, key)

    return create_mask(shifted, mask.shape[0], 1, end - start, keys, device=mask.kv_num_blocks.device.type)


def visible_numbers(flow: FlowPass, mask: Any, queries: int, keys: int) -> torch.Tensor:
    """How many keys each query sees, long [B, q] (or [1, q] if the same in all rows)."""
    remembered = flow.memo("numbers", mask, queries, keys)
    if remembered is not None:
        return remembered
    parts = []
    chunk = max(1, _CHUNK_ELEMENTS // max(1, keys * flow.records.shape[0]))
    for start in range(0, queries, chunk):
        visible, _ = visible_keys(flow, mask, start, min(start + chunk, queries), queries, keys)
        parts.append(visible[:, 0].sum(-1))
    return flow.remember(torch.cat(parts, 1), "numbers", mask, queries, keys)
