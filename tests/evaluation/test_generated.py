"""Problems of reasoning-gym's generators: seeded, in splits that share nothing, and judged by their own verifiers."""

import json

import pytest

from hf_stepflow.cli import main
from hf_stepflow.cli.calibrate import load_sources
from hf_stepflow.evaluation import checkers, generated
from hf_stepflow.evaluation.answers import CORRECT, NO_ANSWER, WRONG, Verdict, judge, votes
from hf_stepflow.evaluation.generated import SPLITS, draw_problems, generators, split_of
from hf_stepflow.evaluation.problem import EvalProblem, problem_of
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.evaluation.suite import LENGTHS, SUITE
from hf_stepflow.problems import load_problems
from hf_stepflow.runtime.errors import StepFlowInputError
from tests.support.scripted import scripted_model

SUMS = "reasoning-gym:chain_sum,min_terms=3,max_terms=3"


def test_problems_follow_the_seed() -> None:
    first = load_problems(SUMS, 6)
    assert load_problems(SUMS, 6) == first
    assert load_problems(SUMS, 3) == first[:3]
    assert load_problems(SUMS, 6, seed=1) != first
    assert [one.id for one in first] == [f"chain_sum/test/{number}" for number in range(6)]
    assert all(one.question.count(" + ") + one.question.count(" - ") == 2 for one in first)
    assert "<answer>" in first[0].question


@pytest.mark.parametrize(
    "source", ["coin_flip,min_trials=3,max_trials=5", "chain_sum", "count_bits,min_n=1,max_n=300"]
)
def test_splits_share_no_question(source: str) -> None:
    """Also where a generator has few questions, and whatever the seed: a question is always in the same split."""
    found: dict[str, set[str]] = {split: set() for split in SPLITS}
    for seed in (0, 1):
        for split in SPLITS:
            problems = load_problems(f"reasoning-gym:{source}", 30, split=split, seed=seed)
            questions = [one.question.casefold() for one in problems]
            assert len(set(questions)) == len(questions)
            found[split].update(questions)
    assert all(found.values())
    assert sum(map(len, found.values())) == len(set.union(*found.values()))
    assert split_of("How  many\nEGGS?") == split_of("how many eggs?")


def only_five(split: str) -> list[EvalProblem]:
    """The problems of a generator with a single question, of which two splits have none."""
    try:
        return draw_problems("count_bits", {"min_n": 5, "max_n": 5}, 3, split)
    except StepFlowInputError:
        return []


def test_a_generator_may_run_out_of_questions(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generated, "_PATIENCE", 200)
    monkeypatch.setattr(generated.logger, "warning", lambda text, *rest: caplog.records.append(text % rest))
    problems = load_problems("reasoning-gym:count_bits,min_n=1,max_n=12", 100)
    assert 0 < len(problems) < 12
    assert f"no more than {len(problems)} different questions" in str(caplog.records)
    (question,) = {one.question for split in SPLITS for one in only_five(split)}
    empty = next(split for split in SPLITS if not only_five(split))
    assert "number 5" in question
    with pytest.raises(StepFlowInputError, match="finds no question for the split"):
        draw_problems("count_bits", {"min_n": 5, "max_n": 5}, 3, empty)


def test_its_verifier_is_the_judge() -> None:
    (problem,) = load_problems("reasoning-gym:decimal_chain_sum", 1)
    assert judge(problem, f"So <answer>{problem.answer}</answer>").outcome == CORRECT
    assert judge(problem, f"First <answer>1</answer>, no: <answer>\n{problem.answer}\n</answer>").outcome == CORRECT
    assert judge(problem, f"So it is \\boxed{{{problem.answer}}}.").outcome == CORRECT
    assert judge(problem, f"The answer is {problem.answer}.").outcome == CORRECT
    assert judge(problem, f"It makes {problem.answer}").outcome == CORRECT
    assert judge(problem, "<answer>123456789</answer>").outcome == WRONG
    assert judge(problem, "Who knows.").outcome == NO_ANSWER
    # It accepts every solution, and not only the one that the generator found.
    (countdown,) = load_problems("reasoning-gym:countdown,min_numbers=3,max_numbers=3", 1)
    first, sign, rest = countdown.answer.partition(" ")
    assert judge(countdown, f"<answer>({first}){sign}{rest}</answer>").outcome == CORRECT
    assert judge(countdown, "<answer>1 + 1</answer>").outcome == WRONG


def test_lines_of_an_answer_are_kept() -> None:
    (problem,) = load_problems("reasoning-gym:rotate_matrix,min_n=3,max_n=3", 1)
    assert "\n" in problem.answer
    assert judge(problem, f"So:\n<answer>\n{problem.answer}\n</answer>").outcome == CORRECT


def test_partial_marks_are_wrong() -> None:
    import reasoning_gym

    (problem,) = load_problems("reasoning-gym:chain_sum", 1)
    source = json.loads(problem.verifier)
    data_set = reasoning_gym.create_dataset(source["generator"], **source["arguments"])
    given = f"about {problem.answer} or so"
    assert 0 < data_set.score_answer(given, data_set[source["index"]]) < 1
    assert judge(problem, f"<answer>{given}</answer>").outcome == WRONG


def test_an_answer_cannot_stall_or_reach_the_judge(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (problem,) = load_problems("reasoning-gym:simple_integration", 1)
    assert judge(problem, f"<answer>{problem.answer}</answer>").outcome == CORRECT
    monkeypatch.setattr(checkers, "SECONDS", 0.5)
    assert judge(problem, "<answer>9**9**9**9**9</answer>").outcome == WRONG
    monkeypatch.undo()
    assert judge(problem, f"<answer>{problem.answer}</answer>").outcome == CORRECT  # a new process


def test_what_cannot_be_made_again_is_no_wrong_answer() -> None:
    (problem,) = load_problems(SUMS, 1)
    lost = EvalProblem("1", "?", "3", kind="verifier", verifier=problem.verifier.replace("chain_sum", "no_sum"))
    with pytest.raises(StepFlowInputError, match=r"did not make this problem again.*no_sum"):
        judge(lost, "<answer>3</answer>")


def test_problems_without_a_single_right_answer() -> None:
    (problem,) = load_problems("reasoning-gym:graph_color", 1)
    assert problem.answer == "-"
    assert judge(problem, "<answer>-</answer>").outcome == WRONG


def test_answers_vote_by_their_text() -> None:
    (problem,) = load_problems(SUMS, 1)
    verdicts = [Verdict(WRONG, "7"), Verdict(CORRECT, "8"), Verdict(CORRECT, "8"), Verdict(CORRECT, "8.0")]
    assert votes(problem, verdicts)[-1].verdict.answer == "8"


def test_an_evaluation() -> None:
    problems = load_problems("reasoning-gym:chain_sum,max_terms=3", 8)
    answers = {one.question: one.answer for one in problems}
    wrong = problems[3].question

    def respond(prompt: str) -> str:
        question = prompt.strip()
        return f"So <answer>{answers[question] if question != wrong else 0}</answer>"

    model, tokenizer = scripted_model(respond)
    result = evaluate(model, problems, {"base": False}, tokenizer=tokenizer, max_new_tokens=60, progress=False)
    assert result.arms()[0].outcomes == {"correct": 7, "wrong": 1}


def test_a_generator_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(load_problems("reasoning-gym:bf", 5)) == 5
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("reasoning-gym:chain_sums", "no generator 'chain_sums'", "did you mean chain_sum"),
        ("reasoning-gym:sudok", "no generator", "sudoku or "),
        ("reasoning-gym:", "no generator ''", "--list-problems"),
        ("reasoning-gym:composite", "no generator 'composite'", "--list-problems"),
        ("reasoning-gym:chain_sum,terms=3", "no knob 'terms'", "min_terms=2, max_terms=6, min_digits=1"),
        ("reasoning-gym:chain_sum,seed=3", "no knob 'seed'", "its knobs"),
        ("reasoning-gym:chain_sum,min_terms", "expected KEY=VALUE", "for instance"),
        ("reasoning-gym:chain_sum,min_terms=9,max_terms=2", "refuses {'max_terms': 2, 'min_terms': 9}", "the knobs"),
        ("reasoning-gym:chain_sum,min_terms=many", "refuses {'min_terms': 'many'}", "the knobs"),
        ("stepflow-suite:sum@long", "no task 'sum'", "did you mean 'sums'"),
        ("stepflow-suite:sums", "needs a length, got ''", "stepflow-suite:sums@short; lengths: short, medium, long"),
        ("stepflow-suite:sums@huge", "needs a length, got 'huge'", "lengths"),
    ],
)
def test_what_does_not_exist_is_named(source: str, message: str, hint: str) -> None:
    with pytest.raises(StepFlowInputError) as caught:
        load_problems(source, 2)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_splits_are_named() -> None:
    with pytest.raises(StepFlowInputError, match="no split 'dev'"):
        load_problems(SUMS, 2, split="dev")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(generated, "find_spec", lambda _: None)
    for source in (SUMS, "stepflow-suite:sums@short"):
        with pytest.raises(StepFlowInputError, match=r"reasoning-gym, which is not installed\n.*hf-stepflow\[eval\]"):
            load_problems(source, 2)
    with pytest.raises(SystemExit) as caught:
        main(["eval", "--list-problems"])
    assert caught.value.code == 0
    assert "hf-stepflow[eval]" in capsys.readouterr().out


def test_the_list_of_problems(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["eval", "--list-problems"])
    assert caught.value.code == 0
    listed = capsys.readouterr().out
    for text in ("aime24         30 problems", "errands-90", "stepflow-suite:TASK@LENGTH", "not yet measured"):
        assert text in listed
    assert {line.split()[0] for line in listed.splitlines() if line[:2] == "  " and line[2:3] != " "} > set(
        generators()
    )
    assert "min_terms=2 max_terms=6" in listed
    assert max(map(len, listed.splitlines())) < 200


def test_every_generator_has_knobs_that_json_can_write() -> None:
    found = generators()
    assert len(found) > 90
    assert "composite" not in found
    assert found["chain_sum"]["min_terms"] == 2
    assert not any({"seed", "size"} & set(knobs) for knobs in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(generators()))
def test_every_generator(name: str) -> None:
    problems = load_problems(f"reasoning-gym:{name}", 2)
    checkers._GENERATORS.stop()  # another process makes the same problems
    for problem in problems:
        expected = WRONG if problem.answer == "-" else CORRECT
        assert judge(problem, f"<answer>{problem.answer}</answer>").outcome == expected
    assert load_problems(f"reasoning-gym:{name}", 1) == problems[:1]


def test_the_suite() -> None:
    assert 8 <= len(SUITE) <= 12
    assert {task.strains for task in SUITE.values()} == {"arithmetic", "premises", "state"}
    for name, task in SUITE.items():
        assert tuple(task.knobs) == LENGTHS
        lengths = []
        for length in LENGTHS:
            problems = load_problems(f"stepflow-suite:{name}@{length}", 4)
            assert len(problems) == 4
            lengths.append(sum(len(one.question) for one in problems))
            assert judge(problems[0], f"<answer>{problems[0].answer}</answer>").outcome == CORRECT, (name, length)
        assert lengths == sorted(lengths), name  # longer tasks have longer questions


def test_calibrate_takes_them_too() -> None:
    sources = [SUMS, "stepflow-suite:legs@short"]
    problems, _ = load_sources(sources, 3, 0)
    assert [one.id for one in problems[::3]] == [
        f"{SUMS}/chain_sum/calibration/0",
        f"{sources[1]}/leg_counting/calibration/0",
    ]
    test = {one.question for one in load_problems(SUMS, 50)}
    assert not test & {one.question for one in load_sources([SUMS], 50, 0)[0]}


def test_other_problems_are_asked_as_before() -> None:
    """A results file of an earlier release goes on, since nothing is added to what identifies its problems."""
    assert set(EvalProblem("1", "2 + 2?", "4").asked()) == {"id", "question", "answer", "choices", "tests", "kind"}
    assert "verifier" in load_problems(SUMS, 1)[0].asked()
    with pytest.raises(StepFlowInputError, match="only problems of a generator"):
        problem_of({"id": 1, "question": "2 + 2?", "answer": 4, "kind": "verifier"})
