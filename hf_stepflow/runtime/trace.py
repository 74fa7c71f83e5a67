"""A finished trace cut into segments and steps: what researchers look at, and what reports are made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .configuration_stepflow import StepFlowConfig
from .errors import StepFlowInputError
from .settings import StepFlowSettings
from .step_detector import SEGMENT_NAMES, SUMMARY, THINKING, Field, StepVocabulary


@dataclass(frozen=True)
class TraceStep:
    """One step of a trace.

    Attributes:
        label: "question", "thinking" or "summary".
        round: Round of the conversation, from 1 (0 for a question before any thinking).
        index: Number of the step inside its round; 0 for a question.
        start, end: Token range [start, end).
        text: Its text, or None where no tokenizer was at hand.

    Example:
        >>> step = segment_trace(tokenizer, ids).steps[1]
        >>> step.label, step.index
        ('thinking', 1)
    """

    label: str
    round: int
    index: int
    start: int
    end: int
    text: str | None = None


def ids_of_records(records: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[int]]:
    """Segment, step and round of every token of one row of records, as in `Trace`."""
    labels = [record[Field.LABEL] for record in records]
    segments = [-1 if label < 0 else label % 3 for label in labels]
    rounds = [0 if label < 0 else label // 3 for label in labels]
    return segments, [record[Field.STEP] for record in records], rounds


def steps_of_records(
    records: Sequence[Sequence[int]], ids: Sequence[int] | None = None, tokenizer: Any = None
) -> list[TraceStep]:
    """The steps of one row of records; texts need the ids and a tokenizer."""
    steps = steps_of_ids(*ids_of_records(records))
    if tokenizer is not None and ids is not None:
        steps = [
            # Padding and tokens that were not seen may lie inside of a question, as -1.
            replace(step, text=tokenizer.decode([token for token in ids[step.start : step.end] if token >= 0]))
            for step in steps
        ]
    return steps


def steps_of_ids(segments: list[int], step_ids: list[int], rounds: list[int]) -> list[TraceStep]:
    """Ranges of equal (round, segment, step); tokens in no step interrupt nothing."""
    steps: list[TraceStep] = []
    for position, (segment, step, number) in enumerate(zip(segments, step_ids, rounds, strict=True)):
        if segment < 0 or step < 0:
            continue
        label = SEGMENT_NAMES[segment]
        if steps and (steps[-1].label, steps[-1].round, steps[-1].index) == (label, number, step):
            steps[-1] = TraceStep(label, number, step, steps[-1].start, position + 1)
        else:
            steps.append(TraceStep(label, number, step, position, position + 1))
    return steps


@dataclass
class Trace:
    """Segment and step of every token of one row.

    Attributes:
        segment_ids: long [T]: 0 question, 1 thinking, 2 summary, -1 padding.
        step_ids: long [T]: step inside the round, 0 for question, -1 for tokens in no step.
        round_ids: long [T]: round of each token; if not given, thinking that follows another segment opens a new
            round unless its steps count on.
        steps: The steps in order, made from the ids if not given.

    Example:
        >>> from hf_stepflow import Trace
        >>> [step.label for step in Trace([0, 1, 2], [0, 1, 2]).steps]
        ['question', 'thinking', 'summary']
    """

    segment_ids: torch.Tensor
    step_ids: torch.Tensor
    round_ids: torch.Tensor | None = None
    steps: list[TraceStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.segment_ids = torch.as_tensor(self.segment_ids, dtype=torch.long)
        self.step_ids = torch.as_tensor(self.step_ids, dtype=torch.long)
        if self.segment_ids.ndim != 1 or self.segment_ids.shape != self.step_ids.shape:
            raise StepFlowInputError(
                "segment_ids and step_ids must both be of shape [T], got "
                f"{list(self.segment_ids.shape)} and {list(self.step_ids.shape)}"
            )
        if self.segment_ids.numel() and not -1 <= int(self.segment_ids.min()) <= int(self.segment_ids.max()) <= 2:
            raise StepFlowInputError("segment_ids must be 0 (question), 1 (thinking), 2 (summary) or -1 (padding)")
        if self.step_ids.numel() and int(self.step_ids.min()) < -1:
            raise StepFlowInputError(f"step_ids must be -1 or more, got {int(self.step_ids.min())}")
        if self.round_ids is None:
            self.round_ids = torch.tensor(_derive_rounds(self.segment_ids.tolist(), self.step_ids.tolist()))
        self.round_ids = torch.as_tensor(self.round_ids, dtype=torch.long)
        if self.round_ids.shape != self.segment_ids.shape:
            raise StepFlowInputError(
                f"round_ids must be of shape {list(self.segment_ids.shape)}, got {list(self.round_ids.shape)}"
            )
        if not self.steps:
            self.steps = steps_of_ids(self.segment_ids.tolist(), self.step_ids.tolist(), self.round_ids.tolist())

    def __len__(self) -> int:
        return self.segment_ids.shape[0]


def segment_trace(
    tokenizer: Any,
    input_ids: "torch.Tensor | Sequence[int]",
    config: "StepFlowConfig | StepFlowSettings | StepVocabulary | dict[str, Any] | None" = None,
    prompt_length: int | None = None,
) -> Trace:
    """Cuts a finished trace into segments and steps, exactly as the runtime does while it is generated.

    Args:
        tokenizer: The model's tokenizer.
        input_ids: Token ids of one row, [T] or [1, T].
        config: Step settings, or a `StepVocabulary` made before; None for the defaults.
        prompt_length: Where the prompt ends: implicit thinking starts there, and without it everything is question.

    Raises:
        StepFlowInputError: There is more than one row.
        StepFlowConfigError: The tokenizer cannot write a marker.

    Example:
        >>> from hf_stepflow import segment_trace
        >>> labels = [step.label for step in segment_trace(tokenizer, ids).steps]
    """
    ids = torch.as_tensor(input_ids)
    ids = ids[0] if ids.ndim == 2 and ids.shape[0] == 1 else ids
    if ids.ndim != 1:
        raise StepFlowInputError(
            f"segment_trace takes one row of token ids, [T] or [1, T], got shape {list(ids.shape)}",
            hint="call it for each row",
        )
    vocabulary = config if isinstance(config, StepVocabulary) else StepVocabulary.from_tokenizer(tokenizer, config)
    records = vocabulary.scan(ids.tolist(), prompt_length=prompt_length)
    segments, step_ids, rounds = ids_of_records(records)
    steps = steps_of_records(records, ids.tolist(), tokenizer)
    return Trace(torch.tensor(segments), torch.tensor(step_ids), torch.tensor(rounds), steps)


def open_step(record: Sequence[int]) -> TraceStep | None:
    """The step that the next token may go on with, so far as it is known after the token of a record."""
    segment = record[Field.SEGMENT]
    if not record[Field.STEP_OPEN] or segment not in (THINKING, SUMMARY):
        return None
    start, end = record[Field.STEP_SLOT], record[Field.STEP_END]
    return TraceStep(SEGMENT_NAMES[segment], record[Field.ROUND], record[Field.STEPS], start, end)


def finished_steps(before: Sequence[int], after: Sequence[int]) -> list[TraceStep]:
    """The thinking and summary steps of which a token shows that they have ended.

    A step has ended when the next one begins, or with its segment.

    Args:
        before: The record before the token.
        after: The record of the token.
    """
    opened, still_open, own = open_step(before), open_step(after), None
    if after[Field.STEP] > 0:
        number, segment = divmod(after[Field.LABEL], 3)
        start, end = after[Field.STEP_SLOT], after[Field.STEP_END]
        own = TraceStep(SEGMENT_NAMES[segment], number, after[Field.STEP], start, end)
    if opened is not None and own is not None and (opened.round, opened.index) == (own.round, own.index):
        opened = None
    return [
        step
        for step in (opened, own)
        if step is not None
        and (still_open is None or (step.round, step.index) != (still_open.round, still_open.index))
    ]


def _derive_rounds(segments: list[int], step_ids: list[int]) -> list[int]:
    """Rounds of a trace that came without: thinking after something else, whose steps start again, is a new round."""
    rounds, current, last_step, previous = [], 0, 0, 0
    for position, segment in enumerate(segments):
        if segment == 1 and previous != 1:
            following = next((step for step in step_ids[position:] if step > 0), 0)
            if current == 0 or following <= last_step:
                current, last_step = current + 1, 0
        if segment > 0:
            last_step = max(last_step, step_ids[position])
        previous = previous if segment < 0 else segment
        rounds.append(current)
    return rounds
