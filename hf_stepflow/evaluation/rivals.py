"""Other methods that steer attention towards a part of the prompt, as arms of an evaluation.

Each method adds a bias to the logits of attention, which multiplies the weights by its exponential and normalises them
again. The methods act on every query of the prompt and of the response, and on the keys of the prompt: the emphasised
ones are those of the question. Keys of the response get no bias.

Not here: SEKA (arXiv 2603.01281). It edits keys before their rotation, which no attention function sees, along
directions learned from contrastive prompts of its own, with gains and thresholds tuned for each model and task.

Shapes: B rows of attention, P prompts (B is a multiple of P), H query heads, c queries of a chunk, K keys.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_stepflow.runtime.attention import AttentionCall, Output, visible_keys
from hf_stepflow.runtime.attention_interface import attention_modules, base_implementation, query_heads
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowUnsupportedError, shown
from hf_stepflow.runtime.forward import cache_of

# The name of the attention function, free of words that models look for.
_NAME = "steered_towards_question"

# Logits of a chunk of queries, in elements.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Rival:
    """A method with its parameters; each method is a subclass."""

    kind: ClassVar[str]

    def acts_in(self, layer: int) -> bool:
        """Whether the method changes attention in a layer; the others run the model's own kernel."""
        raise NotImplementedError

    def bias(self, layer: int, logits: torch.Tensor, emphasised: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """The bias that the method adds to logits.

        Args:
            layer: The layer.
            logits: [B, H, c, K], -inf for keys that a query does not see.
            emphasised: bool [B, 1, 1, K], the keys of the question.
            prompt: bool [K], the keys of the prompt, the emphasised ones included.

        Returns:
            A tensor that broadcasts with the logits; finite.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Pasta(Rival):
    """PASTA: Zhang et al., "Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs", arXiv 2311.02262.

    Section 3.1: in the chosen heads, A_ij becomes alpha * A_ij / C_i for the keys j of the prompt that are not
    emphasised, and A_ij / C_i for those that are, where C_i makes the weights of query i sum to 1. Weights of
    generated tokens are not scaled, as in the authors' code, which adds log(alpha) to the attention mask of the input.

    The paper chooses the heads by profiling: it steers one head at a time, ranks heads by the accuracy on training
    problems, and takes those that rank high in several tasks. No choice carries over to another model.

    Attributes:
        alpha: The factor on weights outside the question; 1 changes nothing. 0.01 is the paper's.
        heads: The query heads, {layer: [heads]}; a list of layers, with all their heads; or "all".

    Raises:
        StepFlowConfigError: A parameter is out of range.
    """

    kind: ClassVar[str] = "pasta"
    alpha: float = 0.01
    heads: "str | list[int] | dict[int, list[int]]" = "all"

    def __post_init__(self) -> None:
        _check_number(self, "alpha", self.alpha, "in (0, 1]", lambda value: 0 < value <= 1)
        if isinstance(self.heads, dict):
            try:
                table = {int(layer): heads for layer, heads in self.heads.items()}
            except (TypeError, ValueError):
                raise _bad_heads(self.heads) from None
            if not table or not all(map(_are_indices, table.values())) or min(table) < 0:
                raise _bad_heads(self.heads)
            object.__setattr__(self, "heads", table)
        elif self.heads != "all" and not _are_indices(self.heads):
            raise _bad_heads(self.heads)

    def acts_in(self, layer: int) -> bool:
        """As `Rival`."""
        return self.alpha < 1 and (self.heads == "all" or layer in self.heads)

    def bias(self, layer: int, logits: torch.Tensor, emphasised: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """As `Rival`."""
        heads = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        if isinstance(self.heads, dict):
            heads = torch.zeros_like(heads)
            heads[self.heads[layer]] = True
        scaled = prompt & ~emphasised & heads[:, None, None]
        return torch.where(scaled, math.log(self.alpha), 0.0).to(logits.dtype)


@dataclass(frozen=True)
class SpotLight(Rival):
    """SpotLight: Venkateswaran and Contractor, "Spotlight Your Instructions", arXiv 2505.12025.

    Equations 2 to 5: psi_i is the share of query i's attention that is on the emphasised keys. Where it is below the
    target, log(target / psi_i) is added to their logits, in all heads of all layers. The new share is then
    target / (1 + target - psi_i), which is below the target.

    The share is taken query by query and head by head. The authors' released component takes one share over all heads
    and queries of a layer instead, which would make a response depend on how its prompt is split into passes.

    Attributes:
        target: The share to raise attention towards; 0 changes nothing. 0.2 is the default of the authors' released
            component (agent-lifecycle-toolkit).

    Raises:
        StepFlowConfigError: The target is out of range.
    """

    kind: ClassVar[str] = "spotlight"
    target: float = 0.2

    def __post_init__(self) -> None:
        _check_number(self, "target", self.target, "in [0, 1)", lambda value: 0 <= value < 1)

    def acts_in(self, layer: int) -> bool:
        """As `Rival`."""
        return self.target > 0

    def bias(self, layer: int, logits: torch.Tensor, emphasised: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """As `Rival`."""
        on_question = logits.masked_fill(~emphasised, float("-inf")).logsumexp(-1, keepdim=True)
        missing = math.log(self.target) - (on_question - logits.logsumexp(-1, keepdim=True))
        # Not finite where a query sees nothing of the question, or nothing at all.
        missing = torch.where(missing.isfinite(), missing.clamp(min=0.0), 0.0)
        return torch.where(emphasised, missing, 0.0)


@dataclass(frozen=True)
class InstABoost(Rival):
    """InstABoost: Guardieiro et al., "Instruction Following by Boosting Attention of LLMs", arXiv 2506.13734.

    Version 1 of the paper multiplies the weights of the emphasised keys by M and normalises each query's weights, in
    all heads of all layers; version 3 adds a constant to the logits, which is the same with the constant log(M).

    Attributes:
        factor: M; 1 changes nothing. The paper chooses it for each task on validation problems, in the authors' code
            from 1, 3, ..., 19; 3 is the default of their function.

    Raises:
        StepFlowConfigError: The factor is out of range.
    """

    kind: ClassVar[str] = "instaboost"
    factor: float = 3.0

    def __post_init__(self) -> None:
        _check_number(self, "factor", self.factor, "of at least 1", lambda value: 1 <= value < math.inf)

    def acts_in(self, layer: int) -> bool:
        """As `Rival`."""
        return self.factor != 1

    def bias(self, layer: int, logits: torch.Tensor, emphasised: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """As `Rival`."""
        return torch.where(emphasised, math.log(self.factor), 0.0).to(logits.dtype)


RIVALS: dict[str, type[Rival]] = {one.kind: one for one in (Pasta, SpotLight, InstABoost)}


def make_rival(kind: Any, parameters: Any) -> Rival:
    """Makes a method from its name and its parameters; those that are missing get their defaults.

    Raises:
        StepFlowConfigError: The method or a parameter is unknown, or a value is out of range.

    Example:
        >>> from hf_stepflow.evaluation.rivals import make_rival
        >>> make_rival("instaboost", {"factor": 5})
        InstABoost(factor=5)
    """
    if kind not in RIVALS:
        raise StepFlowConfigError(
            f"unknown method of attention steering {shown(kind)}", hint=f"methods: {', '.join(RIVALS)}"
        )
    known = [field.name for field in fields(RIVALS[kind])]
    if not isinstance(parameters, dict) or parameters.keys() - set(known):
        raise StepFlowConfigError(
            f"{kind} takes the parameters {', '.join(known)}, got {shown(parameters)}",
            hint="StepFlow settings belong to an arm of their own",
        )
    return RIVALS[kind](**parameters)


def parameters_of(rival: Rival) -> dict[str, Any]:
    """All parameters of a method, as `make_rival` takes them."""
    return asdict(rival)


def check_rival(model: Any, rival: Rival) -> None:
    """Refuses a method that a model's attention cannot take.

    Raises:
        StepFlowUnsupportedError: The model's attention is out of reach.
        StepFlowConfigError: A layer or a head does not exist.
    """
    modules = attention_modules(model)
    _base_of(model, modules)
    if not isinstance(rival, Pasta) or isinstance(rival.heads, str):
        return
    table: dict[int, list[int]] = {layer: [] for layer in rival.heads}
    for layer, heads in (rival.heads if isinstance(rival.heads, dict) else table).items():
        if layer not in modules:
            raise StepFlowConfigError(
                f"heads of pasta names the layer {layer}, which has no attention in this model",
                hint=f"layers with attention: {', '.join(map(str, modules))}",
            )
        number = query_heads(model, modules[layer])
        if heads and max(heads) >= number:
            raise StepFlowConfigError(
                f"heads of pasta names the head {max(heads)} of layer {layer}, which has {number} query heads",
                hint=f"heads are counted from 0 to {number - 1}",
            )


@dataclass
class Steering:
    """The state of a rival's attention during one `generate`.

    Attributes:
        rival: The method.
        base: The implementation of attention of the model.
        emphasised: bool [P, width], the question in the prompts, which are padded on the left to one width.
        cached: The number of slots that the cache held before the present pass.
        is_static: Whether the cache also holds slots that are not filled yet.
    """

    rival: Rival
    base: str
    emphasised: torch.Tensor
    cached: int = 0
    is_static: bool = False

    def begin_pass(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Notes the length of the cache; a hook before the forward of the model."""
        cache = cache_of(kwargs)
        self.cached = 0 if cache is None else int(cache.get_seq_length())
        self.is_static = bool(getattr(cache, "is_compileable", False))

    def attend(self, call: AttentionCall) -> Output:
        """Attention with the method, a chunk of queries at a time."""
        batch, heads, queries, _ = call.query.shape
        keys, groups, device = call.key.shape[2], call.key.shape[1], call.query.device
        total = self.cached + queries
        if keys > total and not self.is_static:
            raise StepFlowUnsupportedError(
                f"attention got {keys} keys for {total} tokens, so the keys of the question are not known",
                hint="leave the arms that steer attention out, or take learned prefixes off the model",
            )
        slots = torch.arange(keys, device=device) + max(total - keys, 0)  # sliding layers hold the last slots only
        width = self.emphasised.shape[1]
        prompt = slots < width
        emphasised = self.emphasised.to(device)[:, slots.clamp(max=width - 1)] & prompt
        emphasised = emphasised.repeat_interleave(batch // len(emphasised), 0)[:, None, None]
        outputs, all_weights = [], []
        chunk = max(1, _CHUNK_ELEMENTS // (batch * heads * keys))
        for start in range(0, queries, chunk):
            end = min(start + chunk, queries)
            logits = _visible_logits(call, start, end, slots, total)
            logits = logits + self.rival.bias(call.layer, logits, emphasised, prompt)
            weights = _softmax(logits, call.sink_logits)
            packed = weights.to(call.value.dtype).reshape(batch, groups, -1, keys)
            output = torch.matmul(packed, call.value).view(batch, heads, end - start, -1)
            outputs.append(output.transpose(1, 2))
            if call.wants_weights:
                all_weights.append(weights.to(call.query.dtype))
        return torch.cat(outputs, 1).contiguous(), torch.cat(all_weights, 2) if all_weights else None


@contextmanager
def steered(model: Any, rival: Rival, prompts: Sequence[int], places: Sequence[Sequence[int]]) -> Iterator[None]:
    """Runs a method on a model inside the block; afterwards the model is what it was.

    Args:
        model: The model, with StepFlow off.
        rival: The method.
        prompts: The lengths of the prompts, which are padded on the left to the longest.
        places: For each prompt the places of the emphasised tokens in it.

    Raises:
        StepFlowUnsupportedError: The model's attention is out of reach.
    """
    modules = attention_modules(model)
    emphasised = torch.zeros(len(prompts), max(prompts), dtype=torch.bool)
    for row, (length, own) in enumerate(zip(prompts, places, strict=True)):
        emphasised[row, [max(prompts) - length + place for place in own]] = True
    steering = Steering(rival, _base_of(model, modules), emphasised.to(model.device))
    if _NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(_NAME, _attention)
    with ExitStack() as undo:
        hook = model.register_forward_pre_hook(steering.begin_pass, with_kwargs=True)
        undo.callback(hook.remove)
        for layer, module in modules.items():
            if rival.acts_in(layer):
                undo.callback(setattr, module, "config", module.config)
                undo.callback(module.__dict__.pop, "steering", None)
                module.steering = steering, layer
                # A copy: the model's own config goes on to choose the masks.
                module.config = copy.copy(module.config)
                module.config._attn_implementation_internal = _NAME
        yield


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Output:
    steering, layer = module.steering
    kwargs.pop("stepflow_pass", None)  # an attached model hands it down, also where StepFlow is off
    call = AttentionCall(layer, query, key, value, attention_mask, kwargs, steering.base)
    return steering.attend(call)


def _base_of(model: Any, modules: dict[int, Any]) -> str:
    runtime = getattr(model, "stepflow_runtime", None)
    return base_implementation(modules.values()) if runtime is None else runtime.base_implementation


def _visible_logits(call: AttentionCall, start: int, end: int, slots: torch.Tensor, total: int) -> torch.Tensor:
    """Logits [B, H, c, K] of queries [start, end), -inf for keys that they do not see."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    logits = call.logits(call.query[:, :, start:end], keys)
    if call.mask is None:  # plain causal attention
        visible, bias = slots <= torch.arange(start, end, device=slots.device)[:, None] + total - queries, None
    else:
        visible, bias = visible_keys(None, call.mask, start, end, queries, keys)
    position_bias = call.kwargs.get("position_bias")
    if position_bias is not None:
        logits = logits + position_bias[:, :, start:end, :keys]
    if bias is not None:
        logits = logits + bias
    return logits.masked_fill(~visible, float("-inf"))


def _softmax(logits: torch.Tensor, sink_logits: torch.Tensor | None) -> torch.Tensor:
    """Weights of logits, with learned sinks [H] in the denominator; 0 for a query that sees nothing."""
    total = logits.logsumexp(-1, keepdim=True)
    if sink_logits is not None:
        total = torch.logaddexp(total, sink_logits.to(total.dtype).reshape(1, -1, 1, 1))
    return torch.where(logits.isfinite(), (logits - total).exp(), 0.0)


def _check_number(rival: Rival, name: str, value: Any, expected: str, holds: Any) -> None:
    if type(value) not in (int, float) or not holds(value):
        raise StepFlowConfigError(f"{name} of {rival.kind} must be a number {expected}, got {shown(value)}")


def _are_indices(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) > 0
    return is_list and all(type(one) is int and one >= 0 for one in value) and len(set(value)) == len(value)


def _bad_heads(value: Any) -> StepFlowConfigError:
    return StepFlowConfigError(
        f"heads of pasta must be an object {{layer: [query heads]}}, a list of layers or 'all', got {shown(value)}",
        hint='for instance heads={"3":[0,2],"5":[1]}, which profiling found',
    )
