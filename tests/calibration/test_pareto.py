"""The candidates that no other beats, against the definition."""

from hypothesis import given
from hypothesis import strategies as st

from hf_stepflow.calibration.pareto import Outcome, front

SHARES = st.integers(-4, 4).map(lambda one: one / 20)


@given(st.lists(st.tuples(SHARES, SHARES.map(abs), st.sampled_from([0.97, 1.0, 1.02])), max_size=9))
def test_nobody_on_the_front_is_beaten_and_everybody_else_is(values: list[tuple]) -> None:
    made = [Outcome(at, 50, *value, []) for at, value in enumerate(values)]
    found = {one.trial for one in front(made)}
    for at, (gain, damage, cost) in enumerate(values):
        is_beaten = any(
            g >= gain and d <= damage and c <= cost and (g, d, c) != (gain, damage, cost)
            for g, d, c in [*values, (0.0, 0.0, 1.0)]
        )
        assert (at in found) == (not is_beaten)
    assert [one.gain for one in front(made)] == sorted((one.gain for one in front(made)), reverse=True)


def test_whoever_loses_for_nothing_is_beaten_by_the_base() -> None:
    assert front([Outcome(0, 50, -0.1, 0.1, 1.0, [])]) == []
    cheap = Outcome(1, 50, -0.02, 0.02, 0.7, [])
    assert front([cheap]) == [cheap]
