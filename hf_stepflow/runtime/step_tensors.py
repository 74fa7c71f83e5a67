"""The step detector in tensors, one token per row of a batch: the route for decode, compiled or not.

The same rules as `step_walk.StepWalk`, with every branch a `torch.where`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .configuration_stepflow import StepFlowSettings
from .markers import SUMMARY_START, THINKING_START, TOOL_END, TOOL_START
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
)

if TYPE_CHECKING:
    from .steps import StepVocabulary

Columns = list[torch.Tensor]
Slot = int | torch.Tensor


@dataclass(frozen=True)
class StepTensors:
    """The tables of a vocabulary on one device (shapes as in `RuleTable`, `MarkerTable`, `StepVocabulary`)."""

    settings: StepFlowSettings
    features: torch.Tensor
    transition: torch.Tensor
    split_variant: torch.Tensor
    split: torch.Tensor
    marker_next: torch.Tensor
    marker_found: torch.Tensor
    marker_depth: torch.Tensor
    has_splits: bool
    has_headers: bool

    @classmethod
    def of(cls, vocabulary: "StepVocabulary", device: torch.device) -> "StepTensors":
        """Copies the tables of a vocabulary to a device."""
        rules, markers = vocabulary.rules, vocabulary.markers
        return cls(
            vocabulary.settings,
            features=vocabulary.features.to(device),
            transition=rules.transition.to(device),
            split_variant=rules.split_variant.to(device),
            split=rules.split.to(device),
            marker_next=markers.next_state.to(device),
            marker_found=markers.found.to(device),
            marker_depth=markers.depth.to(device),
            has_splits=rules.split.shape[0] > 1,
            has_headers=markers.message_open is not None,
        )

    def advance(
        self,
        record: torch.Tensor,
        ids: torch.Tensor,
        slot: Slot,
        padding: torch.Tensor | None,
        prompt_length: Slot | None,
    ) -> torch.Tensor:
        """See `StepVocabulary.advance`."""
        size = self.features.shape[0] - 1
        feature = self.features[torch.where((ids >= 0) & (ids < size), ids, size)].unbind(1)
        at = list(record.unbind(1))
        at[Field.TOKEN] = ids
        at[Field.COUNT] = at[Field.COUNT] + 1
        at[Field.FIRST_SLOT] = torch.where(at[Field.FIRST_SLOT] < 0, slot, at[Field.FIRST_SLOT])
        if prompt_length is not None:
            zero = torch.zeros_like(ids)
            slots = zero + slot
            at[Field.SEGMENT] = torch.where(slots < prompt_length, QUESTION, at[Field.SEGMENT])
            self._open_round(at, slots == prompt_length, slots)
        cell = (feature[Feature.MARKER_ROW], at[Field.MARKER_STATE])
        found, at[Field.MARKER_STATE] = self.marker_found[cell], self.marker_next[cell]
        control = (feature[Feature.CONTROL] > 0) | (at[Field.IN_HEADER] > 0)
        if self.settings.implicit_thinking:
            control |= (found > 0) & (found != SUMMARY_START)
        else:
            control |= found > 0
        segment = at[Field.SEGMENT]
        thinking, summary = segment == THINKING, segment == SUMMARY
        inside = thinking | summary
        at[Field.LABEL] = 3 * at[Field.ROUND] + torch.where(segment == ASIDE, 0, segment)
        at[Field.STEP] = torch.where(inside | control, -1, 0)
        at[Field.TRIGGER] = at[Field.ACTIVE] = torch.zeros_like(ids)
        self._read_content(at, feature, slot, inside & ~control, thinking)
        _restart(at, inside & control)
        self._turn(at, found, feature, slot + 1)
        after = torch.stack(at, 1)
        if padding is None:
            return after
        hidden = record.clone()
        hidden[:, : Field.THINKING_SLOT] = 0
        hidden[:, : Field.TRIGGER] = hidden[:, Field.TOKEN] = -1
        return torch.where(padding[:, None], hidden, after)

    def _read_content(
        self, at: Columns, feature: tuple[torch.Tensor, ...], slot: Slot, content: torch.Tensor, thinking: torch.Tensor
    ) -> None:
        """Sentence, boundary and step of the rows whose token is content."""
        state = at[Field.RULE_STATE]
        code = self.transition[feature[Feature.RULE_ROW], state]
        at[Field.RULE_STATE] = torch.where(content, code & STATE_MASK, state)
        deliberate = content & thinking
        leads = deliberate & ((code & LEADS_THINKING) > 0)
        part = list(feature[Feature.BEFORE : Feature.FLAGS + 1])
        boundary = leads & self._long_enough(at)
        _clear_sentence(at, leads)
        if self.has_splits:
            splits = deliberate & ((code & INSIDE_THINKING) > 0)
            split = self.split[self.split_variant[feature[Feature.SPLIT_ROW], state]].unbind(1)
            _absorb(at, split[:4], splits)
            boundary |= splits & (self._long_enough(at) | (split[8] > 0))
            _clear_sentence(at, splits)
            part = [torch.where(splits, inner, whole) for inner, whole in zip(split[4:8], part, strict=True)]
        boundary |= content & ~thinking & ((code & (LEADS_SUMMARY | INSIDE_SUMMARY)) > 0)
        _absorb(at, part, deliberate)

        is_open = at[Field.STEP_OPEN] > 0
        has_text = content & (feature[Feature.LENGTH] > 0)
        closed = boundary | ~is_open
        if self.settings.implicit_thinking:
            held = torch.zeros_like(closed)
        else:
            depth = self.marker_depth[at[Field.MARKER_STATE]]
            held = has_text & (depth > 0) & (depth >= feature[Feature.BYTES]) & ((depth >= 2) | closed)
        starts = has_text & closed & ~held
        has_steps = at[Field.THINKING_STEPS] > 0
        may_inject = has_steps & (thinking | (at[Field.STEPS] == at[Field.THINKING_STEPS]))
        at[Field.TRIGGER] = (starts & may_inject).long()
        for old, new in (
            (Field.PREVIOUS_START, Field.STEP_SLOT),
            (Field.PREVIOUS_END, Field.STEP_END),
            (Field.PREVIOUS_COUNT, Field.STEP_COUNT),
        ):
            at[old] = torch.where(starts, at[new], at[old])
        at[Field.STEPS] = at[Field.STEPS] + starts.long()
        at[Field.THINKING_STEPS] = at[Field.THINKING_STEPS] + (starts & thinking).long()
        at[Field.STEP_SLOT] = torch.where(starts, slot, at[Field.STEP_SLOT])
        is_open = (is_open | starts) & ~(held & closed)
        at[Field.STEP_OPEN] = is_open.long()
        member = content & is_open & ~held
        at[Field.STEP] = torch.where(member, at[Field.STEPS], at[Field.STEP])
        at[Field.STEP_END] = torch.where(member, slot + 1, at[Field.STEP_END])
        at[Field.STEP_COUNT] = torch.where(starts, 0, at[Field.STEP_COUNT]) + member.long()
        active = content & ~held & (thinking | (at[Field.THINKING_STEPS] > 0))
        if self.settings.oeb_span is not None:
            active &= member & (slot - at[Field.STEP_SLOT] < self.settings.oeb_span)
        at[Field.ACTIVE] = active.long()

    def _long_enough(self, at: Columns) -> torch.Tensor:
        flags = at[Field.FLAGS]
        worded = (flags & (HAS_WORD | HAS_CONTENT)) == (HAS_WORD | HAS_CONTENT)
        bars = OPENS_WITH_BAR | CLOSES_WITH_BAR
        return (at[Field.LENGTH] >= self.settings.min_step_chars) & worded & ((flags & bars) != bars)

    def _turn(self, at: Columns, found: torch.Tensor, feature: tuple[torch.Tensor, ...], after: Slot) -> None:
        """Changes of segment that the token brings about for the tokens after it."""
        segment = at[Field.SEGMENT]
        inner = torch.where(segment == ASIDE, at[Field.RETURN_SEGMENT], segment)
        heard = (segment != ASIDE) | (at[Field.IN_HEADER] > 0)  # else a tool's result quotes it
        resumes = heard & (found == THINKING_START) & (inner == THINKING)
        opens = heard & (found == THINKING_START) & (inner != THINKING)
        sums_up = heard & (found == SUMMARY_START) & (segment != QUESTION)
        tool_opens = (found == TOOL_START) & ((segment == THINKING) | (segment == SUMMARY))
        tool_ends = (found == TOOL_END) & (segment == ASIDE)
        taken = resumes | opens | sums_up | tool_opens | tool_ends
        ends = ~taken & (feature[Feature.END_OF_TURN] > 0)
        if self.has_headers:
            ends &= segment != ASIDE
        leaves_header = resumes | sums_up | ends
        if self.has_headers:
            header = ~taken & ~ends & (at[Field.IN_HEADER] > 0) & (feature[Feature.OPENS_MESSAGE] > 0)
            enters = ~taken & ~ends & ~header & (feature[Feature.SPECIAL] > 0) & (segment != QUESTION)
            tool_opens = tool_opens | header
            leaves_header |= header
            at[Field.IN_HEADER] = torch.where(enters, 1, at[Field.IN_HEADER])
        at[Field.RETURN_SEGMENT] = torch.where(tool_opens, inner, at[Field.RETURN_SEGMENT])
        at[Field.HAS_ASIDE] = torch.where(tool_opens, 1, at[Field.HAS_ASIDE])
        at[Field.SUMMARY_SLOT] = torch.where(sums_up & (inner == THINKING), after, at[Field.SUMMARY_SLOT])
        segment = torch.where(resumes | tool_ends, inner, segment)
        segment = torch.where(sums_up, SUMMARY, segment)
        segment = torch.where(tool_opens, ASIDE, segment)
        at[Field.SEGMENT] = torch.where(ends, QUESTION, segment)
        at[Field.IN_HEADER] = torch.where(leaves_header, 0, at[Field.IN_HEADER])
        _restart(at, resumes | sums_up | tool_ends)
        self._open_round(at, opens, after)

    @staticmethod
    def _open_round(at: Columns, opens: torch.Tensor, slot: Slot) -> None:
        at[Field.ROUND] = at[Field.ROUND] + opens.long()
        at[Field.SEGMENT] = torch.where(opens, THINKING, at[Field.SEGMENT])
        at[Field.THINKING_SLOT] = torch.where(opens, slot, at[Field.THINKING_SLOT])
        for name in UNSET_BY_ROUND:
            at[name] = torch.where(opens, -1, at[name])
        for name in CLEARED_BY_ROUND:
            at[name] = torch.where(opens, 0, at[name])
        _restart(at, opens)


def _clear_sentence(at: Columns, where: torch.Tensor) -> None:
    keep = (~where).long()
    for name in (Field.LENGTH, Field.BLANKS, Field.FLAGS):
        at[name] = at[name] * keep


def _restart(at: Columns, where: torch.Tensor) -> None:
    keep = (~where).long()
    for name in (Field.RULE_STATE, Field.STEP_OPEN, Field.LENGTH, Field.BLANKS, Field.FLAGS):
        at[name] = at[name] * keep


def _absorb(at: Columns, part: "list[torch.Tensor] | tuple[torch.Tensor, ...]", where: torch.Tensor) -> None:
    """Adds a piece (blanks before, length, blanks after, flags) to the sentence of some rows."""
    before, length, after, flags = part
    old = at[Field.FLAGS]
    begun = at[Field.LENGTH] > 0
    grown = at[Field.LENGTH] + length + torch.where(begun, at[Field.BLANKS] + before, 0)
    kept = (old | flags) & (HAS_WORD | HAS_CONTENT)
    kept = kept | (torch.where(begun, old, flags) & OPENS_WITH_BAR)
    kept = kept | (torch.where((flags & HAS_BODY) > 0, flags, old) & CLOSES_WITH_BAR)
    has_text = where & (length > 0)
    blank = where & (length == 0)
    at[Field.BLANKS] = torch.where(has_text, after, at[Field.BLANKS] + torch.where(blank, before, 0))
    at[Field.LENGTH] = torch.where(has_text, grown, at[Field.LENGTH])
    at[Field.FLAGS] = torch.where(has_text, kept, old)
