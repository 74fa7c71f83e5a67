"""Selection by generation, the verdict, and the ablations, on simulated results."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from hf_stepflow.calibration.candidates import EMPTY, mechanisms, tidied
from hf_stepflow.calibration.search import halve, rank_correlation, to_run
from hf_stepflow.calibration.verdict import (
    BASE,
    GAIN,
    HARM,
    NO_GAIN,
    NO_HARM,
    OPEN,
    TRADE,
    UNPROVEN,
    ablations,
    depends_on_steps,
    judge_strata,
    measure,
    overall,
    random_steps,
)
from hf_stepflow.evaluation.statistics import compare
from hf_stepflow.runtime.settings import FlowPlan, StepFlowSettings
from hf_stepflow.runtime.step_detector import Field
from tests.support.calibration import responses, shares, trial
from tests.support.flow import attach, encode
from tests.support.tiny_models import tiny_model

HEADS = dict.fromkeys(range(8), 4)


def simulated(base: np.ndarray, arms: dict[int, np.ndarray], sizes=(16, 32, 64)):
    """Answers as `halve` asks for them, and what it asked for."""
    asked = []

    def answer(alive, rung):
        asked.append([one.number for one in alive])
        return shares(base[: sizes[rung]]), {one.number: shares(arms[one.number][: sizes[rung]]) for one in alive}

    return answer, asked


def test_the_best_candidate_wins_and_bad_ones_stop_early() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(64) < 0.5
    arms = {one: base & (rng.random(64) < 0.9) for one in range(8)}
    arms[5] = base | (rng.random(64) < 0.5)
    answer, asked = simulated(base, arms)
    halving = halve([trial(one) for one in range(8)], 3, answer, {})
    assert halving.winner == 5
    assert [len(one) for one in asked] == [8, 4, 2]
    assert [sum(row.stays for row in rung) for rung in halving.rungs] == [4, 2, 1]
    assert halving.rungs[-1][0].delta == pytest.approx(arms[5].mean() - base.mean())


def test_none_wins_where_none_is_better() -> None:
    base = np.array([True, False] * 32)
    answer, _ = simulated(base, {0: base, 1: base & (np.arange(64) > 8)})
    halving = halve([trial(0), trial(1)], 3, answer, {})
    assert halving.winner is None
    assert "no candidate answered more" in halving.reason


def test_who_harms_a_stratum_cannot_win() -> None:
    base = np.array([True] * 32 + [False] * 32)
    strata = {str(at): "easy" if at < 32 else "hard" for at in range(64)}
    answer, _ = simulated(base, {0: np.array([*[False] * 5, *[True] * 59])})
    halving = halve([trial(0)], 3, answer, strata)
    assert halving.winner is None
    assert "harmed a stratum" in halving.reason
    assert (halving.rungs[0][0].harmed, halving.rungs[0][0].stratum) == (["easy"], "easy")
    answer, _ = simulated(base, {0: np.array([*[False] * 4, *[True] * 60])})
    assert halve([trial(0)], 3, answer, strata).winner == 0  # what chance explains is let pass


def test_what_a_stratum_loses_counts_against_a_candidate() -> None:
    base = np.array([True] * 32 + [False] * 32)
    strata = {str(at): "easy" if at < 32 else "hard" for at in range(64)}
    even, uneven = base.copy(), base.copy()
    even[32:36] = True
    uneven[32:41], uneven[:4] = True, False
    answer, _ = simulated(base, {0: uneven, 1: even}, (64, 64, 64))
    assert halve([trial(0), trial(1)], 1, answer, {}).winner == 0  # one more in all
    assert halve([trial(0), trial(1)], 1, answer, strata).winner == 1


def test_the_proxy_decides_between_equals() -> None:
    base = np.array([False] * 64)
    same = np.array([True] * 64)
    answer, _ = simulated(base, {3: same, 1: same})
    assert halve([trial(3), trial(1)], 3, answer, {}).winner == 3


def test_time_that_is_up_leaves_the_last_rung_that_was_reached() -> None:
    base = np.array([False] * 64)
    arms = {one: np.arange(64) < one for one in range(4)}

    def answer(alive, rung):
        return simulated(base, arms)[0](alive, rung) if rung == 0 else ({}, {})

    halving = halve([trial(one) for one in range(4)], 3, answer, {})
    assert halving.winner == 3
    assert len(halving.rungs) == 1
    nothing = halve([trial(0)], 3, lambda alive, rung: ({}, {}), {})
    assert nothing.winner is None
    assert "no time" in nothing.reason


def test_what_is_run_is_the_best_and_some_of_the_rest() -> None:
    ranked = [trial(one) for one in range(20)]
    assert [one.number for one in to_run(ranked)] == [0, 1, 2, 3, 4, 5, 6, 19]
    assert [one.number for one in to_run(ranked[:7])] == [0, 1, 2, 3, 4, 5, 6]
    assert [one.number for one in to_run(ranked[:3])] == [0, 1, 2]
    assert to_run([]) == []


def test_the_anchor_is_run_whatever_the_proxy_says() -> None:
    ranked = [trial(one) for one in range(20)]
    assert [one.number for one in to_run(ranked, anchor=11)] == [0, 1, 2, 3, 4, 11, 5, 19]
    assert to_run(ranked, anchor=20) == to_run(ranked)


def test_candidates_of_every_kind_are_run_before_their_likes() -> None:
    """The best twelve differ by amounts only; others, worse by the proxy, do something else or elsewhere."""
    others = [{"temperature": True}, {"bridge": "heads"}, {"injection": "quarter", "bridge": "off"}]
    ranked = [trial(one) for one in range(12)]
    ranked += [dataclasses.replace(trial(12 + at), parameters=one) for at, one in enumerate(others)]
    assert [one.number for one in to_run(ranked)] == [0, 1, 2, 12, 13, 14, 3, 11]
    assert [one.number for one in to_run(ranked[::-1])][:6] == [14, 13, 12, 11, 10, 9]


def test_rank_correlation_has_the_interval_of_bonett_and_wright() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    y = x + rng.normal(size=12)
    found, n = rank_correlation(list(x), list(y))
    assert found is not None
    assert n == 12
    ranks = [stats.rankdata(values) for values in (x, y)]
    rho = np.corrcoef(*ranks)[0, 1]
    assert found.value == pytest.approx(rho)
    width = 1.959964 * math.sqrt((1 + rho**2 / 2) / 9)
    assert found.low == pytest.approx(math.tanh(math.atanh(rho) - width), abs=1e-6)
    assert found.high == pytest.approx(math.tanh(math.atanh(rho) + width), abs=1e-6)
    assert rank_correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == (None, 3)
    assert rank_correlation([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]) == (None, 5)
    perfect, _ = rank_correlation([1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0])
    assert perfect is not None
    assert perfect.value == pytest.approx(1)


# Verdict


def held(base: np.ndarray, own: np.ndarray):
    return measure({BASE: responses(base, BASE), "stepflow": responses(own, "stepflow", tokens=15)}, "stepflow")


def test_measures_are_those_of_the_evaluation() -> None:
    rng = np.random.default_rng(0)
    base, own = rng.random(80) < 0.5, rng.random(80) < 0.6
    found, expected = held(base, own), compare([[one] for one in base], [[one] for one in own])
    order = np.argsort([str(at) for at in range(80)])  # results are sorted by id, which resampling sees
    assert found.delta.value == pytest.approx(expected.delta.value)
    assert found.delta == compare([[one] for one in base[order]], [[one] for one in own[order]]).delta
    assert (found.gained, found.lost, found.p_value) == (expected.gained, expected.lost, expected.p_value)
    assert found.harm_rate == expected.harm_rate
    assert found.tokens_ratio.value == pytest.approx(1.5)
    assert found.changed == 0.5
    assert found.base.value == pytest.approx(base.mean())


@pytest.mark.parametrize(
    ("gained", "lost", "verdict"),
    [(0, 0, NO_GAIN), (12, 1, GAIN), (1, 12, HARM), (6, 5, NO_GAIN), (5, 0, NO_GAIN), (0, 5, NO_GAIN), (9, 0, GAIN)],
)
def test_a_gain_needs_interval_and_exact_test(gained: int, lost: int, verdict: str) -> None:
    base = np.array([True] * 50 + [False] * 50)
    own = base.copy()
    own[:lost] = False
    own[50 : 50 + gained] = True
    assert held(base, own).verdict == verdict


def test_under_the_null_no_gain_is_found_beyond_the_nominal_rate() -> None:
    """Candidates that differ from the base by chance alone: the best of eight is no better on the held-out split."""
    runs, verdicts = 200, []
    for seed in range(runs):
        rng = np.random.default_rng(seed)

        def noise(base: np.ndarray, rng=rng) -> np.ndarray:
            return base ^ (rng.random(len(base)) < np.where(base, 0.2, 0.2 * base.mean() / (1 - base.mean())))

        base = rng.random(64) < 0.5
        answer, _ = simulated(base, {one: noise(base) for one in range(8)})
        winner = halve([trial(one) for one in range(8)], 3, answer, {}).winner
        if winner is None:
            continue
        fresh = rng.random(80) < 0.5
        verdicts.append(held(fresh, noise(fresh)).verdict)
    assert len(verdicts) > runs / 2
    nominal = 0.025 * runs
    assert verdicts.count(GAIN) <= nominal + 3 * math.sqrt(nominal)


def test_a_true_gain_is_found() -> None:
    rng = np.random.default_rng(1)
    base = rng.random(200) < 0.5
    assert held(base, base | (rng.random(200) < 0.3)).verdict == GAIN


# Strata


def judged(sizes: dict[str, tuple[int, int, int]]):
    """The verdict on strata of n problems, half of them solved by the base, with so many gained and lost."""
    base, own, strata = [], [], {}
    for name, (n, gained, lost) in sizes.items():
        for at in range(n):
            strata[str(len(base))] = name
            base.append(at % 2 == 0)
            own.append(base[-1] ^ (at // 2 < (lost if base[-1] else gained)))
    results = {BASE: responses(base, BASE), "stepflow": responses(own, "stepflow")}
    found = judge_strata(results, "stepflow", strata)
    return overall(measure(results, "stepflow"), found), {one.name: one for one in found}


def test_a_gain_excludes_harm_in_every_stratum() -> None:
    verdict, strata = judged({"a, short": (400, 0, 0), "a, long": (400, 40, 0)})
    assert verdict == GAIN
    assert list(strata) == ["a, short", "a, long"]
    assert {name: one.verdict for name, one in strata.items()} == {"a, short": NO_HARM, "a, long": GAIN}
    assert {one.needed for one in strata.values()} == {None}


def test_few_problems_never_pass_silently() -> None:
    verdict, strata = judged({"a, short": (60, 0, 0), "a, long": (400, 40, 0)})
    assert verdict == UNPROVEN
    assert (strata["a, short"].verdict, strata["a, short"].needed) == (OPEN, 299)


def test_what_gains_here_and_loses_there_is_a_trade() -> None:
    verdict, strata = judged({"chains": (400, 60, 0), "errands": (400, 0, 20)})
    assert verdict == TRADE
    assert {name: one.verdict for name, one in strata.items()} == {"chains": GAIN, "errands": HARM}
    assert judged({"chains": (400, 20, 0), "errands": (400, 0, 20)})[0] == TRADE  # even if the whole shows nothing
    assert judged({"chains": (400, 0, 0), "errands": (400, 0, 20)})[0] == HARM
    assert judged({"chains": (400, 0, 0), "errands": (400, 0, 0)})[0] == NO_GAIN
    assert overall(None, []) == NO_GAIN


def test_strata_are_adjusted_for_their_number() -> None:
    _, strata = judged({name: (400, 6 * (name == "a"), 0) for name in "abcdef"})
    assert strata["a"].p_value < 0.05 < strata["a"].adjusted_p_value
    assert strata["a"].verdict == NO_HARM


def test_strata_of_several_samples() -> None:
    rows = {
        arm: [
            {"problem": str(at), "sample": sample, "right": (sample == 0) ^ (arm == "own" and at < 20 and sample == 0)}
            for at in range(40)
            for sample in range(2)
        ]
        for arm in (BASE, "own")
    }
    (one,) = judge_strata(rows, "own", dict.fromkeys(map(str, range(40)), "a"))
    assert (one.verdict, one.delta.value, one.lost) == (HARM, -0.25, 20)


# Ablations


def test_ablations_of_everything() -> None:
    winner = tidied(
        {"oeb_layers": [0, 2], "oeb_heads": {"0": [1], "2": [0, 3]}, "tau_max": 0.2, "bridge_scope": "step",
         "smi_layers": [6, 7], "alpha": 0.1, "length_temperature": 0.5, "length_temperature_base": 200,
         "length_temperature_heads": {"1": [2], "7": [0]}}
    )  # fmt: skip
    found, left_out = ablations(winner, HEADS, 100, seed=0)
    assert left_out == {}
    assert [mechanisms(one) for one in found.values()] == [
        ["OEB"], ["SMI"], ["length temperature"], *[mechanisms(winner)] * 4,
    ]  # fmt: skip
    assert found["random step boundaries"] == winner
    middle = found["bands in the middle"]
    assert (middle["oeb_layers"], middle["smi_layers"]) == ([3, 4], [3, 4])
    assert middle["oeb_heads"] == {"3": [1], "4": [0, 3]}
    assert found["length temperature only"]["length_temperature_heads"] == {"1": [2], "7": [0]}
    for name, changes, own in (
        ("random bridge heads", {"oeb_heads", "oeb_layers"}, {(0, 1), (2, 0), (2, 3)}),
        ("random temperature heads", {"length_temperature_heads"}, {(1, 2), (7, 0)}),
    ):
        moved = found[name]
        (others,) = [moved[setting] for setting in changes if setting.endswith("_heads")]
        drawn = {(int(layer), head) for layer, heads in others.items() for head in heads}
        assert len(drawn) == len(own)
        assert not drawn & own
        assert {setting for setting in winner if moved[setting] != winner[setting]} == changes
    assert ablations(winner, HEADS, 100, seed=0)[0] == found
    assert ablations(winner, HEADS, 100, seed=1)[0]["random bridge heads"] != found["random bridge heads"]
    for one in found.values():
        FlowPlan.resolve(StepFlowSettings(**one), HEADS)


def test_ablations_say_what_they_leave_out() -> None:
    bridge = tidied({"oeb_layers": [0, 1], "tau_max": 0.2})
    found, left_out = ablations(bridge, HEADS, 100, seed=0)
    assert left_out == {
        "OEB only": "it is the winner",
        "SMI only": "the winner has no SMI",
        "random temperature heads": "the winner has no length temperature",
        "random step boundaries": "the winner does not depend on where steps end",
    }
    assert found["length temperature only"]["length_temperature_base"] == 100
    assert sum(map(len, found["random bridge heads"]["oeb_heads"].values())) == 8
    middle = tidied({"oeb_layers": [3, 4], "tau_max": 0.2})
    assert "bands in the middle" in ablations(middle, HEADS, 100, seed=0)[1]
    temperature = tidied({"length_temperature": 1.0, "length_temperature_base": 100})
    found, left_out = ablations(temperature, HEADS, 100, seed=0)
    assert found == {}
    assert len(left_out) == 7
    assert "too many heads" in left_out["random temperature heads"]
    everywhere = tidied({"oeb_layers": list(range(8)), "tau_max": 0.2})
    assert "too many heads" in ablations(everywhere, HEADS, 100, seed=0)[1]["random bridge heads"]


def test_steps_matter_to_what_uses_them() -> None:
    assert depends_on_steps(tidied({"smi_layers": [7], "alpha": 0.1}))
    assert depends_on_steps(tidied({"oeb_layers": [0], "tau_max": 0.1, "bridge_scope": "step"}))
    assert not depends_on_steps(tidied({"oeb_layers": [0], "tau_max": 0.1}))
    assert not depends_on_steps(EMPTY)


# Random steps

TEXTS = [
    f"Ann has {at} eggs.<think>Bob has three more than Ann. So it is {at} and three. Now we count the blue ones too. "
    f"There are {at * 7} of these here.\n\nThat makes it all.</think>It is {at}.\n\nThat is all."
    for at in range(12)
]


def test_random_steps_are_as_many_elsewhere() -> None:
    model = attach(tiny_model("llama"), "paper")
    own = model.stepflow_runtime.rules.vocabulary
    traces = [(encode(text), 0) for text in TEXTS]
    random = random_steps(own, traces, seed=1)

    def starts(vocabulary, ids):
        records = vocabulary.scan(ids)
        return {record[Field.STEP_SLOT] for record in records if record[Field.LABEL] % 3 == 1}

    counts = [sum(len(starts(one, ids)) for ids, _ in traces) for one in (own, random)]
    assert counts[1] == pytest.approx(counts[0], rel=0.25)
    shared = sum(len(starts(own, ids) & starts(random, ids)) for ids, _ in traces)
    assert shared < 0.6 * counts[0]  # the first step of a trace starts in one place for both
    assert any(starts(random, ids) != starts(random_steps(own, traces, seed=2), ids) for ids, _ in traces)
    for ids, _ in traces:  # segments stay where they are
        labels = [[record[Field.LABEL] for record in one.scan(ids)] for one in (own, random)]
        assert labels[0] == labels[1]


def test_random_steps_are_the_same_token_by_token() -> None:
    import torch

    from hf_stepflow.runtime.step_detector import empty_record

    model = attach(tiny_model("llama"), "paper")
    random = random_steps(model.stepflow_runtime.rules.vocabulary, [(encode(text), 0) for text in TEXTS], seed=1)
    ids = encode(TEXTS[0])
    record = torch.tensor([empty_record()])
    for slot, (token, expected) in enumerate(zip(ids, random.scan(ids), strict=True)):
        record = random.advance(record, torch.tensor([token]), slot)
        assert record[0, : Field.RULE_STATE].tolist() == expected[: Field.RULE_STATE]
