"""How an attention backend of vLLM lays out keys and values inside a block of the paged cache, and reading them.

A layer's cache is [blocks, Hkv, N, C] with N tokens a block. FlashAttention and Triton keep the key and the value of a
token side by side in C. The CPU kernel packs each for its own processor, so its layout is not known here but found: it
is asked to store numbers that say where they come from.

Shapes: n blocks, Hkv key-value heads, N tokens a block, D width of a key or value.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_stepflow.runtime.errors import StepFlowUnsupportedError

# Backends whose cache holds [key, value] of a token side by side.
PLAIN = ("FLASH_ATTN", "TRITON_ATTN")
PACKED = "CPU_ATTN"

Reader = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a cache [blocks, Hkv, N, 2 D] and block numbers, long [n]: keys and values, [n, Hkv, N, D] each."""


class LayerCache:
    """Keys and values of one layer in a pass.

    Args:
        layer: The `Attention` layer of vLLM.
        read: Its reader.
        table: Its block table, int32 [requests, blocks].

    Attributes:
        cache: The cache, [blocks, Hkv, N, 2 D].
        table: The block table.
    """

    def __init__(self, layer: Any, read: Reader, table: Tensor):
        self.cache, self._read, self.table = layer.kv_cache, read, table

    def gather(self, row: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a request at positions [first, last), [1, Hkv, last - first, D] each."""
        tokens = self.cache.shape[2]
        start, end = first // tokens, -(-last // tokens)
        within = slice(first - start * tokens, last - start * tokens)
        parts = self._read(self.cache, self.table[row, start:end].long())
        # Kernels take the numbers of a key side by side.
        key, value = (part.transpose(0, 1).contiguous().flatten(1, 2)[None, :, within] for part in parts)
        return key, value

    def values_at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """The values of some tokens, [n, Hkv, D].

        Args:
            rows: Their requests, long [n].
            positions: Their positions, long [n].
        """
        tokens = self.cache.shape[2]
        blocks, place = self.table[rows, positions // tokens].long().unique(return_inverse=True)
        return self._read(self.cache, blocks)[1][place, :, positions % tokens]


def is_plain(layer: Any) -> bool:
    """Whether a layer's cache holds the key and the value of a token side by side, as plain numbers."""
    dtypes = torch.float32, torch.bfloat16, torch.float16
    return layer.get_attn_backend().get_name() in PLAIN and layer.kv_cache.dtype in dtypes


def reader_for(layer: Any) -> Reader:
    """The reader of a layer's cache.

    Args:
        layer: An `Attention` layer of vLLM whose cache is bound.

    Raises:
        StepFlowUnsupportedError: The backend's layout is not known.
    """
    name = layer.get_attn_backend().get_name()
    if is_plain(layer):
        return _read_plain
    if name == PACKED and layer.kv_cache_dtype == "auto":
        return _Packed(layer)
    raise StepFlowUnsupportedError(
        f"StepFlow cannot read the cache of {layer.layer_name}: backend {name}, {layer.kv_cache_dtype}",
        hint=f"choose --attention-backend {PLAIN[0]} and --kv-cache-dtype auto",
    )


def _read_plain(cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    found = cache.index_select(0, blocks)
    width = found.shape[3] // 2
    return found[..., :width], found[..., width:]


class _Packed:
    """Reads the cache of vLLM's CPU kernel, in which the keys of a block come first, then its values.

    Args:
        layer: The layer, whose kernel is asked.
    """

    def __init__(self, layer: Any):
        heads, tokens, both = layer.kv_cache.shape[1:]
        self.shape = tokens, both // 2
        self.key, self.value = (_unpacked(place, self.shape) for place in _places(layer, heads, *self.shape))

    def __call__(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        found = cache.index_select(0, blocks).flatten(2)
        half = found.shape[2] // 2
        return self.key(found[..., :half]), self.value(found[..., half:])


def _places(layer: Any, heads: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Where the kernel puts the keys and the values of a block: for each place, token * D + column."""
    from vllm import _custom_ops

    dtype = layer.kv_cache.dtype
    cache = torch.zeros(1, heads, 2 * tokens, width, dtype=dtype)
    halves = cache.chunk(2, dim=2)
    read = []
    # Small numbers, which every format holds exactly.
    for number in (torch.arange(tokens)[:, None].expand(tokens, width), torch.arange(width).expand(tokens, width)):
        for part in (number // 64, number % 64):
            told = part[:, None].expand(tokens, heads, width).to(dtype).contiguous()
            _custom_ops.cpu_attn_reshape_and_cache(
                told, told, *halves, torch.arange(tokens), layer.isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
            )
            read.append([half[0, -1].flatten().long() for half in halves])
    found = []
    for token_high, token_low, high, low in zip(*read, strict=True):
        place = (64 * token_high + token_low) * width + 64 * high + low
        if not torch.equal(place.sort().values, torch.arange(tokens * width)):
            raise StepFlowUnsupportedError(
                f"StepFlow cannot read the cache of {layer.layer_name}: vLLM's CPU kernel ({layer.isa}) does not "
                "store each number of a block once",
                hint="use the releases of vLLM that hf-stepflow names",
            )
        found.append(place)
    return found[0], found[1]


def _unpacked(place: Tensor, shape: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """Returns a function from [..., N * D] in the kernel's order to [..., N, D]."""
    tokens, width = shape
    plain = torch.arange(tokens * width)
    if torch.equal(place, plain):
        return lambda packed: packed.unflatten(-1, (tokens, width))
    if torch.equal(place, plain.view(tokens, width).T.flatten()):
        return lambda packed: packed.unflatten(-1, (width, tokens)).mT
    order = place.argsort()
    return lambda packed: packed[..., order].unflatten(-1, (tokens, width))
