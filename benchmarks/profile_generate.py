"""Measures which parts of StepFlow the time that it adds to `generate` goes to.

One CPU thread, the embedded reasoner in float32 with the paper's settings, greedy, on problems of `chains-6`, as part
"generate" of `benchmarks.decode_overhead`. Every call runs in the base model and, with a clock around each part, with
StepFlow; the two take turns. Times are the medians of the calls, in microseconds a decoded token (of all rows).

    labelling   reading the new tokens, and their records
    ranges      the key ranges of the pass, and what its bridged layers share
    bridge      attention in bridged layers, less that of the base in as many layers of the same call
    injection   the injection
    report      what the report notes in each layer
    hook        the rest of what a call takes longer than in the base, clocks included

Run: python -m benchmarks.profile_generate [--batch 1 16] [--calls 20]
"""

import argparse
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.measurements import Measurements, Row, about
from hf_stepflow.reasoner import FOLDER, load_reasoner
from hf_stepflow.reasoner.levels import problems_of
from hf_stepflow.reasoner.prompts import encode_problem
from hf_stepflow.runtime import attention
from hf_stepflow.runtime.attention import BridgedCall
from hf_stepflow.runtime.forward import FlowPass, FlowRuntime
from hf_stepflow.runtime.report import Tally

PARTS = ("labelling", "ranges", "bridge", "injection", "report", "hook")
CLOCKED = {
    "labelling": ((FlowRuntime, "_begin"),),
    "ranges": ((FlowPass, "of"), (BridgedCall, "_ranges")),
    "bridge": tuple((BridgedCall, name) for name in ("decode", "merge", "rows", "rewrite")),
    "injection": ((attention, "inject"),),
    "report": ((Tally, "note_bridge"), (Tally, "add_bridge"), (Tally, "add_injections")),
}


class Clocks:
    """The seconds that each part takes by itself, without the parts that it calls, and how often it was called."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._running: list[str] = []
        self._since = 0.0

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Puts a clock around a function."""

        def clocked(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._running.pop()
                self.calls[part] += 1

        return clocked

    def _turn(self) -> None:
        """Counts the time since the last turn to the innermost part that runs."""
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def patches(self) -> list[Any]:
        """Patches that put the clocks around all parts and around the base's attention."""
        made = [
            mock.patch.object(owner, name, self.around(part, getattr(owner, name)))
            for part, places in CLOCKED.items()
            for owner, name in places
        ]
        base = {"sdpa": self.around("attention", ALL_ATTENTION_FUNCTIONS["sdpa"])}
        return [*made, mock.patch.object(attention, "ALL_ATTENTION_FUNCTIONS", base)]


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="file of the results")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="problems in a call")
    parser.add_argument("--calls", type=int, default=20, help="calls in each arm")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of each call")
    args = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    same = ("processor", "torch", "transformers", "stepflow")
    measurements = Measurements(args.json, about(torch.device("cpu")), same)
    for batch in args.batch:
        settings = {"calls": args.calls, "new_tokens": args.new_tokens}
        measurements.add({"batch": batch}, settings, profile(batch, args.calls, args.new_tokens))


def profile(batch: int, calls: int, new_tokens: int) -> Row:
    """Profiles calls of `generate`.

    Args:
        batch: The number of problems in a call.
        calls: The number of calls in each arm.
        new_tokens: The number of new tokens for each problem.

    Returns:
        `base_us` and `on_us`, microseconds a token; and `added_us` {part: microseconds a token}.
    """
    model, tokenizer = load_reasoner(dtype="float32")
    arms = {"base": AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32").eval(), "on": model}
    prompts = [encode_problem(tokenizer, one)[0] for one in problems_of("chains-6", "test", batch * (calls + 1))]
    taken: dict[str, list[float]] = {name: [] for name in (*arms, *PARTS)}
    for start in range(0, len(prompts), batch):
        inputs = tokenizer.pad({"input_ids": prompts[start : start + batch]}, return_tensors="pt")
        clocks, seconds = Clocks(), {}
        for arm in random.sample(list(arms), len(arms)):
            patches = clocks.patches() if arm == "on" else []
            for patch in patches:
                patch.start()
            begin = time.perf_counter()
            arms[arm].generate(**inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
            seconds[arm] = time.perf_counter() - begin
            for patch in patches:
                patch.stop()
        parts = {part: clocks.seconds[part] for part in CLOCKED}
        parts["bridge"] -= clocks.calls["bridge"] * clocks.seconds["attention"] / clocks.calls["attention"]
        parts["hook"] = seconds["on"] - seconds["base"] - sum(parts.values())
        for name, value in (seconds | parts).items():
            taken[name].append(1e6 * value / new_tokens)
    # The first call warms up.
    middle = {name: round(statistics.median(values[1:]), 1) for name, values in taken.items()}
    return {"base_us": middle["base"], "on_us": middle["on"], "added_us": {part: middle[part] for part in PARTS}}


if __name__ == "__main__":
    main()
