"""StepFlow for Hugging Face transformers: keeps the information between the steps of a reasoning model flowing.

The names below are imported when they are first used, so that `import hf_stepflow` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runtime.bridge import odds_equal_bridge
    from .runtime.configuration_stepflow import StepFlowConfig
    from .runtime.errors import StepFlowError
    from .runtime.logits_process import StepBoundaryLogitsProcessor, StepBudgetLogitsProcessor, StepStreamer
    from .runtime.modeling_stepflow import StepFlowModelForCausalLM
    from .runtime.momentum import step_momentum
    from .runtime.report import FlowReport
    from .runtime.steps import StepVocabulary
    from .runtime.trace import Trace, TraceStep, segment_trace

_HOMES = {
    "FlowReport": "report",
    "StepBoundaryLogitsProcessor": "logits_process",
    "StepBudgetLogitsProcessor": "logits_process",
    "StepFlowConfig": "configuration_stepflow",
    "StepFlowError": "errors",
    "StepFlowModelForCausalLM": "modeling_stepflow",
    "StepStreamer": "logits_process",
    "StepVocabulary": "steps",
    "Trace": "trace",
    "TraceStep": "trace",
    "odds_equal_bridge": "bridge",
    "segment_trace": "trace",
    "step_momentum": "momentum",
}

__all__ = [
    "FlowReport",
    "StepBoundaryLogitsProcessor",
    "StepBudgetLogitsProcessor",
    "StepFlowConfig",
    "StepFlowError",
    "StepFlowModelForCausalLM",
    "StepStreamer",
    "StepVocabulary",
    "Trace",
    "TraceStep",
    "odds_equal_bridge",
    "segment_trace",
    "step_momentum",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".runtime.{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
