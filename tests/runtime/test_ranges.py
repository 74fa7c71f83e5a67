"""Attention by ranges of keys against the general form, on the same passes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_stepflow.runtime.attention import BridgedCall
from hf_stepflow.runtime.bridge import runs_of
from hf_stepflow.runtime.flow_state import FlowState
from hf_stepflow.runtime.forward import FlowPass
from hf_stepflow.runtime.report import FlowReport, Tally
from hf_stepflow.runtime.settings import FlowPlan, StepFlowSettings
from hf_stepflow.runtime.step_detector import Field, StepVocabulary
from tests.support.flow import TRACES, TWO_ROUNDS, batch, byte_tokenizer, encode

HEADS = {0: 4}


def passed(texts: list[str], asked: StepFlowSettings, queries: int) -> tuple[FlowPass, torch.Tensor]:
    """The pass of the last queries of a left-padded batch, and its padding mask [B, T]."""
    ids, mask = batch(texts)
    state = FlowState(StepVocabulary.from_tokenizer(byte_tokenizer(), asked), len(texts), ids.device)
    state.tally = Tally(len(texts), HEADS, ids.device)
    records, host = state.append(state.read(ids, mask == 0), None, ids.device)
    return FlowPass.of(FlowPlan.resolve(asked, HEADS), state, records, host, state.count).last(queries), mask


def attention_mask(padding: torch.Tensor, queries: int, window: int | None) -> torch.Tensor:
    """Causal, padded and windowed, bool [B, 1, q, K]."""
    slots = torch.arange(padding.shape[1])
    own = slots[-queries:, None]
    seen = slots <= own
    if window is not None:
        seen = seen & (slots > own - window)
    return (seen & (padding > 0)[:, None])[:, None] | (slots == own)


def report_of(flow: FlowPass) -> torch.Tensor:
    """What the tally holds, emptied."""
    flow.state.tally.add_notes()
    sums = flow.state.tally.bridge.clone()
    flow.state.tally.zero_()
    return sums


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.sampled_from((*TRACES, TWO_ROUNDS)), min_size=1, max_size=3),
    cut=st.integers(0, 120),
    queries=st.sampled_from([1, 1, 2, 40, None]),
    window=st.sampled_from([None, None, 30]),
    as_floats=st.booleans(),
    shared=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([1.0, 8.0]),
    asked=st.builds(
        StepFlowSettings,
        tau_max=st.sampled_from([0.15, 0.8, 1.0]),
        oeb_layers=st.just("all"),
        smi_layers=st.just("none"),
        alpha=st.just(0.0),
        bridge_scope=st.sampled_from(["segment", "step"]),
        bridge_floor=st.sampled_from(["share", "absolute"]),
        sink_tokens=st.sampled_from([0, 4]),
        oeb_span=st.sampled_from([None, 3]),
        oeb_heads=st.sampled_from([None, {0: [0, 3]}]),
    ),
)
def test_ranges_equal_the_general_form(texts, cut, queries, window, as_floats, shared, scale, asked) -> None:
    texts = [text[: max(len(text) - cut, 30)] for text in texts]
    total = batch(texts)[0].shape[1]
    queries = min(queries or total, total)
    flow, padding = passed(texts, asked, queries)
    generator = torch.Generator().manual_seed(cut)
    query = torch.randn(len(texts), 4, queries, 16, generator=generator, dtype=torch.float64) * scale
    key, value = torch.randn(2, len(texts), 4 // shared, total, 16, generator=generator, dtype=torch.float64)
    mask = None
    if len(texts) > 1 or window is not None or 1 < queries < total:
        mask = attention_mask(padding, queries, window)
        if as_floats:
            added = torch.full(mask.shape, 0.25, dtype=torch.float64)
            mask = added.masked_fill(~mask, torch.finfo(torch.float64).min)
    if flow.active == (0, 0):
        return
    call = BridgedCall(0, query, key, value, mask, {}, "sdpa", flow, flow.plan.tau[0])
    assert call.has_ranges
    expected, _ = call.rows(0, queries)
    expected_sums = report_of(flow)
    got = call.decode() if queries == 1 else call.merge()
    sums = report_of(flow)
    active = flow.records[..., Field.ACTIVE] > 0
    torch.testing.assert_close(got[active], expected[active], rtol=0, atol=1e-9)
    torch.testing.assert_close(sums[..., [0, 2, 3]], expected_sums[..., [0, 2, 3]], rtol=1e-5, atol=1e-5)
    assert (
        sums[..., 1] - expected_sums[..., 1]
    ).abs().max() <= 1  # a mass right at the floor may round to either side


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("queries", [1, len(encode(TRACES[0]))])
def test_half_precision_keeps_its_digits(dtype: torch.dtype, tolerance: float, queries: int) -> None:
    flow, _ = passed([TRACES[0]], StepFlowSettings(tau_max=0.6, oeb_layers="all"), queries)
    total = flow.state.count
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, queries, 32, generator=generator).to(dtype)
    key, value = torch.randn(2, 1, 2, total, 32, generator=generator).to(dtype)
    call = BridgedCall(0, query, key, value, None, {}, "sdpa", flow, 0.6)
    exact = BridgedCall(0, query.double(), key.double(), value.double(), None, {}, "sdpa", flow, 0.6)
    got = call.decode() if queries == 1 else call.merge()
    assert got.dtype == dtype
    active = flow.records[..., Field.ACTIVE] > 0
    torch.testing.assert_close(got[active].double(), exact.rows(0, queries)[0][active], rtol=0, atol=tolerance)


def test_a_divided_group_has_no_range() -> None:
    """A tool's result inside thinking, and padding inside a trace."""
    asked = StepFlowSettings()
    vocabulary = StepVocabulary.from_tokenizer(byte_tokenizer(), asked)
    ids = encode(TRACES[1])
    for is_divided in (False, True):
        padding = [is_divided and slot == 14 for slot in range(len(ids))]
        runs = runs_of([vocabulary.scan(ids, padding=padding)], 0, asked)
        assert (runs is None) == is_divided
    whole = vocabulary.scan(ids)
    records = vocabulary.scan(ids, padding=[slot == 14 for slot in range(len(ids))])
    report = FlowReport.of([whole, records], None, (), ())
    after = sum(record[Field.ACTIVE] for record in records[14:])
    assert [row.bridged_by_label for row in report.rows] == [0, after]
    assert f"{after} tokens bridged by label" in str(report)
    for record in records:
        record[Field.HAS_ASIDE] = 1
    assert runs_of([records], 0, asked) is None
