"""FlowState: what StepFlow knows of every cached token, riding on the KV cache.

The state is one tensor of records (`step_record.Field`), a row of integers for each slot of the cache, so that
everything that happens to a cache (beams reorder it, speculation crops it, sampling repeats it) happens to it by the
same index operation. It is carried by swapping the cache's class for one with `FlowCacheMixin`.
"""

from typing import Any

import torch

from .step_record import FIELDS, Field, empty_record
from .steps import StepVocabulary

# Above this many rows a decode step labels its tokens in tensors; below, on the host, which costs fewer operations.
_HOST_ROWS = 32


class FlowState:
    """Records and tallies of a batch.

    Attributes:
        vocabulary: the step rules that the records were made with.
        records: int32 [B, capacity, FIELDS]; slots past `length` are undefined.
        length: number of valid slots: an int, or (for a cache with static shapes) a long tensor [], so that a
            compiled decode step changes no Python value.
        tally: float32 [B, layers, tallies] for the report, or None.
    """

    def __init__(self, vocabulary: StepVocabulary, batch: int, device: torch.device, capacity: int | None = None):
        self.vocabulary = vocabulary
        self.is_static = capacity is not None
        self.records = torch.zeros(batch, capacity or 0, FIELDS, dtype=torch.int32, device=device)
        self.length: int | torch.Tensor = torch.zeros((), dtype=torch.long, device=device) if self.is_static else 0
        self.tally: torch.Tensor | None = None
        self._last: list[list[int]] | None = [empty_record() for _ in range(batch)]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.records.shape[0]

    def append(
        self, ids: torch.Tensor, padding: torch.Tensor | None, prompt_length: int | None
    ) -> "tuple[torch.Tensor, list[list[list[int]]] | None]":
        """Adds the records of new tokens.

        Args:
            ids: int64 [B, q].
            padding: bool [B, q] of the tokens that are padding, or None.
            prompt_length: slot at which implicit thinking starts.

        Returns:
            The new records on the device, int32 [B, q, FIELDS], and on the host [B][q][FIELDS], which is None where
            the rules ran in tensors.
        """
        if torch.compiler.is_compiling() or (ids.shape[1] == 1 and ids.shape[0] > _HOST_ROWS):
            return self._append_in_tensors(ids, padding, prompt_length), None
        return self._append_on_host(ids, padding, prompt_length)

    def _append_on_host(
        self, ids: torch.Tensor, padding: torch.Tensor | None, prompt_length: int | None
    ) -> "tuple[torch.Tensor, list[list[list[int]]]]":
        start = int(self.length)
        if padding is None:
            rows, hidden = ids.tolist(), [None] * ids.shape[0]
        else:
            rows, hidden = torch.stack((ids, padding.long())).tolist()  # one host read for both
        last = self._last_records()
        host = [
            self.vocabulary.scan(row, before, start=start, padding=mask, prompt_length=prompt_length)
            for row, before, mask in zip(rows, last, hidden, strict=True)
        ]
        records = torch.tensor(host, dtype=torch.int32).to(ids.device, non_blocking=True)
        end = start + ids.shape[1]
        self._reserve(end)
        self.records[:, start:end] = records
        self.set_length(end)
        self._last = [row[-1] for row in host]
        return records, host

    def _append_in_tensors(
        self, ids: torch.Tensor, padding: torch.Tensor | None, prompt_length: int | None
    ) -> torch.Tensor:
        if not self.is_static:
            self._reserve(int(self.length) + ids.shape[1])
        slot = torch.as_tensor(self.length, device=ids.device)
        fresh = torch.tensor(empty_record(), dtype=torch.long, device=ids.device)
        before = self.records.index_select(1, (slot - 1).clamp(min=0).reshape(1))[:, 0].long()
        record = torch.where(slot == 0, fresh, before)
        made = []
        for position in range(ids.shape[1]):
            hidden = None if padding is None else padding[:, position]
            record = self.vocabulary.advance(record, ids[:, position], slot + position, hidden, prompt_length)
            made.append(record)
        records = torch.stack(made, 1).int()
        self.records.index_copy_(1, slot + torch.arange(ids.shape[1], device=ids.device), records)
        if isinstance(self.length, torch.Tensor):
            self.length.add_(ids.shape[1])
        else:
            self.length += ids.shape[1]
        self._last = None
        return records

    def _last_records(self) -> list[list[int]]:
        if self._last is None:
            end = int(self.length)
            last = self.records[:, end - 1].tolist() if end else None
            self._last = last or [empty_record() for _ in range(self.batch)]
        return self._last

    def _reserve(self, slots: int) -> None:
        """Makes room for that many slots, doubling so that decode copies rarely."""
        capacity = self.records.shape[1]
        if slots > capacity and not self.is_static:
            grown = self.records.new_zeros(self.batch, max(slots, 2 * capacity, 64), FIELDS)
            grown[:, :capacity] = self.records
            self.records = grown

    def set_length(self, length: int) -> None:
        """Sets the number of valid slots."""
        if isinstance(self.length, torch.Tensor):
            self.length.fill_(length)
        else:
            self.length = length

    def follow(self, cached: int) -> None:
        """Brings the state to the length of its cache: shorter after a rollback that went past `crop`, longer where
        the cache holds tokens that StepFlow has not seen (virtual tokens of a prefix, turns without StepFlow). Those
        count as question.
        """
        start = int(self.length)
        if cached <= start:
            self.crop(cached)
            return
        self._reserve(cached)
        unseen = []
        for before in self._last_records():
            record = before.copy()
            record[Field.SEGMENT] = 0
            record[Field.LABEL] = 3 * record[Field.ROUND]
            record[Field.STEP], record[Field.TRIGGER], record[Field.ACTIVE], record[Field.TOKEN] = -1, 0, 0, -1
            record[Field.COUNT] += cached - start
            unseen.append(record)
        self.records[:, start:cached] = torch.tensor(unseen, dtype=torch.int32, device=self.records.device)[:, None]
        counts = torch.arange(start - cached + 1, 1, device=self.records.device, dtype=torch.int32)
        self.records[:, start:cached, Field.COUNT] += counts
        self._last = unseen
        self.set_length(cached)

    def crop(self, length: int) -> None:
        """Forgets the slots from `length` on."""
        if length < int(self.length):
            self.set_length(max(length, 0))
            self._last = None

    def select(self, rows: torch.Tensor) -> None:
        """Takes rows by index: beams, finished rows of a batch."""
        rows = rows.to(self.records.device)
        self.records = self.records.index_select(0, rows)
        self.tally = None if self.tally is None else self.tally.index_select(0, rows)
        self._last = None

    def repeat(self, times: int) -> None:
        """Repeats each row in place."""
        self.records = self.records.repeat_interleave(times, 0)
        self.tally = None if self.tally is None else self.tally.repeat_interleave(times, 0)
        self._last = None

    def reset(self) -> None:
        """Back to an empty batch."""
        self.set_length(0)
        self._last = None
        if self.tally is not None:
            self.tally.zero_()


class FlowCacheMixin:
    """Lets a KV cache carry a `FlowState` through everything that generation does to it."""

    stepflow_state: FlowState

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders cache and state for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.stepflow_state.select(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Crops cache and state; the count has its meaning from the installed transformers release."""
        super().crop(*args, **kwargs)  # type: ignore[misc]
        self.stepflow_state.crop(int(self.get_seq_length()))  # type: ignore[attr-defined]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of cache and state."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.stepflow_state.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows of cache and state that `indices` name."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.stepflow_state.select(torch.arange(self.stepflow_state.batch, device=indices.device)[indices])

    def reset(self) -> None:
        """Empties cache and state."""
        super().reset()  # type: ignore[misc]
        self.stepflow_state.reset()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_cache, (type(self).__mro__[2], self.__dict__)


def _rebuild_cache(kind: type, attributes: dict[str, Any]) -> Any:
    cache = kind.__new__(kind)
    cache.__dict__.update(attributes)
    carry(cache, attributes["stepflow_state"])
    return cache


_CARRIERS: dict[type, type] = {}


def state_of(cache: Any) -> FlowState | None:
    """The state that a cache carries, or None."""
    return getattr(cache, "stepflow_state", None)


def carry(cache: Any, state: FlowState) -> None:
    """Makes a cache carry a state; the cache keeps its type's name and behaviour."""
    kind = type(cache)
    if not isinstance(cache, FlowCacheMixin):
        if kind not in _CARRIERS:
            _CARRIERS[kind] = type(kind.__name__, (FlowCacheMixin, kind), {"__module__": kind.__module__})
        cache.__class__ = _CARRIERS[kind]
    cache.stepflow_state = state


def drop(cache: Any) -> None:
    """Takes the state off a cache and gives it back its class."""
    if isinstance(cache, FlowCacheMixin):
        del cache.stepflow_state
        cache.__class__ = type(cache).__mro__[2]
