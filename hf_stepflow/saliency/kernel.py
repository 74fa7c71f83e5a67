"""Attention whose backward pass yields the saliency |A * dL/dA|, a tile of queries and keys at a time.

Instead of the saliency it may hand out the weights A themselves, or -A * dL/dA, by which the loss would rise to first
order if a weight became zero.

The forward pass keeps its output and, where the kernel tells it, the log-sum-exp of each query's logits. The backward
pass computes the weights of a tile again, takes the saliency and makes the gradients of query, key and value from the
same tile: five products, as many as a backward pass without saliency. No [H, q, K] tensor exists in either direction.
On a CPU a tile holds the query heads of one key-value head and a range of keys, so that it stays in the caches.

Logits are in units of log 2, because PyTorch's exp2 is faster than its exp.

Shapes: B batch, H query heads, Hkv key-value heads, G = H / Hkv, h the heads of a tile, q queries, c a chunk, K keys,
k those of a tile, D and Dv widths of keys and values, N = B * Hkv of a tile.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_stepflow.runtime.attention import AttentionCall, BridgedCall, Output, visible_keys
from hf_stepflow.runtime.errors import StepFlowUnsupportedError

from .capture import KeptOutputs, RowMask

# Elements of the logits of a chunk over all keys where no chunk size is given, on devices that large tiles keep busy.
_CHUNK_ELEMENTS = 1 << 26

# On a CPU: rows of a tile, the fewest queries of a chunk, the fewest keys of a tile, its elements for each thread (so
# that it stays in the caches), and those of a chunk over all keys. Products of fewer rows or columns are slow.
_TILE_ROWS, _SHORTEST_CHUNK, _FEWEST_KEYS, _TILE_ELEMENTS, _ROW_ELEMENTS = 256, 64, 256, 1 << 18, 1 << 19

# The logits' unit: exp(x) = exp2(x * _UNIT).
_UNIT = math.log2(math.e)

# Called for each tile with its first query, its first key, its query heads, and its saliency by head, [B, h, c, k],
# which the next tile overwrites. Tiles come from the last query to the first, then from the last key to the first,
# then by head.
Collector = Callable[[int, int, slice, torch.Tensor], None]


def chunk_length(batch: int, heads: int, keys: int, device: torch.device) -> int:
    """Chooses the queries of a chunk; `heads` are those of a tile."""
    if device.type == "cpu":
        return min(keys, max(_SHORTEST_CHUNK, _TILE_ROWS // (batch * heads)))
    return min(keys, max(_SHORTEST_CHUNK, _CHUNK_ELEMENTS // (batch * heads * keys)))


def tile_heads(heads: int, key_value_heads: int, device: torch.device, bridged: bool) -> int:
    """The number of query heads of a tile."""
    return heads if bridged or device.type != "cpu" else heads // key_value_heads


def salient_attention(
    call: AttentionCall,
    chunk_size: int,
    collect: Collector | None,
    kept: KeptOutputs | None = None,
    measure: str = "saliency",
) -> Output:
    """Computes attention whose backward pass collects the saliency of each weight.

    Args:
        call: The call of attention.
        chunk_size: Queries that are worked on at a time.
        collect: Takes what is measured; None where it is not wanted.
        kept: Keeps the output for when the layer is computed again; None where it is computed once.
        measure: "saliency" for |A * dL/dA|, "attention" for A, "signed" for -A * dL/dA.

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
    return _SalientAttention.apply(*tensors, _Tiles(call, chunk_size, collect, starts, measure), kept), None


def _with_bias_for_mask(call: AttentionCall) -> AttentionCall:
    """Moves what a mask adds into the bias: a family that makes masks from hidden states has gradients there."""
    visible = call.mask.detach() > torch.finfo(call.mask.dtype).min / 2
    bias = torch.where(visible, call.mask, 0.0)
    other = call.kwargs.get("position_bias")
    return replace(call, mask=visible, kwargs=call.kwargs | {"position_bias": bias if other is None else bias + other})


class _SalientAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        *tensors, tiles, kept = inputs
        # The graph holds the tensors itself, and frees them as it is walked.
        nothing = torch.empty(0)
        ctx.tiles = tiles.with_tensors(nothing, nothing, nothing, None)
        with _no_autocast(tensors[0]):
            compute = tiles.with_tensors(*tensors).forward
            output, log_total = compute() if kept is None else kept.once(compute)
        ctx.save_for_backward(*tensors, output, log_total)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        *tensors, output, log_total = ctx.saved_tensors
        with _no_autocast(grads[0]):
            return *ctx.tiles.with_tensors(*tensors).backward(grads[0], output, log_total), None, None


def _no_autocast(tensor: torch.Tensor) -> Any:
    """Keeps the dtypes that are chosen here."""
    return torch.autocast(tensor.device.type, enabled=False)


@dataclass(frozen=True)
class _Tiles:
    """The tiles of one call.

    Attributes:
        call: The call.
        chunk_size: Queries of a chunk.
        collect: Takes what is measured, if it is wanted.
        starts_graph: Whether nothing below needs a gradient (the first layer of interest), so that only the saliency
            is computed.
        measure: What is measured, as for `salient_attention`.
    """

    call: AttentionCall
    chunk_size: int
    collect: Collector | None
    starts_graph: bool
    measure: str

    def with_tensors(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position_bias: torch.Tensor | None
    ) -> "_Tiles":
        kwargs = self.call.kwargs | {"position_bias": position_bias}
        return replace(self, call=replace(self.call, query=query, key=key, value=value, kwargs=kwargs))

    def chunks(self, size: int) -> Iterator[slice]:
        """Yields ranges of queries, the last first: they need the most memory, which is then there for all."""
        queries = self.call.query.shape[2]
        for start in reversed(range(0, queries, size)):
            yield slice(start, min(start + size, queries))

    def groups(self) -> "list[_HeadGroup]":
        """The heads of each tile."""
        call = self.call
        heads, key_heads = call.query.shape[1], call.key.shape[1]
        shared = heads // key_heads
        size = tile_heads(heads, key_heads, call.query.device, isinstance(call, BridgedCall)) // shared
        return [_HeadGroup.of(call, slice(start, start + size), shared) for start in range(0, key_heads, size)]

    def keys_of_tile(self, group: "_HeadGroup") -> int:
        """The number of keys of a tile."""
        keys, query = self.call.key.shape[2], group.call.query
        if isinstance(self.call, BridgedCall) or query.device.type != "cpu":
            return keys
        rows = query.shape[0] * query.shape[1] * min(self.chunk_size, query.shape[2])
        return min(keys, max(_FEWEST_KEYS, _TILE_ELEMENTS * torch.get_num_threads() // rows))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the output [B, q, H, Dv], and the log-sum-exp of the logits [B, H, q], or None."""
        call = self.call
        if _is_fused(call):
            return _fused(call)
        batch, heads, queries, _ = call.query.shape
        output = call.value.new_empty(batch, queries, heads, call.value.shape[-1])
        if isinstance(call, BridgedCall):
            for rows in self.chunks(self.chunk_size):
                (weights, _, _), _ = call.weights(call.query[:, :, rows], rows.start)
                output[:, rows] = _mixed(call, _pack(weights, call.key.shape[1]), slice(0, weights.shape[-1]))
            return output, None
        groups = self.groups()
        total = groups[0].key.new_empty(batch, heads, queries)
        # All keys of a query at once.
        most = max(_SHORTEST_CHUNK, _ROW_ELEMENTS // (batch * groups[0].call.query.shape[1] * queries))
        for rows in self.chunks(min(self.chunk_size, most) if call.query.device.type == "cpu" else self.chunk_size):
            seen = _Seen.of(call, rows)
            for group in groups:
                weights, log_total = _PlainChunk(group, rows, seen.narrowed(group.heads)).softmax()
                output[:, rows, group.heads] = _mixed(group.call, weights, seen.keys)
                total[:, group.heads, rows] = log_total.view(batch, -1, rows.stop - rows.start)
        return output, total

    def backward(
        self, grad: torch.Tensor, output: torch.Tensor, log_total: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Computes the gradients of query, key, value and position bias.

        Args:
            grad: The gradient of the output, [B, q, H, Dv].
            output: The output.
            log_total: The log-sum-exp of the logits, [B, H, q]; None where it is not known.
        """
        call = self.call
        batch, heads, _, _ = call.query.shape
        key_heads, count = call.key.shape[1:3]
        groups = self.groups()
        work, width = groups[0].key.dtype, self.keys_of_tile(groups[0])
        grad_query = torch.zeros_like(call.query)
        # By tiles of keys, each transposed: products that add to them then read and write what lies together.
        grad_key, grad_value = (
            one.new_zeros(-(-count // width), batch, key_heads, one.shape[-1], width, dtype=work)
            for one in (call.key, call.value)
        )
        # Some families make the bias from hidden states. It is [H, q, K] in itself.
        bias = call.kwargs["position_bias"]
        grad_bias = None if bias is None else call.query.new_zeros(batch, heads, *bias.shape[2:])
        # In place, here and below: fresh memory costs a CPU more than arithmetic does.
        space = _Space(2, self.chunk_size, groups[0], width)
        for rows in self.chunks(self.chunk_size):
            upstream = grad[:, rows].transpose(1, 2).to(work)
            product = None if self.starts_graph else (upstream * output[:, rows].transpose(1, 2)).sum(-1, keepdim=True)
            chunks: list[_PlainChunk | _BridgedChunk]
            if isinstance(call, BridgedCall):
                chunks = [_BridgedChunk(call, rows)]
            else:
                seen = _Seen.of(call, rows)
                chunks = [_PlainChunk(group, rows, seen.narrowed(group.heads), log_total, product) for group in groups]
            packed = [_pack(upstream[:, group.heads], group.width) for group in groups]
            for keys in _cut(chunks[0].keys, width):
                number, place = keys.start // width, slice(keys.start % width, (keys.stop - 1) % width + 1)
                for group, chunk, own_upstream in zip(groups, chunks, packed, strict=True):
                    own, shape = group.key_heads, (*own_upstream.shape[:2], keys.stop - keys.start)
                    weights = chunk.weights(keys, space.take(0, shape))
                    by_head = (batch, -1, rows.stop - rows.start, shape[-1])
                    if self.collect is not None and self.measure == "attention":
                        self.collect(rows.start, keys.start, group.heads, weights.view(by_head))
                    grad_weights = torch.bmm(own_upstream, group.value[:, keys].mT, out=space.take(1, shape))
                    if self.starts_graph:
                        grad_weights.mul_(weights)
                    else:
                        _view(grad_value[number][:, own])[..., place].baddbmm_(own_upstream.mT, weights)
                        add_to = _view(grad_key[number][:, own])[..., place]
                        of_bias = chunk.pull_back(weights, grad_weights, keys, add_to)
                        if grad_bias is not None and of_bias is not None:
                            grad_bias[:, group.heads, rows, keys] = of_bias.to(grad_bias.dtype)
                    if self.collect is not None and self.measure != "attention":
                        found = grad_weights.abs_() if self.measure == "saliency" else grad_weights.neg_()
                        self.collect(rows.start, keys.start, group.heads, found.view(by_head))
            if not self.starts_graph:
                for group, chunk in zip(groups, chunks, strict=True):
                    grad_query[:, group.heads, rows] = chunk.grad_query.view(grad_query[:, group.heads, rows].shape)
        if self.starts_graph:
            return None, None, None, None
        if grad_bias is not None:
            grad_bias = grad_bias.sum_to_size(bias.shape).to(bias.dtype)
        return grad_query, _joined(grad_key, call.key), _joined(grad_value, call.value), grad_bias


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


def _fused(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs PyTorch's kernel: the output [B, q, H, Dv], and the log-sum-exp of the logits [B, H, q] on a CPU."""
    query, key, value = call.query, call.key, call.value
    if query.device.type != "cpu":
        groups = query.shape[1] != key.shape[1]
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=call.scaling, enable_gqa=groups
        )
        return output.transpose(1, 2).contiguous(), None
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    # What scaled_dot_product_attention calls here; it returns what the backward pass would have to compute again.
    output, log_total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=True, scale=call.scaling
    )
    return output.transpose(1, 2).contiguous(), log_total * _UNIT


def _mixed(call: AttentionCall, weights: torch.Tensor, keys: slice) -> torch.Tensor:
    """The output [B, c, H, Dv] of weights [N, G * c, k] on some keys."""
    values = call.value[:, :, keys].flatten(0, 1)
    mixed = torch.bmm(weights.to(values.dtype), values)
    return mixed.view(*call.query.shape[:2], -1, values.shape[-1]).transpose(1, 2)


def _pack(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, H, c, n] as [B * Hkv, G * c, n]: query heads that share keys lie together."""
    batch, heads, chunk, width = tensor.shape
    return tensor.reshape(batch * groups, heads // groups * chunk, width)


def _view(tensor: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, D, k] as [B * Hkv, D, k], the same memory."""
    return tensor.view(-1, *tensor.shape[2:])


def _cut(keys: slice, width: int) -> list[slice]:
    """Cuts a range of keys at the multiples of `width`, the last first."""
    numbers = range(keys.start // width, -(-keys.stop // width))
    return [slice(max(keys.start, n * width), min(keys.stop, (n + 1) * width)) for n in reversed(numbers)]


def _joined(tiles: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[tiles, B, Hkv, D, k] as [B, Hkv, K, D], in the dtype of `like`."""
    return tiles.permute(1, 2, 0, 4, 3).flatten(2, 3)[:, :, : like.shape[2]].to(like.dtype)


class _Space:
    """Memory that all tiles of a call use in turn."""

    def __init__(self, count: int, chunk_size: int, group: "_HeadGroup", width: int):
        batch, heads, queries, _ = group.call.query.shape
        self._tensors = group.key.new_empty(count, batch * heads * min(chunk_size, queries) * width)

    def take(self, number: int, shape: tuple[int, int, int]) -> torch.Tensor:
        return self._tensors[number, : math.prod(shape)].view(shape)


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
    """The weights of some queries over the keys that any of them sees.

    Args:
        group: Their heads.
        rows: The queries.
        seen: What they see.
        log_total: The log-sum-exp of all logits of the call, [B, H, q]; None where it is not known.
        product: The product of each query's output and its gradient, [B, H, c, 1]; None without a backward pass.
    """

    def __init__(
        self,
        group: _HeadGroup,
        rows: slice,
        seen: _Seen,
        log_total: torch.Tensor | None = None,
        product: torch.Tensor | None = None,
    ):
        self.keys = seen.keys
        self._group, self._rows, self._seen = group, rows, seen
        work = group.key.dtype
        self._query = _pack(group.call.query[:, :, rows].to(work), group.width) * _UNIT
        self._shift: torch.Tensor | None = None
        self._product: torch.Tensor | None = None
        self._cap_slope: torch.Tensor | None = None
        if log_total is not None:
            self._shift = _pack(-log_total[:, group.heads, rows, None].to(work), group.width)
        if product is not None:
            self._product = _pack(product[:, group.heads], group.width)
            self.grad_query = torch.zeros_like(self._query)

    def softmax(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights [N, G * c, k] over all keys, and the log-sum-exp of the logits [N, G * c, 1]."""
        return self._normalised(self._logits(self.keys, None, None))

    def weights(self, keys: slice, out: torch.Tensor) -> torch.Tensor:
        """The weights [N, G * c, k] over some keys, in the memory of `out`; all keys where no log-sum-exp is known."""
        logits = self._logits(keys, self._shift, out)
        return self._normalised(logits)[0] if self._shift is None else logits.exp2_()

    def _normalised(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top = logits.amax(-1, keepdim=True)
        weights = logits.sub_(top).exp2_()
        total = weights.sum(-1, keepdim=True)
        sinks = self._group.call.sink_logits
        if sinks is not None:
            of_sinks = (sinks.to(total.dtype) * _UNIT)[:, None, None]
            total += torch.exp2(of_sinks - self._by_head(top)).view_as(total)
        return weights.div_(total), top.add_(total.log2_())

    def _logits(self, keys: slice, shift: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
        """The logits [N, G * c, k] over some keys, plus `shift` [N, G * c, 1]."""
        call, seen, key = self._group.call, self._seen, self._group.key[:, keys].mT
        if call.softcap is not None:
            squashed = torch.bmm(self._query, key, out=out).div_(call.softcap * _UNIT).tanh_()
            self._cap_slope = 1 - squashed**2
            logits = squashed.mul_(call.softcap * _UNIT)
            if shift is not None:
                logits += shift
        elif shift is None:
            logits = torch.bmm(self._query, key, out=out)
        else:
            logits = torch.baddbmm(shift, self._query, key, out=out)
        by_head = self._by_head(logits)
        own = slice(keys.start - seen.keys.start, keys.stop - seen.keys.start)
        if seen.bias is not None:
            by_head.add_(seen.bias[..., own], alpha=_UNIT)
        position_bias = call.kwargs["position_bias"]
        if position_bias is not None:
            by_head.add_(position_bias[:, :, self._rows, keys], alpha=_UNIT)
        first = max(own.start, seen.hidden_from)
        if first < own.stop:
            # A finite stand-in for -inf: a query that sees no key gets weights that nobody uses, instead of NaN.
            hidden = seen.hidden[..., first - seen.hidden_from : own.stop - seen.hidden_from]
            by_head[..., first - own.start :].masked_fill_(hidden, torch.finfo(logits.dtype).min / 2)
        return logits

    def pull_back(
        self, weights: torch.Tensor, grad_weights: torch.Tensor, keys: slice, grad_key: torch.Tensor
    ) -> torch.Tensor | None:
        """Goes from the gradient of the weights of a tile to that of the queries and, adding to it, of the keys.

        Args:
            weights: [N, G * c, k]; overwritten.
            grad_weights: Their gradient; becomes its product with the weights.
            keys: The keys of the tile.
            grad_key: The gradient of these keys, [N, D, k].

        Returns:
            The gradient of the bias, [B, h, c, k].
        """
        assert self._product is not None
        products = grad_weights.mul_(weights)
        grad_logits = torch.addcmul(products, weights, self._product, value=-1, out=weights)
        capped = grad_logits if self._cap_slope is None else grad_logits * self._cap_slope
        self.grad_query.baddbmm_(capped, self._group.key[:, keys])
        grad_key.baddbmm_(self._query.mT, capped, alpha=self._group.call.scaling / _UNIT)
        return self._by_head(grad_logits)

    def _by_head(self, tensor: torch.Tensor) -> torch.Tensor:
        """[N, G * c, n] as [B, h, c, n], the same memory."""
        batch, heads, _, _ = self._group.call.query.shape
        return tensor.view(batch, heads, -1, tensor.shape[-1])


class _BridgedChunk:
    """The same in a layer with the bridge, whose shifts depend on queries and keys too. All keys are one tile."""

    def __init__(self, call: BridgedCall, rows: slice):
        bias = call.kwargs["position_bias"]
        with torch.enable_grad():
            self._query, self._key = (one.detach().requires_grad_() for one in (call.query[:, :, rows], call.key))
            self._bias = None if bias is None else bias.detach().requires_grad_()
            kwargs = call.kwargs | {"position_bias": self._bias}
            (self._traced, _, _), _ = replace(call, key=self._key, kwargs=kwargs).weights(self._query, rows.start)
        self._rows = rows
        self.keys = slice(0, self._traced.shape[-1])

    def weights(self, keys: slice, out: torch.Tensor) -> torch.Tensor:
        return _pack(self._traced.detach(), self._key.shape[1])

    def pull_back(
        self, weights: torch.Tensor, grad_weights: torch.Tensor, keys: slice, grad_key: torch.Tensor
    ) -> torch.Tensor | None:
        inputs = (self._query, self._key) + (() if self._bias is None else (self._bias,))
        upstream = grad_weights.view_as(self._traced)
        self.grad_query, of_key, *of_bias = torch.autograd.grad(self._traced, inputs, upstream)
        grad_key += of_key[:, :, keys].mT.flatten(0, 1)
        grad_weights.mul_(weights)
        return of_bias[0][:, :, self._rows, keys] if of_bias else None
