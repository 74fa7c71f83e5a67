"""Correct against wrong traces: scipy called directly, planted differences, null data, and what cannot be compared."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest
from scipy import stats

from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.saliency.compare import LayerDifference, SaliencyComparison, compare, index_values
from hf_stepflow.saliency.maps import INDICES
from hf_stepflow.saliency.result import StepSaliency
from tests.support.synthetic_saliency import ABOUT, random_saliency, simple_trace, with_indices

NAMES = list(INDICES)


def drawn(n: int, layers: int, seed: int, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """Indices of n traces, [n, indices, layers], normal about 1 plus the shift."""
    return np.random.default_rng(seed).normal(1, 0.2, (n, len(NAMES), layers)) + shift


def group(values: np.ndarray) -> list[StepSaliency]:
    return [with_indices(one) for one in values]


def difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    return y.mean(axis) - x.mean(axis)


def test_equals_scipy_on_each_layer() -> None:
    x, y = drawn(14, 3, seed=0), drawn(11, 3, seed=1, shift=0.1)
    found = compare(group(x), group(y), resamples=499, seed=3)
    for place, name in enumerate(NAMES):
        p_values = []
        for layer in range(3):
            data = x[:, place, layer], y[:, place, layer]
            one = found.indices[name][layer]
            options = {"n_resamples": 499, "vectorized": True, "axis": -1}
            test = stats.permutation_test(data, difference, rng=np.random.default_rng(3), **options)
            interval = stats.bootstrap(
                data, difference, method="percentile", rng=np.random.default_rng(3), **options
            ).confidence_interval
            assert (one.layer, one.n_correct, one.n_wrong) == (layer, 14, 11)
            assert (one.mean_correct, one.mean_wrong) == pytest.approx([values.mean() for values in data])
            assert (one.difference, one.p_value) == pytest.approx((test.statistic, test.pvalue))
            assert (one.low, one.high) == pytest.approx(tuple(interval))
            pooled = math.sqrt((13 * data[0].var(ddof=1) + 10 * data[1].var(ddof=1)) / 23)
            assert one.effect == pytest.approx(one.difference / pooled * (1 - 3 / (4 * 23 - 1)), rel=1e-3)
            p_values.append(test.pvalue)
        adjusted = [one.adjusted for one in found.indices[name]]
        assert adjusted == pytest.approx(list(stats.false_discovery_control(p_values)))


def test_pairs_equal_scipy_and_see_more() -> None:
    own = np.random.default_rng(5).normal(0, 1, (12, 1, 1))
    x, y = drawn(12, 2, seed=0) + own, drawn(12, 2, seed=1, shift=0.5) + own
    found = compare(group(x), group(y), paired=True, resamples=499)
    for place, name in enumerate(NAMES):
        for layer in range(2):
            pairs = y[:, place, layer] - x[:, place, layer]
            one = found.indices[name][layer]
            test = stats.permutation_test(
                (pairs,), np.mean, permutation_type="samples", n_resamples=499, rng=np.random.default_rng(0)
            )
            assert (one.difference, one.p_value) == pytest.approx((pairs.mean(), test.pvalue))
            d_z = pairs.mean() / pairs.std(ddof=1)
            assert one.effect == pytest.approx(d_z * (1 - 3 / (4 * 11 - 1)), rel=2e-3)
    assert found.effect_name.startswith("Cohen's d_z")
    # What the pairs share hides the difference from a comparison of groups.
    apart = compare(group(x), group(y), resamples=499)
    assert apart.effect_name == "Hedges' g"
    assert [found.separating(name) for name in NAMES] == [[0, 1]] * len(NAMES)
    assert [apart.separating(name) for name in NAMES] == [[]] * len(NAMES)


def test_few_traces_are_tested_exactly() -> None:
    x, y = drawn(3, 1, seed=0), drawn(4, 1, seed=1, shift=9.0)
    found = compare(group(x), group(y))
    assert all(rows[0].p_value == pytest.approx(2 / math.comb(7, 3)) for rows in found.indices.values())
    paired = compare(group(x), group(y[:3]), paired=True)
    assert all(rows[0].p_value == pytest.approx(2 / 2**3) for rows in paired.indices.values())


@pytest.mark.parametrize("paired", [False, True])
def test_planted_layers_are_found(paired: bool) -> None:
    shift = np.zeros((len(NAMES), 12))
    shift[0, [2, 3, 4, 8]] = 0.4
    shift[0, [9, 10]] = -0.4
    shift[5, 11] = 0.4
    found = compare(
        group(drawn(40, 12, seed=0)), group(drawn(40, 12, seed=1, shift=shift)), paired=paired, resamples=1999
    )
    assert found.separating("lock_in") == [2, 3, 4, 8, 9, 10]
    assert found.bands("lock_in") == [(2, 4), (8, 8), (9, 10)]  # the sign turns between 8 and 9
    assert found.separating("decay_share") == [11]
    others = [name for name in NAMES if name not in ("lock_in", "decay_share")]
    assert sum(len(found.separating(name)) for name in others) == 0
    assert found.indices["lock_in"][2].low > 0 > found.indices["lock_in"][9].high


def test_false_discoveries_are_controlled() -> None:
    """Where all layers are alike, an index separates anywhere in one family of tests out of twenty."""
    families = [
        compare(group(drawn(12, 10, seed)), group(drawn(12, 10, seed + 100)), resamples=999) for seed in range(6)
    ]
    wrong = sum(bool(found.separating(name)) for found in families for name in NAMES)
    assert wrong <= stats.binom.ppf(0.999, len(families) * len(NAMES), 0.05)
    unadjusted = sum(one.p_value <= 0.05 for found in families for rows in found.indices.values() for one in rows)
    assert unadjusted == pytest.approx(0.05 * len(families) * len(NAMES) * 10, rel=0.6)


@pytest.mark.parametrize("paired", [False, True])
def test_no_numbers_are_left_out(paired: bool) -> None:
    x, y = drawn(9, 4, seed=0), drawn(9, 4, seed=1, shift=0.5)
    x[0, 0, 1] = y[3, 0, 1] = y[4, 0, 1] = np.nan
    x[:, 0, 2] = np.nan
    y[1:, 0, 3] = np.inf
    found = compare(group(x), group(y), paired=paired, resamples=299).indices
    one = found["lock_in"]
    if paired:
        kept = [0, 3, 4]
        kept = [row for row in range(9) if row not in kept]
        few = np.ix_(kept, range(len(NAMES)), [1])
        alone = compare(group(x[few]), group(y[few]), paired=True, resamples=299)
        assert [(row.n_correct, row.n_wrong) for row in one] == [(9, 9), (6, 6), (0, 0), (1, 1)]
    else:
        alone = compare(group(x[1:, :, [1]]), group(np.delete(y, [3, 4], 0)[:, :, [1]]), resamples=299)
        assert [(row.n_correct, row.n_wrong) for row in one] == [(9, 9), (8, 7), (0, 9), (9, 1)]
    same = alone.indices["lock_in"][0]
    assert (one[1].difference, one[1].p_value, one[1].low) == pytest.approx((same.difference, same.p_value, same.low))
    for row in one[2:]:
        assert math.isnan(row.p_value)
        assert math.isnan(row.adjusted)
        assert not row.separates
    # What has no p-value is no comparison to be adjusted for.
    tested = stats.false_discovery_control([row.p_value for row in one[:2]])
    assert [row.adjusted for row in one[:2]] == pytest.approx(list(tested))
    assert all(row.n_correct == 9 for name in NAMES[1:] for row in found[name])


@pytest.mark.parametrize("paired", [False, True])
def test_values_that_do_not_spread(paired: bool) -> None:
    x, y = drawn(6, 3, seed=0), drawn(6, 3, seed=1)
    x[:, 0, 0] = y[:, 0, 0] = 0.3
    x[:, 0, 1], y[:, 0, 1] = 0.0, 1.0
    y[0, 0, 0] = np.nextafter(0.3, 1)
    rows = compare(group(x), group(y), paired=paired, resamples=299).indices["lock_in"]
    assert (rows[0].p_value, rows[0].difference, rows[0].low, rows[0].high) == (1.0, 0.0, 0.0, 0.0)
    assert rows[0].effect == 0.0
    assert (rows[1].difference, rows[1].low, rows[1].high) == (1.0, 1.0, 1.0)
    assert math.isnan(rows[1].effect)
    assert rows[1].p_value < 0.05


def test_layers_of_a_hybrid_model_make_one_band() -> None:
    shift = np.zeros((len(NAMES), 4))
    shift[0, [1, 2]] = 2.0
    values = drawn(10, 4, seed=0), drawn(10, 4, seed=1, shift=shift)
    groups = [[with_indices(one, layers=[3, 7, 11, 15]) for one in each] for each in values]
    found = compare(*groups, resamples=999)
    assert found.separating("lock_in") == [7, 11]
    assert found.bands("lock_in") == [(7, 11)]
    assert found.layers == [3, 7, 11, 15]


def test_of_maps() -> None:
    correct = [random_saliency(simple_trace(5, 1 + seed % 2), 3, seed) for seed in range(5)]
    wrong = [random_saliency(simple_trace(4, 0), 3, seed + 50, zero_beyond=1) for seed in range(4)]
    found = compare(correct, wrong, resamples=199)
    assert found.indices["lock_in"][0].difference > 0
    assert index_values(correct)["lock_in"].shape == (3, 5)
    decay = found.indices["decay_share"]
    assert [(one.n_correct, one.n_wrong) for one in decay] == [(5, 0)] * 3
    assert not math.isnan(decay[0].mean_correct)
    assert found.about == {**ABOUT, "pooling": "causal"}


def test_written_out() -> None:
    x, y = drawn(9, 30, seed=0), drawn(8, 30, seed=1)
    y[:, 0, 12:17] -= 1e-4 + x[:, 0, 12:17].mean()
    y[:, 7] = np.nan
    y[:, 1] *= -1e-12
    found = compare(group(x), group(y), resamples=299)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["traces"] == {"correct": 9, "wrong": 8}
    assert plain["indices"]["lock_in"]["separating"] == found.separating("lock_in") == [12, 13, 14, 15, 16]
    assert plain["indices"]["lock_in"]["bands"] == [[12, 16]]
    assert plain["indices"]["block_ratio"]["layers"][0]["p_value"] is None
    assert plain["methods"]["adjusted"].startswith("Benjamini-Hochberg")
    assert set(plain["indices"]["lock_in"]["layers"][0]) == {field.name for field in fields(LayerDifference)}
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    assert all(name in text for name in NAMES)
    assert "separates in layers 12-16 (n = 9 and 8)" in text
    assert "separates in no layer" in text
    assert "too few traces have it" in text
    assert "Hedges' g" in text
    assert "d_z" in str(compare(group(x[:8]), group(y), paired=True, resamples=99))


def test_the_seed_settles_all() -> None:
    groups = group(drawn(8, 2, seed=0)), group(drawn(8, 2, seed=1))

    def found(seed: int) -> SaliencyComparison:
        return compare(*groups, resamples=199, seed=seed)

    assert str(found(1).to_dict()) == str(found(1).to_dict())
    assert str(found(1).to_dict()["indices"]) != str(found(2).to_dict()["indices"])


def test_what_cannot_be_compared() -> None:
    one, two = group(drawn(3, 2, seed=0)), group(drawn(3, 2, seed=1))
    with pytest.raises(StepFlowInputError, match="wrong must hold 2 traces or more, got 1") as caught:
        compare(one, two[:1])
    assert caught.value.hint
    with pytest.raises(StepFlowInputError, match="correct must hold 2 traces or more, got 0"):
        compare([], two)
    with pytest.raises(StepFlowInputError, match="as many correct as wrong traces, got 3 and 2"):
        compare(one, two[:2], paired=True)
    with pytest.raises(StepFlowInputError, match="level must lie between 0 and 1"):
        compare(one, two, level=5)
    with pytest.raises(StepFlowInputError, match="resamples must be 1 or more"):
        compare(one, two, resamples=0)
    with pytest.raises(StepFlowInputError, match="correct must be a list of StepSaliency, got StepSaliency"):
        compare(one[0], two)
    with pytest.raises(StepFlowInputError, match="given as StepSaliency, got str"):
        compare(["a", "b"], two)
    with pytest.raises(StepFlowInputError, match=r"index must be one of lock_in, .* got 'heat'"):
        compare(one, two, resamples=9).separating("heat")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers", {"layers": [0, 2]}),
        ("pooling", {"pooling": "block"}),
        ("model", {"about": {**ABOUT, "model": "another"}}),
        ("loss", {"about": {**ABOUT, "loss": "summary"}}),
    ],
)
def test_groups_must_be_alike(name: str, change: dict) -> None:
    values = drawn(3, 2, seed=0)
    with pytest.raises(StepFlowInputError, match=f"same {name}"):
        compare(group(values), [with_indices(one, **change) for one in values])
    # Inside a group, too.
    with pytest.raises(StepFlowInputError, match=f"same {name}"):
        compare([*group(values), with_indices(values[0], **change)], group(values))


def test_a_loss_from_a_file_is_the_loss() -> None:
    values = drawn(3, 2, seed=0)
    groups = [[with_indices(one, about={**ABOUT, "loss": loss}) for one in values] for loss in ((3, 7), [3, 7])]
    assert compare(*groups, resamples=9).about["loss"] == (3, 7)
