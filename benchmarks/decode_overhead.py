"""Claim: what a token costs with StepFlow on, against StepFlow off and against the base model untouched.

The shape of SmolLM2-135M (30 layers, random weights, float32), one CPU thread, the paper's settings (both bands a
quarter of the layers). The three arms decode the same tokens, interleaved token by token in one process and in random
order, each on its own copy of a synthetic KV cache; the traces are thinking, a step every 28 tokens. Reported: the
median time a token of each arm, and the median over tokens of the ratio of an arm to the base for the same token, with
a 95 % bootstrap interval.

Run: python -m benchmarks.decode_overhead [--json benchmarks/decode_overhead.json]
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.evaluation.store import machine
from hf_stepflow.runtime.flow_state import FlowState, put_state_on
from hf_stepflow.runtime.report import Tally
from tests.support.flow import byte_tokenizer, encode

SHAPE = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
STEP = encode("We add the next number now. ")
ARMS = ("base", "off", "on")


def trace(length: int) -> list[int]:
    """A question of an eighth of the trace, then thinking."""
    ids = encode("Q" * (length // 8) + "<think>")
    while len(ids) < length:
        ids += STEP
    return ids[:length]


def models() -> dict[str, LlamaForCausalLM]:
    """The base model, and one on the same weights with StepFlow attached."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(SHAPE).eval()
    other = LlamaForCausalLM(SHAPE).eval()
    other.load_state_dict(base.state_dict(), assign=True)
    StepFlowModelForCausalLM.attach(other, None, tokenizer=byte_tokenizer())
    return {"base": base, "off": other, "on": other}


def cache(context: int, batch: int) -> DynamicCache:
    """A KV cache of that length, the same in every arm."""
    torch.manual_seed(1)
    made = DynamicCache(config=SHAPE)
    for layer in range(SHAPE.num_hidden_layers):
        made.update(torch.randn(batch, 3, context, 64), torch.randn(batch, 3, context, 64), layer)
    return made


def measure(arms: dict[str, LlamaForCausalLM], context: int, batch: int, tokens: int) -> dict[str, object]:
    """Decodes `tokens` tokens after `context` of them in each arm."""
    lengths = [context - row * context // (2 * batch) for row in range(batch)]  # ragged, left-padded
    ids = torch.tensor([[0] * (context - length) + trace(length) for length in lengths])
    mask = torch.tensor([[0] * (context - length) + [1] * length for length in lengths])
    caches = {arm: cache(context, batch) for arm in ARMS}
    runtime = arms["on"].stepflow_runtime
    state = FlowState(runtime.vocabulary_for(runtime.settings), batch, ids.device)
    state.append(state.read(ids, mask == 0), None, ids.device)
    state.tally = Tally(batch, tuple(range(SHAPE.num_hidden_layers)), ids.device)
    put_state_on(caches["on"], state)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    order = list(ARMS)
    for index in range(tokens + 3):
        mask = torch.cat((mask, torch.ones(batch, 1, dtype=mask.dtype)), 1)
        inputs = {
            "input_ids": torch.full((batch, 1), STEP[index % len(STEP)]),
            "attention_mask": mask if batch > 1 else None,
            "position_ids": mask.sum(1, keepdim=True) - 1,
        }
        random.shuffle(order)
        for arm in order:
            start = time.perf_counter()
            if arm == "off":
                with arms[arm].disable_stepflow():
                    arms[arm](**inputs, past_key_values=caches[arm])
            else:
                arms[arm](**inputs, past_key_values=caches[arm])
            times[arm].append(time.perf_counter() - start)
    times = {arm: taken[3:] for arm, taken in times.items()}  # the first tokens warm up
    result: dict[str, object] = {"context": context, "batch": batch, "tokens": tokens}
    result["median_ms"] = {arm: round(1e3 * statistics.median(taken), 3) for arm, taken in times.items()}
    for arm in ("off", "on"):
        ratios = [taken / base for taken, base in zip(times[arm], times["base"], strict=True)]
        result[f"{arm}_to_base"] = round(statistics.median(ratios), 4)
        result[f"{arm}_to_base_95"] = interval(ratios)
    return result


def interval(values: list[float], repeats: int = 2000) -> list[float]:
    """95 % bootstrap interval of the median."""
    draws = sorted(statistics.median(random.choices(values, k=len(values))) for _ in range(repeats))
    return [round(draws[int(repeats * q)], 4) for q in (0.025, 0.975)]


def main() -> None:
    """Measures all shapes and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--tokens", type=int, default=120, help="tokens a shape at batch 1; a third at batch 8")
    args = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    arms = models()
    results = []
    with torch.inference_mode():
        for batch in (1, 8):
            for context in (512, 4096):
                result = measure(arms, context, batch, args.tokens if batch == 1 else args.tokens // 3)
                results.append(result)
                print(json.dumps(result), flush=True)
    report = {
        "machine": machine(),
        "results": results,
    }
    args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
