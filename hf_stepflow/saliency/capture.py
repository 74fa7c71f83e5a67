"""Puts Step-Saliency's attention on a model for one pass, and restores the model exactly."""

import copy
import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_stepflow.runtime.attention import AttentionCall, Output, make_flow_attention
from hf_stepflow.runtime.attention_interface import AttentionLink
from hf_stepflow.runtime.errors import StepFlowUnsupportedError
from hf_stepflow.runtime.forward import FlowPass, FlowRules


class KeptOutputs:
    """Keeps what attention computed in one layer, so that computing the layer again leaves attention out."""

    def __init__(self) -> None:
        self._outputs: deque[Any] = deque()
        self.is_again = False

    def once(self, compute: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]) -> Any:
        """Returns what `compute` returned the first time."""
        if self.is_again:
            return self._outputs.popleft()
        found = compute()
        # Autograd makes the tensors that it is given part of its graph.
        self._outputs.append(tuple(None if one is None else one.detach() for one in found))
        return found


Attend = Callable[[AttentionCall, KeptOutputs | None], Output]

# One call at a time has a model.
_LOCKS: "weakref.WeakKeyDictionary[Any, threading.Lock]" = weakref.WeakKeyDictionary()


class Capture:
    """A model whose attention can be replaced for one pass.

    Args:
        model: A causal language model, StepFlow attached or not.
        modules: Its self-attention modules by layer.
    """

    def __init__(self, model: Any, modules: dict[int, Any]):
        self.model = model
        self.modules = modules
        self._is_over = False
        self._kept: KeptOutputs | None = None
        self._runtime: Any = getattr(model, "stepflow_runtime", None)

    @property
    def rules(self) -> FlowRules | None:
        """The StepFlow settings in force; None where StepFlow is off or not attached."""
        return None if self._runtime is None else self._runtime.effective

    def stepflow_off(self) -> AbstractContextManager[Any]:
        """Switches StepFlow off inside the block."""
        return nullcontext() if self._runtime is None else self.model.disable_stepflow()

    @property
    def device(self) -> torch.device:
        """The device that token ids go to."""
        embedding = self.model.get_input_embeddings()
        if embedding.weight.device.type != "meta":
            return embedding.weight.device
        return torch.device(embedding._hf_hook.execution_device)  # offloaded by accelerate

    @property
    def decoder(self) -> Any:
        """The module that turns tokens into hidden states: the one with the list of layers.

        Raises:
            StepFlowUnsupportedError: If that is the model itself.
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
                f"{type(self.model).__name__} makes hidden states and logits in one module; Step-Saliency needs them "
                "apart",
                hint="see docs/architectures.md for the model types that StepFlow runs on",
            )
        return found

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits for other calls on this model, and keeps StepFlow's last report as it is.

        Raises:
            StepFlowUnsupportedError: If gradients cannot pass through the model.
        """
        if any(one.is_inference() for one in self.model.parameters()):
            raise StepFlowUnsupportedError(
                "the model was made inside torch.inference_mode(), so that no gradient can pass through it",
                hint="load it outside of that block",
            )
        with _LOCKS.setdefault(self.model, threading.Lock()), ExitStack() as undo:
            if self._runtime is not None:
                for name in ("last", "hands_down"):
                    undo.callback(setattr, self._runtime, name, getattr(self._runtime, name))
            yield

    @contextmanager
    def running(self, run: Callable[[], Any], attend: Attend, *, checkpoints: bool) -> Iterator[Any]:
        """Yields the decoder's output in `run`; all self-attention goes through `attend` until the block ends.

        Gradients flow to activations only. Layers that are computed again in the block see the pass of `run`.

        Args:
            run: Calls the model.
            attend: Computes attention, from the call and what keeps its output.
            checkpoints: Whether each layer keeps only its inputs and the outputs of attention for the backward pass
                and is computed again there.
        """
        with ExitStack() as undo:
            self._take(undo, attend, checkpoints)
            outputs: list[Any] = []
            with self.decoder.register_forward_hook(lambda module, args, output: outputs.append(output)):
                run()
            self._is_over = True
            yield outputs[-1]

    def _take(self, undo: ExitStack, attend: Attend, checkpoints: bool) -> None:
        self._is_over = False
        owner = threading.get_ident()

        def attend_in_thread(call: AttentionCall) -> Output:
            # On devices other than the CPU, autograd computes layers again in threads of its own.
            if threading.get_ident() != owner and (call.query.device.type == "cpu" or not self._is_over):
                raise StepFlowUnsupportedError(
                    "the model was called in another thread while step_saliency uses it",
                    hint="call it afterwards, or give each thread its own model",
                )
            return attend(call, self._kept)

        for module in self.model.modules():
            if module.training:
                undo.callback(setattr, module, "training", True)
                module.training = False
            # Names are kept, not parameters: offloading makes new ones.
            names = [name for name, one in module._parameters.items() if one is not None and one.requires_grad]
            if names:
                undo.callback(_require_grad, module, names, True)
                _require_grad(module, names, False)
        for layer, module in self.modules.items():
            self._take_attention(undo, layer, module, attend_in_thread)
        self._take_masks(undo)
        undo.callback(_put_back, [(module.__dict__, _tensors(module)) for module in self.model.modules()])
        if checkpoints:
            self._checkpoint(undo)
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())

    def _take_attention(
        self, undo: ExitStack, layer: int, module: Any, attend: Callable[[AttentionCall], Output]
    ) -> None:
        link: AttentionLink | None = module.__dict__.get("stepflow_link")
        flow: FlowPass | None = None

        def current() -> FlowPass | None:
            nonlocal flow
            if not self._is_over and link is not None:
                flow = link.current()
            return flow

        replace_attribute(undo, module, "stepflow_link", AttentionLink(layer, current))
        replace_attribute(undo, module, "saliency_attend", attend)

    def _take_masks(self, undo: ExitStack) -> None:
        """Makes the model build masks for this attention. Configs are copied: others may hold them too."""
        text = type(self.model.config.get_text_config(decoder=True))
        attention = set(self.modules.values())
        if self._runtime is not None:
            base = self._runtime.base_implementation
        else:
            base = next(iter(self.modules.values())).config._attn_implementation or "eager"
        for module in self.model.modules():
            config = module.__dict__.get("config")
            is_text = isinstance(config, PretrainedConfig) and (isinstance(config, text) or module is self.model)
            if is_text or module in attention:
                replace_attribute(undo, module, "config", copy.copy(config))
                module.config._attn_implementation_internal = _register(base)

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
            again = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=self._keeping
            )
            replace_attribute(undo, block, "forward", again)

    def _keeping(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of a layer's first computation and of its second."""
        kept = KeptOutputs()

        @contextmanager
        def computing(is_again: bool) -> Iterator[None]:
            before, self._kept, kept.is_again = self._kept, kept, is_again
            try:
                yield
            finally:
                self._kept = before

        return computing(False), computing(True)


def replace_attribute(undo: ExitStack, module: Any, name: str, value: Any) -> None:
    """Sets an attribute of the instance until `undo` closes."""
    if name in module.__dict__:
        undo.callback(setattr, module, name, module.__dict__[name])
    else:
        undo.callback(module.__dict__.pop, name, None)
    setattr(module, name, value)


def _require_grad(module: torch.nn.Module, names: list[str], required: bool) -> None:
    for name in names:
        parameter = module._parameters[name]
        if parameter is not None:
            parameter.requires_grad_(required)


def _tensors(module: torch.nn.Module) -> dict[str, Any]:
    """The attributes of a module, its buffers aside, that are tensors or may become some."""
    return {name: one for name, one in module.__dict__.items() if one is None or isinstance(one, torch.Tensor)}


def _put_back(kept: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Removes tensors that a recurrent layer left on itself: they hold the graph."""
    for attributes, before in kept:
        for name, one in before.items():
            if attributes.get(name) is not one:
                attributes[name] = one


def _attend(module: Any, call: AttentionCall) -> Output:
    return module.saliency_attend(call)


def _register(base: str) -> str:
    """Registers the attention and the mask function on top of a base implementation (once) and returns their name."""
    name = f"stepflow_saliency_{base}".replace("sdpa", "fused").replace("flash", "quick")  # models look for these
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, make_flow_attention(base, _attend))
        AttentionMaskInterface.register(name, RowMask.make)
    return name


class RowMask(torch.Tensor):
    """A bool mask [B, 1, q, K] that exists as the arguments it is made from, so that no [q, K] tensor is held.

    Slicing its queries writes out these rows; any other operation writes out the whole mask.
    """

    arguments: dict[str, Any]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment] # operations get tensors

    @classmethod
    def make(cls, **arguments: Any) -> "RowMask | None":
        """Makes the mask for Transformers' mask interface; None where attention is plainly causal."""
        # Asked with a mask function of one element, sdpa_mask decides without writing the mask out.
        if sdpa_mask(**arguments | {"mask_function": _everything, "use_vmap": False}) is None:
            return None
        arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        row = sdpa_mask(**arguments | {"q_length": 1})
        assert row is not None
        shape = (*row.shape[:2], arguments["q_length"], row.shape[3])
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=row.device)
        mask.arguments = arguments
        return mask

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # a class method, as PyTorch documents it
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.slice.Tensor and args[1] == 2 and len(args) == 4:
            return args[0]._rows(args[2], min(args[3], args[0].shape[2]))
        args, kwargs = tree_map_only(cls, lambda mask: mask._rows(0, mask.shape[2]), (args, kwargs or {}))
        return function(*args, **kwargs)

    def _rows(self, start: int, end: int) -> torch.Tensor:
        first = self.arguments.get("q_offset", 0) + start
        rows = sdpa_mask(**self.arguments | {"q_length": end - start, "q_offset": first})
        assert rows is not None
        return rows


def _everything(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
