"""FlowRuntime: what an attached model keeps of StepFlow, and what it does around the model's forward pass.

Before it, the new tokens are labelled and a `FlowPass` is handed down to attention; after it, the state is left on the
cache that the model made, and what attention reached is checked.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.utils import logging

from .configuration_stepflow import StepFlowSettings
from .errors import StepFlowInputError, StepFlowUnsupportedError
from .flow_attention import AttentionLink
from .flow_pass import FlowPass, FlowPlan
from .flow_state import FlowState, carry, state_of
from .report import FlowReport
from .steps import StepVocabulary
from .tally import Tally

logger = logging.get_logger(__name__)

_STEP_SETTINGS = (
    "implicit_thinking", "min_step_chars", "oeb_span", "step_rule", "summary_start", "thinking_start", "tool_end",
    "tool_start",
)  # fmt: skip

# Step rules of a tokenizer that are kept for when they are asked for again: each holds tables of the whole vocabulary,
# which take a second to make.
_LIMIT = 8
_VOCABULARIES: "WeakKeyDictionary[Any, dict[tuple[Any, ...], StepVocabulary]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class FlowRules:
    """Settings resolved against one model and its tokenizer."""

    plan: FlowPlan
    vocabulary: StepVocabulary


class _ThreadSlot(threading.local):
    """What belongs to one thread: nested overrides of the settings, the prompt's length, and the pass that runs."""

    def __init__(self) -> None:
        self.overrides: list[FlowRules | None] = []
        self.cut_by: StepVocabulary | None = None
        self.prompt_length: int | None = None
        self.current: FlowPass | None = None


class FlowRuntime:
    """StepFlow on one model.

    Attributes:
        rules: the preset, in force where no call overrides it.
        tokenizer: the model's tokenizer.
        heads: {layer: query heads} of its softmax attention layers.
        base_implementation: the attention implementation underneath.
        last: the state and plan of the last pass, for the report.
        for_everyone: whether it is on in every thread; else only inside a block with settings of its own.
    """

    def __init__(
        self,
        settings: StepFlowSettings,
        tokenizer: Any,
        heads: dict[int, int],
        base_implementation: str,
        ends: list[int],
        for_everyone: bool = True,
    ):
        self.tokenizer = tokenizer
        self.heads = heads
        self.base_implementation = base_implementation
        self.end_of_turn_ids = ends
        self.for_everyone = for_everyone
        self.last: tuple[FlowState, FlowPlan] | None = None
        self.hands_down: bool | None = None
        self._slot = _ThreadSlot()
        self._vocabularies = _VOCABULARIES.setdefault(tokenizer, {})
        self._plans: dict[str, FlowPlan] = {}
        self.rules = self.rules_for(settings)

    @property
    def settings(self) -> StepFlowSettings:
        """The preset's settings."""
        return self.rules.plan.settings

    def __getstate__(self) -> dict[str, Any]:
        kept = dict(self.__dict__)
        del kept["_slot"]
        return kept | {"last": None}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update(kept, _slot=_ThreadSlot())

    def plan_for(self, settings: StepFlowSettings) -> FlowPlan:
        """Settings resolved against this model, checked once."""
        key = repr(settings)
        if key not in self._plans:
            self._plans[key] = FlowPlan.resolve(settings, self.heads)
        return self._plans[key]

    def vocabulary_for(self, settings: StepFlowSettings) -> StepVocabulary:
        """The step rules for these settings, built once; inside of `cutting`, those that were given there."""
        if self._slot.cut_by is not None:
            return self._slot.cut_by
        named = (repr(getattr(settings, name)) for name in _STEP_SETTINGS)
        key = (len(self.tokenizer), *self.end_of_turn_ids, *named)
        if key not in self._vocabularies:
            if len(self._vocabularies) >= _LIMIT:
                del self._vocabularies[next(iter(self._vocabularies))]
            self._vocabularies[key] = StepVocabulary.from_tokenizer(
                self.tokenizer, settings, end_of_turn_ids=self.end_of_turn_ids
            )
        return self._vocabularies[key]

    def rules_for(self, settings: StepFlowSettings) -> FlowRules:
        """Settings resolved against this model and its tokenizer.

        Raises:
            StepFlowConfigError: settings that do not fit them.
        """
        return FlowRules(self.plan_for(settings), self.vocabulary_for(settings))

    @contextmanager
    def override(self, rules: FlowRules | None, prompt_length: int | None = None) -> Iterator[None]:
        """Other settings (None: StepFlow off) for the calls of this thread inside the block."""
        slot = self._slot
        outer = slot.prompt_length
        slot.overrides.append(rules)
        slot.prompt_length = prompt_length
        try:
            yield
        finally:
            slot.overrides.pop()
            slot.prompt_length = outer
            slot.current = None

    @contextmanager
    def cutting(self, vocabulary: StepVocabulary) -> Iterator[None]:
        """Inside the block, settings of calls of this thread get these step rules, whatever they ask for.

        For controls that cut a trace where its text does not.
        """
        outer, self._slot.cut_by = self._slot.cut_by, vocabulary
        try:
            yield
        finally:
            self._slot.cut_by = outer

    @property
    def effective(self) -> FlowRules | None:
        """The settings in force in this thread; None where StepFlow is off."""
        overrides = self._slot.overrides
        return overrides[-1] if overrides else self.rules if self.for_everyone else None

    @property
    def is_overridden(self) -> bool:
        """Whether this thread is inside a block with settings of its own."""
        return bool(self._slot.overrides)

    def current(self) -> FlowPass | None:
        """The pass that runs in this thread; None where StepFlow is off.

        Raises:
            StepFlowUnsupportedError: StepFlow is on, but attention was reached on a way around the model's forward.
        """
        if self._slot.current is None and self._active_rules() is not None:
            raise StepFlowUnsupportedError(
                "StepFlow is on, but the model's attention was called without the model's forward",
                hint="call the attached model itself, not a part of it or a forward kept or compiled before StepFlow "
                "was attached; or call inside `with model.disable_stepflow():`",
            )
        return self._slot.current

    def _active_rules(self) -> FlowRules | None:
        """The settings in force, if they ask for anything."""
        rules = self.effective
        return None if rules is None or rules.plan.is_idle else rules

    def link(self, layer: int) -> AttentionLink:
        """What an attention module of this model needs to know."""
        return AttentionLink(layer, self.current)

    def run(
        self, model: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The forward pass of an attached model.

        Args:
            model: the model.
            forward: its own forward, a function.
            args: what it was called with.
            kwargs: what it was called with by name; `prompt_length` is StepFlow's own.
        """
        prompt_length = kwargs.pop("prompt_length", None)
        parameters, takes_more = _parameters(forward)
        rules = self._active_rules()
        if rules is None:
            # Said outright: layers that are recomputed for a backward pass ask again when the settings may be others.
            return forward(model, *args, **kwargs, **({"stepflow_pass": False} if takes_more else {}))
        kwargs = dict(zip(parameters, args, strict=False)) | kwargs
        flow = self._begin(model, rules, kwargs, prompt_length)
        if takes_more:
            kwargs["stepflow_pass"] = flow
        if torch.compiler.is_compiling():
            return forward(model, **kwargs)
        self._slot.current = flow
        try:
            output = forward(model, **kwargs)
        finally:
            self._slot.current = None
        self._finish(model, flow, output)
        return output

    def _begin(
        self, model: torch.nn.Module, rules: FlowRules, kwargs: dict[str, Any], prompt_length: int | None
    ) -> FlowPass:
        """Labels the new tokens."""
        compiling = torch.compiler.is_compiling()
        ids = kwargs.get("input_ids")
        if ids is None:
            raise StepFlowInputError(
                "StepFlow reads steps from token ids, but the model was called with inputs_embeds",
                hint="pass input_ids, or call inside `with model.disable_stepflow():`",
            )
        cache = kwargs.get("past_key_values")
        mask = kwargs.get("attention_mask")
        state, cached = self._state(cache, rules.vocabulary, ids, mask)
        known = self._slot.prompt_length
        if prompt_length is None and known is not None and rules.plan.settings.implicit_thinking and not compiling:
            prompt_length = known + state.virtual_tokens
        padding = _padding(mask, ids, state.length if cached is None else cached)
        records, host = state.append(ids, padding, prompt_length, cached, mask)
        if compiling:
            flow = FlowPass(rules.plan, state, records, None, torch.as_tensor(state.length))
        else:
            flow = FlowPass(rules.plan, state, records, host, state.length if host is None else state.count)
        if compiling and self.hands_down is False:
            raise StepFlowUnsupportedError(
                f"{type(model).__name__} does not hand arguments down to attention, so StepFlow cannot be compiled",
                hint="generate without compilation, or detach StepFlow",
            )
        self.last = (state, rules.plan)
        return flow

    def _state(
        self, cache: Any, vocabulary: StepVocabulary, ids: torch.Tensor, mask: Any
    ) -> "tuple[FlowState, torch.Tensor | None]":
        """The state that rides on the cache, a fresh one where there is none.

        It is brought to the cache's length, unless that is on the device: then the length comes with it, to be read
        together with the new tokens.
        """
        state = state_of(cache)
        if state is not None:
            if torch.compiler.is_compiling():
                return state, None
            length = cache.get_seq_length()
            is_same = state.batch == ids.shape[0] and state.vocabulary is vocabulary
            if is_same and isinstance(length, torch.Tensor):
                return state, length
            cached = int(length)
            if cached and state.batch != ids.shape[0]:
                raise StepFlowInputError(
                    f"the cache was labelled for {state.batch} rows, but input_ids has {ids.shape[0]}",
                    hint="change the rows of a cache by its own batch_repeat_interleave or batch_select_indices",
                )
            if state.batch == ids.shape[0]:
                state.follow(cached, mask)
                if state.vocabulary is not vocabulary:
                    state.relabel(vocabulary)
                return state, None
        capacity = None
        if cache is not None and getattr(cache, "is_compileable", False):
            capacity = _capacity(cache)
        state = FlowState(vocabulary, ids.shape[0], ids.device, capacity)
        state.tally = Tally(ids.shape[0], tuple(sorted(self.heads)), ids.device)
        if cache is not None:
            state.follow(int(cache.get_seq_length()), mask)
            if ids.shape[1] == self._slot.prompt_length:  # the whole prompt: what lies before it is none of it
                state.virtual_tokens = state.count
            carry(cache, state)
        return state, None

    def _finish(self, model: Any, flow: FlowPass, output: Any) -> None:
        """Leaves the state on a cache that the model made itself, and checks what attention saw."""
        wanted = set(flow.plan.tau) | flow.plan.inject | set(flow.plan.gamma)
        self.hands_down = flow.is_handed_down
        # Drafts by early exit run the first layers only, and the config says how many.
        depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
        missed = [layer for layer in sorted(wanted - flow.seen_layers) if depth is None or layer < depth]
        if missed:
            raise StepFlowUnsupportedError(
                f"layers {missed} of {type(model).__name__} did not call StepFlow's attention function",
                hint="name layers in oeb_layers and smi_layers that run, or detach StepFlow from this model",
            )
        parts = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        for made in parts:
            if hasattr(made, "get_seq_length") and state_of(made) is None:
                carry(made, flow.state)

    def report(self) -> FlowReport:
        """What the last generate or forward did.

        Raises:
            StepFlowInputError: nothing has run yet.
        """
        if self.last is None:
            raise StepFlowInputError(
                "there is nothing to report: no pass has run with StepFlow on", hint="call generate or forward first"
            )
        return FlowReport.of(*self.last, tokenizer=self.tokenizer)


_PARAMETERS: dict[Callable[..., Any], tuple[list[str], bool]] = {}


def _parameters(forward: Callable[..., Any]) -> tuple[list[str], bool]:
    """Names of the arguments of a model's forward, and whether it takes free keyword arguments."""
    if forward not in _PARAMETERS:
        parameters = inspect.signature(forward).parameters
        free = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        _PARAMETERS[forward] = list(parameters)[1:], free
    return _PARAMETERS[forward]


def _capacity(cache: Any) -> int:
    """Slots of a cache with static shapes."""
    lengths = [layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len")]
    windows = [layer for layer in cache.layers if getattr(layer, "is_sliding", False)]
    if len(windows) == len(lengths):
        return 1 << 16  # sliding layers alone tell nothing of the trace's length
    return max(lengths)


def _padding(mask: Any, ids: torch.Tensor, before: "int | torch.Tensor") -> torch.Tensor | None:
    """Which of the new tokens are padding, bool [B, q], or None if none is.

    A 2D mask says it outright (it may be longer than the tokens so far); in a 4D one padding is a token that does not
    see itself.
    """
    if isinstance(mask, dict):
        masks = [mask.get("full_attention"), *mask.values()]
        mask = next((value for value in masks if value is not None), None)
    if not isinstance(mask, torch.Tensor):
        return None
    queries = ids.shape[1]
    if mask.ndim == 2:
        last = mask.shape[1] - queries
        if isinstance(before, int):
            start = min(before, last)
            return (mask[:, start : start + queries] == 0).to(ids.device)
        slots = torch.arange(queries, device=mask.device) + before.to(mask.device).clamp(max=last)
        return (mask.index_select(1, slots) == 0).to(ids.device)
    if mask.ndim != 4:
        return None
    keys = mask.shape[-1]
    slots = torch.arange(queries, device=mask.device) + before
    offset = torch.clamp(torch.as_tensor(before + queries - keys, device=mask.device), min=0)
    own = mask[:, 0].gather(2, (slots - offset)[None, :, None].expand(mask.shape[0], -1, 1))[..., 0]
    seen = own if mask.dtype == torch.bool else own > torch.finfo(mask.dtype).min / 2
    return (~seen).expand(ids.shape[0], -1).to(ids.device)
