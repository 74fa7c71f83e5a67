"""The proxy against a naive oracle, the responses it is taken on, and the heads that it finds."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_stepflow.calibration.candidates import EMPTY
from hf_stepflow.calibration.heads import PROBE_FLOOR, PROBE_TEMPERATURE, find_heads, floor_on, temperature_on
from hf_stepflow.calibration.proxy import (
    CLIP,
    FEWEST,
    TOLERANCE,
    ProxyScore,
    Row,
    Scored,
    Solved,
    exactness_score,
    proxy_score,
    read_answers,
    rows_to_score,
)
from hf_stepflow.calibration.run import CalibrationRun, Sampling
from hf_stepflow.calibration.work_folder import Workers, WorkFolder
from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.runtime.step_detector import StepVocabulary
from tests.support.calibration import problems
from tests.support.flow import attach, byte_tokenizer, encode
from tests.support.tiny_models import tiny_model

VOCABULARY = StepVocabulary.from_tokenizer(byte_tokenizer())


def naive(rows, before, after, strata):
    """The definition, problem by problem."""
    changes = {True: {}, False: {}}
    weights = {}
    for row, one, other in zip(rows, before, after, strict=True):
        changes[row.is_right].setdefault(row.problem, []).append(max(-CLIP, min(CLIP, other - one)))
        weights[row.problem] = row.weight

    def mean(kind, names=None):
        own = {
            name: sum(values) / len(values) for name, values in changes[kind].items() if names is None or name in names
        }
        total = sum(weights[name] for name in own)
        return sum(weights[name] * value for name, value in own.items()) / total if own else None

    def end(name):
        """The mean change of the right responses of a stratum, plus its standard error."""
        own = [at for at in changes[True] if strata.get(at) == name]
        if len(own) < FEWEST:
            return None
        total, middle = sum(weights[at] for at in own), mean(True, own)
        squares = [
            (weights[at] / total * (sum(changes[True][at]) / len(changes[True][at]) - middle)) ** 2 for at in own
        ]
        return middle + math.sqrt(sum(squares) * len(own) / (len(own) - 1))

    likelihood, lost = mean(True) or 0.0, mean(False) or 0.0
    ends = [one for one in map(end, set(strata.values())) if one is not None]
    return (likelihood + likelihood - lost) / 2, likelihood, likelihood - lost, min(ends, default=None)


@given(st.data())
def test_proxy_is_its_definition(data) -> None:
    names = data.draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12))
    weight = {name: data.draw(st.floats(0.5, 4)) for name in sorted(set(names))}
    rows = [Row(name, (1,), (2,), data.draw(st.booleans()), weight[name]) for name in names]
    values = st.lists(st.floats(-60, 0), min_size=len(rows), max_size=len(rows))
    before, after = data.draw(values), data.draw(values)
    strata = {name: data.draw(st.sampled_from(["chains", "errands"])) for name in "abcde"}
    score = proxy_score(rows, before, after, strata)
    value, likelihood, margin, worst = naive(rows, before, after, strata)
    assert score.value == pytest.approx(value, abs=1e-9)
    assert score.likelihood == pytest.approx(likelihood, abs=1e-9)
    assert score.margin == pytest.approx(margin, abs=1e-9)
    assert (score.worst is None) == (worst is None) == (score.stratum is None)
    if worst is not None:
        assert score.worst == pytest.approx(worst, abs=1e-9)
    assert score.value == pytest.approx((score.likelihood + score.margin) / 2, abs=1e-9)


@given(st.data())
def test_exactness_is_its_definition(data) -> None:
    rows, before, after = [], [], []
    for name in data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8, unique=True)):
        tokens = data.draw(st.integers(1, 40))
        for is_right in (True, False):
            rows.append(Row(name, (1,), (2,), is_right, 1.0 + len(rows) % 3, is_right))
            before.append(Scored(-3.0, data.draw(st.integers(0, tokens)), tokens))
            after.append(Scored(-2.0, data.draw(st.integers(0, tokens)), tokens))
    score = exactness_score(rows, before, after, dict.fromkeys("abcdefgh", "s"))
    right = [at for at, row in enumerate(rows) if row.is_right]
    total = sum(rows[at].weight for at in right)
    tokens = sum(rows[at].weight * (before[at].errors - after[at].errors) / before[at].tokens for at in right) / total
    whole = (
        sum(rows[at].weight * (float(after[at].errors == 0) - float(before[at].errors == 0)) for at in right) / total
    )
    assert score.unit == "points"
    assert score.tokens == pytest.approx(100 * tokens, abs=1e-9)
    assert score.whole == pytest.approx(100 * whole, abs=1e-9)
    assert score.value == pytest.approx(50 * (tokens + whole), abs=1e-9)
    assert (score.worst is None) == (len(right) < FEWEST)


def test_without_reference_traces_the_likelihood_serves() -> None:
    rows = [Row("a", (1,), (2,), True), Row("b", (1,), (2,), False)]
    before, after = [Scored(-3.0, 1, 4), Scored(-4.0, 0, 4)], [Scored(-2.0, 0, 4), Scored(-5.0, 2, 4)]
    assert exactness_score(rows, before, after, {}) == proxy_score(rows, [-3.0, -4.0], [-2.0, -5.0], {})


def test_its_error_is_that_of_drawing_problems_again() -> None:
    rng = np.random.default_rng(0)
    rows = [Row(str(at), (1,), (2,), kind) for at in range(200) for kind in (True, False)]
    after = rng.normal(0.3, 1.0, len(rows)) + np.repeat(rng.normal(0, 1, 200), 2)
    pairs = after.reshape(200, 2)
    drawn = [
        float((part[:, 0] - 0.5 * part[:, 1]).mean())
        for part in (pairs[rng.integers(0, 200, 200)] for _ in range(4000))
    ]
    score = proxy_score(rows, [0.0] * len(rows), after, {})
    assert score.error == pytest.approx(np.std(drawn), rel=0.05)


def test_the_same_settings_score_nothing() -> None:
    rows = [Row("a", (1,), (2,), True), Row("b", (1,), (2,), False)]
    score = proxy_score(rows, [-3.0, -4.0], [-3.0, -4.0], {"a": "s"})
    assert (score.value, score.error, score.objective) == (0.0, 0.0, 0.0)
    assert score.is_harmless


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_overflows_counts_as_the_worst(value: float) -> None:
    rows = [Row(name, (1,), (2,), is_right) for name in "ab" for is_right in (True, False)]
    before, gains = [-30.0] * 4, [-29.0, -31.0, -29.0, -31.0]
    fine = proxy_score(rows, before, gains, {})
    for place, worst in ((0, -40.0), (1, -20.0)):  # a right response lost, a wrong one made likelier
        after = [value if at == place else gain for at, gain in enumerate(gains)]
        score = proxy_score(rows, before, after, {})
        assert score == proxy_score(
            rows, before, [worst if at == place else gain for at, gain in enumerate(gains)], {}
        )
        assert score.value < 0 < fine.value


@pytest.mark.parametrize("after", [math.nan, -3.0])
def test_a_response_that_overflows_under_the_base_counts_as_unchanged(after: float) -> None:
    rows = [Row("a", (1,), (2,), True), Row("b", (1,), (2,), True)]
    score = proxy_score(rows, [math.nan, -3.0], [after, -2.0], {})
    assert (score.likelihood, score.worst) == (0.5, None)


def test_harm_to_a_stratum_is_below_the_base() -> None:
    harmful = ProxyScore(5.0, 0.1, 5.0, 5.0, -2 * TOLERANCE)
    assert not harmful.is_harmless
    assert harmful.objective < 0
    worse = ProxyScore(5.0, 0.1, 5.0, 5.0, -20 * TOLERANCE)
    assert worse.objective < harmful.objective
    assert ProxyScore(5.0, 0.1, 5.0, 5.0, -TOLERANCE / 2).objective == 5.0


def solved(accuracies: list[float], traces: bool = False) -> list[Solved]:
    made = []
    for at, (problem, accuracy) in enumerate(zip(problems(len(accuracies)), accuracies, strict=True)):
        if traces:
            problem = EvalProblem(
                problem.id, problem.question, problem.answer, kind="number", trace=f"It is {at + 1}."
            )
        rights = [sample < accuracy * 2 for sample in range(2)]
        results = [{"right": right, "ids": [10 + at, 50 + sample], "steps": 1} for sample, right in enumerate(rights)]
        reference = (*encode(problem.trace), byte_tokenizer().eos_token_id) if problem.trace else None
        prompt = tuple(encode(problem.prompt))
        made.append(Solved(problem, prompt, reference, accuracy, 10.0 + at, 1.0, results))
    return made


def test_rows_stand_for_all_problems() -> None:
    own = solved([1.0] * 30 + [0.0] * 10 + [0.5] * 10)
    rows = rows_to_score(own, 20)
    names = {row.problem for row in rows}
    assert len(names) == 20
    missed = {one.problem.id for one in own if one.accuracy < 1}
    assert len(names & missed) == 10
    weights = {row.problem: row.weight for row in rows}
    assert sum(weights.values()) == pytest.approx(50)
    assert sum(weight for name, weight in weights.items() if name in missed) == pytest.approx(20)
    half = [row for row in rows if row.problem == "45"]
    assert sorted(row.is_right for row in half) in ([], [False, True])
    few = rows_to_score(solved([1.0] * 30 + [0.0] * 2), 20)
    assert len({row.problem for row in few}) == 20  # problems that are solved fill up


def test_reference_traces_are_the_right_ones() -> None:
    rows = rows_to_score(solved([1.0, 0.0, 0.5], traces=True), 3)
    right = {row.problem: row.response for row in rows if row.is_right}
    eos = byte_tokenizer().eos_token_id
    assert right == {str(at): (*encode(f"It is {at + 1}."), eos) for at in range(3)}
    assert all(row.prompt == tuple(encode(f"What is {row.problem} + 1?")) for row in rows)


def test_answers_are_read_by_problem() -> None:
    asked = [*problems(2), EvalProblem("no answer", "?", "1")]
    results = [
        {"problem": "0", "right": right, "ids": [1] * length, "steps": steps}
        for right, length, steps in ((True, 4, 2), (False, 8, 4))
    ]
    (one,) = read_answers(asked, results, byte_tokenizer(), VOCABULARY, {})
    assert (one.accuracy, one.tokens, one.steps) == (0.5, 6.0, 3.0)
    assert (one.prompt, one.reference) == (tuple(encode(asked[0].prompt)), None)


def test_length_and_steps_are_those_of_the_reference() -> None:
    """A response that went wrong is long, and says nothing about the length of its problem."""
    trace = "Ann has two eggs. She gets one more egg. That makes three eggs.</think>The answer is 3."
    asked = [EvalProblem("0", "How many?<think>", "3", kind="number", trace=trace)]
    lost = [{"problem": "0", "right": False, "ids": [1] * 900, "steps": 70}]
    (one,) = read_answers(asked, lost, byte_tokenizer(), VOCABULARY, {})
    assert (one.tokens, one.steps) == (len(encode(trace)) + 1, 3.0)
    assert one.prompt == tuple(encode("How many?<think>"))
    assert one.reference == (*encode(trace), byte_tokenizer().eos_token_id)


# Heads


def simulated(gains: dict, joint=None):
    """Likelihoods of one right trace each of 40 problems, which change by the gains of the heads under a floor."""
    rows = [Row(str(at), (1,), (2,), True) for at in range(40)]
    noise = np.random.default_rng(1).normal(0, 0.3, (40,))
    asked = []

    def likelihoods(settings):
        if settings is None:
            return [-3.0] * 40
        heads = [(int(layer), head) for layer, own in settings["oeb_heads"].items() for head in own]
        asked.append(heads)
        total = sum(gains.get(head, 0.0) for head in heads) if joint is None else joint(heads)
        return list(-3.0 + total + noise * len(heads))

    def score(before, after):
        return proxy_score(rows, before, after, {})

    return likelihoods, score, asked


def no_end(head, together):
    return False


ALL = [(layer, head) for layer in range(3) for head in range(4)]


def test_a_planted_head_is_found() -> None:
    likelihoods, score, _ = simulated({(1, 2): 1.0})
    found = find_heads(ALL, floor_on, likelihoods, score, no_end)
    assert found.chosen == [(1, 2)]
    assert found.table == {1: [2]}
    assert found.untried == 0


def test_heads_that_only_help_alone_are_not_both_taken() -> None:
    likelihoods, score, _ = simulated({}, joint=lambda heads: {1: 1.0, 2: -1.0}[len(heads)])
    assert len(find_heads(ALL[:4], floor_on, likelihoods, score, no_end).chosen) == 1


def test_heads_that_help_together_are_all_taken_the_best_first() -> None:
    likelihoods, score, _ = simulated({(0, 1): 0.5, (1, 2): 1.0, (2, 0): 0.7})
    assert find_heads(ALL, floor_on, likelihoods, score, no_end).chosen == [(1, 2), (2, 0), (0, 1)]


def test_no_head_is_taken_from_noise() -> None:
    likelihoods, score, _ = simulated({})
    noise = find_heads(ALL, floor_on, likelihoods, score, no_end)
    assert all(abs(gain) < 0.2 for gain in noise.gains.values())
    assert not noise.chosen


def test_time_ends_the_trials() -> None:
    likelihoods, score, asked = simulated({(0, 1): 1.0})
    found = find_heads(ALL, floor_on, likelihoods, score, lambda head, together: head == (1, 0))
    assert found.untried == 8
    assert found.chosen == [(0, 1)]
    assert len(asked) == 4 + 1


def test_where_time_ends_the_trials_together_the_best_is_there() -> None:
    likelihoods, score, _ = simulated({(0, 1): 0.5, (1, 2): 1.0})
    found = find_heads(ALL, floor_on, likelihoods, score, lambda head, together: together)
    assert found.chosen == [(1, 2)]
    assert found.untried == 0


BRIDGE = (floor_on, {"tau_max": 0.9}, (0, 1))
TEMPERATURE = (partial(temperature_on, base=8), {"length_temperature": 4.0}, (1, 2))


@pytest.mark.parametrize(("acting_on", "strength", "planted"), [BRIDGE, TEMPERATURE])
def test_a_head_planted_in_a_model_is_found(acting_on, strength: dict, planted: tuple[int, int]) -> None:
    """Traces that the model samples under a mechanism on one head are likelier under that mechanism."""
    model = attach(tiny_model("llama", seed=4), "paper")
    strong = {**acting_on([planted]), **strength}
    rows = []
    for at in range(24):
        prompt = encode(f"Ann has {at} eggs. Bob has more.<think>")
        made = model.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=True, top_k=0, stepflow=strong, pad_token_id=0
        )
        rows.append(Row(str(at), tuple(prompt), tuple(made[0, len(prompt) :].tolist()), True))
    run = CalibrationRun(model, byte_tokenizer(), Sampling(), WorkFolder(None, {}, {}), Workers(), progress=False)

    def likelihoods(settings):
        return [one.log_likelihood for one in run.scores(settings and {**settings, **strength}, rows)]

    found = find_heads(
        [(layer, head) for layer in range(2) for head in range(4)],
        acting_on,
        likelihoods,
        lambda before, after: proxy_score(rows, before, after, {}),
        no_end,
    )
    assert max(found.gains, key=found.gains.get) == planted
    assert found.chosen == [planted]


def test_a_floor_on_heads_is_nothing_else() -> None:
    settings = floor_on([(3, 1), (0, 2), (3, 0)])
    assert settings == {**EMPTY, "oeb_layers": [0, 3], "oeb_heads": {"0": [2], "3": [0, 1]}, "tau_max": PROBE_FLOOR}


def test_a_temperature_on_heads_is_nothing_else() -> None:
    settings = temperature_on([(3, 1), (0, 2), (3, 0)], 120)
    assert settings == {
        **EMPTY, "length_temperature": PROBE_TEMPERATURE, "length_temperature_base": 120,
        "length_temperature_heads": {"0": [2], "3": [0, 1]},
    }  # fmt: skip
