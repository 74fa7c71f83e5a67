"""Which attention modules of a model StepFlow acts on, on which implementations, and under which registered names.

Modules are found by what their code does: they call Transformers' attention interface. Everything else that matters
(the layer, causality, the arguments of attention) is read from the module or that call, not from a list of names.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import make_flow_attention
from .errors import StepFlowUnsupportedError
from .forward import FlowPass

# Each copy of this code (a preset repository brings one) has its own name, free of words that models look for.
STAMP = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()[
    :8
]
_NAMES = {"eager": "plain", "flex_attention": "flexible", "sdpa": "fused"}

# Arguments that StepFlow's attention applies or need not know; a model that hands down anything else is refused.
ATTENTION_ARGUMENTS = frozenset(
    "attention_mask dropout head_mask is_causal output_attentions position_bias position_ids s_aux scaling "
    "sliding_window softcap".split()
)

_HINT = "see docs/architectures.md for the model types that StepFlow runs on"


@dataclass
class AttentionLink:
    """Connects an attention module of an attached model to StepFlow.

    Attributes:
        layer: Index of the layer.
        current: Returns the pass of this thread, for families that do not hand it down as an argument; raises where
            StepFlow is on and no pass runs.
    """

    layer: int
    current: Callable[[], FlowPass | None]


def attention_modules(model: Any) -> dict[int, Any]:
    """The self-attention module of each layer that has softmax attention.

    Args:
        model: A causal language model; towers for images or audio are left out.

    Raises:
        StepFlowUnsupportedError: The model has none, or StepFlow would miss or distort what it computes.
    """
    name = type(model).__name__
    candidates = [module for module in model.modules() if _interface_calls(type(module))]
    if not candidates:
        raise StepFlowUnsupportedError(
            f"{name} does not use Transformers' attention interface, so StepFlow cannot reach its attention",
            hint=_HINT,
        )
    modules = [module for module in candidates if _is_self_attention(module)]
    if not modules:
        raise StepFlowUnsupportedError(
            f"{name} has no causal self-attention in Transformers' attention interface: {_class_names(candidates)} "
            "is cross-attention or does not call itself causal",
            hint="a model that can be encoder and decoder has to be loaded with is_decoder=True in its config",
        )
    text_config = type(model.config.get_text_config(decoder=True))
    own = [module for module in modules if type(getattr(module, "config", None)) is text_config]
    found: dict[int, Any] = {}
    for module in own or modules:
        layer = getattr(module, "layer_idx", None)
        if type(layer) is not int or layer < 0:
            raise StepFlowUnsupportedError(
                f"{type(module).__name__} has no layer index of its own (layer_idx={layer!r}), so bands of layers "
                "have no meaning in this model",
                hint=_HINT,
            )
        if layer in found:
            raise StepFlowUnsupportedError(
                f"{name} has more than one self-attention module at layer index {layer} ({type(module).__name__}), so "
                "bands of layers have no meaning in this model",
                hint=_HINT,
            )
        _check_call(module)
        found[layer] = module
    return dict(sorted(found.items()))


def query_heads(model: Any, module: torch.nn.Module) -> int:
    """Number of query heads of an attention module."""
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    config = getattr(module, "config", model.config)
    return config.get_text_config(decoder=True).num_attention_heads


def _class_names(modules: list[torch.nn.Module]) -> str:
    return ", ".join(sorted({type(module).__name__ for module in modules}))


def _is_self_attention(module: torch.nn.Module) -> bool:
    return "Cross" not in type(module).__name__ and getattr(module, "is_causal", True) is not False


def _check_call(module: torch.nn.Module) -> None:
    """Refuses modules that ask of attention what StepFlow's does not do."""
    kind = type(module)
    layer_type = str(getattr(module, "layer_type", None))
    if "compressed" in layer_type:
        raise StepFlowUnsupportedError(
            f"{kind.__name__} ({layer_type}) has keys that stand for many tokens at once and so belong to no step",
            hint=_HINT,
        )
    calls = _interface_calls(kind)
    if len(calls) > 1:
        raise StepFlowUnsupportedError(
            f"{kind.__name__} combines {len(calls)} attention calls per layer; StepFlow cannot guarantee the floor "
            "for their sum",
            hint=_HINT,
        )
    unknown = sorted(calls[0] - ATTENTION_ARGUMENTS)
    if unknown:
        raise StepFlowUnsupportedError(
            f"{kind.__name__} hands {', '.join(unknown)} to attention, which StepFlow's attention does not apply",
            hint=_HINT,
        )


_CALLS: dict[type, list[set[str]]] = {}


def _interface_calls(kind: type) -> list[set[str]]:
    """The calls of the attention interface in the forward of a module class, each as the names of its arguments."""
    if kind not in _CALLS:
        try:
            source = inspect.getsource(kind.forward)  # type: ignore[attr-defined]
        except (AttributeError, OSError, TypeError):
            source = ""
        nodes = ast.walk(ast.parse(textwrap.dedent(source))) if "attention_interface(" in source else ()
        _CALLS[kind] = [
            {argument.arg for argument in node.keywords if argument.arg is not None}
            for node in nodes
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attention_interface"
        ]
    return _CALLS[kind]


def base_implementation(modules: Iterable[Any]) -> str:
    """The attention implementation that these modules look up, if StepFlow can run on it.

    Raises:
        StepFlowUnsupportedError: It cannot.
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
