"""Triton kernels for accelerators: attention with the bridge, the injection, and the labels of new tokens.

Each is an operator of the namespace `hf_stepflow`, one launch (attention over many keys takes a second one, which
merges its parts), without a host read. They compute what `bridge`, `momentum` and `step_detector` say, and nothing
needs them: where Triton or a device is missing, those run. `HF_STEPFLOW_ROUTE=device` makes tensors on a CPU take this
way, by Triton's interpreter, for tests and for counting.

This file is longer than others: the kernels and what starts them are one concept.
Shapes: B batch, H query heads, Hkv key-value heads, G = H / Hkv, q queries, K keys of the layer, D and Dv widths of
keys and values, F record fields, T slots.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .step_detector import ASIDE, FIELDS, QUESTION, SUMMARY, THINKING, Feature
from .step_rules import (
    CLOSES_WITH_BAR,
    HAS_BODY,
    HAS_CONTENT,
    HAS_WORD,
    INSIDE_SUMMARY,
    INSIDE_THINKING,
    LEADS_SUMMARY,
    LEADS_THINKING,
    OPENS_WITH_BAR,
    STATE_MASK,
)
from .token_text import SUMMARY_START, THINKING_START, TOOL_END, TOOL_START

try:  # where it is missing, nobody imports this file
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("StepFlow's kernels need Triton: pip install triton") from missing

# Keys that one program works on at a time, queries times heads that it takes at most, and the fewest keys that are
# worth a program of their own.
_KEYS, _ROWS, _SPLIT_KEYS = 64, 64, 256

# A stand-in for the logarithm of nothing that stays finite in differences.
_NOTHING = tl.constexpr(-3.0e38)


# Columns of a record, as kernels read them.
(
    LABEL, STEP, TRIGGER, ACTIVE, THINKING_SLOT, SUMMARY_SLOT, STEP_SLOT, PREVIOUS_START, PREVIOUS_END, PREVIOUS_COUNT,
    FIRST_SLOT, HAS_ASIDE, COUNT, TOKEN, RULE_STATE, MARKER_STATE, SEGMENT, RETURN_SEGMENT, IN_HEADER, LENGTH, BLANKS,
    FLAGS, STEP_OPEN, STEPS, THINKING_STEPS, STEP_END, STEP_COUNT, ROUND,
) = (tl.constexpr(column) for column in range(FIELDS))  # fmt: skip
ASKS, THINKS, SUMS_UP, IS_ASIDE = (tl.constexpr(segment) for segment in (QUESTION, THINKING, SUMMARY, ASIDE))


# The interpreter multiplies bfloat16 as if it were integers.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _product(left, right):
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _empty(ROWS: tl.constexpr, DV: tl.constexpr):
    """A group without keys: greatest logit, sum, number and weighted values of its rows."""
    none = tl.zeros((ROWS,), tl.float32)
    return tl.full((ROWS,), _NOTHING, tl.float32), none, none, tl.zeros((ROWS, DV), tl.float32)


@triton.jit
def _absorb(top, total, number, mean, logits, member, value):
    """Takes some keys into the running greatest logit, sum, number and weighted values of a group."""
    if tl.max(member.to(tl.int32)) > 0:
        logits = tl.where(member, logits, _NOTHING)
        new = tl.maximum(top, tl.max(logits, 1))
        weight = tl.where(member, tl.exp(logits - new[:, None]), 0.0)
        scale = tl.exp(top - new)
        total = total * scale + tl.sum(weight, 1)
        number += tl.sum(member.to(tl.float32), 1)
        mean = mean * scale[:, None] + _product(weight.to(value.dtype), value)
        top = new
    return top, total, number, mean


@triton.jit
def _lifted(
    top_o, total_o, top_s, total_s, number_s, top_b, total_b, number_b, cap, sink, ABSOLUTE: tl.constexpr
):  # fmt: skip
    """The factor of each group's weighted values; the mass of B before and after; whether it had a floor."""
    top = tl.maximum(tl.maximum(top_o, top_s), tl.maximum(top_b, sink))
    others = total_o * tl.exp(top_o - top)
    same = total_s * tl.exp(top_s - top)
    bridge = total_b * tl.exp(top_b - top)
    held = same + bridge
    total = others + held + tl.exp(sink - top)
    floor = tl.minimum(tl.sqrt(number_b / tl.maximum(number_b + number_s, 1.0)), cap)
    floor = tl.where((number_b > 0) & (number_s > 0), floor, 0.0)
    usable = floor > 0
    if ABSOLUTE:
        floor = tl.where((floor * total < held) & (held > 0), floor * total / tl.where(held > 0, held, 1.0), 0.0)
    after = tl.maximum(bridge, floor * held)
    rest = tl.where(after > bridge, held - after, same)
    total = tl.where(total > 0, total, 1.0)
    return (
        others / (tl.where(total_o > 0, total_o, 1.0) * total),
        rest / (tl.where(total_s > 0, total_s, 1.0) * total),
        after / (tl.where(total_b > 0, total_b, 1.0) * total),
        bridge / total,
        after / total,
        usable,
    )


@triton.jit
def _bridged(
    top_o, total_o, mean_o, top_s, total_s, number_s, mean_s, top_b, total_b, number_b, mean_b,
    caps, sinks, head, is_query, HAS_SINKS: tl.constexpr, ABSOLUTE: tl.constexpr,
):  # fmt: skip
    """The output of some queries; the mass of B before and after; whether it had a floor."""
    cap, sink = tl.load(caps + head, mask=is_query, other=0.0), tl.full(top_o.shape, _NOTHING, tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=is_query, other=0.0).to(tl.float32)
    factor_o, factor_s, factor_b, before, after, usable = _lifted(
        top_o, total_o, top_s, total_s, number_s, top_b, total_b, number_b, cap, sink, ABSOLUTE
    )
    mean = mean_o * factor_o[:, None] + mean_s * factor_s[:, None] + mean_b * factor_b[:, None]
    return mean, before, after, usable


@triton.jit
def _store(target, mean, is_row, in_width):
    tl.store(target, mean.to(target.dtype.element_ty), mask=is_row[:, None] & in_width[None, :])


@triton.jit
def _note(sums, place, usable, before, after, is_query):
    """Adds the bridge of some queries to the sums of their heads."""
    here = usable & is_query
    tl.atomic_add(sums + place, 1.0, here)
    tl.atomic_add(sums + place + 1, 1.0, here & (after > before))
    tl.atomic_add(sums + place + 2, before, here)
    tl.atomic_add(sums + place + 3, after, here)


@triton.jit
def _record_at(records, table, slot, records_n, records_t, TOKENS: tl.constexpr):
    """Where the record of a slot is; in blocks of so many tokens that a table lists, or (0) side by side."""
    if TOKENS > 0:
        records += tl.load(table + slot // TOKENS).to(tl.int64) * records_n
        slot = slot % TOKENS
    return records + slot * records_t


@triton.jit
def _ranges(record, own, is_query, BY_STEP: tl.constexpr, SINK_TOKENS: tl.constexpr):
    """The ranges of some queries from their records: S from `same_from` on, B from `bridge_from` to there."""
    label, first = tl.load(record + LABEL), tl.load(record + FIRST_SLOT)
    is_active = is_query & (tl.load(record + ACTIVE) > 0)
    is_thinking = label % 3 == THINKS
    thinking_slot, step_slot = tl.load(record + THINKING_SLOT), tl.load(record + STEP_SLOT)
    after_sinks = first + SINK_TOKENS
    start = tl.maximum(thinking_slot, step_slot) if BY_STEP else thinking_slot
    same_from = tl.where(is_thinking, start, tl.load(record + SUMMARY_SLOT))
    bridge_from = tl.where(is_thinking, after_sinks, tl.maximum(thinking_slot, after_sinks))
    is_divided = (tl.load(record + HAS_ASIDE) > 0) | (tl.load(record + COUNT) != own - first + 1)
    return label, first, step_slot, after_sinks, same_from, bridge_from, is_thinking, is_active, is_active & is_divided


@triton.jit
def _by_label(
    same, bridge, known, slot, label, first, step_slot, after_sinks, is_thinking, is_divided, BY_STEP: tl.constexpr
):  # fmt: skip
    """The groups of queries whose groups are no ranges, from the labels of the keys, [1, KEYS]."""
    alike = known == label[:, None]
    if BY_STEP:
        alike = alike & ((slot[None, :] >= step_slot[:, None]) | ~is_thinking[:, None])
    earlier = tl.where(is_thinking[:, None], ~alike & (known >= 0), known == label[:, None] - 1)
    earlier = earlier & ((slot[None, :] < first[:, None]) | (slot[None, :] >= after_sinks[:, None]))
    return tl.where(is_divided[:, None], alike, same), tl.where(is_divided[:, None], earlier, bridge)


@triton.jit
def _ranged_attention(
    query, key, value, mask, records, every, caps, sinks, sums, length, out, parts, means,
    tokens, keys, queries, slots_of_split, scaling, softcap, hides,
    query_b, query_h, query_q, key_b, key_h, key_k, value_b, value_h, value_k, mask_b, mask_q, mask_k,
    records_b, records_q, every_b, every_t, sums_b, sums_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SPLITS: tl.constexpr, MASK: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SUMS: tl.constexpr, ABSOLUTE: tl.constexpr, BY_STEP: tl.constexpr,
    SINK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Some queries of the heads that share a key-value head, over one split of the keys."""
    tile, split = tl.program_id(0), tl.program_id(1) % SPLITS
    head, row = (tl.program_id(1) // SPLITS).to(tl.int64), tl.program_id(2).to(tl.int64)
    if HAS_LENGTH:
        tokens = tl.load(length).to(tl.int32)
    line = tl.arange(0, ROWS)
    place = tile * QUERIES + line // GROUP
    is_query = (line < QUERIES * GROUP) & (place < queries)
    place = tl.where(is_query, place, 0)
    full_head = head * GROUP + line % GROUP

    # The ranges of each query, from its own record.
    record = row * records_b + place * records_q
    own = tokens - queries + place
    label, first, step_slot, after_sinks, same_from, bridge_from, is_thinking, is_active, is_divided = _ranges(
        records + record, own, is_query, BY_STEP, SINK_TOKENS
    )
    by_label = tl.max(is_divided.to(tl.int32)) > 0

    column, value_column = tl.arange(0, D), tl.arange(0, DV)
    q = tl.load(
        query + row * query_b + full_head[:, None] * query_h + place[:, None] * query_q + column[None, :],
        mask=is_query[:, None] & (column < WIDTH)[None, :], other=0.0,
    )  # fmt: skip
    top_o, total_o, number_o, mean_o = _empty(ROWS, DV)
    top_s, total_s, number_s, mean_s = _empty(ROWS, DV)
    top_b, total_b, number_b, mean_b = _empty(ROWS, DV)

    offset = tl.maximum(tokens - keys, 0)
    last = tl.minimum(tl.minimum(keys, tokens - offset), tl.max(tl.where(is_query, own, 0)) + 1 - offset)
    begin = split * slots_of_split
    for block in range(begin, tl.minimum(begin + slots_of_split, last), KEYS):
        index = block + tl.arange(0, KEYS)
        is_key = index < last
        slot = index + offset
        k = tl.load(
            key + row * key_b + head * key_h + index[None, :].to(tl.int64) * key_k + column[:, None],
            mask=is_key[None, :] & (column < WIDTH)[:, None], other=0.0,
        )  # fmt: skip
        v = tl.load(
            value + row * value_b + head * value_h + index[:, None].to(tl.int64) * value_k + value_column[None, :],
            mask=is_key[:, None] & (value_column < VALUE_WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        logits = _product(q, k) * scaling
        if HAS_SOFTCAP:
            small = tl.exp(-2.0 * tl.abs(logits) / softcap)
            logits = tl.where(logits < 0, -softcap, softcap) * (1.0 - small) / (1.0 + small)
        visible = is_query[:, None] & is_key[None, :] & (slot[None, :] <= own[:, None])
        if MASK > 0:
            shown = tl.load(
                mask + row * mask_b + place[:, None] * mask_q + index[None, :] * mask_k,
                mask=is_query[:, None] & is_key[None, :], other=0,
            )  # fmt: skip
            if MASK == 1:
                visible = visible & (shown != 0)
            else:
                visible = visible & (shown > hides)
                logits += tl.where(visible, shown, 0.0)
        is_same = is_active[:, None] & (slot[None, :] >= same_from[:, None])
        is_bridge = is_active[:, None] & (slot[None, :] >= bridge_from[:, None]) & (slot[None, :] < same_from[:, None])
        if by_label:
            known = tl.load(every + row * every_b + slot * every_t + LABEL, mask=is_key, other=-1)[None, :]
            is_same, is_bridge = _by_label(
                is_same, is_bridge, known, slot, label, first, step_slot, after_sinks, is_thinking, is_divided, BY_STEP
            )
        is_same, is_bridge = is_same & visible, is_bridge & visible
        top_s, total_s, number_s, mean_s = _absorb(top_s, total_s, number_s, mean_s, logits, is_same, v)
        top_b, total_b, number_b, mean_b = _absorb(top_b, total_b, number_b, mean_b, logits, is_bridge, v)
        rest = visible & ~is_same & ~is_bridge
        top_o, total_o, number_o, mean_o = _absorb(top_o, total_o, number_o, mean_o, logits, rest, v)

    if SPLITS == 1:
        mean, before, after, usable = _bridged(
            top_o, total_o, mean_o, top_s, total_s, number_s, mean_s, top_b, total_b, number_b, mean_b,
            caps, sinks, full_head, is_query, HAS_SINKS, ABSOLUTE,
        )  # fmt: skip
        if HAS_SUMS:
            _note(sums, row * sums_b + full_head * sums_h, usable, before, after, is_query)
        target = ((row * queries + place) * HEADS * GROUP + full_head) * VALUE_WIDTH
        _store(out + target[:, None] + value_column[None, :], mean, is_query, value_column < VALUE_WIDTH)
    else:
        part = ((row * HEADS + head) * tl.num_programs(0) + tile) * SPLITS + split
        _leave(parts, means, part * 3, top_o, total_o, number_o, mean_o, line, value_column, ROWS, DV)
        _leave(parts, means, part * 3 + 1, top_s, total_s, number_s, mean_s, line, value_column, ROWS, DV)
        _leave(parts, means, part * 3 + 2, top_b, total_b, number_b, mean_b, line, value_column, ROWS, DV)


@triton.jit
def _leave(parts, means, place, top, total, number, mean, line, column, ROWS: tl.constexpr, DV: tl.constexpr):
    """Stores a group of one split."""
    tl.store(parts + place * 3 * ROWS + line, top)
    tl.store(parts + (place * 3 + 1) * ROWS + line, total)
    tl.store(parts + (place * 3 + 2) * ROWS + line, number)
    if tl.max(number) > 0:
        tl.store(means + (place.to(tl.int64) * ROWS + line[:, None]) * DV + column[None, :], mean)


@triton.jit
def _gather(parts, means, place, line, column, ROWS: tl.constexpr, DV: tl.constexpr, SPLITS: tl.constexpr):
    """Joins the splits of a group."""
    top, total, number, mean = _empty(ROWS, DV)
    for split in range(SPLITS):
        part = place + split * 3
        number_here = tl.load(parts + (part * 3 + 2) * ROWS + line)
        if tl.max(number_here) > 0:
            top_here = tl.load(parts + part * 3 * ROWS + line)
            new = tl.maximum(top, top_here)
            scale, scale_here = tl.exp(top - new), tl.exp(top_here - new)
            total = total * scale + tl.load(parts + (part * 3 + 1) * ROWS + line) * scale_here
            mean_here = tl.load(means + (part.to(tl.int64) * ROWS + line[:, None]) * DV + column[None, :])
            mean = mean * scale[:, None] + mean_here * scale_here[:, None]
            number += number_here
            top = new
    return top, total, number, mean


@triton.jit
def _merge_splits(
    parts, means, caps, sinks, sums, out, queries, sums_b, sums_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
    DV: tl.constexpr, SPLITS: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SUMS: tl.constexpr, ABSOLUTE: tl.constexpr,
):  # fmt: skip
    """The queries of one program of `_ranged_attention`, from all splits."""
    tile, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    line, value_column = tl.arange(0, ROWS), tl.arange(0, DV)
    place = tile * QUERIES + line // GROUP
    is_query = (line < QUERIES * GROUP) & (place < queries)
    full_head = head * GROUP + line % GROUP
    part = ((row * HEADS + head) * tl.num_programs(0) + tile) * SPLITS * 3
    top_o, total_o, _, mean_o = _gather(parts, means, part, line, value_column, ROWS, DV, SPLITS)
    top_s, total_s, number_s, mean_s = _gather(parts, means, part + 1, line, value_column, ROWS, DV, SPLITS)
    top_b, total_b, number_b, mean_b = _gather(parts, means, part + 2, line, value_column, ROWS, DV, SPLITS)
    mean, before, after, usable = _bridged(
        top_o, total_o, mean_o, top_s, total_s, number_s, mean_s, top_b, total_b, number_b, mean_b,
        caps, sinks, full_head, is_query, HAS_SINKS, ABSOLUTE,
    )  # fmt: skip
    if HAS_SUMS:
        _note(sums, row * sums_b + full_head * sums_h, usable, before, after, is_query)
    target = ((row * queries + place) * HEADS * GROUP + full_head) * VALUE_WIDTH
    _store(out + target[:, None] + value_column[None, :], mean, is_query, value_column < VALUE_WIDTH)


@triton.jit
def _inject(
    output, value, mask, records, every, sums, length,
    tokens, keys, queries, alpha, hides,
    value_b, value_h, value_k, mask_b, mask_q, mask_k, records_b, records_q, every_b, every_t, sums_b,
    HEADS: tl.constexpr, GROUP: tl.constexpr, VALUE_WIDTH: tl.constexpr, KEYS: tl.constexpr, DV: tl.constexpr,
    MASK: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_SUMS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """All heads of one row, in place; a row whose queries begin no step is left after one read each."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_LENGTH:
        tokens = tl.load(length).to(tl.int32)
    offset = tl.maximum(tokens - keys, 0)
    filled = tl.minimum(keys, tokens - offset)
    column = tl.arange(0, DV)
    in_width = column < VALUE_WIDTH
    for place in range(queries):
        record = records + row * records_b + place * records_q
        if tl.load(record + TRIGGER) > 0:
            label, step = tl.load(record + LABEL), tl.load(record + STEP) - 1
            label -= (label % 3 == SUMS_UP).to(tl.int32)
            begin = tl.minimum(tl.maximum(tl.load(record + PREVIOUS_START) - offset, 0), filled)
            end = tl.minimum(tl.maximum(tl.load(record + PREVIOUS_END) - offset, begin), filled)
            number = 0
            for block in range(begin, end, KEYS):
                index = block + tl.arange(0, KEYS)
                member = _of_step(
                    mask, every, row, place, index, index < end, offset, label, step, hides,
                    mask_b, mask_q, mask_k, every_b, every_t, MASK,
                )  # fmt: skip
                number += tl.sum(member.to(tl.int32))
            used = number
            if WINDOW >= 0:
                used = tl.minimum(number, WINDOW)
            square, square_added = 0.0, 0.0
            for head in range(HEADS):
                total = tl.zeros((DV,), tl.float32)
                passed = 0
                for block in range(begin, end, KEYS):
                    index = block + tl.arange(0, KEYS)
                    member = _of_step(
                        mask, every, row, place, index, index < end, offset, label, step, hides,
                        mask_b, mask_q, mask_k, every_b, every_t, MASK,
                    )  # fmt: skip
                    rank = passed + tl.cumsum(member.to(tl.int32), 0)
                    passed += tl.sum(member.to(tl.int32))
                    member = member & (rank > number - used)
                    keys_at = row * value_b + head * value_h + index.to(tl.int64) * value_k
                    some = tl.load(
                        value + keys_at[:, None] + column[None, :],
                        mask=member[:, None] & in_width[None, :], other=0.0,
                    )  # fmt: skip
                    total += tl.sum(some.to(tl.float32), 0)
                mean = (total / tl.maximum(used, 1)).to(value.dtype.element_ty).to(tl.float32)
                added = (alpha * mean).to(output.dtype.element_ty).to(tl.float32)
                for member_of_group in range(GROUP):
                    target = ((row * queries + place) * HEADS + head) * GROUP + member_of_group
                    before = tl.load(output + target * VALUE_WIDTH + column, mask=in_width, other=0.0).to(tl.float32)
                    square += tl.sum(before * before)
                    square_added += tl.sum(added * added)
                    tl.store(
                        output + target * VALUE_WIDTH + column,
                        (before + added).to(output.dtype.element_ty), mask=in_width,
                    )  # fmt: skip
            if HAS_SUMS:  # noqa: SIM102, decided when the kernel is compiled
                if square_added > 0:
                    here = sums + row * sums_b
                    tl.store(here, tl.load(here) + 1.0)
                    ratio = tl.sqrt(square_added) / tl.maximum(tl.sqrt(square), 1.2e-38)
                    tl.store(here + 1, tl.load(here + 1) + ratio)


@triton.jit
def _of_step(
    mask, every, row, place, index, is_key, offset, label, step, hides,
    mask_b, mask_q, mask_k, every_b, every_t, MASK: tl.constexpr,
):  # fmt: skip
    """Which keys belong to a step and are seen by a query."""
    known = every + row * every_b + (index + offset) * every_t
    member = is_key & (tl.load(known + LABEL, mask=is_key, other=-1) == label)
    member = member & (tl.load(known + STEP, mask=is_key, other=-1) == step)
    if MASK > 0:
        shown = tl.load(mask + row * mask_b + place * mask_q + index * mask_k, mask=is_key, other=0)
        if MASK == 2:
            shown = (shown > hides).to(tl.int32)
        member = member & (shown != 0)
    return member


# What tokens bring about, as `_Detector` says it; the names of its tables and columns are the same.
_STATE, _LEADS, _INSIDE = tl.constexpr(STATE_MASK), tl.constexpr(LEADS_THINKING), tl.constexpr(INSIDE_THINKING)
_IN_SUMMARY = tl.constexpr(LEADS_SUMMARY | INSIDE_SUMMARY)
_WORDS, _BARS = tl.constexpr(HAS_WORD | HAS_CONTENT), tl.constexpr(OPENS_WITH_BAR | CLOSES_WITH_BAR)
_OPENS, _CLOSES, _BODY = tl.constexpr(OPENS_WITH_BAR), tl.constexpr(CLOSES_WITH_BAR), tl.constexpr(HAS_BODY)
_THINKS, _SUMS_UP = tl.constexpr(THINKING_START), tl.constexpr(SUMMARY_START)
_TOOL, _TOOL_END = tl.constexpr(TOOL_START), tl.constexpr(TOOL_END)
_RULE_ROW, _MARKER_ROW, _SPLIT_ROW = (
    tl.constexpr(column) for column in (Feature.RULE_ROW, Feature.MARKER_ROW, Feature.SPLIT_ROW)
)
_BEFORE, _LENGTH, _AFTER, _FLAGS, _BYTES = (
    tl.constexpr(column) for column in (Feature.BEFORE, Feature.LENGTH, Feature.AFTER, Feature.FLAGS, Feature.BYTES)
)
_CONTROL, _SPECIAL, _ENDS, _OPENS_MESSAGE = (
    tl.constexpr(column) for column in (Feature.CONTROL, Feature.SPECIAL, Feature.END_OF_TURN, Feature.OPENS_MESSAGE)
)


@triton.jit
def _take(last, is_first, name: tl.constexpr, fresh: tl.constexpr):
    return tl.where(is_first, fresh, tl.load(last + name, mask=is_first == 0, other=0)).to(tl.int32)


@triton.jit
def _put(target, copy, name: tl.constexpr, first, second, third, fourth, TOKENS: tl.constexpr):
    """Stores a column of a record and the three after it."""
    tl.store(target + name, first)
    tl.store(target + name + 1, second)
    tl.store(target + name + 2, third)
    tl.store(target + name + 3, fourth)
    if TOKENS == 0:
        tl.store(copy + name, first)
        tl.store(copy + name + 1, second)
        tl.store(copy + name + 2, third)
        tl.store(copy + name + 3, fourth)


@triton.jit
def _at(table, index):
    return tl.load(table + index).to(tl.int32)


@triton.jit
def _whole(length, flags, SHORTEST: tl.constexpr):
    return (length >= SHORTEST) & ((flags & _WORDS) == _WORDS) & ((flags & _BARS) != _BARS)


@triton.jit
def _absorbed(length, blanks, flags, before, added, after, its_flags, absorbs):
    begun = length > 0
    has_text, is_blank = absorbs & (added > 0), absorbs & (added == 0)
    kept = (flags | its_flags) & _WORDS
    kept = kept | (tl.where(begun, flags, its_flags) & _OPENS)
    kept = kept | (tl.where((its_flags & _BODY) > 0, its_flags, flags) & _CLOSES)
    grown = length + added + tl.where(begun, blanks + before, 0)
    blanks = tl.where(has_text, after, blanks + tl.where(is_blank, before, 0))
    return tl.where(has_text, grown, length), blanks, tl.where(has_text, kept, flags)


@triton.jit
def _label(
    records, made, ids, padding, length, opening, features, transition, split_variant, split, marker_next,
    marker_found, marker_depth,
    start, queries, size, opening_slot, states, marker_states, split_states, records_b, records_t, ids_b, padding_b,
    HAS_PADDING: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_OPENING: tl.constexpr, HAS_SPLITS: tl.constexpr,
    HAS_HEADERS: tl.constexpr, IMPLICIT: tl.constexpr, SHORTEST: tl.constexpr, SPAN: tl.constexpr,
    COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The new tokens of one row."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_LENGTH:
        start = tl.load(length).to(tl.int32)
    if HAS_OPENING:
        opening_slot = tl.load(opening).to(tl.int32)
    if HAS_PADDING:
        padding += row * padding_b
    _walk(
        records + row * records_b, None, made + row * queries * COLUMNS, ids + row * ids_b, padding, features,
        transition, split_variant, split, marker_next, marker_found, marker_depth,
        start, queries, size, opening_slot, states, marker_states, split_states, 0, records_t,
        HAS_PADDING, HAS_SPLITS, HAS_HEADERS, IMPLICIT, SHORTEST, SPAN, COLUMNS, FEATURES, 0,
    )  # fmt: skip


@triton.jit
def _walk(
    records, table, made, ids, padding, features, transition, split_variant, split, marker_next, marker_found,
    marker_depth, start, queries, size, opening_slot, states, marker_states, split_states, records_n, records_t,
    HAS_PADDING: tl.constexpr, HAS_SPLITS: tl.constexpr, HAS_HEADERS: tl.constexpr, IMPLICIT: tl.constexpr,
    SHORTEST: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Some tokens of one row, one after the other; returns how many are bridged, and how many injected."""
    is_first = start == 0
    last = _record_at(records, table, tl.maximum(start - 1, 0), records_n, records_t, TOKENS)
    thinking_slot, summary_slot = _take(last, is_first, THINKING_SLOT, -1), _take(last, is_first, SUMMARY_SLOT, -1)
    step_slot, previous_start = _take(last, is_first, STEP_SLOT, -1), _take(last, is_first, PREVIOUS_START, -1)
    previous_end, previous_count = _take(last, is_first, PREVIOUS_END, -1), _take(last, is_first, PREVIOUS_COUNT, 0)
    first_slot, has_aside = _take(last, is_first, FIRST_SLOT, -1), _take(last, is_first, HAS_ASIDE, 0)
    count, rule_state = _take(last, is_first, COUNT, 0), _take(last, is_first, RULE_STATE, 0)
    marker_state, segment = _take(last, is_first, MARKER_STATE, 0), _take(last, is_first, SEGMENT, 0)
    return_segment, in_header = _take(last, is_first, RETURN_SEGMENT, 0), _take(last, is_first, IN_HEADER, 0)
    length_, blanks = _take(last, is_first, LENGTH, 0), _take(last, is_first, BLANKS, 0)
    flags, step_open = _take(last, is_first, FLAGS, 0), _take(last, is_first, STEP_OPEN, 0)
    steps, thinking_steps = _take(last, is_first, STEPS, 0), _take(last, is_first, THINKING_STEPS, 0)
    step_end, step_count = _take(last, is_first, STEP_END, 0), _take(last, is_first, STEP_COUNT, 0)
    round_ = _take(last, is_first, ROUND, 0)
    bridged, injected = start * 0, start * 0
    for place in range(queries):
        slot = start + place
        token = tl.load(ids + place).to(tl.int32)
        is_hidden = token < token
        if HAS_PADDING:
            is_hidden = tl.load(padding + place) != 0
        target = _record_at(records, table, slot, records_n, records_t, TOKENS)
        copy = target if TOKENS > 0 else made + place * COLUMNS
        label, step, trigger, active = token * 0 - 1, token * 0 - 1, token * 0, token * 0
        if is_hidden == 0:
            feature = features + tl.where((token >= 0) & (token < size), token, size) * FEATURES
            count += 1
            first_slot = tl.where(first_slot < 0, slot, first_slot)
            if IMPLICIT:
                segment = tl.where(slot < opening_slot, ASKS, segment)
                opens = slot == opening_slot
                round_ += opens.to(tl.int32)
                segment = tl.where(opens, THINKS, segment)
                thinking_slot = tl.where(opens, slot, thinking_slot)
                summary_slot, step_slot = tl.where(opens, -1, summary_slot), tl.where(opens, -1, step_slot)
                previous_start, previous_end = tl.where(opens, -1, previous_start), tl.where(opens, -1, previous_end)
                steps, thinking_steps = tl.where(opens, 0, steps), tl.where(opens, 0, thinking_steps)
                has_aside, in_header = tl.where(opens, 0, has_aside), tl.where(opens, 0, in_header)
                step_end, step_count = tl.where(opens, 0, step_end), tl.where(opens, 0, step_count)
                previous_count = tl.where(opens, 0, previous_count)
                rule_state, step_open = tl.where(opens, 0, rule_state), tl.where(opens, 0, step_open)
                length_ = tl.where(opens, 0, length_)
                blanks, flags = tl.where(opens, 0, blanks), tl.where(opens, 0, flags)
            marker = _at(feature, _MARKER_ROW) * marker_states + marker_state
            found, marker_state = _at(marker_found, marker), _at(marker_next, marker)
            marks = found > 0
            if IMPLICIT:
                marks = marks & (found != _SUMS_UP)
            is_control = (_at(feature, _CONTROL) > 0) | (in_header > 0) | marks
            is_thinking = segment == THINKS
            inside = is_thinking | (segment == SUMS_UP)
            label = 3 * round_ + tl.where(segment == IS_ASIDE, 0, segment)
            step = tl.where(inside | is_control, -1, 0)
            content, stops = inside & (is_control == 0), inside & is_control

            code = _at(transition, _at(feature, _RULE_ROW) * states + rule_state)
            variant_place = _at(feature, _SPLIT_ROW) * split_states + rule_state
            rule_state = tl.where(content, code & _STATE, rule_state)
            deliberate = content & is_thinking
            before, text = _at(feature, _BEFORE), _at(feature, _LENGTH)
            after, its_flags = _at(feature, _AFTER), _at(feature, _FLAGS)
            has_text = content & (text > 0)
            leads = deliberate & ((code & _LEADS) > 0)
            boundary = leads & _whole(length_, flags, SHORTEST)
            length_, blanks, flags = tl.where(leads, 0, length_), tl.where(leads, 0, blanks), tl.where(leads, 0, flags)
            if HAS_SPLITS:
                splits = deliberate & ((code & _INSIDE) > 0)
                variant = split + _at(split_variant, variant_place) * 9
                length_, blanks, flags = _absorbed(
                    length_, blanks, flags, _at(variant, 0), _at(variant, 1), _at(variant, 2), _at(variant, 3), splits
                )
                boundary = boundary | (splits & (_whole(length_, flags, SHORTEST) | (_at(variant, 8) > 0)))
                length_, blanks = tl.where(splits, 0, length_), tl.where(splits, 0, blanks)
                flags = tl.where(splits, 0, flags)
                before, text = tl.where(splits, _at(variant, 4), before), tl.where(splits, _at(variant, 5), text)
                after = tl.where(splits, _at(variant, 6), after)
                its_flags = tl.where(splits, _at(variant, 7), its_flags)
            boundary = boundary | (content & (is_thinking == 0) & ((code & _IN_SUMMARY) > 0))
            length_, blanks, flags = _absorbed(length_, blanks, flags, before, text, after, its_flags, deliberate)

            is_open = step_open > 0
            closed = boundary | (is_open == 0)
            free = content
            if not IMPLICIT:
                depth = _at(marker_depth, marker_state)
                held = has_text & (depth > 0) & (depth >= _at(feature, _BYTES)) & ((depth >= 2) | closed)
                free = content & (held == 0)
                is_open = is_open & ((held & closed) == 0)
            starts = has_text & closed & free
            may_inject = (thinking_steps > 0) & (is_thinking | (steps == thinking_steps))
            trigger = (starts & may_inject).to(tl.int32)
            previous_start = tl.where(starts, step_slot, previous_start)
            previous_end = tl.where(starts, step_end, previous_end)
            previous_count = tl.where(starts, step_count, previous_count)
            steps += starts.to(tl.int32)
            thinking_steps += (starts & is_thinking).to(tl.int32)
            step_slot, step_count = tl.where(starts, slot, step_slot), tl.where(starts, 0, step_count)
            is_open = is_open | starts
            member = free & is_open
            step_open = is_open.to(tl.int32)
            step = tl.where(member, steps, step)
            step_end = tl.where(member, slot + 1, step_end)
            step_count += member.to(tl.int32)
            is_active = free & (is_thinking | (thinking_steps > 0))
            if SPAN >= 0:
                is_active = is_active & member & (slot - step_slot < SPAN)
            active = is_active.to(tl.int32)
            rule_state, step_open = tl.where(stops, 0, rule_state), tl.where(stops, 0, step_open)
            length_, blanks, flags = tl.where(stops, 0, length_), tl.where(stops, 0, blanks), tl.where(stops, 0, flags)

            aside = segment == IS_ASIDE
            inner = tl.where(aside, return_segment, segment)
            heard = (aside == 0) | (in_header > 0)
            thinks = heard & (found == _THINKS)
            resumes, opens = thinks & (inner == THINKS), thinks & (inner != THINKS)
            sums_up = heard & (found == _SUMS_UP) & (segment != ASKS)
            tool_opens = (found == _TOOL) & ((segment == THINKS) | (segment == SUMS_UP))
            tool_ends = (found == _TOOL_END) & aside
            taken = resumes | opens | sums_up | tool_opens | tool_ends
            ends = (taken == 0) & (_at(feature, _ENDS) > 0)
            if HAS_HEADERS:
                ends = ends & (aside == 0)
            leaves_header = resumes | sums_up | ends
            if HAS_HEADERS:
                left = (taken | ends) == 0
                header = left & (in_header > 0) & (_at(feature, _OPENS_MESSAGE) > 0)
                enters = left & (header == 0) & (_at(feature, _SPECIAL) > 0) & (segment != ASKS)
                tool_opens = tool_opens | header
                leaves_header = leaves_header | header
                in_header = tl.where(enters, 1, in_header)
            return_segment = tl.where(tool_opens, inner, return_segment)
            has_aside = tl.where(tool_opens, 1, has_aside)
            summary_slot = tl.where(sums_up & (inner == THINKS), slot + 1, summary_slot)
            segment = tl.where(resumes | tool_ends, inner, segment)
            segment = tl.where(sums_up, SUMS_UP, segment)
            segment = tl.where(tool_opens, IS_ASIDE, segment)
            segment = tl.where(ends, ASKS, segment)
            in_header = tl.where(leaves_header, 0, in_header)
            restarts = resumes | sums_up | tool_ends
            rule_state, step_open = tl.where(restarts, 0, rule_state), tl.where(restarts, 0, step_open)
            length_ = tl.where(restarts, 0, length_)
            blanks, flags = tl.where(restarts, 0, blanks), tl.where(restarts, 0, flags)
            round_ += opens.to(tl.int32)
            segment = tl.where(opens, THINKS, segment)
            thinking_slot = tl.where(opens, slot + 1, thinking_slot)
            summary_slot, step_slot = tl.where(opens, -1, summary_slot), tl.where(opens, -1, step_slot)
            previous_start, previous_end = tl.where(opens, -1, previous_start), tl.where(opens, -1, previous_end)
            steps, thinking_steps = tl.where(opens, 0, steps), tl.where(opens, 0, thinking_steps)
            has_aside, in_header = tl.where(opens, 0, has_aside), tl.where(opens, 0, in_header)
            step_end, step_count = tl.where(opens, 0, step_end), tl.where(opens, 0, step_count)
            previous_count = tl.where(opens, 0, previous_count)
            rule_state, step_open = tl.where(opens, 0, rule_state), tl.where(opens, 0, step_open)
            length_, blanks, flags = tl.where(opens, 0, length_), tl.where(opens, 0, blanks), tl.where(opens, 0, flags)
        _put(target, copy, LABEL, label, step, trigger, active, TOKENS)
        _put(target, copy, THINKING_SLOT, thinking_slot, summary_slot, step_slot, previous_start, TOKENS)
        _put(target, copy, PREVIOUS_END, previous_end, previous_count, first_slot, has_aside, TOKENS)
        _put(target, copy, COUNT, count, tl.where(is_hidden, -1, token), rule_state, marker_state, TOKENS)
        _put(target, copy, SEGMENT, segment, return_segment, in_header, length_, TOKENS)
        _put(target, copy, BLANKS, blanks, flags, step_open, steps, TOKENS)
        _put(target, copy, THINKING_STEPS, thinking_steps, step_end, step_count, round_, TOKENS)
        bridged += active
        injected += trigger
    return bridged, injected


def _mask_kind(mask: Tensor | None) -> tuple[Tensor | None, int, float]:
    """A mask as kernels read it, its kind (0 none, 1 bool, 2 added) and the value that hides a key."""
    if mask is None:
        return None, 0, 0.0
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), 1, 0.0
    return mask, 2, torch.finfo(mask.dtype).min / 2


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    """Strides by row, query and key, 0 where it is the same for all."""
    if mask is None:
        return 0, 0, 0
    return tuple(mask.stride(axis) if mask.shape[axis] > 1 else 0 for axis in (0, 2, 3))  # type: ignore[return-value]


@lru_cache(maxsize=256)
def _caps(tau: tuple[float, ...], heads: int, device: torch.device) -> Tensor:
    """The cap of each head, float32 [H]."""
    return torch.tensor(tau * heads if len(tau) == 1 else tau, dtype=torch.float32, device=device)


def _power(number: int, least: int) -> int:
    return max(triton.next_power_of_2(number), least)


def _ranged(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, records: Tensor, every: Tensor, tau: list[float],
    sinks: Tensor | None, sums: Tensor | None, length: Tensor | None, tokens: int, scaling: float,
    softcap: float | None, is_absolute: bool, by_step: bool, sink_tokens: int, splits: int = 0,
) -> Tensor:  # fmt: skip
    batch, heads, queries, width = query.shape
    key_heads, keys, value_width = key.shape[1], key.shape[2], value.shape[3]
    query, key, value = (one if one.stride(-1) == 1 else one.contiguous() for one in (query, key, value))
    group = heads // key_heads
    together = min(queries, max(1, _ROWS // group))
    tiles, rows = triton.cdiv(queries, together), _power(together * group, 16)
    if splits == 0:
        free = _programs(query.device) // (batch * key_heads * tiles)
        splits = max(1, min(free, triton.cdiv(keys, _SPLIT_KEYS)))
    of_split = triton.cdiv(triton.cdiv(keys, splits), _KEYS) * _KEYS
    wide = _power(value_width, 16)
    out = query.new_empty(batch, queries, heads, value_width)
    mask, kind, hides = _mask_kind(mask)
    caps = _caps(tuple(tau), heads, query.device)
    parts = means = out
    if splits > 1:
        places = batch * key_heads * tiles * splits * 3
        parts = torch.empty(places * 3 * rows, dtype=torch.float32, device=query.device)
        means = torch.empty(places * rows * wide, dtype=torch.float32, device=query.device)
    sums_strides = (0, 0) if sums is None else (sums.stride(0), sums.stride(1))
    shared = {
        "HEADS": key_heads, "GROUP": group, "VALUE_WIDTH": value_width, "ROWS": rows, "QUERIES": together, "DV": wide,
        "SPLITS": splits, "HAS_SINKS": sinks is not None, "HAS_SUMS": sums is not None, "ABSOLUTE": is_absolute,
    }  # fmt: skip
    _ranged_attention[tiles, key_heads * splits, batch](
        query, key, value, mask, records, every, caps, sinks, sums, length, out, parts, means,
        tokens, keys, queries, of_split, scaling, softcap or 0.0, hides,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *_mask_strides(mask),
        *records.stride()[:2], *every.stride()[:2], *sums_strides,
        WIDTH=width, KEYS=_KEYS, D=_power(width, 16), MASK=kind, HAS_LENGTH=length is not None,
        HAS_SOFTCAP=softcap is not None, BY_STEP=by_step, SINK_TOKENS=sink_tokens,
        num_warps=8 if rows * wide >= 64 * 128 else 4, **shared,
    )  # fmt: skip
    if splits > 1:
        _merge_splits[tiles, key_heads, batch](parts, means, caps, sinks, sums, out, queries, *sums_strides, **shared)
    return out


def _injected(
    output: Tensor, value: Tensor, mask: Tensor | None, records: Tensor, every: Tensor, sums: Tensor | None,
    length: Tensor | None, tokens: int, alpha: float, window: int,
) -> None:  # fmt: skip
    batch, queries, heads, width = output.shape
    value = value if value.stride(-1) == 1 else value.contiguous()
    mask, kind, hides = _mask_kind(mask)
    _inject[batch,](
        output, value, mask, records, every, sums, length,
        tokens, value.shape[2], queries, alpha, hides,
        *value.stride()[:3], *_mask_strides(mask), *records.stride()[:2], *every.stride()[:2],
        0 if sums is None else sums.stride(0),
        HEADS=value.shape[1], GROUP=heads // value.shape[1], VALUE_WIDTH=width, KEYS=_KEYS, DV=_power(width, 16),
        MASK=kind, HAS_LENGTH=length is not None, HAS_SUMS=sums is not None, WINDOW=window,
    )  # fmt: skip


def _labelled(
    records: Tensor, ids: Tensor, padding: Tensor | None, length: Tensor | None, start: int, opening: Tensor | None,
    opening_slot: int, tables: list[Tensor], has_headers: bool, is_implicit: bool, shortest: int, span: int,
) -> Tensor:  # fmt: skip
    features, transition, split_variant, split, marker_next, *_ = tables
    made = records.new_empty(*ids.shape, FIELDS)
    ids = ids.contiguous()
    padding = None if padding is None else padding.contiguous().view(torch.uint8)
    _label[ids.shape[0],](
        records, made, ids, padding, length, opening, *tables,
        start, ids.shape[1], features.shape[0] - 1, opening_slot, transition.shape[1], marker_next.shape[1],
        split_variant.shape[1], *records.stride()[:2], ids.shape[1], ids.shape[1],
        HAS_PADDING=padding is not None, HAS_LENGTH=length is not None, HAS_OPENING=opening is not None,
        HAS_SPLITS=split.shape[0] > 1, HAS_HEADERS=has_headers, IMPLICIT=is_implicit, SHORTEST=shortest, SPAN=span,
        COLUMNS=FIELDS, FEATURES=features.shape[1],
    )  # fmt: skip
    return made


def _programs(device: torch.device) -> int:
    """How many programs keep a device busy."""
    if device.type != "cuda":
        return 1
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _like_heads(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _like_records(records: Tensor, ids: Tensor, *_: Any) -> Tensor:
    return records.new_empty(*ids.shape, FIELDS)


_LIBRARY = torch.library.Library("hf_stepflow", "FRAGMENT")


def _registered(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers an operator. Each copy of this code (repositories bring some) has its own, under a longer name."""
    if __name__ != "hf_stepflow.runtime.kernels":
        name += "_of_copy"
    while hasattr(torch.ops.hf_stepflow, name):
        name += "_"
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_stepflow::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.hf_stepflow, name).default


class Kernels(NamedTuple):
    """The operators.

    Attributes:
        ranged_attention: Attention with the bridge: [B, q, H, Dv] of the dtype of the query, summed up in float32.
        inject: The injection into head outputs [B, q, H, Dv], in place.
        label: Labels new tokens: writes their records, int32 [B, q, F], into those of all slots and returns them.

    The arguments that two of them share:
        query: [B, H, q, D], float32, bfloat16 or float16.
        key: [B, Hkv, K, D].
        value: [B, Hkv, K, Dv].
        mask: [B or 1, 1, q or 1, K or more], bool or to be added; None where every query sees all slots up to its own.
        records: int32 [B, q, F] of the queries.
        every: int32 [B, T, F] of all slots.
        sums: float32, to which the report's sums are added (`Tally.of_layer`), or None.
        length: Number of tokens on the device, [], those of the queries included; None for `tokens`.
        tokens: The same on the host.

    Those of `ranged_attention`:
        tau: The cap of the floor, one for all heads or one each.
        sinks: Learned sinks [H], or None.
        scaling: Factor of the logits.
        softcap: Their softcap, or None.
        is_absolute: Whether the floor is "absolute" instead of "share".
        by_step: Whether S is the query's step instead of its segment.
        sink_tokens: First tokens that belong to no group.
        splits: Number of programs that share the keys; 0 for as many as keep the device busy.

    Those of `inject`:
        alpha: Factor of the mean.
        window: Last tokens of a step that count; -1 for all.

    Those of `label`:
        records: int32 [B, T, F] of all slots.
        ids: int64 [B, q].
        padding: bool [B, q] of the tokens that are padding, or None.
        length: Slot of the first token on the device, [], or None for `start`.
        start: The same on the host.
        opening: Slot where implicit thinking starts, on the device, or None for `opening_slot`; -1 for nowhere.
        opening_slot: The same on the host.
        tables: The tables of the step rules, as `StepVocabulary.label` hands them down.
        has_headers: Whether messages have headers.
        is_implicit: Whether thinking starts without a marker.
        shortest: The fewest characters of a whole sentence.
        span: Tokens of a step that the bridge is limited to; -1 for all.
    """

    ranged_attention: Any
    inject: Any
    label: Any


KERNELS = Kernels(
    _registered(
        "ranged_attention",
        "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor records, Tensor every, float[] tau, "
        "Tensor? sinks, Tensor(a!)? sums, Tensor? length, int tokens, float scaling, float? softcap, "
        "bool is_absolute, bool by_step, int sink_tokens, int splits=0) -> Tensor",
        _ranged,
        _like_heads,
    ),
    _registered(
        "inject",
        "(Tensor(a!) output, Tensor value, Tensor? mask, Tensor records, Tensor every, Tensor(b!)? sums, "
        "Tensor? length, int tokens, float alpha, int window) -> ()",
        _injected,
        lambda *_: None,
    ),
    _registered(
        "label",
        "(Tensor(a!) records, Tensor ids, Tensor? padding, Tensor? length, int start, Tensor? opening, "
        "int opening_slot, Tensor[] tables, bool has_headers, bool is_implicit, int shortest, int span) -> Tensor",
        _labelled,
        _like_records,
    ),
)
