"""Judges responses: finds the answer, compares it with the right one, and takes the vote of several responses."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from hf_stepflow.runtime.errors import StepFlowInputError

from .checkers import passes, same_mathematics, satisfies_verifier
from .problem import LETTERS, NUMBER, EvalProblem, as_number, is_words

# All outcomes but the first count as wrong; tables also count the last two by themselves.
CORRECT, WRONG, NO_ANSWER, UNFINISHED = "correct", "wrong", "no answer", "unfinished"
OUTCOMES = (CORRECT, WRONG, NO_ANSWER, UNFINISHED)

_NUMBER = re.compile(rf"(?<![\w.)]){NUMBER}")
_STATEMENTS = [
    re.compile(rf"\b{word}\b\W{{0,4}}?(?:(?:is|are)\b\s*[:=]?|[:=])", re.IGNORECASE) for word in ("answer", "result")
]
_WRAPPED = re.compile(r"\\(?:text|textbf|mathbf|mathrm|boldsymbol|mbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
# Where the answer in a statement ends: with the sentence, or before a comma and words; lists go on behind commas.
_CLAUSE_END = re.compile(r"(?<=[\w)}\]*%])[.;!](?:\s|$)|,\s+(?=(?:[aI]\s+)?[A-Za-z]{2})")
_SENTENCE_END = re.compile(r"(?:(?<=\w{3})|(?<=[)}\]*\"'$]))[.;!](?:\s|$)")  # not behind "St" or "J"
_AND = re.compile(r",?\s+(?:and|or)\s+(?=[-+\d\\$.(\[])")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z]+\*?\}|\\[A-Za-z]+")
_EDGES = " \t\n*_`\"'$:"
_LEADING_STOPS = re.compile(r"^(?:\.{2,}|\.(?!\d))")  # one before a digit is a decimal point
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BLOCK = re.compile(r"```[ \t]*([A-Za-z0-9]*)[^\n]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Verdict:
    """The judgement of a response.

    Attributes:
        outcome: One of `OUTCOMES`.
        answer: The answer found in the response, or None.
    """

    outcome: str
    answer: str | None = None


def judge(problem: EvalProblem, text: str, is_finished: bool = True, *, run_code: bool = False) -> Verdict:
    """Judges a response.

    Args:
        problem: The problem that was asked.
        text: The text in which the answer is looked for: the summary, or all that the model wrote if it wrote none.
        is_finished: Whether the model ended its turn.
        run_code: Whether programs may be run; they get a process of their own, with the rights of this one.

    Raises:
        StepFlowInputError: The problem asks for a program, and `run_code` is False.
    """
    check_may_run(problem, run_code)
    if not is_finished:
        return Verdict(UNFINISHED)
    answer = extract(problem, text)
    if answer is None:
        return Verdict(NO_ANSWER)
    return Verdict(CORRECT if is_right(problem, answer) else WRONG, answer)


def check_may_run(problem: EvalProblem, run_code: bool) -> None:
    """Raises StepFlowInputError for a programming problem if programs may not be run."""
    if problem.kind == "code" and not run_code:
        raise StepFlowInputError(
            f"the answer to problem {problem.id!r} is a program, and checking it means running what the model wrote",
            hint="pass run_code=True (--run-code) on a machine where that is safe",
        )


def extract(problem: EvalProblem, text: str) -> str | None:
    """Finds the answer in a response; None if there is none.

    The answer stands in the last box, else behind the last "answer is" that is followed by an answer of this kind,
    else it is the last number (numbers, mathematics) or the last line (texts). A program is the last block marked as
    Python, else the last block. To a problem of a generator, it stands before all that between the last `<answer>` and
    `</answer>`, line breaks included.
    """
    if problem.kind == "code":
        blocks = [(mark.lower(), block) for mark, block in _BLOCK.findall(text)]
        marked = [block for mark, block in blocks if mark in ("python", "python3", "py")]
        return (marked or [block for _, block in blocks] or [None])[-1]
    if problem.kind == "verifier" and _TAGGED.search(text):
        return _TAGGED.findall(text)[-1].strip() or None
    box = _last_box(text)
    if box is not None:
        return _boxed(problem, box)
    for statement in _statements(text):
        found = _stated(problem, statement)
        if found is not None:
            return found
    if _is_text(problem):
        return _bare(text.strip().rsplit("\n", 1)[-1]) or None
    if problem.kind in ("number", "math", "verifier"):
        numbers = _NUMBER.findall(_plain(text).replace("\\$", ""))
        return numbers[-1] if numbers else None
    return None


def is_right(problem: EvalProblem, answer: str) -> bool:
    """Whether an extracted answer is the right one."""
    if problem.kind == "choice":
        return answer == problem.answer
    if problem.kind == "code":
        return passes(problem.tests or "[]", answer)
    if problem.kind == "verifier":
        return satisfies_verifier(problem.verifier or "", answer)
    right, given = (" ".join(_bare(text).split()) for text in (problem.answer, answer))
    if problem.kind == "text":
        return right.casefold() == given.casefold()
    if right == given:
        return True
    number = _value(problem.answer)
    if number is not None:
        answer = _among_words(answer) or answer
        value = _value(answer)
        if problem.kind == "number" and value is not None:
            return number == value
    return same_mathematics(_plain(problem.answer), _plain(answer))


def _is_text(problem: EvalProblem) -> bool:
    """Whether the right answer is words, also where LaTeX marks them as a text."""
    if problem.kind == "verifier":
        return as_number(problem.answer) is None
    if problem.kind != "math":
        return problem.kind == "text"
    bare = _bare(problem.answer)
    is_wrapped = _WRAPPED.fullmatch(problem.answer.strip()) is not None and re.search(r"[A-Za-z]{3}", bare) is not None
    return is_wrapped or is_words(bare)


def _boxed(problem: EvalProblem, text: str) -> str | None:
    """The answer in a box, if it is one of the problem's kind; mathematics unchanged."""
    if problem.kind == "choice":
        return _letter(problem, text)
    if _is_text(problem):
        return _bare(text) or None
    text = _plain(_trimmed(text))
    if problem.kind == "math":
        return text or None
    behind = _behind_equals(text)
    if _value(behind) is not None:
        return behind
    return text if _has_mathematics(_bare(text)) else None


def _stated(problem: EvalProblem, text: str) -> str | None:
    """The answer behind "the answer is": between dollars if there are any, else at the beginning of the sentence."""
    if problem.kind == "choice":
        return _letter(problem, text)
    if _is_text(problem):
        return _bare(_SENTENCE_END.split(text, maxsplit=1)[0]) or None
    marked = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", text)
    if marked:
        return _boxed(problem, next(part for part in marked[-1] if part))
    text = _plain(_trimmed(_CLAUSE_END.split(_AND.sub(", ", text), maxsplit=1)[0]))
    if not re.search(r"[A-Za-z]{3,}", _COMMAND.sub("", text)):
        return _boxed(problem, text) if _has_mathematics(text) else None
    # Words too: in front of them may be an expression; else the first number counts.
    behind = _behind_equals(text)
    if _value(behind) is not None:
        return behind
    front = _trimmed(re.split(r"\s+(?=\(?[A-Za-z]{2})", text, maxsplit=1)[0])
    if re.search(r"\d|\\", front) and re.search(r"[\\^A-Za-z(\[]", front) and front.count("{") == front.count("}"):
        return front
    numbers = _NUMBER.findall(behind)
    return numbers[0] if numbers else None


def _has_mathematics(text: str) -> bool:
    return re.search(r"\d|\\|\b[A-Za-z]\b", text) is not None


def _behind_equals(text: str) -> str:
    """The text behind the last equals sign; the whole text if commas make it a list."""
    return text if re.search(r",(?!\d{3})", text) else text.rsplit("=", 1)[-1].strip()


def _value(text: str) -> Fraction | None:
    """The value of a number in digits, with or without LaTeX."""
    return as_number(_plain(text).replace("\\$", "").replace("\\%", ""))


def _among_words(text: str) -> str | None:
    """The only number of a text that otherwise holds words, such as a unit or a sentence."""
    parts = [part.strip(".,:;!?()") for part in _WRAPPED.sub(r" \1 ", text).split()]
    numbers = [part for part in parts if _value(part) is not None]
    words = [part for part in parts if part and part not in numbers]
    is_plain = all(re.fullmatch(r"[aI]|[A-Za-z'-]{2,}", word) for word in words)
    return numbers[0] if len(numbers) == 1 and words and is_plain else None


def _statements(text: str) -> list[str]:
    """The line behind each "the answer is", the last one first, then behind each "the result is"."""
    found = []
    for pattern in _STATEMENTS:
        own = []
        for match in pattern.finditer(text):
            lines = text[match.end() :].split("\n")
            # With only decoration behind the colon, the answer stands on the next line that is not empty.
            own.append(next((line for line in lines if _bare(line)), ""))
        found += own[::-1]
    return found


def _last_box(text: str) -> str | None:
    """The content of the last closed box of LaTeX (`boxed`); braces may be nested."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip()
    return None


def _trimmed(text: str) -> str:
    """A text without the emphasis, quotes, mathematics marks and full stop around it."""
    while True:
        before = text
        text = _LEADING_STOPS.sub("", text.lstrip(_EDGES).rstrip(_EDGES + "."))
        for mark in ("\\(", "\\)", "\\[", "\\]"):
            text = text.removeprefix(mark).removesuffix(mark)
        if text == before:
            return text


def _bare(text: str) -> str:
    """A text trimmed, and without LaTeX commands for a text or its weight."""
    while True:
        text = _trimmed(text)
        wrapped = _WRAPPED.fullmatch(text)
        if wrapped is None:
            return text
        text = wrapped.group(1)


def _plain(text: str) -> str:
    """Mathematics in plain LaTeX: a minus that is one, and no thin spaces or LaTeX commas in numbers."""
    text = text.replace("\u2212", "-").replace("\u00b0", "^\\circ").replace("\\!", "")
    return re.sub(r"(?<=\d)(?:\\,|\{,\}|[\u00a0\u2009\u202f])(?=\d{3})", "", text)


def _letter(problem: EvalProblem, text: str) -> str | None:
    """The letter of a choice: it stands alone in front, or the text is that of a choice."""
    known = LETTERS[: len(problem.choices)] or LETTERS
    bare = _bare(text)
    match = re.match(rf"\(?([{known}])\b\)?(?!['\w])(\s+[a-z])?", bare)
    # A lone A or I before a word may be an article or a pronoun.
    if match and not (match.group(2) and match.group(1) in "AI" and ")" not in match.group(0)):
        return match.group(1)
    texts = [_bare(choice).casefold() for choice in problem.choices]
    return LETTERS[texts.index(bare.casefold())] if bare.casefold() in texts else None


@dataclass(frozen=True)
class Vote:
    """The vote of some responses.

    Attributes:
        verdict: The verdict on the answer given most often; among equals, on the one given first.
        chosen: The index of the first response that gave it.
    """

    verdict: Verdict
    chosen: int


def votes(problem: EvalProblem, verdicts: Sequence[Verdict]) -> list[Vote]:
    """Takes the vote after each response: of the first alone, of the first two, and so on (Wang et al., 2023).

    Responses without an answer do not vote. An answer counts with the first earlier one that it would match as the
    right answer; programs, and answers to problems of a generator, count together only if they are the same.

    Args:
        problem: The problem that was asked.
        verdicts: The verdict on each response, in the order in which the responses were drawn.
    """
    groups: list[list[int]] = []
    found = []
    for index, verdict in enumerate(verdicts):
        if verdict.answer is not None:
            own = next((group for group in groups if _agree(problem, verdicts[group[0]].answer, verdict.answer)), None)
            if own is None:
                groups.append([index])
            else:
                own.append(index)
        if groups:
            first = max(groups, key=len)[0]
            found.append(Vote(verdicts[first], first))
        else:
            is_unfinished = all(one.outcome == UNFINISHED for one in verdicts[: index + 1])
            found.append(Vote(Verdict(UNFINISHED if is_unfinished else NO_ANSWER), 0))
    return found


def _agree(problem: EvalProblem, first: str | None, answer: str) -> bool:
    """Whether an answer would be right if the first one were."""
    if first is None or first == answer:
        return first == answer
    return problem.kind not in ("code", "verifier") and is_right(replace(problem, answer=first), answer)
