"""The space of candidates, the bands that go into it, and the search through it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_stepflow.calibration.bands import Bands, Proposal, bands_from, propose_bands, quarter_rule
from hf_stepflow.calibration.candidates import EMPTY, MECHANISMS, Space, mechanisms, only, tidied
from hf_stepflow.calibration.proxy import ProxyScore
from hf_stepflow.calibration.search import Proposer, search
from hf_stepflow.runtime.settings import FlowPlan, StepFlowSettings
from tests.support.flow import attach, byte_tokenizer, encode
from tests.support.tiny_models import tiny_model

NO_HEADS = {"OEB": {}, "length temperature": {}}
SPACE = Space.of(
    [Proposal("quarter", [0, 1], [6, 7]), Proposal("saliency", [2], [])],
    {"OEB": {0: [1, 3], 2: [0]}, "length temperature": {1: [2]}},
    [300, 120, 300],
)
HEADS = dict.fromkeys(range(8), 4)


def effects(separates: str, signs: str) -> list[dict]:
    """x where a layer separates; + or - for the sign of its difference."""
    return [
        {"separates": one == "x", "difference": 0.1 if sign == "+" else -0.1, "effect": 0.5 + at / 10, "p_value": 0.01}
        for at, (one, sign) in enumerate(zip(separates, signs, strict=True))
    ]


@pytest.mark.parametrize(
    ("lock_in", "decay", "expected"),
    [
        (("........", "++++++++"), ("........", "--------"), ([], [])),
        (("xx......", "++++++++"), (".....xx.", "--------"), ([10, 11], [15, 16])),
        (("x.xx....", "++++++++"), ("....x.xx", "--------"), ([12, 13], [16, 17])),
        (("x.x.....", "++++++++"), ("xxxx....", "--------"), ([12], [])),  # the stronger; the shallow half is not deep
        (("xx......", "-+++++++"), ("......xx", "------+-"), ([11], [17])),  # the other sign is no lock-in
        (("....xxxx", "++++++++"), ("........", "--------"), ([], [])),
    ],
)
def test_bands_are_the_longest_runs(lock_in: tuple, decay: tuple, expected: tuple) -> None:
    found = bands_from({"lock_in": effects(*lock_in), "decay_share": effects(*decay)}, list(range(10, 18)))
    assert found == expected


def test_the_quarter_rule_is_the_papers() -> None:
    assert quarter_rule(range(30)) == Proposal("quarter", list(range(7)), list(range(23, 30)))
    assert quarter_rule([1, 3, 5, 7]) == Proposal("quarter", [1], [7])


def test_few_traces_propose_nothing() -> None:
    bands = propose_bands(None, [([1, 2], 1)] * 20, [([1, 2], 1)] * 3, None, range(8))
    assert [one.name for one in bands.proposals] == ["quarter"]
    assert "3 wrong traces are too few" in bands.reason
    assert Bands.from_dict(json.loads(json.dumps(asdict(bands)))) == bands


def test_saliency_proposes_on_a_model_and_leaves_it_as_it_was() -> None:
    model = attach(tiny_model("llama"), "paper")
    before = model.stepflow_runtime.settings
    traces = [
        encode(f"Ann has {at} eggs.<think>Bob has three more. So it is {at}.</think>It is {at}.") for at in range(16)
    ]
    start = traces[0].index(3) + 1
    bands = propose_bands(
        model, [(ids, start) for ids in traces[:8]], [(ids, start) for ids in traces[8:]], byte_tokenizer(), range(4),
        progress=False,
    )  # fmt: skip
    assert bands.traces == (8, 8)
    assert {len(rows) for rows in bands.effects.values()} == {4}
    assert model.stepflow_runtime.settings == before
    assert Bands.from_dict(json.loads(json.dumps(asdict(bands)))) == bands


# Candidates


def test_empty_settings_do_nothing() -> None:
    assert FlowPlan.resolve(StepFlowSettings(**EMPTY), HEADS).is_idle
    assert mechanisms(EMPTY) == []
    assert sorted(name for own in MECHANISMS.values() for name in own) == sorted(EMPTY)


def test_what_does_not_act_is_tidied_away() -> None:
    assert tidied({"oeb_layers": [0, 1], "tau_max": 0.0, "bridge_scope": "step", "smi_window": 4}) == EMPTY
    assert tidied({"oeb_layers": [], "tau_max": 0.2}) == EMPTY
    both = tidied({"oeb_layers": [0], "tau_max": 0.2, "smi_layers": [7], "alpha": 0.1})
    assert mechanisms(both) == ["OEB", "SMI"]
    assert only(both, "SMI") == tidied({"smi_layers": [7], "alpha": 0.1})


def test_every_first_candidate_acts_and_fits() -> None:
    firsts = [SPACE.candidate(one) for one in SPACE.firsts()]
    assert len({json.dumps(one) for one in firsts}) == len(firsts)
    for one in firsts:
        assert mechanisms(one)
        FlowPlan.resolve(StepFlowSettings(**one), HEADS)
    assert mechanisms(firsts[0]) == ["OEB", "SMI"]
    assert (firsts[0]["tau_max"], firsts[0]["alpha"]) == (0.15, 0.06)
    alone = [mechanisms(one) for one in firsts]
    for name in MECHANISMS:
        assert [name] in alone
    assert {"0": [1, 3], "2": [0]} in [one["oeb_heads"] for one in firsts]
    warm = [one["length_temperature_heads"] for one in firsts if one["length_temperature"]]
    assert warm == [None, None, {"1": [2]}, {"1": [2]}]


class Drawn:
    """A trial of optuna that hypothesis draws."""

    def __init__(self, data: st.DataObject):
        self.data = data

    def suggest_categorical(self, name: str, choices: list):
        return self.data.draw(st.sampled_from(choices))

    def suggest_float(self, name: str, low: float, high: float, log: bool) -> float:
        return self.data.draw(st.floats(low, high))


@given(st.data())
def test_every_candidate_of_the_space_fits(data) -> None:
    settings = SPACE.candidate(SPACE.suggest(Drawn(data)))
    assert settings.keys() == EMPTY.keys()
    assert tidied(settings) == settings
    FlowPlan.resolve(StepFlowSettings(**settings), HEADS)
    json.dumps(settings)


def test_a_space_without_proposals_still_has_the_temperature() -> None:
    space = Space.of([], NO_HEADS, [100])
    assert {one["temperature_heads"] for one in space.firsts()} == {"all"}
    assert [mechanisms(space.candidate(one)) for one in space.firsts()] == [["length temperature"]] * 2


# Search


def score_of(settings: dict) -> ProxyScore:
    """Best at tau_max 0.1 on the chosen heads, without anything else."""
    value = -abs(settings["tau_max"] - 0.1) - settings["alpha"] - settings["length_temperature"]
    value += 0.5 * (settings["oeb_heads"] is not None)
    return ProxyScore(value, 0.0, value, value, None)


def run(proposer: Proposer, trials: int, stop: int = 10**9) -> list:
    return search(SPACE, trials, proposer.draw, score_of, proposer.tell, lambda number: number >= stop)


def test_search_finds_what_is_best() -> None:
    found = run(Proposer(SPACE, 0, None), 40)
    best = found[0].settings
    assert best["oeb_heads"] is not None
    assert abs(best["tau_max"] - 0.1) < 0.05
    assert [one.score.objective for one in found] == sorted((one.score.objective for one in found), reverse=True)
    assert len({json.dumps(one.settings) for one in found}) == len(found)


def test_a_search_that_was_stopped_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    whole = run(Proposer(SPACE, 5, None), 25)
    for stop in (3, 12, 13):
        journal = tmp_path / f"{stop}.journal"
        run(Proposer(SPACE, 5, journal), 25, stop)
        stopped = Proposer(SPACE, 5, journal)
        if stop == 13:
            stopped.draw(13)  # killed between drawing and scoring
        again = run(Proposer(SPACE, 5, journal), 25)
        assert [one.to_dict() for one in again] == [one.to_dict() for one in whole]


def test_a_seed_draws_the_search() -> None:
    one, other = (run(Proposer(SPACE, seed, None), 16) for seed in (0, 1))
    assert [trial.parameters for trial in one] != [trial.parameters for trial in other]


def test_time_ends_the_search() -> None:
    assert len(run(Proposer(SPACE, 0, None), 40, stop=4)) == 4
    assert run(Proposer(SPACE, 0, None), 40, stop=0) == []
