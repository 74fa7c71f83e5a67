"""Measures the time per token with StepFlow on, with StepFlow off, and in the untouched base model.

All parts run on one CPU thread with the paper's settings, so that each band is a quarter of the layers:

    steps      single decode steps of a model in the shape of SmolLM2-135M (30 layers, random weights). The three arms
               decode the same tokens in one process, interleaved token by token in random order, each on its own copy
               of a synthetic KV cache. The traces are thinking, with a step every 28 tokens. Times are per token.
    generate   whole calls of `generate` with the embedded reasoner on problems of `chains-6`, greedy, including the
               prompt. Every arm generates the same number of tokens, whatever they say. Times are per call.

The script reports the median time of each arm, and the median ratio between an arm and the base for the same token or
call, with a 95 % bootstrap interval. It writes each measurement as it finishes, and does not repeat one that the file
holds from the same machine, versions and settings. Shapes that do not fit into memory are reported as skipped.

Run: python -m benchmarks.decode_overhead [--parts steps generate] [--dtype float32] [--batch 1] [--context 512]
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.measurements import Measurements, Row, about, compare
from benchmarks.traces import (
    ARMS,
    STEP,
    arms_of,
    cache_bytes,
    labelled,
    ragged,
    random_cache,
    random_model,
    step_bytes,
    switched,
    weight_bytes,
)
from hf_stepflow.reasoner import FOLDER, load_reasoner
from hf_stepflow.reasoner.levels import problems_of
from hf_stepflow.reasoner.prompts import encode_problem
from hf_stepflow.runtime.flow_state import put_state_on

SHAPE = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES = (1, 8, 32)
CONTEXTS = (512, 4096, 16384)
GENERATE_BATCHES = (1, 16)
WARM_UP = 3


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="file of the results")
    parser.add_argument("--parts", nargs="+", choices=("steps", "generate"), default=["steps", "generate"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="dtypes (default: all)")
    parser.add_argument(
        "--batch", type=int, nargs="+", help=f"default: {BATCHES} for steps, {GENERATE_BATCHES} for generate"
    )
    parser.add_argument("--context", type=int, nargs="+", default=CONTEXTS, help="tokens in the cache")
    parser.add_argument("--tokens", type=int, default=120, help="steps at batch size 1; a third in larger batches")
    parser.add_argument("--calls", type=int, default=40, help="calls at batch size 1; half in larger batches")
    parser.add_argument(
        "--new-tokens", type=int, default=128, help="tokens of each call, the length of a right response"
    )
    parser.add_argument("--memory", type=float, default=20.0, help="largest memory of a shape, in GB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    described = about(torch.device("cpu"))
    measurements = Measurements(args.json, described, ("processor", "torch", "transformers", "stepflow"))
    for dtype in args.dtype:
        if "steps" in args.parts:
            measure_steps(measurements, dtype, args.batch or BATCHES, args.context, args.tokens, 1e9 * args.memory)
        if "generate" in args.parts:
            measure_generate(measurements, dtype, args.batch or GENERATE_BATCHES, args.calls, args.new_tokens)


def measure_steps(
    measurements: Measurements,
    dtype: str,
    batches: Sequence[int],
    contexts: Sequence[int],
    tokens: int,
    memory: float,
) -> None:
    """Measures single decode steps in one dtype.

    Args:
        measurements: The file that receives the rows.
        dtype: A key of `DTYPES`.
        batches: The batch sizes.
        contexts: The numbers of tokens in the cache.
        tokens: The number of steps at batch size 1; larger batches take a third.
        memory: The largest memory of a shape, in bytes.
    """
    arms: dict[str, Any] = {}
    for batch in batches:
        for context in contexts:
            name = {"part": "steps", "dtype": dtype, "batch": batch, "context": context}
            settings = {"tokens": tokens if batch == 1 else max(1, tokens // 3)}
            if measurements.has(name, settings):
                continue
            needed = (
                weight_bytes(SHAPE, DTYPES[dtype])
                + step_bytes(SHAPE, batch, context, DTYPES[dtype])
                + len(ARMS) * cache_bytes(SHAPE, batch, context + WARM_UP + tokens, DTYPES[dtype])
            )
            if needed > memory:
                reason = f"needs {needed / 1e9:.1f} GB of {memory / 1e9:.1f} GB"
                measurements.add(name, settings, {"skipped": reason})
                continue
            if not arms:
                arms = arms_of(random_model(SHAPE, DTYPES[dtype], torch.device("cpu")))
            with torch.inference_mode():
                measurements.add(name, settings, decode(arms, batch, context, settings["tokens"]))


def decode(arms: dict[str, Any], batch: int, context: int, tokens: int) -> Row:
    """Decodes `tokens` tokens in each arm, after a context of `context` tokens."""
    ids, mask = ragged(context, batch, arms["base"].device)
    caches = {arm: random_cache(SHAPE, batch, context, arms["base"]) for arm in ARMS}
    put_state_on(caches["on"], labelled(arms["on"], ids, mask))
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    order = list(ARMS)
    for index in range(tokens + WARM_UP):
        mask = torch.cat((mask, torch.ones(batch, 1, dtype=mask.dtype)), 1)
        inputs = {
            "input_ids": torch.full((batch, 1), STEP[index % len(STEP)]),
            "attention_mask": mask if batch > 1 else None,
            "position_ids": mask.sum(1, keepdim=True) - 1,
        }
        random.shuffle(order)
        for arm in order:
            start = time.perf_counter()
            with switched(arm, arms[arm]):
                arms[arm](**inputs, past_key_values=caches[arm])
            seconds[arm].append(time.perf_counter() - start)
    return {"tokens": tokens} | compare({arm: taken[WARM_UP:] for arm, taken in seconds.items()})


def measure_generate(
    measurements: Measurements, dtype: str, batches: Sequence[int], calls: int, new_tokens: int
) -> None:
    """Measures whole calls of `generate` in one dtype.

    Args:
        measurements: The file that receives the rows.
        dtype: A key of `DTYPES`.
        batches: The numbers of problems in a call.
        calls: The number of calls at batch size 1; larger batches make half as many.
        new_tokens: The number of new tokens for each problem.
    """
    model, tokenizer = load_reasoner(dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).eval()
    arms = {"base": base, "off": model, "on": model}
    for batch in batches:
        name = {"part": "generate", "dtype": dtype, "batch": batch}
        settings = {"calls": calls if batch == 1 else max(1, calls // 2), "new_tokens": new_tokens}
        if not measurements.has(name, settings):
            measurements.add(name, settings, generate(arms, tokenizer, batch, **settings))


def generate(arms: dict[str, Any], tokenizer: Any, batch: int, calls: int, new_tokens: int) -> Row:
    """Runs calls of `generate` in each arm, each call on problems of its own."""
    problems = problems_of("chains-6", "test", batch * (calls + 1))
    prompts = [encode_problem(tokenizer, problem)[0] for problem in problems]
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    order = list(ARMS)
    for start in range(0, len(prompts), batch):
        inputs = tokenizer.pad({"input_ids": prompts[start : start + batch]}, return_tensors="pt")
        random.shuffle(order)
        for arm in order:
            begin = time.perf_counter()
            with switched(arm, arms[arm]):
                output = arms[arm].generate(
                    **inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens
                )
            seconds[arm].append(time.perf_counter() - begin)
            made = output.shape[1] - inputs["input_ids"].shape[1]
            assert made == new_tokens, f"{arm} made {made} tokens instead of {new_tokens}"
    seconds = {arm: taken[1:] for arm, taken in seconds.items()}  # the first call warms up
    rates = {arm: round(batch * new_tokens / statistics.median(taken), 1) for arm, taken in seconds.items()}
    return {"calls": calls, "new_tokens": new_tokens, "tokens_per_second": rates} | compare(seconds)


if __name__ == "__main__":
    main()
