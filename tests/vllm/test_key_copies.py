"""The copies of keys and values hold what the paged cache holds, whatever happens to requests. No vLLM is needed."""

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_stepflow.vllm.block_layout import LayerCache
from hf_stepflow.vllm.key_copies import KeyCopies, LayerKeys

TOKENS, HEADS, WIDTH, BLOCKS, ROWS = 4, 2, 3, 40, 3

# What happens to a request between two passes, and how many tokens it then has in one.
EVENTS = st.tuples(st.sampled_from(["goes on", "rejected", "moved", "absent", "preempted"]), st.integers(1, 6))


def read(cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = cache[blocks]
    return found[..., :WIDTH], found[..., WIDTH:]


class Engine:
    """Requests in a paged cache; each pass writes new numbers, as a model would."""

    def __init__(self) -> None:
        self.cache = torch.full((BLOCKS, HEADS, TOKENS, 2 * WIDTH), torch.nan)
        self.table = torch.zeros(ROWS, 12, dtype=torch.int32)
        self.free = list(range(BLOCKS))
        self.lengths = [0] * ROWS
        self.layer: Any = SimpleNamespace(kv_cache=self.cache)
        self.generator = torch.Generator().manual_seed(0)

    def blocks(self, row: int) -> int:
        return -(-self.lengths[row] // TOKENS)

    def happen(self, row: int, event: str) -> None:
        if event == "rejected":  # drafts: their tokens are written anew
            self.lengths[row] = max(0, self.lengths[row] - 3)
        elif event == "moved":  # as after a preemption with other blocks for the same prefix
            for place in range(self.blocks(row)):
                old, new = int(self.table[row, place]), self.free.pop(0)
                self.cache[new] = self.cache[old] + 1
                self.table[row, place] = new
                self.free.append(old)
        elif event == "preempted":
            self.lengths[row] = 0

    def write(self, row: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = torch.randn(2, number, HEADS, WIDTH, generator=self.generator)
        for place in range(number):
            position = self.lengths[row]
            if position % TOKENS == 0:
                self.table[row, position // TOKENS] = self.free.pop(0)
            block = int(self.table[row, position // TOKENS])
            self.cache[block, :, position % TOKENS] = torch.cat((key[place], value[place]), -1)
            self.lengths[row] += 1
        return key, value


@settings(deadline=None)
@given(st.lists(st.tuples(*[EVENTS] * ROWS), min_size=1, max_size=6), st.booleans())
def test_copies_hold_what_the_cache_holds(passes: list[Any], has_new: bool) -> None:
    """`has_new` is False for layers that use the keys of another, and so get none of their own."""
    engine, copies = Engine(), KeyCopies()
    for events in passes:
        sequences, parts, start = [], [], 0
        for row, (event, number) in enumerate(events):
            engine.happen(row, event)
            if event == "absent":
                continue
            first = engine.lengths[row]
            parts.append(engine.write(row, number))
            blocks = engine.table[row, : engine.blocks(row)].tolist()
            sequences.append(
                SimpleNamespace(
                    request=f"r{row}",
                    row=row,
                    start=start,
                    end=start + number,
                    first=first,
                    length=first + number,
                    blocks=lambda cache, blocks=blocks: blocks,
                )
            )
            start += number
        copies.begin(sequences)  # type: ignore[arg-type]
        if not sequences:
            continue
        cache = LayerCache(engine.layer, read, engine.table)
        key, value = (torch.cat(some) for some in zip(*parts, strict=True)) if has_new else (None, None)
        keys = LayerKeys(0, cache, copies, key, value)
        for sequence in sequences:
            made: Any = sequence
            for found, wanted in zip(keys.of(made), cache.gather(sequence.row, 0, sequence.length), strict=True):
                assert torch.equal(found, wanted)
