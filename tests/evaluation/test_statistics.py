"""The statistics against statsmodels, and against what they promise on simulated data."""

import numpy as np
import pytest
from scipy import stats

from hf_stepflow.evaluation.statistics import (
    adjust,
    compare,
    mean,
    paired_p_value,
    proportion,
    ratio,
    smallest_delta,
)

statsmodels = pytest.importorskip("statsmodels.api")
from statsmodels.stats.contingency_tables import mcnemar  # noqa: E402
from statsmodels.stats.proportion import proportion_confint  # noqa: E402


def pairs(generator: np.random.Generator, n: int, gain: float, loss: float, both: float) -> tuple[list, list]:
    """Two arms of single answers: shares that only the second, only the first, and both have right."""
    kinds = generator.choice(4, size=n, p=[gain, loss, both, 1 - gain - loss - both])
    return [[kind in (1, 2)] for kind in kinds], [[kind in (0, 2)] for kind in kinds]


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (61, 100), (999, 1000)])
def test_wilson(hits: int, n: int) -> None:
    low, high = proportion_confint(hits, n, method="wilson")
    found = proportion(hits, n)
    assert (found.value, found.low, found.high) == pytest.approx((hits / n, low, high), abs=1e-9)


@pytest.mark.parametrize(("gained", "lost"), [(1, 0), (7, 2), (12, 12), (0, 9), (30, 11)])
def test_mcnemar_is_exact(gained: int, lost: int) -> None:
    first = [[False]] * gained + [[True]] * lost + [[True]] * 20 + [[False]] * 20
    second = [[True]] * gained + [[False]] * lost + [[True]] * 20 + [[False]] * 20
    found = compare(first, second)
    assert found.p_value == pytest.approx(mcnemar([[20, lost], [gained, 20]], exact=True).pvalue)
    assert (found.gained, found.lost, found.problems) == (gained, lost, gained + lost + 40)
    assert found.delta.value == pytest.approx((gained - lost) / found.problems)
    assert found.harm_rate is not None
    assert found.harm_rate.value == pytest.approx(lost / (lost + 20))


def differences(first: list, second: list) -> np.ndarray:
    return np.mean(second, 1, dtype=float) - np.mean(first, 1, dtype=float)


def test_interval_of_the_difference_covers() -> None:
    generator = np.random.default_rng(1)
    hits, runs, true = 0, 150, 0.10 - 0.06
    for seed in range(runs):
        delta = compare(*pairs(generator, 300, 0.10, 0.06, 0.5), seed=seed).delta
        hits += delta.low <= true <= delta.high
    # 0.95, within three standard errors of so many runs
    assert stats.binomtest(hits, runs, 0.95).pvalue > 0.003


def test_interval_covers_when_samples_of_a_problem_go_together() -> None:
    generator = np.random.default_rng(2)
    covered, wide, runs = 0, [], 100
    for seed in range(runs):
        ease = generator.beta(0.5, 0.5, size=(120, 1))
        first = generator.random((120, 8)) < ease
        second = generator.random((120, 8)) < np.clip(ease + 0.03 * generator.normal(size=(120, 1)), 0, 1)
        found = compare(first.tolist(), second.tolist(), seed)
        covered += found.delta.low <= 0.0 <= found.delta.high
        wide.append(mean(first.mean(1), seed))
    assert stats.binomtest(covered, runs, 0.95).pvalue > 0.003
    # Problems are few, however often each is sampled: the interval of the accuracy is that of 120, not of 960.
    naive = 2 * 1.96 * np.sqrt(0.25 / 960)
    assert np.mean([one.high - one.low for one in wide]) > 1.8 * naive


def test_size_of_the_test_under_the_null() -> None:
    generator = np.random.default_rng(3)
    single = [paired_p_value(differences(*pairs(generator, 200, 0.08, 0.08, 0.5)), True) for _ in range(1000)]
    assert np.mean(np.array(single) < 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)
    many = []
    for _ in range(150):
        first, second = (generator.random((60, 4)) < 0.5 for _ in range(2))
        many.append(paired_p_value(differences(first.tolist(), second.tolist()), False))
    assert stats.binomtest(int((np.array(many) < 0.05).sum()), 150, 0.05).pvalue > 0.003


def test_smallest_delta_is_found_as_often_as_promised() -> None:
    generator = np.random.default_rng(4)
    n, gain, loss = 400, 0.12, 0.04
    promised = np.mean([smallest_delta(differences(*pairs(generator, n, gain, loss, 0.5)), True) for _ in range(20)])
    # A true difference of that size, with the same share of problems that differ, is found about four times in five.
    up, down = 0.08 + promised / 2, 0.08 - promised / 2
    found = [paired_p_value(differences(*pairs(generator, n, up, down, 0.5)), True) < 0.05 for _ in range(600)]
    assert 0.7 < np.mean(found) < 0.88


@pytest.mark.parametrize(("n", "gained", "lost"), [(50, 0, 0), (100, 0, 0), (100, 1, 1), (30, 1, 1), (400, 3, 9)])
def test_smallest_delta_has_its_power_when_few_differ(n: int, gained: int, lost: int) -> None:
    observed = np.array([1.0] * gained + [-1.0] * lost + [0.0] * (n - gained - lost))
    delta = smallest_delta(observed, True)
    assert delta is not None
    share = max((gained + lost) / n, delta)
    generator = np.random.default_rng(n)
    kinds = generator.choice(3, size=(2000, n), p=[(share + delta) / 2, (share - delta) / 2, 1 - share])
    found = [stats.binomtest(int((row == 0).sum()), max(int((row < 2).sum()), 1), 0.5).pvalue < 0.05 for row in kinds]
    assert np.mean(found) == pytest.approx(0.8, abs=0.035)


def test_too_few_problems_could_show_nothing() -> None:
    for n in (1, 4, 5):
        assert smallest_delta(np.array([1.0] + [0.0] * (n - 1)), True) is None
    strict = smallest_delta(np.zeros(40), True, level=0.01)
    assert strict is not None
    assert strict > (smallest_delta(np.zeros(40), True, level=0.05) or 1.0)


def test_no_difference_at_all_is_not_certainty() -> None:
    first = [[True]] * 30 + [[False]] * 20
    found = compare(first, first)
    assert found.p_value == 1.0
    assert found.delta.value == 0.0
    # The share of problems that could differ, of which none was seen among 50: two-sided exact bound.
    assert found.delta.high == pytest.approx(stats.binomtest(0, 50).proportion_ci(method="exact").high)
    assert found.delta.low == -found.delta.high
    nothing_right = compare([[False]] * 5, [[False]] * 5)
    assert nothing_right.harm_rate is None
    all_gained = compare([[False]] * 6, [[True]] * 6).delta
    assert all_gained.value == all_gained.high == 1.0
    assert all_gained.low == pytest.approx(1 - 2 * (1 - 0.025 ** (1 / 6)))
    cancelled = compare([[True, False]] * 8, [[False, True]] * 8).delta
    assert cancelled.low < 0 < cancelled.high
    always = mean([1.0] * 10)
    assert always.low == pytest.approx(0.025 ** (1 / 10))
    assert always.high == 1.0


@pytest.mark.parametrize("share", [0.25, -1.0])
def test_one_problem_that_differs_among_samples_tells_nothing(share: float) -> None:
    assert paired_p_value(np.array([0.0, share, 0.0, 0.0]), False) == 1.0
    assert paired_p_value(np.array([0.0, share, share, 0.0]), False) == 0.5
    first, second = [[False] * 4] * 10, [[False] * 4] * 9 + [[False, False, True, True]]
    assert compare(first, second).p_value == 1.0


def test_chance_alone_is_no_harm() -> None:
    generator = np.random.default_rng(7)
    first, second = ((generator.random((100, 4)) < 0.6).tolist() for _ in range(2))
    assert compare(first, second).harm_rate is None


def test_ratio_and_holm() -> None:
    generator = np.random.default_rng(5)
    base = generator.gamma(5, 20, size=200)
    found = ratio(base * 1.5, base)
    assert found.value == pytest.approx(1.5)
    assert found.low == pytest.approx(1.5)
    noisy = ratio(base * 1.1 + generator.normal(scale=20, size=200), base)
    assert noisy.low < 1.1 < noisy.high
    assert (ratio([3.0], [2.0]).value, ratio([3.0], [2.0]).low) == (1.5, None)
    assert adjust([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjust([0.2]) == [0.2]
    assert adjust([]) == []


def test_the_same_seed_gives_the_same_interval() -> None:
    first, second = pairs(np.random.default_rng(6), 100, 0.2, 0.1, 0.4)
    assert compare(first, second, seed=3) == compare(first, second, seed=3)
