"""The architecture sweep: every causal model type of transformers, tiny, with StepFlow on it: supported or refused.

`python tests/sweep.py llama qwen3` checks some, `python tests/sweep.py` all; with `--write` docs/architectures.md is
written anew.
"""

import argparse
import inspect
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from flow_support import byte_tokenizer, encode, error
from tiny_models import UNBUILDABLE, causal_model_types, tiny_model
from transformers import AttentionInterface, LogitsProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_stepflow.runtime.configuration_stepflow import StepFlowSettings
from hf_stepflow.runtime.errors import StepFlowUnsupportedError
from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM
from hf_stepflow.runtime.trace import Trace, segment_trace

TOLERANCE = 1e-5
# Above this two runs of the base model differ in what they compute, not in rounding.
BASE_DIFFERS = 1e-2
EFFECT = 1e-4

TRACE = "Who?<think>One red. Two blue. Three green.</think>Three.\n\nBye now."
PROMPT = len("Who?.One red. Two bl")  # inside the second step; the marker is one token
PADDING = 5
SETTINGS = StepFlowSettings(tau_max=0.3, alpha=0.2, min_step_chars=3)
NEUTRAL = SETTINGS.replace(tau_max=1e-12, alpha=0.0, oeb_layers="all")
OFF = SETTINGS.replace(tau_max=0.0, alpha=0.0)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"


@dataclass(frozen=True)
class SweepResult:
    """What the sweep found for one model type.

    Attributes:
        model_type: the `model_type` of its config.
        status: "supported", "refused" or "not built".
        reason: why not.
        base_implementation: the attention implementation underneath.
        layers: number of layers of the tiny model on which StepFlow can act.
        notes: exceptions that the checks had to make, with their causes.
    """

    model_type: str
    status: str
    reason: str = ""
    base_implementation: str = ""
    layers: int = 0
    notes: tuple[str, ...] = ()


class SweepFailure(AssertionError):
    """A model type that StepFlow attaches to and then serves wrongly.

    Attributes:
        is_rounding: whether rounding may be the cause, so that float64 would tell.
    """

    def __init__(self, message: str, is_rounding: bool = False):
        super().__init__(message)
        self.is_rounding = is_rounding


@dataclass
class _Call:
    """One call of attention: its layer, values [Hkv, T, D], and weights [H, T, T] and outputs [T, H, D] of both."""

    layer: int
    value: torch.Tensor
    base_weights: torch.Tensor
    base_output: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor


def _appearance(model: Any) -> tuple[Any, ...]:
    """What attaching changes on a model, and detaching has to give back."""
    modules = dict(model.named_modules())
    implementations = [getattr(getattr(module, "config", None), "_attn_implementation", None) for module in modules.values()]
    attributes = [sorted(module.__dict__) for module in modules.values()]
    return type(model), implementations, attributes, model.generation_config.to_dict(), len(model._forward_hooks), len(model._forward_pre_hooks)


class _Forced(LogitsProcessor):
    """Makes generation write given tokens, [B, T]."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -math.inf)
        return forced.scatter(1, self.ids[:, input_ids.shape[1], None], 0.0)


def check_model_type(model_type: str) -> SweepResult:
    """Puts StepFlow on a tiny model of a model type and checks all that it promises.

    Raises:
        SweepFailure: a check failed.
    """
    if model_type in UNBUILDABLE:
        return SweepResult(model_type, "not built", UNBUILDABLE[model_type])
    try:
        return _Sweep(model_type, torch.float32).run()
    except SweepFailure as failure:
        if not failure.is_rounding:
            raise
        return _Sweep(model_type, torch.float64, [f"checked in float64, as in float32 {failure}"]).run()


class _Sweep:
    """The checks of one model type in one dtype."""

    def __init__(self, model_type: str, dtype: torch.dtype, notes: list[str] | None = None):
        self.model_type = model_type
        self.model: Any = tiny_model(model_type, dtype=dtype)
        self.is_routed = any("expert" in name for name, _ in self.model.named_modules())
        self.is_exact = dtype == torch.float64
        self.notes = notes or []
        self.ids = torch.tensor([encode(TRACE)])
        self.trace = segment_trace(byte_tokenizer(), self.ids, SETTINGS)

    def run(self) -> SweepResult:
        model, before = self.model, _appearance(self.model)
        try:
            StepFlowModelForCausalLM.attach(model, SETTINGS, tokenizer=byte_tokenizer())
        except StepFlowUnsupportedError as refusal:
            self.demand(_appearance(model) == before, "a refusal leaves its marks")
            return SweepResult(self.model_type, "refused", refusal.message)
        name, layers = model.stepflow_runtime.base_implementation, len(model.stepflow_runtime.heads)

        with model.disable_stepflow():
            base = self.forward()
        full = self.forward()
        self.demand(error(full, base) > EFFECT, "StepFlow has no effect")
        self.check_routes(base, full)
        for settings, is_same in ((OFF, True), (NEUTRAL, False)):
            model.stepflow_config = settings
            got = self.forward()
            if is_same:
                self.demand(torch.equal(got, base), "tau_max = 0 and alpha = 0 is not the base model")
            else:
                self.close(got, base, "a bridge that moves nothing moves the logits", lambda: 0.0)
                self.close(
                    self.generated(self.ids), base[:, PROMPT - 1 : -1], "so it does in decode", lambda: self.decode_gap(base)
                )
        model.detach_stepflow()
        self.demand(_appearance(model) == before, "detaching leaves its marks")
        self.demand(torch.equal(self.forward(), base), "disable_stepflow() is not the base model")

        model.set_attn_implementation("eager")
        StepFlowModelForCausalLM.attach(model, SETTINGS, tokenizer=byte_tokenizer())
        (config, _), *_ = model._stepflow_replaced
        with _spied(config._attn_implementation) as calls:
            eager = self.forward()
        self.close(eager, full, f"eager attention and {name} differ", lambda: 0.0)
        self.check_calls(calls)
        return SweepResult(self.model_type, "supported", "", name, layers, tuple(self.notes))

    def forward(self) -> torch.Tensor:
        """Logits [1, T, V] of the trace, teacher-forced, with the positions that generation would give."""
        inputs = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            inputs["position_ids"] = torch.arange(self.ids.shape[1])[None]
        with torch.no_grad():
            return self.model(**inputs).logits

    def generated(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Logits [B, T - prompt, V] of the same tokens, the last of them decoded one by one with a cache."""
        prompt = PROMPT + ids.shape[1] - self.ids.shape[1]
        mask = torch.ones_like(ids) if mask is None else mask
        out = self.model.generate(
            ids[:, :prompt],
            attention_mask=mask[:, :prompt],
            max_new_tokens=ids.shape[1] - prompt,
            do_sample=False,
            eos_token_id=None,
            logits_processor=[_Forced(ids)],
            output_logits=True,
            return_dict_in_generate=True,
            **kwargs,
        )
        return torch.stack(out.logits, 1)

    def padded(self, **kwargs: Any) -> torch.Tensor:
        """As `generated` for the trace, padded on the left beside a longer row."""
        ids = torch.nn.functional.pad(self.ids, (PADDING, 0))
        ids = torch.cat((ids, torch.tensor([encode(TRACE[:4] + " " * PADDING + TRACE[4:])])))
        mask = torch.ones_like(ids)
        mask[0, :PADDING] = 0
        return self.generated(ids, mask, **kwargs)[:1]

    def check_routes(self, base: torch.Tensor, full: torch.Tensor) -> None:
        """Decode and left padding give what the whole trace gives, wherever they do in the base model."""
        decoded = self.generated(self.ids)
        self.close(decoded, full[:, PROMPT - 1 : -1], "decode is not forward", lambda: self.decode_gap(base))
        self.close(
            self.padded(),
            decoded,
            "left padding changes the logits",
            lambda: error(self.padded(stepflow=False), self.generated(self.ids, stepflow=False)),
        )

    def decode_gap(self, base: torch.Tensor) -> float:
        return error(self.generated(self.ids, stepflow=False), base[:, PROMPT - 1 : -1])

    def check_calls(self, calls: list[_Call]) -> None:
        """Every call of attention against METHOD sections 3 and 4, and the report against the calls."""
        runtime = self.model.stepflow_runtime
        plan = runtime.plan_for(SETTINGS)
        reports = {layer.layer: layer for layer in self.model.stepflow_report().rows[0].layers}
        total = {"bridged": 0, "injections": 0}
        self.demand([call.layer for call in calls] == list(plan.layers), "a layer is called twice, or not at all")
        for call in calls:
            where = f"in layer {call.layer}"
            self.demand(call.weights.shape[0] == runtime.heads[call.layer], f"the heads are miscounted {where}")
            expected, usable, bridged = call.base_weights, 0, 0
            if call.layer in plan.tau:
                expected, usable, bridged = _bridged(call.base_weights, self.trace)
            got = call.weights / call.weights.sum(-1, keepdim=True)
            gap = float((got - expected / expected.sum(-1, keepdim=True)).abs().max())
            self.demand(gap < TOLERANCE, f"the attention is off its floor by {gap:.1e} {where}")
            value = call.value.repeat_interleave(expected.shape[0] // call.value.shape[0], 0)
            mixed = call.base_weights @ value
            # Not 1 where a family applies its sinks to the output instead of the weights.
            scale = (call.base_output.transpose(0, 1) * mixed).sum(-1, keepdim=True) / (mixed * mixed).sum(-1, keepdim=True)
            scale = scale.nan_to_num(1.0)
            addition, injections = _injected(call, self.trace) if call.layer in plan.inject else (0.0, 0)
            output = (expected @ value * scale).transpose(0, 1) + addition
            self.close(call.output, output, f"the head outputs are wrong {where}", lambda: 0.0)

            if call.layer in reports:
                report = reports[call.layer]
                lifted = round((report.bridged_share or 0.0) * report.bridge_queries)
                told = (report.bridge_queries, lifted, report.injections)
                self.demand(told == (usable, bridged, injections), f"the report tells {told} {where}")
            total["bridged"] += bridged
            total["injections"] += injections
        self.demand(all(total.values()), f"nothing to see: {total}")

    def demand(self, holds: bool, message: str, is_rounding: bool = False) -> None:
        if not holds:
            raise SweepFailure(f"{self.model_type}: {message}", is_rounding and not self.is_exact)

    def close(self, got: torch.Tensor, expected: torch.Tensor, message: str, base_gap: Any) -> None:
        """Demands equality within the tolerance, or names what the base model itself does."""
        gap = error(got, expected)
        if gap <= TOLERANCE:
            return
        own = base_gap()
        if own > BASE_DIFFERS:
            note = f"{message}, in the base model too"
            self.notes += [note] if note not in self.notes else []
            return
        cause = f"{message} by {gap:.1e} (the base model's own gap: {own:.1e})"
        self.demand(False, cause, is_rounding=own > TOLERANCE or self.is_routed)


@contextmanager
def _spied(name: str) -> Iterator[list[_Call]]:
    """Records every call of a registered attention function by a module that StepFlow is linked to."""
    calls: list[_Call] = []
    original = ALL_ATTENTION_FUNCTIONS[name]

    def spy(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        output, weights = original(module, query, key, value, attention_mask, **kwargs)
        if hasattr(module, "stepflow_link"):
            kwargs.pop("stepflow_pass", None)
            eager = sys.modules[type(module).__module__].eager_attention_forward
            base_output, base_weights = eager(module, query, key, value, attention_mask, **kwargs)
            call = _Call(module.stepflow_link.layer, value[0], base_weights[0], base_output[0], weights[0], output[0])
            calls.append(call)
        return output, weights

    AttentionInterface.register(name, spy)
    try:
        yield calls
    finally:
        AttentionInterface.register(name, original)


def _bridged(weights: torch.Tensor, trace: Trace) -> tuple[torch.Tensor, int, int]:
    """The Odds-Equal Bridge on attention weights [H, T, T], and how many (head, query) it looked at and lifted."""
    labels = trace.segment_ids
    weights, usable, lifted = weights.clone(), 0, 0
    for query in ((labels > 0) & (trace.step_ids > 0)).nonzero().flatten().tolist():
        row = weights[:, query]
        groups = [(row > 0) & (labels == label) for label in (labels[query], labels[query] - 1)]
        n_same, n_bridge = (group.sum(-1) for group in groups)
        same, bridge = ((row * group).sum(-1) for group in groups)
        floor = (n_bridge / (n_bridge + n_same)).sqrt().clamp(max=SETTINGS.tau_max) * (same + bridge)
        is_usable = (n_same > 0) & (n_bridge > 0)
        is_lifted = is_usable & (bridge < floor)
        factor = torch.where(groups[1], (floor / bridge)[:, None], ((same + bridge - floor) / same)[:, None])
        weights[:, query] = torch.where(is_lifted[:, None] & (groups[0] | groups[1]), row * factor, row)
        usable, lifted = usable + int(is_usable.sum()), lifted + int(is_lifted.sum())
    return weights, usable, lifted


def _injected(call: _Call, trace: Trace) -> tuple[torch.Tensor, int]:
    """What Step Momentum Injection adds to the head outputs [T, H, D], and at how many tokens."""
    addition, number = torch.zeros_like(call.output), 0
    thinking = [step for step in trace.steps if step.label == "thinking"]
    summary = [step for step in trace.steps if step.label == "summary"]
    for before, step in zip(thinking, [*thinking[1:], summary[0]], strict=True):
        seen = call.base_weights[0, step.start, before.start : before.end] > 0
        if seen.any():
            mean = call.value[:, before.start : before.end][:, seen].mean(1)
            addition[step.start] = SETTINGS.alpha * mean.repeat_interleave(addition.shape[1] // mean.shape[0], 0)
            number += 1
    return addition, number


def page(results: list[SweepResult]) -> str:
    """docs/architectures.md."""
    numbers = {status: sum(result.status == status for result in results) for status in ("supported", "refused", "not built")}
    lines = [HEAD.format(version=transformers.__version__, types=len(results), **{k.replace(" ", "_"): v for k, v in numbers.items()})]
    for result in sorted(results, key=lambda result: result.model_type):
        remark = result.reason or "; ".join(result.notes)
        lines.append(f"| {result.model_type} | {result.status} | {result.base_implementation} | {result.layers or ''} | {remark} |")
    return "\n".join(lines) + "\n"


HEAD = "{version}"
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--write", action="store_true", help="write docs/architectures.md (all model types)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = []
    import time, traceback
    for t in args.model_types or causal_model_types():
        t0=time.time()
        try:
            r = check_model_type(t); results.append(r)
            print(f"{time.time()-t0:.1f}", r, flush=True)
        except Exception as e:
            if not isinstance(e, SweepFailure): traceback.print_exc()
            print(t, "FAIL", type(e).__name__, e, flush=True)


if __name__ == "__main__":
    main()
