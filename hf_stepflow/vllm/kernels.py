"""Triton kernels over the paged cache of vLLM: labels, attention with the bridge, and the injection.

They are the runtime's kernels for packed tokens and block tables: operators of the namespace `hf_stepflow`, a launch
each for all requests of a pass (attention over many keys takes a second one, which merges its parts), without a host
read. Where they are missing, `attention` and `sequences` do the same sequence by sequence.

The tests compile them for GPUs and run them by Triton's interpreter. They have not been run on a GPU.

Shapes: R requests, T tokens of the pass (more where vLLM pads it), H query heads, Hkv key-value heads, G = H / Hkv,
N tokens a block, D width, F record fields.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_stepflow.runtime.kernels import (
    _KEYS,
    _ROWS,
    _SPLIT_KEYS,
    ACTIVE,
    COUNT,
    LABEL,
    PREVIOUS_END,
    PREVIOUS_START,
    STEP,
    SUMS_UP,
    TRIGGER,
    _absorb,
    _bridged,
    _by_label,
    _caps,
    _empty,
    _gather,
    _leave,
    _power,
    _product,
    _programs,
    _ranges,
    _record_at,
    _registered,
    _store,
    _walk,
)

# The widest heads that kernels take.
WIDEST = 256


@triton.jit
def _paged_label(
    records, ids, starts, lengths, record_table, on, openings, counts, features, transition, split_variant, split,
    marker_next, marker_found, marker_depth, size, states, marker_states, split_states, records_n, records_t,
    record_table_r,
    HAS_OPENINGS: tl.constexpr, HAS_SPLITS: tl.constexpr, HAS_HEADERS: tl.constexpr, IMPLICIT: tl.constexpr,
    SHORTEST: tl.constexpr, SPAN: tl.constexpr, FEATURES: tl.constexpr, RECORD_TOKENS: tl.constexpr,
):  # fmt: skip
    """The tokens of one request."""
    row = tl.program_id(0)
    if tl.load(on + row) > 0:
        begin = tl.load(starts + row)
        queries = tl.load(starts + row + 1) - begin
        start = tl.load(lengths + row) - queries
        opening = start * 0 - 1
        if HAS_OPENINGS:
            opening = tl.load(openings + row)
        table = record_table + row.to(tl.int64) * record_table_r
        before = _record_at(records, table, tl.maximum(start - 1, 0), records_n, records_t, RECORD_TOKENS)
        if start > 0:
            is_lost = tl.load(before + COUNT) != start
            tl.atomic_max(counts + 2, tl.where(is_lost, start, 0).to(tl.int64))
        bridged, injected = _walk(
            records, table, None, ids + begin, None, features, transition, split_variant, split, marker_next,
            marker_found, marker_depth, start, queries, size, opening, states, marker_states, split_states,
            records_n, records_t, False, HAS_SPLITS, HAS_HEADERS, IMPLICIT, SHORTEST, SPAN, 0, FEATURES, RECORD_TOKENS,
        )  # fmt: skip
        tl.atomic_add(counts, bridged.to(tl.int64))
        tl.atomic_add(counts + 1, injected.to(tl.int64))


@triton.jit
def _queries(
    tile, line, starts, lengths, on, records, record_table, requests, records_n, records_t, record_table_r,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, RECORD_TOKENS: tl.constexpr,
):  # fmt: skip
    """The queries of a tile: request, tokens, positions, which lines are a query with StepFlow, and their records.

    A tile holds `QUERIES` tokens of one request. Request r starts with tile starts[r] // QUERIES + r, so nobody needs
    to know how many tiles each has.
    """
    low, high = tile * 0, tile * 0 + requests
    while low < high:
        middle = (low + high) // 2
        is_before = tl.load(starts + middle) // QUERIES + middle <= tile
        low, high = tl.where(is_before, middle + 1, low), tl.where(is_before, high, middle)
    row = low - 1
    begin = tl.load(starts + row)
    queries = tl.where(tl.load(on + row) > 0, tl.load(starts + row + 1) - begin, 0)
    length = tl.load(lengths + row)
    place = (tile - begin // QUERIES - row) * QUERIES + line // GROUP
    is_query = (line < QUERIES * GROUP) & (place < queries)
    place = tl.where(is_query, place, 0)
    own = tl.maximum(tl.minimum(length - queries + place, length - 1), 0)
    table = record_table + row.to(tl.int64) * record_table_r
    record = _record_at(records, table, own, records_n, records_t, RECORD_TOKENS)
    return row, begin + place, own, is_query, record


@triton.jit
def _paged_attention(
    query, cache, table, records, record_table, starts, lengths, on, caps, sinks, output, parts, means,
    requests, keys_of_split, scaling, softcap, query_t, query_h, cache_n, cache_h, cache_t, table_r,
    records_n, records_t, record_table_r, output_t, output_h,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, SPLITS: tl.constexpr, TOKENS: tl.constexpr, RECORD_TOKENS: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ABSOLUTE: tl.constexpr, BY_STEP: tl.constexpr,
    SINK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Some queries of a request and the heads that share a key-value head, over one split of the keys."""
    tile, split = tl.program_id(0), tl.program_id(1) % SPLITS
    head = (tl.program_id(1) // SPLITS).to(tl.int64)
    line, column = tl.arange(0, ROWS), tl.arange(0, D)
    row, token, own, is_query, record = _queries(
        tile, line, starts, lengths, on, records, record_table, requests, records_n, records_t, record_table_r,
        GROUP, QUERIES, RECORD_TOKENS,
    )  # fmt: skip
    label, first, step_slot, after_sinks, same_from, bridge_from, is_thinking, is_active, is_divided = _ranges(
        record, own, is_query, BY_STEP, SINK_TOKENS
    )
    if tl.max(is_active.to(tl.int32)) == 0:
        return
    by_label = tl.max(is_divided.to(tl.int32)) > 0
    full_head, in_width = head * GROUP + line % GROUP, column < WIDTH
    token = token.to(tl.int64)
    q = tl.load(
        query + token[:, None] * query_t + full_head[:, None] * query_h + column[None, :],
        mask=is_active[:, None] & in_width[None, :], other=0.0,
    )  # fmt: skip
    top_o, total_o, number_o, mean_o = _empty(ROWS, D)
    top_s, total_s, number_s, mean_s = _empty(ROWS, D)
    top_b, total_b, number_b, mean_b = _empty(ROWS, D)
    last = tl.max(tl.where(is_active, own, 0)) + 1
    begin = 0
    if WINDOW >= 0:
        begin = tl.maximum(tl.min(tl.where(is_active, own, last)) - WINDOW + 1, 0)
    begin += split * keys_of_split
    end = last if SPLITS == 1 else tl.where(split == SPLITS - 1, last, tl.minimum(begin + keys_of_split, last))
    table += row.to(tl.int64) * table_r
    record_table += row.to(tl.int64) * record_table_r
    for block in range(begin, end, KEYS):
        slot = block + tl.arange(0, KEYS)
        is_key = slot < end
        held = tl.where(is_key, slot, block)
        page = tl.load(table + held // TOKENS).to(tl.int64)
        here = cache + page * cache_n + head * cache_h + (held % TOKENS) * cache_t
        k = tl.load(here[None, :] + column[:, None], mask=is_key[None, :] & in_width[:, None], other=0.0)
        v = tl.load(here[:, None] + WIDTH + column[None, :], mask=is_key[:, None] & in_width[None, :], other=0.0)
        logits = _product(q, k) * scaling
        if HAS_SOFTCAP:
            small = tl.exp(-2.0 * tl.abs(logits) / softcap)
            logits = tl.where(logits < 0, -softcap, softcap) * (1.0 - small) / (1.0 + small)
        visible = is_active[:, None] & is_key[None, :] & (slot[None, :] <= own[:, None])
        if WINDOW >= 0:
            visible = visible & (slot[None, :] > own[:, None] - WINDOW)
        is_same = slot[None, :] >= same_from[:, None]
        is_bridge = (slot[None, :] >= bridge_from[:, None]) & (slot[None, :] < same_from[:, None])
        if by_label:
            known = tl.load(_record_at(records, record_table, held, records_n, records_t, RECORD_TOKENS) + LABEL)
            is_same, is_bridge = _by_label(
                is_same, is_bridge, known[None, :], slot, label, first, step_slot, after_sinks, is_thinking,
                is_divided, BY_STEP,
            )  # fmt: skip
        is_same, is_bridge = is_same & visible, is_bridge & visible
        rest = visible & ~is_same & ~is_bridge
        top_s, total_s, number_s, mean_s = _absorb(top_s, total_s, number_s, mean_s, logits, is_same, v)
        top_b, total_b, number_b, mean_b = _absorb(top_b, total_b, number_b, mean_b, logits, is_bridge, v)
        top_o, total_o, number_o, mean_o = _absorb(top_o, total_o, number_o, mean_o, logits, rest, v)

    if SPLITS == 1:
        mean, _, _, _ = _bridged(
            top_o, total_o, mean_o, top_s, total_s, number_s, mean_s, top_b, total_b, number_b, mean_b,
            caps, sinks, full_head, is_active, HAS_SINKS, ABSOLUTE,
        )  # fmt: skip
        target = output + token[:, None] * output_t + full_head[:, None] * output_h + column[None, :]
        _store(target, mean, is_active, in_width)
    else:
        part = ((head * tl.num_programs(0) + tile) * SPLITS + split) * 3
        _leave(parts, means, part, top_o, total_o, number_o, mean_o, line, column, ROWS, D)
        _leave(parts, means, part + 1, top_s, total_s, number_s, mean_s, line, column, ROWS, D)
        _leave(parts, means, part + 2, top_b, total_b, number_b, mean_b, line, column, ROWS, D)


@triton.jit
def _merge_paged(
    parts, means, records, record_table, starts, lengths, on, caps, sinks, output, requests,
    records_n, records_t, record_table_r, output_t, output_h,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr, RECORD_TOKENS: tl.constexpr, HAS_SINKS: tl.constexpr, ABSOLUTE: tl.constexpr,
):  # fmt: skip
    """The queries of one program of `_paged_attention`, from all splits."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    line, column = tl.arange(0, ROWS), tl.arange(0, D)
    _, token, _, is_query, record = _queries(
        tile, line, starts, lengths, on, records, record_table, requests, records_n, records_t, record_table_r,
        GROUP, QUERIES, RECORD_TOKENS,
    )  # fmt: skip
    is_active = is_query & (tl.load(record + ACTIVE) > 0)
    if tl.max(is_active.to(tl.int32)) == 0:
        return
    full_head = head * GROUP + line % GROUP
    part = (head * tl.num_programs(0) + tile) * SPLITS * 3
    top_o, total_o, _, mean_o = _gather(parts, means, part, line, column, ROWS, D, SPLITS)
    top_s, total_s, number_s, mean_s = _gather(parts, means, part + 1, line, column, ROWS, D, SPLITS)
    top_b, total_b, number_b, mean_b = _gather(parts, means, part + 2, line, column, ROWS, D, SPLITS)
    mean, _, _, _ = _bridged(
        top_o, total_o, mean_o, top_s, total_s, number_s, mean_s, top_b, total_b, number_b, mean_b,
        caps, sinks, full_head, is_active, HAS_SINKS, ABSOLUTE,
    )  # fmt: skip
    target = output + token.to(tl.int64)[:, None] * output_t + full_head[:, None] * output_h + column[None, :]
    _store(target, mean, is_active, column < WIDTH)


@triton.jit
def _paged_inject(
    output, cache, table, records, record_table, starts, lengths, on,
    requests, alpha, cache_n, cache_h, cache_t, table_r, records_n, records_t, record_table_r, output_t, output_h,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
    RECORD_TOKENS: tl.constexpr, WINDOW: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One token and the heads that share a key-value head, in place."""
    tile, head, column = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, D)
    row, token, own, is_query, record = _queries(
        tile, tile * 0, starts, lengths, on, records, record_table, requests, records_n, records_t, record_table_r,
        1, 1, RECORD_TOKENS,
    )  # fmt: skip
    if is_query & (tl.load(record + TRIGGER) > 0):
        label, step = tl.load(record + LABEL), tl.load(record + STEP) - 1
        label -= (label % 3 == SUMS_UP).to(tl.int32)
        begin, end = tl.maximum(tl.load(record + PREVIOUS_START), 0), tl.load(record + PREVIOUS_END)
        if WINDOW >= 0:
            begin = tl.maximum(begin, own - WINDOW + 1)
        table += row.to(tl.int64) * table_r
        record_table += row.to(tl.int64) * record_table_r
        in_width = column < WIDTH
        number = tile * 0
        for block in range(begin, end, KEYS):
            slot = block + tl.arange(0, KEYS)
            member = _of_step(
                records, record_table, slot, block, end, label, step, records_n, records_t, RECORD_TOKENS
            )
            number += tl.sum(member.to(tl.int32))
        used = number
        if LAST >= 0:
            used = tl.minimum(number, LAST)
        total = tl.zeros((D,), tl.float32)
        passed = tile * 0
        for block in range(begin, end, KEYS):
            slot = block + tl.arange(0, KEYS)
            member = _of_step(
                records, record_table, slot, block, end, label, step, records_n, records_t, RECORD_TOKENS
            )
            rank = passed + tl.cumsum(member.to(tl.int32), 0)
            passed += tl.sum(member.to(tl.int32))
            member = member & (rank > number - used)
            held = tl.where(member, slot, block)
            page = tl.load(table + held // TOKENS).to(tl.int64)
            here = cache + page * cache_n + head * cache_h + (held % TOKENS) * cache_t + WIDTH
            some = tl.load(here[:, None] + column[None, :], mask=member[:, None] & in_width[None, :], other=0.0)
            total += tl.sum(some.to(tl.float32), 0)
        mean = (total / tl.maximum(used, 1)).to(cache.dtype.element_ty).to(tl.float32)
        added = (alpha * mean).to(output.dtype.element_ty).to(tl.float32)
        for member_of_group in range(GROUP):
            target = output + token.to(tl.int64) * output_t + (head * GROUP + member_of_group) * output_h + column
            before = tl.load(target, mask=in_width, other=0.0).to(tl.float32)
            tl.store(target, (before + added).to(output.dtype.element_ty), mask=in_width)


@triton.jit
def _of_step(records, record_table, slot, inside, end, label, step, records_n, records_t, RECORD_TOKENS: tl.constexpr):
    """Which slots before the end belong to a step; `inside` is one of them."""
    is_slot = slot < end
    record = _record_at(records, record_table, tl.where(is_slot, slot, inside), records_n, records_t, RECORD_TOKENS)
    return is_slot & (tl.load(record + LABEL) == label) & (tl.load(record + STEP) == step)


def _label(
    records: Tensor, ids: Tensor, starts: Tensor, lengths: Tensor, record_table: Tensor, on: Tensor,
    openings: Tensor | None, counts: Tensor, tables: list[Tensor], has_headers: bool, is_implicit: bool, shortest: int,
    span: int,
) -> None:  # fmt: skip
    features, transition, split_variant, split, marker_next, *_ = tables
    _paged_label[on.shape[0],](
        records, ids, starts, lengths, record_table, on, openings, counts, *tables,
        features.shape[0] - 1, transition.shape[1], marker_next.shape[1], split_variant.shape[1],
        *_record_strides(records), record_table.stride(0),
        HAS_OPENINGS=openings is not None, HAS_SPLITS=split.shape[0] > 1, HAS_HEADERS=has_headers,
        IMPLICIT=is_implicit, SHORTEST=shortest, SPAN=span, FEATURES=features.shape[1],
        RECORD_TOKENS=records.shape[2],
    )  # fmt: skip


def _attend(
    output: Tensor, query: Tensor, cache: Tensor, table: Tensor, records: Tensor, record_table: Tensor, starts: Tensor,
    lengths: Tensor, on: Tensor, tau: list[float], sinks: Tensor | None, keys: int, scaling: float,
    softcap: float | None, window: int, is_absolute: bool, by_step: bool, sink_tokens: int, splits: int = 0,
) -> None:  # fmt: skip
    tokens, heads, width = query.shape
    requests, key_heads = on.shape[0], cache.shape[1]
    group = heads // key_heads
    query = query if query.stride(2) == 1 else query.contiguous()
    together = min(triton.next_power_of_2(triton.cdiv(tokens, requests)), max(1, _ROWS // group))
    tiles, rows, wide = tokens // together + requests, _power(together * group, 16), _power(width, 16)
    seen = keys if window < 0 else min(keys, window + together - 1)
    if splits == 0:  # a power of two, since each number has code of its own
        most = min(_programs(query.device) // (key_heads * tiles), triton.cdiv(seen, _SPLIT_KEYS))
        splits = 1 << (max(1, most).bit_length() - 1)
    of_split = triton.cdiv(triton.cdiv(seen, splits), _KEYS) * _KEYS
    caps = _caps(tuple(tau), heads, query.device)
    parts = means = output
    if splits > 1:
        places = tiles * key_heads * splits * 3
        parts = torch.empty(places * 3 * rows, dtype=torch.float32, device=query.device)
        means = torch.empty(places * rows * wide, dtype=torch.float32, device=query.device)
    where = *_record_strides(records), record_table.stride(0), *_head_strides(output)
    shared = {
        "GROUP": group, "WIDTH": width, "ROWS": rows, "QUERIES": together, "D": wide, "SPLITS": splits,
        "RECORD_TOKENS": records.shape[2], "HAS_SINKS": sinks is not None, "ABSOLUTE": is_absolute,
    }  # fmt: skip
    _paged_attention[tiles, key_heads * splits](
        query, cache, table, records, record_table, starts, lengths, on, caps, sinks, output, parts, means,
        requests, of_split, scaling, softcap or 0.0, *_head_strides(query), *_cache_strides(cache), table.stride(0),
        *where, KEYS=_KEYS, TOKENS=cache.shape[2], WINDOW=window, HAS_SOFTCAP=softcap is not None, BY_STEP=by_step,
        SINK_TOKENS=sink_tokens, num_warps=8 if rows * wide >= 64 * 128 else 4, **shared,
    )  # fmt: skip
    if splits > 1:
        _merge_paged[tiles, key_heads](
            parts, means, records, record_table, starts, lengths, on, caps, sinks, output, requests, *where, **shared
        )


def _inject(
    output: Tensor, cache: Tensor, table: Tensor, records: Tensor, record_table: Tensor, starts: Tensor,
    lengths: Tensor, on: Tensor, alpha: float, window: int, last: int,
) -> None:  # fmt: skip
    tokens, heads, width = output.shape
    requests, key_heads = on.shape[0], cache.shape[1]
    _paged_inject[tokens + requests, key_heads](
        output, cache, table, records, record_table, starts, lengths, on,
        requests, alpha, *_cache_strides(cache), table.stride(0), *_record_strides(records), record_table.stride(0),
        *_head_strides(output),
        GROUP=heads // key_heads, WIDTH=width, KEYS=_KEYS, D=_power(width, 16), TOKENS=cache.shape[2],
        RECORD_TOKENS=records.shape[2], WINDOW=window, LAST=last,
    )  # fmt: skip


def _record_strides(records: Tensor) -> tuple[int, int]:
    assert records.stride(3) == 1, records.stride()
    return records.stride(0), records.stride(2)


def _cache_strides(cache: Tensor) -> tuple[int, int, int]:
    assert cache.stride(3) == 1, cache.stride()
    return cache.stride(0), cache.stride(1), cache.stride(2)


def _head_strides(packed: Tensor) -> tuple[int, int]:
    assert packed.stride(2) == 1, packed.stride()
    return packed.stride(0), packed.stride(1)


class PagedKernels(NamedTuple):
    """The operators.

    Attributes:
        label: Labels the tokens of a pass: writes their records at their slots, and adds to the counts.
        attend: Attention with the bridge of the tokens to which it applies, in place; all others keep what is there.
        inject: The injection into the tokens that begin a step, in place.

    The arguments that several of them share:
        output: [T, H, D], of any strides whose last is 1, as all tensors here.
        cache: [blocks, Hkv, N, 2 D] of the dtype of the query: the key and the value of a token side by side.
        table: The blocks of each request in it, int32 [R, blocks].
        records: The records at their slots, int32 [blocks, 1, N, F].
        record_table: The blocks of each request in those, int32 [R, blocks].
        starts: The first token of each request in the pass, and the number of all, int32 [R + 1].
        lengths: Tokens of each request with those of the pass, int32 [R].
        on: Which requests the call is for, int32 [R]: 1 or 0. Of others nothing is read and nothing written.

    Those of `label`:
        ids: The tokens, int32 or int64 [T].
        openings: Position where implicit thinking starts, int32 [R], or None.
        counts: int64 [3]: tokens to which the bridge applies and tokens that are injected are added to the first two;
            the third becomes the greatest position whose record before it was lost.
        tables, has_headers, is_implicit, shortest, span: As in the runtime's `Kernels.label`.

    Those of `attend`:
        query: [T, H, D], float32, bfloat16 or float16, D at most 256.
        keys: At least the keys of the longest request, to divide the work by.
        window: Keys that a query sees, its own included; -1 for all.
        tau, sinks, scaling, softcap, is_absolute, by_step, sink_tokens, splits: As in the runtime's
            `Kernels.ranged_attention`.

    Those of `inject`:
        alpha: Factor of the mean.
        window: As in `attend`.
        last: Last tokens of a step that count; -1 for all.
    """

    label: Any
    attend: Any
    inject: Any


PAGED_KERNELS = PagedKernels(
    _registered(
        "paged_label",
        "(Tensor(a!) records, Tensor ids, Tensor starts, Tensor lengths, Tensor record_table, Tensor on, "
        "Tensor? openings, Tensor(b!) counts, Tensor[] tables, bool has_headers, bool is_implicit, int shortest, "
        "int span) -> ()",
        _label,
        lambda *_: None,
    ),
    _registered(
        "paged_attention",
        "(Tensor(a!) output, Tensor query, Tensor cache, Tensor table, Tensor records, Tensor record_table, "
        "Tensor starts, Tensor lengths, Tensor on, float[] tau, Tensor? sinks, int keys, float scaling, "
        "float? softcap, int window, bool is_absolute, bool by_step, int sink_tokens, int splits=0) -> ()",
        _attend,
        lambda *_: None,
    ),
    _registered(
        "paged_inject",
        "(Tensor(a!) output, Tensor cache, Tensor table, Tensor records, Tensor record_table, Tensor starts, "
        "Tensor lengths, Tensor on, float alpha, int window, int last) -> ()",
        _inject,
        lambda *_: None,
    ),
)
