"""The step detector: the record that describes one token, and how one more token advances it.

Source: docs/method.md, "Steps". Everything about a token depends on the tokens up to it alone, so a
finished trace, a prefill and a token-by-token decode give the same labels.

A *record* is the row of integers (`Field`) that describes one token and is also the whole state of the detector after
it. Keeping the records of all cached tokens makes rollback, beams and batches plain tensor operations.

The rules are written once, in `_Detector`, over columns that are plain integers (a finished piece of text, on the
host) or tensors (one token a row, on any device, without a host read). The two differ in how a value is chosen by a
condition, how a table is read, and whether a condition may hold: integers skip what cannot change anything, tensors
compute everything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .configuration_stepflow import read_settings
from .errors import StepFlowConfigError
from .settings import ANSWER_PHRASES, StepFlowSettings
from .step_rules import (
    CLOSES_WITH_BAR,
    HAS_BODY,
    HAS_CONTENT,
    HAS_WORD,
    INSIDE_SUMMARY,
    INSIDE_THINKING,
    LEADS_SUMMARY,
    LEADS_THINKING,
    OPENS_WITH_BAR,
    STATE_MASK,
    RuleTable,
    build_rule_table,
    long_enough,
)
from .token_text import (
    SUMMARY_START,
    THINKING_START,
    TOOL_END,
    TOOL_START,
    MarkerTable,
    TokenText,
    build_marker_table,
)

QUESTION, THINKING, SUMMARY, ASIDE = range(4)
SEGMENT_NAMES = ("question", "thinking", "summary")


class Field:
    """Columns of a record, as plain integers, which compiled code takes as constants.

    Slots are positions in the KV cache (padding included); -1 means none.

    The first block is what attention reads, the second is the detector's own state.
    """

    LABEL = 0  # 3 * round + segment; -1 for padding. Rounds count from 1, 0 is before any thinking
    STEP = 1  # step inside the round, 0 for question, -1 for control tokens, padding and text in no step
    TRIGGER = 2  # 1 where SMI injects
    ACTIVE = 3  # 1 where OEB applies
    THINKING_SLOT = 4  # first slot of this round's thinking
    SUMMARY_SLOT = 5  # first slot of this round's summary
    STEP_SLOT = 6  # first slot of the current or last step of this round
    PREVIOUS_START = 7  # slots of the step before it: [start, end), and how many of them belong to it
    PREVIOUS_END = 8
    PREVIOUS_COUNT = 9
    FIRST_SLOT = 10  # first slot that is not padding
    HAS_ASIDE = 11  # 1 if the round's thinking holds tool results, so that its keys are not one range
    COUNT = 12  # tokens up to and including this one, padding left out
    TOKEN = 13  # the token id, -1 for padding

    RULE_STATE = 14
    MARKER_STATE = 15
    SEGMENT = 16
    RETURN_SEGMENT = 17
    IN_HEADER = 18
    LENGTH = 19
    BLANKS = 20
    FLAGS = 21
    STEP_OPEN = 22
    STEPS = 23
    THINKING_STEPS = 24
    STEP_END = 25
    STEP_COUNT = 26
    ROUND = 27


FIELDS = Field.ROUND + 1

# What a new round starts with: -1 and 0.
UNSET_BY_ROUND = (Field.SUMMARY_SLOT, Field.STEP_SLOT, Field.PREVIOUS_START, Field.PREVIOUS_END)
CLEARED_BY_ROUND = (
    Field.STEPS, Field.THINKING_STEPS, Field.HAS_ASIDE, Field.STEP_END, Field.STEP_COUNT, Field.PREVIOUS_COUNT,
    Field.IN_HEADER,
)  # fmt: skip


def empty_record() -> list[int]:
    """The detector before the first token."""
    record = [0] * FIELDS
    for name in (Field.LABEL, Field.STEP, Field.THINKING_SLOT, Field.SUMMARY_SLOT, Field.STEP_SLOT, Field.FIRST_SLOT):
        record[name] = -1
    record[Field.PREVIOUS_START] = record[Field.PREVIOUS_END] = record[Field.TOKEN] = -1
    return record


class Feature:
    """Columns of the per-token features."""

    RULE_ROW = 0
    MARKER_ROW = 1
    BEFORE = 2
    LENGTH = 3
    AFTER = 4
    FLAGS = 5
    SPLIT_ROW = 6
    BYTES = 7
    CONTROL = 8
    SPECIAL = 9
    END_OF_TURN = 10
    OPENS_MESSAGE = 11


FEATURES = Feature.OPENS_MESSAGE + 1

# One column of a record and a condition on it: an integer and a bool, or a tensor [B] of either.
Column = Any
Condition = Any


class _Detector:
    """The rules of the detector over the tables of a vocabulary.

    Args:
        vocabulary: The vocabulary.
        device: Where its tables are needed as tensors; None for plain integers.
    """

    def __init__(self, vocabulary: "StepVocabulary", device: torch.device | None):
        rules, markers = vocabulary.rules, vocabulary.markers
        self.settings = vocabulary.settings
        self.size = vocabulary.size
        self.has_splits = rules.split.shape[0] > 1
        self.has_headers = markers.message_open is not None
        tables = (
            rules.transition, rules.split_variant, rules.split, markers.next_state, markers.found, markers.depth,
        )  # fmt: skip
        kept: list[Any] = [table.tolist() if device is None else table.to(device) for table in tables]
        self.transition, self.split_variant, self.split, self.marker_next, self.marker_found, self.marker_depth = kept
        self.where: Callable[..., Column]
        self.lookup: Callable[..., Column]
        self.possible: Callable[[Condition], bool]
        self.number: Callable[[Condition], Column]
        if device is None:
            self.known: dict[int, list[int]] = {}  # a text uses a small part of a vocabulary
            self.features = vocabulary.features
            self.where, self.lookup, self.possible, self.number = _choose, _read, bool, int
        else:
            self.features = vocabulary.features.to(device)
            self.tables = [self.features, *kept]
            self.where, self.lookup, self.possible, self.number = torch.where, _gather, _always, torch.Tensor.long

    def walk(self, record: list[int], token: int, slot: int, is_padding: bool, opening: int | None) -> list[int]:
        """The record of one more token, in integers."""
        at = record.copy()
        if is_padding:
            at[: Field.THINKING_SLOT] = [-1, -1, 0, 0]
            at[Field.TOKEN] = -1
            return at
        feature = self.known.get(token)
        if feature is None:
            index = token if 0 <= token < self.size else self.size
            feature = self.known[token] = self.features[index].tolist()
        self._advance(at, token, feature, slot, opening)
        return at

    def advance(
        self,
        record: torch.Tensor,
        ids: torch.Tensor,
        slot: "int | torch.Tensor",
        padding: torch.Tensor | None,
        opening: "int | torch.Tensor | None",
    ) -> torch.Tensor:
        """The records of one more token a row, in tensors; see `StepVocabulary.advance`."""
        known = torch.where((ids >= 0) & (ids < self.size), ids, self.size)
        at = list(record.unbind(1))
        self._advance(at, ids, self.features[known].unbind(1), slot, opening)
        after = torch.stack(at, 1)
        if padding is None:
            return after
        hidden = record.clone()
        hidden[:, : Field.THINKING_SLOT] = 0
        hidden[:, : Field.TRIGGER] = hidden[:, Field.TOKEN] = -1
        return torch.where(padding[:, None], hidden, after)

    def _advance(self, at: list[Column], token: Column, feature: Sequence[Column], slot: Column, opening: Any) -> None:
        """Changes the columns of a record into those of the next token's."""
        where, nothing = self.where, token * 0
        at[Field.TOKEN] = token
        at[Field.COUNT] = at[Field.COUNT] + 1
        at[Field.FIRST_SLOT] = where(at[Field.FIRST_SLOT] < 0, slot, at[Field.FIRST_SLOT])
        if opening is not None:
            slots = nothing + slot
            at[Field.SEGMENT] = where(slots < opening, QUESTION, at[Field.SEGMENT])
            opens = slots == opening
            if self.possible(opens):
                self._open_round(at, opens, slots)
        row, before = feature[Feature.MARKER_ROW], at[Field.MARKER_STATE]
        found = self.lookup(self.marker_found, row, before)
        at[Field.MARKER_STATE] = self.lookup(self.marker_next, row, before)
        marks = found > 0
        if self.settings.implicit_thinking:  # the summary starts at a pattern, which is text
            marks = marks & (found != SUMMARY_START)
        control = (feature[Feature.CONTROL] > 0) | (at[Field.IN_HEADER] > 0) | marks
        segment = at[Field.SEGMENT]
        thinking = segment == THINKING
        inside = thinking | (segment == SUMMARY)
        at[Field.LABEL] = 3 * at[Field.ROUND] + where(segment == ASIDE, 0, segment)
        at[Field.STEP] = where(inside | control, -1, nothing)
        at[Field.TRIGGER] = at[Field.ACTIVE] = nothing
        content, stops = inside & (control ^ True), inside & control
        if self.possible(content):
            self._read_content(at, feature, slot, content, thinking)
        if self.possible(stops):
            self._restart(at, stops)
        turns = (found > 0) | (feature[Feature.END_OF_TURN] > 0)
        if self.has_headers:
            turns = turns | (feature[Feature.SPECIAL] > 0) | (feature[Feature.OPENS_MESSAGE] > 0)
        if self.possible(turns):
            self._turn(at, found, feature, slot + 1)

    def _read_content(
        self, at: list[Column], feature: Sequence[Column], slot: Column, content: Condition, thinking: Condition
    ) -> None:
        """Sentence, boundary and step of the rows whose token is content."""
        where, possible, number = self.where, self.possible, self.number
        state = at[Field.RULE_STATE]
        code = self.lookup(self.transition, feature[Feature.RULE_ROW], state)
        at[Field.RULE_STATE] = where(content, code & STATE_MASK, state)
        deliberate = content & thinking
        part = feature[Feature.BEFORE : Feature.FLAGS + 1]
        boundary = deliberate & ((code & LEADS_THINKING) > 0)
        if possible(boundary):
            leads, boundary = boundary, boundary & self._is_whole(at)
            self._clear_sentence(at, leads)
        if self.has_splits:
            splits = deliberate & ((code & INSIDE_THINKING) > 0)
            if possible(splits):
                variant = self.lookup(self.split_variant, feature[Feature.SPLIT_ROW], state)
                split = self.split[variant] if self.lookup is _read else self.split[variant].unbind(1)
                self._absorb(at, split[:4], splits)
                boundary = boundary | (splits & (self._is_whole(at) | (split[8] > 0)))
                self._clear_sentence(at, splits)
                part = [where(splits, inner, whole) for inner, whole in zip(split[4:8], part, strict=True)]
        boundary = boundary | (content & (thinking ^ True) & ((code & (LEADS_SUMMARY | INSIDE_SUMMARY)) > 0))
        if possible(deliberate):
            self._absorb(at, part, deliberate)

        is_open = at[Field.STEP_OPEN] > 0
        has_text = content & (feature[Feature.LENGTH] > 0)
        closed = boundary | (is_open ^ True)
        free = content
        if not self.settings.implicit_thinking:  # text that may be the beginning of a marker waits
            depth = self.marker_depth[at[Field.MARKER_STATE]]
            held = has_text & (depth > 0) & (depth >= feature[Feature.BYTES]) & ((depth >= 2) | closed)
            free = content & (held ^ True)
            is_open = is_open & ((held & closed) ^ True)
        starts = has_text & closed & free
        if possible(starts):
            self._start_step(at, starts, thinking, slot)
        is_open = is_open | starts
        at[Field.STEP_OPEN] = number(is_open)
        member = free & is_open
        at[Field.STEP] = where(member, at[Field.STEPS], at[Field.STEP])
        at[Field.STEP_END] = where(member, slot + 1, at[Field.STEP_END])
        at[Field.STEP_COUNT] = at[Field.STEP_COUNT] + number(member)
        active = free & (thinking | (at[Field.THINKING_STEPS] > 0))
        if self.settings.oeb_span is not None:
            active = active & member & (slot - at[Field.STEP_SLOT] < self.settings.oeb_span)
        at[Field.ACTIVE] = number(active)

    def _is_whole(self, at: list[Column]) -> Condition:
        return long_enough(at[Field.LENGTH], at[Field.FLAGS], self.settings.min_step_chars)

    def _start_step(self, at: list[Column], starts: Condition, thinking: Condition, slot: Column) -> None:
        where, number = self.where, self.number
        first_of_summary = at[Field.STEPS] == at[Field.THINKING_STEPS]
        may_inject = (at[Field.THINKING_STEPS] > 0) & (thinking | first_of_summary)
        at[Field.TRIGGER] = number(starts & may_inject)
        at[Field.PREVIOUS_START] = where(starts, at[Field.STEP_SLOT], at[Field.PREVIOUS_START])
        at[Field.PREVIOUS_END] = where(starts, at[Field.STEP_END], at[Field.PREVIOUS_END])
        at[Field.PREVIOUS_COUNT] = where(starts, at[Field.STEP_COUNT], at[Field.PREVIOUS_COUNT])
        at[Field.STEPS] = at[Field.STEPS] + number(starts)
        at[Field.THINKING_STEPS] = at[Field.THINKING_STEPS] + number(starts & thinking)
        at[Field.STEP_SLOT] = where(starts, slot, at[Field.STEP_SLOT])
        at[Field.STEP_COUNT] = where(starts, 0, at[Field.STEP_COUNT])

    def _turn(self, at: list[Column], found: Column, feature: Sequence[Column], after: Column) -> None:
        """Changes of segment that the token brings about for the tokens after it."""
        where, segment = self.where, at[Field.SEGMENT]
        aside = segment == ASIDE
        inner = where(aside, at[Field.RETURN_SEGMENT], segment)
        heard = (aside ^ True) | (at[Field.IN_HEADER] > 0)  # else a tool's result quotes it
        thinks = heard & (found == THINKING_START)
        resumes, opens = thinks & (inner == THINKING), thinks & (inner != THINKING)
        sums_up = heard & (found == SUMMARY_START) & (segment != QUESTION)
        tool_opens = (found == TOOL_START) & ((segment == THINKING) | (segment == SUMMARY))
        tool_ends = (found == TOOL_END) & aside
        taken = resumes | opens | sums_up | tool_opens | tool_ends
        ends = (taken ^ True) & (feature[Feature.END_OF_TURN] > 0)
        if self.has_headers:
            ends = ends & (aside ^ True)
        leaves_header = resumes | sums_up | ends
        if self.has_headers:
            left = (taken | ends) ^ True
            header = left & (at[Field.IN_HEADER] > 0) & (feature[Feature.OPENS_MESSAGE] > 0)
            enters = left & (header ^ True) & (feature[Feature.SPECIAL] > 0) & (segment != QUESTION)
            tool_opens = tool_opens | header
            leaves_header = leaves_header | header
            at[Field.IN_HEADER] = where(enters, 1, at[Field.IN_HEADER])
        at[Field.RETURN_SEGMENT] = where(tool_opens, inner, at[Field.RETURN_SEGMENT])
        at[Field.HAS_ASIDE] = where(tool_opens, 1, at[Field.HAS_ASIDE])
        at[Field.SUMMARY_SLOT] = where(sums_up & (inner == THINKING), after, at[Field.SUMMARY_SLOT])
        segment = where(resumes | tool_ends, inner, segment)
        segment = where(sums_up, SUMMARY, segment)
        segment = where(tool_opens, ASIDE, segment)
        at[Field.SEGMENT] = where(ends, QUESTION, segment)
        at[Field.IN_HEADER] = where(leaves_header, 0, at[Field.IN_HEADER])
        self._restart(at, resumes | sums_up | tool_ends)
        if self.possible(opens):
            self._open_round(at, opens, after)

    def _open_round(self, at: list[Column], opens: Condition, slot: Column) -> None:
        at[Field.ROUND] = at[Field.ROUND] + self.number(opens)
        at[Field.SEGMENT] = self.where(opens, THINKING, at[Field.SEGMENT])
        at[Field.THINKING_SLOT] = self.where(opens, slot, at[Field.THINKING_SLOT])
        for name in UNSET_BY_ROUND:
            at[name] = self.where(opens, -1, at[name])
        for name in CLEARED_BY_ROUND:
            at[name] = self.where(opens, 0, at[name])
        self._restart(at, opens)

    def _restart(self, at: list[Column], restarts: Condition) -> None:
        """Begins new text: no step is open and no sentence begun."""
        keep = self.number(restarts ^ True)
        at[Field.RULE_STATE] = at[Field.RULE_STATE] * keep
        at[Field.STEP_OPEN] = at[Field.STEP_OPEN] * keep
        self._clear_sentence(at, restarts)

    def _clear_sentence(self, at: list[Column], clears: Condition) -> None:
        keep = self.number(clears ^ True)
        for name in (Field.LENGTH, Field.BLANKS, Field.FLAGS):
            at[name] = at[name] * keep

    def _absorb(self, at: list[Column], part: Sequence[Column], absorbs: Condition) -> None:
        """Adds a piece (blanks before, length, blanks after, flags) to the sentence of some rows."""
        where = self.where
        before, length, after, flags = part
        old, begun = at[Field.FLAGS], at[Field.LENGTH] > 0
        has_text, blank = absorbs & (length > 0), absorbs & (length == 0)
        grown = at[Field.LENGTH] + length + where(begun, at[Field.BLANKS] + before, 0)
        kept = (old | flags) & (HAS_WORD | HAS_CONTENT)
        kept = kept | (where(begun, old, flags) & OPENS_WITH_BAR)
        kept = kept | (where((flags & HAS_BODY) > 0, flags, old) & CLOSES_WITH_BAR)
        at[Field.BLANKS] = where(has_text, after, at[Field.BLANKS] + where(blank, before, 0))
        at[Field.LENGTH] = where(has_text, grown, at[Field.LENGTH])
        at[Field.FLAGS] = where(has_text, kept, old)


def _choose(condition: bool, value: int, other: int) -> int:
    return value if condition else other


def _read(table: list[list[int]], row: int, column: int) -> int:
    return table[row][column]


def _gather(table: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    return table[row, column]


def _always(condition: torch.Tensor) -> bool:
    return True


@dataclass
class StepVocabulary:
    """The step rules compiled for a tokenizer: made once, used for any number of traces.

    Attributes:
        settings: The step settings it was built for.
        features: int64 [V + 1, FEATURES]; the last row stands for unknown ids.
        rules: Transitions of the sentence rules.
        markers: Transitions of the marker automaton.
        marker_ids: How the tokenizer writes the markers of each kind (`token_text.THINKING_START` ...).

    Example:
        >>> from hf_stepflow import StepVocabulary
        >>> vocabulary = StepVocabulary.from_tokenizer(tokenizer, {"step_rule": "paragraph"})
    """

    settings: StepFlowSettings
    features: torch.Tensor
    rules: RuleTable
    markers: MarkerTable
    marker_ids: dict[int, list[list[int]]]
    _detectors: dict[torch.device | None, _Detector] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, config: Any = None, *, end_of_turn_ids: Sequence[int] | None = None
    ) -> "StepVocabulary":
        """Reads a tokenizer once.

        Args:
            tokenizer: A `PreTrainedTokenizerBase` (byte-level BPE, SentencePiece / Metaspace, WordPiece, words).
            config: A `StepFlowConfig`, settings, a dict or a path; None for the defaults.
            end_of_turn_ids: Tokens that close a round; None takes the tokenizer's eos token.

        Raises:
            StepFlowConfigError: The tokenizer cannot write a marker.
        """
        settings = read_settings(config)
        if tokenizer is None:
            raise StepFlowConfigError(
                "StepFlow needs the model's tokenizer to find steps, got None", hint="pass tokenizer=..."
            )
        text = TokenText.from_tokenizer(tokenizer)
        kinds = {
            THINKING_START: settings.markers("thinking_start"),
            SUMMARY_START: settings.markers("summary_start"),
            TOOL_START: settings.markers("tool_start"),
            TOOL_END: settings.markers("tool_end"),
        }
        if settings.implicit_thinking:
            kinds[THINKING_START] = []
            if kinds[SUMMARY_START] == list(ANSWER_PHRASES):  # a default asks no tokenizer for more than it can write
                kinds[SUMMARY_START] = [text for text in ANSWER_PHRASES if _spell(tokenizer, text) is not None]
        marker_ids = {kind: [_spelled(tokenizer, marker) for marker in kinds[kind]] for kind in kinds}
        markers = _read_markers(tokenizer, text, kinds, marker_ids)
        if end_of_turn_ids is None:
            end_of_turn_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ends = [index for index in end_of_turn_ids if 0 <= index < len(text.pieces)]
        special = [index for index, is_control in enumerate(text.control) if is_control]
        control = sorted({*special, *markers.atoms, *ends})
        pieces = text.pieces.copy()
        for index in control:
            pieces[index] = b""
        rules = build_rule_table(pieces, settings.step_rule, settings.min_step_chars, text.guessed_space)
        features = torch.zeros(len(pieces) + 1, FEATURES, dtype=torch.long)
        features[:, Feature.RULE_ROW] = rules.row
        features[:, Feature.MARKER_ROW] = markers.row
        features[:, Feature.BEFORE : Feature.FLAGS + 1] = rules.parts
        features[:, Feature.SPLIT_ROW] = rules.split_row
        features[:-1, Feature.BYTES] = torch.tensor([len(piece.strip(b" \t\r\f\v\n")) for piece in pieces])
        features[control, Feature.CONTROL] = 1
        features[special, Feature.SPECIAL] = 1
        features[ends, Feature.END_OF_TURN] = 1
        if markers.message_open is not None:
            features[markers.message_open, Feature.OPENS_MESSAGE] = 1
        return cls(settings, features, rules, markers, marker_ids)

    @property
    def size(self) -> int:
        """Number of known token ids."""
        return self.features.shape[0] - 1

    def scan(
        self,
        ids: Sequence[int],
        record: list[int] | None = None,
        *,
        start: int = 0,
        padding: Sequence[bool] | None = None,
        prompt_length: int | None = None,
    ) -> list[list[int]]:
        """The records of a finished piece of one row.

        Args:
            ids: Token ids.
            record: The record before them, None at the start of a trace.
            start: Slot of the first of them.
            padding: Which of them are padding.
            prompt_length: Slot at which implicit thinking starts, None for never.
        """
        walk = self._detector(None).walk
        record = empty_record() if record is None else record
        records = []
        if not self.settings.implicit_thinking:
            prompt_length = None
        for offset, token in enumerate(ids):
            record = walk(record, token, start + offset, padding is not None and padding[offset], prompt_length)
            records.append(record)
        return records

    def advance(
        self,
        record: torch.Tensor,
        ids: torch.Tensor,
        slot: "int | torch.Tensor",
        padding: torch.Tensor | None = None,
        prompt_length: "int | torch.Tensor | None" = None,
    ) -> torch.Tensor:
        """The records of one more token per row, in tensors only.

        Args:
            record: int64 [B, FIELDS], the records before.
            ids: int64 [B].
            slot: Slot of the tokens.
            padding: bool [B], rows whose token is padding.
            prompt_length: Slot (or [B] slots) at which implicit thinking starts, None for never.

        Returns:
            int64 [B, FIELDS].
        """
        if not self.settings.implicit_thinking:
            prompt_length = None
        return self._detector(ids.device).advance(record, ids, slot, padding, prompt_length)

    def label(
        self,
        kernel: Callable[..., torch.Tensor],
        records: torch.Tensor,
        ids: torch.Tensor,
        slot: "int | torch.Tensor",
        padding: torch.Tensor | None,
        opening: "int | torch.Tensor | None",
    ) -> torch.Tensor:
        """As `advance`, for a few tokens a row by one kernel, which writes to the records in place.

        Args:
            kernel: The operator (`Kernels.label`).
            records: int32 [B, T, FIELDS] of all slots.
            ids: int64 [B, q].
            slot: Slot of the first token.
            padding: bool [B, q], tokens that are padding, or None.
            opening: As `prompt_length` of `advance`.
        """
        settings, is_known = self.settings, isinstance(slot, int)
        on_device = isinstance(opening, torch.Tensor)
        return kernel(
            records,
            ids,
            padding,
            None if is_known else slot,
            slot if is_known else 0,
            opening if on_device else None,
            -1 if on_device or opening is None else opening,
            self._detector(ids.device).tables,
            self.markers.message_open is not None,
            settings.implicit_thinking,
            settings.min_step_chars,
            -1 if settings.oeb_span is None else settings.oeb_span,
        )

    def _detector(self, device: torch.device | None) -> _Detector:
        if device not in self._detectors:
            self._detectors[device] = _Detector(self, device)
        return self._detectors[device]


def _read_markers(
    tokenizer: Any, text: TokenText, kinds: dict[int, list[str]], marker_ids: dict[int, list[list[int]]]
) -> MarkerTable:
    if text.guessed_space:
        kinds = {kind: [text.join(ids) for ids in spelled] for kind, spelled in marker_ids.items()}
    atoms = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    markers = build_marker_table(kinds, text.pieces, atoms)
    for kind, texts in kinds.items():
        for marker, ids in zip(texts, marker_ids[kind], strict=True):
            if markers.read(ids) != kind:
                raise _unwritable(marker)
    return markers


def _spell(tokenizer: Any, marker: str) -> list[int] | None:
    """The ids of a marker; None if the tokenizer cannot write it."""
    ids = tokenizer.encode(marker, add_special_tokens=False)
    is_unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
    return None if not ids or is_unknown else ids


def _spelled(tokenizer: Any, marker: str) -> list[int]:
    ids = _spell(tokenizer, marker)
    if ids is None:
        raise _unwritable(marker)
    return ids


def _unwritable(marker: str) -> StepFlowConfigError:
    return StepFlowConfigError(
        f"the tokenizer cannot write the marker {marker!r}",
        hint="set thinking_start and summary_start to the markers of this model, or implicit_thinking=True",
    )
