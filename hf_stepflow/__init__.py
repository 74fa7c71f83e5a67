"""StepFlow for Hugging Face transformers: keeps the information between the steps of a reasoning model flowing.

The names below are imported when they are first used, so that `import hf_stepflow` costs nothing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluation.arms import Arm, combine_arms
    from .evaluation.result import EvaluationResult
    from .evaluation.run import evaluate
    from .evaluation.scoring import score_traces
    from .presets.preset import Preset, list_presets, load_preset
    from .problems import load_problems
    from .reasoner import load_reasoner
    from .runtime.bridge import odds_equal_bridge
    from .runtime.configuration_stepflow import StepFlowConfig
    from .runtime.errors import StepFlowError
    from .runtime.logits_process import StepBoundaryLogitsProcessor, StepBudgetLogitsProcessor, StepStreamer
    from .runtime.modeling_stepflow import StepFlowModelForCausalLM
    from .runtime.momentum import step_momentum
    from .runtime.report import FlowReport
    from .runtime.step_detector import StepVocabulary
    from .runtime.trace import Trace, TraceStep, segment_trace
    from .saliency.api import step_saliency
    from .saliency.result import StepSaliency

_HOMES = {
    "Arm": "evaluation.arms",
    "EvaluationResult": "evaluation.result",
    "FlowReport": "runtime.report",
    "Preset": "presets.preset",
    "StepBoundaryLogitsProcessor": "runtime.logits_process",
    "StepBudgetLogitsProcessor": "runtime.logits_process",
    "StepFlowConfig": "runtime.configuration_stepflow",
    "StepFlowError": "runtime.errors",
    "StepFlowModelForCausalLM": "runtime.modeling_stepflow",
    "StepSaliency": "saliency.result",
    "StepStreamer": "runtime.logits_process",
    "StepVocabulary": "runtime.step_detector",
    "Trace": "runtime.trace",
    "TraceStep": "runtime.trace",
    "combine_arms": "evaluation.arms",
    "evaluate": "evaluation.run",
    "list_presets": "presets.preset",
    "load_preset": "presets.preset",
    "load_problems": "problems",
    "load_reasoner": "reasoner",
    "odds_equal_bridge": "runtime.bridge",
    "preset_for": "presets.preset",
    "score_traces": "evaluation.scoring",
    "segment_trace": "runtime.trace",
    "step_momentum": "runtime.momentum",
    "step_saliency": "saliency.api",
}

__all__ = [
    "Arm",
    "EvaluationResult",
    "FlowReport",
    "Preset",
    "StepBoundaryLogitsProcessor",
    "StepBudgetLogitsProcessor",
    "StepFlowConfig",
    "StepFlowError",
    "StepFlowModelForCausalLM",
    "StepSaliency",
    "StepStreamer",
    "StepVocabulary",
    "Trace",
    "TraceStep",
    "combine_arms",
    "evaluate",
    "list_presets",
    "load_preset",
    "load_problems",
    "load_reasoner",
    "odds_equal_bridge",
    "score_traces",
    "segment_trace",
    "step_momentum",
    "step_saliency",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("hf-stepflow")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
