"""Non-inferiority: the statistic against its definition, the test against enumeration, and simulated coverage."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from hf_stepflow.calibration.non_inferiority import (
    LEVEL,
    betting_p_value,
    exact_p_value,
    non_inferiority,
    problems_needed,
    score,
)


def naive_score(gained: int, lost: int, n: int, bound: float) -> float:
    """Tango's statistic, with the likeliest probabilities found by a search over the likelihood."""

    def cost(share: float) -> float:
        parts = ((gained, share - bound), (lost, share), (n - gained - lost, 1 - 2 * share + bound))
        return -sum(count * math.log(max(one, 1e-300)) for count, one in parts if count)

    limits = (bound, (1 + bound) / 2)
    found = optimize.minimize_scalar(cost, bounds=limits, method="bounded", options={"xatol": 1e-12})
    share = min((float(found.x), *limits), key=cost)
    variance = n * (2 * share - bound - bound**2)
    return (gained - lost + n * bound) / math.sqrt(max(variance, 1e-300))


def naive_p_value(gained: int, lost: int, n: int, bound: float, points: int = 2000) -> float:
    """Every table of n problems, one by one, over a fine grid of the unknown."""
    observed = float(score(np.array(gained), np.array(lost), n, bound))
    tables = [
        (up, down)
        for up in range(n + 1)
        for down in range(n + 1 - up)
        if float(score(np.array(up), np.array(down), n, bound)) >= observed - 1e-9
    ]
    best = 0.0
    for share in np.linspace(bound, (1 + bound) / 2, points):
        chances = np.clip([share - bound, share, 1 - 2 * share + bound], 0, 1)
        chances /= chances.sum()
        total = 0.0
        for up, down in tables:
            logs = [
                count * math.log(chance) if chance > 0 else (0.0 if count == 0 else -math.inf)
                for count, chance in zip((up, down, n - up - down), chances, strict=True)
            ]
            ways = math.lgamma(n + 1) - math.lgamma(up + 1) - math.lgamma(down + 1) - math.lgamma(n - up - down + 1)
            total += math.exp(ways + sum(logs))
        best = max(best, total)
    return best


@pytest.mark.parametrize("bound", [0.01, 0.05, 0.2])
def test_the_statistic_is_tangos(bound: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        n = int(rng.integers(5, 300))
        gained = int(rng.integers(0, n // 2))
        lost = int(rng.integers(0, n - gained))
        found = float(score(np.array(gained), np.array(lost), n, bound))
        assert found == pytest.approx(naive_score(gained, lost, n, bound), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("gained", "lost", "n"), [(0, 0, 12), (3, 1, 14), (2, 5, 13), (0, 3, 10), (6, 0, 12)])
def test_the_exact_test_is_an_enumeration(gained: int, lost: int, n: int) -> None:
    found = exact_p_value(gained, lost, n, 0.15)
    assert found == pytest.approx(naive_p_value(gained, lost, n, 0.15, 400), abs=2e-3)


def test_more_harm_than_the_bound_makes_passing_rarer() -> None:
    """The largest probability stands where exactly the bound is lost: with more losses it only falls."""
    n, bound = 24, 0.15
    passing = [
        (up, down) for up in range(n + 1) for down in range(n + 1 - up) if exact_p_value(up, down, n, bound) <= LEVEL
    ]
    for gains in (0.0, 0.05, 0.2):
        rates = [
            sum(stats.multinomial.pmf((up, down, n - up - down), n, (gains, loss, 1 - gains - loss))
                for up, down in passing)
            for loss in (gains + bound, gains + 0.2, gains + 0.4)
        ]  # fmt: skip
        assert rates[0] <= LEVEL + 1e-9
        assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("share", "bound", "n"), [(0.01, 0.01, 310), (0.05, 0.01, 90), (0.12, 0.05, 90)])
def test_harm_at_the_bound_passes_no_more_often_than_it_may(share: float, bound: float, n: int) -> None:
    """Drawn at the seed, the true loss being exactly the bound."""
    rng = np.random.default_rng(1)
    drawn = rng.multinomial(n, [max(share - bound, 0), share, 1 - share - max(share - bound, 0)], 4000)
    passed = np.mean([exact_p_value(int(up), int(down), n, bound) <= LEVEL for up, down, _ in drawn])
    assert passed <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / len(drawn))


def test_bets_on_harm_at_the_bound_win_no_more_often_than_they_may() -> None:
    rng, n = np.random.default_rng(2), 200
    passed = 0
    for _ in range(2000):
        chance = rng.beta(1, 1, n)
        own = np.clip(chance - 0.06, 0, 1)
        loss = float((chance - own).mean())
        differences = (rng.binomial(4, own) - rng.binomial(4, chance)) / 4
        passed += betting_p_value(differences, loss) <= LEVEL
    assert passed <= 2000 * LEVEL


def test_what_changes_nothing_needs_as_many_problems_as_a_loss_in_none_shows() -> None:
    assert 0.99**299 <= LEVEL < 0.99**298
    assert exact_p_value(0, 0, 299) <= LEVEL < exact_p_value(0, 0, 298)
    assert problems_needed(0.0) == 299


def test_the_number_needed_has_its_power() -> None:
    rng, bound, share = np.random.default_rng(3), 0.05, 0.06
    n = problems_needed(share, bound)
    drawn = rng.multinomial(n, [share / 2, share / 2, 1 - share], 400)
    passed = np.mean([exact_p_value(int(up), int(down), n, bound) <= LEVEL for up, down, _ in drawn])
    assert passed == pytest.approx(0.8, abs=0.1)


def test_differences_choose_the_test() -> None:
    single = [1.0] * 3 + [-1.0] * 2 + [0.0] * 95
    assert non_inferiority(single, 0.05) == exact_p_value(3, 2, 100, 0.05)
    assert non_inferiority([0.5, *single], 0.05) == betting_p_value(np.array([0.5, *single]), 0.05)
    assert non_inferiority([]) == 1.0
    assert non_inferiority([-1.0] * 20) > 0.9
    assert non_inferiority([-0.5] * 20) > 0.9
