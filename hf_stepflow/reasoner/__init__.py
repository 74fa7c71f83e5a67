"""The embedded reasoner: a tiny model that thinks in steps, its problems, and how it was trained."""

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "model"


def load_reasoner(stepflow: Any = None, *, dtype: Any = "float32") -> tuple[Any, Any]:
    """Loads the reasoner with StepFlow attached, and its tokenizer.

    `AutoModelForCausalLM.from_pretrained(FOLDER)` loads the same model without StepFlow.

    Args:
        stepflow: The settings, as for `StepFlowModelForCausalLM.from_pretrained`.
        dtype: The dtype to load the weights in. They are stored in bfloat16, which float32 represents exactly.

    Example:
        >>> from hf_stepflow import load_reasoner
        >>> model, tokenizer = load_reasoner({"tau_max": 0.15})
    """
    from transformers import AutoTokenizer

    from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = StepFlowModelForCausalLM.from_pretrained(FOLDER, stepflow=stepflow, tokenizer=tokenizer, dtype=dtype)
    return model.eval(), tokenizer
