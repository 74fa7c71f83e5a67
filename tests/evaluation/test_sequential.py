"""The test that holds whenever one looks, runs that stop by it, and responses that end in a loop."""

import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_stepflow import EvaluationResult, evaluate, load_problems
from hf_stepflow.evaluation.loops import ends_in_loop
from hf_stepflow.evaluation.statistics import sequential_p_value
from hf_stepflow.reasoner import load_reasoner
from hf_stepflow.runtime.errors import StepFlowInputError


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_p_value_is_the_inverse_of_the_mixture(gained: int, lost: int) -> None:
    """The likelihood ratio, integrated over all probabilities by the midpoint rule."""
    steps = 20000
    middles = ((place + 0.5) / steps for place in range(steps))
    mixture = sum(middle**gained * (1 - middle) ** lost for middle in middles) / steps * 2.0 ** (gained + lost)
    assert sequential_p_value(gained, lost) == pytest.approx(min(1.0, 1 / mixture), rel=1e-4)
    assert sequential_p_value(gained, lost) == sequential_p_value(lost, gained)


def test_looking_after_every_problem_errs_no_more_often_than_promised() -> None:
    """2,000 comparisons of equal arms, looked at after each of 300 problems on which they differ."""
    draw, wrong = random.Random(0), 0
    for _ in range(2000):
        gained = 0
        for number in range(1, 301):
            gained += draw.random() < 0.5
            if sequential_p_value(gained, number - gained) < 0.05:
                wrong += 1
                break
    # Three standard errors above the promise would be 0.0646; McNemar's test, looked at so often, errs in a third.
    assert wrong / 2000 <= 0.05


def test_a_clear_difference_is_found_soon() -> None:
    assert next(n for n in range(1, 100) if sequential_p_value(n, 0) < 0.05) == 8
    assert math.isclose(sequential_p_value(0, 0), 1.0)


def test_a_run_stops_once_it_is_decided_and_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """A bridge on every head destroys the reasoner, which few problems show."""
    model, problems = load_reasoner()[0], load_problems("reasoner:chains-2", 200)
    arms = {"base": False, "broken": {"tau_max": 0.9, "oeb_layers": "all", "alpha": 0}}
    arguments = {"batch_size": 8, "max_new_tokens": 50, "progress": False, "check": False, "until": "decided"}
    out = tmp_path / "results.jsonl"
    result = evaluate(model, problems, arms, out=out, **arguments)
    assert result.is_decided
    assert not result.is_complete
    answered = len(result.responses("base"))
    assert 8 <= answered <= 40
    assert len(result.results) == 2 * answered
    text = str(result)
    assert f"Decided after {answered} of 200 problems, which saved {2 * (200 - answered)} responses." in text
    assert "measurably worse than base" in text
    again = evaluate(model, problems, arms, out=out, **arguments)
    assert again.results == result.results
    loaded = EvaluationResult.load(out)
    assert loaded.is_decided
    assert loaded.to_dict()["is_decided"]


def test_what_until_cannot_mean_is_refused() -> None:
    model, problems = load_reasoner()[0], load_problems("reasoner:chains-2", 2)
    with pytest.raises(StepFlowInputError, match="until must be None or 'decided', got 'bored'"):
        evaluate(model, problems, until="bored")
    with pytest.raises(StepFlowInputError, match="samples of one"):
        evaluate(model, problems, until="decided", n_samples=2, do_sample=True)


def naive_loop(ids: list[int]) -> bool:
    """Every period and every length of the end, one by one."""
    for period in range(1, len(ids) // 3 + 1):
        for length in range(max(3 * period, 32), len(ids) + 1):
            end = ids[len(ids) - length :]
            if all(end[place] == end[place - period] for place in range(period, length)):
                return True
    return False


@given(
    st.lists(st.integers(0, 2), max_size=24),
    st.lists(st.integers(0, 2), min_size=1, max_size=9),
    st.integers(0, 12),
    st.integers(0, 8),
)
def test_loops_are_those_of_the_definition(head: list[int], piece: list[int], times: int, cut: int) -> None:
    ids = head + piece * times + piece[: cut % len(piece)]
    assert ends_in_loop(ids) == naive_loop(ids)


def test_a_loop_is_counted_only_where_the_response_was_cut(tmp_path: Path) -> None:
    model, tokenizer = load_reasoner()
    from hf_stepflow.evaluation.arms import Arm
    from hf_stepflow.evaluation.responses import Response
    from hf_stepflow.evaluation.sampler import Sampler

    class Scripted(Sampler):
        def respond(self, arm, prompts, seed, places=None):
            ids = [5, 6] * 20
            common = {"text": "", "summary": "", "steps": 0}
            return [Response(ids, is_finished=done, **common) for done in (False, True)], 1.0

    sampler = Scripted(model, tokenizer, model.stepflow_runtime.rules.vocabulary, 8)
    made = sampler.run(Arm(), load_problems("reasoner:chains-2", 2), [[1], [1]], 0)
    assert [one["loops"] for one in made] == [1, 0]
