"""FlowState: what StepFlow knows about every cached token, riding on the KV cache.

The state is one tensor of records (`step_detector.Field`), a row of integers for each slot of the cache, so that
everything that happens to a cache (beams reorder it, speculation crops it, sampling repeats it) happens to it by the
same index operation. It is carried by swapping the cache's class for one with `FlowCacheMixin`.
"""

import copy
import importlib.util
import os
from array import array
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from .report import Tally
from .step_detector import FIELDS, Field, StepVocabulary, empty_record

_FRESH = tuple(empty_record())

_KERNELS: dict[str, Any] = {}


def kernels_on(device: torch.device) -> Any:
    """The kernels (`kernels.Kernels`) where tensors on a device take them; None elsewhere.

    `HF_STEPFLOW_ROUTE=device` makes those on a CPU take them too (Triton then needs `TRITON_INTERPRET=1`).
    """
    if device.type not in _KERNELS:
        takes = device.type == "cuda" or (device.type == "cpu" and os.environ.get("HF_STEPFLOW_ROUTE") == "device")
        found = None
        if takes and importlib.util.find_spec("triton") is not None:
            from .kernels import KERNELS

            found = KERNELS
        _KERNELS[device.type] = found
    return _KERNELS[device.type]


@dataclass(frozen=True)
class ReadTokens:
    """New tokens on the host.

    Attributes:
        ids: Token ids of each row, [B][q].
        padding: Which of them are padding, [B][q], or None if none is.
        cached: Tokens in the cache, where that was asked for; else None.
    """

    ids: list[list[int]]
    padding: list[list[bool]] | None
    cached: int | None = None


class FlowState:
    """Records and tallies of a batch.

    Attributes:
        vocabulary: The step rules that the records were made with.
        records: int32 [B, capacity, FIELDS]; slots past `length` are undefined.
        length: Number of valid slots: an int, or (for a cache with static shapes) a long tensor [], so that a
            compiled decode step changes no Python value.
        tally: The sums behind the report, or None.
        virtual_tokens: Slots before the prompt's first token, which generation does not count (prefix tuning).
        is_behind: Whether a pass without StepFlow may have added tokens to the cache.
    """

    def __init__(self, vocabulary: StepVocabulary, batch: int, device: torch.device, capacity: int | None = None):
        self.vocabulary = vocabulary
        self.is_static = capacity is not None
        self.records = torch.zeros(batch, capacity or 0, FIELDS, dtype=torch.int32, device=device)
        self.length: int | torch.Tensor = torch.zeros((), dtype=torch.long, device=device) if self.is_static else 0
        self.tally: Tally | None = None
        self.virtual_tokens = 0
        self.is_behind = False
        # Where implicit thinking starts, and the same for compiled steps: a tensor [], -1 for nowhere.
        self._prompt_length: int | None = None
        self._opening = torch.full_like(self.length, -1) if isinstance(self.length, torch.Tensor) else None
        self._count: int | None = 0
        self._last: list[list[int]] | None = [empty_record() for _ in range(batch)]
        if isinstance(self.length, torch.Tensor):  # a compiled step has to find tables and kernels on this device
            vocabulary.advance(self.records.new_tensor([_FRESH]).long(), self.records.new_zeros(1).long(), 0)
            kernels_on(device)
            for tensor in (self.records, self.length, self._opening):  # else it runs without CUDA graphs
                torch._dynamo.mark_static_address(tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FlowState":
        copied = copy.copy(self)
        copied.records = self.records.clone()
        copied._opening = None if self._opening is None else self._opening.clone()
        copied.length = self.length.clone() if isinstance(self.length, torch.Tensor) else self.length
        copied.tally = None if self.tally is None else self.tally.copy()
        return copied

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.records.shape[0]

    @property
    def count(self) -> int:
        """Number of valid slots; only after compiled steps does it take a host read."""
        if self._count is None:
            self._count = int(self.length)
        return self._count

    def read(self, ids: torch.Tensor, padding: torch.Tensor | None, cached: torch.Tensor | None = None) -> ReadTokens:
        """Reads tokens to be appended from their device, with one read for everything that labelling them needs.

        Args:
            ids: int64 [B, q].
            padding: bool [B, q] of the tokens that are padding, or None.
            cached: Tokens in the cache, one number on the device, or None.
        """
        parts = [ids] if padding is None else [ids, padding.to(ids.dtype)]
        if cached is not None:
            parts.append(cached.to(ids.device, ids.dtype).reshape(1, 1).expand(ids.shape[0], 1))
        reads_last = self._last is None and self.count > 0
        if reads_last:
            parts.append(self.records[:, self.count - 1].to(ids.device, ids.dtype))
        rows, queries = (torch.cat(parts, 1) if len(parts) > 1 else ids).tolist(), ids.shape[1]
        end = queries if padding is None else 2 * queries
        if reads_last:
            self._last = [row[-FIELDS:] for row in rows]
        return ReadTokens(
            [row[:queries] for row in rows],
            None if padding is None else [list(map(bool, row[queries:end])) for row in rows],
            None if cached is None else rows[0][end],
        )

    def append(
        self, read: ReadTokens, prompt_length: int | None, device: torch.device
    ) -> "tuple[torch.Tensor, list[list[list[int]]]]":
        """Adds the records of new tokens that have been read.

        Args:
            read: The tokens.
            prompt_length: Slot at which implicit thinking starts; None for what was given before.
            device: Where the records are wanted.

        Returns:
            The new records on the device, int32 [B, q, FIELDS], and on the host, [B][q][FIELDS].
        """
        self._open_at(prompt_length)
        start = self.count
        host = [
            self.vocabulary.scan(
                ids,
                before,
                start=start,
                padding=None if read.padding is None else read.padding[row],
                prompt_length=self._prompt_length,
            )
            for row, (ids, before) in enumerate(zip(read.ids, self._last_records(), strict=True))
        ]
        records = _tensor_of(host).to(device, non_blocking=True)
        end = start + len(read.ids[0])
        self._reserve(end)
        self.records[:, start:end] = records
        self.set_length(end)
        self._last = [row[-1] for row in host]
        return records, host

    def append_in_tensors(
        self, ids: torch.Tensor, padding: torch.Tensor | None, prompt_length: int | None
    ) -> torch.Tensor:
        """Adds the record of one token a row without reading anything.

        Args:
            ids: int64 [B, 1].
            padding: bool [B, 1] of the tokens that are padding, or None.
            prompt_length: As for `append`.

        Returns:
            The new records, int32 [B, 1, FIELDS].
        """
        self._open_at(prompt_length)
        if not self.is_static:
            self._reserve(self.count + 1)
        slot = torch.as_tensor(self.length, device=ids.device)
        fresh = torch.tensor(_FRESH, dtype=torch.long, device=ids.device)
        before = self.records.index_select(1, (slot - 1).clamp(min=0).reshape(1))[:, 0].long()
        record = torch.where(slot == 0, fresh, before)
        opening = self._prompt_length if self._opening is None else self._opening
        hidden = None if padding is None else padding[:, 0]
        records = self.vocabulary.advance(record, ids[:, 0], slot, hidden, opening).int()[:, None]
        self.records.index_copy_(1, slot.reshape(1), records)
        self._grow(1)
        return records

    def append_by_kernel(
        self, kernels: Any, ids: torch.Tensor, padding: torch.Tensor | None, prompt_length: int | None
    ) -> torch.Tensor:
        """As `append_in_tensors`, for a few tokens a row by one kernel.

        Args:
            kernels: The kernels of the device.
            ids: int64 [B, q].
            padding: bool [B, q] of the tokens that are padding, or None.
            prompt_length: As for `append`.

        Returns:
            The new records, int32 [B, q, FIELDS].
        """
        self._open_at(prompt_length)
        queries = ids.shape[1]
        if not self.is_static:
            self._reserve(self.count + queries)
        opening = self._prompt_length if self._opening is None else self._opening
        records = self.vocabulary.label(kernels.label, self.records, ids, self.length, padding, opening)
        self._grow(queries)
        return records

    def _grow(self, slots: int) -> None:
        """Counts slots whose records have been written on the device."""
        if isinstance(self.length, torch.Tensor):
            self.length.add_(slots)
            self._count = None
        else:
            self.length += slots
            self._count = self.length
        self._last = None

    def _open_at(self, prompt_length: int | None) -> None:
        if prompt_length is not None:
            self._prompt_length = prompt_length
            if self._opening is not None:
                self._opening.fill_(prompt_length)

    def _last_records(self) -> list[list[int]]:
        if self._last is None:
            end = self.count
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
        self._count = length

    def follow(self, cached: int, mask: Any = None) -> None:
        """Brings the state to the length of its cache.

        The cache is shorter after a rollback that went past `crop`, and longer where it holds tokens that StepFlow has
        not seen (virtual tokens of a prefix, turns without StepFlow). Those count as question.

        Args:
            cached: Tokens in the cache.
            mask: The padding mask [B, slots] if there is one, 0 for padding; masks of another form are ignored.
        """
        start = self.count
        if cached <= start:
            self.crop(cached)
            return
        self._reserve(cached)
        known = isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= cached
        hidden = (mask[:, start:cached] == 0).tolist() if known else None
        unseen = []
        for row, record in enumerate(self._last_records()):
            made = []
            for slot in range(start, cached):
                record = _unseen(record, slot, hidden is not None and hidden[row][slot - start])
                made.append(record)
            unseen.append(made)
        self.records[:, start:cached] = _tensor_of(unseen).to(self.records.device)
        self._last = [made[-1] for made in unseen]
        self.set_length(cached)

    def relabel(self, vocabulary: StepVocabulary) -> None:
        """Labels the cached tokens anew, under other step rules."""
        rows = []
        for row in self.records[:, : self.count].tolist():
            record, made = empty_record(), []
            for slot, old in enumerate(row):
                if old[Field.TOKEN] < 0 <= old[Field.LABEL]:
                    record = _unseen(record, slot, False)
                    made.append(record)
                    continue
                opens = slot if old[Field.THINKING_SLOT] == slot else None
                (record,) = vocabulary.scan(
                    old[Field.TOKEN : Field.TOKEN + 1],
                    record,
                    start=slot,
                    padding=[old[Field.LABEL] < 0],
                    prompt_length=opens,
                )
                made.append(record)
            rows.append(made)
        self.vocabulary = vocabulary
        if self.count:
            self.records[:, : self.count] = _tensor_of(rows).to(self.records.device)
        self._last = None

    def crop(self, length: int) -> None:
        """Forgets the slots from `length` on."""
        if length < self.count:
            self.set_length(max(length, 0))
            self._last = None

    def select(self, rows: torch.Tensor) -> None:
        """Takes rows by index: beams, finished rows of a batch."""
        rows = rows.to(self.records.device)
        self.records = self.records.index_select(0, rows)
        if self.tally is not None:
            self.tally.select(rows)
        self._last = None

    def repeat(self, times: int) -> None:
        """Repeats each row in place."""
        self.records = self.records.repeat_interleave(times, 0)
        if self.tally is not None:
            self.tally.repeat(times)
        self._last = None

    def reset(self) -> None:
        """Back to an empty batch."""
        self.set_length(0)
        self._last = self._prompt_length = None
        self.virtual_tokens = 0
        if self._opening is not None:
            self._opening.fill_(-1)
        if self.tally is not None:
            self.tally.zero_()


def append_on_host(
    state: FlowState,
    ids: torch.Tensor,
    padding: torch.Tensor | None,
    prompt_length: int | None,
    cached: torch.Tensor | None,
    mask: Any,
) -> "tuple[torch.Tensor, list[list[list[int]]]]":
    """Labels tokens on the host; everything that the host does not know yet comes with one read.

    Args:
        state: The state, which is followed to `cached` first.
        ids: int64 [B, q].
        padding: bool [B, q], or None.
        prompt_length: As for `FlowState.append`.
        cached: Tokens in the cache, one number on the device, where it has not been followed.
        mask: As for `FlowState.follow`.
    """
    read = state.read(ids, padding, cached)
    if read.cached is not None:
        state.follow(read.cached, mask)
    return state.append(read, prompt_length, ids.device)


append_uncompiled = torch.compiler.disable(
    append_on_host, reason="StepFlow labels the tokens of a prompt on the host: compile decode steps only"
)


def _tensor_of(records: list[list[list[int]]]) -> torch.Tensor:
    """Records of the host as a tensor, int32 [B, q, FIELDS], several times faster than `torch.tensor` makes it."""
    flat = array("i", chain.from_iterable(chain.from_iterable(records)))
    return torch.frombuffer(flat, dtype=torch.int32).view(len(records), -1, FIELDS)


def _unseen(before: list[int], slot: int, is_padding: bool) -> list[int]:
    """The record of a token that StepFlow has not seen: padding, or question."""
    record = before.copy()
    record[Field.SEGMENT] = record[Field.TRIGGER] = record[Field.ACTIVE] = 0
    record[Field.STEP] = record[Field.TOKEN] = record[Field.LABEL] = -1
    if not is_padding:
        record[Field.LABEL] = 3 * record[Field.ROUND]
        record[Field.COUNT] += 1
        record[Field.FIRST_SLOT] = slot if record[Field.FIRST_SLOT] < 0 else record[Field.FIRST_SLOT]
    return record


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
        return _rebuild_cache, (type(self).__bases__[1], self.__dict__)


def _rebuild_cache(kind: Any, attributes: dict[str, Any]) -> Any:
    cache = kind.__new__(kind)
    cache.__dict__.update(attributes)
    put_state_on(cache, attributes["stepflow_state"])
    return cache


_CARRIERS: dict[type, type] = {}


def state_of(cache: Any) -> FlowState | None:
    """The state that a cache carries, or None."""
    return getattr(cache, "stepflow_state", None)


def put_state_on(cache: Any, state: FlowState) -> None:
    """Makes a cache carry a state; the cache keeps its type's name and behaviour."""
    kind = type(cache)
    if not isinstance(cache, FlowCacheMixin):
        if kind not in _CARRIERS:
            _CARRIERS[kind] = type(kind.__name__, (FlowCacheMixin, kind), {"__module__": kind.__module__})
        cache.__class__ = _CARRIERS[kind]
    cache.stepflow_state = state


def slots_of(cache: Any) -> int:
    """Slots of a cache with static shapes."""
    lengths = [layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len")]
    windows = [layer for layer in cache.layers if getattr(layer, "is_sliding", False)]
    if len(windows) == len(lengths):
        return 1 << 16  # sliding layers alone say nothing of the trace's length
    return max(lengths)


def padding_of(mask: Any, ids: torch.Tensor, before: "int | torch.Tensor") -> torch.Tensor | None:
    """Which of the new tokens are padding, bool [B, q], or None if none is.

    A 2D mask says it outright (it may be longer than the tokens so far); in a 4D one padding is a token that does not
    see itself.
    """
    if isinstance(mask, dict):
        masks = [mask.get("full_attention"), *mask.values()]
        mask = next((value for value in masks if value is not None), None)
    if not isinstance(mask, torch.Tensor):
        return None
    queries = ids.shape[1]
    if mask.ndim == 2:
        last = mask.shape[1] - queries
        if isinstance(before, int):
            start = min(before, last)
            return (mask[:, start : start + queries] == 0).to(ids.device)
        slots = torch.arange(queries, device=mask.device) + before.to(mask.device).clamp(max=last)
        return (mask.index_select(1, slots) == 0).to(ids.device)
    if mask.ndim != 4:
        return None
    keys = mask.shape[-1]
    slots = torch.arange(queries, device=mask.device) + before
    offset = torch.clamp(torch.as_tensor(before + queries - keys, device=mask.device), min=0)
    own = mask[:, 0].gather(2, (slots - offset)[None, :, None].expand(mask.shape[0], -1, 1))[..., 0]
    seen = own if mask.dtype == torch.bool else own > torch.finfo(mask.dtype).min / 2
    return (~seen).expand(ids.shape[0], -1).to(ids.device)
