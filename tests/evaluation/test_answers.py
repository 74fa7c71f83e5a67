"""Answers: what is extracted, what counts as right, and what is refused."""

import base64
import json
import pickle
import zlib
from fractions import Fraction

import pytest

from hf_stepflow.evaluation import checkers
from hf_stepflow.evaluation.answers import CORRECT, NO_ANSWER, UNFINISHED, WRONG, judge
from hf_stepflow.evaluation.problem import EvalProblem, as_number, as_problems, problem_of
from hf_stepflow.problems import BENCHMARKS, load_problems, read_problems
from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError


def problem(kind: str, answer: str, **more) -> EvalProblem:
    return EvalProblem("1", "?", answer, kind=kind, **more)


@pytest.mark.parametrize(
    ("kind", "answer", "text", "outcome"),
    [
        ("number", "24", " The answer is 24.", CORRECT),
        ("number", "1,250", "It costs $1,250.00 in all.", CORRECT),
        ("number", "24", "The answer is 24, not 25.", CORRECT),
        ("number", "24", "First 24, then \\boxed{25}", WRONG),
        ("number", "-3", "So it is -3", CORRECT),
        ("number", "24", "I do not know.", NO_ANSWER),
        ("number", "7", "\\boxed{no idea} 7", NO_ANSWER),
        ("number", "24", "The answer is 24.\nThis answer is correct.", CORRECT),
        ("number", "24", "The answer is 24. This result is 2 times larger.", CORRECT),
        ("number", "24", "**Answer:** 24 apples", CORRECT),
        ("number", "24", "The final answer is:\n\n$24$", CORRECT),
        ("number", "1", "\\boxed{\\frac{1}{2}}", WRONG),
        ("number", "1", "The answer is 1/2.", WRONG),
        ("number", "0.5", "The answer is 1/2.", CORRECT),
        ("number", "0.5", "\\boxed{\\frac{1}{2}}", CORRECT),
        ("number", "1", "\\boxed{x_1 = 3}", WRONG),
        ("number", "2", "\\boxed{2^{10}}", WRONG),
        ("number", "1024", "\\boxed{2^{10}}", CORRECT),
        ("number", "3", "The answer is \u22123.", WRONG),
        ("number", "-3", "The answer is \u22123.", CORRECT),
        ("number", "1000", "\\boxed{1{,}000}", CORRECT),
        ("number", "1000", "\\boxed{1\\,000}", CORRECT),
        ("number", "5000", "The answer is 5\u202f000.", CORRECT),
        ("number", "7", "The answer is 3 + 4 = 7.", CORRECT),
        ("number", "100000", "The answer is 1e5.", CORRECT),
        ("number", "10", "It lies between 5-10", CORRECT),
        ("number", "$5", "The answer is $5.", CORRECT),
        ("number", "0.5", "\\boxed{.5}", CORRECT),
        ("number", "5", "\\boxed{.5}", WRONG),
        ("math", "\\frac{1}{2}", "\\boxed{.5}", CORRECT),
        ("number", "0.25", "The answer is $.25.", CORRECT),
        ("number", "25", "The answer is $.25.", WRONG),
        ("number", "-0.5", "So it is -.5", CORRECT),
        ("number", "24", "The answer is ... 24", CORRECT),
        ("number", "24", "The answer is ...24.", CORRECT),
        ("math", "\\frac{1}{2}", "Hence \\boxed{0.5}.", CORRECT),
        ("math", "x^2+2x+1", "\\boxed{(x+1)^2}", CORRECT),
        ("math", "(1, 2)", "\\boxed{(1,2)}", CORRECT),
        ("math", "\\sqrt{12}", "\\boxed{2\\sqrt{3}}", CORRECT),
        ("math", "204", "\\boxed{203}", WRONG),
        ("math", "204", "We get $x = 204$", CORRECT),
        ("math", "5", "\\boxed{5", CORRECT),
        ("math", "\\frac{3}{4}", "\\boxed{\\frac{3}{4}}", CORRECT),
        ("math", "12", "The answer is **12**.", CORRECT),
        ("math", "24", "The answer is 24. I checked it.", CORRECT),
        ("math", "12", "The answer is 12.\nThis answer is correct.", CORRECT),
        ("math", "12", "The final answer is:\n\n$12$", CORRECT),
        ("math", "x+1", "The answer is $x+1$, as claimed.", CORRECT),
        ("text", "Paris", "The answer is paris.", CORRECT),
        ("text", "Paris", "**Answer:** Paris", CORRECT),
        ("text", "Paris", "The answer is:\nParis", CORRECT),
        ("text", "Paris", "\\boxed{\\text{Paris}}", CORRECT),
        ("text", "Paris", "I thought about it.\n**Paris**", CORRECT),
        ("text", "New York", "It took long.\nnew  york", CORRECT),
        ("text", "Paris", "\\boxed{London}", WRONG),
    ],
)
def test_answers(kind: str, answer: str, text: str, outcome: str) -> None:
    assert judge(problem(kind, answer), text).outcome == outcome


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 1,250.5 ", Fraction(2501, 2)),
        ("$.25.", Fraction(1, 4)),
        ("-1/2", Fraction(-1, 2)),
        ("50%", Fraction(50)),
        ("1e-5", Fraction(1, 10**5)),
        ("1E999", Fraction(10**999)),
        ("1e10000000", None),  # ten million digits
        ("12e-99999999999", None),
        ("1,2", None),
        ("3,5,7", None),
        ("2516_8", None),
        ("1/0", None),
        (".", None),
        ("", None),
    ],
)
def test_numbers_in_digits(text: str, number: Fraction | None) -> None:
    assert as_number(text) == number


def test_a_number_with_an_absurd_exponent_is_none() -> None:
    for text in ("It is 12e10000000", "\\boxed{1e10000000}", "The answer is 1e-10000000."):
        assert judge(problem("number", "1"), text).outcome in (WRONG, NO_ANSWER)


def test_a_tower_of_powers_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkers, "SECONDS", 3.0)
    for tower in ("9^{9^{9^{9}}}", "10^{10^{10}}", "1000000000!"):
        assert judge(problem("math", "5"), f"\\boxed{{{tower}}}").outcome == WRONG
    monkeypatch.setattr(checkers, "SECONDS", 30.0)
    assert judge(problem("math", "5"), "\\boxed{4 + 1}").outcome == CORRECT  # and the next one is checked again


CHOICES = ("a cat", "A dog", "two birds", "none")


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("The answer is B.", CORRECT),
        ("The answer is (B)", CORRECT),
        ("\\boxed{B}", CORRECT),
        ("\\boxed{\\text{B}}", CORRECT),
        ("\\boxed{\\text{(B)}}", CORRECT),
        ("The answer is **B**", CORRECT),
        ("The answer is A dog.", CORRECT),
        ("The answer is C, though B is near.", WRONG),
        ("The answer is: B", CORRECT),
        ("The correct answer is: **B**", CORRECT),
        ("\\boxed{\\textbf{(B)}}", CORRECT),
        ("\\boxed{\\mathrm{B}}", CORRECT),
        ("The answer is \\(B\\).", CORRECT),
        ("The answer is B because dogs bark.", CORRECT),
        ("The answer is B. This result is consistent with all.", CORRECT),
        ("Final Answer: A quick look shows that", NO_ANSWER),
        ("The answer is I am not sure", NO_ANSWER),
        ("The answer is E.", NO_ANSWER),
        ("The answer is Between", NO_ANSWER),
        ("I think B could be it", NO_ANSWER),
        ("The answer is B's", NO_ANSWER),
        ("B", NO_ANSWER),
    ],
)
def test_letters_are_strict(text: str, outcome: str) -> None:
    assert judge(problem("choice", "B", choices=CHOICES), text).outcome == outcome


def test_unfinished_is_wrong_whatever_it_says() -> None:
    assert judge(problem("number", "24"), "The answer is 24.", is_finished=False).outcome == UNFINISHED


def test_programs_run_only_when_allowed() -> None:
    tests = json.dumps([["2 3\n", "5\n"], ["10 -4\n", "6"]])
    adds = problem("code", "-", tests=tests)
    good = "Here:\n```python\na, b = map(int, input().split())\nprint(a + b)\n```"
    with pytest.raises(StepFlowInputError, match=r"means running.*\n.*run_code=True"):
        judge(adds, good)
    assert judge(adds, good, run_code=True).outcome == CORRECT
    assert judge(adds, good.replace("+", "-"), run_code=True).outcome == WRONG
    assert judge(adds, good.replace("print", "raise "), run_code=True).outcome == WRONG
    assert judge(adds, "no program", run_code=True).outcome == NO_ANSWER
    with_sample = good.replace("python", "Python3") + "\nIt prints\n```\n5\n```"
    assert judge(adds, with_sample, run_code=True).outcome == CORRECT


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("import sys; sys.stdout.buffer.write(b'\\xff')", WRONG),
        ("import os; print(os.environ.get('SECRET', 'none'))", CORRECT),
        ("x = 'a' * (1 << 33); print('none')", WRONG),
        ("while True: print('none')", WRONG),
        ("import os, time\nif os.fork() == 0: time.sleep(60)\nelse: print('none')", CORRECT),
    ],
)
def test_programs_are_kept_in_bounds(program: str, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "token")
    monkeypatch.setattr(checkers, "SECONDS", 5.0)
    says = problem("code", "-", tests=json.dumps([["", "none"]]))
    assert judge(says, f"```python\n{program}\n```", run_code=True).outcome == outcome


def test_problems_from_a_file(tmp_path) -> None:
    path = tmp_path / "problems.jsonl"
    lines = [
        {"id": 1, "question": "2 + 2?", "answer": 4, "solution": "left out"},
        {"id": "b", "question": "Which?", "answer": "A dog", "choices": list(CHOICES)},
        {"id": "c", "question": "Half?", "answer": "\\frac{1}{2}"},
        {"id": "d", "question": "Add.", "answer": "-", "tests": [["1", "1"]]},
        {"id": "e", "question": "Capital?", "answer": "Rome", "kind": "text"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    problems = load_problems(path)
    assert [one.kind for one in problems] == ["number", "choice", "math", "code", "text"]
    assert problems[1].answer == "B"
    assert problems[1].prompt == "Which?\nA) a cat\nB) A dog\nC) two birds\nD) none"
    assert load_problems(path, 2) == problems[:2]
    odd = {"id": 1, "question": "A line\u2028and another?", "answer": 3, "choices": [1, 2, 3]}
    path.write_text(json.dumps(odd, ensure_ascii=False), encoding="utf-8-sig")
    assert load_problems(path)[0].answer == "C"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no problems"),
        ("[1]", "line 1.*expected an object"),
        ('{"id": 1', "line 1"),
        (
            '{"id": 1, "question": "?", "answer": "4"}\n{"id": 1, "question": "?", "answer": "4"}',
            "line 2.*comes twice",
        ),
        ('{"id": 1, "answer": "4"}', "line 1: no question"),
        ('{"id": 1, "question": " ", "answer": ""}', "no question and no answer"),
        ('{"id": 1, "question": "?", "answer": "x", "choices": ["a", "b"]}', "neither a letter"),
        ('{"id": 1, "question": "?", "answer": "A", "choices": ["a"]}', "at least two choices"),
        ('{"id": 1, "question": "?", "answer": "few", "kind": "number"}', "not a number"),
        ('{"id": 1, "question": "?", "answer": "-", "tests": [{"input": "1"}]}', "needs tests"),
        ('{"id": 1, "question": "?", "answer": "-", "tests": [["1", 2]]}', "both texts"),
        ('{"id": 1, "question": "?", "answer": "-", "tests": "[ ]"}', "needs tests"),
        ('{"id": 1, "question": "?", "answer": ["4"]}', r"line 1: the answer to problem '1' must be.*\['4'\]"),
        (
            '{"id": 1, "question": "?", "answer": true}',
            "the answer to problem '1' must be a text or a number, got True",
        ),
        ('{"id": 1, "question": "?", "answer": NaN}', "the answer to problem '1' must be.*nan"),
        ('{"id": [1], "question": "?", "answer": "4"}', "line 1: the id must be"),
        ('{"id": 1, "question": [{"role": "user", "content": "?"}], "answer": 4}', "the question of problem '1' must"),
        ('{"id": 1, "question": "?", "answer": "A", "choices": [["x"], "y"]}', "a choice of problem '1' must be"),
        ('{"id": 1, "question": "?", "answer": "x", "kind": "poem"}', "kind must be one of"),
        ('{"id": 1, "question": "?", "answer": "x", "kind": "code"}', "needs tests"),
    ],
)
def test_bad_files_are_refused(tmp_path, text: str, words: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    with pytest.raises(StepFlowFileError, match=words):
        read_problems(path)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(StepFlowInputError, match=r"no problems by the name of 'aime99'.*\n.*aime24"):
        load_problems("aime99")
    with pytest.raises(StepFlowInputError, match=r"no level 'chains-99'.*\n.*chains-2"):
        load_problems("reasoner:chains-99")
    with pytest.raises(StepFlowInputError, match="limit"):
        load_problems("reasoner:chains-2", 0)


def test_rows_of_the_benchmarks_become_problems() -> None:
    """Rows made by hand in the shape of the published sets."""
    aime = BENCHMARKS["aime24"].convert(3, {"problem": "Find x.", "answer": 204}, 0)
    assert aime is not None
    assert (aime.id, aime.answer, aime.kind) == ("3", "204", "math")
    assert "\\boxed{}" in aime.prompt
    row = {"Question": " Why? ", "Correct Answer": "yes\n"}
    row |= {f"Incorrect Answer {one}": f"no {one}" for one in (1, 2, 3)}
    asked = [BENCHMARKS["gpqa-diamond"].convert(number, row, seed) for number in range(8) for seed in (0, 1)]
    assert all(one is not None and one.choices["ABCD".index(one.answer)] == "yes" for one in asked)
    assert len({one.answer for one in asked if one is not None}) == 4
    assert asked[0] == BENCHMARKS["gpqa-diamond"].convert(0, row, 0)

    hidden = json.dumps([{"input": "1", "output": "1", "testtype": "stdin"}])
    packed = base64.b64encode(zlib.compress(pickle.dumps(hidden))).decode()
    public = json.dumps([{"input": "2", "output": "2", "testtype": "stdin"}])
    row = {"question_id": "q", "question_content": "Echo.", "public_test_cases": public}
    for private in (hidden, packed):
        echo = BENCHMARKS["livecodebench"].convert(0, row | {"private_test_cases": private}, 0)
        assert echo is not None
        assert json.loads(echo.tests or "") == [["2", "2"], ["1", "1"]]
    by_call = row | {"private_test_cases": hidden.replace("stdin", "functional")}
    assert BENCHMARKS["livecodebench"].convert(0, by_call, 0) is None


def test_problems_are_checked_one_by_one() -> None:
    assert problem_of({"id": 1.5, "question": "?", "answer": 0}) == EvalProblem("1.5", "?", "0", kind="number")
    for wrong in (4, None, ["4"], " "):
        with pytest.raises(StepFlowInputError, match="the answer of problem '7' must be a text"):
            as_problems([EvalProblem("7", "?", wrong)])
    with pytest.raises(StepFlowInputError, match="the question of problem '7' must be a text"):
        as_problems([EvalProblem("7", [{"role": "user", "content": "?"}], "4")])
    with pytest.raises(StepFlowInputError, match="the choice A of problem '7' must be a text"):
        as_problems([EvalProblem("7", "?", "A", choices=(1, 2), kind="choice")])
    with pytest.raises(StepFlowInputError, match="at most 26"):
        problem_of({"id": 1, "question": "?", "answer": "A", "choices": ["x"] * 27})
