"""Step Momentum Injection's mean value vector: against the oracle, and on the published cases."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from hf_stepflow.runtime.momentum import step_momentum
from tests.support.oracles import oracle_momentum


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `step_momentum`: random float64 values, any range of each row, window and members or none."""
    batch, heads, length, width = (draw(st.integers(1, largest)) for largest in (4, 3, 20, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    edges = [sorted(draw(st.lists(st.integers(-1, length), min_size=2, max_size=2))) for _ in range(batch)]
    members = draw(st.booleans())
    return {
        "value": torch.randn(batch, heads, length, width, dtype=torch.float64, generator=generator),
        "start": torch.tensor([start for start, _ in edges]),
        "end": torch.tensor([end for _, end in edges]),
        "window": draw(st.one_of(st.none(), st.integers(0, length + 3))),
        "members": torch.rand(batch, length, generator=generator) < 0.6 if members else None,
    }


def oracle(value: Tensor, start: Tensor, end: Tensor, window: int | None, members: Tensor | None) -> Tensor:
    return oracle_momentum(value, start.tolist(), end.tolist(), window, members)


@given(steps())
def test_equals_the_oracle(arguments: dict[str, Any]) -> None:
    torch.testing.assert_close(step_momentum(**arguments), oracle(**arguments), rtol=0, atol=1e-14)


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_accumulates_in_float32(dtype: torch.dtype, window: int | None) -> None:
    # 900 values near 100 sum far past float16's range and bfloat16's digits.
    value = (100 + torch.randn(2, 2, 1000, 4)).to(dtype)
    start, end = torch.tensor([50, 300]), torch.tensor([950, 983])
    mean = step_momentum(value, start, end, window)
    assert mean.dtype == dtype
    expected = oracle_momentum(value, start.tolist(), end.tolist(), window)
    torch.testing.assert_close(mean.double(), expected, rtol=max(torch.finfo(dtype).eps, 5e-6), atol=0)


def test_rows_without_a_step_get_zeros() -> None:
    value = torch.ones(4, 2, 6, 3)
    start, end = torch.tensor([-1, 3, 5, 2]), torch.tensor([4, 3, 2, 4])
    expected = torch.zeros(4, 2, 3)
    expected[3] = 1
    for window in (None, 1, 9):
        assert torch.equal(step_momentum(value, start, end, window), expected)
    assert torch.equal(step_momentum(value, start, end, 0), torch.zeros(4, 2, 3))
    nobody = torch.zeros(4, 6, dtype=torch.bool)
    assert torch.equal(step_momentum(value, start, end, members=nobody), torch.zeros(4, 2, 3))


def test_the_inputs_are_left_as_they_were() -> None:
    value, start, end = torch.randn(2, 2, 6, 3), torch.tensor([0, 2]), torch.tensor([3, 6])
    copies = value.clone(), start.clone(), end.clone()
    step_momentum(value, start, end, 2)
    assert all(torch.equal(one, other) for one, other in zip((value, start, end), copies, strict=True))


def test_traces_into_one_graph() -> None:
    value, start, end = torch.randn(2, 2, 9, 3), torch.tensor([1, -1]), torch.tensor([5, 0])
    traced = torch.compile(step_momentum, backend="eager", fullgraph=True)
    for window in (None, 3):
        assert torch.equal(traced(value, start, end, window), step_momentum(value, start, end, window))


def test_a_negative_window_is_refused() -> None:
    with pytest.raises(ValueError, match="window must be None or at least 0, got -2"):
        step_momentum(torch.zeros(1, 1, 4, 2), torch.tensor([0]), torch.tensor([4]), -2)


@pytest.fixture(scope="module")
def goldens(shared_dir: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The published SMI cases and their tensors; the OEB cases of the same files belong to the bridge's tests."""
    cases = json.loads((shared_dir / "goldens" / "oeb_smi.json").read_text())["cases"]
    tensors = load_file(shared_dir / "goldens" / "oeb_smi.safetensors")
    return [case for case in cases if case["kind"] == "smi"], tensors


def injected(case: dict[str, Any], value: Tensor, head_output: Tensor) -> Tensor:
    """The head output [B, H, q, D] after SMI, as the method has it."""
    batch, heads = head_output.shape[:2]
    offset = case["seq_len"] - value.shape[2]
    start, end = ((torch.tensor([edge - offset] * batch)).clamp(min=0) for edge in case["prev_step"])
    momentum = step_momentum(value, start, end, case["window_tokens"])
    momentum = momentum.repeat_interleave(heads // case["kv_heads"], dim=1)
    # The queries are the last ones of the sequence.
    positions = torch.arange(case["q_len"]) + case["seq_len"] - case["q_len"]
    first = positions == case["pending_step_start"]
    deep = case["layer_idx"] >= case["min_layer"]
    return head_output + case["alpha"] * momentum[:, :, None] * (first & deep)[:, None]


def test_published_injections(goldens: tuple[list[dict[str, Any]], dict[str, Tensor]]) -> None:
    cases, tensors = goldens
    assert len(cases) == 14
    checked = 0
    for case in cases:
        name, wrong = case["id"], case["reference_wrong"]
        value, before, exact, published = (
            tensors[f"{name}/{key}"] for key in ("v", "head_output", "exact_head_output", "ref_head_output")
        )
        after = injected(case, value, before)
        if wrong is not None and wrong.startswith("q_len > 1 is silently skipped"):
            # The recorded numbers have no injection at all: the first token of the step, the last query, must get it.
            assert torch.equal(exact, before), name
            assert torch.equal(published, before), name
            momentum = oracle_momentum(value, case["prev_step"][:1], case["prev_step"][1:], case["window_tokens"])
            expected = before.clone()
            expected[:, :, -1] += case["alpha"] * momentum.repeat_interleave(4, dim=1)
            torch.testing.assert_close(after, expected, rtol=0, atol=1e-13, msg=name)
            checked += 1
            continue

        torch.testing.assert_close(after, exact, rtol=0, atol=1e-13, msg=name)
        if wrong is None:
            torch.testing.assert_close(published, exact, rtol=0, atol=1e-13, msg=name)
            assert torch.equal(exact, before) == (case["triggered"] == 0), name
        elif wrong.startswith("the first deep layer consumed"):
            assert torch.equal(published, before), name
            assert not torch.equal(after, before), name
        elif wrong.startswith("cropped value cache"):
            # Absolute positions taken for cache slots average other tokens' values.
            first, last = case["used_window"]
            misread = oracle_momentum(value, [first], [last]).repeat_interleave(4, dim=1)[:, :, None]
            torch.testing.assert_close(published, before + case["alpha"] * misread, rtol=0, atol=1e-13, msg=name)
            assert (after - published).abs().max() > 0.02, name
        else:
            # Row 0's range was used for row 1 too; here both rows have the same one, so the numbers are right.
            assert wrong.startswith("row 1 is injected with the step range of row 0"), (
                f"{name}: no check for {wrong!r}"
            )
            torch.testing.assert_close(published, exact, rtol=0, atol=1e-13, msg=name)
            other = torch.tensor([case["prev_step"][0], 10]), torch.tensor([case["prev_step"][1], 20])
            apart = step_momentum(value, *other, case["window_tokens"])
            expected = oracle_momentum(value, *(edge.tolist() for edge in other), case["window_tokens"])
            torch.testing.assert_close(apart, expected, rtol=0, atol=1e-13, msg=name)
        checked += 1
    assert checked == 14
