"""Attention that gives its saliency while gradients pass through it, a chunk of queries at a time.

Forward, nothing but the output is kept; backward, the weights of a chunk are computed anew, the saliency |A * dL/dA|
is taken and the gradients of query, key and value are made from the same tiles. No [H, q, K] tensor exists in either
direction. On a CPU a tile holds the query heads of one key-value head, so that it stays in the caches. Shapes: B
batch, H query heads, Hkv key-value heads, G = H / Hkv, h the heads of a tile, q queries, c a chunk, K keys, k those of
a tile, D and Dv widths of keys and values.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_stepflow.runtime.attention import AttentionCall, BridgedCall, Output, visible_keys
from hf_stepflow.runtime.errors import StepFlowUnsupportedError

from .capture import RowMask

# Elements of the logits of a tile where nobody said how many queries it holds: on a CPU what its caches hold, on
# other devices what keeps them busy. Chunks of fewer queries make poor products of matrices.
_TILE_ELEMENTS = {"cpu": 1 << 19, "other": 1 << 26}
_SHORTEST_CHUNK = 64

# Called for each tile with its first query, its first key, its query heads, and its saliency by head, [B, h, c, k].
Collector = Callable[[int, int, slice, torch.Tensor], None]


def chunk_length(batch: int, heads: int, keys: int, device: torch.device) -> int:
    """Queries of a chunk, where nobody said how many; `heads` are those of a tile."""
    elements = _TILE_ELEMENTS["cpu" if device.type == "cpu" else "other"]
    return min(keys, max(_SHORTEST_CHUNK, elements // (batch * heads * keys)))


def tile_heads(heads: int, key_value_heads: int, device: torch.device, bridged: bool) -> int:
    """Query heads of a tile."""
    return heads if bridged or device.type != "cpu" else heads // key_value_heads


def salient_attention(call: AttentionCall, chunk_size: int, collect: Collector | None) -> Output:
    """Attention whose backward pass collects the saliency of each of its weights.

    Args:
        call: the call.
        chunk_size: queries that are worked on at a time.
        collect: takes the saliency |A * dL/dA|; None where it is not wanted.

    Returns:
        The output [B, q, H, Dv], and None for the weights.

    Raises:
        StepFlowUnsupportedError: there are keys that are no tokens of this pass.
    """
    query, key, value = call.query, call.key, call.value
    if key.shape[2] != query.shape[2]:
        raise StepFlowUnsupportedError(
            f"attention got {key.shape[2]} keys for {query.shape[2]} tokens, and Step-Saliency needs whole traces",
            hint="take learned prefixes off the model, and call it without a cache",
        )
    if isinstance(call.mask, torch.Tensor) and call.mask.requires_grad:
        call = _with_bias_for_mask(call)
    tensors = (query, key, value, call.kwargs.get("position_bias"))
    starts = collect is not None and torch.is_grad_enabled()
    starts = starts and not any(one is not None and one.requires_grad for one in tensors)
    if starts:
        tensors = (query.detach().requires_grad_(), *tensors[1:])
    return _SalientAttention.apply(*tensors, _Tiles(call, chunk_size, collect, starts)), None


def _with_bias_for_mask(call: AttentionCall) -> AttentionCall:
    """The same call with what its mask adds as a bias: a family that makes masks from hidden states learns by them."""
    visible = call.mask.detach() > torch.finfo(call.mask.dtype).min / 2
    bias = torch.where(visible, call.mask, 0.0)
    other = call.kwargs.get("position_bias")
    return replace(call, mask=visible, kwargs=call.kwargs | {"position_bias": bias if other is None else bias + other})


class _SalientAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        *tensors, tiles = inputs
        with _as_given(tensors[0]):
            return _SalientAttention._forward(ctx, tensors, tiles)

    @staticmethod
    def _forward(ctx: Any, tensors: list[Any], tiles: "_Tiles") -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        # The graph holds the tensors itself, and frees them as it is walked.
        nothing = torch.empty(0)
        ctx.tiles = tiles.with_tensors(nothing, nothing, nothing, None)
        return tiles.with_tensors(*tensors).forward()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        with _as_given(grads[0]):
            return *ctx.tiles.with_tensors(*ctx.saved_tensors).backward(grads[0]), None


def _as_given(tensor: torch.Tensor) -> Any:
    """No autocast: the dtypes here are chosen."""
    return torch.autocast(tensor.device.type, enabled=False)


@dataclass(frozen=True)
class _Tiles:
    """The tiles of one call.

    Attributes:
        call: the call.
        chunk: queries of a tile.
        collect: takes the saliency, if it is wanted.
        starts_graph: whether nothing below needs a gradient (the first layer that is looked at), so that saliency is
            all there is to compute.
    """

    call: AttentionCall
    chunk: int
    collect: Collector | None
    starts_graph: bool

    def with_tensors(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position_bias: torch.Tensor | None
    ) -> "_Tiles":
        kwargs = self.call.kwargs | {"position_bias": position_bias}
        return replace(self, call=replace(self.call, query=query, key=key, value=value, kwargs=kwargs))

    def chunks(self) -> list[tuple[int, int]]:
        """Ranges of queries. The last comes first: what it needs is the most, and is then there for all."""
        queries = self.call.query.shape[2]
        return [(start, min(start + self.chunk, queries)) for start in range(0, queries, self.chunk)][::-1]

    def head_groups(self) -> list["_HeadGroup"]:
        """The heads that make a tile together."""
        call = self.call
        shared = call.query.shape[1] // call.key.shape[1]
        bridged = isinstance(call, BridgedCall)
        size = tile_heads(call.query.shape[1], call.key.shape[1], call.query.device, bridged) // shared
        return [_HeadGroup.of(call, slice(start, start + size), shared) for start in range(0, call.key.shape[1], size)]

    def forward(self) -> torch.Tensor:
        """The output [B, q, H, Dv]."""
        call = self.call
        if _is_fused(call):
            groups = call.query.shape[1] != call.key.shape[1]
            output = torch.nn.functional.scaled_dot_product_attention(
                call.query, call.key, call.value, is_causal=True, scale=call.scaling, enable_gqa=groups
            )
            return output.transpose(1, 2).contiguous()
        batch, heads, queries, _ = call.query.shape
        output = call.value.new_empty(batch, queries, heads, call.value.shape[-1])
        head_groups = self.head_groups()
        for start, end in self.chunks():
            seen = self.see(start, end)
            for group in head_groups:
                chunk = self.open(group, start, end, seen)
                values = group.call.value[:, :, chunk.keys].flatten(0, 1)
                packed = _pack(chunk.weights.to(values.dtype), group.width)
                mixed = torch.bmm(packed, values).view(batch, -1, end - start, values.shape[-1])
                output[:, start:end, group.heads] = mixed.transpose(1, 2)
        return output

    def backward(self, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key, value and position bias, from that of the output [B, q, H, Dv]."""
        call = self.call
        batch, heads, _, _ = call.query.shape
        work = torch.promote_types(call.query.dtype, torch.float32)
        grad_query = torch.zeros_like(call.query)
        # Transposed, [B, Hkv, D, K]: products that add to them then read tiles row by row.
        grad_key, grad_value = (one.new_zeros(one.mT.shape, dtype=work) for one in (call.key, call.value))
        # Some families make the bias from hidden states. It is [H, q, K] in itself.
        bias = call.kwargs["position_bias"]
        grad_bias = None if bias is None else call.query.new_zeros(batch, heads, *bias.shape[2:])
        wants_saliency = self.collect is not None
        head_groups = self.head_groups()
        for start, end in self.chunks():
            seen = self.see(start, end)
            for group in head_groups:
                chunk = self.open(group, start, end, seen)
                keys, own = chunk.keys, group.key_heads
                upstream = _pack(grad[:, start:end, group.heads].transpose(1, 2).to(work), group.width)
                grad_weights = torch.bmm(upstream, group.value[:, keys].mT).view(chunk.weights.shape)
                # In place, here and below: fresh memory costs a CPU more than arithmetic does.
                saliency: torch.Tensor | None
                if self.starts_graph:
                    saliency = grad_weights.mul_(chunk.weights).abs_()
                else:
                    weights = _pack(chunk.weights, group.width)
                    _view(grad_value[:, own, :, keys]).baddbmm_(upstream.mT, weights)
                    add_to = _view(grad_key[:, own, :, keys])
                    of_queries, of_bias, saliency = chunk.pull_back(grad_weights, add_to, wants_saliency)
                    grad_query[:, group.heads, start:end] = of_queries
                    if grad_bias is not None and of_bias is not None:
                        grad_bias[:, group.heads, start:end, keys] = of_bias.to(grad_bias.dtype)
                if self.collect is not None and saliency is not None:
                    self.collect(start, keys.start, group.heads, saliency)
        if self.starts_graph:
            return None, None, None, None
        if grad_bias is not None:
            grad_bias = grad_bias.sum_to_size(bias.shape).to(bias.dtype)
        return grad_query, grad_key.mT.to(call.key.dtype), grad_value.mT.to(call.value.dtype), grad_bias

    def see(self, start: int, end: int) -> "_Seen | None":
        """What queries [start, end) see; None where the bridge finds it out itself."""
        return None if isinstance(self.call, BridgedCall) else _Seen.of(self.call, start, end)

    def open(self, group: "_HeadGroup", start: int, end: int, seen: "_Seen | None") -> "_PlainChunk | _BridgedChunk":
        """The weights of queries [start, end) in some heads."""
        if seen is None:
            assert isinstance(group.call, BridgedCall)
            return _BridgedChunk(group.call, start, end)
        return _PlainChunk(group, start, end, seen.narrowed(group.heads))


@dataclass(frozen=True)
class _HeadGroup:
    """Some key-value heads and the query heads that share them.

    Attributes:
        call: the call with these heads alone.
        key_heads: the key-value heads.
        heads: the query heads.
        key: [B * Hkv, K, D], scaled, float32 at least.
        value: [B * Hkv, K, Dv], float32 at least.
    """

    call: AttentionCall
    key_heads: slice
    heads: slice
    key: torch.Tensor
    value: torch.Tensor

    @property
    def width(self) -> int:
        """Number of its key-value heads."""
        return self.call.key.shape[1]

    @classmethod
    def of(cls, call: AttentionCall, key_heads: slice, shared: int) -> "_HeadGroup":
        heads = slice(key_heads.start * shared, key_heads.stop * shared)
        if heads != slice(0, call.query.shape[1]):
            kwargs = call.kwargs | {"position_bias": _narrowed(call.kwargs["position_bias"], heads)}
            if call.sink_logits is not None:
                kwargs["s_aux"] = call.sink_logits[heads]
            query, key, value = call.query[:, heads], call.key[:, key_heads], call.value[:, key_heads]
            call = replace(call, query=query, key=key, value=value, kwargs=kwargs)
        work = torch.promote_types(call.query.dtype, torch.float32)
        scaled = call.key.to(work) * call.scaling
        return cls(call, key_heads, heads, scaled.flatten(0, 1), call.value.to(work).flatten(0, 1))


def _narrowed(tensor: torch.Tensor | None, heads: slice) -> torch.Tensor | None:
    """Some heads of something [B, H, ...], or of what is the same for all, [B, 1, ...]."""
    return tensor if tensor is None or tensor.shape[1] == 1 else tensor[:, heads]


def _is_fused(call: AttentionCall) -> bool:
    """Whether PyTorch has a kernel for this call that holds no [H, q, K] tensor."""
    query, key, value = call.query, call.key, call.value
    is_plain = call.base_name == "sdpa" and call.mask is None and call.kwargs["position_bias"] is None
    is_alike = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    if not is_plain or not is_alike or isinstance(call, BridgedCall):
        return False
    if query.device.type == "cuda":
        shared = query.shape[1] != key.shape[1]
        return torch.backends.cuda.can_use_flash_attention(
            torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, shared)
        )
    return query.device.type == "cpu"


def _pack(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, H, c, n] as [B * Hkv, G * c, n]: query heads beside those that share their keys."""
    batch, heads, chunk, width = tensor.shape
    return tensor.reshape(batch * groups, heads // groups * chunk, width)


def _view(tensor: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, D, k] as [B * Hkv, D, k], the same memory."""
    return tensor.view(-1, *tensor.shape[2:])


# Gradients of a chunk's queries [B, H, c, D] and of its bias [B, H, c, k] if there is one, and its saliency
# [B, H, c, k] if it is wanted.
_Pulled = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class _Seen:
    """What some queries see.

    Attributes:
        keys: the keys that any of them sees.
        hidden_from: the place among these keys from which on `hidden` tells.
        hidden: bool [c, k] or [B, 1 or H, c, k], which of the keys from there on are not seen.
        bias: on the logits, [B, 1 or H, c, k], or None.
    """

    keys: slice
    hidden_from: int
    hidden: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, call: AttentionCall, start: int, end: int) -> "_Seen":
        """What queries [start, end) see."""
        queries, keys = call.query.shape[2], call.key.shape[2]
        if call.mask is None:
            hidden = torch.ones(end - start, end - start, dtype=torch.bool, device=call.query.device).triu(1)
            return cls(slice(0, end), start, hidden, None)
        visible, bias = visible_keys(None, call.mask, start, end, queries, keys)
        own = slice(0, keys)
        if isinstance(call.mask, RowMask):
            seen = visible.flatten(0, 2).any(0).nonzero()
            own = slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 1)
        return cls(own, 0, ~visible[..., own], None if bias is None else bias[..., own])

    def narrowed(self, heads: slice) -> "_Seen":
        """The same for some of the heads."""
        if self.hidden.ndim == 2 and self.bias is None:
            return self
        hidden = self.hidden if self.hidden.ndim == 2 else _narrowed(self.hidden, heads)
        assert hidden is not None
        return replace(self, hidden=hidden, bias=_narrowed(self.bias, heads))


class _PlainChunk:
    """Weights [B, H, c, k] of queries [start, end) over the keys that any of them sees."""

    def __init__(self, group: _HeadGroup, start: int, end: int, seen: _Seen):
        call = group.call
        self.group = group
        self.keys = seen.keys
        batch, heads, _, _ = call.query.shape
        work = group.key.dtype
        self.query = _pack(call.query[:, :, start:end].to(work), group.width)
        self.key = group.key[:, self.keys]
        logits = torch.bmm(self.query, self.key.mT).view(batch, heads, end - start, -1)
        self.cap_slope = None
        if call.softcap is not None:
            squashed = logits.div_(call.softcap).tanh_()
            self.cap_slope = 1 - squashed**2
            logits = squashed * call.softcap
        if seen.bias is not None:
            logits += seen.bias
        position_bias = call.kwargs["position_bias"]
        if position_bias is not None:
            logits += position_bias[:, :, start:end, self.keys]
        # A finite stand-in for -inf: a query that sees no key at all gets weights that nobody uses, instead of NaN.
        logits[..., seen.hidden_from :].masked_fill_(seen.hidden, torch.finfo(work).min / 2)
        self.weights = torch.softmax(logits, -1)
        if call.sink_logits is not None:
            log_total = logits.logsumexp(-1, keepdim=True)
            self.weights *= torch.sigmoid(log_total - call.sink_logits.to(work)[:, None, None])

    def pull_back(self, grad_weights: torch.Tensor, grad_key: torch.Tensor, wants_saliency: bool) -> _Pulled:
        """What follows from the gradient of the weights, [B, H, c, k], which is used up; adds to that of the keys."""
        product = grad_weights.mul_(self.weights)
        saliency = product.abs() if wants_saliency else None
        grad_logits = product.addcmul_(self.weights, product.sum(-1, keepdim=True), value=-1)
        capped = grad_logits if self.cap_slope is None else grad_logits * self.cap_slope
        packed = _pack(capped, self.group.width)
        of_query = torch.bmm(packed, self.key).view(*grad_logits.shape[:3], -1)
        grad_key.baddbmm_(self.query.mT, packed, alpha=self.group.call.scaling)
        return of_query, grad_logits, saliency


class _BridgedChunk:
    """The same in a layer of the bridge, whose shifts depend on queries and keys too."""

    def __init__(self, call: BridgedCall, start: int, end: int):
        bias = call.kwargs["position_bias"]
        with torch.enable_grad():
            self.query, self.key = (one.detach().requires_grad_() for one in (call.query[:, :, start:end], call.key))
            self.bias = None if bias is None else bias.detach().requires_grad_()
            kwargs = call.kwargs | {"position_bias": self.bias}
            (self.traced, _, _), _ = replace(call, key=self.key, kwargs=kwargs).weights(self.query, start)
        self.rows = slice(start, end)
        self.weights = self.traced.detach()
        self.keys = slice(0, self.weights.shape[-1])

    def pull_back(self, grad_weights: torch.Tensor, grad_key: torch.Tensor, wants_saliency: bool) -> _Pulled:
        inputs = (self.query, self.key) + (() if self.bias is None else (self.bias,))
        of_query, of_key, *of_bias = torch.autograd.grad(self.traced, inputs, grad_weights)
        grad_key += of_key[:, :, self.keys].mT.flatten(0, 1)
        saliency = grad_weights.mul_(self.weights).abs_() if wants_saliency else None
        return of_query, of_bias[0][:, :, self.rows, self.keys] if of_bias else None, saliency
