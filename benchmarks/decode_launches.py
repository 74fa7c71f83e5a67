"""Claim: how many operations a decoded token starts with StepFlow on, off, and in the base model untouched.

Counted, not timed, so the numbers hold on any machine: a Qwen2-shaped model of 28 layers (narrow, random weights),
bridge and injection in a quarter of the layers each (the paper's settings), one token after 128 of a question and
thinking, batch 1, 8 and 32 (ragged and left-padded), float32 and bfloat16, on the route of a CPU and on that of an
accelerator, whose kernels run interpreted here. An operation is what `TorchDispatchMode` sees, without views and
allocations; an operator of StepFlow's own counts as one, and the kernels that these start are listed beside it. Also
counted: reads of a value by the host, and the bytes that all operations read and write, intermediate results included.

A token inside a step is the normal case; a step's first token, which is injected, is counted beside it.

Run: python -m benchmarks.decode_launches [--json benchmarks/decode_launches.json]
"""

import argparse
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.runtime import flow_state
from tests.support.counting import CountedOperations, counted_reads
from tests.support.flow import byte_tokenizer, encode

ROUTES = ("host", "device")
SHAPE = Qwen2Config(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=28,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
CONTEXT = 128
STEP = encode("We add the next number now. ")
ARMS = ("base", "off", "on")
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 8, 32)


def models(dtype: torch.dtype) -> dict[str, Any]:
    """The base model, and one on the same weights with StepFlow attached."""
    torch.manual_seed(0)
    base, other = (Qwen2ForCausalLM(SHAPE).to(dtype).eval() for _ in range(2))
    other.load_state_dict(base.state_dict())
    StepFlowModelForCausalLM.attach(other, None, tokenizer=byte_tokenizer())
    return {"base": base, "off": other, "on": other}


def prompt(batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Traces that end with a whole step, ragged and left-padded: ids and mask [B, T]; a single row has no mask."""
    steps = STEP * (CONTEXT * 3 // 4 // len(STEP))
    question = CONTEXT - len(steps)
    rows = [encode("Q" * (question - 1 - row) + "<think>") + steps for row in range(batch)]
    ids = torch.tensor([[0] * (CONTEXT - len(row)) + row for row in rows])
    return ids, (ids > 0).long() if batch > 1 else None


def count(model: Any, is_off: bool, batch: int, is_first: bool) -> dict[str, Any]:
    """Counts one decode step: the first token of a step, or the one after it."""
    ids, mask = prompt(batch)
    cache = DynamicCache(config=SHAPE)
    tokens = [ids, *(torch.full((batch, 1), token) for token in STEP[: 1 if is_first else 2])]
    with model.disable_stepflow() if is_off else nullcontext():
        for index, new in enumerate(tokens):
            positions = None if mask is None else (mask.cumsum(1) - 1)[:, -new.shape[1] :].clamp(min=0)
            inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            if index < len(tokens) - 1:
                with pytest.MonkeyPatch.context() as patch:  # interpreted kernels take long over a prompt
                    patch.setattr(flow_state, "_KERNELS", {"cpu": None})
                    model(new, **inputs)
                mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
        with CountedOperations() as operations, counted_reads() as reads:
            model(new, **inputs)
    own = {name: number for name, number in operations.counts.items() if name.startswith("hf_stepflow::")}
    return {"operations": operations.counts.total(), "reads": reads.total(), "bytes": operations.moved, "own": own}


def measure(route: str) -> list[dict[str, Any]]:
    """Counts every case on the route that this process takes."""
    results = []
    for dtype in DTYPES:
        arms = models(getattr(torch, dtype))
        for batch in BATCHES:
            for is_first in (False, True):
                result: dict[str, Any] = {
                    "route": route, "dtype": dtype, "batch": batch, "first_of_step": is_first
                }  # fmt: skip
                for arm in ARMS:
                    result[arm] = count(arms[arm], arm == "off", batch, is_first)
                result["ratio"] = round(result["on"]["operations"] / result["base"]["operations"], 4)
                results.append(result)
    return results


def versions() -> dict[str, str]:
    """What the counts depend on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def main() -> None:
    """Counts on both routes, each in a process of its own, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--route", choices=ROUTES, help="count on one route and print the result")
    args = parser.parse_args()
    if args.route is not None:
        with torch.no_grad():  # inference mode would hide what composite operations start
            print(json.dumps(measure(args.route)))
        return
    results = []
    for route in ROUTES:
        environment = {**os.environ, "HF_STEPFLOW_ROUTE": route, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.decode_launches", "--route", route]
        results += json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
    args.json.write_text(json.dumps({"versions": versions(), "results": results}, indent=2) + "\n", encoding="utf-8")
    for result in results:
        print({name: value for name, value in result.items() if name not in ARMS})


if __name__ == "__main__":
    main()
