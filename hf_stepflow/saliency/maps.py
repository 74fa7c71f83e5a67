"""Step maps: saliency pooled from pairs of tokens to pairs of steps, and the indices read from it.

Source: docs/method.md, "Step-Saliency". Shapes: L layers, T tokens, S steps, H heads, c queries and k keys of a tile,
B traces of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.trace import Trace, TraceStep

POOLINGS = ("causal", "block")

# The meaning of each index, for plots, pages and tables.
INDICES = {
    "lock_in": "share of a thinking step's saliency on itself and the step before (lock-in)",
    "current_step": "share of a thinking step's saliency on itself",
    "previous_step": "share on the step before, where that is thinking",
    "earlier_steps": "share on the thinking before that",
    "question": "share on the question",
    "decay_share": "share of a summary step's saliency on the thinking",
    "decay_slope": "slope of the summary's log saliency over the age of thinking steps, nats a step",
    "block_ratio": "saliency per pair, summary on summary over thinking on thinking",
}

# Tokens whose steps are summed by one product.
_BLOCK = 512


@dataclass
class StepMaps:
    """The step maps of one trace and what is computed from them; `StepSaliency` describes the fields."""

    sums: Tensor
    layers: list[int]
    trace: Trace
    pooling: str = "causal"
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = len(self.trace.steps)
        expected = (len(self.layers), steps, steps)
        if self.sums.ndim not in (3, 4) or (self.sums.shape[0], *self.sums.shape[-2:]) != expected:
            raise StepFlowInputError(
                f"sums must be [{len(self.layers)}, (heads,) {steps}, {steps}] for these layers and steps, got "
                f"{list(self.sums.shape)}"
            )
        _check_pooling(self.pooling)

    @property
    def steps(self) -> list[TraceStep]:
        """The steps, in the order of the maps' rows and columns."""
        return self.trace.steps

    @cached_property
    def maps(self) -> Tensor:
        """The mean saliency of the token pairs of two steps, 0 without any, [L, S, S] or [L, H, S, S]."""
        counts = self._counts
        return torch.where(counts > 0, self.sums / counts.clamp(min=1).to(self.sums), 0.0)

    @property
    def mean_maps(self) -> Tensor:
        """The maps averaged over heads, [L, S, S]."""
        return self.maps.mean(1) if self.maps.ndim == 4 else self.maps

    @cached_property
    def indices(self) -> dict[str, Tensor]:
        """Lock-in, decay and shares, {name: float64 [L]}; `INDICES` describes each.

        Raises:
            StepFlowInputError: If entries are negative, so that there are no shares.
        """
        if bool((self.sums < 0).any()):
            raise StepFlowInputError(
                "the indices are shares, and these maps have negative entries",
                hint='read maps and sums, or take measure="saliency"',
            )
        sums = self.sums.mean(1) if self.sums.ndim == 4 else self.sums
        return saliency_indices(sums, self._counts, self.trace)

    @cached_property
    def _counts(self) -> Tensor:
        return pair_counts(self.trace, self.pooling)


def _check_pooling(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise StepFlowInputError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")


def step_of_token(trace: Trace) -> Tensor:
    """The place in `trace.steps` of each token's step, long [T], -1 for tokens in no step."""
    place = torch.full((len(trace),), -1)
    for number, step in enumerate(trace.steps):
        here = slice(step.start, step.end)
        place[here] = torch.where(trace.step_ids[here] >= 0, number, place[here])
    return place


def pair_counts(trace: Trace, pooling: str = "causal") -> Tensor:
    """Counts the token pairs behind each entry of a step map.

    Args:
        trace: The trace.
        pooling: "causal" counts pairs of a token and itself or an earlier one; "block" all pairs, as the published
            code does.

    Returns:
        The counts, float64 [S, S].

    Raises:
        StepFlowInputError: If `pooling` is neither.
    """
    _check_pooling(pooling)
    place = step_of_token(trace)
    sizes = torch.bincount(place[place >= 0], minlength=len(trace.steps)).double()
    pairs = sizes[:, None] * sizes
    if pooling == "block":
        return pairs
    return pairs.tril(-1) + torch.diag(sizes * (sizes + 1) / 2)


class StepSums:
    """Adds tiles of token-level saliency up over pairs of steps, for one trace and one layer at a time.

    Args:
        place: The step of each token, long [T], -1 for none; steps follow one another.
        steps: S.
        device: The device of the tiles.
    """

    def __init__(self, place: Tensor, steps: int, device: torch.device):
        self.steps = steps
        self._blocks: list[tuple[int, Tensor]] = []
        for start in range(0, len(place), _BLOCK):
            part = place[start : start + _BLOCK]
            inside = part[part >= 0]
            first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (0, 0)
            # [tokens of the block, steps that they touch]
            self._blocks.append((first, (part[:, None] == torch.arange(first, last + 1)).to(device)))

    def add(self, sums: Tensor, query: int, key: int, tile: Tensor) -> None:
        """Adds one tile.

        Args:
            sums: [N, S, S], changed in place; N is the number of heads, or 1.
            query: The first query of the tile.
            key: Its first key.
            tile: Its saliency, [N, c, k].
        """
        for first, members, own in self._within(key, tile.shape[2]):
            pooled = torch.matmul(tile[:, :, own], members.to(tile.dtype))
            columns = slice(first, first + members.shape[1])
            for first_row, row_members, own_rows in self._within(query, tile.shape[1]):
                rows = slice(first_row, first_row + row_members.shape[1])
                sums[:, rows, columns] += torch.matmul(row_members.to(tile.dtype).T, pooled[:, own_rows])

    def _within(self, start: int, length: int) -> list[tuple[int, Tensor, slice]]:
        """The blocks of tokens [start, start + length): first step, members, and which of these tokens they are."""
        found = []
        # Tokens beyond the last block are padding on the right.
        for index in range(start // _BLOCK, min(len(self._blocks), -(-(start + length) // _BLOCK))):
            first, members = self._blocks[index]
            base = index * _BLOCK
            low, high = max(start, base), min(start + length, base + len(members))
            if high > low:
                found.append((first, members[low - base : high - base], slice(low - start, high - start)))
        return found


class BatchSums:
    """Collects the tiles of all layers of a batch.

    Args:
        traces: The traces, padded on the right in the batch.
        layers: The layers that are collected.
        per_head: Whether heads are kept apart.
        advance: Called when a layer is complete.
    """

    def __init__(self, traces: list[Trace], layers: list[int], per_head: bool, advance: Callable[[], object]):
        self._places = [(step_of_token(trace), len(trace.steps)) for trace in traces]
        self._layers = layers
        self._per_head = per_head
        self._advance = advance
        self._pools: dict[torch.device, list[StepSums]] = {}
        self._sums: list[dict[int, Tensor]] = [{} for _ in traces]

    def collector(self, layer: int, query: Tensor) -> Callable[[int, int, slice, Tensor], None]:
        """Returns the function that takes the tiles of a layer whose queries are [B, H, T, D].

        It takes the first query of a tile, its first key, its heads (all heads of the same queries and keys come in
        order, and the tiles of query 0 and key 0 last), and its saliency [B, heads, c, k].
        """
        device, heads = query.device, query.shape[1]
        dtype = torch.promote_types(query.dtype, torch.float32)
        pools = self._pools.setdefault(device, [StepSums(*place, device) for place in self._places])
        for found, (_, steps) in zip(self._sums, self._places, strict=True):
            shape = (heads if self._per_head else 1, steps, steps)
            found.setdefault(layer, torch.zeros(shape, dtype=dtype, device=device))
        summed: list[Tensor] = []

        def collect(query: int, key: int, own: slice, tile: Tensor) -> None:
            is_last = own.stop == heads
            if not self._per_head:  # over the heads of a chunk first, so that they are pooled once
                total = tile.sum(1, keepdim=True) if tile.shape[1] > 1 else tile
                if own.start == 0:
                    summed[:] = [total.clone() if total is tile else total]
                else:
                    summed[0].add_(total)
                if not is_last:
                    return
                own, tile = slice(0, 1), summed.pop().div_(heads)
            for row, (found, pool) in enumerate(zip(self._sums, pools, strict=True)):
                pool.add(found[layer][own], query, key, tile[row])
            if query == key == 0 and is_last:
                self._advance()

        return collect

    def finished(self) -> list[Tensor]:
        """The sums of each trace, [L, S, S] or [L, H, S, S], on the CPU, in float32 or float64."""
        stacks = [torch.stack([found[layer].cpu() for layer in self._layers]) for found in self._sums]
        return stacks if self._per_head else [stack[:, 0] for stack in stacks]


def saliency_indices(sums: Tensor, counts: Tensor, trace: Trace) -> dict[str, Tensor]:
    """Computes Shallow Lock-in, Deep Decay and the shares behind them, layer by layer.

    Shares are shares of sums over token pairs, not of block means (docs/method.md, "Step-Saliency").

    Args:
        sums: Saliency summed over the token pairs of two steps, [L, S, S]; row i draws on column j.
        counts: Number of pairs behind the means, [S, S].
        trace: The trace.

    Returns:
        {name: float64 [L]} by the names of `INDICES`; NaN where the trace has no such steps, or they no saliency.
    """
    sums, counts, steps = sums.double(), counts.double(), trace.steps
    rounds = torch.tensor([step.round for step in steps])
    is_question, is_summary = (
        torch.tensor([step.label == label for step in steps]) for label in ("question", "summary")
    )
    is_thinking = ~is_question & ~is_summary
    same_round = rounds[:, None] == rounds
    # Which columns each row has in a group, [S, S].
    thinking = same_round & is_thinking
    earlier = torch.ones_like(thinking).tril(-1)
    before = thinking & earlier
    place = before.cumsum(1)
    previous = before & (place == place[:, -1:])
    groups = {
        "current_step": torch.eye(len(steps), dtype=torch.bool),
        "previous_step": previous,
        "earlier_steps": before & ~previous,
        "question": ~thinking & earlier,
        "decay_share": thinking,
    }
    # As products, so that a row without saliency gives NaN in every share, even where a group is empty.
    rows = sums / sums.sum(-1, keepdim=True)
    shares = {name: torch.einsum("lij,ij->li", rows, group.double()) for name, group in groups.items()}
    shares["lock_in"] = 1 - shares["question"] - shares["earlier_steps"]
    decay = shares.pop("decay_share")[:, is_summary & thinking.any(1)]
    found = {name: values[:, is_thinking].nanmean(1) for name, values in shares.items()}
    found["decay_share"] = decay.nanmean(1)
    slopes = [torch.full((len(sums),), float("nan"), dtype=torch.float64)]
    for number in rounds[is_summary].unique().tolist():
        of_round = rounds == number
        readers, columns = is_summary & of_round, is_thinking & of_round
        if columns.sum() >= 2:
            per_pair = sums[:, readers][:, :, columns].sum(1) / counts[readers][:, columns].sum(0)
            slopes.append(torch.stack([_slope(layer) for layer in per_pair]))
    found["decay_slope"] = torch.stack(slopes).nanmean(0)
    blocks = [same_round & which[:, None] & which for which in (is_summary, is_thinking)]
    on_summary, on_thinking = (sums[:, block].sum(-1) / counts[block].sum() for block in blocks)
    found["block_ratio"] = torch.where(on_thinking > 0, on_summary / on_thinking, float("nan"))
    return {name: found[name] for name in INDICES}


def _slope(per_pair: Tensor) -> Tensor:
    """The least-squares slope of the log of [steps] over their age, in nats a step; steps without saliency are out."""
    age = torch.arange(len(per_pair) - 1, -1, -1, dtype=torch.float64)
    some = per_pair > 0
    if some.sum() < 2:
        return torch.tensor(float("nan"), dtype=torch.float64)
    age, logs = age[some] - age[some].mean(), per_pair[some].log()
    return (age * logs).sum() / (age**2).sum()
