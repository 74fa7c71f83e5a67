"""The step detector on plain integers, one token at a time: the route for prefills and finished traces."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .markers import NONE, SUMMARY_START, THINKING_START, TOOL_END, TOOL_START
from .step_record import ASIDE, CLEARED_BY_ROUND, QUESTION, SUMMARY, THINKING, UNSET_BY_ROUND, Feature, Field
from .step_tables import (
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
    long_enough,
)

if TYPE_CHECKING:
    from .steps import StepVocabulary


class _Features(dict[int, list[int]]):
    """The features of the tokens met so far: a text uses a small part of a vocabulary."""

    def __init__(self, features: torch.Tensor):
        super().__init__()
        self.tensor = features

    def __missing__(self, token: int) -> list[int]:
        self[token] = row = self.tensor[token].tolist()
        return row


class StepWalk:
    """The detector on plain integers, one token at a time."""

    def __init__(self, vocabulary: "StepVocabulary"):
        self.settings = vocabulary.settings
        self.size = vocabulary.size
        self.features = _Features(vocabulary.features)
        self.transition = vocabulary.rules.transition.tolist()
        self.split_variant = vocabulary.rules.split_variant.tolist()
        self.split = vocabulary.rules.split.tolist()
        self.marker_next = vocabulary.markers.next_state.tolist()
        self.marker_found = vocabulary.markers.found.tolist()
        self.marker_depth = vocabulary.markers.depth.tolist()
        self.has_headers = vocabulary.markers.message_open is not None

    def step(self, before: list[int], token: int, slot: int, padding: bool, prompt_length: int | None) -> list[int]:
        """The record of one more token.

        Args:
            before: the record before it.
            token: its id.
            slot: its slot.
            padding: whether it is padding.
            prompt_length: slot at which implicit thinking starts, None for never.
        """
        record = before.copy()
        record[Field.TRIGGER] = record[Field.ACTIVE] = 0
        record[Field.STEP] = -1
        if padding:
            record[Field.LABEL] = record[Field.TOKEN] = -1
            return record
        record[Field.TOKEN] = token
        record[Field.COUNT] += 1
        if record[Field.FIRST_SLOT] < 0:
            record[Field.FIRST_SLOT] = slot
        if prompt_length is not None:
            if slot < prompt_length and record[Field.SEGMENT]:
                record[Field.SEGMENT] = QUESTION
            elif slot == prompt_length:
                self._open_round(record, slot)
        feature = self.features[token if 0 <= token < self.size else self.size]
        marker_state = record[Field.MARKER_STATE]
        found = self.marker_found[feature[Feature.MARKER_ROW]][marker_state]
        marker_state = record[Field.MARKER_STATE] = self.marker_next[feature[Feature.MARKER_ROW]][marker_state]
        pattern = self.settings.implicit_thinking and found == SUMMARY_START
        control = bool(feature[Feature.CONTROL] or record[Field.IN_HEADER] or (found and not pattern))
        segment = record[Field.SEGMENT]
        record[Field.LABEL] = 3 * record[Field.ROUND] + (0 if segment == ASIDE else segment)
        if segment in (THINKING, SUMMARY):
            if control:
                _restart(record)
            else:
                self._read_content(record, feature, slot, self.marker_depth[marker_state])
        elif not control:
            record[Field.STEP] = 0
        self._turn(record, found, feature, slot)
        return record

    def _read_content(self, record: list[int], feature: list[int], slot: int, depth: int) -> None:
        thinking = record[Field.SEGMENT] == THINKING
        state = record[Field.RULE_STATE]
        code = self.transition[feature[Feature.RULE_ROW]][state]
        record[Field.RULE_STATE] = code & STATE_MASK
        minimum = self.settings.min_step_chars
        if thinking:
            boundary = False
            part = feature[Feature.BEFORE : Feature.FLAGS + 1]
            if code & LEADS_THINKING:
                boundary = long_enough(record[Field.LENGTH], record[Field.FLAGS], minimum)
                _clear_sentence(record)
            if code & INSIDE_THINKING:
                split = self.split[self.split_variant[feature[Feature.SPLIT_ROW]][state]]
                _absorb(record, split[:4])
                boundary |= long_enough(record[Field.LENGTH], record[Field.FLAGS], minimum) or bool(split[8])
                _clear_sentence(record)
                part = split[4:8]
            _absorb(record, part)
        else:
            boundary = bool(code & (LEADS_SUMMARY | INSIDE_SUMMARY))
        has_text = feature[Feature.LENGTH] > 0
        closed = boundary or not record[Field.STEP_OPEN]
        held = has_text and depth > 0 and depth >= feature[Feature.BYTES] and (depth >= 2 or closed)
        held = held and not self.settings.implicit_thinking
        if held:
            record[Field.STEP_OPEN] = int(not closed)
        elif has_text and closed:
            self._start_step(record, slot, thinking)
        if record[Field.STEP_OPEN] and not held:
            record[Field.STEP] = record[Field.STEPS]
            record[Field.STEP_END] = slot + 1
            record[Field.STEP_COUNT] += 1
        span = self.settings.oeb_span
        in_span = span is None or (record[Field.STEP] > 0 and slot - record[Field.STEP_SLOT] < span)
        bridged = thinking or record[Field.THINKING_STEPS] > 0
        record[Field.ACTIVE] = int(bridged and in_span and not held)

    @staticmethod
    def _start_step(record: list[int], slot: int, thinking: bool) -> None:
        first_of_summary = record[Field.STEPS] == record[Field.THINKING_STEPS]
        record[Field.TRIGGER] = int(record[Field.THINKING_STEPS] > 0 and (thinking or first_of_summary))
        record[Field.PREVIOUS_START] = record[Field.STEP_SLOT]
        record[Field.PREVIOUS_END] = record[Field.STEP_END]
        record[Field.PREVIOUS_COUNT] = record[Field.STEP_COUNT]
        record[Field.STEPS] += 1
        record[Field.THINKING_STEPS] += int(thinking)
        record[Field.STEP_SLOT] = slot
        record[Field.STEP_COUNT] = 0
        record[Field.STEP_OPEN] = 1

    @staticmethod
    def _open_round(record: list[int], slot: int) -> None:
        record[Field.ROUND] += 1
        record[Field.SEGMENT] = THINKING
        record[Field.THINKING_SLOT] = slot
        for name in UNSET_BY_ROUND:
            record[name] = -1
        for name in CLEARED_BY_ROUND:
            record[name] = 0
        _restart(record)

    def _turn(self, record: list[int], found: int, feature: list[int], slot: int) -> None:
        """Changes of segment that the token brings about for the tokens after it."""
        segment = record[Field.SEGMENT]
        inner = record[Field.RETURN_SEGMENT] if segment == ASIDE else segment
        if segment == ASIDE and not record[Field.IN_HEADER] and found != TOOL_END:
            found = NONE  # what a tool's result quotes
        if found == THINKING_START:
            record[Field.IN_HEADER] = 0
            if inner == THINKING:
                record[Field.SEGMENT] = THINKING
                _restart(record)
            else:
                self._open_round(record, slot + 1)
        elif found == SUMMARY_START and segment != QUESTION:
            record[Field.IN_HEADER] = 0
            record[Field.SEGMENT] = SUMMARY
            if inner == THINKING:
                record[Field.SUMMARY_SLOT] = slot + 1
            _restart(record)
        elif found == TOOL_START and segment in (THINKING, SUMMARY):
            record[Field.RETURN_SEGMENT] = segment
            record[Field.SEGMENT] = ASIDE
            record[Field.HAS_ASIDE] = 1
        elif found == TOOL_END and segment == ASIDE:
            record[Field.SEGMENT] = record[Field.RETURN_SEGMENT]
            _restart(record)
        elif feature[Feature.END_OF_TURN] and segment != QUESTION and not (self.has_headers and segment == ASIDE):
            record[Field.SEGMENT] = QUESTION
            record[Field.IN_HEADER] = 0
        elif feature[Feature.OPENS_MESSAGE] and record[Field.IN_HEADER]:
            record[Field.RETURN_SEGMENT] = inner
            record[Field.SEGMENT] = ASIDE
            record[Field.HAS_ASIDE] = 1
            record[Field.IN_HEADER] = 0
        elif self.has_headers and feature[Feature.SPECIAL] and segment != QUESTION:
            record[Field.IN_HEADER] = 1


def _clear_sentence(record: list[int]) -> None:
    record[Field.LENGTH] = record[Field.BLANKS] = record[Field.FLAGS] = 0


def _restart(record: list[int]) -> None:
    """New text starts: no step is open and no sentence begun."""
    record[Field.RULE_STATE] = record[Field.STEP_OPEN] = 0
    _clear_sentence(record)


def _absorb(record: list[int], part: Sequence[int]) -> None:
    """Adds a piece (blanks before, length, blanks after, flags) to the sentence."""
    before, length, after, flags = part
    if length == 0:
        record[Field.BLANKS] += before
        return
    old = record[Field.FLAGS]
    begun = record[Field.LENGTH] > 0
    record[Field.LENGTH] += (record[Field.BLANKS] + before if begun else 0) + length
    record[Field.BLANKS] = after
    kept = (old | flags) & (HAS_WORD | HAS_CONTENT)
    kept |= (old if begun else flags) & OPENS_WITH_BAR
    kept |= (flags if flags & HAS_BODY else old) & CLOSES_WITH_BAR
    record[Field.FLAGS] = kept
