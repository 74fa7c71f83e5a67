"""The forecast, on simulated runs with a clock of their own."""

import numpy as np
import pytest

from hf_stepflow.calibration.forecast import Forecast, Stage, in_clock

# A calibration of the usual shape.
STAGES = [
    Stage("traces", "answers", 30),
    Stage("bridge heads", "scores", 24),
    Stage("temperature heads", "scores", 40),
    Stage("search", "scores", 60),
    Stage("rung 1", "answers", 64),
    Stage("rung 2", "answers", 32),
    Stage("rung 3", "answers", 30),
    Stage("verdict", "answers", 60),
    Stage("ablations", "answers", 150),
]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def simulate(stages: list[Stage], seed: int, prior: float, ends: dict[str, float] | None = None) -> list[tuple]:
    """Runs stages whose units vary, each stage by a factor of its own; returns (time, left) after every unit."""
    rng = np.random.default_rng(seed)
    costs = {"answers": float(rng.uniform(2, 40)), "scores": float(rng.uniform(1, 20))}
    clock, looks = Clock(), []
    forecast = Forecast(clock)
    for kind, cost in costs.items():
        forecast.learn(kind, cost * prior ** rng.choice([-1, 1]))  # measured once, before
    forecast.plan(stages)
    for stage in stages:
        factor = rng.uniform(0.85, 1.2)
        forecast.begin(stage.name, stage.kind, stage.units)
        for _ in range(int(stage.units)):
            if stage.end is not None and clock.now >= stage.end:
                break
            clock.now += factor * costs[stage.kind] * float(rng.gamma(8, 1 / 8))
            forecast.advance()
            looks.append((clock.now, forecast.left()))
        forecast.finish()
    return [(at, left, clock.now - at) for at, left in looks]


@pytest.mark.parametrize("seed", range(25))
def test_after_a_tenth_of_the_run_the_time_left_is_true(seed: int) -> None:
    looks = simulate(STAGES, seed, prior=1.3)
    whole = looks[-1][0]
    for at, left, true in looks:
        if at >= 0.1 * whole and true > 0.02 * whole:
            assert 1 / 1.5 <= left / true <= 1.5, (at / whole, left, true)


@pytest.mark.parametrize("seed", range(25))
def test_after_a_tenth_of_a_stage_its_time_is_true_whatever_was_known_before(seed: int) -> None:
    looks = simulate([Stage("verdict", "answers", 120)], seed, prior=4.0)
    for at, left, true in looks:
        if at >= 0.1 * looks[-1][0] and true > 0.05 * looks[-1][0]:
            assert 1 / 1.5 <= left / true <= 1.5


@pytest.mark.parametrize("seed", range(10))
def test_stages_end_when_their_time_is_up(seed: int) -> None:
    stages = [Stage("traces", "answers", 1000, 200.0), Stage("search", "scores", 1000, 700.0)]
    for at, left, true in simulate(stages, seed, prior=1.0):
        if 70 <= at < 600:
            assert left == pytest.approx(true, rel=0.25)


def test_a_stage_is_forecast_before_it_begins_and_kept() -> None:
    clock = Clock()
    forecast = Forecast(clock)
    forecast.plan([Stage("traces", "answers", 4), Stage("search", "scores", 10), Stage("verdict", "answers", 8)])
    assert forecast.begin("traces", "answers", 4) is None
    assert forecast.left() is None
    for _ in range(4):
        clock.now += 3
        forecast.advance()
    assert forecast.left() is None  # nothing is known of scores
    forecast.learn("scores", 0.5)
    assert forecast.left() == pytest.approx(10 * 0.5 + 8 * 3)
    assert forecast.begin("verdict", "answers", 8) == 24.0  # the search is left out
    clock.now += 16
    assert forecast.left() == pytest.approx(24 - 3)  # a unit that takes long is not counted twice
    forecast.finish()
    assert forecast.left() == 0
    assert forecast.kept == {"traces": (None, 12.0), "verdict": (24.0, 16.0)}


def test_a_stage_that_nobody_planned_comes_first() -> None:
    clock = Clock()
    forecast = Forecast(clock)
    forecast.learn("answers", 2.0)
    forecast.plan([Stage("verdict", "answers", 5)])
    assert forecast.begin("OEB only", "answers", 3) == 6.0
    assert forecast.left() == 16.0


def test_clocks() -> None:
    assert [in_clock(value) for value in (-1, 42.4, 725, 10810)] == ["0:00", "0:42", "12:05", "3:00:10"]
