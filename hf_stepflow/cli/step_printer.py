"""An answer on the terminal while it is written."""

import os
import sys
from typing import Any, TextIO

import torch
from transformers.generation.streamers import BaseStreamer

from hf_stepflow.runtime.step_detector import THINKING, Field, StepVocabulary, empty_record

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_INDENT = 6


class StepPrinter(BaseStreamer):
    """Prints an answer token by token: each step from a new line on, behind its number, thinking dimmed on a terminal.

    Text in no step, markers for instance, has lines of its own without a number. `StepStreamer` waits for a step to be
    whole; here it is seen as it grows.

    Args:
        tokenizer: the model's tokenizer.
        vocabulary: its step rules.
        ends: ids that end the turn, which are not printed.
        out: where to; None for the standard output.
    """

    def __init__(self, tokenizer: Any, vocabulary: StepVocabulary, ends: list[int], out: TextIO | None = None):
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.ends = ends
        self.out = sys.stdout if out is None else out
        self.has_colours = self.out.isatty() and "NO_COLOR" not in os.environ
        self._start()

    def _start(self) -> None:
        self._record = empty_record()
        self._count = self._opening = 0
        self._place: tuple[int, int] | None = None
        self._has_lines = False
        self._begin(0)

    def _begin(self, number: int) -> None:
        """What comes now starts a line, which is opened by its first text."""
        self._number = number
        self._has_text = False
        self._ids: list[int] = []
        self._read = 0
        self._blanks = ""

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, then new tokens: int64 [T] or [1, T]."""
        ids = value.reshape(-1).tolist()
        is_prompt = self._count == 0
        self._opening = len(ids) if is_prompt else self._opening
        records = self.vocabulary.scan(ids, self._record, start=self._count, prompt_length=self._opening)
        self._record = records[-1]
        self._count += len(ids)
        for token, record in zip([] if is_prompt else ids, records, strict=False):
            if token not in self.ends:
                self._take(token, record)

    def _take(self, token: int, record: list[int]) -> None:
        place = record[Field.LABEL], max(record[Field.STEP], 0)
        is_blank = place[1] == 0 and not self.tokenizer.decode([token]).strip()
        if place != self._place and not is_blank:  # blanks in no step interrupt nothing
            self._place = place
            self._begin(place[1])
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return  # part of a character
        new = self._blanks + text[self._read :]
        self._read = len(text)
        if text.endswith("\n"):  # nothing that follows changes it, and long texts need not be read again
            self._ids, self._read = [], 0
        shown = new.rstrip()
        self._blanks = new[len(shown) :]
        if shown:
            self._write(shown, is_thinking=record[Field.LABEL] % 3 == THINKING)

    def _write(self, text: str, is_thinking: bool) -> None:
        if not self._has_text:
            number = str(self._number) if self._number else ""
            head = f"{number:>{_INDENT - 2}}  "
            text = head + text.lstrip()
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
        self._start()
