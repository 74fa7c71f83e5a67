"""The indices against loops over tokens written from their definition, and the file of a StepSaliency."""

import json
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError
from hf_stepflow.runtime.trace import Trace
from hf_stepflow.saliency.maps import INDICES, pair_counts, saliency_indices
from hf_stepflow.saliency.result import StepSaliency
from tests.support.synthetic_saliency import (
    ABOUT,
    CONTROL,
    QUESTION,
    SUMMARY,
    THINKING,
    random_saliency,
    simple_trace,
    trace_of,
)

SHARES = ("current_step", "previous_step", "earlier_steps", "question")


def naive_indices(tokens: np.ndarray, trace: Trace, pooling: str) -> dict[str, float]:
    """The indices of one layer from token-level saliency [T, T], pair by pair."""
    steps = trace.steps
    members = [[slot for slot in range(one.start, one.end) if trace.step_ids[slot] >= 0] for one in steps]

    def total(i: int, j: int) -> float:
        return math.fsum(tokens[t, k] for t in members[i] for k in members[j] if k <= t)

    def pairs(i: int, j: int) -> int:
        return sum(1 for t in members[i] for k in members[j] if pooling == "block" or k <= t)

    def places(label: str, number: int | None = None) -> list[int]:
        return [i for i, one in enumerate(steps) if one.label == label and number in (None, one.round)]

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else math.nan

    shares: dict[str, list[float]] = {name: [] for name in ("lock_in", *SHARES)}
    for i in places("thinking"):
        thinking = [j for j in places("thinking", steps[i].round) if j < i]
        parts = {
            "current_step": [i],
            "previous_step": thinking[-1:],
            "earlier_steps": thinking[:-1],
            "question": [j for j in range(i) if j not in thinking],
        }
        row = math.fsum(total(i, j) for j in range(i + 1))
        if row > 0:
            for name, group in parts.items():
                shares[name].append(math.fsum(total(i, j) for j in group) / row)
            shares["lock_in"].append(
                1 - math.fsum(total(i, j) for name in ("question", "earlier_steps") for j in parts[name]) / row
            )
    found = {name: mean(values) for name, values in shares.items()}

    decay = []
    for i in places("summary"):
        row = math.fsum(total(i, j) for j in range(i + 1))
        thinking = places("thinking", steps[i].round)
        if row > 0 and thinking:
            decay.append(math.fsum(total(i, j) for j in thinking) / row)
    found["decay_share"] = mean(decay)

    slopes = []
    for number in sorted({steps[i].round for i in places("summary")}):
        rows, thinking = places("summary", number), places("thinking", number)
        points = []
        for age, j in enumerate(reversed(thinking)):
            value = math.fsum(total(i, j) for i in rows) / sum(pairs(i, j) for i in rows)
            if value > 0:
                points.append((age, math.log(value)))
        if len(points) >= 2:
            slopes.append(float(np.polyfit(*zip(*points, strict=True), 1)[0]))
    found["decay_slope"] = mean(slopes)

    blocks = {}
    for label in ("summary", "thinking"):
        inside = [(i, j) for i in places(label) for j in places(label) if steps[i].round == steps[j].round]
        count = sum(pairs(i, j) for i, j in inside)
        blocks[label] = math.fsum(total(i, j) for i, j in inside) / count if count else math.nan
    found["block_ratio"] = blocks["summary"] / blocks["thinking"] if blocks["thinking"] > 0 else math.nan
    return found


def step_sums(tokens: np.ndarray, trace: Trace) -> torch.Tensor:
    """Sums [S, S] of token-level saliency [T, T]."""
    inside = (trace.step_ids >= 0).numpy()
    member = np.array(
        [[inside[slot] and one.start <= slot < one.end for slot in range(len(trace))] for one in trace.steps]
    )
    return torch.from_numpy(member @ np.tril(tokens) @ member.T)


def indices_of(tokens: np.ndarray, trace: Trace, pooling: str = "causal") -> dict[str, torch.Tensor]:
    """Of token-level saliency [L, T, T]."""
    sums = torch.stack([step_sums(layer, trace) for layer in tokens])
    return saliency_indices(sums, pair_counts(trace, pooling), trace)


def assert_naive(tokens: np.ndarray, trace: Trace, pooling: str = "causal") -> dict[str, torch.Tensor]:
    found = indices_of(tokens, trace, pooling)
    assert set(found) == set(INDICES)
    for layer, each in enumerate(tokens):
        for name, value in naive_indices(each, trace, pooling).items():
            assert found[name][layer].item() == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name
    return found


LENGTHS = st.lists(st.integers(1, 3), max_size=4)
ROUNDS = st.lists(st.tuples(LENGTHS, LENGTHS, st.booleans(), st.booleans()), min_size=1, max_size=3)


def drawn_trace(rounds: list[tuple[list[int], list[int], bool, bool]]) -> Trace:
    """Rounds of thinking and summary steps, with control tokens and a tool's result inside the thinking if drawn."""
    made = []
    for thinking, summary, with_control, with_tool in rounds:
        pieces = [(QUESTION, 2)] + [(CONTROL, 1)] * with_control + [(THINKING, n) for n in thinking]
        if with_tool and len(thinking) > 1:
            pieces.insert(len(pieces) - 1, (QUESTION, 2))
        made.append(pieces + [(CONTROL, 1)] * with_control + [(SUMMARY, n) for n in summary])
    return trace_of(*made)


@settings(max_examples=60, deadline=None)
@given(ROUNDS, st.sampled_from(["causal", "block"]), st.integers(1, 12), st.integers(0, 2**16))
def test_indices_equal_loops(rounds: list, pooling: str, window: int, seed: int) -> None:
    trace = drawn_trace(rounds)
    generator = np.random.default_rng(seed)
    full = np.tril(np.exp(generator.normal(0, 2, (len(trace), len(trace)))))
    found = assert_naive(np.stack([full, np.triu(full, 1 - window), np.zeros_like(full)]), trace, pooling)
    shares = sum(found[name] for name in SHARES)
    assert all(one.isnan() or one.item() == pytest.approx(1) for one in shares)
    assert torch.allclose(found["lock_in"], found["current_step"] + found["previous_step"], equal_nan=True)


def test_by_hand() -> None:
    trace = trace_of([(QUESTION, 1), (THINKING, 1), (THINKING, 1), (THINKING, 1), (SUMMARY, 1)])
    rows = [[1, 0, 0, 0, 0], [1, 3, 0, 0, 0], [1, 1, 2, 0, 0], [2, 3, 1, 4, 0], [0, 1, 2, 4, 3]]
    found = assert_naive(np.array([rows], float), trace)
    expected = {
        "current_step": (3 / 4 + 2 / 4 + 4 / 10) / 3,
        "previous_step": (0 + 1 / 4 + 1 / 10) / 3,
        "earlier_steps": (0 + 0 + 3 / 10) / 3,
        "question": (1 / 4 + 1 / 4 + 2 / 10) / 3,
        "lock_in": (3 / 4 + 3 / 4 + 5 / 10) / 3,
        "decay_share": 7 / 10,
        "decay_slope": -math.log(2),
        "block_ratio": 3 / (14 / 6),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)


def test_rounds_are_kept_apart() -> None:
    trace = trace_of([(QUESTION, 1), (THINKING, 1), (SUMMARY, 1)], [(QUESTION, 1), (THINKING, 1), (SUMMARY, 1)])
    tokens = np.tril(np.ones((6, 6)))
    # What the second round draws on the first is question to it, however much it is.
    tokens[4, :4], tokens[5, :4] = 5.0, 10.0
    found = assert_naive(tokens[None], trace)
    assert found["block_ratio"].item() == 1.0
    assert found["previous_step"].item() == 0.0
    assert found["question"].item() == pytest.approx((1 / 2 + 20 / 21) / 2)


def test_a_sliding_window_cuts_the_question_off() -> None:
    trace = simple_trace(6, 2)
    full = np.tril(np.ones((len(trace), len(trace))))
    found = assert_naive(np.triu(full, -3)[None], trace)
    assert found["earlier_steps"].item() == 0.0
    assert 0 < found["question"].item() < 1 / 6  # only the first step sees it
    assert found["lock_in"].item() > 5 / 6


def test_rows_without_saliency_count_in_no_share() -> None:
    trace = simple_trace(3, 1)
    tokens = np.tril(np.ones((len(trace), len(trace))))
    tokens[4:8] = 0.0  # the first thinking step
    found = assert_naive(tokens[None], trace)
    assert sum(found[name] for name in SHARES).item() == pytest.approx(1)


def test_no_number_where_a_trace_has_no_such_steps() -> None:
    question_only = indices_of(np.ones((1, 3, 3)), trace_of([(QUESTION, 3)]))
    assert all(value.isnan().all() for value in question_only.values())
    no_summary = indices_of(np.ones((1, 8, 8)), simple_trace(1, 0))
    assert {name for name, value in no_summary.items() if value.isnan().all()} == {
        "decay_share",
        "decay_slope",
        "block_ratio",
    }
    one_thought = indices_of(np.ones((1, 12, 12)), simple_trace(1, 1))
    assert [name for name, value in one_thought.items() if value.isnan().all()] == ["decay_slope"]
    # Thinking without saliency has no ratio, rather than one beyond all bounds.
    tokens = np.tril(np.ones((12, 12)))
    tokens[:8] = 0.0
    assert indices_of(tokens[None], simple_trace(1, 1))["block_ratio"].isnan().all()


def test_heads_are_averaged() -> None:
    saliency = random_saliency(simple_trace(4, 2), layers=3)
    heads = torch.stack([saliency.sums * 0.5, saliency.sums * 1.5], 1)
    apart = StepSaliency(heads, saliency.layers, saliency.trace)
    assert apart.maps.shape == (3, 2, 7, 7)
    for name, value in saliency.indices.items():
        torch.testing.assert_close(apart.indices[name], value)


@pytest.mark.parametrize("heads", [False, True])
def test_file_round_trip(tmp_path: Path, heads: bool) -> None:
    trace = drawn_trace([([2, 3], [1], True, False), ([1, 1, 2], [2, 1], True, True)])
    made = random_saliency(trace, layers=3, zero_beyond=3, about={**ABOUT, "loss": [4, 7], "stepflow": None})
    sums = torch.stack([made.sums, 2 * made.sums], 1) if heads else made.sums
    saliency = StepSaliency(sums, [0, 4, 9], trace, "block", made.about)
    saliency.save(tmp_path / "one.safetensors")
    read = StepSaliency.load(tmp_path / "one.safetensors")
    assert torch.equal(read.sums, saliency.sums)
    assert read.sums.dtype == saliency.sums.dtype
    assert torch.equal(read.maps, saliency.maps)
    assert (read.layers, read.pooling, read.about, read.steps) == ([0, 4, 9], "block", saliency.about, saliency.steps)
    for name in ("segment_ids", "step_ids", "round_ids"):
        assert torch.equal(getattr(read.trace, name), getattr(trace, name))
    for name, value in saliency.indices.items():
        assert torch.equal(read.indices[name].nan_to_num(-1), value.nan_to_num(-1))


def test_ids_that_are_parts_of_one_tensor_can_be_saved(tmp_path: Path) -> None:
    ids = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 2, 1]])
    saliency = StepSaliency(torch.ones(1, 3, 3), [0], Trace(*ids.T))
    saliency.save(tmp_path / "one.safetensors")
    assert StepSaliency.load(tmp_path / "one.safetensors").steps == saliency.steps


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    random_saliency(simple_trace(2, 1)).save(path)
    raw = path.read_bytes()
    for length in (0, 4, 8, 60, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(StepFlowFileError, match="holds no Step-Saliency"):
            StepSaliency.load(path)
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(raw), 200).tolist():
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x15]) + raw[place + 1 :])
        with suppress(StepFlowFileError):
            StepSaliency.load(path)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "[]",
        "no json",
        {"format": "stepflow-saliency-0"},
        {"layers": 3},
        {"layers": [0]},
        {"pooling": "max"},
        {"steps": None},
        {"steps": [{"name": "x"}]},
        {"about": None},
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, header: object) -> None:
    saliency = random_saliency(simple_trace(2, 1))
    whole = {
        "format": "stepflow-saliency-1",
        "layers": saliency.layers,
        "pooling": "causal",
        "steps": [vars(step) for step in saliency.steps],
        "about": {},
    }
    text = json.dumps({**whole, **header}) if isinstance(header, dict) else header
    trace = saliency.trace
    tensors = {"sums": saliency.sums, "segment_ids": trace.segment_ids, "step_ids": trace.step_ids}
    tensors["round_ids"] = trace.round_ids
    path = tmp_path / "foreign.safetensors"
    save_file(tensors, path, metadata=None if text is None else {"stepflow": text})
    with pytest.raises(StepFlowFileError, match="holds no Step-Saliency") as caught:
        StepSaliency.load(path)
    assert "StepSaliency.save" in caught.value.hint
    # It is the header that is refused.
    save_file(tensors, path, metadata={"stepflow": json.dumps(whole)})
    assert StepSaliency.load(path).steps == saliency.steps


def test_files_out_of_reach(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.safetensors"):
        with pytest.raises(StepFlowFileError, match="holds no Step-Saliency"):
            StepSaliency.load(path)
    with pytest.raises(StepFlowFileError, match="cannot be written"):
        random_saliency(simple_trace(1, 1)).save(tmp_path / "missing" / "one.safetensors")


def test_what_does_not_fit_is_refused() -> None:
    trace = simple_trace(2, 1)
    with pytest.raises(StepFlowInputError, match="sums must be"):
        StepSaliency(torch.ones(1, 3, 3), [0], trace)
    with pytest.raises(StepFlowInputError, match="pooling must be"):
        StepSaliency(torch.ones(1, 4, 4), [0], trace, "max")
