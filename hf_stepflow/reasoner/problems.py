"""Problems of the embedded reasoner: drawn at random, in splits that never share a question.

A problem comes with its one right trace, so that a model can be scored token by token as well as by its answer. The
sentences of that trace, written arithmetic and counting, are made here; `chains` composes them.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from hf_stepflow.runtime.errors import StepFlowInputError

NAMES = (
    "Ann Ben Cal Dan Eve Fay Gus Hal Ida Jim Kay Leo Mia Ned Ola Pam Quin Ray Sue Tom Una Val Wes Zoe"
).split()  # fmt: skip
LARGEST = 99

_STRIDES = (1, 2, 3, 5)

SPLITS = ("train", "calibration", "test")
# A question's hash falls into one of 32 classes; these two are held out.
_HELD_OUT = {"calibration": 30, "test": 31}


@dataclass(frozen=True)
class Problem:
    """A question and its one right trace.

    Attributes:
        id: The level, split and number, which draw it again.
        question: The user's message.
        thinking: The text between `<think>` and `</think>`.
        answer: The number asked for.
    """

    id: str
    question: str
    thinking: str
    answer: str

    @property
    def response(self) -> str:
        """The right text after `<think>`."""
        return f"{self.thinking}</think> The answer is {self.answer}."


@dataclass(frozen=True)
class Drawn:
    """A question with its right thinking and answer, before it has an id."""

    question: str
    thinking: str
    answer: int


def split_of(question: str) -> str:
    """Assigns a question to a split by its hash, so that no question is in two splits."""
    kind = hashlib.sha256(question.encode()).digest()[0] % 32
    return next((split for split, held_out in _HELD_OUT.items() if kind == held_out), "train")


def draw(name: str, make: Callable[[random.Random], Drawn], split: str, number: int) -> Problem:
    """Draws one problem, the same on every machine.

    Args:
        name: The name that, with split and number, seeds the problem.
        make: A function that draws a problem from a random generator.
        split: `train`, `calibration` or `test`.
        number: The index of the problem in its split, from 0.

    Raises:
        StepFlowInputError: The split does not exist.
    """
    if split not in SPLITS:
        raise StepFlowInputError(f"there is no split {split!r}", hint=f"splits: {', '.join(SPLITS)}")
    generator = random.Random(f"{name}/{split}/{number}")
    while True:
        drawn = make(generator)
        if split_of(drawn.question) == split:
            return Problem(f"{name}/{split}/{number}", drawn.question, drawn.thinking, str(drawn.answer))


def add(first: int, second: int) -> str:
    """Writes an addition out, ones first, such as ` 7 + 5 is 12. 4 + 1 + 1 is 6.` for 47 and 15."""
    ones = first % 10 + second % 10
    carry = " + 1" if ones > 9 else ""
    tens = first // 10 + second // 10 + (ones > 9)
    return f" {first % 10} + {second % 10} is {ones}. {first // 10} + {second // 10}{carry} is {tens}."


def subtract(first: int, second: int) -> str:
    """Writes a subtraction out, ones first, such as ` 13 - 7 is 6. 4 - 1 - 1 is 2.` for 43 and 17."""
    borrow = first % 10 < second % 10
    ones = first % 10 + 10 * borrow
    tens = first // 10 - second // 10 - borrow
    taken = " - 1" if borrow else ""
    return f" {ones} - {second % 10} is {ones - second % 10}. {first // 10} - {second // 10}{taken} is {tens}."


def count(generator: random.Random, name: str, sentences: int) -> tuple[str, str]:
    """Draws a count: its announcement in the question, and its sentences in the thinking.

    Args:
        generator: The random generator.
        name: The person who counts.
        sentences: The number of sentences, of which only as many as fit below 100 are made.
    """
    stride = generator.choice([one for one in _STRIDES if one * sentences < LARGEST] or _STRIDES[:1])
    sentences = min(sentences, (LARGEST - 1) // stride)
    start = generator.randint(1, LARGEST - stride * sentences)
    end = start + stride * sentences
    announcement = f" {name} counts from {start} to {end} by {stride}."
    work = "".join(f" {name} now counts {at}." for at in range(start + stride, end + 1, stride))
    return announcement, f"{work} {name} is done."


def split_randomly(generator: random.Random, sentences: int, counts: int) -> list[int]:
    """Splits a number of sentences among counts at random, at least one each."""
    if counts == 0:
        return []
    spare = max(sentences - counts, 0)
    cuts = sorted(generator.randint(0, spare) for _ in range(counts - 1))
    return [1 + right - left for left, right in zip([0, *cuts], [*cuts, spare], strict=True)]
