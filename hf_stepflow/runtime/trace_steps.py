"""The steps of a row as what people read: label, place and text of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .step_record import SEGMENT_NAMES, Field


@dataclass(frozen=True)
class TraceStep:
    """One step of a trace.

    Attributes:
        label: "question", "thinking" or "summary".
        round: round of the conversation, from 1 (0 for a question before any thinking).
        index: number of the step inside its round; 0 for a question.
        start, end: token range [start, end).
        text: its text, or None where no tokenizer was at hand.
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
