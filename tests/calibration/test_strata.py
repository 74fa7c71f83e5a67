"""Strata: sources, terciles of length, and the names that they give."""

import numpy as np
import pytest

from hf_stepflow.calibration.strata import Strata, source_of


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("chains-7/calibration/12", "chains"),
        ("reasoner:errands-120/errands-120/calibration/3", "reasoner:errands"),
        ("reasoner:chains-4", "reasoner:chains"),
        ("stepflow-suite:legs@long", "stepflow-suite:legs"),
        ("reasoning-gym:chain_sum,min_terms=8,max_terms=8", "reasoning-gym:chain_sum"),
        ("math500/12", "math500"),
        ("12", "problems"),
        ("-3", "problems"),
    ],
)
def test_levels_of_one_family_are_one_source(name: str, source: str) -> None:
    assert source_of(name) == source


def test_terciles_are_of_each_source() -> None:
    rng = np.random.default_rng(0)
    lengths = {f"a{at}": float(rng.integers(10, 1000)) for at in range(90)}
    lengths |= {f"b{at}": float(rng.integers(5000, 6000)) for at in range(30)}
    strata = Strata.of(lengths, list(lengths.values()), {name: name[0] for name in lengths})
    counts: dict[str, list[float]] = {}
    for name, length in lengths.items():
        counts.setdefault(strata.name(name, length), []).append(length)
    assert {name: pytest.approx(len(own), abs=2) for name, own in counts.items()} == {
        **{f"a, {one}": 30 for one in ("short", "medium", "long")},
        **{f"b, {one}": 10 for one in ("short", "medium", "long")},
    }
    assert max(counts["a, short"]) < min(counts["a, medium"])
    assert max(counts["a, medium"]) < min(counts["a, long"])


def test_a_source_of_one_length_is_one_stratum() -> None:
    strata = Strata.of("pq", [7.0, 7.0], {"p": "a", "q": "a", "r": "a"})
    assert [strata.name("p", 7.0), strata.name("r", 99.0)] == ["a", "a"]
    assert strata.to_dict() == {}
