"""Claim: what a token costs with StepFlow on, against StepFlow off and against the base model untouched.

One CPU thread, the paper's settings (both bands a quarter of the layers), in two parts:

    steps      single decode steps of a model in the shape of SmolLM2-135M (30 layers, random weights). The three arms
               decode the same tokens, interleaved token by token in one process and in random order, each on its own
               copy of a synthetic KV cache; the traces are thinking, a step every 28 tokens. A time is a token's.
    generate   whole calls of `generate` with the embedded reasoner on problems of `chains-6`, greedy, the prompt
               included. Every arm makes the same number of new tokens, whatever it says. A time is a call's.

Reported: the median time of each arm, and the median of the ratio of an arm to the base for the same token or call,
with a 95 % bootstrap interval. Each measurement is written as it finishes, and one that is in the file from the same
machine, versions and settings is not made again. Shapes that do not fit into the memory are named as skipped.

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
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--parts", nargs="+", choices=("steps", "generate"), default=["steps", "generate"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, nargs="+", help=f"default: {BATCHES} steps, {GENERATE_BATCHES} generate")
    parser.add_argument("--context", type=int, nargs="+", default=CONTEXTS, help="tokens before the steps")
    parser.add_argument("--tokens", type=int, default=120, help="steps a shape at batch 1; a third in larger batches")
    parser.add_argument("--calls", type=int, default=40, help="calls of generate at batch 1; half in larger batches")
    parser.add_argument("--new-tokens", type=int, default=128, help="of each call; a right response is as long")
    parser.add_argument("--memory", type=float, default=20.0, help="GB that a shape may take")
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
        measurements: Where the rows go.
        dtype: A key of `DTYPES`.
        batches: Rows of the batch.
        contexts: Tokens in the cache.
        tokens: Steps at batch 1; a third in larger batches.
        memory: Bytes that a shape may take.
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
    """Decodes `tokens` tokens after `context` of them in each arm."""
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
        measurements: Where the rows go.
        dtype: A key of `DTYPES`.
        batches: Problems of a call.
        calls: Calls at batch 1; half as many in larger batches.
        new_tokens: New tokens of each problem.
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
    """Runs calls of `generate` in each arm, each on problems of its own."""
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
