"""Claim: what StepFlow and Step-Saliency cost on a GPU, at the size of the models that the paper is about.

Random weights in bfloat16, in the shapes of Qwen2-7B (which R1-Distill-Qwen-7B has too) and Qwen3-8B, made on the
card; the paper's settings. Nothing is downloaded. Two parts:

    decode     `generate` goes on from a synthetic KV cache, over whole steps of 28 tokens each. Arms: the untouched
               base on sdpa, StepFlow attached but off, StepFlow on; where flash_attn is installed, also the base on
               flash_attention_2 (eager mode). Modes: `eager`, a cache that grows; `compiled`, a static cache, for
               which `generate` compiles the decode step into CUDA graphs, as with cache_implementation="static".
               Batches are ragged, padded on the left. A time is that of a token, the mean over a call of `generate`
               from its second token on.
    saliency   Step-Saliency of all layers, against a plain training pass (loss and gradients of all parameters),
               without and with gradient checkpoints. The vocabulary is small: logits do not stand for the rest.

The arms take turns in random order in one process, one call each a round. Reported: the medians over n rounds, the
medians of the ratios in each round, with 95 % bootstrap intervals, and peaks of allocated memory: whole for `decode`,
above the weights for `saliency`. Of compiled arms also the graphs, how many of them run without CUDA graphs, and what
compiling took from the card for good. What does not fit into the card's memory is named as skipped.

Each measurement is written as it finishes. One that is in the file from the same card, version of this package and
settings is not made again. Failed measurements are named at the end, with exit status 1.

Run: python -m benchmarks.gpu --json benchmarks/gpu.json [--models qwen3-8b] [--modes eager] [--batch 1] ...
     python -m benchmarks.gpu --quick      (all of it on a CPU, in toy sizes and without CUDA graphs: does it run?)
"""

import argparse
import copy
import gc
import importlib.metadata
import importlib.util
import math
import random
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, DynamicCache, LogitsProcessor, Qwen2Config, Qwen3Config, StaticCache

from benchmarks.measurements import Measurements, Row, about, compare
from benchmarks.saliency_scale import plain, saliency
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
    twin,
    weight_bytes,
)
from hf_stepflow.runtime.flow_state import FlowState, put_state_on
from hf_stepflow.saliency.memory import StepFlowMemoryError

ROPE = {"rope_type": "default", "rope_theta": 1e6}
SHAPES = {
    "qwen2-7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        rope_parameters=ROPE,
        tie_word_embeddings=False,
    ),
    "qwen3-8b": Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters=ROPE,
        tie_word_embeddings=False,
    ),
}
TOY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MODES = ("eager", "compiled")
FLASH = "base_flash_attention_2"
SALIENCY_VOCABULARY = 1024
MIN_ROUNDS = 5
DTYPE = torch.bfloat16


@dataclass
class Plan:
    """What is measured, and how.

    Attributes:
        device: Where.
        shapes: {name: config}.
        modes: Of `MODES`.
        batches: Rows of a batch.
        contexts: Tokens in the cache.
        lengths: Tokens of a trace for Step-Saliency.
        memory: Bytes that a measurement may take.
        steps: Steps of 28 tokens in a call of `generate`.
        rounds: Calls of each arm; after five, no more begin once `seconds` have passed.
        saliency_rounds: Passes of each way.
        seconds: Seconds after which a measurement of decoding starts no further round.
    """

    device: torch.device
    shapes: dict[str, Any]
    modes: list[str]
    batches: list[int]
    contexts: list[int]
    lengths: list[int]
    memory: float
    steps: int = 1
    rounds: int = 12
    saliency_rounds: int = 3
    seconds: float = 60.0


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the file to write; none is written without it")
    parser.add_argument("--quick", action="store_true", help="everything on a CPU in toy sizes, to see that it runs")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--parts", nargs="+", choices=("decode", "saliency"), default=["decode", "saliency"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 8 32")
    parser.add_argument("--context", type=int, nargs="+", help="default: 2048 8192 32768")
    parser.add_argument("--lengths", type=int, nargs="+", help="of traces for Step-Saliency; default: 32768")
    parser.add_argument("--memory", type=float, help="GB that a measurement may take; default: 97 %% of the card's")
    args = parser.parse_args()
    random.seed(0)
    if not args.quick and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; --quick runs the script on a CPU in toy sizes")
    plan = quick_plan() if args.quick else gpu_plan()
    plan.shapes = {name: plan.shapes[name] for name in args.models}
    plan.modes = args.modes if "decode" in args.parts else []
    plan.batches = args.batch or plan.batches
    plan.contexts = args.context or plan.contexts
    plan.lengths = (args.lengths or plan.lengths) if "saliency" in args.parts else []
    plan.memory = plan.memory if args.memory is None else 1e9 * args.memory
    failed = measure(plan, Measurements(args.json, described(plan.device), ("stepflow",)))
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


def gpu_plan() -> Plan:
    """The published measurement."""
    device = torch.device("cuda")
    memory = 0.97 * torch.cuda.get_device_properties(device).total_memory
    return Plan(device, SHAPES, list(MODES), [1, 8, 32], [2048, 8192, 32768], [32768], memory)


def quick_plan() -> Plan:
    """The same in toy sizes."""
    torch.set_num_threads(1)
    shapes = {}
    for name, config in SHAPES.items():
        shapes[name] = copy.deepcopy(config)
        shapes[name].update(TOY)
        shapes[name].layer_types = shapes[name].layer_types[: TOY["num_hidden_layers"]]
    return Plan(torch.device("cpu"), shapes, list(MODES), [2], [64], [128], math.inf, rounds=2, saliency_rounds=2)


def described(device: torch.device) -> Row:
    """The card and the versions."""
    facts = about(device)
    for package in ("triton", "flash_attn"):
        is_there = importlib.util.find_spec(package) is not None
        facts[package] = importlib.metadata.version(package) if is_there else None
    if device.type == "cuda":
        facts["driver"] = _driver()
        facts["cuda"] = torch.version.cuda
    return facts


def _driver() -> str | None:
    """Version of the driver, as nvidia-smi has it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def measure(plan: Plan, measurements: Measurements) -> list[str]:
    """Makes all measurements that are not there.

    Returns:
        The names of those that failed.
    """
    failed = []
    card = measurements.about.get("accelerator", "cpu")
    for shape, config in plan.shapes.items():
        arms: dict[str, Any] = {}
        for mode in plan.modes:
            settings = {"steps": plan.steps, "rounds": plan.rounds, "seconds": plan.seconds}
            for batch in plan.batches:
                for context in plan.contexts:
                    name = {"part": "decode", "card": card, "model": shape, "mode": mode}
                    name |= {"batch": batch, "context": context}
                    if measurements.has(name, settings):
                        continue
                    if (needed := decode_bytes(config, batch, context, plan)) > plan.memory:
                        measurements.add(name, settings, skipped(needed, plan.memory))
                        continue
                    arms = arms or decode_arms(config, plan.device)
                    failed += _try(measurements, name, settings, partial(decode, arms, mode, batch, context, plan))
        arms.clear()
        for tokens in plan.lengths:
            name = {"part": "saliency", "card": card, "model": shape, "tokens": tokens}
            settings = {"rounds": plan.saliency_rounds, "vocabulary": SALIENCY_VOCABULARY}
            if not measurements.has(name, settings):
                failed += _try(measurements, name, settings, partial(measure_saliency, config, tokens, plan))
    return failed


def _try(measurements: Measurements, name: Row, settings: Row, run: Callable[[], Row]) -> list[str]:
    """Makes one measurement; a failure is printed and its name returned, so that the others are still made."""
    try:
        result = run()
        check(name["part"], result)
        measurements.add(name, settings, result)
    except torch.OutOfMemoryError:
        measurements.add(name, settings, {"skipped": "out of memory"})
    except Exception:
        traceback.print_exc()
        return [" ".join(map(str, name.values()))]
    finally:
        torch.compiler.reset()
        release()
    return []


def check(part: str, result: Row) -> None:
    """Checks that a result has all its arms, and that its numbers are finite and its times positive.

    Raises:
        ValueError: If it has not, or they are not.
    """
    expected = {*(ARMS if part == "decode" else WAYS)} - result.get("without", {}).keys()
    if missing := expected - set(result["arms"]):
        raise ValueError(f"arms {sorted(missing)} are missing")
    for key, value in result.items():
        is_time = key == "median_ms" or "_to_" in key
        for number in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not (math.isfinite(number) and (number > 0 or not is_time)):
                raise ValueError(f"{key} must hold finite numbers and positive times, got {value}")


def skipped(needed: float, memory: float) -> Row:
    """The row of what does not fit."""
    return {"skipped": f"needs {needed / 1e9:.1f} GB of {memory / 1e9:.1f} GB"}


def release() -> None:
    """Gives memory that nothing holds back to the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of(device: torch.device, run: Callable[[], Any]) -> tuple[Any, int | None]:
    """Runs something, and reads the peak of allocated memory; None on a CPU."""
    if device.type != "cuda":
        return run(), None
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    return result, torch.cuda.max_memory_allocated(device)


# Decoding


def decode_bytes(config: Any, batch: int, context: int, plan: Plan) -> int:
    """Bytes that a measurement of decoding takes, about: the arms share weights and cache."""
    slots = context + 1 + plan.steps * len(STEP)
    return (
        weight_bytes(config, DTYPE)
        + cache_bytes(config, batch, slots, DTYPE)
        + step_bytes(config, batch, slots, DTYPE)
        + (1 << 30 if plan.device.type == "cuda" else 0)  # CUDA's own
    )


def decode_arms(config: Any, device: torch.device) -> dict[str, Any]:
    """The models of the arms, all on the same weights."""
    arms = arms_of(random_model(config, DTYPE, device))
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        arms[FLASH] = twin(arms["base"])
        arms[FLASH].set_attn_implementation("flash_attention_2")
    return arms


class GrowingContext:
    """A context in a cache that grows. The arms hand it on, cut back to its length: it need not exist twice."""

    def __init__(self, config: Any, batch: int, context: int, like: Any):
        self.config, self.context = config, context
        self.cache = random_cache(config, batch, context, like)

    def cache_for(self, arm: str, state: FlowState) -> Any:
        """The cache for a call of one arm; that of the call before becomes unusable."""
        if longer := self.cache.get_seq_length() - self.context:
            self.cache.crop(-longer)
        fresh = DynamicCache(config=self.config)
        fresh.layers = self.cache.layers
        self.cache = fresh
        if arm == "on":
            put_state_on(fresh, state)
        return fresh


class StaticContext:
    """A context in static caches, one for each arm over the same keys and values: slots behind it are written anew."""

    def __init__(self, config: Any, batch: int, context: int, like: Any, capacity: int):
        self.context = context
        self.cache = random_cache(config, batch, context, like, capacity)
        self.caches: dict[str, StaticCache] = {}

    def cache_for(self, arm: str, state: FlowState) -> StaticCache:
        """The cache of an arm, cut back to the context; the same object at each call, for its graph."""
        if arm not in self.caches:
            own = copy.copy(self.cache)
            own.layers = [copy.copy(layer) for layer in self.cache.layers]
            for layer in own.layers:
                layer.cumulative_length = layer.cumulative_length.clone()
                torch._dynamo.mark_static_address(layer.cumulative_length)
            if arm == "on":
                put_state_on(own, state)
            self.caches[arm] = own
        for layer in self.caches[arm].layers:
            layer.cumulative_length.fill_(self.context)
        return self.caches[arm]


class Script(LogitsProcessor):
    """Prescribes the new tokens, and starts the clock when the first is computed.

    Attributes:
        start: Time at which the first token was there.
    """

    def __init__(self, tokens: list[int]):
        self.tokens = tokens
        self.place = 0
        self.start = 0.0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Forbids every other token."""
        if self.place == 0:
            if not torch.isfinite(scores).all():
                raise ValueError("the model's logits are not finite")
            synchronize(scores.device)
            self.start = time.perf_counter()
        scores.fill_(float("-inf"))
        scores[:, self.tokens[self.place]] = 0.0
        self.place += 1
        return scores


@torch.no_grad()
def decode(arms: dict[str, Any], mode: str, batch: int, context: int, plan: Plan) -> Row:
    """Measures calls of `generate` that go on from one context."""
    base, device = arms["base"], plan.device
    config, names = base.config, [arm for arm in arms if mode == "eager" or arm in ARMS]
    ids, mask = ragged(context, batch, device)
    tokens = STEP * (plan.steps + 1)
    if mode == "eager":
        capacity, place = None, GrowingContext(config, batch, context, base)
    else:
        capacity = context + 1 + plan.steps * len(STEP)
        place = StaticContext(config, batch, context, base, capacity)
    state = labelled(arms["on"], ids, mask, capacity)
    # The cache holds the context; the first token of the next step is new.
    ids = torch.cat((ids, ids.new_full((batch, 1), tokens[0])), 1)
    mask = torch.cat((mask, mask.new_ones((batch, 1))), 1)
    compile_config = None
    if device.type != "cuda":  # traced, and run as it is: inductor takes minutes, and a CPU has no CUDA graphs
        compile_config = CompileConfig(backend="eager", mode=None)
        compile_config._compile_all_devices = True

    def call(arm: str) -> float:
        """Seconds a token."""
        cache = place.cache_for(arm, state)
        script = Script(tokens[1:])
        with switched(arm, arms[arm]):
            output = arms[arm].generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                logits_processor=[script],
                do_sample=False,
                max_new_tokens=1 + plan.steps * len(STEP),
                disable_compile=mode == "eager",
                compile_config=None if mode == "eager" else compile_config,
            )
        synchronize(device)
        seconds = time.perf_counter() - script.start
        assert output[0, context + 1 :].tolist() == tokens[1 : script.place + 1]
        return seconds / (script.place - 1)

    result: Row = {"arms": names, "first_call_s": {}}
    compiled: dict[str, Row] = {"graphs": {}, "cuda_graphs_skipped": {}, "graph_bytes": {}}
    for arm in names:
        release()
        before = compiler_counts(), reserved(device)
        start = time.perf_counter()
        call(arm)
        result["first_call_s"][arm] = round(time.perf_counter() - start, 3)
        call(arm)
        release()
        graphs, misses = (now - then for now, then in zip(compiler_counts(), before[0], strict=True))
        compiled["graphs"][arm], compiled["cuda_graphs_skipped"][arm] = graphs, misses
        compiled["graph_bytes"][arm] = reserved(device) - before[1]
    if mode == "compiled":
        result |= compiled
    seconds: dict[str, list[float]] = {arm: [] for arm in names}
    peaks: dict[str, int | None] = {}
    (graphs, _), start, order = compiler_counts(), time.perf_counter(), list(names)
    while len(seconds["base"]) < plan.rounds:
        if len(seconds["base"]) >= MIN_ROUNDS and time.perf_counter() - start > plan.seconds:
            break
        random.shuffle(order)
        for arm in order:
            taken, peaks[arm] = peak_of(device, partial(call, arm))
            seconds[arm].append(taken)
    if (made := compiler_counts()[0] - graphs) > 0:
        raise RuntimeError(f"{made} graphs were compiled while the time was taken")
    for model in arms.values():
        model.__dict__.pop("_compiled_call", None)
    result |= {"n": len(seconds["base"]), "tokens": plan.steps * len(STEP)} | compare(seconds)
    return result | {"peak_bytes": {arm: peaks[arm] for arm in names}}


def compiler_counts() -> tuple[int, int]:
    """Graphs compiled so far, and how many of them CUDA graphs left out."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]


def reserved(device: torch.device) -> int:
    """Bytes that PyTorch has taken from the card."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


# Step-Saliency


def checkpointed(net: Any, ids: torch.Tensor) -> None:
    """The plain training pass with gradient checkpoints."""
    # The newer name of the two, where there is one.
    kind = "activation" if hasattr(net, "activation_checkpointing_enable") else "gradient"
    net.train()
    getattr(net, f"{kind}_checkpointing_enable")()
    try:
        plain(net, ids)
    finally:
        getattr(net, f"{kind}_checkpointing_disable")()
        net.eval()


WAYS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "plain": plain,
    "checkpointed": checkpointed,
    "saliency": saliency,
}


def measure_saliency(config: Any, tokens: int, plan: Plan) -> Row:
    """Measures passes over one trace, each way as often as the others; a way that does not fit is left out."""
    device = plan.device
    config = copy.deepcopy(config)
    config.vocab_size = SALIENCY_VOCABULARY
    net = random_model(config, DTYPE, device)
    ids = torch.randint(0, SALIENCY_VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    names, peaks, without = [], {}, {}
    for way, run in WAYS.items():  # a first pass of each: what fits, and what is set up once
        release()
        try:
            found, peak = peak_of(device, partial(run, net, ids))
        except (torch.OutOfMemoryError, StepFlowMemoryError) as error:
            without[way] = f"{type(error).__name__} on a card of {plan.memory / 1e9:.0f} GB"
            net.zero_grad(set_to_none=True)
            continue
        if way == "saliency" and not torch.isfinite(found).all():
            raise ValueError("the maps are not finite")
        names.append(way)
        peaks[way] = None if peak is None else peak - held
    seconds: dict[str, list[float]] = {way: [] for way in names}
    order = list(names)
    for _ in range(plan.saliency_rounds):
        random.shuffle(order)
        for way in order:
            release()
            synchronize(device)
            start = time.perf_counter()
            WAYS[way](net, ids)
            synchronize(device)
            seconds[way].append(time.perf_counter() - start)
    result: Row = {"arms": names, "n": plan.saliency_rounds}
    if "saliency" in names:
        result |= compare(seconds, names[0])
    return result | {"peak_bytes": peaks} | ({"without": without} if without else {})


if __name__ == "__main__":
    main()
