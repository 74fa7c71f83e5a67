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

from .bridge import DecodeGroups, bridge_floors, bridged_decode, bridged_weights
from .errors import StepFlowUnsupportedError
from .forward import FlowPass
from .momentum import inject
from .step_detector import Field

# Logits of a chunk of queries, in elements: what bounds the memory of a prefill or a teacher-forced pass. On a CPU
# less is faster, as long as it stays in the caches and there are queries enough for a product of matrices.
_CHUNK_ELEMENTS = 1 << 24
_CACHED_ELEMENTS = 1 << 19
_SHORTEST_CHUNK = 32

Output = tuple[torch.Tensor, torch.Tensor | None]


@dataclass
class AttentionLink:
    """Connects an attention module of an attached model to StepFlow.

    Attributes:
        layer: Index of the layer.
        current: Returns the pass of this thread, for families that do not hand it down as an argument; raises where
            StepFlow is on and no pass runs.
    """

    layer: int
    current: Callable[[], FlowPass | None]


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
        link: AttentionLink | None = getattr(module, "stepflow_link", None)
        if link is None:
            return base(module, query, key, value, attention_mask, **kwargs)
        flow = link.current() if handed_down is None else handed_down
        if not flow:
            if attend is None:
                return base(module, query, key, value, attention_mask, **kwargs)
            return attend(module, AttentionCall(link.layer, query, key, value, attention_mask, kwargs, base_name))
        if not torch.compiler.is_compiling():
            flow.reached[link.layer] = handed_down is not None
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
            if query.shape[2] > 1:  # the base's kernel for all queries, and the bridge for those that it applies to
                output, weights = bridged.rewrite(*base(module, query, key, value, attention_mask, **kwargs))
            elif bridged.differs_by_head:
                output, weights = bridged.rows(0, 1)
            else:
                output, weights = bridged.decode()
        if link.layer in flow.plan.inject and flow.has_trigger:
            visible = _visible_to(flow, attention_mask, query.shape[2], key.shape[2])
            output = inject(flow, link.layer, output, value, visible)
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

    def decode(self) -> Output:
        """Attention of one query a row; all rows are computed here, bridged or not."""
        batch, heads = self.query.shape[:2]
        total = self.flow.total
        self.flow.offset(self.key.shape[2])  # raises where keys are no tokens
        keys = min(self.key.shape[2], total) if isinstance(total, int) else self.key.shape[2]
        logits = self.logits(self.query, keys)[:, :, 0]
        dtype, device = logits.dtype, logits.device
        groups = self.flow.found(self.mask, ("groups", keys, dtype, device), lambda: self._groups(keys, dtype))
        key = ("floors", keys, dtype, device, self.tau)
        floors = self.flow.found(self.mask, key, lambda: self._floors(groups, dtype))
        weights, before, after, whole = bridged_decode(
            logits, groups, floors=floors, floor=self.flow.plan.settings.bridge_floor, sink_logits=self.sink_logits
        )
        if self.flow.state.tally is not None:
            if isinstance(total, int):
                self.flow.state.tally.note_bridge(self.layer, before, after, whole, floors)
            else:
                before, after = ((mass / whole)[..., None] for mass in (before, after))
                self.flow.state.tally.add_bridge(self.layer, before, after, floors[..., None])
        shape = (batch, self.key.shape[1], heads // self.key.shape[1], keys)
        output = torch.matmul(weights.to(self.value.dtype).view(shape), self.value[:, :, :keys])
        output = output.view(batch, 1, heads, -1)
        return output, self._whole(weights.view(batch, heads, 1, keys)) if self.wants_weights else None

    def _groups(self, keys: int, dtype: torch.dtype) -> DecodeGroups:
        device = self.query.device
        visible, bias = None, None
        if self.mask is not None or not isinstance(self.flow.total, int):
            visible, added = visible_keys(self.flow, self.mask, 0, 1, 1, keys)
            visible = visible.to(device)
            added = torch.zeros((), dtype=dtype, device=device) if added is None else added.to(device, dtype)
            bias = torch.where(visible, added, torch.finfo(dtype).min / 2)[:, 0, 0]
        same, bridge = self.flow.key_groups(self.flow.records.to(device), keys, visible)
        return DecodeGroups.of(same[:, 0, 0], bridge[:, 0, 0], bias, dtype)

    def _floors(self, groups: DecodeGroups, dtype: torch.dtype) -> torch.Tensor:
        cap = torch.tensor(self.tau, dtype=dtype, device=self.query.device)
        return bridge_floors(groups.n_same, groups.n_bridge, cap, dtype)

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

    @property
    def differs_by_head(self) -> bool:
        """Whether heads differ in what they see or add, which `decode` does not provide for."""
        mask_heads = self.mask.shape[1] if isinstance(self.mask, torch.Tensor) else 1
        return mask_heads > 1 or self.kwargs.get("position_bias") is not None

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
