"""Problems of the embedded reasoner: levels of difficulty, drawn at random in splits that never share a question.

A problem comes with its one right trace, so that a model can be scored token by token as well as by its answer. A
chain links quantities by shuffled premises among distractors and is worked out digit by digit. An errand is a chain
with counting in between: its premises are read early and needed late, because the thinking also does unrelated work.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hf_stepflow.runtime.errors import StepFlowInputError

NAMES = (
    "Ann Ben Cal Dan Eve Fay Gus Hal Ida Jim Kay Leo Mia Ned Ola Pam Quin Ray Sue Tom Una Val Wes Zoe"
).split()  # fmt: skip
LARGEST = 99
RELATIONS = ("more than", "fewer than")

_STRIDES = (1, 2, 3, 5)

SPLITS = ("train", "calibration", "test")
# A question's hash falls into one of 32 classes; these two are held out.
_HELD_OUT = {"calibration": 30, "test": 31}

# A question, its one right thinking and its answer.
Drawn = tuple[str, str, int]


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


def problems_of(level: str, split: str, number: int, start: int = 0) -> list[Problem]:
    """Draws problems of a level, the same on every machine.

    Args:
        level: A key of `LEVELS`.
        split: `train`, `calibration` or `test`.
        number: The number of problems.
        start: The index of the first one.

    Raises:
        StepFlowInputError: The level or the split does not exist.

    Example:
        >>> from hf_stepflow.reasoner.levels import problems_of
        >>> [problem.id for problem in problems_of("chains-4", "test", 2)]
        ['chains-4/test/0', 'chains-4/test/1']
    """
    if level not in LEVELS:
        raise StepFlowInputError(f"there is no level {level!r}", hint=f"levels: {', '.join(LEVELS)}")
    return [draw(level, LEVELS[level], split, one) for one in range(start, start + number)]


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
        question, thinking, answer = make(generator)
        if split_of(question) == split:
            return Problem(f"{name}/{split}/{number}", question, thinking, str(answer))


def make_chain(generator: random.Random, people: int, distractors: int, counts: int = 0, sentences: int = 0) -> Drawn:
    """Draws one chain, or one errand if there are counts.

    Args:
        generator: The random generator.
        people: The number of quantities that must be known, including the first.
        distractors: The number of useless quantities that depend on one of them.
        counts: The number of counts that the question asks for along the way, at most `people`. One follows each
            quantity that becomes known, until all are done.
        sentences: The approximate number of counting sentences in total.
    """
    drawn = generator.sample(NAMES, people + distractors + counts)
    names, counters = drawn[: people + distractors], drawn[people + distractors :]
    values = [generator.randint(1, LARGEST)]
    premises = [f" {names[0]} has {values[0]} points."]
    # The premises that the thinking looks up, on its way from the quantity asked for back to the given one.
    found = list(premises)
    steps = list(premises)
    for one in range(1, people + distractors):
        source = one - 1 if one < people else generator.randrange(people)
        value = generator.choice([other for other in range(1, LARGEST + 1) if other != values[source]])
        gap = abs(value - values[source])
        relation = RELATIONS[value < values[source]]
        premise = f" {names[one]} has {gap} {relation} {names[source]}."
        premises.append(premise)
        values.append(value)
        if one < people:
            work = _subtract if value < values[source] else _add
            found.append(premise)
            steps.append(f"{premise}{work(values[source], gap)} {names[one]} has {value} points.")
    generator.shuffle(premises)
    plan = ""
    for one, share in enumerate(_split_randomly(generator, sentences, counts)):
        announcement, counting = _count(generator, counters[one], share)
        plan += announcement
        steps[one] += announcement + counting
    thinking = "".join(reversed(found[1:])) + "".join(steps)
    question = "".join(premises).strip() + plan + f" How many points does {names[people - 1]} have?"
    return question, thinking, values[people - 1]


# chains-N: N quantities must be known; training goes up to 6.
# errands-N: about N sentences of counting; training goes up to 30.
LEVELS: dict[str, Callable[[random.Random], Drawn]] = {
    **{f"chains-{n}": partial(make_chain, people=n, distractors=n // 2 + 1) for n in (2, 4, 6, 7, 8)},
    **{
        f"errands-{n}": partial(make_chain, people=5, distractors=3, counts=4, sentences=n)
        for n in (10, 30, 60, 90, 120, 180)
    },
}


def _add(first: int, second: int) -> str:
    """Writes an addition out, ones first, such as ` 7 + 5 is 12. 4 + 1 + 1 is 6.` for 47 and 15."""
    ones = first % 10 + second % 10
    carry = " + 1" if ones > 9 else ""
    tens = first // 10 + second // 10 + (ones > 9)
    return f" {first % 10} + {second % 10} is {ones}. {first // 10} + {second // 10}{carry} is {tens}."


def _subtract(first: int, second: int) -> str:
    """Writes a subtraction out, ones first, such as ` 13 - 7 is 6. 4 - 1 - 1 is 2.` for 43 and 17."""
    borrow = first % 10 < second % 10
    ones = first % 10 + 10 * borrow
    tens = first // 10 - second // 10 - borrow
    taken = " - 1" if borrow else ""
    return f" {ones} - {second % 10} is {ones - second % 10}. {first // 10} - {second // 10}{taken} is {tens}."


def _count(generator: random.Random, name: str, sentences: int) -> tuple[str, str]:
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


def _split_randomly(generator: random.Random, sentences: int, counts: int) -> list[int]:
    """Splits a number of sentences among counts at random, at least one each."""
    if counts == 0:
        return []
    spare = max(sentences - counts, 0)
    cuts = sorted(generator.randint(0, spare) for _ in range(counts - 1))
    return [1 + right - left for left, right in zip([0, *cuts], [*cuts, spare], strict=True)]
