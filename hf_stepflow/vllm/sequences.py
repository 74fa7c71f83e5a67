"""One pass of a worker as StepFlow sees it: the requests in it, each a sequence with its records.

In a sequence a token's slot is its position: there is no padding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_stepflow.runtime.bridge import Run, runs_of
from hf_stepflow.runtime.forward import FlowPass
from hf_stepflow.runtime.settings import FlowPlan
from hf_stepflow.runtime.step_detector import Field

from .block_layout import LayerCache
from .record_cache import RecordCache


class Sequence:
    """The tokens of one request in a pass.

    It serves as the state of a `FlowPass` of its own, whose one row it is.

    Attributes:
        plan: What happens in which layer.
        request: Name of the request.
        row: Its index.
        start: Its first token in the pass.
        end: The one after its last.
        first: The position of its first token in the pass.
        made: The records of its tokens in the pass, on the host.
    """

    tally = None
    is_static = False

    def __init__(
        self,
        plan: FlowPlan,
        request: str,
        row: int,
        start: int,
        end: int,
        first: int,
        made: list[list[int]],
        cache: RecordCache,
        table: Tensor,
    ):
        self.plan, self.request, self.row = plan, request, row
        self.start, self.end, self.first, self.made = start, end, first, made
        self._cache, self._table = cache, table
        self._blocks: dict[int, list[int]] = {}

    @property
    def length(self) -> int:
        """Tokens with those of the pass."""
        return self.first + self.end - self.start

    def blocks(self, cache: LayerCache) -> list[int]:
        """The blocks of a layer's cache that hold its tokens; layers of a kind share a table."""
        table = cache.table
        if table.data_ptr() not in self._blocks:
            number = -(-self.length // cache.cache.shape[2])
            self._blocks[table.data_ptr()] = table[self.row, :number].tolist()
        return self._blocks[table.data_ptr()]

    @cached_property
    def is_bridged(self) -> bool:
        """Whether the bridge applies to any of the tokens."""
        return any(record[Field.ACTIVE] for record in self.made)

    @cached_property
    def triggers(self) -> list[int]:
        """The tokens, counted from the first in the pass, that are injected."""
        return [place for place, record in enumerate(self.made) if record[Field.TRIGGER]]

    @cached_property
    def records(self) -> Tensor:
        """The records of all tokens, int32 [1, length, F]."""
        return self.records_at([(self.row, position) for position in range(self.length)])[None]

    def records_at(self, places: list[tuple[int, int]]) -> Tensor:
        """The records at some places of the pass, (request, position) each, int32 [n, F]."""
        rows, positions = torch.tensor(places, dtype=torch.long, device=self.device).reshape(-1, 2).T
        return self._cache.read(self._table, rows, positions)

    @property
    def device(self) -> torch.device:
        """Where its records are."""
        return self._table.device

    @cached_property
    def runs(self) -> list[Run] | None:
        """The key ranges of the bridged tokens, as in a `FlowPass`; None where they do not suffice."""
        return runs_of([self.made], self.first, self.plan.settings)

    @cached_property
    def flow(self) -> FlowPass:
        """The pass of this sequence alone."""
        device = self._table.device
        made: Any = torch.tensor([self.made], dtype=torch.int32, device=device)
        state: Any = self
        return FlowPass.of(self.plan, state, made, [self.made], self.length)


@dataclass
class PagedPass:
    """The sequences with StepFlow in a pass.

    Attributes:
        plan: What happens in which layer.
        sequences: All of them.
        bridged: Those with a token to which the bridge applies.
        injected: Those with a token that is injected.
        kept: What layers of a kind share within the pass.
    """

    plan: FlowPlan
    sequences: list[Sequence]
    bridged: list[Sequence] = field(init=False)
    injected: list[Sequence] = field(init=False)
    kept: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bridged = [sequence for sequence in self.sequences if sequence.is_bridged]
        self.injected = [sequence for sequence in self.sequences if sequence.triggers]

    def shared(self, key: Any, find: Callable[[], Any]) -> Any:
        """The result of `find`, computed once a pass for layers that share a key."""
        if key not in self.kept:
            self.kept[key] = find()
        return self.kept[key]
