"""The architecture sweep: StepFlow on a tiny model of any causal model type of transformers.

`scripts/architectures.py` runs it over every model type and writes docs/architectures.md.
"""

import inspect
import math
import os
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import LogitsProcessor

from hf_stepflow.runtime.errors import StepFlowUnsupportedError
from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM
from hf_stepflow.runtime.settings import StepFlowSettings
from hf_stepflow.runtime.trace import segment_trace
from tests.support.attention_calls import AttentionCall, expected_call, normal, recorded_calls
from tests.support.flow import byte_tokenizer, encode, error
from tests.support.tiny_models import UNBUILDABLE, tiny_model

TOLERANCE = 1e-5
# Two runs of the base model that differ by more than this differ in what they compute, not in rounding.
BASE_DIFFERS = 1e-4

QUESTION, REST = "Who?", "<think>One red. Two blue. Three green.</think>Three.\n\nBye now."
PROMPT, PADDING = len("Who?.One red. Two bl"), 5  # the prompt ends inside the second step; a marker is one token
SETTINGS = StepFlowSettings(tau_max=0.3, alpha=0.2, min_step_chars=3)
OFF = SETTINGS.replace(tau_max=0.0, alpha=0.0)
# A floor so low that the bridge computes every layer anew and moves nothing.
NEUTRAL = SETTINGS.replace(tau_max=1e-12, alpha=0.0, oeb_layers="all")


@dataclass(frozen=True)
class SweepResult:
    """What the sweep found for one model type.

    Attributes:
        model_type: the `model_type` of its config.
        status: "supported", "refused" or "not built".
        reason: why it is not supported.
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
    """StepFlow attaches to a model type and then serves it wrongly."""


class _Rounding(Exception):
    """A check missed the tolerance in float32, in a model that amplifies rounding."""


def check_model_type(model_type: str, **overrides: Any) -> SweepResult:
    """Puts StepFlow on a tiny model of a model type and checks all that docs/architectures.md says.

    Args:
        model_type: one of `causal_model_types()`.
        **overrides: config fields, as for `tiny_model`.

    Raises:
        SweepFailure: a check failed.
    """
    if model_type in UNBUILDABLE:
        return SweepResult(model_type, "not built", UNBUILDABLE[model_type])
    try:
        return _Sweep(model_type, tiny_model(model_type, **overrides)).run()
    except _Rounding as rounding:
        model = tiny_model(model_type, dtype=torch.float64, **overrides)
        return _Sweep(model_type, model, f"checked in float64: in float32 {rounding}").run()


class _Sweep:
    """The checks of one model."""

    def __init__(self, model_type: str, model: Any, *notes: str):
        self.model_type, self.model, self.notes = model_type, model, list(notes)
        self.ids = torch.tensor([encode(QUESTION + REST)])
        self.trace = segment_trace(byte_tokenizer(), self.ids, SETTINGS)

    def run(self) -> SweepResult:
        model, before = self.model, _appearance(self.model)
        try:
            StepFlowModelForCausalLM.attach(model, SETTINGS, tokenizer=byte_tokenizer())
        except StepFlowUnsupportedError as refusal:
            self.demand(_appearance(model) == before, "the refusal leaves marks on the model")
            return SweepResult(self.model_type, "refused", refusal.message)
        name, layers = model.stepflow_runtime.base_implementation, len(model.stepflow_runtime.heads)
        on = self.forward()
        with model.disable_stepflow():
            off, off_decoded = self.forward(), self.decoded()
        self.demand(error(on, off) > 10 * TOLERANCE, "StepFlow has no effect")
        self.check_routes(on, error(off_decoded, off[:, PROMPT - 1 : -1]))

        model.stepflow_config = OFF
        self.demand(torch.equal(self.forward(), off), "tau_max = 0 and alpha = 0 is not the base model")
        model.stepflow_config = NEUTRAL
        self.close(self.forward(), off, "a bridge that moves nothing moves the logits")
        self.close(self.decoded(), off_decoded, "a bridge that moves nothing moves the logits of decode")
        model.detach_stepflow()
        self.demand(_appearance(model) == before, "detaching leaves marks on the model")
        self.demand(torch.equal(self.forward(), off), "disable_stepflow() is not the base model")

        model.set_attn_implementation("eager")
        off_gap = error(self.forward(), off)
        StepFlowModelForCausalLM.attach(model, SETTINGS, tokenizer=byte_tokenizer())
        with recorded_calls(model) as calls:
            self.close(self.forward(), on, "eager attention gives other logits", off_gap)
        self.check_calls(calls)
        return SweepResult(self.model_type, "supported", "", name, layers, tuple(self.notes))

    def forward(self) -> torch.Tensor:
        """Logits [1, T, V] of the trace, teacher-forced, at the positions that generation gives."""
        inputs = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            inputs["position_ids"] = torch.arange(self.ids.shape[1])[None]
        with torch.no_grad():
            return self.model(**inputs).logits

    def decoded(self, is_padded: bool = False) -> torch.Tensor:
        """Logits [1, T - prompt, V] of the trace after its prompt, token by token with a cache, padded or not."""
        ids, mask = self.ids, torch.ones_like(self.ids)
        if is_padded:
            longer = torch.tensor([encode(QUESTION + " " * PADDING + REST)])
            ids = torch.cat((torch.nn.functional.pad(ids, (PADDING, 0)), longer))
            mask = torch.ones_like(ids)
            mask[0, :PADDING] = 0
        prompt = PROMPT + ids.shape[1] - self.ids.shape[1]
        out = self.model.generate(
            ids[:, :prompt],
            attention_mask=mask[:, :prompt],
            max_new_tokens=ids.shape[1] - prompt,
            do_sample=False,
            eos_token_id=None,
            logits_processor=[_Forced(ids)],
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits, 1)[:1]

    def check_routes(self, on: torch.Tensor, off_gap: float) -> None:
        """Decode and left padding give what the forward pass gives, wherever they do in the base model."""
        decoded = self.decoded()
        self.close(decoded, on[:, PROMPT - 1 : -1], "decode differs from the forward pass", off_gap)
        gap = error(self.decoded(is_padded=True), decoded)
        with self.model.disable_stepflow():
            off_gap = error(self.decoded(is_padded=True), self.decoded()) if gap > TOLERANCE else 0.0
        self.judge(gap, "left padding changes the logits", off_gap)

    def check_calls(self, calls: list[AttentionCall]) -> None:
        """Every call of attention against docs/method.md, and the report against the calls."""
        runtime, plan = self.model.stepflow_runtime, self.model.stepflow_runtime.plan_for(SETTINGS)
        reports = {layer.layer: layer for layer in self.model.stepflow_report().rows[0].layers}
        self.demand([call.layer for call in calls] == list(plan.layers), "layers are not called once each, in order")
        for call in calls:
            where = f"in layer {call.layer}"
            self.demand(len(call.weights) == runtime.heads[call.layer], f"the query heads are miscounted {where}")
            tau_max = SETTINGS.tau_max if call.layer in plan.tau else 0.0
            alpha = SETTINGS.alpha if call.layer in plan.inject else 0.0
            weights, output, numbers = expected_call(call, self.trace, tau_max, alpha)
            gap = float((normal(call.weights) - normal(weights)).abs().max())
            self.demand(gap <= TOLERANCE, f"the attention is off by {gap:.1e} {where}")
            self.close(call.output, output, f"wrong head outputs {where}")
            if told := reports.get(call.layer):
                lifted = round(told.bridge_queries * (told.bridged_share or 0))
                self.demand(numbers == (told.bridge_queries, lifted, told.injections), f"the report is wrong {where}")
        seen = [any(getattr(told, name) for told in reports.values()) for name in ("bridged_share", "injections")]
        self.demand(all(seen), f"bridge and injection are ever seen: {seen}")

    def demand(self, holds: bool, message: str) -> None:
        if not holds:
            raise SweepFailure(f"{self.model_type}: {message}")

    def close(self, got: torch.Tensor, expected: torch.Tensor, message: str, off_gap: float = 0.0) -> None:
        """Demands equality within the tolerance, unless the base model itself does not give it."""
        self.judge(error(got, expected), message, off_gap)

    def judge(self, gap: float, message: str, off_gap: float) -> None:
        if gap <= TOLERANCE:
            return
        if off_gap > BASE_DIFFERS:
            self.notes.append(f"{message}, in the base model too")
            return
        is_routed = any("expert" in name for name, _ in self.model.named_modules())
        if self.model.dtype == torch.float32 and (off_gap > TOLERANCE or is_routed):
            cause = f"in the base model by {off_gap:.0e}" if off_gap > TOLERANCE else "as rounding flips its routing"
            raise _Rounding(f"{message} by {gap:.0e}, {cause}")
        self.demand(False, f"{message} by {gap:.1e} (the base model alone: {off_gap:.1e})")


class _Forced(LogitsProcessor):
    """Makes generation write given tokens [B, T]."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -math.inf).scatter(1, self.ids[:, input_ids.shape[1], None], 0.0)


def _appearance(model: Any) -> tuple[Any, ...]:
    """What attaching changes on a model, and detaching has to give back."""
    modules = list(model.modules())
    names = [getattr(getattr(module, "config", None), "_attn_implementation", None) for module in modules]
    attributes = [sorted(module.__dict__) for module in modules]
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    return type(model), names, attributes, hooks, str(model.generation_config)
