"""Splits that never overlap, and batches that hold each problem once."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_stepflow.calibration.splits import batches_of, split_problems
from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.runtime.errors import StepFlowInputError
from tests.support.calibration import problems


@given(st.integers(60, 300), st.integers(0, 10**9))
def test_no_question_is_in_both_splits(number: int, seed: int) -> None:
    asked = problems(number)
    splits = split_problems(asked, seed)
    questions = [{one.question for one in split} for split in splits]
    assert not questions[0] & questions[1]
    assert sum(map(len, splits)) == number
    again = split_problems(asked[::-1], seed)
    assert again == splits


def test_one_question_under_many_ids_stays_together() -> None:
    asked = problems(100)
    twins = [EvalProblem(f"twin {one.id}", f"  {one.question.upper()} ", one.answer, kind="number") for one in asked]
    splits = split_problems([*asked, *twins], 3)
    for split in splits:
        own = {one.id for one in split}
        assert {f"twin {name}" for name in own if not name.startswith("twin")} == {
            name for name in own if name.startswith("twin")
        }


def test_a_seed_draws_the_splits() -> None:
    asked = problems(200)
    drawn = [{one.id for one in split_problems(asked, seed)[0]} for seed in range(5)]
    assert len({frozenset(one) for one in drawn}) == 5
    assert all(70 <= len(one) <= 130 for one in drawn)


def test_too_few_problems_are_refused() -> None:
    with pytest.raises(StepFlowInputError, match="each needs 8"):
        split_problems(problems(12), 0)


@given(st.integers(1, 90), st.integers(1, 20))
def test_batches_hold_each_problem_once(number: int, size: int) -> None:
    asked = problems(number)
    batches = batches_of(asked, size, "split", 0)
    assert sorted(int(one.id) for batch in batches for one in batch.problems) == list(range(number))
    assert all(1 <= len(batch.problems) <= size for batch in batches)
    assert len({batch.name for batch in batches}) == len(batches)
    stretch = size * 4
    for start in range(0, len(batches), 4):  # a stretch of the order, and no problem from elsewhere
        own = {int(one.id) for batch in batches[start : start + 4] for one in batch.problems}
        first = start // 4 * stretch
        assert own == set(range(first, min(first + stretch, number)))


def test_where_time_ends_no_length_was_favoured() -> None:
    asked = [EvalProblem(str(at), "x" * (at * 37 % 160 + 1), "1", kind="number") for at in range(160)]

    def lengths(seed: int) -> list[list[int]]:
        return [sorted(len(one.prompt) for one in batch.problems) for batch in batches_of(asked, 10, "split", seed)]

    for found in map(lengths, range(20)):
        for start in range(0, 16, 4):  # like lengths stand together, as in the sorted stretch
            ordered = sorted(found[start : start + 4])
            assert all(low[-1] <= high[0] for low, high in pairwise(ordered))
    # Where the first batch of the first stretch stands among its four: each place is drawn about as often.
    places = [sorted(found[:4]).index(found[0]) for found in map(lengths, range(200))]
    assert all(25 <= places.count(place) <= 75 for place in range(4))
    assert lengths(3) == lengths(3)
