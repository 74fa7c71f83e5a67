"""One call of attention as StepFlow computes it where a bridge is to be built: its logits, weights and output.

Shapes: B batch, H query heads, Hkv key-value heads, q queries, c a chunk of them, K keys, D and Dv widths of keys and
values.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .bridged_weights import Bridged, bridged_weights
from .decode_attention import decode_attention, decode_groups
from .flow_masks import visible_keys
from .flow_pass import FlowPass, key_groups
from .step_record import Field

# Logits of a chunk of queries, in elements: what bounds the memory of a prefill or a teacher-forced pass. On a CPU
# less is faster, as long as it stays in the caches and there are queries enough for a product of matrices.
_CHUNK_ELEMENTS = 1 << 24
_CACHED_ELEMENTS = 1 << 19
_SHORTEST_CHUNK = 32

Output = tuple[torch.Tensor, torch.Tensor | None]


@dataclass
class AttentionCall:
    """One call of attention as it is without StepFlow.

    Attributes:
        layer: index of the layer.
        query: [B, H, q, D].
        key: [B, Hkv, K, D].
        value: [B, Hkv, K, Dv].
        mask: as the base implementation was given it.
        kwargs: the other arguments of the base implementation.
        base_name: the base implementation.
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


@dataclass
class BridgedCall(AttentionCall):
    """One call of attention in a layer and a pass in which queries may be bridged.

    Attributes:
        flow: the pass.
        tau: the cap of the floor, or one value for each head.
    """

    flow: FlowPass
    tau: "float | tuple[float, ...]"

    def decode(self) -> Output:
        """One query per row: every row is computed here, bridged or not."""
        total = self.flow.total
        if isinstance(total, int) and self.query.device.type == "cpu" and not self.is_per_head:
            self.flow.offset(self.key.shape[2])  # raises where keys are no tokens
            keys = min(self.key.shape[2], total)
            groups = decode_groups(self.flow, self.mask, keys, self.tau, self.key)
            done = decode_attention(
                self.query,
                self.key[:, :, :keys],
                self.value[:, :, :keys],
                groups,
                is_absolute=self.flow.plan.settings.bridge_floor == "absolute",
                scaling=self.scaling,
                softcap=self.softcap,
                sink_logits=self.sink_logits,
            )
            if done is not None:
                output, weights, before, after = done
                if self.flow.state.tally is not None:
                    self.flow.state.tally.note_bridge(self.layer, before, after, groups.floor.flatten(1))
                if not self.wants_weights:
                    return output, None
                empty_slots = self.key.shape[2] - keys
                return output, torch.nn.functional.pad(weights, (0, empty_slots)).to(self.query.dtype)
        return self.rows(0, 1)

    def rewrite(self, output: torch.Tensor, weights: torch.Tensor | None) -> Output:
        """Many queries: the base's output, with the bridged queries computed anew, chunk by chunk."""
        chunk = self.chunk_length()
        first, last = self.active_span()
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

    def chunk_length(self) -> int:
        """Queries that are worked on at a time."""
        elements = self.query.shape[0] * self.query.shape[1] * self.key.shape[2]  # of one query
        most = max(1, _CHUNK_ELEMENTS // elements)
        if self.query.device.type != "cpu":
            return most
        return min(most, max(_SHORTEST_CHUNK, _CACHED_ELEMENTS // elements))

    def active_span(self) -> tuple[int, int]:
        """The queries from the first to the last that any row bridges, [first, last)."""
        queries, host = self.query.shape[2], self.flow.host
        if host is None:
            return 0, queries
        places = [place for row in host for place, record in enumerate(row) if record[Field.ACTIVE]]
        return min(places), max(places) + 1

    def rows(self, start: int, end: int) -> Output:
        """Attention of queries [start, end) with the bridge, in the general form: [B, c, H, Dv], [B, H, c, K]."""
        (weights, before, after), usable = self.weights(self.query[:, :, start:end], start)
        if self.flow.state.tally is not None:
            self.flow.state.tally.add_bridge(self.layer, before, after, usable)
        batch, heads, chunk, seen = weights.shape
        groups = self.key.shape[1]
        spread = weights.to(self.value.dtype).reshape(batch, groups, heads // groups * chunk, seen)
        output = torch.matmul(spread, self.value[:, :, :seen]).view(batch, heads, chunk, -1).transpose(1, 2)
        if not self.wants_weights:
            return output.contiguous(), None
        whole = torch.nn.functional.pad(weights.to(self.query.dtype), (0, self.key.shape[2] - seen))
        return output.contiguous(), whole

    def weights(self, query: torch.Tensor, start: int) -> tuple[Bridged, torch.Tensor]:
        """The weights of some of the queries, over the keys up to the last that any of them sees, at least.

        Args:
            query: [B, H, c, D], the queries from `start` on.
            start: the first of them.

        Returns:
            What `bridged_weights` gives, at least in float32; and bool [B, H, c]: where both groups have visible keys
            and the head has a floor.
        """
        batch, heads, chunk, _ = query.shape
        end = start + chunk
        keys, groups = self.key.shape[2], self.key.shape[1]
        visible, bias = visible_keys(self.flow, self.mask, start, end, self.query.shape[2], keys)
        seen = _seen(visible, keys) if chunk > 1 else keys
        visible = visible[..., :seen].to(query.device)
        bias = None if bias is None else bias[..., :seen].to(query.device)
        dtype = torch.promote_types(query.dtype, torch.float32)
        packed = query.reshape(batch, groups, heads // groups * chunk, -1).to(dtype)
        logits = torch.matmul(packed, self.key[:, :, :seen].to(dtype).transpose(2, 3)).view(batch, heads, chunk, seen)
        logits = logits * self.scaling
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        position_bias = self.kwargs.get("position_bias")
        if position_bias is not None:
            logits = logits + position_bias[:, :, start:end, :seen]
        if bias is not None:
            logits = logits + bias
        logits = logits.masked_fill(~visible, float("-inf"))
        records = self.flow.records[:, start:end].to(query.device)
        same, bridge = key_groups(self.flow, records, keys, visible)
        tau = self.tau_tensor()
        found = bridged_weights(logits, same, bridge, tau, self.flow.plan.settings.bridge_floor, self.sink_logits)
        return found, same.any(-1) & bridge.any(-1) & (torch.as_tensor(tau, device=query.device) > 0)

    @property
    def is_per_head(self) -> bool:
        """Whether heads differ in what they see or add, which the decode form does not provide for."""
        mask_heads = self.mask.shape[1] if isinstance(self.mask, torch.Tensor) else 1
        return mask_heads > 1 or self.kwargs.get("position_bias") is not None

    def tau_tensor(self) -> "float | torch.Tensor":
        """tau_max, or one value per head as [H, 1]."""
        if isinstance(self.tau, tuple):
            dtype = torch.promote_types(self.query.dtype, torch.float32)
            return torch.tensor(self.tau, dtype=dtype, device=self.query.device)[:, None]
        return self.tau


def _seen(visible: torch.Tensor, keys: int) -> int:
    """How many keys, from the first on, hold all that is visible; on other devices than a CPU it is not asked."""
    if visible.shape[-1] != keys or visible.device.type != "cpu" or torch.compiler.is_compiling():
        return keys
    places = visible.flatten(0, -2).any(0).nonzero()
    return int(places[-1]) + 1 if len(places) else 1
