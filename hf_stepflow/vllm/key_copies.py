"""Keys and values of running requests side by side, kept from pass to pass where the paged cache packs them.

vLLM's CPU kernel packs keys and values for its processor. To unpack all of them for each token would cost more than
attention itself, so the layers of the bridge keep what they have unpacked: as much memory as these layers take for the
requests that run. New tokens are added as they come; what was written anew, or moved, is read from the cache again.

Shapes: T tokens of the pass, Hkv key-value heads, K keys of a request, D width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .block_layout import LayerCache

if TYPE_CHECKING:  # it needs vLLM
    from .sequences import Sequence


class KeyCopies:
    """The copies of a worker, by request and layer."""

    def __init__(self) -> None:
        self._known: dict[str, dict[int, _Copy]] = {}

    def begin(self, sequences: "list[Sequence]") -> None:
        """Forgets the requests that are not in a pass, and the tokens that it writes."""
        self._known = {one.request: self._known.get(one.request, {}) for one in sequences}
        for sequence in sequences:
            for copy in self._known[sequence.request].values():
                copy.known = min(copy.known, sequence.first)

    def of_layer(self, request: str, layer: int, cache: LayerCache) -> "_Copy":
        """The copy of a request in one layer, which may hold nothing yet."""
        copies = self._known[request]
        if layer not in copies:
            copies[layer] = _Copy(cache)
        return copies[layer]


@dataclass
class LayerKeys:
    """Keys and values of one layer in a pass.

    Attributes:
        layer: Index of the layer.
        cache: Its paged cache, which holds the tokens of the pass.
        copies: What the worker keeps side by side.
        key: Keys of the pass, [T, Hkv, D]; None where the layer uses those of another.
        value: Values of the pass, [T, Hkv, D], or None.
    """

    layer: int
    cache: LayerCache
    copies: KeyCopies
    key: Tensor | None
    value: Tensor | None

    def of(self, sequence: "Sequence") -> tuple[Tensor, Tensor]:
        """Those of a request up to its last token in the pass, [1, Hkv, K, D] each."""
        copy = self.copies.of_layer(sequence.request, self.layer, self.cache)
        copy.check(sequence.blocks(self.cache))
        first = sequence.length if self.key is None else sequence.first
        if copy.known < first:
            copy.add(*(part[0] for part in self.cache.gather(sequence.row, copy.known, first)))
        if self.key is not None and self.value is not None:
            new = slice(sequence.start, sequence.end)
            copy.add(self.key[new].transpose(0, 1), self.value[new].transpose(0, 1))
        return copy.both[:1, :, : copy.known], copy.both[1:, :, : copy.known]


class _Copy:
    """The copy of one request in one layer.

    Attributes:
        both: Keys, then values, [2, Hkv, room, D].
        known: Tokens that it holds.
    """

    def __init__(self, cache: LayerCache):
        _, heads, self._tokens, both = cache.cache.shape
        self.both = cache.cache.new_empty(2, heads, 0, both // 2)
        self.known = 0
        self._blocks: list[int] = []

    def check(self, blocks: list[int]) -> None:
        """Notes the blocks that the cache has the tokens in now, and forgets all tokens if they were in others."""
        number = -(-self.known // self._tokens)
        if self._blocks[:number] != blocks[:number]:
            self.known = 0
        self._blocks = blocks

    def add(self, key: Tensor, value: Tensor) -> None:
        """Adds tokens, [Hkv, c, D] each."""
        end = self.known + key.shape[1]
        if end > self.both.shape[2]:
            _, heads, room, width = self.both.shape
            larger = self.both.new_empty(2, heads, max(end + self._tokens, 3 * room // 2), width)
            larger[:, :, : self.known] = self.both[:, :, : self.known]
            self.both = larger
        self.both[0, :, self.known : end] = key
        self.both[1, :, self.known : end] = value
        self.known = end
