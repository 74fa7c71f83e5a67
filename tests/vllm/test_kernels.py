"""The kernels over paged caches against the general form and the detector, by Triton's interpreter where no GPU is.

They need no vLLM. Blocks that belong to nobody hold NaN and records that mean nothing.
"""

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hf_stepflow.runtime import flow_state
from hf_stepflow.runtime.attention import BridgedCall
from hf_stepflow.runtime.forward import FlowPass
from hf_stepflow.runtime.momentum import mean_of_members
from hf_stepflow.runtime.settings import FlowPlan, StepFlowSettings
from hf_stepflow.runtime.step_detector import FIELDS, SUMMARY, Field, StepVocabulary
from tests.support.counting import CountedOperations, counted_reads
from tests.support.flow import TRACES, TWO_ROUNDS, byte_tokenizer, encode

pytest.importorskip("triton")

from hf_stepflow.vllm import device_attention
from hf_stepflow.vllm.counters import Counters
from hf_stepflow.vllm.device_counts import DeviceCounts
from hf_stepflow.vllm.kernels import PAGED_KERNELS
from tests.runtime.test_kernels import compile_for

# Interpreted kernels take parts of a second, so a failing example is shown as it was drawn.
PATIENT: dict[str, Any] = {"suppress_health_check": list(HealthCheck), "phases": [Phase.explicit, Phase.generate]}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WITH_TOOL = "Why?<think>So it is here. Wait, a tool says so|b| Then we go on. And on.</think>Ok it is.\n\nBye now."
TEXTS = (TRACES[1], TRACES[2], TWO_ROUNDS, WITH_TOOL)
# The walk over a token is slow in the interpreter.
SHORT = ("A?<think>So it is. Wait, a|b| So.</think>B.\n\nC", "<think>One. Two.</think>T.<eos>Q<think>N. So: m.\n\nY")
HEADS = {0: 4}

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
    min_step_chars=st.sampled_from([0, 15]),
    tool_start=st.just([" Wait,"]),
    tool_end=st.just(["|b|"]),
)


class Batch:
    """Requests of a pass in a paged cache, and the same as sequences.

    Attributes:
        vocabulary: The step rules.
        ids: Token ids of each request, up to the end of the pass.
        records: All records of each.
        firsts: Position of the first token of each in the pass.
        is_on: Which have StepFlow.
        starts, lengths, on: As the kernels take them.
    """

    def __init__(self, draw: Any, asked: StepFlowSettings, kinds: tuple[str, ...] = TEXTS):
        self.plan = FlowPlan.resolve(asked, HEADS)
        self.vocabulary = StepVocabulary.from_tokenizer(byte_tokenizer(), asked)
        self.order = random.Random(draw(st.integers(0, 99)))
        self.generator = torch.Generator().manual_seed(self.order.randrange(99))
        texts = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))
        self.ids = [encode(text)[: draw(st.integers(50, 160))] for text in texts]
        queries = [min(draw(st.sampled_from([1, 1, 5, 24])), len(ids)) for ids in self.ids]
        self.firsts = [len(ids) - number for ids, number in zip(self.ids, queries, strict=True)]
        self.is_on = [draw(st.sampled_from([True, True, True, False])) for _ in texts]
        self.opening = 5 if asked.implicit_thinking else None
        self.records = [self.vocabulary.scan(ids, prompt_length=self.opening) for ids in self.ids]
        self.starts = torch.tensor([0, *queries]).cumsum(0).int().to(DEVICE)
        self.lengths = torch.tensor([len(ids) for ids in self.ids], dtype=torch.int32, device=DEVICE)
        self.on = torch.tensor(self.is_on, dtype=torch.int32, device=DEVICE)

    def paged(self, rows: list[torch.Tensor], tokens: int, fill: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Tensors [Hkv, length, C] of the requests in a cache [blocks, Hkv, tokens, C], and its block table."""
        numbers = [-(-row.shape[1] // tokens) for row in rows]
        blocks = list(range(sum(numbers) + 3))
        self.order.shuffle(blocks)
        heads, _, width = rows[0].shape
        shape = (len(blocks), heads, tokens, width)
        if self.order.random() < 0.5:  # heads inside tokens, and room between blocks
            whole = rows[0].new_full((len(blocks), tokens + 1, heads, width), fill)
            cache = whole[:, :tokens].transpose(1, 2)
        else:
            cache = rows[0].new_full(shape, fill)
        table = torch.full((len(rows), max(numbers) + 1), blocks.pop(), dtype=torch.int32)
        for place, row in enumerate(rows):
            for block, part in enumerate(row.split(tokens, 1)):
                table[place, block] = number = blocks.pop()
                cache[number, :, : part.shape[1]] = part
        assert cache.shape == shape
        return cache.to(DEVICE), table.to(DEVICE)

    def record_cache(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The records at their slots; those of requests without StepFlow mean nothing."""
        rows = [
            torch.tensor(records, dtype=torch.int32)[None] * (1 if is_on else 977)
            for records, is_on in zip(self.records, self.is_on, strict=True)
        ]
        return self.paged(rows, tokens, 123456)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def flow(self, row: int) -> FlowPass:
        made = self.records[row][self.firsts[row] :]
        state: Any = SimpleNamespace(
            records=torch.tensor([self.records[row]], dtype=torch.int32), tally=None, is_static=False
        )
        records = torch.tensor([made], dtype=torch.int32)
        return FlowPass.of(self.plan, state, records, [made], len(self.ids[row]))

    def mask(self, row: int, window: int) -> torch.Tensor:
        """Which keys the queries of a request see, bool [1, 1, c, K]."""
        own = torch.arange(self.firsts[row], len(self.ids[row]))[:, None]
        keys = torch.arange(len(self.ids[row]))
        visible = keys <= own
        return (visible & (keys > own - window) if window >= 0 else visible)[None, None]


def check_labels(batch: Batch, tokens: int) -> None:
    rows = [torch.full((1, len(ids), FIELDS), 123456, dtype=torch.int32) for ids in batch.ids]
    cache, table = batch.paged(rows, tokens, 123456)
    counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    whole = cache.clone()
    done = [0] * len(rows)
    while any(at < len(ids) for at, ids in zip(done, batch.ids, strict=True)):
        now = [min(at + batch.order.choice([0, 1, 7, 40]), len(ids)) for at, ids in zip(done, batch.ids, strict=True)]
        parts = [ids[start:end] for ids, start, end in zip(batch.ids, done, now, strict=True)]
        if sum(map(len, parts)):
            packed = torch.tensor([token for part in parts for token in part], dtype=torch.int32, device=DEVICE)
            starts = torch.tensor([0, *map(len, parts)]).cumsum(0).int().to(DEVICE)
            lengths = torch.tensor(now, dtype=torch.int32, device=DEVICE)
            openings = None if batch.opening is None else torch.full_like(lengths, batch.opening)

            def by_pages(records: Any, ids: Any, *rest: Any, where: Any = (starts, lengths, table, batch.on)) -> None:
                PAGED_KERNELS.label(records, ids, *where, rest[3], counts, *rest[5:])

            batch.vocabulary.label(by_pages, cache, packed, 0, None, openings)
        done = now
    for row, (records, is_on) in enumerate(zip(batch.records, batch.is_on, strict=True)):
        positions = torch.arange(len(records), device=DEVICE)
        at = table[row, positions // tokens].long(), 0, positions % tokens
        if is_on:
            assert cache[at].tolist() == records
        cache[at] = 123456
    assert torch.equal(cache, whole)  # nothing else was written
    on = [record for records, is_on in zip(batch.records, batch.is_on, strict=True) if is_on for record in records]
    assert counts.tolist() == [sum(record[column] for record in on) for column in (Field.ACTIVE, Field.TRIGGER)] + [0]


@settings(max_examples=5, **PATIENT)
@given(
    data=st.data(),
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
    tokens=st.sampled_from([16, 32]),
)
def test_labels_are_those_of_the_detector(data: st.DataObject, asked: StepFlowSettings, tokens: int) -> None:
    check_labels(Batch(data.draw, asked, SHORT), tokens)


def test_a_lost_record_is_noticed() -> None:
    vocabulary = StepVocabulary.from_tokenizer(byte_tokenizer(), StepFlowSettings())
    cache = torch.zeros(4, 1, 16, FIELDS, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    where = [torch.tensor(one, dtype=torch.int32, device=DEVICE) for one in ([0, 1], [21], [[2, 1]], [1])]
    ids = torch.tensor([9], device=DEVICE)
    vocabulary.label(
        lambda records, ids, *rest: PAGED_KERNELS.label(records, ids, *where, rest[3], counts, *rest[5:]),
        cache, ids, 0, None, None,
    )  # fmt: skip
    assert counts.tolist()[2] == 20


def check_layer(draw: Any, asked: StepFlowSettings) -> None:
    """Attention and injection of a layer against the pure forms in float64, on keys that are gathered."""
    batch = Batch(draw, asked)
    tokens, record_tokens = draw(st.sampled_from([16, 32])), draw(st.sampled_from([16, 32]))
    shared, width, window = (draw(st.sampled_from(some)) for some in ([1, 2, 4], [8, 24], [-1, -1, 30]))
    softcap, splits = draw(st.sampled_from([None, 6.0])), draw(st.sampled_from([1, 1, 4]))
    sinks = batch.random(4) if draw(st.booleans()) else None
    total, scale = int(batch.starts[-1]), draw(st.sampled_from([1.0, 8.0]))
    rows = [batch.random(4 // shared, len(ids), 2 * width) for ids in batch.ids]
    nothing = [
        row if is_on else torch.full_like(row, float("nan")) for row, is_on in zip(rows, batch.is_on, strict=True)
    ]
    cache, table = batch.paged(nothing, tokens, float("nan"))
    records, record_table = batch.record_cache(record_tokens)
    padding = draw(st.sampled_from([0, 3]))  # tokens past the last, as vLLM pads a pass
    query = batch.random(total + padding, 4, width) * scale
    before = batch.random(total + padding, 4, width + 1)[..., :width]
    tau = batch.plan.tau[0]
    output = before.clone().to(DEVICE)
    where = records, record_table, batch.starts, batch.lengths, batch.on
    with counted_reads() as reads, CountedOperations() as operations:
        PAGED_KERNELS.attend(
            output, query.to(DEVICE), cache, table, *where, [tau] if isinstance(tau, float) else list(tau),
            None if sinks is None else sinks.to(DEVICE), max(map(len, batch.ids)), width**-0.5, softcap, window,
            asked.bridge_floor == "absolute", asked.bridge_scope == "step", asked.sink_tokens, splits,
        )  # fmt: skip
    assert reads.total() == 0
    assert operations.counts["hf_stepflow::paged_attention"] == 1
    expected = before.double()
    for row, is_on in enumerate(batch.is_on):
        start, end = batch.starts[row : row + 2].tolist()
        flow = batch.flow(row)
        if not is_on or flow.active == (0, 0):
            continue
        part = query[start:end].double().transpose(0, 1)[None]
        key, value = rows[row].double()[None].split(width, -1)
        kwargs = {"s_aux": None if sinks is None else sinks.double(), "softcap": softcap}
        call = BridgedCall(0, part, key, value, batch.mask(row, window), kwargs, "capped", flow, tau)
        active = flow.records[0, :, Field.ACTIVE] > 0
        expected[start:end][active] = call.rows(0, end - start)[0][0][active]
    torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=2e-5)
    assert torch.equal(output.cpu()[expected == before], before[expected == before])

    last = -1 if asked.smi_window is None else asked.smi_window
    output = before.clone().to(DEVICE)
    with counted_reads() as reads:
        PAGED_KERNELS.inject(output, cache, table, *where, asked.alpha, window, last)
    assert reads.total() == 0
    torch.testing.assert_close(output.cpu().double(), injected(batch, rows, before, window), rtol=0, atol=1e-5)


def injected(batch: Batch, rows: list[torch.Tensor], before: torch.Tensor, window: int) -> torch.Tensor:
    """The injection in float64, token by token."""
    expected, width = before.double(), before.shape[2]
    limit = batch.plan.settings.smi_window
    for row, is_on in enumerate(batch.is_on):
        labels, steps = torch.tensor(batch.records[row])[:, [Field.LABEL, Field.STEP]].T
        seen = batch.mask(row, window)[0, 0]
        for place, record in enumerate(batch.records[row][batch.firsts[row] :] if is_on else []):
            if record[Field.TRIGGER]:
                label = record[Field.LABEL] - int(record[Field.LABEL] % 3 == SUMMARY)
                members = ((labels == label) & (steps == record[Field.STEP] - 1)).nonzero().flatten()
                members = members if limit is None else members[-limit:]
                chosen = torch.zeros(len(labels), dtype=torch.bool)
                chosen[members] = True
                mean = mean_of_members((chosen & seen[place])[None], rows[row].double()[..., width:])[:, 0]
                heads = mean.repeat_interleave(4 // len(mean), 0)
                expected[batch.starts[row] + place] += batch.plan.settings.alpha * heads
    return expected


@settings(max_examples=12, **PATIENT)
@given(data=st.data(), asked=STEPFLOW)
def test_a_layer_is_that_of_the_pure_forms(data: st.DataObject, asked: StepFlowSettings) -> None:
    check_layer(data.draw, asked)


@pytest.mark.slow
@settings(max_examples=300, **PATIENT)
@given(data=st.data(), asked=STEPFLOW)
def test_any_pass(data: st.DataObject, asked: StepFlowSettings) -> None:
    check_layer(data.draw, asked)


def test_the_length_temperature_counts_visible_keys() -> None:
    asked = StepFlowSettings(tau_max=0.0, alpha=0.0, length_temperature=0.7, length_temperature_base=8)
    starts, lengths, on = (
        torch.tensor(one, dtype=torch.int32, device=DEVICE) for one in ([0, 3, 4, 6], [40, 20, 7], [1, 0, 1])
    )
    query = torch.randn(8, 2, 4, device=DEVICE)  # two tokens more than there are
    nothing = torch.zeros(0, device=DEVICE)
    flow = device_attention.DevicePass(
        FlowPlan.resolve(asked, {0: 2}), None, nothing, nothing, starts, lengths, 40, on
    )
    for window, numbers in ((None, [38, 39, 40, 1, 6, 7]), (30, [30, 30, 30, 1, 6, 7])):
        with counted_reads() as reads:
            scaled = device_attention.scaled_query(flow, query, (0.7, 0.0), window)
        assert reads.total() == 0
        factor = torch.tensor([max(1.0, math.log(number) / math.log(8)) ** 0.7 for number in numbers], device=DEVICE)
        torch.testing.assert_close(scaled[:6, 0], query[:6, 0] * factor[:, None])
        assert torch.equal(scaled[:, 1], query[:, 1])
        assert scaled.isfinite().all()


def test_counts_arrive_behind_the_passes() -> None:
    path = Counters.create(ranks=1)
    counts = DeviceCounts(DEVICE, Counters(path, 1))
    for bridged, injected in ((7, 1), (0, 0), (5, 2)):
        counts.sums += torch.tensor([bridged, injected, 0], device=DEVICE)
        counts.send()
    counts.wait()
    assert Counters(path).read() == {"requests": 0, "bridged_tokens": 12, "injections": 3}
    assert counts.lost == 0
    counts.sums[2] = 20
    counts.send()
    counts.wait()
    assert counts.lost == 20


def layer_of(backend: str, dtype: torch.dtype, width: int) -> Any:
    kind = SimpleNamespace(get_name=lambda: backend)
    return SimpleNamespace(
        get_attn_backend=lambda: kind, kv_cache=torch.zeros(1, 1, 16, 2 * width, dtype=dtype), head_size=width
    )


def test_kernels_take_plain_caches_of_the_queries_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_STEPFLOW_ROUTE", "device")
    monkeypatch.setattr(flow_state, "_KERNELS", {})
    half = torch.float16
    for backend, dtype, width, expected in (
        ("FLASH_ATTN", half, 8, PAGED_KERNELS),
        ("TRITON_ATTN", half, 256, PAGED_KERNELS),
        ("FLASHINFER", half, 8, None),
        ("FLASH_ATTN", torch.bfloat16, 8, None),
        ("FLASH_ATTN", half, 288, None),
    ):
        layers = [layer_of("FLASH_ATTN", half, 8), layer_of(backend, dtype, width)]
        assert device_attention.kernels_for(layers, half, DEVICE) is expected
    monkeypatch.setattr(flow_state, "_KERNELS", {DEVICE.type: None})
    assert device_attention.kernels_for([layer_of("FLASH_ATTN", torch.float16, 8)], torch.float16, DEVICE) is None


def test_kernels_compile_for_a_gpu() -> None:
    compile_for(90, "paged_inject")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_all_kernels_compile_for_a_gpu(capability: int) -> None:
    compile_for(capability, "paged_attention", "paged_attention_split", "paged_merge", "paged_inject", "paged_label")
