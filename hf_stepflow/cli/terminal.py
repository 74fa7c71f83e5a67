"""Answers on the terminal: token by token while they are written, and as lines of text afterwards."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TextIO

import torch
from transformers.generation.streamers import BaseStreamer

from hf_stepflow.evaluation.arms import Arm
from hf_stepflow.evaluation.responses import Response
from hf_stepflow.evaluation.sampler import Sampler
from hf_stepflow.runtime.report import FlowReport
from hf_stepflow.runtime.step_detector import THINKING, Field, StepVocabulary, empty_record
from hf_stepflow.runtime.trace import TraceStep, segment_trace

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_INDENT = 6


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        response: The response of the model.
        steps: Its thinking and summary steps.
        seconds: The time that it took.
    """

    response: Response
    steps: list[TraceStep]
    seconds: float

    @property
    def lines(self) -> list[str]:
        """The text of each step as one line."""
        return [" ".join((step.text or "").split()) for step in self.steps]


def answer(sampler: Sampler, prompt: list[int], is_on: bool, seed: int = 0) -> Answer:
    """Answers a prompt, given as token ids, with StepFlow on or off."""
    (response,), seconds = sampler.respond(Arm(stepflow=is_on), [prompt], seed)
    ids, length = prompt + response.ids, len(prompt)
    trace = segment_trace(sampler.tokenizer, ids, sampler.vocabulary, prompt_length=length)
    written = [step for step in trace.steps if step.label != "question" and step.end > length]
    return Answer(response, written, seconds)


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """Finds the first step at which two answers differ, or at which only one has ended; None if they are equal."""
    pairs = enumerate(zip_longest(one, other))
    return next((place for place, (left, right) in pairs if left != right), None)


def effect_of(report: FlowReport) -> str:
    """Returns the report as text, without its list of steps."""
    return "\n".join(line for line in str(report).splitlines() if "tokens" not in line)


class StepPrinter(BaseStreamer):
    """Prints an answer token by token: a numbered line for each step, with thinking dimmed on a terminal.

    Text outside of any step, such as a marker, gets a line without a number. `StepStreamer` yields only whole steps;
    this class shows a step as it grows.

    Args:
        tokenizer: The model's tokenizer.
        vocabulary: Its step rules.
        ends: The ids that end the turn, which are not printed.
        out: The stream to print to; None for the standard output.
    """

    def __init__(self, tokenizer: Any, vocabulary: StepVocabulary, ends: list[int], out: TextIO | None = None):
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.ends = ends
        self.out = sys.stdout if out is None else out
        self.has_colours = self.out.isatty() and "NO_COLOR" not in os.environ
        self._reset()

    def _reset(self) -> None:
        self._record = empty_record()
        self._count = self._prompt_length = 0
        self._place: tuple[int, int] | None = None
        self._has_lines = False
        self._begin_line(0)

    def _begin_line(self, number: int) -> None:
        self._number = number
        self._has_text = False
        self._ids: list[int] = []
        self._printed = 0
        self._blanks = ""

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt at the first call, then new tokens: int64 [T] or [1, T]."""
        ids = value.reshape(-1).tolist()
        is_prompt = self._count == 0
        self._prompt_length = len(ids) if is_prompt else self._prompt_length
        records = self.vocabulary.scan(ids, self._record, start=self._count, prompt_length=self._prompt_length)
        self._record = records[-1]
        self._count += len(ids)
        for token, record in zip([] if is_prompt else ids, records, strict=False):
            if token not in self.ends:
                self._print(token, record)

    def _print(self, token: int, record: list[int]) -> None:
        place = record[Field.LABEL], max(record[Field.STEP], 0)
        is_blank = place[1] == 0 and not self.tokenizer.decode([token]).strip()
        if place != self._place and not is_blank:  # blanks between steps do not end a line
            self._place = place
            self._begin_line(place[1])
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return  # the last character is incomplete
        new = self._blanks + text[self._printed :]
        self._printed = len(text)
        if text.endswith("\n"):  # later tokens cannot change this text, so it need not be decoded again
            self._ids, self._printed = [], 0
        visible = new.rstrip()
        self._blanks = new[len(visible) :]
        if visible:
            self._write(visible, is_thinking=record[Field.LABEL] % 3 == THINKING)

    def _write(self, text: str, is_thinking: bool) -> None:
        if not self._has_text:
            number = str(self._number) if self._number else ""
            text = f"{number:>{_INDENT - 2}}  {text.lstrip()}"
            if self._has_lines:
                self.out.write("\n")
        text = text.replace("\n", "\n" + " " * _INDENT)
        self.out.write(f"{_DIM}{text}{_PLAIN}" if is_thinking and self.has_colours else text)
        self.out.flush()
        self._has_text = self._has_lines = True

    def end(self) -> None:
        """Ends the last line."""
        if self._has_lines:
            self.out.write("\n")
            self.out.flush()
        self._reset()
