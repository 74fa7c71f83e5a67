"""Claim: what a long pass over a trace costs with StepFlow on, in time and memory, against the base model untouched.

The shape of SmolLM2-135M (30 layers, random weights, float32), the paper's settings (both bands a quarter of the
layers), a trace of a question and thinking in one pass without a cache, as in teacher forcing. Each arm runs in a
process of its own for its peak memory (resident set, weights included); times are of arms that take turns in one
process. Where a length is too long to be repeated, n says how often it ran.

Run: python -m benchmarks.prefill [--lengths 4096 32768] [--rounds 5] [--json benchmarks/prefill.json]
"""

import argparse
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_overhead import SHAPE
from benchmarks.measurements import Measurements, about, compare
from benchmarks.traces import arms_of, random_model, trace

ARMS = ("base", "on")


def run(model: Any, length: int) -> float:
    """Seconds of one pass over a trace."""
    ids = torch.tensor([trace(length)])
    begin = time.perf_counter()
    with torch.inference_mode():
        model(ids, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - begin


def peak(arm: str, length: int) -> int:
    """Peak memory of a process that makes one pass, in bytes."""
    command = [sys.executable, "-m", "benchmarks.prefill", "--peak", arm, "--lengths", str(length)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def main() -> None:
    """Measures every length and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="file of the results")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768], help="tokens of the trace")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each arm")
    parser.add_argument("--peak", choices=ARMS, help="make one pass in one arm and print the peak memory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    arms = arms_of(random_model(SHAPE, torch.float32, torch.device("cpu")))
    if args.peak is not None:
        run(arms[args.peak], args.lengths[0])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    described = about(torch.device("cpu"))
    measurements = Measurements(args.json, described, ("processor", "torch", "transformers", "stepflow"))
    for length in args.lengths:
        name, settings = {"part": "prefill", "length": length}, {"rounds": args.rounds}
        if measurements.has(name, settings):
            continue
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        order = list(ARMS)
        for _ in range(args.rounds):
            random.shuffle(order)
            for arm in order:
                seconds[arm].append(run(arms[arm], length))
        peaks = {arm: peak(arm, length) for arm in ARMS}
        result = compare(seconds) | {"n": args.rounds, "peak_bytes": peaks}
        measurements.add(name, settings, result | {"peak_on_to_base": round(peaks["on"] / peaks["base"], 4)})


if __name__ == "__main__":
    main()
