"""The kernels of an accelerator against the general form and the detector, by Triton's interpreter where none is."""

import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from hf_stepflow.runtime import flow_state
from hf_stepflow.runtime.attention import BridgedCall
from hf_stepflow.runtime.flow_state import kernels_on
from hf_stepflow.runtime.momentum import inject, inject_by_kernel
from hf_stepflow.runtime.settings import StepFlowSettings
from hf_stepflow.runtime.step_detector import FIELDS, Field, StepVocabulary
from tests.runtime.test_ranges import attention_mask, passed, report_of
from tests.support.counting import CountedOperations, counted_reads
from tests.support.flow import TRACES, TWO_ROUNDS, attached, batch, byte_tokenizer, encode

pytest.importorskip("triton")

# Interpreted kernels take parts of a second, so a failing example is shown as it was drawn.
PATIENT = {"suppress_health_check": list(HealthCheck), "phases": [Phase.explicit, Phase.generate]}

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def device_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_STEPFLOW_ROUTE", "device")
    monkeypatch.setattr(flow_state, "_KERNELS", {})
    assert kernels_on(DEVICE) is not None


STEPFLOW = st.builds(
    StepFlowSettings,
    tau_max=st.sampled_from([0.15, 0.8, 1.0]),
    alpha=st.sampled_from([0.06, 0.5]),
    oeb_layers=st.just("all"),
    smi_layers=st.just("all"),
    bridge_scope=st.sampled_from(["segment", "step"]),
    bridge_floor=st.sampled_from(["share", "absolute"]),
    sink_tokens=st.sampled_from([0, 4]),
    oeb_span=st.sampled_from([None, 3]),
    oeb_heads=st.sampled_from([None, {0: [0, 3]}]),
    smi_window=st.sampled_from([None, 1, 5]),
)


def poisoned(tensor: torch.Tensor, extra: int) -> torch.Tensor:
    """A cache with slots that are not filled yet, which hold what may be there: anything."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, extra), value=float("nan"))


class Drawn:
    """A pass, and the arguments of a layer's attention in it: float64, and in the dtype of the kernel."""

    def __init__(self, data: st.DataObject, asked: StepFlowSettings):
        draw = data.draw
        texts = draw(st.lists(st.sampled_from((*TRACES, TWO_ROUNDS)), min_size=1, max_size=3))
        cut = draw(st.integers(0, 120))
        texts = [text[: max(len(text) - cut, 30)] for text in texts]
        total = batch(texts)[0].shape[1]
        self.queries = draw(st.sampled_from([1, 1, 3, 70, total]))
        self.queries = min(self.queries, total)
        self.flow, padding = passed(texts, asked, self.queries)
        if draw(st.booleans()):  # as after a tool's result: groups are found by label
            self.flow.state.records[..., Field.HAS_ASIDE] = 1
            self.flow.records[..., Field.HAS_ASIDE] = 1
        self.total, self.extra = total, draw(st.sampled_from([0, 9]))
        shared, width = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([8, 24, 32]))
        scale, generator = draw(st.sampled_from([1.0, 8.0])), torch.Generator().manual_seed(cut)
        made = (
            torch.randn(len(texts), heads, length, width, generator=generator)
            for heads, length in ((4, self.queries), (4 // shared, total), (4 // shared, total))
        )
        self.query, self.key, self.value = made
        self.query *= scale
        self.mask = None
        if len(texts) > 1 or draw(st.booleans()):
            self.mask = attention_mask(padding, self.queries, draw(st.sampled_from([None, 30])))
            if draw(st.booleans()):
                self.mask = torch.full(self.mask.shape, 0.25).masked_fill(~self.mask, torch.finfo(torch.float32).min)
        self.sinks = torch.randn(4, generator=generator) if draw(st.booleans()) else None
        self.softcap = draw(st.sampled_from([None, 6.0]))
        self.splits = draw(st.sampled_from([1, 3]))
        self.length = torch.tensor(total) if draw(st.booleans()) else None
        self.active = self.flow.records[..., Field.ACTIVE] > 0

    def general(self) -> torch.Tensor:
        """The general form in float64."""
        mask = self.mask if self.mask is None or self.mask.dtype == torch.bool else self.mask.double()
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.masked_fill(mask < -1e30, torch.finfo(torch.float64).min)
        query, key, value = self.query.double(), self.key.double(), self.value.double()
        kwargs = {"s_aux": None if self.sinks is None else self.sinks.double(), "softcap": self.softcap}
        call = BridgedCall(0, query, key, value, mask, kwargs, "flex_attention", self.flow, self.flow.plan.tau[0])
        return call.rows(0, self.queries)[0]

    def kernel(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernel's answer and its sums."""
        heads = self.flow.plan.tau[0]
        plan, sums = self.flow.plan.settings, torch.zeros(len(self.query), 4, 4, device=DEVICE)
        mask = self.mask
        if mask is not None and self.extra:
            mask = torch.nn.functional.pad(mask, (0, self.extra), value=0)
        parts = (self.query, poisoned(self.key, self.extra), poisoned(self.value, self.extra))
        output = kernels_on(DEVICE).ranged_attention(
            *(part.to(DEVICE, dtype) for part in parts),
            None if mask is None else mask.to(DEVICE),
            self.flow.records.to(DEVICE),
            self.flow.state.records.to(DEVICE),
            [heads] if isinstance(heads, float) else heads,
            None if self.sinks is None else self.sinks.to(DEVICE),
            sums,
            None if self.length is None else self.length.to(DEVICE),
            0 if self.length is not None else self.total,
            self.query.shape[3] ** -0.5,
            self.softcap,
            plan.bridge_floor == "absolute",
            plan.bridge_scope == "step",
            plan.sink_tokens,
            self.splits,
        )
        return output.cpu(), sums.cpu()


def check_attention(data: st.DataObject, asked: StepFlowSettings) -> None:
    drawn = Drawn(data, asked)
    expected = drawn.general()
    expected_sums = report_of(drawn.flow)[:, 0]
    output, sums = drawn.kernel(torch.float32)
    torch.testing.assert_close(output[drawn.active].double(), expected[drawn.active], rtol=0, atol=2e-5)
    torch.testing.assert_close(sums[..., [0, 2, 3]], expected_sums[..., [0, 2, 3]], rtol=1e-4, atol=1e-4)
    assert (
        sums[..., 1] - expected_sums[..., 1]
    ).abs().max() <= 1  # a mass right at the floor may round to either side
    half, _ = drawn.kernel(torch.bfloat16)
    scale = drawn.query.abs().max() * drawn.key.abs().max()
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()
    assert (half.double() - expected)[drawn.active].abs().mean() < 0.02 * scale if drawn.active.any() else True


def check_injection(data: st.DataObject, asked: StepFlowSettings) -> None:
    drawn = Drawn(data, asked)
    flow, mask = drawn.flow, drawn.mask
    before = torch.randn(len(drawn.query), drawn.queries, 4, drawn.value.shape[3])
    visible = None
    if mask is not None:
        shown = mask if mask.dtype == torch.bool else mask > -1e30
        visible = lambda start, end: shown[:, :, start:end]  # noqa: E731
    expected = inject(flow, 0, before, drawn.value, visible) if flow.has_trigger else before
    expected_sums = flow.state.tally.injections.clone()
    flow.state.tally.zero_()
    output = inject_by_kernel(kernels_on(DEVICE), flow, 0, before.clone(), poisoned(drawn.value, 0), mask)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(flow.state.tally.injections, expected_sums, rtol=1e-4, atol=1e-5)


@settings(max_examples=15, **PATIENT)
@given(data=st.data(), asked=STEPFLOW)
def test_attention_is_that_of_the_general_form(data: st.DataObject, asked: StepFlowSettings) -> None:
    check_attention(data, asked)


@settings(max_examples=10, **PATIENT)
@given(data=st.data(), asked=STEPFLOW)
def test_injection_is_that_of_the_reference(data: st.DataObject, asked: StepFlowSettings) -> None:
    check_injection(data, asked)


@pytest.mark.slow
@settings(max_examples=300, **PATIENT)
@given(data=st.data(), asked=STEPFLOW)
def test_any_pass(data: st.DataObject, asked: StepFlowSettings) -> None:
    check_attention(data, asked)
    check_injection(data, asked)


PIECES = (
    *("<think>", "</think>", "<eos>", "Then it is seven.", " Wait, ", "\n\n", "- a\n- b\n", "so", " 12.5", "|a|b|\n"),
    *("e.g. this", "So: ", "\u3002", "\uff1f\u4e00", "\u00e9t\u00e9", "  ", "</thi", "<th"),
)


@settings(max_examples=12, **PATIENT)
@given(
    pieces=st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=12), min_size=1, max_size=2),
    asked=st.builds(
        StepFlowSettings,
        step_rule=st.sampled_from(["sentence", "paragraph", "cue"]),
        min_step_chars=st.sampled_from([0, 15]),
        oeb_span=st.sampled_from([None, 2]),
        implicit_thinking=st.booleans(),
        summary_start=st.just("So:"),
        tool_start=st.just([" Wait,"]),
        tool_end=st.just(["|b|"]),
    ),
    static=st.booleans(),
    seed=st.integers(0, 99),
)
def test_labels_are_those_of_the_detector(pieces, asked, static, seed) -> None:
    vocabulary = StepVocabulary.from_tokenizer(byte_tokenizer(), asked)
    ids, mask = batch(["".join(row) for row in pieces])
    ids, mask = ids[:, :60], mask[:, :60]
    ids[0, -1] = 9999  # an id that the tokenizer does not know
    opening = 5 if asked.implicit_thinking else None
    total = ids.shape[1]
    expected = [
        vocabulary.scan(row, padding=[one == 0 for one in hidden], prompt_length=opening)
        for row, hidden in zip(ids.tolist(), mask.tolist(), strict=True)
    ]
    records = torch.zeros(len(ids), total, FIELDS, dtype=torch.int32, device=DEVICE)
    order, start = random.Random(seed), 0
    while start < total:
        end = min(start + order.choice([1, 3, 40]), total)
        slot = torch.tensor(start, device=DEVICE) if static else start
        made = vocabulary.label(
            kernels_on(DEVICE).label,
            records,
            ids[:, start:end].to(DEVICE),
            slot,
            (mask[:, start:end] == 0).to(DEVICE),
            opening,
        )
        assert torch.equal(made, records[:, start:end])
        start = end
    assert records.tolist() == expected


@pytest.mark.parametrize("kind", ["dynamic", "padded", "static", "reordered"])
@torch.no_grad()
def test_a_model_takes_the_device_route_without_asking(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits and report as on the host; no read of the device; few operations."""
    model = attached("llama", "step", "sdpa")
    ids, mask = batch(["Two eggs?<think>Add one. Then two is it. N", "Why?<think>So it is. No, it is not. N"])
    padding = {"attention_mask": mask} if kind == "padded" else {}
    steps = [ids[:, -1:], torch.full((2, 1), encode("o")[0]), torch.full((2, 1), encode("w")[0])]
    results = []
    for route in ("host", "device"):
        monkeypatch.setattr(flow_state, "_KERNELS", {"cpu": None} if route == "host" else {})
        cache = StaticCache(config=model.config, max_cache_len=64) if kind == "static" else DynamicCache()
        model(ids[:, :-1], past_key_values=cache, **({"attention_mask": mask[:, :-1]} if padding else {}))
        if kind == "reordered":
            cache.reorder_cache(torch.tensor([1, 1]))
        logits, reads = [], []
        for index, token in enumerate(steps):
            if padding:
                padding["attention_mask"] = torch.nn.functional.pad(mask, (0, index), value=1)
            with counted_reads() as counts, CountedOperations() as operations:
                logits.append(model(token, past_key_values=cache, **padding).logits)
            reads.append(counts.total())
        with model.disable_stepflow(), counted_reads() as counts, CountedOperations() as plain:
            if padding:
                padding["attention_mask"] = torch.nn.functional.pad(mask, (0, len(steps)), value=1)
            model(steps[-1], past_key_values=cache, **padding)
        results.append((torch.stack(logits), str(model.stepflow_report()), reads[-1] - counts.total()))
    assert results[1][2] == 0
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-5)
    assert results[1][1].splitlines()[0] == results[0][1].splitlines()[0]
    assert operations.counts["hf_stepflow::ranged_attention"] == len(model.stepflow_runtime.rules.plan.tau)
    assert operations.counts["hf_stepflow::label"] == 1
    assert operations.counts.total() - plain.counts.total() <= 8


@torch.no_grad()
def test_a_static_cache_catches_up_after_tokens_without_stepflow() -> None:
    model = attached("llama", "paper", "sdpa")
    ids = torch.tensor([encode("Two eggs?<think>Add one. Then two is it. N")])
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids, past_key_values=cache)
    with model.disable_stepflow():
        model(ids[:, -1:], past_key_values=cache)
    model(ids[:, -1:], past_key_values=cache)
    assert int(cache.stepflow_state.records[0, ids.shape[1] + 1, Field.COUNT]) == ids.shape[1] + 2


@torch.no_grad()
def test_kernels_compile_into_one_graph() -> None:
    model = attached("llama", "paper", "sdpa")
    ids = torch.tensor([encode("Two eggs?<think>Add one. Then two is it. N")])
    results = []
    for compiled in (False, True):
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(ids, past_key_values=cache)
        step = torch.compile(model.forward, fullgraph=True, backend="eager") if compiled else model.forward
        tokens = [torch.tensor([[token]]) for token in encode("ow. And")]
        results.append(torch.cat([step(token, past_key_values=cache).logits for token in tokens]))
    torch.testing.assert_close(*results)


def compile_for(capability: int, *names: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tests.support.compile_kernels", str(capability), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(names)


def test_kernels_compile_for_a_gpu() -> None:
    compile_for(90, "merge", "inject", "label")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_all_kernels_compile_for_a_gpu(capability: int) -> None:
    compile_for(capability, "attention", "attention_split", "merge", "inject", "label")
