"""The Odds-Equal Bridge: its properties on any finite logits, against the oracle, and on the published cases."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from hf_stepflow.runtime.bridge import (
    BRIDGE_FLOORS,
    bridge_floors,
    bridge_shifts,
    bridged_merge,
    bridged_mixture,
    bridged_weights,
    odds_equal_bridge,
)
from tests.support.oracles import oracle_bridge

HIDDEN = float("-inf")
NEAR, FAR = st.floats(-8, 8), st.floats(-1e4, 1e4)


@dataclass
class Row:
    """One query and head: float64 logits [K], groups [K], and settings."""

    logits: Tensor
    same: Tensor
    bridge: Tensor
    tau_max: float
    floor: str
    sink: float | None

    def run(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The bridged logits [K]."""
        sinks = None if self.sink is None else torch.tensor([self.sink], dtype=dtype)
        logits = self.logits.to(dtype)[None, None, None]
        settings = {"tau_max": self.tau_max, "floor": self.floor, "sink_logits": sinks}
        return odds_equal_bridge(logits, self.same, self.bridge, **settings)[0, 0, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities [K + 1], the sink's last (0 without one)."""
        sink = HIDDEN if self.sink is None else self.sink
        return torch.cat([logits.double(), torch.tensor([sink], dtype=torch.float64)]).softmax(-1)

    def masses(self, logits: Tensor) -> tuple[float, float, float]:
        """The masses of S, B and O."""
        probabilities = self.probabilities(logits)
        in_same = probabilities[:-1][self.same].sum().item()
        in_bridge = probabilities[:-1][self.bridge].sum().item()
        rest = probabilities[:-1][~(self.same | self.bridge)].sum().item() + probabilities[-1].item()
        return in_same, in_bridge, rest

    def tau(self) -> float:
        """The floor before it is made a share."""
        visible = self.logits > HIDDEN
        n_same, n_bridge = (self.same & visible).sum().item(), (self.bridge & visible).sum().item()
        return min(math.sqrt(n_bridge / (n_bridge + n_same)), self.tau_max)


@st.composite
def rows(draw: st.DrawFn, *, empty_groups: bool = False) -> Row:
    """Rows of up to 24 keys in any order, each group around a level of its own: masses reach 1e-30 and below."""
    smallest = 0 if empty_groups else 1
    sizes = {"S": draw(st.integers(smallest, 8)), "B": draw(st.integers(smallest, 8)), "O": draw(st.integers(0, 8))}
    keys: list[tuple[str, float]] = []
    for group, size in sizes.items():
        level = draw(st.one_of(NEAR, st.floats(-80, 80), FAR))
        keys += [(group, max(-1e4, min(1e4, level + draw(st.one_of(NEAR, FAR))))) for _ in range(size)]
    keys += [(draw(st.sampled_from("SBO")), HIDDEN) for _ in range(draw(st.integers(0, 3)))]
    keys = draw(st.permutations(keys))
    return Row(
        logits=torch.tensor([logit for _, logit in keys], dtype=torch.float64),
        same=torch.tensor([group == "S" for group, _ in keys], dtype=torch.bool),
        bridge=torch.tensor([group == "B" for group, _ in keys], dtype=torch.bool),
        tau_max=draw(st.one_of(st.sampled_from([0.0, 0.15, 1.0]), st.floats(0, 1))),
        floor=draw(st.sampled_from(BRIDGE_FLOORS)),
        sink=draw(st.one_of(st.none(), NEAR, FAR)),
    )


@given(rows())
def test_is_the_projection(row: Row) -> None:
    out = row.run()
    p_same, p_bridge, p_other = row.masses(row.logits)
    _, q_bridge, q_other = row.masses(out)
    tau = row.tau()
    floor = tau * (p_same + p_bridge) if row.floor == "share" else tau
    # Where the paper's floor just empties S, rounding decides whether the head is bridged.
    assume(row.floor == "share" or abs(floor - p_same - p_bridge) > 1e-9)
    feasible = row.floor == "share" or floor < p_same + p_bridge

    assert q_other == pytest.approx(p_other, abs=1e-10)
    assert q_bridge == pytest.approx(max(p_bridge, floor) if feasible else p_bridge, abs=1e-10)
    for group in (row.same, row.bridge):
        shift = (out - row.logits)[group & (row.logits > HIDDEN)]
        assert shift.max() - shift.min() <= 1e-11
    outside = ~(row.same | row.bridge) | (row.logits == HIDDEN)
    assert torch.equal(out[outside], row.logits[outside])
    if p_bridge > floor + 1e-9 or not feasible or row.tau_max == 0:
        assert torch.equal(out, row.logits)


@given(rows(empty_groups=True))
def test_equals_the_oracle(row: Row) -> None:
    assume(row.logits.isfinite().any())
    p_same, p_bridge, _ = row.masses(row.logits)
    if row.floor == "absolute" and p_same > 0 and p_bridge > 0:
        assume(abs(row.tau() - p_same - p_bridge) > 1e-9)
    keys, sink = oracle_bridge(
        row.logits.tolist(), row.same.tolist(), row.bridge.tolist(), row.tau_max, row.floor, row.sink
    )
    expected = torch.tensor([*keys, sink], dtype=torch.float64)
    torch.testing.assert_close(row.probabilities(row.run()), expected, rtol=0, atol=1e-10)


@example(
    Row(
        logits=torch.zeros(9, dtype=torch.float64),
        same=torch.arange(9) == 0,
        bridge=torch.arange(9) > 0,
        tau_max=1.0,
        floor="share",
        sink=None,
    )
)
@given(rows(empty_groups=True))
def test_all_forms_equal_the_oracle(row: Row) -> None:
    visible = row.logits > HIDDEN
    assume(visible.any())
    p_same, p_bridge, _ = row.masses(row.logits)
    if row.floor == "absolute" and p_same > 0 and p_bridge > 0:
        assume(abs(row.tau() - p_same - p_bridge) > 1e-9)
    expected, _ = oracle_bridge(
        row.logits.tolist(), row.same.tolist(), row.bridge.tolist(), row.tau_max, row.floor, row.sink
    )
    same, bridge = row.same & visible, row.bridge & visible
    tau_max = torch.tensor([[row.tau_max]], dtype=torch.float64)
    sink_logits = None if row.sink is None else torch.tensor([row.sink], dtype=torch.float64)
    forms = [
        bridged_weights(
            row.logits[None, None, None],
            same[None, None, None],
            bridge[None, None, None],
            tau_max=tau_max,
            floor=row.floor,
            sink_logits=sink_logits,
        )
    ]
    if row.sink is None:
        floors = bridge_floors(same.sum(), bridge.sum(), tau_max, torch.float64)
        parts = [attention_over(row.logits, group) for group in (visible, bridge, same)]
        out, has_others = torch.empty_like(parts[0][0]), (visible & ~same & ~bridge).any()
        for segment in [parts[2]] if has_others else [parts[2], None]:  # else what S holds need not be known
            weights, before, least = bridged_merge(parts[0], parts[1], segment, floors, row.floor, out.clone())
            forms.append((weights, before, torch.maximum(before, least)))
        if not has_others:
            weights, before, least = bridged_mixture(parts[2], parts[1], floors, out)
            forms.append((weights, before, torch.maximum(before, least)))
    for form in forms:
        weights, before, after = (tensor.flatten() for tensor in form)
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
        assert before.item() == pytest.approx(p_bridge, abs=1e-10)
        if p_same > 0 and p_bridge > 0:
            assert after.item() == pytest.approx(weights[row.bridge].sum().item(), abs=1e-10)


def attention_over(logits: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over a group, with values that make its output the weights: [1, 1, K] and [1, 1]."""
    part = logits.nan_to_num(neginf=0.0).where(group, torch.tensor(-1e300, dtype=logits.dtype))[None, None]
    return part.softmax(-1), part.logsumexp(-1)


@given(rows(empty_groups=True), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 26))
def test_finite_for_any_finite_logits(row: Row, dtype: torch.dtype, exponent: int) -> None:
    largest = {torch.float16: 6e4}.get(dtype, 1e30)
    row.logits = (row.logits * 10.0**exponent).clamp(-largest, largest).where(row.logits > HIDDEN, HIDDEN)
    out = row.run(dtype)
    assert out.dtype == dtype
    assert torch.equal(out == HIDDEN, row.logits == HIDDEN)
    assert not out.isnan().any()
    assert not (out == float("inf")).any()


@given(rows(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_the_float32_result_rounded(row: Row, dtype: torch.dtype) -> None:
    row.logits = row.logits.to(dtype).double()
    row.sink = None if row.sink is None else torch.tensor(row.sink, dtype=dtype).item()
    assert torch.equal(row.run(dtype), row.run(torch.float32).to(dtype))


@pytest.mark.parametrize("floor", BRIDGE_FLOORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [3.0, 30.0, 69.0, 300.0, 2000.0, 1e4])
def test_any_tiny_mass_reaches_the_floor(gap: float, dtype: torch.dtype, floor: str) -> None:
    logits = torch.tensor([0.5, 1.0, 0.0, 0.25], dtype=dtype)
    logits[:2] -= gap
    same, bridge = torch.tensor([False, False, True, True]), torch.tensor([True, True, False, False])
    for sinks in (None, torch.zeros(1, dtype=dtype)):
        out = odds_equal_bridge(logits[None, None, None], same, bridge, tau_max=0.15, floor=floor, sink_logits=sinks)
        everything = out[0, 0, 0] if sinks is None else torch.cat([out[0, 0, 0], sinks])
        held = 1.0 if sinks is None or floor == "absolute" else (1 - everything.softmax(-1)[-1]).item()
        tolerance = 4 * torch.finfo(dtype).eps * max(gap, 2.0)
        assert everything.softmax(-1)[:2].sum().item() == pytest.approx(0.15 * held, abs=tolerance)


@pytest.mark.parametrize("tau_max", [0.5, 1.0])
def test_a_floor_that_rounds_to_one_keeps_the_segment(tau_max: float) -> None:
    # sqrt(n / (n + 1)) is 1 in float32; the segment's share of about 1 / (2 n) must survive.
    n_bridge = torch.tensor(1e9)
    shift_same, shift_bridge, active = bridge_shifts(
        torch.tensor(0.0), torch.tensor(-5.0), None, torch.tensor(1.0), n_bridge, tau_max=tau_max
    )
    held = 1 + math.exp(-5.0)
    share = max(0.5 / (1e9 + 1), 1 - tau_max)
    assert active
    assert shift_same.item() == pytest.approx(math.log(share * held), rel=1e-6)
    assert shift_bridge.item() == pytest.approx(math.log((1 - share) * held) + 5, rel=1e-6)


@pytest.mark.parametrize("floor", BRIDGE_FLOORS)
def test_a_cap_for_each_head(floor: str) -> None:
    logits = torch.randn(2, 3, 4, 9, dtype=torch.float64)
    logits[..., :4] -= 5
    same, bridge = torch.arange(9) > 5, torch.arange(9) < 4
    caps = [0.0, 0.1, 0.6]
    together = odds_equal_bridge(
        logits, same, bridge, tau_max=torch.tensor(caps, dtype=torch.float64)[:, None], floor=floor
    )
    for head, cap in enumerate(caps):
        alone = odds_equal_bridge(logits[:, head : head + 1], same, bridge, tau_max=cap, floor=floor)
        torch.testing.assert_close(together[:, head : head + 1], alone, rtol=0, atol=1e-14)
    assert torch.equal(together[:, 0], logits[:, 0])


@pytest.mark.parametrize("floor", BRIDGE_FLOORS)
def test_masks_of_every_broadcast(floor: str) -> None:
    logits = torch.randn(2, 3, 4, 9, dtype=torch.float64)
    logits[..., :4] -= 5
    logits[1, :, :, 2] = HIDDEN
    same, bridge = torch.arange(9) > 5, torch.arange(9) < 4
    expected = odds_equal_bridge(logits, same, bridge, tau_max=0.3, floor=floor)
    for shape in ((2, 1, 4, 9), (1, 1, 1, 9), (2, 3, 4, 9)):
        expanded = odds_equal_bridge(logits, same.expand(shape), bridge.expand(shape), tau_max=0.3, floor=floor)
        assert torch.equal(expanded, expected)


@pytest.mark.parametrize("floor", BRIDGE_FLOORS)
def test_shifts_ignore_the_normaliser_and_empty_groups(floor: str) -> None:
    masses = [
        torch.tensor(mass, dtype=torch.float64) for mass in ([0.0, HIDDEN, 0.0, HIDDEN], [-9.0, -9.0, HIDDEN, HIDDEN])
    ]
    total = torch.full((4,), 0.5, dtype=torch.float64)
    counts = [torch.tensor([6, 0, 6, 0]), torch.tensor([4, 4, 0, 0])]
    here = bridge_shifts(*masses, total, *counts, tau_max=0.2, floor=floor)
    there = bridge_shifts(*(mass + 100 for mass in masses), total + 100, *counts, tau_max=0.2, floor=floor)
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert here[2].tolist() == [True, False, False, False]
    assert here[0][1:].tolist() == here[1][1:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("floor", BRIDGE_FLOORS)
def test_gradients_are_finite_where_a_group_is_empty(floor: str) -> None:
    logits = torch.randn(2, 2, 3, 8)
    logits[0, :, :, :4] = HIDDEN
    logits[1, :, 0, :] = HIDDEN
    logits.requires_grad_()
    position = torch.arange(8)
    out = odds_equal_bridge(logits, position > 5, position < 3, tau_max=0.4, floor=floor, sink_logits=torch.zeros(2))
    out[out > HIDDEN].square().sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("floor", BRIDGE_FLOORS)
def test_traces_into_one_graph(floor: str) -> None:
    def bridged(logits: Tensor, cap: Tensor) -> Tensor:
        position = torch.arange(10)
        sinks = torch.zeros(3)
        return odds_equal_bridge(logits, position > 5, position < 4, tau_max=cap, floor=floor, sink_logits=sinks)

    logits, cap = torch.randn(2, 3, 1, 10) * 5, torch.tensor([[0.1], [0.0], [0.5]])
    traced = torch.compile(bridged, backend="eager", fullgraph=True)
    assert torch.equal(traced(logits, cap), bridged(logits, cap))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau_max": 1.5}, r"tau_max must be in \[0, 1\], got 1.5"),
        ({"tau_max": -0.1}, r"tau_max must be in \[0, 1\], got -0.1"),
        ({"tau_max": float("nan")}, r"tau_max must be in \[0, 1\], got nan"),
        ({"floor": "shares"}, "floor must be one of share, absolute, got 'shares'"),
        ({"same": torch.ones(5)}, r"same must be a bool mask, got torch.float32"),
        ({"sink_logits": torch.zeros(3)}, r"each of the 2 heads, got \[3\]"),
    ],
)
def test_errors_show_the_value_and_the_expectation(change: dict[str, Any], message: str) -> None:
    arguments = {"same": torch.arange(5) > 2, "bridge": torch.arange(5) < 2, "tau_max": 0.15, **change}
    with pytest.raises(ValueError, match=message):
        odds_equal_bridge(torch.zeros(1, 2, 1, 5), **arguments)


def test_the_absolute_floor_needs_the_total() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="needs log_total, got None"):
        bridge_shifts(one, one, None, one, one, tau_max=0.15, floor="absolute")


@pytest.fixture(scope="module")
def goldens(shared_dir: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The published cases and their tensors."""
    cases = json.loads((shared_dir / "goldens" / "oeb_smi.json").read_text())["cases"]
    return cases, load_file(shared_dir / "goldens" / "oeb_smi.safetensors")


def test_every_golden_case_has_a_test(goldens: tuple[list[dict[str, Any]], dict[str, Tensor]]) -> None:
    kinds = [case["kind"] for case in goldens[0]]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {"oeb_projection": 29, "oeb_projection_error": 1, "oeb_attention": 4, "smi": 14}


def masses_of(logits: Tensor, *groups: Tensor) -> list[Tensor]:
    """The masses [B, H, 1] of groups [B, 1, 1, K]."""
    return [(logits.softmax(-1) * group).sum(-1) for group in groups]


def test_published_projections(goldens: tuple[list[dict[str, Any]], dict[str, Tensor]]) -> None:
    cases, tensors = goldens
    for case in (case for case in cases if case["kind"] == "oeb_projection"):
        name, wrong = case["id"], case["reference_wrong"]
        logits, exact, published = (tensors[f"{name}/{key}"] for key in ("logits", "exact_logits", "ref_logits"))
        same, bridge = (tensors[f"{name}/{key}"][:, None, None] for key in ("same", "bridge"))
        out = odds_equal_bridge(logits, same, bridge, tau_max=case["tau_max"], floor="absolute")

        error = (out.softmax(-1) - exact.softmax(-1)).abs().max().item()
        assert error < 1e-13, f"{name}: off the exact probabilities by {error}"
        touched = torch.tensor(case["active"]) & torch.tensor(case["feasible"])
        changed = (out != logits).any(-1)[..., 0]
        assert torch.equal(changed, touched), f"{name}: changed heads {changed}, expected {touched}"
        tau = torch.tensor(case["tau_before_feasibility"], dtype=torch.float64)[..., None]
        q_bridge, _ = masses_of(out, bridge, same)
        assert torch.allclose(q_bridge[touched], tau[touched], rtol=0, atol=1e-12), f"{name}: the floor is missed"

        apart = (published.softmax(-1) - exact.softmax(-1)).abs().max().item()
        assert apart == pytest.approx(case["max_prob_diff_ref_vs_exact"], rel=1e-3, abs=1e-15), name
        if wrong is None:
            assert error < 1e-13 < 1e-4, name
            assert apart < 1e-4, f"{name}: the published code is {apart} off"
        elif wrong.startswith("eps inside the log"):
            published_bridge, _ = masses_of(published, bridge, same)
            missed = (tau - published_bridge)[touched].max().item()
            assert missed == pytest.approx(case["bridge_mass_miss"], rel=1e-3), name
            assert missed > 5e-7, f"{name}: the published code is expected to stay below the floor"
        elif wrong.startswith("infeasible"):
            emptied = torch.tensor(case["active"]) & ~torch.tensor(case["feasible"])
            assert emptied.any(), name
            _, published_same = masses_of(published, bridge, same)
            assert published_same[emptied].max() < 3e-6, f"{name}: the published code is expected to empty S"
            shared = odds_equal_bridge(logits, same, bridge, tau_max=case["tau_max"], floor="share")
            share_bridge, share_same = masses_of(shared, bridge, same)
            p_bridge, p_same = masses_of(logits, bridge, same)
            floor = torch.maximum(p_bridge, tau * (p_bridge + p_same))
            assert torch.allclose(share_bridge, floor, rtol=0, atol=1e-12), name
            assert torch.allclose(share_same, p_bridge + p_same - floor, rtol=0, atol=1e-12), name
        else:
            assert wrong.startswith("p_B=0"), f"{name}: no check for {wrong!r}"
            assert torch.equal(out, logits), f"{name}: nothing is visible in B"
            assert not torch.equal(published, logits), f"{name}: the published code is expected to shift S"


def test_published_error_on_several_queries(goldens: tuple[list[dict[str, Any]], dict[str, Tensor]]) -> None:
    (case,) = (case for case in goldens[0] if case["kind"] == "oeb_projection_error")
    assert case["reference_wrong"] == "q_len > 1 raises"
    logits = 3 * torch.randn(case["shape"], dtype=torch.float64)
    _, heads, queries, keys = case["shape"]
    logits += torch.full((queries, keys), HIDDEN, dtype=torch.float64).triu(keys - queries + 1)
    same, bridge = torch.arange(keys) >= keys // 4, torch.arange(keys) < keys // 4
    out = odds_equal_bridge(logits, same, bridge, tau_max=0.15)
    assert out.shape == logits.shape
    for head in range(heads):
        for query in range(queries):
            row = logits[0, head, query].tolist()
            expected, _ = oracle_bridge(row, same.tolist(), bridge.tolist(), 0.15)
            expected = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(out[0, head, query].softmax(-1), expected, rtol=0, atol=1e-13)


def test_published_attention(goldens: tuple[list[dict[str, Any]], dict[str, Tensor]]) -> None:
    cases, tensors = goldens
    for case in (case for case in cases if case["kind"] == "oeb_attention"):
        name, heads = case["id"], case["heads"]
        q, k, v, sinks = (tensors[f"{name}/{key}"] for key in ("q", "k", "v", "sinks"))
        k, v = (states.repeat_interleave(heads // case["kv_heads"], dim=1) for states in (k, v))
        question, thinking, summary = case["labels_len"]
        label = torch.tensor([0] * question + [1] * thinking + [2] * summary)
        current = 2 if case["phase"] == "summary" else 1
        same, bridge = label == current, label == current - 1
        logits = (q @ k.transpose(2, 3)) * case["scaling"]

        def attend(bridged: Tensor, sinks: Tensor = sinks) -> Tensor:
            sink_column = sinks[None, :, None, None].expand(*bridged.shape[:3], 1)
            return torch.cat([bridged, sink_column], dim=-1).softmax(-1)

        def output(weights: Tensor, v: Tensor = v) -> Tensor:
            return (weights[..., :-1] @ v).transpose(1, 2)

        base = attend(logits)
        torch.testing.assert_close(output(base), tensors[f"{name}/base_output"], rtol=0, atol=1e-12, msg=name)
        published = tensors[f"{name}/ref_output"]
        if case["layer_idx"] > case["max_layer"]:
            # A layer above the band is not bridged at all.
            assert case["triggers"] == 0, name
            torch.testing.assert_close(output(base), published, rtol=0, atol=1e-12, msg=name)
            continue

        by_floor = {
            floor: attend(
                odds_equal_bridge(logits, same, bridge, tau_max=case["tau_max"], floor=floor, sink_logits=sinks)
            )
            for floor in BRIDGE_FLOORS
        }
        for floor, weights in by_floor.items():
            torch.testing.assert_close(weights[..., -1], base[..., -1], rtol=0, atol=1e-14, msg=name)
            for head in range(heads):
                row = logits[0, head, 0].tolist()
                settings = (case["tau_max"], floor, sinks[head].item())
                keys, sink = oracle_bridge(row, same.tolist(), bridge.tolist(), *settings)
                expected = torch.tensor([*keys, sink], dtype=torch.float64)
                torch.testing.assert_close(weights[0, head, 0], expected, rtol=0, atol=1e-13, msg=name)
        # Group masses without the sink are what the share floor takes, so that is the published result, up to its eps.
        torch.testing.assert_close(output(by_floor["share"]), published, rtol=0, atol=1e-4, msg=name)
        touched = (by_floor["share"] != base).any(-1)
        assert touched.sum() == case["triggers"], name
        if case["reference_wrong"] is not None:
            # With the sink in O, the paper's floor is one of all mass; the published code stays below it.
            assert "tau_B*(1-p_sink)" in case["reference_wrong"], name
            bridge_mass = by_floor["absolute"][..., :-1][..., bridge].sum(-1)
            held = 1 - base[..., -1]
            lifted = (by_floor["absolute"] != base).any(-1)
            assert lifted.any(), name
            assert torch.allclose(bridge_mass[lifted], torch.tensor(case["tau_max"]).double(), rtol=0, atol=1e-7), name
            recorded = torch.tensor(case["bridge_mass_after_with_sink"]).double().view_as(held)
            expected = (case["tau_max"] * held)[touched]
            assert torch.allclose(recorded[touched], expected, rtol=0, atol=1e-4), name
            assert (recorded[touched] < case["tau_max"] - 0.01).all(), name
        else:
            torch.testing.assert_close(by_floor["absolute"], by_floor["share"], rtol=0, atol=1e-12, msg=name)
