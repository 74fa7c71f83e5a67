"""Puts Step-Saliency's attention on a model for the time of one pass, and leaves the model exactly as it was."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_stepflow.runtime.attention import AttentionCall, AttentionLink, Output, make_flow_attention
from hf_stepflow.runtime.errors import StepFlowUnsupportedError
from hf_stepflow.runtime.forward import FlowPass

from .row_mask import RowMask

Attend = Callable[[AttentionCall], Output]


@dataclass
class _Recall:
    """Gives a layer its pass again where it is computed a second time, after the pass is over.

    Attributes:
        current: asks for the pass of this thread.
        is_over: the pass is over, and what it was is given.
        flow: the pass.
    """

    current: Callable[[], FlowPass | None]
    is_over: bool = False
    flow: FlowPass | None = None

    def __call__(self) -> FlowPass | None:
        if not self.is_over:
            self.flow = self.current()
        return self.flow


class Watch:
    """A model under observation.

    Args:
        model: a causal language model, StepFlow attached or not.
        modules: its self-attention modules by layer.
    """

    def __init__(self, model: Any, modules: dict[int, Any]):
        self.model = model
        self.modules = modules
        # Some models work on their masks before attention gets them, and need tensors.
        self.masks_by_row = True
        self.is_over = False
        self._recalls: list[_Recall] = []

    @contextmanager
    def attending(self, attend: Attend, *, checkpoints: bool) -> Iterator[None]:
        """Within the block all self-attention goes through `attend`, gradients flow to activations alone.

        Args:
            attend: computes attention.
            checkpoints: keep only the inputs of each layer for the backward pass and compute the layer again there.
        """
        self._recalls, self.is_over = [], False
        with ExitStack() as undo:
            for module in self.model.modules():
                if module.training:
                    undo.callback(setattr, module, "training", True)
                    module.training = False
            self._freeze(undo)
            for layer, module in self.modules.items():
                self._take_attention(undo, layer, module, attend)
            self._take_masks(undo)
            undo.callback(_put_back, [(module.__dict__, _tensors(module)) for module in self.model.modules()])
            if checkpoints:
                self._checkpoint(undo)
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.enable_grad())
            yield

    @property
    def decoder(self) -> Any:
        """The module that makes hidden states of tokens: the one that holds the list of layers.

        Raises:
            StepFlowUnsupportedError: it is the model itself.
        """
        first = next(iter(self.modules.values()))
        (path,) = (name for name, module in self.model.named_modules() if module is first)
        found = self.model
        for name in path.split("."):
            inner = getattr(found, name)
            if isinstance(inner, torch.nn.ModuleList):
                break
            found = inner
        if found is self.model or found is first:
            raise StepFlowUnsupportedError(
                f"{type(self.model).__name__} makes hidden states and logits in one module, and Step-Saliency needs "
                "them apart",
                hint="see docs/architectures.md for the model types that StepFlow runs on",
            )
        return found

    def forward_is_over(self) -> None:
        """From here on layers are computed for the backward pass."""
        self.is_over = True
        for recall in self._recalls:
            recall.is_over = True

    def _freeze(self, undo: ExitStack) -> None:
        """Gives no parameter a gradient. Names are kept, not objects: offloading makes new ones."""
        for module in self.model.modules():
            names = [name for name, one in module._parameters.items() if one is not None and one.requires_grad]
            if names:
                undo.callback(_require_grad, module, names, True)
                _require_grad(module, names, False)

    def _take_attention(self, undo: ExitStack, layer: int, module: Any, attend: Attend) -> None:
        link: AttentionLink | None = module.__dict__.get("stepflow_link")
        recall = _Recall((lambda: None) if link is None else link.current)
        self._recalls.append(recall)
        if link is None:
            undo.callback(module.__dict__.pop, "stepflow_link", None)
        else:
            undo.callback(setattr, module, "stepflow_link", link)
        undo.callback(module.__dict__.pop, "saliency_attend", None)
        module.stepflow_link = AttentionLink(layer, recall)
        module.saliency_attend = attend

    def _take_masks(self, undo: ExitStack) -> None:
        """Has the model make masks for this attention. Configs are copied: others may hold them too."""
        text = type(self.model.config.get_text_config(decoder=True))
        attention = set(self.modules.values())
        base = self._base()
        for module in self.model.modules():
            config = module.__dict__.get("config")
            is_text = isinstance(config, PretrainedConfig) and (isinstance(config, text) or module is self.model)
            if is_text or module in attention:
                undo.callback(setattr, module, "config", config)
                module.config = copy.copy(config)
                module.config._attn_implementation_internal = _register(base, self.masks_by_row)

    def _base(self) -> str:
        """The attention implementation underneath."""
        runtime = getattr(self.model, "stepflow_runtime", None)
        if runtime is not None:
            return runtime.base_implementation
        return next(iter(self.modules.values())).config._attn_implementation or "eager"

    def _checkpoint(self, undo: ExitStack) -> None:
        blocks = [
            module
            for module in self.model.modules()
            if isinstance(module, GradientCheckpointingLayer)
            and any(inner in self.modules.values() for inner in module.modules())
        ]
        if not blocks:
            raise StepFlowUnsupportedError(
                f"{type(self.model).__name__} has no layers that Transformers can checkpoint",
                hint="pass checkpoints=False",
            )
        for block in blocks:
            own = block.__dict__.get("forward")
            if own is None:
                undo.callback(block.__dict__.pop, "forward", None)
            else:
                undo.callback(setattr, block, "forward", own)
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def _require_grad(module: torch.nn.Module, names: list[str], required: bool) -> None:
    for name in names:
        parameter = module._parameters[name]
        if parameter is not None:
            parameter.requires_grad_(required)


def _tensors(module: torch.nn.Module) -> dict[str, Any]:
    """What a module keeps outside of its buffers that is a tensor, or may become one."""
    return {name: one for name, one in module.__dict__.items() if one is None or isinstance(one, torch.Tensor)}


def _put_back(kept: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Takes tensors that a recurrent layer left on itself off again: they hold the graph."""
    for attributes, before in kept:
        for name, one in before.items():
            if attributes.get(name) is not one:
                attributes[name] = one


def _register(base: str, masks_by_row: bool) -> str:
    """Registers the attention and the mask function on top of a base implementation (once) and returns their name."""
    name = f"stepflow_saliency_{base}_{'rows' if masks_by_row else 'whole'}"
    name = name.replace("sdpa", "fused").replace("flash", "quick")  # names that models look for
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, make_flow_attention(base, lambda module, call: module.saliency_attend(call)))
        AttentionMaskInterface.register(name, RowMask.make if masks_by_row else sdpa_mask)
    return name
