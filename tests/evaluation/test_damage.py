"""Damage: the harm of an arm against counting by hand, and intervals of shares against the closed formula."""

import dataclasses
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_stepflow.evaluation.charts import apart
from hf_stepflow.evaluation.damage import ArmDamage, NextTokenKL, damage_of
from hf_stepflow.evaluation.damage_chart import damage_chart
from hf_stepflow.evaluation.page import write_report
from hf_stepflow.evaluation.result import EvaluationResult, _arm_lines
from hf_stepflow.evaluation.statistics import Estimate, clustered_share, proportion

NONE = Estimate(0.0, None, None)
RUN = {"seed": 0, "dtype": "float32"}


def row(arm: str, problem: int, sample: int, right: bool, **more) -> dict:
    outcome = "correct" if right else "wrong"
    common = {"tokens": 10, "seconds": 1.0, "steps": 2, "loops": 0, "text": outcome, "batch": 0, "of": 1}
    return common | {
        "arm": arm, "problem": str(problem), "sample": sample, "right": right, "outcome": outcome
    } | more  # fmt: skip


def results(rights: list[list[bool]], arm: str = "arm") -> dict:
    return {
        (str(problem), sample): row(arm, problem, sample, right)
        for problem, own in enumerate(rights)
        for sample, right in enumerate(own)
    }


def closed_cluster_robust(hits: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """A ratio and its cluster-robust standard error, with the correction for few clusters; float64."""
    n, value = len(hits), math.fsum(hits) / math.fsum(counts)
    squares = math.fsum((hit - value * count) ** 2 for hit, count in zip(hits, counts, strict=True))
    return value, math.sqrt(n / (n - 1) * squares) / math.fsum(counts)


def test_the_interval_is_that_of_the_cluster_robust_formula() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 9, size=200)
    hits = generator.binomial(counts, generator.beta(0.6, 0.9, size=200))
    found, (value, error) = clustered_share(hits, counts), closed_cluster_robust(hits, counts)
    assert found.value == pytest.approx(value)
    assert found.low == pytest.approx(value - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(value + 1.96 * error, abs=0.1 * error)
    # Taken for independent, the responses would promise far more.
    alone = proportion(int(hits.sum()), int(counts.sum()))
    assert found.high - found.low > 1.4 * (alone.high - alone.low)


def test_the_interval_covers() -> None:
    generator, covered, runs = np.random.default_rng(1), 0, 150
    for seed in range(runs):
        counts = generator.integers(1, 7, size=80)
        hits = generator.binomial(counts, generator.beta(1.0, 3.0, size=80))
        found = clustered_share(hits, counts, seed)
        covered += found.low <= 0.25 <= found.high
    # A percentile bootstrap over 80 problems covers a little less than it promises.
    assert stats.binomtest(covered, runs, 0.93).pvalue > 0.003


def test_equal_shares_are_no_certainty() -> None:
    assert clustered_share([1, 0, 1], [1, 1, 1]) == proportion(2, 3)
    none = clustered_share([0] * 20, [4] * 20)
    # 20 problems, not 80 responses.
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(stats.binomtest(0, 20).proportion_ci(method="exact").high)
    half = clustered_share([2.0] * 20, [4] * 20)
    assert half.low < 0.5 < half.high
    assert clustered_share([0.25], [1]).low is not None


shares = st.lists(st.tuples(st.lists(st.booleans(), min_size=3, max_size=3), st.lists(st.booleans(), min_size=3,
                  max_size=3)), min_size=2, max_size=5)  # fmt: skip


@settings(max_examples=25)
@given(shares)
def test_harm_is_the_share_of_pairs_that_break(pairs: list) -> None:
    """Every right response of the first arm beside every response of the other to the same problem, one by one."""
    first, own = results([one for one, _ in pairs]), results([other for _, other in pairs])
    found = damage_of("arm", NONE, NONE, own, first, 0).harm_rate
    broken = [not b for one, other in pairs for a in one if a for b in other]
    assert (found is None) is (not broken)
    if found is not None:
        assert found.value == pytest.approx(sum(broken) / len(broken))
    chance = damage_of("first", NONE, None, first, first, 0).harm_rate
    again = [not b for one, _ in pairs for i, a in enumerate(one) if a for j, b in enumerate(one) if i != j]
    assert (chance is None) is (not again)
    if chance is not None:
        assert chance.value == pytest.approx(sum(again) / len(again))


def test_an_arm_that_does_nothing_harms_as_chance_does() -> None:
    generator = np.random.default_rng(2)
    ease = generator.beta(0.7, 0.7, size=(400, 1))
    first, own = (results((generator.random((400, 4)) < ease).tolist()) for _ in range(2))
    harm = damage_of("arm", NONE, NONE, own, first, 0).harm_rate
    chance = damage_of("first", NONE, None, first, first, 0).harm_rate
    assert harm.low < chance.value < harm.high
    assert chance.value > 0.1


def test_of_single_responses() -> None:
    first, own = results([[True]] * 8 + [[False]] * 2), results([[False]] * 2 + [[True]] * 8)
    found = damage_of("arm", NONE, NONE, own, first, 0)
    assert found.harm_rate == proportion(2, 8)
    assert damage_of("first", NONE, None, first, first, 0).harm_rate is None
    assert damage_of("arm", NONE, NONE, own, results([[False]] * 10), 0).harm_rate is None


def test_every_sample_of_a_vote_counts() -> None:
    cut = {"tokens": 5, "answer": None, "outcome": "unfinished", "right": False}
    done = cut | {"outcome": "correct", "right": True}
    own = {(str(n), 0): row("vote", n, 0, True, votes=[cut, cut, done, done], loops=n % 2) for n in range(10)}
    found = damage_of("vote", NONE, NONE, own, results([[True]] * 10), 0)
    assert found.unfinished.value == 0.5
    assert found.loop_rate.value == pytest.approx(5 / 40)
    assert found.tokens == 10


def make(samples: int = 1, **change) -> EvaluationResult:
    generator = np.random.default_rng(3)
    run = RUN | {"arms": {"base": {}, "arm": {"stepflow": True}}, "n_problems": 12, "n_samples": samples}
    rows = [
        row(arm, problem, sample, bool(generator.random() < 0.6), tokens=10 + problem) | change
        for arm in run["arms"]
        for problem in range(12)
        for sample in range(samples)
    ]
    return EvaluationResult(run, {}, [{k: v for k, v in one.items() if v is not None} for one in rows])


def test_one_table_has_it_all() -> None:
    result = make()
    first, second = result.damage
    assert first.length is None
    assert second.length == result.comparisons[0].tokens_ratio
    assert second.harm_rate == result.comparisons[0].paired.harm_rate
    assert [one.accuracy for one in result.damage] == [one.accuracy for one in result.arms()]
    lines = str(result).split("\n\n")[0].splitlines()
    rows = {line[:12].rstrip(): line[12:] for line in lines}
    assert list(rows)[2:] == [
        "right %", "breaks %", "length", "loops %", "unfinished %", "no answer", "tokens", "steps", "seconds",
    ]  # fmt: skip
    assert rows[""].split() == [first.name, second.name]
    assert len({len(line) for line in lines}) == 1  # the last column is full
    assert f"{100 * second.harm_rate.value:.1f} [" in rows["breaks %"]
    assert "1.00 [1.00, 1.00]" in rows["length"]
    data = json.loads(json.dumps(result.to_dict()))["damage"]
    assert [set(one) for one in data] == [{one.name for one in dataclasses.fields(first)}] * 2


def test_many_arms_make_several_tables() -> None:
    result = make()
    arms, damage = result.arms() * 3, result.damage * 3
    lines = _arm_lines(arms, damage, result.reference)
    assert [line[:12].rstrip() for line in lines].count("right %") == 2
    assert lines[0].count(arms[0].name) >= 2
    assert max(map(len, lines)) < 120


def test_results_of_earlier_releases_say_nothing_of_loops() -> None:
    result = make(loops=None)
    assert [one.loop_rate for one in result.damage] == [None, None]
    assert "unfinished %" in str(result)


def test_samples_break_by_chance_and_the_table_says_so() -> None:
    result = make(samples=3)
    assert result.damage[0].harm_rate is not None
    assert "what chance alone breaks" in str(result)
    assert result.comparisons[0].paired.harm_rate is None
    assert "chance" not in str(make())


def arm(name: str, right: float, breaks: float | None, kl: float | None) -> ArmDamage:
    share = Estimate(right, right - 0.1, right + 0.1)
    harm = None if breaks is None else Estimate(breaks, breaks, breaks + 0.1)
    found = None if kl is None else NextTokenKL(kl / 10, kl, kl, 300, True)
    length = None if breaks is None else Estimate(1 + breaks, 1.0, 2.0)
    return ArmDamage(name, share, harm, length, None, Estimate(0.1, 0.0, 0.2), 100.0, 9.0, found)


def test_the_chart_places_arms_by_their_damage() -> None:
    arms = [arm("base", 0.6, None, None), arm("a <b>", 0.7, 0.1, 1e-6), arm("worse", 0.3, 0.6, 2.0)]
    panels = list(ET.fromstring(damage_chart(arms)).findall("g"))
    titles = [panel.findtext("text") for panel in panels]
    assert titles == ["breaks", "tokens, relative", "unfinished", "KL, 95th percentile, nats"]
    points = [[one for one in panel.iter("circle") if one.get("r") == "4"] for panel in panels]
    assert list(map(len, points)) == [3, 3, 3, 2]
    for own in (points[0], points[1], points[3]):  # more damage is to the right
        assert float(own[-2].get("cx")) < float(own[-1].get("cx"))
    base, better, worse = (float(one.get("cy")) for one in points[0])
    assert better < base < worse  # more right answers are above
    dashed = [line for line in panels[0].iter("line") if line.get("class") == "dashed"]
    assert float(dashed[0].get("y1")) == pytest.approx(base, abs=0.1)
    assert [one.text for one in panels[0].iter("title")][1] == "a <b>: 70.0 % right, breaks 10 %"
    alone = damage_chart([arm("base", 0.6, None, None), arm("same", 0.6, 0.0, None)])
    assert "KL" not in alone


def test_points_move_only_where_they_would_cover_each_other() -> None:
    assert apart([(10.0, 50.0), (10.0, 90.0), (40.0, 50.0)]) == [10.0, 10.0, 40.0]
    first, second = apart([(10.0, 50.0), (12.0, 53.0)])
    assert second - first == pytest.approx(9.0)


def test_the_page_has_the_chart_and_the_whole_table(tmp_path: Path) -> None:
    result = make()
    kl = {"median": 1e-5, "high": 0.25, "mean": 0.1, "tokens": 321, "is_thinking": True}
    result.about["kl"] = {"texts": "prose", "arms": {"arm": kl}}
    result.run.update({"n_samples": 1, "max_new_tokens": 9})
    write_report(result, [], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "accuracy against damage" in page
    for head in (
        "right %",
        "breaks %",
        "tokens ratio",
        "loops %",
        "unfinished %",
        "KL p95",
        "no answer",
        "time ratio",
    ):
        assert f"<th>{head}</th>" in page
    assert "<td>1e-05</td><td>0.25</td>" in page
    assert "on 321 tokens of prose, as thinking." in page
