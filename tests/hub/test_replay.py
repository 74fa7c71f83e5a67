"""Whether a recorded verdict holds, for every verdict and every place of the interval measured here."""

import pytest

from hf_stepflow.evaluation.statistics import Estimate, PairedComparison
from hf_stepflow.hub.replay import Replay


def replay(verdict: str, recorded: tuple[float, float, float] | None, low: float, high: float, n: int = 100) -> Replay:
    delta = Estimate((low + high) / 200, low / 100, high / 100)
    return Replay(verdict, recorded, 100, PairedComparison(n, delta, 0.5, 1, 1, None, None), True)


@pytest.mark.parametrize(
    ("verdict", "recorded", "low", "high", "n", "holds"),
    [
        ("gain", (5, 3, 7), 1, 9, 50, True),
        ("gain", (5, 3, 7), -2, 9, 50, None),
        ("gain", (5, 3, 7), -2, 2, 50, False),  # excludes all that the record holds
        ("gain", (5, 3, 7), -9, -1, 50, False),
        ("gain, harm not excluded", (5, 3, 7), 1, 9, 50, True),
        ("harm", (-5, -7, -3), -9, -1, 50, True),
        ("harm", (-5, -7, -3), -9, 2, 50, None),
        ("harm", (-5, -7, -3), 1, 9, 50, False),
        ("no measurable gain", (0.4, -1, 2), -3, 3, 50, None),
        ("no measurable gain", (0.4, -1, 2), -1, 1, 100, True),
        ("no measurable gain", (0.4, -1, 2), 1, 3, 50, False),
        ("no measurable gain", None, -1, 1, 100, True),
        ("trade", (1, -1, 3), 1, 5, 50, None),
        ("trade", (1, -1, 3), 1, 5, 100, True),
        ("trade", (1, -1, 3), 4, 9, 50, False),
    ],
)
def test_verdicts(verdict, recorded, low, high, n, holds):
    found = replay(verdict, recorded, low, high, n)
    assert found.holds is holds
    assert found.to_dict()["holds"] is holds
    assert {True: "The verdict holds.", False: "does NOT hold", None: "too few"}[holds] in str(found)
