"""Attention whose backward pass yields the saliency |A * dL/dA|, a chunk of queries at a time.

The forward pass keeps only its output. The backward pass computes the weights of a chunk again, takes the saliency and
makes the gradients of query, key and value from the same tiles. No [H, q, K] tensor exists in either direction. On a
CPU a tile holds the query heads of one key-value head, so that it stays in the caches.

Shapes: B batch, H query heads, Hkv key-value heads, G = H / Hkv, h the heads of a tile, q queries, c a chunk, K keys,
k those of a tile, D and Dv widths of keys and values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_stepflow.runtime.attention import AttentionCall, BridgedCall, Output, visible_keys
from hf_stepflow.runtime.errors import StepFlowUnsupportedError

from .capture import RowMask

# Elements of a tile's logits where no chunk size is given: on a CPU as many as the caches hold, on other devices as
# many as keep them busy. Chunks of fewer queries make slow matrix products.
_TILE_ELEMENTS = {"cpu": 1 << 19, "other": 1 << 26}
_SHORTEST_CHUNK = 64

# Called for each tile with its first query, its first key, its query heads, and its saliency by head, [B, h, c, k].
Collector = Callable[[int, int, slice, torch.Tensor], None]


def chunk_length(batch: int, heads: int, keys: int, device: torch.device) -> int:
    """Chooses the queries of a chunk; `heads` are those of a tile."""
    elements = _TILE_ELEMENTS["cpu" if device.type == "cpu" else "other"]
    return min(keys, max(_SHORTEST_CHUNK, elements // (batch * heads * keys)))


def tile_heads(heads: int, key_value_heads: int, device: torch.device, bridged: bool) -> int:
    """The number of query heads of a tile."""
    return heads if bridged or device.type != "cpu" else heads // key_value_heads


def salient_attention(call: AttentionCall, chunk_size: int, collect: Collector | None) -> Output:
    """Computes attention whose backward pass collects the saliency of each weight.

    Args:
        call: The call of attention.
        chunk_size: Queries that are worked on at a time.
        collect: Takes the saliency |A * dL/dA|; None where it is not wanted.

    Returns:
        The output [B, q, H, Dv], and None for the weights.

    Raises:
        StepFlowUnsupportedError: If some keys are not tokens of this pass.
    """
    query, key, value = call.query, call.key, call.value
    if key.shape[2] != query.shape[2]:
        raise StepFlowUnsupportedError(
            f"attention got {key.shape[2]} keys for {query.shape[2]} tokens, but Step-Saliency needs whole traces",
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
    """Moves what a mask adds into the bias: a family that makes masks from hidden states has gradients there."""
    visible = call.mask.detach() > torch.finfo(call.mask.dtype).min / 2
    bias = torch.where(visible, call.mask, 0.0)
    other = call.kwargs.get("position_bias")
    return replace(call, mask=visible, kwargs=call.kwargs | {"position_bias": bias if other is None else bias + other})


class _SalientAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        *tensors, tiles = inputs
        ctx.save_for_backward(*tensors)
        # The graph holds the tensors itself, and frees them as it is walked.
        nothing = torch.empty(0)
        ctx.tiles = tiles.with_tensors(nothing, nothing, nothing, None)
        with _no_autocast(tensors[0]):
            return tiles.with_tensors(*tensors).forward()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        with _no_autocast(grads[0]):
            return *ctx.tiles.with_tensors(*ctx.saved_tensors).backward(grads[0]), None


def _no_autocast(tensor: torch.Tensor) -> Any:
    """Keeps the dtypes that are chosen here."""
    return torch.autocast(tensor.device.type, enabled=False)


@dataclass(frozen=True)
class _Tiles:
    """The tiles of one call.

    Attributes:
        call: The call.
        chunk_size: Queries of a tile.
        collect: Takes the saliency, if it is wanted.
        starts_graph: Whether nothing below needs a gradient (the first layer of interest), so that only the saliency
            is computed.
    """

    call: AttentionCall
    chunk_size: int
    collect: Collector | None
    starts_graph: bool

    def with_tensors(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position_bias: torch.Tensor | None
    ) -> "_Tiles":
        kwargs = self.call.kwargs | {"position_bias": position_bias}
        return replace(self, call=replace(self.call, query=query, key=key, value=value, kwargs=kwargs))

    def chunks(self) -> "Iterator[tuple[slice, _HeadGroup, _PlainChunk | _BridgedChunk]]":
        """Yields the queries, the heads and the weights of each tile.

        The last queries come first: they need the most memory, which is then there for all.
        """
        call = self.call
        heads, key_heads, queries = call.query.shape[1], call.key.shape[1], call.query.shape[2]
        shared = heads // key_heads
        size = tile_heads(heads, key_heads, call.query.device, isinstance(call, BridgedCall)) // shared
        groups = [_HeadGroup.of(call, slice(start, start + size), shared) for start in range(0, key_heads, size)]
        for start in reversed(range(0, queries, self.chunk_size)):
            rows = slice(start, min(start + self.chunk_size, queries))
            if isinstance(call, BridgedCall):
                yield rows, groups[0], _BridgedChunk(call, rows)
                continue
            seen = _Seen.of(call, rows)
            for group in groups:
                yield rows, group, _PlainChunk(group, rows, seen.narrowed(group.heads))

    def forward(self) -> torch.Tensor:
        """Computes the output [B, q, H, Dv]."""
        call = self.call
        if _is_fused(call):
            groups = call.query.shape[1] != call.key.shape[1]
            output = torch.nn.functional.scaled_dot_product_attention(
                call.query, call.key, call.value, is_causal=True, scale=call.scaling, enable_gqa=groups
            )
            return output.transpose(1, 2).contiguous()
        batch, heads, queries, _ = call.query.shape
        output = call.value.new_empty(batch, queries, heads, call.value.shape[-1])
        for rows, group, chunk in self.chunks():
            values = group.call.value[:, :, chunk.keys].flatten(0, 1)
            packed = _pack(chunk.weights.to(values.dtype), group.width)
            mixed = torch.bmm(packed, values).view(batch, -1, rows.stop - rows.start, values.shape[-1])
            output[:, rows, group.heads] = mixed.transpose(1, 2)
        return output

    def backward(self, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Computes the gradients of query, key, value and position bias from that of the output, [B, q, H, Dv]."""
        call = self.call
        batch, heads, _, _ = call.query.shape
        work = torch.promote_types(call.query.dtype, torch.float32)
        grad_query = torch.zeros_like(call.query)
        # Transposed, [B, Hkv, D, K]: products that add to them then read tiles row by row.
        grad_key, grad_value = (one.new_zeros(one.mT.shape, dtype=work) for one in (call.key, call.value))
        # Some families make the bias from hidden states. It is [H, q, K] in itself.
        bias = call.kwargs["position_bias"]
        grad_bias = None if bias is None else call.query.new_zeros(batch, heads, *bias.shape[2:])
        for rows, group, chunk in self.chunks():
            keys, own = chunk.keys, group.key_heads
            upstream = _pack(grad[:, rows, group.heads].transpose(1, 2).to(work), group.width)
            grad_weights = torch.bmm(upstream, group.value[:, keys].mT).view(chunk.weights.shape)
            # In place, here and below: fresh memory costs a CPU more than arithmetic does.
            saliency: torch.Tensor | None
            if self.starts_graph:
                saliency = grad_weights.mul_(chunk.weights).abs_()
            else:
                weights = _pack(chunk.weights, group.width)
                _view(grad_value[:, own, :, keys]).baddbmm_(upstream.mT, weights)
                add_to = _view(grad_key[:, own, :, keys])
                of_queries, of_bias, saliency = chunk.pull_back(grad_weights, add_to, self.collect is not None)
                grad_query[:, group.heads, rows] = of_queries
                if grad_bias is not None and of_bias is not None:
                    grad_bias[:, group.heads, rows, keys] = of_bias.to(grad_bias.dtype)
            if self.collect is not None and saliency is not None:
                self.collect(rows.start, keys.start, group.heads, saliency)
        if self.starts_graph:
            return None, None, None, None
        if grad_bias is not None:
            grad_bias = grad_bias.sum_to_size(bias.shape).to(bias.dtype)
        return grad_query, grad_key.mT.to(call.key.dtype), grad_value.mT.to(call.value.dtype), grad_bias


@dataclass(frozen=True)
class _HeadGroup:
    """Some key-value heads and the query heads that share them.

    Attributes:
        call: The call with these heads alone.
        key_heads: The key-value heads.
        heads: The query heads.
        key: [B * Hkv, K, D], scaled, at least float32.
        value: [B * Hkv, K, Dv], at least float32.
    """

    call: AttentionCall
    key_heads: slice
    heads: slice
    key: torch.Tensor
    value: torch.Tensor

    @property
    def width(self) -> int:
        """The number of key-value heads."""
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
    """Some heads of [B, H, ...], or the whole of [B, 1, ...], which all heads share."""
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
    """[B, H, c, n] as [B * Hkv, G * c, n]: query heads that share keys lie together."""
    batch, heads, chunk, width = tensor.shape
    return tensor.reshape(batch * groups, heads // groups * chunk, width)


def _view(tensor: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, D, k] as [B * Hkv, D, k], the same memory."""
    return tensor.view(-1, *tensor.shape[2:])


# The gradients of a chunk's queries [B, H, c, D] and of its bias [B, H, c, k], and its saliency [B, H, c, k]; None
# where there is no bias, or no saliency is wanted.
_Pulled = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class _Seen:
    """The keys that a chunk of queries sees.

    Attributes:
        keys: The range that holds all of them.
        hidden_from: The place in this range from which on `hidden` applies; all keys before it are seen.
        hidden: Which of the keys from there on are not seen, bool [c, k] or [B, 1 or H, c, k].
        bias: The bias on the logits, [B, 1 or H, c, k], or None.
    """

    keys: slice
    hidden_from: int
    hidden: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, call: AttentionCall, rows: slice) -> "_Seen":
        """Reads the keys of some queries from the mask."""
        start, end, queries, keys = rows.start, rows.stop, call.query.shape[2], call.key.shape[2]
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
    """The weights [B, H, c, k] of some queries over the keys that any of them sees."""

    def __init__(self, group: _HeadGroup, rows: slice, seen: _Seen):
        call = group.call
        self.group = group
        self.keys = seen.keys
        batch, heads, _, _ = call.query.shape
        work = group.key.dtype
        self.query = _pack(call.query[:, :, rows].to(work), group.width)
        self.key = group.key[:, self.keys]
        logits = torch.bmm(self.query, self.key.mT).view(batch, heads, rows.stop - rows.start, -1)
        self.cap_slope = None
        if call.softcap is not None:
            squashed = logits.div_(call.softcap).tanh_()
            self.cap_slope = 1 - squashed**2
            logits = squashed * call.softcap
        if seen.bias is not None:
            logits += seen.bias
        position_bias = call.kwargs["position_bias"]
        if position_bias is not None:
            logits += position_bias[:, :, rows, self.keys]
        # A finite stand-in for -inf: a query that sees no key gets weights that nobody uses, instead of NaN.
        logits[..., seen.hidden_from :].masked_fill_(seen.hidden, torch.finfo(work).min / 2)
        self.weights = torch.softmax(logits, -1)
        if call.sink_logits is not None:
            log_total = logits.logsumexp(-1, keepdim=True)
            self.weights *= torch.sigmoid(log_total - call.sink_logits.to(work)[:, None, None])

    def pull_back(self, grad_weights: torch.Tensor, grad_key: torch.Tensor, wants_saliency: bool) -> _Pulled:
        """Goes from the gradient of the weights, [B, H, c, k] (overwritten), to the queries; adds to `grad_key`."""
        product = grad_weights.mul_(self.weights)
        saliency = product.abs() if wants_saliency else None
        grad_logits = product.addcmul_(self.weights, product.sum(-1, keepdim=True), value=-1)
        capped = grad_logits if self.cap_slope is None else grad_logits * self.cap_slope
        packed = _pack(capped, self.group.width)
        of_query = torch.bmm(packed, self.key).view(*grad_logits.shape[:3], -1)
        grad_key.baddbmm_(self.query.mT, packed, alpha=self.group.call.scaling)
        return of_query, grad_logits, saliency


class _BridgedChunk:
    """The same in a layer with the bridge, whose shifts depend on queries and keys too."""

    def __init__(self, call: BridgedCall, rows: slice):
        bias = call.kwargs["position_bias"]
        with torch.enable_grad():
            self.query, self.key = (one.detach().requires_grad_() for one in (call.query[:, :, rows], call.key))
            self.bias = None if bias is None else bias.detach().requires_grad_()
            kwargs = call.kwargs | {"position_bias": self.bias}
            (self.traced, _, _), _ = replace(call, key=self.key, kwargs=kwargs).weights(self.query, rows.start)
        self.rows = rows
        self.weights = self.traced.detach()
        self.keys = slice(0, self.weights.shape[-1])

    def pull_back(self, grad_weights: torch.Tensor, grad_key: torch.Tensor, wants_saliency: bool) -> _Pulled:
        inputs = (self.query, self.key) + (() if self.bias is None else (self.bias,))
        of_query, of_key, *of_bias = torch.autograd.grad(self.traced, inputs, grad_weights)
        grad_key += of_key[:, :, self.keys].mT.flatten(0, 1)
        saliency = grad_weights.mul_(self.weights).abs_() if wants_saliency else None
        return of_query, of_bias[0][:, :, self.rows, self.keys] if of_bias else None, saliency
