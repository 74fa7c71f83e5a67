"""A problem: what is asked, the right answer, and how an answer is checked."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError, shown

KINDS = ("math", "choice", "number", "text", "code", "verifier")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FIELDS = {"id", "question", "answer", "choices", "tests", "kind", "trace"}
# A number in digits. The exponent is short: as a fraction, 1e10000000 alone would take all time and memory.
NUMBER = (
    r"[-+]?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?(?:/[1-9]\d*)?(?!\d|[eE][-+]?\d)"
)
# A word of an answer: an article, initials, or at least two letters; ab-cd is a difference and no word.
_WORD = re.compile(r"a|(?:[^\W\d_]\.)+|(?:[^\W\d_]['\u2019])?[^\W\d_]{2,}(?:['\u2019][^\W\d_]+|-[^\W\d_]{3,})*\.?")


@dataclass(frozen=True)
class EvalProblem:
    """One problem.

    Attributes:
        id: A name that is unique in its set.
        question: The question to the model, instructions included.
        answer: The right answer: mathematics, a number or a text, or the letter of the right choice.
        choices: The texts of a multiple choice, in the order of their letters.
        tests: Pairs of input and expected output of a programming problem, as JSON.
        kind: How an answer is checked: `math`, `choice`, `number`, `text`, `code`, or `verifier` for problems of a
            generator.
        trace: A right response, all of what follows the prompt, if one is known; the model never sees it.
        verifier: The place of the problem in its generator, as JSON, from which the generator's own verifier works.
    """

    id: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    tests: str | None = None
    kind: str = "math"
    trace: str | None = None
    verifier: str | None = None

    @property
    def prompt(self) -> str:
        """The user's message: the question, and the choices with their letters."""
        options = [f"{letter}) {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.question, *options])

    def asked(self) -> dict[str, Any]:
        """Everything that a response and its judgement depend on, JSON-ready: all fields but the trace."""
        known = {name: value for name, value in vars(self).items() if name != "trace"}
        return {name: value for name, value in known.items() if name != "verifier" or value is not None}


def as_problems(problems: Iterable[Any]) -> list[EvalProblem]:
    """Converts and checks problems.

    Args:
        problems: Problems, or dicts as `problem_of` takes them.

    Raises:
        StepFlowInputError: There is no problem, one cannot be checked, or two have the same id.
    """
    found: dict[str, EvalProblem] = {}
    for one in problems:
        problem = one if isinstance(one, EvalProblem) else problem_of(one)
        check_problem(problem)
        if problem.id in found:
            raise StepFlowInputError(f"the id {problem.id!r} comes twice", hint="make ids unique")
        found[problem.id] = problem
    if not found:
        raise StepFlowInputError("there are no problems", hint="give at least one")
    return list(found.values())


def problem_of(data: Any) -> EvalProblem:
    """Makes a problem from JSON data and checks it; unknown keys are ignored.

    Raises:
        StepFlowInputError: A key is missing, or a value is of the wrong type.
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
    problem = EvalProblem(name, data["question"], answer, tuple(choices), tests, kind, data.get("trace"))
    check_problem(problem)
    return problem


def _text_of(value: Any, name: str) -> str:
    is_number = type(value) is int or (type(value) is float and math.isfinite(value))
    if not isinstance(value, str) and not is_number:
        raise StepFlowInputError(f"{name} must be a text or a number, got {shown(value)}", hint="write it as a text")
    return str(value)


def check_problem(problem: EvalProblem) -> None:
    """Raises StepFlowInputError if answers to a problem cannot be judged."""
    answer, kind = problem.answer, problem.kind
    texts = {name: getattr(problem, name) for name in ("id", "question", "answer", "tests", "trace")}
    texts |= {f"choice {letter}": choice for letter, choice in zip(LETTERS, problem.choices, strict=False)}
    for name, text in texts.items():
        is_missing = text is None and name in ("tests", "trace")
        if not is_missing and (not isinstance(text, str) or not text.strip()):
            raise StepFlowInputError(
                f"the {name} of problem {shown(problem.id)} must be a text that is not empty, got {shown(text)}",
                hint="write a number as a text, such as '4', a conversation as one text, and tests as JSON",
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
    if kind == "verifier" and problem.verifier is None:
        raise StepFlowInputError(
            f"problem {problem.id!r} is of the kind 'verifier', which only problems of a generator are",
            hint="load them with reasoning-gym:NAME, or give another kind",
        )
    if kind == "code":
        _check_tests(problem.tests or "[]")


def _check_tests(tests: str) -> None:
    try:
        pairs = json.loads(tests)
    except json.JSONDecodeError as error:
        raise StepFlowInputError(f"tests are not JSON: {error}") from error
    is_pairs = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    )
    if not pairs or not is_pairs:
        raise StepFlowInputError(
            "a programming problem needs tests: a list of [input, expected output], both texts",
            hint='for instance [["2 3\\n", "5\\n"]]',
        )


def as_number(text: str) -> Fraction | None:
    """Reads a number in digits (`1,250.5`, `.5`, `$3`, `1/2`, `1e5`); None for anything else."""
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
    if as_number(answer) is not None:
        return "number"
    return "text" if is_words(answer) else "math"
