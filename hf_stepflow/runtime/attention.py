"""The attention function of StepFlow: the base model's kernel, with the bridge and the injection where they apply.

Layers and passes in which nothing is to be done run the base's own kernel on its own arguments. Elsewhere the query is
scaled (length temperature), attention is bridged (`bridge`), and the output gets the injection (`momentum`).

Shapes: B batch, H query heads, Hkv key-value heads, q queries, c a chunk of them, K keys, D and Dv widths of keys and
values.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .bridge import (
    Attention,
    DecodeRanges,
    Run,
    bridge_floors,
    bridged_merge,
    bridged_mixture,
    bridged_weights,
    joined,
    slots_within,
)
from .errors import StepFlowUnsupportedError
from .flow_state import kernels_on
from .forward import FlowPass
from .momentum import inject, inject_by_kernel
from .step_detector import Field

# Logits of a chunk of queries, in elements: what bounds the memory of a prefill or a teacher-forced pass. On a CPU
# less is faster, as long as it stays in the caches and there are queries enough for a product of matrices.
_CHUNK_ELEMENTS = 1 << 24
_CACHED_ELEMENTS = 1 << 19
_SHORTEST_CHUNK = 32

# What kernels of an accelerator take; a block mask is written out for them up to so many queries.
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DENSE_QUERIES = 16

Output = tuple[torch.Tensor, torch.Tensor | None]

# The kernel behind scaled_dot_product_attention on a CPU, which also reports the log-sum-exp of the logits.
flash = torch._scaled_dot_product_flash_attention_for_cpu


@dataclass
class AttentionCall:
    """One call of attention as it is without StepFlow.

    Attributes:
        layer: Index of the layer.
        query: [B, H, q, D].
        key: [B, Hkv, K, D].
        value: [B, Hkv, K, Dv].
        mask: The mask that the base implementation was given.
        kwargs: The other arguments of the base implementation.
        base_name: The base implementation.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    kwargs: dict[str, Any]
    base_name: str

    @property
    def wants_weights(self) -> bool:
        """Whether the base returns probabilities: eager does."""
        return self.base_name == "eager"

    @property
    def scaling(self) -> float:
        """The factor of the logits."""
        scaling = self.kwargs.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling

    @property
    def softcap(self) -> float | None:
        """The softcap that the base applies: sdpa knows none (newer releases refuse it, older ones leave it out)."""
        return None if self.base_name == "sdpa" else self.kwargs.get("softcap")

    @property
    def sink_logits(self) -> torch.Tensor | None:
        """Learned sinks [H], in the denominator only."""
        return self.kwargs.get("s_aux")

    @property
    def suits_kernels(self) -> bool:
        """Whether the kernels of an accelerator compute this: no weights or gradients wanted, nothing by head.

        They read a dense mask, so the block mask of a long prefill stays with the general form.
        """
        parts, mask, queries = (self.query, self.key, self.value), self.mask, self.query.shape[2]
        if self.wants_weights or self.query.dtype not in _KERNEL_DTYPES or max(one.shape[-1] for one in parts) > 256:
            return False
        if self.kwargs.get("position_bias") is not None:
            return False
        if torch.is_grad_enabled() and any(one.requires_grad for one in parts):
            return False
        if isinstance(mask, torch.Tensor):
            return mask.shape[1:3] == (1, queries) and bool(mask.shape[3] >= self.key.shape[2])
        return mask is None or queries <= _DENSE_QUERIES

    def dense_mask(self, flow: FlowPass) -> torch.Tensor | None:
        """The mask as kernels read it: a tensor [B or 1, 1, q, K or more], or None."""
        if self.mask is None or isinstance(self.mask, torch.Tensor):
            return self.mask
        queries, keys = self.query.shape[2], self.key.shape[2]
        return flow.found(self.mask, ("dense", keys), lambda: _dense_block_mask(self.mask, 0, queries, keys))

    def logits(self, query: torch.Tensor, seen: int) -> torch.Tensor:
        """Logits [B, H, c, seen] of queries [B, H, c, D] over the first keys, scaled and capped, at least float32."""
        batch, heads, chunk, _ = query.shape
        groups = self.key.shape[1]
        dtype = torch.promote_types(query.dtype, torch.float32)
        packed = query.reshape(batch, groups, heads // groups * chunk, -1).to(dtype) * self.scaling
        logits = torch.matmul(packed, self.key[:, :, :seen].to(dtype).mT).view(batch, heads, chunk, seen)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


Attend = Callable[[torch.nn.Module, AttentionCall], Output]


def make_flow_attention(base_name: str, attend: Attend | None = None) -> Callable[..., Output]:
    """Makes the attention function to register for models whose base implementation is `base_name`.

    Args:
        base_name: The base implementation.
        attend: Computes attention, from the module and its `AttentionCall`, which is a `BridgedCall` in layers and
            passes with a bridge. None runs the base's kernel and the bridge; Step-Saliency passes its own, which keeps
            what gradients need. The length temperature and the injection apply to either.
    """

    def flow_attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Output:
        base = base_attention(base_name, module)
        handed_down = kwargs.pop("stepflow_pass", None)
        link = getattr(module, "stepflow_link", None)
        if link is None:
            return base(module, query, key, value, attention_mask, **kwargs)
        flow = link.current() if handed_down is None else handed_down
        if not flow:
            if attend is None:
                return base(module, query, key, value, attention_mask, **kwargs)
            return attend(module, AttentionCall(link.layer, query, key, value, attention_mask, kwargs, base_name))
        if hasattr(flow, "attend"):  # a `PagedPass`, maybe of another copy of this code
            return flow.attend(link.layer, flow_attention, module, (query, key, value), attention_mask, kwargs)
        if not torch.compiler.is_compiling():
            flow.reached[link.layer] = handed_down is not None
        if attend is None and link.layer not in flow.plan.changed:
            return base(module, query, key, value, attention_mask, **kwargs)
        if isinstance(flow.total, int):
            flow.offset(key.shape[2])  # raises if the cache was not found, rather than take each token for a new trace
        flow = flow.last(query.shape[2])
        gamma = flow.plan.gamma.get(link.layer)
        if gamma is not None:
            query = query * _temperature(flow, query, key.shape[2], attention_mask, gamma)
        first, last = flow.active
        tau = flow.plan.tau.get(link.layer) if first < last else None
        if tau is not None and module.training and kwargs.get("dropout"):
            raise StepFlowUnsupportedError(
                f"the bridge needs attention without dropout, got dropout={kwargs['dropout']} in training mode",
                hint="call model.eval(), or set the model's attention dropout to 0",
            )
        arguments = (link.layer, query, key, value, attention_mask, kwargs, base_name)
        if attend is not None:
            call = AttentionCall(*arguments) if tau is None else BridgedCall(*arguments, flow, tau)
            output, weights = attend(module, call)
        elif tau is None:
            output, weights = base(module, query, key, value, attention_mask, **kwargs)
        else:
            bridged = BridgedCall(*arguments, flow, tau)
            kernels = kernels_on(query.device)
            if kernels is not None and bridged.suits_kernels:
                output, weights = bridged.by_kernel(kernels), None
            elif bridged.has_ranges:
                output, weights = bridged.decode() if query.shape[2] == 1 else bridged.merge(), None
            elif query.shape[2] == 1:
                output, weights = bridged.rows(0, 1)
            else:  # the base's kernel for all queries, and the bridge for those that it applies to
                output, weights = bridged.rewrite(*base(module, query, key, value, attention_mask, **kwargs))
        if link.layer in flow.plan.inject and flow.has_trigger:
            call = AttentionCall(*arguments)
            kernels = kernels_on(query.device)
            if kernels is not None and call.suits_kernels:
                output = inject_by_kernel(kernels, flow, link.layer, output, value, call.dense_mask(flow))
            else:
                visible = _visible_to(flow, attention_mask, query.shape[2], key.shape[2])
                output = inject(flow, link.layer, output, value, visible, attention_mask)
        return output, weights

    return flow_attention


def base_attention(name: str, module: torch.nn.Module) -> Callable[..., Output]:
    """The attention function that a module would use under a base implementation."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


@dataclass
class BridgedCall(AttentionCall):
    """One call of attention in a layer and a pass in which queries may be bridged.

    Attributes:
        flow: The pass.
        tau: The cap of the floor, or one value a head.
    """

    flow: FlowPass
    tau: "float | tuple[float, ...]"

    def by_kernel(self, kernels: Any) -> torch.Tensor:
        """Attention of all queries by one kernel, bridged or not: [B, q, H, Dv]."""
        flow, settings = self.flow, self.flow.plan.settings
        sums = None if flow.state.tally is None else flow.state.tally.sums_on(self.query.device, self.layer, 0)
        parts = self.query, self.key, self.value, self.dense_mask(flow), *flow.on(self.query.device)
        tau, scales = [self.tau] if isinstance(self.tau, float) else self.tau, (self.scaling, self.softcap)
        rules = settings.bridge_floor == "absolute", settings.bridge_scope == "step", settings.sink_tokens
        return kernels.ranged_attention(*parts, tau, self.sink_logits, sums, *flow.counted, *scales, *rules)

    @property
    def has_ranges(self) -> bool:
        """Whether attention over ranges of keys serves: the host knows them, and the base's kernel reports its sum.

        Everything else takes the general form: weights that are wanted, gradients, learned sinks, softcaps, biases and
        masks of their own for each head, tool results inside thinking.
        """
        flow, mask, queries, keys = self.flow, self.mask, self.query.shape[2], self.key.shape[2]
        if flow.runs is None or self.base_name != "sdpa" or self.query.device.type != "cpu":
            return False
        if self.sink_logits is not None or self.kwargs.get("position_bias") is not None:
            return False
        if torch.is_grad_enabled() and any(one.requires_grad for one in (self.query, self.key, self.value)):
            return False
        if self.query.shape[-1] != self.value.shape[-1]:
            return False
        if mask is None:
            return queries == 1 or int(flow.total) == queries
        return (
            isinstance(mask, torch.Tensor) and mask.shape[1] == 1 and mask.shape[2] == queries <= mask.shape[3] >= keys
        )

    def _attend(self, query: torch.Tensor, rows: slice | None, start: int, end: int, **kwargs: Any) -> Attention:
        """Attention of queries [b, H or Hkv, c, D] of some rows (None: all) over keys [start, end)."""
        key, value = self.key, self.value
        if rows is not None:
            key, value = key[rows], value[rows]
        if end - start < key.shape[2]:
            key, value = key[:, :, start:end], value[:, :, start:end]
        return flash(query, key, value, scale=self.scaling, **kwargs)

    def decode(self) -> torch.Tensor:
        """Attention of one query a row by ranges: [B, 1, H, D]. All rows are computed here, bridged or not."""
        batch, heads = self.query.shape[:2]
        groups = self.key.shape[1]
        shape = batch, groups, heads // groups, self.query.shape[3]
        query = self.query.reshape(shape)
        key = "decode", self.key.shape[2], shape, query.dtype, self.tau
        ranges = self.flow.found(self.mask, key, self._ranges)
        whole = None
        if ranges.has_others or ranges.same is None:
            whole = self._attend(query, None, 0, ranges.keys, attn_mask=ranges.bias)
            if ranges.same is None:
                return whole[0].reshape(batch, 1, heads, -1)
        bridge = self._attend(query, None, *ranges.bridge, attn_mask=ranges.bridge_bias)
        same = self._attend(query, None, *ranges.same, attn_mask=ranges.same_bias)
        floors, floor, out = ranges.floors, self.flow.plan.settings.bridge_floor, query.new_empty(shape)
        if whole is None:
            output, before, least = bridged_mixture(same, bridge, floors, out)
        else:
            output, before, least = bridged_merge(whole, bridge, same, floors, floor, out)
        if self.flow.state.tally is not None:
            self.flow.state.tally.note_bridge(self.layer, before, least, floors)
        return output.view(batch, 1, heads, -1)

    def _ranges(self) -> DecodeRanges:
        """The ranges of one query a row, for all layers that see the same keys through the same mask."""
        runs, total, offset, keys = self._known()
        batch, mask, dtype = self.query.shape[0], self.mask, self.query.dtype
        bridge = slots_within(min(run.bridge[0] for run in runs), max(run.bridge[1] for run in runs), offset, keys)
        # Without a mask a query sees what its records call padding.
        has_others = any(run.has_others or (mask is None and run.bridge[0] > 0) for run in runs)
        bias = None
        if mask is not None and (has_others or bridge[0] == bridge[1]):
            bias = _bias(mask[..., :keys], dtype, float("-inf"))
        if bridge[0] == bridge[1]:
            return DecodeRanges(keys, bias)
        one = runs[0]
        heads = (1, 1) if isinstance(self.tau, float) else (self.key.shape[1], -1)
        if mask is None and len(runs) == batch and all(run[3:5] == one[3:5] for run in runs):  # `same`, `bridge`
            same = slots_within(one.same, total, offset, keys)
            n_same, n_bridge = same[1] - same[0], bridge[1] - bridge[0]
            root = math.sqrt(n_bridge / (n_bridge + n_same))
            cap = self.tau if isinstance(self.tau, float) else self._caps().view(1, *heads)
            floors = min(root, cap) if isinstance(cap, float) else cap.clamp(max=root)
            return DecodeRanges(keys, bias, has_others, bridge, same, floors)
        # Where attention over all keys is not wanted, a query that is not bridged has all of them in S.
        bounds = [(0, 0 if has_others else total, 0, 0)] * batch
        for run in runs:
            bounds[run.row] = (run.same, total, *run.bridge)
        same = slots_within(min(bound[0] for bound in bounds if bound[1]), total, offset, keys)
        first, last = torch.tensor(bounds, device=self.query.device).view(batch, 2, 2, 1).unbind(2)
        slots = torch.arange(offset, offset + keys, device=self.query.device)
        member = (slots >= first) & (slots < last)  # of S and of B, [B, 2, keys]
        added = torch.zeros((), dtype=dtype, device=self.query.device)
        if mask is not None:
            seen, added = _seen_and_added(mask[:, 0, :, :keys], dtype)
            member = member & seen
        of_same, of_bridge = torch.where(member, added, torch.finfo(dtype).min / 2)[:, :, None, None].unbind(1)
        floors = self._floors(*member.sum(-1, keepdim=True).unbind(1)).view(batch, *heads)
        biases = of_bridge[..., slice(*bridge)], of_same[..., slice(*same)]
        return DecodeRanges(keys, bias, has_others, bridge, same, floors, *biases)

    def _caps(self) -> torch.Tensor:
        """The caps of the floors, [H], or [1] where all heads share it."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        return torch.tensor(self.tau, dtype=dtype, device=self.query.device).reshape(-1)

    def _floors(self, n_same: torch.Tensor, n_bridge: torch.Tensor) -> torch.Tensor:
        """The floors for numbers of keys that broadcast with the caps."""
        caps = self._caps()
        return bridge_floors(n_same, n_bridge, caps, caps.dtype)

    def _known(self) -> tuple[list[Run], int, int, int]:
        """The runs, the number of tokens, the slot of the first key and the number of keys that are filled."""
        runs, total = self.flow.runs, self.flow.total
        assert runs is not None
        assert isinstance(total, int)
        return runs, total, int(self.flow.offset(self.key.shape[2])), min(self.key.shape[2], total)

    def merge(self) -> torch.Tensor:
        """Attention of many queries by ranges: [B, q, H, D]."""
        runs, _, _, keys = self._known()
        bias = None if self.mask is None else _bias(self.mask[..., :keys], self.query.dtype, float("-inf"))
        whole = self._attend(self.query, None, 0, keys, attn_mask=bias, is_causal=bias is None)
        for run in runs:
            self._merge_run(run, whole)
        return whole[0].transpose(1, 2).contiguous()

    def _merge_run(self, run: Run, whole: Attention) -> None:
        """Bridges the queries of a run in the output of attention over all keys."""
        _, total, offset, keys = self._known()
        start, end = slots_within(*run.bridge, offset, keys)
        if start == end:
            return
        rows, some = slice(run.row, run.row + 1), slice(run.first, run.last)
        first = total - self.query.shape[2] - offset  # key of the first query of the pass
        own, last, same_start = first + run.first, first + run.last, max(run.same - offset, 0)
        query, mask = self.query[rows, :, some], None
        if self.mask is not None:
            mask = self.mask[rows if self.mask.shape[0] > 1 else slice(None), :, some]

        def find() -> tuple[torch.Tensor, bool]:
            """The floors of the queries, [1, 1 or H, c], and whether the mask changes anything about the bridge."""
            n_same = torch.arange(own - same_start, last - same_start, device=query.device)[None, :, None] + 1
            n_bridge, is_masked = torch.full_like(n_same, end - start), False
            if mask is not None:
                seen, added = _seen_and_added(mask, query.dtype)
                n_same, n_bridge = (
                    seen[:, 0, :, part].sum(-1, keepdim=True) for part in (slice(same_start, last), bridge)
                )
                is_masked = bool((n_bridge < end - start).any() or (added[..., bridge] if added.ndim else added).any())
            return self._floors(n_same, n_bridge).mT, is_masked

        bridge = slice(start, end)
        key = "floors", run, self.key.shape[2], query.dtype, self.tau
        floors, is_masked = self.flow.found(self.mask, key, find)
        bias = _bias(mask[..., bridge], query.dtype) if is_masked and mask is not None else None
        over_bridge, over_same = self._attend(query, rows, start, end, attn_mask=bias), None
        if run.has_others and mask is not None:
            bias = _bias(mask[..., same_start:last], query.dtype)
            over_same = self._attend(query, rows, same_start, last, attn_mask=bias)
        elif run.has_others:
            over_same = self._attend(query, rows, own, last, is_causal=True)
            if same_start < own:
                over_same = joined(over_same, self._attend(query, rows, same_start, own))
        part = whole[0][rows, :, some], whole[1][rows, :, some]
        floor = self.flow.plan.settings.bridge_floor
        _, before, least = bridged_merge(part, over_bridge, over_same, floors, floor, part[0])
        if self.flow.state.tally is not None:
            self.flow.state.tally.add_bridge(self.layer, before, before.clamp(min=least), floors, run.row)

    def rewrite(self, output: torch.Tensor, weights: torch.Tensor | None) -> Output:
        """Many queries: the base's output, with the bridged queries computed anew, chunk by chunk."""
        chunk = self._chunk_length()
        first, last = self.flow.active
        pieces = [output[:, :first]]
        weight_pieces = [] if weights is None else [weights[:, :, :first]]
        for start in range(first, last, chunk):
            end = min(start + chunk, last)
            new, new_weights = self.rows(start, end)
            active = self.flow.records[:, start:end, Field.ACTIVE].to(output.device) > 0
            pieces.append(torch.where(active[:, :, None, None], new, output[:, start:end]))
            if weights is not None and new_weights is not None:
                weight_pieces.append(torch.where(active[:, None, :, None], new_weights, weights[:, :, start:end]))
        if weights is not None:
            weights = torch.cat([*weight_pieces, weights[:, :, last:]], 2)
        return torch.cat([*pieces, output[:, last:]], 1), weights

    def rows(self, start: int, end: int) -> Output:
        """Attention of queries [start, end) with the bridge: [B, c, H, Dv], [B, H, c, K]."""
        (weights, before, after), usable = self.weights(self.query[:, :, start:end], start)
        if self.flow.state.tally is not None:
            self.flow.state.tally.add_bridge(self.layer, before, after, usable)
        batch, heads, chunk, seen = weights.shape
        groups = self.key.shape[1]
        spread = weights.to(self.value.dtype).reshape(batch, groups, heads // groups * chunk, seen)
        output = torch.matmul(spread, self.value[:, :, :seen]).view(batch, heads, chunk, -1).transpose(1, 2)
        return output.contiguous(), self._whole(weights) if self.wants_weights else None

    def weights(
        self, query: torch.Tensor, start: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """The weights of some queries, over the keys up to the last that any of them sees, at least.

        Args:
            query: [B, H, c, D], the queries from `start` on.
            start: The first of them.

        Returns:
            The result of `bridged_weights`, and a bool [B, H or 1, c]: where both groups have visible keys and the
            head has a floor.
        """
        end = start + query.shape[2]
        queries, keys, device = self.query.shape[2], self.key.shape[2], query.device
        visible, bias = visible_keys(self.flow, self.mask, start, end, queries, keys)
        seen = self.flow.found(self.mask, ("seen", keys), lambda: _seen(self.flow, self.mask, queries, keys))[end - 1]
        visible = visible[..., :seen].to(device)
        logits = self.logits(query, seen)
        position_bias = self.kwargs.get("position_bias")
        if position_bias is not None:
            logits = logits + position_bias[:, :, start:end, :seen]
        if bias is not None:
            logits = logits + bias[..., :seen].to(device)
        logits = logits.masked_fill(~visible, float("-inf"))
        same, bridge = self.flow.key_groups(self.flow.records[:, start:end].to(device), keys, visible)
        tau = self.tau if isinstance(self.tau, float) else logits.new_tensor(self.tau)[:, None]
        found = bridged_weights(
            logits,
            same,
            bridge,
            tau_max=tau,
            floor=self.flow.plan.settings.bridge_floor,
            sink_logits=self.sink_logits,
        )
        return found, same.any(-1) & bridge.any(-1) & (torch.as_tensor(tau, device=device) > 0)

    def _whole(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights over all keys, as the base returns them."""
        return torch.nn.functional.pad(weights, (0, self.key.shape[2] - weights.shape[-1])).to(self.query.dtype)

    def _chunk_length(self) -> int:
        """Queries that are worked on at a time."""
        elements = self.query.shape[0] * self.query.shape[1] * self.key.shape[2]  # of one query
        most = max(1, _CHUNK_ELEMENTS // elements)
        if self.query.device.type != "cpu":
            return most
        return min(most, max(_SHORTEST_CHUNK, _CACHED_ELEMENTS // elements))


def _seen_and_added(mask: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys a mask shows, and what it adds to their logits."""
    if mask.dtype == torch.bool:
        return mask, torch.zeros((), dtype=dtype, device=mask.device)
    return mask > torch.finfo(mask.dtype).min / 2, mask.to(dtype)


def _bias(mask: torch.Tensor, dtype: torch.dtype, hidden: float | None = None) -> torch.Tensor:
    """A mask as something to add; hidden keys get a value far below any logit, which is finite if not given."""
    seen, added = _seen_and_added(mask, dtype)
    return torch.where(seen, added, torch.finfo(dtype).min / 2 if hidden is None else hidden)


def _temperature(
    flow: FlowPass, query: torch.Tensor, keys: int, mask: Any, gamma: "float | tuple[float, ...]"
) -> torch.Tensor:
    """The factor max(1, ln n / ln n0) ** gamma, [B, H or 1, q, 1] (docs/method.md, "Length temperature")."""
    base = flow.plan.settings.length_temperature_base
    assert base is not None
    queries = query.shape[2]
    number = flow.found(mask, ("number", keys), lambda: _visible_numbers(flow, mask, queries, keys)).to(query.device)
    ratio = number.clamp(min=1).double().log() / math.log(base)
    power = torch.tensor(gamma, dtype=torch.float64, device=query.device).reshape(1, -1, 1, 1)
    return (ratio.clamp(min=1.0)[:, None, :, None] ** power).to(query.dtype)


# Masks come as None (plain causal attention: no padding, no window that cuts), bool [B, 1, q, K] (sdpa), float
# [B, 1, q, K] (eager), or a BlockMask (flex).


def visible_keys(
    flow: FlowPass | None, mask: Any, start: int, end: int, queries: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Reads from a mask which keys some queries see.

    Args:
        flow: The pass; may be None where there is a mask.
        mask: The mask that the base implementation was given.
        start: The first query asked for.
        end: The one after the last.
        queries: Number of queries of the pass.
        keys: Number of keys of the layer.

    Returns:
        visible, bool broadcastable to [B, 1, c, K]; and an additive bias on the logits, or None.
    """
    if isinstance(mask, torch.Tensor):
        rows = mask[:, :, start:end, :keys]
        if mask.dtype == torch.bool:
            return rows, None
        visible = rows > torch.finfo(mask.dtype).min / 2
        return visible, torch.where(visible, rows, 0.0)
    if mask is None:
        assert flow is not None
        device = flow.records.device
        query_slots = torch.arange(start, end, device=device) + (flow.total - queries)
        key_slots = torch.arange(keys, device=device) + flow.offset(keys)
        return (key_slots <= query_slots[:, None])[None, None], None
    return _dense_block_mask(mask, start, end, keys), None


def _visible_to(flow: FlowPass, mask: Any, queries: int, keys: int) -> Callable[[int, int], torch.Tensor] | None:
    """Which keys queries [start, end) see, as a function of both; None where a query sees every slot before it."""
    if mask is None and flow.host is not None:
        return None
    return lambda start, end: visible_keys(flow, mask, start, end, queries, keys)[0]


def _dense_block_mask(mask: Any, start: int, end: int, keys: int) -> torch.Tensor:
    """Rows of a flex BlockMask, written out."""
    from torch.nn.attention.flex_attention import create_mask

    def shifted(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return mask.mask_mod(batch, head, query + start, key)

    return create_mask(shifted, mask.shape[0], 1, end - start, keys, device=mask.kv_num_blocks.device.type)


def _by_chunks(flow: FlowPass, mask: Any, queries: int, keys: int, read: Callable[[torch.Tensor], Any]) -> list[Any]:
    """Results of `read` on the visible keys of all queries, a chunk of them at a time."""
    chunk = max(1, _CHUNK_ELEMENTS // max(1, keys * flow.records.shape[0]))
    return [
        read(visible_keys(flow, mask, start, min(start + chunk, queries), queries, keys)[0])
        for start in range(0, queries, chunk)
    ]


def _visible_numbers(flow: FlowPass, mask: Any, queries: int, keys: int) -> torch.Tensor:
    """How many keys each query sees, long [B, q] (or [1, q] if the same in all rows)."""
    return torch.cat(_by_chunks(flow, mask, queries, keys, lambda visible: visible[:, 0].sum(-1)), 1)


def _seen(flow: FlowPass, mask: Any, queries: int, keys: int) -> list[int]:
    """How many keys, from the first on, hold all that the queries up to each one see.

    It spares a CPU the keys after the queries; other devices, which would have to be asked, take all keys.
    """
    device = mask.device if isinstance(mask, torch.Tensor) else flow.records.device
    if not isinstance(flow.total, int) or device.type != "cpu" or queries == 1:
        return [keys] * queries
    if mask is None:
        before = flow.total - queries - int(flow.offset(keys))
        return [min(before + place + 1, keys) for place in range(queries)]

    def last(visible: torch.Tensor) -> torch.Tensor:
        slots = torch.arange(1, visible.shape[-1] + 1, device=visible.device)
        return (visible.flatten(0, 1).any(0) * slots).amax(-1)

    if visible_keys(flow, mask, 0, 1, queries, keys)[0].shape[-1] != keys:  # broadcast over the keys
        return [keys] * queries
    return torch.cat(_by_chunks(flow, mask, queries, keys, last)).cummax(0).values.clamp(min=1).tolist()
