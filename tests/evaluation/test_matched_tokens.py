"""Methods beside StepFlow at the same number of generated tokens: votes, token counts, the matched base."""

import json
import xml.etree.ElementTree as ET
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_stepflow.cli import main
from hf_stepflow.evaluation.answers import CORRECT, NO_ANSWER, UNFINISHED, WRONG, Verdict, votes
from hf_stepflow.evaluation.arms import PLAN_AND_SOLVE, Arm, combine_arms, make_arms, parse_arm
from hf_stepflow.evaluation.matched_tokens import Curve, compute_of
from hf_stepflow.evaluation.page import ChartPoint, tokens_chart
from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.evaluation.result import EvaluationResult
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.evaluation.sampler import Sampler
from hf_stepflow.evaluation.statistics import Estimate, mean_difference, proportion
from hf_stepflow.problems import load_problems
from hf_stepflow.reasoner import load_reasoner
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowInputError

NUMBER = EvalProblem("1", "How many?", "7", kind="number")
STRONG = {"tau_max": 0.3, "alpha": 0.1}
PROBLEMS = load_problems("reasoner:chains-2", 4)


def verdict(answer: str | None) -> Verdict:
    if answer is None or answer == UNFINISHED:
        return Verdict(NO_ANSWER if answer is None else UNFINISHED)
    return Verdict(CORRECT if float(answer) == 7 else WRONG, answer)


@given(st.lists(st.sampled_from(["7", "8", "9", "7.0", None, UNFINISHED]), min_size=1, max_size=9))
def test_the_answer_given_most_often_counts(answers: list[str | None]) -> None:
    """Against a plain count: every first few responses vote; among equals the answer given first has it."""
    found = votes(NUMBER, [verdict(answer) for answer in answers])
    assert len(found) == len(answers)
    for place, vote in enumerate(found):
        given_so_far = answers[: place + 1]
        values = [float(answer) for answer in given_so_far if answer not in (None, UNFINISHED)]
        if values:
            count = Counter(values)
            winner = next(value for value in values if count[value] == max(count.values()))
            first = next(
                i for i, one in enumerate(given_so_far) if one not in (None, UNFINISHED, "") and float(one) == winner
            )
            assert vote.chosen == first
            assert vote.verdict == verdict(answers[first])
        else:
            assert vote.chosen == 0
            assert vote.verdict.outcome == (NO_ANSWER if None in given_so_far else UNFINISHED)


def test_programs_vote_by_their_text() -> None:
    problem = EvalProblem("1", "?", "-", tests='[["1", "1"]]', kind="code")
    programs = ["print(1)", "print(int('1'))", "print(int('1'))"]
    assert [one.chosen for one in votes(problem, [Verdict(CORRECT, text) for text in programs])] == [0, 0, 1]


def made_up(right: list[list[int]], tokens: list[list[int]], answers: list[list[int]] | None = None) -> dict:
    """Results of an arm: for each problem the tokens of each response, and whether the vote up to each is right."""
    return {
        (str(problem), 0): {
            "right": bool(own[-1]),
            "tokens": sum(spent),
            "votes": [{"right": bool(one), "tokens": amount} for one, amount in zip(own, spent, strict=True)],
        }
        for problem, (own, spent) in enumerate(zip(right, tokens, strict=True))
    }


ARMS = {
    "base": Arm(),
    "stepflow": Arm(stepflow=STRONG),
    "vote": Arm(samples=3, temperature=1.0),
    "stepflow + vote": Arm(samples=3, temperature=1.0, stepflow=STRONG),
    "small vote": Arm(samples=2),
    "budget": Arm(min_steps=9),
}
RESULTS = {
    "base": made_up([[1], [0], [0], [1]], [[10], [10], [10], [10]]),
    "stepflow": made_up([[1], [1], [0], [1]], [[11], [9], [10], [14]]),
    "vote": made_up([[1, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]], [[10, 10, 10]] * 4),
    "stepflow + vote": made_up([[1, 1, 1], [0, 0, 1], [0, 0, 1], [1, 1, 1]], [[20, 20, 20]] * 4),
    "small vote": made_up([[1, 1], [0, 0], [0, 0], [1, 1]], [[9, 9]] * 4),
    "budget": made_up([[1], [0], [1], [1]], [[25], [25], [25], [25]]),
}


def test_every_arm_beside_the_base_with_its_tokens() -> None:
    curve, found = compute_of(ARMS, RESULTS, seed=3)
    assert [(one.samples, one.tokens.value, one.accuracy) for one in curve] == [
        (1, 10.0, proportion(2, 4)),
        (2, 20.0, proportion(2, 4)),
        (3, 30.0, proportion(2, 4)),
    ]
    by_name = {one.name: one for one in found}
    assert {name: one.tokens.value for name, one in by_name.items()} == {
        "base": 10, "stepflow": 11, "vote": 30, "stepflow + vote": 60, "small vote": 18, "budget": 25,
    }  # fmt: skip
    assert {name: one.method for name, one in by_name.items() if one.method} == {"stepflow + vote": "vote"}
    base = by_name["base"]
    assert base.to_first is base.to_method is base.to_matched is base.matched_tokens is None
    assert by_name["vote"].to_matched is None  # it is a point of the curve
    assert by_name["vote"].to_first == mean_difference([0, 1, 0, -1], 3)
    both = by_name["stepflow + vote"]
    assert both.to_method == mean_difference([0, 0, 1, 1], 3)
    assert both.to_matched == mean_difference([0, 0, 1, 1], 3)
    assert both.matched_tokens == 30  # the curve ends there
    # Halfway between two votes and three: every problem gets the third with a chance of one half.
    assert by_name["budget"].to_matched == mean_difference([0, -0.5, 1, 0.5], 3)
    assert by_name["budget"].matched_tokens == 25
    # A tenth of the way from one response to two.
    assert by_name["stepflow"].to_matched == mean_difference([0, 1, 0, 0], 3)
    assert by_name["stepflow"].matched_tokens == 11


def test_without_a_vote_the_base_ends_with_one_response() -> None:
    arms = {name: ARMS[name] for name in ("base", "stepflow + vote", "budget")}
    curve, found = compute_of(arms, {name: RESULTS[name] for name in arms}, seed=0)
    assert [one.samples for one in curve] == [1]
    assert [one.matched_tokens for one in found] == [None, 10, 10]
    assert found[2].to_matched == found[2].to_first
    assert found[1].method is None  # there is no vote alone


def test_a_vote_that_costs_less_than_one_response_is_no_point() -> None:
    curve = Curve(RESULTS["budget"], RESULTS["small vote"])
    assert curve.samples == [1]
    assert curve.at(1.0)[1] == curve.at(99.0)[1] == 25


@given(
    st.integers(1, 6).flatmap(
        lambda problems: st.tuples(
            *(st.lists(st.lists(st.integers(low, high), min_size=4, max_size=4), min_size=problems, max_size=problems)
              for low, high in ((0, 1), (1, 50)))
        )
    ),
    st.floats(0, 300),
)  # fmt: skip
def test_the_matched_base_spends_what_it_is_given(
    drawn: tuple[list[list[int]], list[list[int]]], asked: float
) -> None:
    right, tokens = drawn
    first = made_up([own[:1] for own in right], [own[:1] for own in tokens])
    curve = Curve(first, made_up(right, tokens))
    costs = np.cumsum(tokens, axis=1).mean(0)
    shares, spent = curve.at(asked)
    assert spent == pytest.approx(np.clip(asked, costs[0], costs[-1]))
    after = next((i for i, cost in enumerate(costs) if cost > spent), len(costs) - 1)
    chance = np.clip((spent - costs[after - 1]) / (costs[after] - costs[after - 1]), 0, 1)
    expected = [(1 - chance) * own[after - 1] + chance * own[after] for own in right]
    assert shares == pytest.approx(np.array(expected))


def test_samples_of_a_problem_stay_together() -> None:
    """Several responses a problem: means over them, and intervals over problems."""
    results = {
        name: {(problem, sample): one for sample in (0, 1) for (problem, _), one in own.items()}
        for name, own in RESULTS.items()
    }
    curve, found = compute_of(ARMS, results, seed=3)
    once_curve, once = compute_of(ARMS, RESULTS, seed=3)
    assert found == once
    assert [one.tokens for one in curve] == [one.tokens for one in once_curve]


def test_arms_with_methods() -> None:
    arms = {"base": False, "stepflow": True, "wide": STRONG}
    methods = {"vote": Arm(samples=4), "plan": Arm(instruction="Plan.")}
    assert combine_arms(arms, methods) == {
        **make_arms(arms),
        "vote": Arm(samples=4),
        "stepflow + vote": Arm(samples=4, stepflow=True),
        "wide + vote": Arm(samples=4, stepflow=STRONG),
        "plan": Arm(instruction="Plan."),
        "stepflow + plan": Arm(instruction="Plan.", stepflow=True),
        "wide + plan": Arm(instruction="Plan.", stepflow=STRONG),
    }
    assert parse_arm("plan-and-solve") == ("plan-and-solve", Arm(instruction=PLAN_AND_SOLVE))
    for bad_arms, bad_methods, words in (
        ({"vote": Arm(samples=2)}, {"plan": Arm(instruction="Plan.")}, "is a method already"),
        (arms, {"vote": Arm(samples=2, stepflow=True)}, "leave StepFlow to the arms"),
        (arms, {"nothing": Arm()}, "must spend tokens"),
        (arms, {"stepflow": Arm(samples=2)}, "'stepflow' comes twice"),
    ):
        with pytest.raises(StepFlowInputError, match=words):
            combine_arms(bad_arms, bad_methods)
    for instruction in ("", "  ", 3):
        with pytest.raises(StepFlowConfigError, match="instruction of an arm"):
            Arm(instruction=instruction)


@pytest.fixture(scope="module")
def reasoner():
    return load_reasoner()


@pytest.fixture(scope="module")
def combined(reasoner) -> EvaluationResult:
    arms = combine_arms(
        {"base": False, "stepflow": STRONG},
        {"vote": Arm(samples=3, temperature=1.5), "plan": Arm(instruction="How many points does Ann have?")},
    )
    return evaluate(reasoner[0], PROBLEMS, arms, max_new_tokens=80, progress=False)


def test_tokens_of_votes_are_those_of_all_samples(combined: EvaluationResult) -> None:
    for result in combined.results:
        if "vote" not in result["arm"]:
            assert "votes" not in result
            continue
        assert len(result["votes"]) == 3
        assert result["tokens"] == sum(one["tokens"] for one in result["votes"])
        assert result["right"] == result["votes"][-1]["right"]
        assert result["votes"][0]["right"] == (result["votes"][0]["outcome"] == CORRECT)
    curve, found = combined.compute
    mean = {
        name: np.mean([one["tokens"] for one in combined.results if one["arm"] == name])
        for name in combined.run["arms"]
    }
    assert {one.name: one.tokens.value for one in found} == pytest.approx(mean)
    assert curve[-1].tokens.value == pytest.approx(mean["vote"])
    accuracy = {one.name: one.accuracy for one in combined.arms()}
    assert (curve[0].accuracy, curve[-1].accuracy) == (accuracy["base"], accuracy["vote"])
    for one in found:
        paired = {other.name: other.paired.delta for other in combined.comparisons}
        assert one.to_first == paired.get(one.name)


def test_an_instruction_ends_the_question(reasoner, combined: EvaluationResult) -> None:
    model, tokenizer = reasoner
    sampler = Sampler(model, tokenizer, model.stepflow_runtime.rules.vocabulary, 80)
    ids = sampler.encode(PROBLEMS[0], "How many points does Ann have?")
    assert tokenizer.decode(ids) == tokenizer.decode(sampler.encode(PROBLEMS[0])).replace(
        "<|end|>", "\n\nHow many points does Ann have?<|end|>"
    )
    (text,) = (one["text"] for one in combined.results if (one["arm"], one["problem"]) == ("plan", PROBLEMS[0].id))
    (response,), _ = sampler.respond(Arm(), [ids], seed=0)
    assert response.text == text


def test_the_table_and_the_summary(combined: EvaluationResult) -> None:
    lines = str(combined).splitlines()
    (head,) = (line for line in lines if line.startswith("Generated tokens"))
    assert head.endswith("to base   to the method alone  to base, same tokens")
    assert any(line.startswith("base with more samples: 1 at ") for line in lines)
    summary = json.loads(json.dumps(combined.to_dict()))["compute"]
    assert summary["unit"] == "generated tokens of a problem, all samples of a vote together"
    assert [one["samples"] for one in summary["curve"]] == [1, 2, 3]
    assert [one["method"] for one in summary["arms"]] == [None, None, None, "vote", None, "plan"]
    plain = EvaluationResult(
        combined.run | {"arms": {name: combined.run["arms"][name] for name in ("base", "stepflow")}},
        {},
        [one for one in combined.results if one["arm"] in ("base", "stepflow")],
    )
    assert plain.compute is None
    assert plain.to_dict()["compute"] is None
    assert "Generated tokens" not in str(plain)
    empty = EvaluationResult(combined.run, {}, [])
    assert empty.compute is None
    no_vote = {name: arm for name, arm in combined.run["arms"].items() if "vote" not in name}
    kept = [one for one in combined.results if one["arm"] in no_vote]
    assert "No arm is a vote of base" in str(EvaluationResult(combined.run | {"arms": no_vote}, {}, kept))


def test_the_chart() -> None:
    points = [
        ChartPoint(panel, setting, Estimate(0.5 + shift, 0.4, 0.7), Estimate(tokens, tokens - 5, tokens + 5))
        for panel, tokens in (("no other method", 100.0), ("vote & <more>", 400.0))
        for setting, shift in (("base", 0.0), ("stepflow", 0.1), ("wide", 0.1))
    ]
    curve, _ = compute_of(ARMS, RESULTS, seed=0)
    page = ET.fromstring(tokens_chart(points, curve))
    circles = [one for one in page.iter("circle") if one.get("r") == "4"]
    assert len(circles) == 6
    assert len(list(page.iter("polyline"))) == 2
    for start in (0, 3):  # the arms of a panel are seen apart, and in order
        places = [float(one.get("cx")) for one in circles[start : start + 3]]
        assert all(after - before >= 8.9 for before, after in pairwise(places))
    assert float(circles[0].get("cy")) > float(circles[1].get("cy"))  # more is above
    assert float(circles[3].get("cx")) > float(circles[2].get("cx"))
    titles = [one.text for one in page.iter("title")]
    assert titles[0] == "base: 50.0 % at 100.0 tokens"
    # Without intervals, at one value, with nothing right: still a chart.
    flat = ChartPoint("no other method", "base", Estimate(0.0, None, None), Estimate(0.0, None, None))
    assert len(list(ET.fromstring(tokens_chart([flat], [])).iter("circle"))) == 2


def test_the_command_with_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = tmp_path / "results.jsonl", tmp_path / "report.html"
    words = "eval --model reasoner --problems reasoner:chains-2 --limit 3 --max-new-tokens 60".split()
    methods = "--with vote=self-consistency:samples=2 --with budget-forcing:max_steps=2 --with longer".split()
    assert main([*words, *methods, "--out", str(out), "--report", str(report), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in summary["arms"]] == [
        "base",
        "stepflow",
        "vote",
        "stepflow + vote",
        "budget-forcing:max_steps=2",
        "stepflow + budget-forcing:max_steps=2",
        "longer",
        "stepflow + longer",
    ]
    assert len(summary["compute"]["arms"]) == 8
    page = report.read_text()
    assert "Accuracy against generated tokens" in page
    assert 'class="dashed"' in page
    kept = out.read_bytes()
    assert main([*words, *methods, "--out", str(out)]) == 0  # everything is there already
    assert "base with more samples" in capsys.readouterr().out
    assert out.read_bytes() == kept
    other = [word.replace("samples=2", "samples=3") for word in methods]
    assert main([*words, *other, "--out", str(out)]) == 2
    assert "holds another run (arms.stepflow + vote.samples: 2 there, 3 now" in capsys.readouterr().err
    assert main([*words, "--with", "stepflow:tau_max=0.1"]) == 2
    assert "leave StepFlow to the arms" in capsys.readouterr().err
    assert main([*words, "--with", "longer", "--with", "longer"]) == 2
    assert "given twice" in capsys.readouterr().err
