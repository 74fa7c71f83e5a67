"""Bridge, injection and length temperature on the packed tokens and the paged cache of a vLLM worker.

The mathematics is the runtime's. Here keys and values come from a paged cache, and sequences that decode one token
share what is done per token.

Shapes: T tokens of the pass, H query heads, Hkv key-value heads, K keys of a sequence, D width, c some queries.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_stepflow.runtime.attention import BridgedCall, flash
from hf_stepflow.runtime.bridge import Attention, bridge_floors, bridged_merge, bridged_mixture
from hf_stepflow.runtime.flow_state import kernels_on
from hf_stepflow.runtime.step_detector import SUMMARY, Field

from .key_copies import LayerKeys
from .sequences import PagedPass, Sequence


def bridge(flow: PagedPass, module: Any, tau: Any, query: Tensor, keys: LayerKeys, output: Tensor) -> None:
    """Writes the bridged attention of the tokens to which the bridge applies.

    Args:
        flow: The pass.
        module: The layer.
        tau: The cap of the floor, one for all heads or one each.
        query: [T, H, D].
        keys: Keys and values of the layer.
        output: [T, H, D], which holds attention without the bridge.
    """
    impl = module.impl
    softcap, sinks = getattr(impl, "logits_soft_cap", None) or None, getattr(impl, "sinks", None)
    kernels = kernels_on(query.device)
    has_ranges = softcap is None and sinks is None and kernels is None and query.device.type == "cpu"
    together = [one for one in flow.bridged if has_ranges and one.end - one.start == 1 and one.runs]
    if together:
        _decode(flow, module, together, tau, query, keys, output)
    kwargs = {"scaling": impl.scale, "softcap": softcap, "s_aux": sinks}
    for sequence in flow.bridged:
        if sequence in together:
            continue
        key, value = keys.cache.gather(sequence.row, 0, sequence.length)
        part = query[sequence.start : sequence.end].transpose(0, 1)[None]
        kind = ("mask", sequence.row, module.sliding_window)
        mask = flow.shared(kind, functools.partial(_mask, sequence, module.sliding_window, query.device))
        name = "sdpa" if softcap is None else "capped"
        call = BridgedCall(keys.layer, part, key, value, mask, kwargs, name, sequence.flow, tau)
        if kernels is not None and call.suits_kernels:
            new = call.by_kernel(kernels)
        elif not call.has_ranges:
            new = call.rows(0, part.shape[2])[0]
        elif part.shape[2] == 1:
            new = call.decode()
        else:
            new = call.merge()
        active = torch.tensor([record[Field.ACTIVE] > 0 for record in sequence.made], device=output.device)
        into = output[sequence.start : sequence.end].view(new.shape[1:])
        into.copy_(torch.where(active[:, None, None], new[0].to(into.dtype), into))


@dataclass
class _Ranges:
    """The key ranges of one query of each of some sequences.

    Attributes:
        members: The sequences, with the first key that they see, the first of S, and the keys of B.
        tokens: Their tokens in the pass, long [n].
        floors: The floors, [n, 1 or Hkv, 1 or G].
        has_others: Whether there are visible keys besides those of S and B.
    """

    members: list[tuple[Sequence, int, int, slice]]
    tokens: Tensor
    floors: Tensor
    has_others: bool

    @classmethod
    def of(cls, sequences: list[Sequence], module: Any, tau: Any) -> "list[_Ranges]":
        """The ranges in the layers of a kind, apart where there are other keys; none where B has no visible key."""
        members: dict[bool, list[tuple[Sequence, int, int, slice]]] = {}
        for sequence in sequences:
            for run in sequence.runs or ():
                low = 0 if module.sliding_window is None else max(sequence.length - module.sliding_window, 0)
                start, end = max(run.bridge[0], low), run.bridge[1]
                if start < end:
                    members.setdefault(run.has_others, []).append(
                        (sequence, low, max(run.same, low), slice(start, end))
                    )
        cap = torch.tensor(tau, dtype=torch.float32).reshape(-1)
        shared = (1, 1) if len(cap) == 1 else (module.num_kv_heads, module.num_heads // module.num_kv_heads)
        found = []
        for has_others, some in members.items():
            counts = [(one.length - same, there.stop - there.start) for one, _, same, there in some]
            n_same, n_bridge = torch.tensor(counts).T[..., None]
            floors = bridge_floors(n_same, n_bridge, cap, torch.float32)
            tokens = torch.tensor([one.start for one, *_ in some])
            found.append(cls(some, tokens, floors.reshape(len(some), *shared), has_others))
        return found


def _decode(
    flow: PagedPass, module: Any, sequences: list[Sequence], tau: Any, query: Tensor, keys: LayerKeys, output: Tensor
) -> None:
    """One query of each of some sequences, all of them bridged."""
    kind = ("ranges", module.sliding_window, tau)
    for ranges in flow.shared(kind, lambda: _Ranges.of(sequences, module, tau)):
        here: list[Attention] = []
        there: list[Attention] = []
        whole: list[Attention] = []
        for sequence, low, same, bridge in ranges.members:
            key, value = keys.of(sequence)
            part = query[sequence.start].reshape(1, module.num_kv_heads, -1, query.shape[-1])
            wanted = [(here, slice(same, None)), (there, bridge)]
            for found, range_ in [*wanted, (whole, slice(low, None))] if ranges.has_others else wanted:
                found.append(flash(part, key[:, :, range_], value[:, :, range_], scale=module.impl.scale))
        over_same, over_bridge = _joined(here), _joined(there)
        out = torch.empty_like(over_same[0])
        if ranges.has_others:
            floor = flow.plan.settings.bridge_floor
            new, _, _ = bridged_merge(_joined(whole), over_bridge, over_same, ranges.floors, floor, out)
        else:
            new, _, _ = bridged_mixture(over_same, over_bridge, ranges.floors, out)
        output.view(len(output), module.num_heads, -1)[ranges.tokens] = new.flatten(1, 2)


def _joined(parts: list[Attention]) -> Attention:
    """Attention of several rows as one."""
    means, sums = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(sums)


def _mask(sequence: Sequence, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys the queries of a sequence see, bool [1, 1, c, K]; None where they see all up to their own."""
    queries = sequence.end - sequence.start
    if window is None and (queries == 1 or sequence.first == 0):
        return None
    own = torch.arange(sequence.first, sequence.length, device=device)[:, None]
    keys = torch.arange(sequence.length, device=device)
    visible = keys <= own
    if window is not None:
        visible = visible & (keys > own - window)
    return visible[None, None]


def inject(flow: PagedPass, module: Any, keys: LayerKeys, output: Tensor) -> None:
    """Adds alpha times the previous step's mean value at the first token of each step.

    Args:
        flow: The pass.
        module: The layer.
        keys: Keys and values of the layer.
        output: Head outputs [T, H, D] before the output projection.
    """
    window = module.sliding_window
    steps = flow.shared(("steps", window), functools.partial(_PreviousSteps.of, flow, window))
    if not len(steps.tokens):
        return
    value = keys.cache.values_at(steps.rows, steps.positions)
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    means = value.new_zeros(len(steps.tokens), *value.shape[1:])
    means.index_add_(0, steps.owners, value * steps.weights[:, None, None].to(value.dtype))
    addition = (flow.plan.settings.alpha * means).repeat_interleave(module.num_heads // module.num_kv_heads, 1)
    output.view(len(output), *addition.shape[1:]).index_add_(0, steps.tokens, addition.to(output.dtype))


@dataclass
class _PreviousSteps:
    """The steps before the tokens of a pass that are injected, one entry for each token of a step.

    Attributes:
        tokens: The tokens that are injected, by their places in the pass, long [n].
        owners: For each entry the token that it is for, as an index of `tokens`, long [m].
        rows: Its request, long [m].
        positions: Its position, long [m].
        weights: Its share of the mean, float32 [m].
    """

    tokens: Tensor
    owners: Tensor
    rows: Tensor
    positions: Tensor
    weights: Tensor

    @classmethod
    def of(cls, flow: PagedPass, window: int | None) -> "_PreviousSteps":
        """Finds them, as far as a layer with this window sees them."""
        spans = []
        for sequence in flow.injected:
            for place in sequence.triggers:
                record = sequence.made[place]
                first, last = record[Field.PREVIOUS_START], record[Field.PREVIOUS_END]
                if window is not None:
                    first = max(first, sequence.first + place - window + 1)
                spans.append((sequence.start + place, sequence.row, record, range(first, last)))
        where = [(row, position) for _, row, _, span in spans for position in span]
        known = iter(flow.sequences[0].records_at(where)[:, [Field.LABEL, Field.STEP]].tolist())
        tokens: list[int] = []
        entries: list[tuple[int, int, int, float]] = []
        for token, row, record, span in spans:
            wanted = [record[Field.LABEL] - int(record[Field.LABEL] % 3 == SUMMARY), record[Field.STEP] - 1]
            members = [position for position, found in zip(span, known, strict=False) if found == wanted]
            if flow.plan.settings.smi_window is not None:
                members = members[len(members) - min(flow.plan.settings.smi_window, len(members)) :]
            if members:
                entries += [(len(tokens), row, position, 1 / len(members)) for position in members]
                tokens.append(token)
        device = flow.sequences[0].device
        owners, rows, positions = torch.tensor([entry[:3] for entry in entries], device=device).reshape(-1, 3).long().T
        weights = torch.tensor([entry[3] for entry in entries], device=device)
        return cls(torch.tensor(tokens, dtype=torch.long, device=device), owners, rows, positions, weights)


def scaled_query(flow: PagedPass, query: Tensor, gamma: Any, window: int | None) -> Tensor:
    """The query with the length temperature, max(1, ln n / ln n0) ** gamma for n visible keys.

    Args:
        flow: The pass.
        query: [T, H, D].
        gamma: The exponent, one for all heads or one each.
        window: The window of the layer, or None.
    """
    base = flow.plan.settings.length_temperature_base
    assert base is not None
    query = query.clone()
    power = torch.tensor(gamma, dtype=torch.float64, device=query.device).reshape(1, -1, 1)
    for sequence in flow.sequences:
        number = torch.arange(sequence.first, sequence.length, dtype=torch.float64, device=query.device) + 1
        if window is not None:
            number = number.clamp(max=window)
        ratio = (number.log() / math.log(base)).clamp(min=1.0)
        query[sequence.start : sequence.end] *= (ratio[:, None, None] ** power).to(query.dtype)
    return query
