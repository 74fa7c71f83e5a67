"""The gate: it opens where errors rise with length, and only there."""

import numpy as np
import pytest
import statsmodels.api as sm

from hf_stepflow.calibration.gate import LEVEL, look_for_trend, odds_ratio


def drawn(slope: float, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths from 50 to 800 tokens, and errors whose log odds rise with their logarithm."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(np.log(50), np.log(800), n))
    chance = 1 / (1 + np.exp(-slope * (np.log2(lengths) - np.log2(200))))
    return (rng.random(n) < chance).astype(float), lengths


def test_it_opens_where_errors_rise() -> None:
    errors, lengths = drawn(1.5, 200, 0)
    gate = look_for_trend(errors, {"tokens": lengths, "steps": lengths[::-1]})
    assert gate.is_open
    assert gate.reason.startswith("errors rise with tokens")
    trend = gate.trends[0]
    assert trend.short < 0.3 < 0.7 < trend.long
    assert trend.odds_ratio == pytest.approx(np.exp(1.5), rel=0.5)


def test_short_hard_problems_do_not_hide_that_long_ones_of_another_source_fail() -> None:
    errors, lengths = drawn(1.5, 200, 0)
    hard = [float(at % 4 > 0) for at in range(200)]
    together = [*errors, *hard], {"tokens": [*lengths, *np.linspace(10, 40, 200)]}
    assert not look_for_trend(*together).is_open
    gate = look_for_trend(*together, 0, ["long"] * 200 + ["hard"] * 200)
    assert gate.is_open
    assert gate.reason.startswith("errors rise with tokens in long (")
    assert [one.source for one in gate.trends] == ["long", "hard"]


def test_every_source_needs_errors_of_its_own() -> None:
    errors, lengths = [1.0, 1.0, 1.0, *[0.0] * 20] * 2, list(range(10, 33)) * 2
    gate = look_for_trend(errors, {"tokens": lengths}, 0, ["a"] * 23 + ["b"] * 23)
    assert not gate.is_open
    assert "too few in any one source" in gate.reason


def test_it_stays_closed_where_errors_fall() -> None:
    errors, lengths = drawn(-1.5, 200, 0)
    gate = look_for_trend(errors, {"tokens": lengths})
    assert not gate.is_open
    assert gate.trends[0].p_value > 0.9


def test_chance_opens_it_no_more_often_than_it_says() -> None:
    opened = sum(
        look_for_trend(errors, {"tokens": lengths, "steps": np.random.default_rng(seed).permutation(lengths)}).is_open
        for seed in range(150)
        for errors, lengths in [drawn(0.0, 40, seed)]
    )
    assert opened <= 150 * LEVEL + 3 * np.sqrt(150 * LEVEL)


@pytest.mark.parametrize(
    ("errors", "lengths", "reason"),
    [
        ([1.0] * 3 + [0.0] * 50, range(10, 63), "3 of 53 problems are missed"),
        ([0.0] * 4 + [1.0] * 50, range(10, 64), "4 of 54 problems are solved"),
        ([0.0, 1.0] * 20, [7] * 40, "one length"),
    ],
)
def test_where_nothing_can_be_seen_it_stays_closed(errors: list, lengths: list, reason: str) -> None:
    gate = look_for_trend(errors, {"tokens": list(lengths)})
    assert not gate.is_open
    assert reason in gate.reason


def test_odds_ratio_is_that_of_statsmodels() -> None:
    for seed in range(5):
        errors, lengths = drawn(0.7, 80, seed)
        x = np.log2(lengths)
        fitted = sm.Logit(errors, sm.add_constant(x)).fit(disp=0)
        assert odds_ratio(errors, x) == pytest.approx(np.exp(fitted.params[1]), rel=1e-6)


def test_odds_ratio_of_separated_errors_has_no_bound() -> None:
    x = np.arange(20.0)
    assert odds_ratio((x > 9).astype(float), x) is None
    gate = look_for_trend((x > 9).astype(float), {"tokens": 2**x})
    assert gate.is_open
    assert gate.trends[0].odds_ratio is None


def test_shares_of_several_samples_count() -> None:
    errors, lengths = drawn(1.5, 200, 1)
    gate = look_for_trend(0.25 + 0.5 * errors, {"tokens": lengths})
    assert gate.is_open
    assert gate.errors == pytest.approx(0.25 + 0.5 * errors.mean())
