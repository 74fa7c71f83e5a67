"""Shared by the tests of calibration: problems, and responses as the runner would give them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_stepflow.calibration.candidates import tidied
from hf_stepflow.calibration.proxy import ProxyScore
from hf_stepflow.calibration.search import Trial
from hf_stepflow.evaluation.problem import EvalProblem


def problems(number: int, prefix: str = "What is") -> list[EvalProblem]:
    return [EvalProblem(str(one), f"{prefix} {one} + 1?", str(one + 1), kind="number") for one in range(number)]


def responses(right: Sequence[bool], arm: str = "arm", tokens: int = 10) -> list[dict[str, Any]]:
    """One response to each of as many problems, four in a batch."""
    return [
        {
            "arm": arm,
            "problem": str(at),
            "sample": 0,
            "batch": at // 4,
            "right": bool(one),
            "outcome": "correct" if one else "wrong",
            "tokens": tokens,
            "steps": 3,
            "seconds": 0.5,
            "text": f"{arm} {at}" if at % 2 else "the same",
        }
        for at, one in enumerate(right)
    ]


def trial(number: int, value: float = 0.0, **settings: Any) -> Trial:
    """A candidate with a proxy value."""
    chosen = tidied({"oeb_layers": [0], "tau_max": 0.1 + number / 1000, **settings})
    drawn = {"bridge": "quarter", "injection": "off", "temperature": False}
    return Trial(number, drawn, chosen, ProxyScore(value, 0.1, value, value, None))


def shares(right: "np.ndarray | Sequence[bool]") -> dict[str, list[float]]:
    """Whether each problem was answered right, by id."""
    return {str(at): [float(one)] for at, one in enumerate(right)}
