"""Measures what the vLLM plugin costs: CPU time and tokens per second, beside vLLM without it.

Two comparisons, each of batches of the same greedy requests that all run to the same length:

    settings    in one engine, batches with StepFlow and without (the switch of the requests) take turns
    plugin      in an engine without settings, with the plugin loaded and without (VLLM_PLUGINS); each engine is a
                process of its own, and processes take turns

The CPU time counts all threads and the whole of `generate`, prompts included. Ratios are within a turn; the script
reports their median and the smallest and greatest.

Run: python -m benchmarks.vllm_cost [--model FOLDER] [--dtype float32] [--json benchmarks/vllm_cost.json]
(in an environment with vLLM: `make test-vllm` makes one, .venv-vllm)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hf_stepflow.evaluation.store import machine
from hf_stepflow.reasoner import FOLDER
from hf_stepflow.reasoner.levels import problems_of

# Quarter bands, as the rule for a model without a preset sets them.
SETTINGS = {"tau_max": 0.15, "alpha": 0.06}


def engine(model: str, dtype: str, settings: Any) -> Any:
    """Starts an engine in this process."""
    from vllm import LLM

    extra = {} if settings is None else {"additional_config": {"stepflow": settings}}
    return LLM(model, dtype=dtype, enforce_eager=True, max_model_len=2048, enable_prefix_caching=False, **extra)


def batch(llm: Any, texts: list[str], tokens: int, is_on: bool | None) -> dict[str, float]:
    """Generates one batch; returns its CPU seconds, seconds and tokens per second."""
    from vllm import SamplingParams

    extra = None if is_on is None else {"stepflow": is_on}
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)
    messages = [[{"role": "user", "content": text}] for text in texts]
    cpu, start = time.process_time(), time.perf_counter()
    made = llm.chat(messages, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    number = sum(len(one.outputs[0].token_ids) for one in made)
    return {"cpu": time.process_time() - cpu, "seconds": seconds, "tokens_per_second": number / seconds}


def texts_of(number: int) -> list[str]:
    """Questions of the reasoner's language, which any model can read."""
    return [problem.question for problem in problems_of("errands-60", "test", number)]


def summary(pairs: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """The ratios of the first of each pair to the second."""
    ratios = {
        name: [one[name] / other[name] for one, other in pairs] for name in ("cpu", "seconds", "tokens_per_second")
    }
    found: dict[str, Any] = {
        name: {"median": statistics.median(values), "least": min(values), "most": max(values)}
        for name, values in ratios.items()
    }
    speeds = [statistics.median(one["tokens_per_second"] for one in arm) for arm in zip(*pairs, strict=True)]
    return found | {"turns": len(pairs), "speed": speeds[0], "speed_without": speeds[1]}


def measure_settings(args: argparse.Namespace) -> dict[str, Any]:
    """StepFlow on against off, in one engine."""
    llm, texts = engine(args.model, args.dtype, SETTINGS | args.settings), texts_of(args.batch)
    for is_on in (True, False):
        batch(llm, texts, 8, is_on)
    pairs = []
    for turn in range(args.turns):
        made = {
            is_on: batch(llm, texts, args.tokens, is_on) for is_on in ((True, False) if turn % 2 else (False, True))
        }
        pairs.append((made[True], made[False]))
        print(f"with / without StepFlow: {made[True]} {made[False]}", flush=True)
    return summary(pairs)


def measure_plugin(args: argparse.Namespace) -> dict[str, Any]:
    """The plugin against none, in engines without settings."""
    pairs = []
    for turn in range(args.turns):
        made = {}
        for has_plugin in (True, False) if turn % 2 else (False, True):
            words = ["--child", "--model", args.model, "--dtype", args.dtype, "--batch", str(args.batch)]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.vllm_cost", *words, "--tokens", str(args.tokens)],
                env=os.environ | ({} if has_plugin else {"VLLM_PLUGINS": "none"}),
                capture_output=True,
                text=True,
                check=True,
            )
            made[has_plugin] = json.loads(done.stdout.splitlines()[-1])
        pairs.append((made[True], made[False]))
        print(f"with / without the plugin: {made[True]} {made[False]}", flush=True)
    return summary(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(FOLDER), help="folder of the model (default: the embedded reasoner)")
    parser.add_argument("--name", default="embedded reasoner", help="what the results call the model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--settings", type=json.loads, default={}, help="further settings, JSON")
    parser.add_argument("--batch", type=int, default=16, help="requests at once (default: 16)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each (default: 200)")
    parser.add_argument("--turns", type=int, default=5, help="pairs of batches (default: 5)")
    parser.add_argument("--only", choices=("settings", "plugin"), help="measure one of the two")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="file of the results")
    parser.add_argument("--child", action="store_true", help="print one batch without settings, and end")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else its CPU time is another process's
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if args.child:
        llm, texts = engine(args.model, args.dtype, None), texts_of(args.batch)
        batch(llm, texts, 8, None)
        print(json.dumps(batch(llm, texts, args.tokens, None)))
        return
    import vllm

    known = json.loads(args.json.read_text()) if args.json.exists() else {}
    key = f"{args.name}, {args.dtype}, batch {args.batch}"
    row = known.get(key, {}) | {"tokens": args.tokens, "vllm": vllm.__version__, "machine": machine()}
    for name, measure in (("plugin", measure_plugin), ("settings", measure_settings)):
        if args.only in (None, name):
            row[name] = measure(args)
            known[key] = row
            args.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
