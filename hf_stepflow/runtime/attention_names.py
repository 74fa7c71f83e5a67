"""Which attention implementations StepFlow runs on, and the names under which its own are registered."""

import hashlib
from collections.abc import Iterable
from typing import Any

from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import StepFlowUnsupportedError
from .flow_attention import make_flow_attention
from .repository_code import code_files

# A name of its own for each copy of this code (a preset repo brings one), free of names that models look for.
STAMP = hashlib.sha256(b"".join(file.read_bytes() for file in code_files("modeling_stepflow"))).hexdigest()[:8]
_NAMES = {"eager": "plain", "flex_attention": "flexible", "sdpa": "fused"}


def base_implementation(modules: Iterable[Any]) -> str:
    """The attention implementation that these modules look up, if StepFlow can run on it.

    Raises:
        StepFlowUnsupportedError: it cannot.
    """
    name, *others = sorted({module.config._attn_implementation or "eager" for module in modules})
    if others or name not in _NAMES:
        raise StepFlowUnsupportedError(
            f"StepFlow does not run on attn_implementation={', '.join(map(repr, (name, *others)))}",
            hint='load the model with attn_implementation="sdpa" (which has flash kernels of its own) or "eager"',
        )
    return name


def register_on(base: str) -> str:
    """Registers StepFlow's attention on top of a base implementation (once) and returns its name."""
    name = f"stepflow_{STAMP}_{_NAMES[base]}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, make_flow_attention(base))
    return name
