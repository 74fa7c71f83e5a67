"""What a model is asked: problems from JSONL files, the paper's benchmarks, and the reasoner's generators."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError, shown

KINDS = ("math", "choice", "number", "text", "code")
_FIELDS = {"id", "question", "answer", "choices", "tests", "kind", "trace"}
_TESTS = 'for instance [["2 3\\n", "5\\n"]]'
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A number in digits. The exponent is short: as a fraction, 1e10000000 alone would take all time and memory.
NUMBER = (
    r"[-+]?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?(?:/[1-9]\d*)?(?!\d|[eE][-+]?\d)"
)
# A word of an answer: an article, initials, or two letters and more; ab-cd is a difference and no word.
_WORD = re.compile(r"a|(?:[^\W\d_]\.)+|(?:[^\W\d_]['\u2019])?[^\W\d_]{2,}(?:['\u2019][^\W\d_]+|-[^\W\d_]{3,})*\.?")


@dataclass(frozen=True)
class EvalProblem:
    """One problem.

    Attributes:
        id: unique in its set.
        question: what the user asks, instructions included.
        answer: the right answer: mathematics, a number or a text, or the letter of the right choice.
        choices: the texts of a multiple choice, in the order shown.
        tests: input and output pairs of a programming problem, as JSON.
        kind: how the answer is checked: `math`, `choice`, `number`, `text` or `code`.
        trace: a right response, all that follows the prompt, where one is known; never shown to the model.
    """

    id: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    tests: str | None = None
    kind: str = "math"
    trace: str | None = None

    @property
    def prompt(self) -> str:
        """The user's message: the question, and the choices with their letters."""
        options = [f"{letter}) {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.question, *options])

    def asked(self) -> dict[str, Any]:
        """All that a response and its judgement depend on, JSON-ready: everything but the trace."""
        return {name: value for name, value in vars(self).items() if name != "trace"}


def problem_of(data: Any) -> EvalProblem:
    """One problem from JSON data; keys beyond those of a problem are left out.

    Raises:
        StepFlowInputError: keys that are missing, or values of another kind.
    """
    if not isinstance(data, dict):
        raise StepFlowInputError(f"expected an object, got {type(data).__name__}")
    data = {key: value for key, value in data.items() if key in _FIELDS and value is not None}
    missing = [key for key in ("id", "question", "answer") if not str(data.get(key, "")).strip()]
    if missing:
        raise StepFlowInputError(f"no {' and no '.join(missing)}")
    name = _text_of(data["id"], "the id")
    choices = data.get("choices", [])
    if not isinstance(choices, list) or len(choices) > len(LETTERS):
        raise StepFlowInputError(
            f"choices of problem {name!r} must be a list of at most {len(LETTERS)} texts, got {shown(choices)}"
        )
    choices = [_text_of(choice, f"a choice of problem {name!r}") for choice in choices]
    answer = _text_of(data["answer"], f"the answer to problem {name!r}").strip()
    kind = data.get("kind") or ("choice" if choices else "code" if "tests" in data else _kind_of(answer))
    if kind == "choice" and answer not in LETTERS[: len(choices)] and answer in choices:
        answer = LETTERS[choices.index(answer)]
    tests = data.get("tests")
    if tests is not None and not isinstance(tests, str):
        tests = json.dumps(tests)
    trace = data.get("trace")
    if trace is not None and (not isinstance(trace, str) or not trace):
        raise StepFlowInputError(f"trace must be the text of a right response, got {trace!r}", hint="or leave it out")
    return check_problem(EvalProblem(name, data["question"], answer, tuple(choices), tests, kind, trace))


def _text_of(value: Any, name: str) -> str:
    """A text, or a number as a text."""
    is_number = type(value) is int or (type(value) is float and math.isfinite(value))
    if not isinstance(value, str) and not is_number:
        raise StepFlowInputError(f"{name} must be a text or a number, got {shown(value)}", hint="write it as a text")
    return str(value)


def check_problem(problem: EvalProblem) -> EvalProblem:
    """The problem, once it is sure that its answer can be checked.

    Raises:
        StepFlowInputError: it cannot.
    """
    answer, kind = problem.answer, problem.kind
    for name in ("id", "question", "answer"):
        value = getattr(problem, name)
        if not isinstance(value, str) or not value.strip():
            raise StepFlowInputError(
                f"the {name} of problem {shown(problem.id)} must be a text that is not empty, got {shown(value)}",
                hint="a number as a text, such as '4'; of a conversation, only the question as one text",
            )
    others = [*problem.choices, *(text for text in (problem.tests, problem.trace) if text is not None)]
    if not all(isinstance(text, str) for text in others):
        raise StepFlowInputError(
            f"choices, tests and trace of problem {problem.id!r} must be texts, got {shown(others)}",
            hint="tests of an EvalProblem are JSON",
        )
    if kind not in KINDS:
        raise StepFlowInputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "number" and as_number(answer) is None:
        raise StepFlowInputError(f"the answer {answer!r} is not a number", hint='write a number, or "kind": "math"')
    if kind == "choice":
        if len(problem.choices) < 2:
            raise StepFlowInputError(f"a multiple choice needs at least two choices, got {list(problem.choices)}")
        if len(answer) != 1 or answer not in LETTERS[: len(problem.choices)]:
            raise StepFlowInputError(
                f"the answer {answer!r} is neither a letter nor a text of the choices {list(problem.choices)}"
            )
    if kind == "code":
        try:
            pairs = json.loads(problem.tests or "[]")
        except json.JSONDecodeError as error:
            raise StepFlowInputError(f"tests are no JSON: {error}") from error
        is_pairs = isinstance(pairs, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
        )
        if not pairs or not is_pairs:
            raise StepFlowInputError(
                "a programming problem needs tests: a list of [input, expected output], both texts", hint=_TESTS
            )
    return problem


def as_number(text: str) -> Fraction | None:
    """A number written in digits (`1,250.5`, `.5`, `$3`, `1/2`, `1e5`), or None; also for exponents beyond reason."""
    bare = text.strip().replace("$", "").rstrip("%").rstrip(".")
    if re.fullmatch(NUMBER, bare) is None:
        return None
    try:
        return Fraction(bare.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def is_words(answer: str) -> bool:
    """Whether an answer is words (`Paris`, `New York`, `no`) and not mathematics (`xy`, `sin x`)."""
    bare = answer.strip()
    is_plain = all(_WORD.fullmatch(word) for word in re.split(r"[\s,]+", bare))
    return is_plain and (bare.casefold() == "no" or re.search(r"[^\W\d_]{3}", bare) is not None)


def _kind_of(answer: str) -> str:
    """A plain number is compared as one, words as a text, anything else as mathematics."""
    if as_number(answer) is not None:
        return "number"
    return "text" if is_words(answer) else "math"


def check_unique(problems: Iterable[EvalProblem]) -> list[EvalProblem]:
    """The problems as a list, once it is sure that each can be checked and that no id comes twice.

    Raises:
        StepFlowInputError: none at all, one that cannot be checked, or an id that comes twice.
    """
    found = list(problems)
    seen: set[str] = set()
    for problem in found:
        check_problem(problem)
        if problem.id in seen:
            raise StepFlowInputError(f"the id {problem.id!r} comes twice", hint="make ids unique")
        seen.add(problem.id)
    if not found:
        raise StepFlowInputError("there are no problems", hint="give at least one")
    return found
