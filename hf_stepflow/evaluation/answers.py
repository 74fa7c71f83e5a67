"""Whether a response is right: where its answer stands, and how each kind of answer is compared."""

import re
from dataclasses import dataclass

from hf_stepflow.runtime.errors import StepFlowInputError

from .mathematics import same_mathematics
from .problems import LETTERS, NUMBER, EvalProblem, as_number
from .programs import passes

# Outcomes. All but the first count as wrong; the last two are counted apart as well.
CORRECT, WRONG, NO_ANSWER, UNFINISHED = "correct", "wrong", "no answer", "unfinished"
OUTCOMES = (CORRECT, WRONG, NO_ANSWER, UNFINISHED)

_NUMBER = re.compile(rf"(?<![\w.)]){NUMBER}")
_STATEMENTS = [
    re.compile(rf"\b{word}\b\W{{0,4}}?(?:(?:is|are)\b\s*[:=]?|[:=])", re.IGNORECASE) for word in ("answer", "result")
]
_WRAPPED = re.compile(r"\\(?:text|textbf|mathbf|mathrm|boldsymbol|mbox)\s*\{(.*)\}", re.DOTALL)
_EDGES = " \t\n*_`\"'$:"
_LEADING_STOPS = re.compile(r"^(?:\.{2,}|\.(?!\d))")  # one before a digit is a decimal point
_BLOCK = re.compile(r"```[ \t]*([A-Za-z0-9]*)[^\n]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Verdict:
    """How a response was judged.

    Attributes:
        outcome: one of `OUTCOMES`.
        answer: the answer found in the response, or None.
    """

    outcome: str
    answer: str | None = None


def judge(problem: EvalProblem, text: str, is_finished: bool = True, *, run_code: bool = False) -> Verdict:
    """Judges a response.

    Args:
        problem: what was asked.
        text: the summary: what the model wrote after its thinking.
        is_finished: whether thinking and answer came to their end.
        run_code: whether programs may be run, in a process of their own but with the rights of this one.

    Raises:
        StepFlowInputError: a programming problem without `run_code`.
    """
    check_may_run(problem, run_code)
    if not is_finished:
        return Verdict(UNFINISHED)
    answer = extract(problem, text)
    if answer is None:
        return Verdict(NO_ANSWER)
    return Verdict(CORRECT if is_right(problem, answer) else WRONG, answer)


def check_may_run(problem: EvalProblem, run_code: bool) -> None:
    """Refuses programming problems where programs may not be run.

    Raises:
        StepFlowInputError: it is one, and they may not.
    """
    if problem.kind == "code" and not run_code:
        raise StepFlowInputError(
            f"the answer to problem {problem.id!r} is a program, and checking it means running what the model wrote",
            hint="pass run_code=True (--run-code) on a machine where that is safe",
        )


def extract(problem: EvalProblem, text: str) -> str | None:
    """The answer in a response, None where there is none.

    It is what the last box holds, else what follows the last "answer is" that holds an answer of this kind, else (for
    numbers and mathematics) the last number, or (for texts) the last line. A program is the last block marked as
    Python, or the last block of all.
    """
    if problem.kind == "code":
        blocks = [(mark.lower(), block) for mark, block in _BLOCK.findall(text)]
        marked = [block for mark, block in blocks if mark in ("python", "python3", "py")]
        return (marked or [block for _, block in blocks] or [None])[-1]
    box = _last_box(text)
    if box is not None:
        return _of_kind(problem, box)
    for statement in _statements(text):
        found = _of_kind(problem, statement)
        if found is not None:
            return found
    if problem.kind in ("number", "math"):
        numbers = _NUMBER.findall(_plain(text))
        return numbers[-1] if numbers else None
    if problem.kind == "text":
        return _bare(text.strip().rsplit("\n", 1)[-1]) or None
    return None


def is_right(problem: EvalProblem, answer: str) -> bool:
    """Whether an extracted answer is the right one."""
    if problem.kind == "choice":
        return answer == problem.answer
    if problem.kind == "text":
        return " ".join(answer.casefold().split()) == " ".join(_bare(problem.answer).casefold().split())
    if problem.kind == "code":
        return passes(problem.tests or "[]", answer)
    if problem.kind == "number":
        right, given = as_number(problem.answer), as_number(_plain(answer))
        if right is not None and given is not None:
            return right == given
    return same_mathematics(problem.answer, answer)


def _of_kind(problem: EvalProblem, text: str) -> str | None:
    """The answer in a box or a statement, if there is one of the problem's kind."""
    if problem.kind == "choice":
        return _letter(problem, text)
    if problem.kind == "text":
        return _bare(text) or None
    return _expression(text)


def _statements(text: str) -> list[str]:
    """What follows each "the answer is", the last one first; what is called a result comes after all of them."""
    found = []
    for pattern in _STATEMENTS:
        own = []
        for match in pattern.finditer(text):
            lines = text[match.end() :].split("\n")
            # Nothing but decoration behind the colon: the answer stands on the next line that holds something.
            own.append(next((line for line in lines if _bare(line)), ""))
        found += own[::-1]
    return found


def _last_box(text: str) -> str | None:
    """What stands in the last box of LaTeX (`boxed`) that is closed; braces may be nested."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip()
    return None


def _bare(text: str) -> str:
    """A text without emphasis, quotes, mathematics marks and a final stop around it."""
    while True:
        before = text
        text = _LEADING_STOPS.sub("", text.lstrip(_EDGES).rstrip(_EDGES + "."))
        for mark in ("\\(", "\\)", "\\[", "\\]"):
            text = text.removeprefix(mark).removesuffix(mark)
        wrapped = _WRAPPED.fullmatch(text)
        text = wrapped.group(1) if wrapped else text
        if text == before:
            return text


def _plain(text: str) -> str:
    """Numbers as programs write them: no thin spaces or LaTeX commas in them, and a minus that is one."""
    text = text.replace("\u2212", "-").replace("\\$", "").replace("\\%", "").replace("\\!", "")
    return re.sub(r"(?<=\d)(?:\\,|\{,\}|[\u00a0\u2009\u202f])(?=\d{3})", "", text)


def _expression(text: str) -> str | None:
    """A number or an expression: what stands between dollars or behind the last equals sign, else the first number."""
    marked = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", text)
    if marked:
        text = next(part for part in marked[-1] if part)
    text = re.split(r"(?<=[\w)}\]*])[.;!](?:\s|$)|,\s", text, maxsplit=1)[0] if not marked else text
    text = _plain(_bare(text))
    behind = text.rsplit("=", 1)[-1].strip()
    if as_number(behind) is not None:
        return behind
    if re.search(r"[A-Za-z]{3,}", re.sub(r"\\[A-Za-z]+", "", behind)):  # words: a sentence, not an expression
        numbers = _NUMBER.findall(behind)
        return numbers[0] if numbers else None
    return behind if re.search(r"\d|\\|\b[A-Za-z]\b", behind) else None


def _letter(problem: EvalProblem, text: str) -> str | None:
    """The letter of a choice: it stands in front, alone; else the text of a choice counts as its letter."""
    known = LETTERS[: len(problem.choices)] or LETTERS
    bare = _bare(text)
    match = re.match(rf"\(?([{known}])\b\)?(?!['\w])(\s+[a-z])?", bare)
    # A lone A or I before a word may be an article or a pronoun.
    if match and not (match.group(2) and match.group(1) in "AI" and ")" not in match.group(0)):
        return match.group(1)
    texts = [_bare(choice).casefold() for choice in problem.choices]
    return LETTERS[texts.index(bare.casefold())] if bare.casefold() in texts else None
