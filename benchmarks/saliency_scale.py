"""Measures the time and memory of Step-Saliency over all layers, beside a plain training pass and a naive version.

The model is a random Llama with 12 layers, 8 heads and hidden size 256, in float32 on one CPU thread. The traces have
a step every 30 tokens. The script compares:

    plain      the loss and its gradient for all parameters, through PyTorch's own attention kernel
    saliency   step_saliency, all layers
    naive      eager attention that keeps every layer's [H, T, T] weights and their gradients, pooled after the pass

The vocabulary is small, so that the logits do not dominate. Times are interleaved in one process; the script reports
their median over rounds and the median ratio within a round. Each peak of memory is measured in a process of its own,
above what the process held before the pass. The naive version stops at 8 GB.

Run: python -m benchmarks.saliency_scale [--json benchmarks/saliency_scale.json]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_stepflow import Trace, step_saliency
from hf_stepflow.evaluation.store import machine

STEP = 30
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
WAYS = ("plain", "saliency", "naive")
NAIVE_LIMIT = 8e9


def model() -> LlamaForCausalLM:
    """Makes the random model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=max(LENGTHS),
    )
    return LlamaForCausalLM(config)


def trace(tokens: int) -> Trace:
    """Makes a trace: a question, thinking in steps of 30 tokens, and a summary of two steps."""
    steps = torch.arange(tokens) // STEP
    segment = torch.where(steps == 0, 0, torch.where(steps < int(steps[-1]) - 1, 1, 2))
    return Trace(segment, steps)


def plain(net: LlamaForCausalLM, ids: torch.Tensor) -> None:
    net.set_attn_implementation("sdpa")
    net(ids, labels=ids, use_cache=False).loss.backward()
    net.zero_grad(set_to_none=True)


def saliency(net: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    net.set_attn_implementation("sdpa")
    return step_saliency(net, ids, trace(ids.shape[1]), progress=False).maps


def naive(net: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    net.set_attn_implementation("eager")
    output = net(ids, labels=ids, use_cache=False, output_attentions=True)
    for weights in output.attentions:
        weights.retain_grad()
    output.loss.backward()
    net.zero_grad(set_to_none=True)
    place = trace(ids.shape[1]).step_ids
    members = torch.nn.functional.one_hot(place).float()
    maps = []
    for weights in output.attentions:
        tokens = (weights * weights.grad).abs()[0].mean(0).detach()
        maps.append(members.T @ tokens @ members)
    sizes = members.sum(0)
    pairs = (sizes[:, None] * sizes).tril(-1) + torch.diag(sizes * (sizes + 1) / 2)
    return torch.stack(maps).tril() / pairs.clamp(min=1)


def peak(way: str, tokens: int) -> float:
    """Measures the peak of memory above the start of the pass, in bytes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", way, str(tokens)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def measure_peak(way: str, tokens: int) -> None:
    torch.set_num_threads(1)
    net, ids = model(), torch.randint(0, 1024, (1, tokens))
    globals()[way](net, ids[:, :64])  # one-time setup is not a cost of the trace
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    globals()[way](net, ids)
    print(memory("VmHWM") - before)


def memory(name: str) -> int:
    """Reads a line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def measure(tokens: int, ways: list[str]) -> dict[str, object]:
    """Measures times and peaks at one length."""
    net, ids = model(), torch.randint(0, 1024, (1, tokens), generator=torch.Generator().manual_seed(1))
    rounds = 5 if tokens <= 1024 else 3 if tokens <= 4096 else 1
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            start = time.perf_counter()
            result = globals()[way](net, ids)
            seconds[way].append(time.perf_counter() - start)
            if way == "saliency":
                maps = result
            if way == "naive":
                assert torch.allclose(maps, result, rtol=2e-3, atol=1e-12), "saliency and naive differ"
            del result
    found: dict[str, object] = {"tokens": tokens, "rounds": rounds, "machine": machine()}
    for way in ways:
        ratios = [one / base for one, base in zip(seconds[way], seconds["plain"], strict=True)]
        found[way] = {
            "seconds": statistics.median(seconds[way]),
            "time_over_plain": statistics.median(ratios),
            "peak_bytes": peak(way, tokens),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="file of the results")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="lengths of the traces, in tokens")
    parser.add_argument(
        "--peak", nargs=2, metavar=("WAY", "TOKENS"), help="print one peak of memory instead, in bytes"
    )
    args = parser.parse_args()
    if args.peak:
        measure_peak(args.peak[0], int(args.peak[1]))
        return
    torch.set_num_threads(1)
    # Rows of other lengths stay; each names the machine of its measurement.
    known = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    rows = {row["tokens"]: row for row in known}
    ways = list(WAYS)
    for tokens in args.lengths:
        row = measure(tokens, ways)
        rows[tokens] = row
        ordered = [rows[length] for length in sorted(rows)]
        args.json.write_text(json.dumps({"rows": ordered}, indent=1) + "\n")
        for way in ways:
            one = row[way]
            print(
                f"{tokens:6} {way:9} {one['seconds']:8.2f} s  x{one['time_over_plain']:.2f}  "
                f"{one['peak_bytes'] / 1e6:8.0f} MB  x{one['peak_bytes'] / row['plain']['peak_bytes']:.2f}",
                flush=True,
            )
        # The memory of the naive version grows with the square of the length.
        if "naive" in ways and 4 * row["naive"]["peak_bytes"] > NAIVE_LIMIT:
            ways.remove("naive")


if __name__ == "__main__":
    main()
