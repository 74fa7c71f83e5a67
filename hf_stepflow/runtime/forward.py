"""One forward pass of an attached model: settings resolved into a plan, tokens labelled, both handed to attention.

`FlowRuntime` is what an attached model keeps: the settings in force in each thread, and what happens around the
model's own forward. Before the layers it reads the new tokens once, labels them on the state that rides on the KV
cache, and makes a `FlowPass`, which attention reads and nothing changes. After them it checks which layers attention
reached, and leaves the state on a cache that the model made itself.

Shapes: B batch, H query heads, q queries, c some of them, K keys that a layer sees, F record fields.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .bridge import Run, runs_of
from .errors import StepFlowInputError, StepFlowUnsupportedError
from .flow_state import (
    FlowState,
    append_on_host,
    append_uncompiled,
    kernels_on,
    padding_of,
    put_state_on,
    slots_of,
    state_of,
)
from .report import FlowReport, Tally
from .settings import SETTINGS, FlowPlan, StepFlowSettings
from .step_detector import SUMMARY, THINKING, Field, StepVocabulary

# The name of the cache among the arguments of a model's forward, from transformers 5.24 on and before.
_CACHE_NAMES = ("cache", "past_key_values")

_STEP_SETTINGS = tuple(name for name, setting in SETTINGS.items() if setting.labels)

# Step rules that are kept for each tokenizer: each holds tables of the whole vocabulary, which take a second to make.
_LIMIT = 8
_VOCABULARIES: "WeakKeyDictionary[Any, dict[tuple[Any, ...], StepVocabulary]]" = WeakKeyDictionary()

# Rows up to which a decode step labels its tokens on the host, which costs fewer operations than in tensors.
_HOST_ROWS = 32

# New tokens up to which a device with kernels labels them itself: a decode step, or the check of a draft.
_DEVICE_TOKENS = 16


@dataclass(frozen=True)
class FlowRules:
    """Settings resolved against one model and its tokenizer."""

    plan: FlowPlan
    vocabulary: StepVocabulary


@dataclass(frozen=True)
class FlowPass:
    """One forward pass as attention sees it.

    Attributes:
        plan: What happens in which layer.
        state: The records of all slots.
        records: int32 [B, q, F] of the queries.
        host: The same on the host, [B][q][F], or None where nothing is read there (many rows, compiled).
        total: Slots after this pass: an int, or a tensor [] where compiled.
        active: The queries from the first to the last that any row bridges, [first, last); all where it is not known,
            empty where there is none.
        runs: The key ranges of the bridged queries; None where they are not known or do not suffice.
        has_trigger: Whether any query is injected; True where it is not known.
        reached: {layer: whether it got the pass as an argument} of the layers whose attention has run; the one thing
            that attention writes (not where compiled).
        by_mask: What attention found out about each mask: (mask, key, finding). A mask hides what no record knows
            (windows, what a user hides), and layers of a kind share one object, so each is read once a pass.
    """

    plan: FlowPlan
    state: FlowState
    records: torch.Tensor
    host: list[list[list[int]]] | None
    total: "int | torch.Tensor"
    active: tuple[int, int]
    runs: list[Run] | None
    has_trigger: bool
    reached: dict[int, bool] = field(default_factory=dict)
    by_mask: list[tuple[Any, tuple[Any, ...], Any]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        plan: FlowPlan,
        state: FlowState,
        records: torch.Tensor,
        host: list[list[list[int]]] | None,
        total: "int | torch.Tensor",
    ) -> "FlowPass":
        """The pass of some records that the state ends with."""
        if host is None:
            return cls(plan, state, records, host, total, (0, records.shape[1]), None, True)
        slot = int(total) - records.shape[1]
        runs = runs_of(host, slot, plan.settings)
        places = [place for row in host for place, record in enumerate(row) if record[Field.ACTIVE]]
        active = (min(places), max(places) + 1) if places else (0, 0)
        has_trigger = any(record[Field.TRIGGER] for row in host for record in row)
        return cls(plan, state, records, host, total, active, runs, has_trigger)

    def last(self, queries: int) -> "FlowPass":
        """This pass for a layer that computes its last queries only (some families skip the rest of a prefill)."""
        if queries == self.records.shape[1]:
            return self
        host = None if self.host is None else [row[-queries:] for row in self.host]
        part = FlowPass.of(self.plan, self.state, self.records[:, -queries:], host, self.total)
        return replace(part, reached=self.reached, by_mask=self.by_mask)

    def found(self, mask: Any, key: tuple[Any, ...], find: Callable[[], Any]) -> Any:
        """The result of `find` for a mask (by identity), computed once a pass."""
        key = (self.records.shape[1], *key)
        for known, its_key, finding in self.by_mask:
            if known is mask and its_key == key:
                return finding
        self.by_mask.append((mask, key, find()))
        return self.by_mask[-1][2]

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The records of the queries and of all slots on the device of a layer."""
        if device == self.records.device:
            return self.records, self.state.records
        key = "records", device
        return self.found(None, key, lambda: (self.records.to(device), self.state.records.to(device)))

    @property
    def counted(self) -> tuple[torch.Tensor | None, int]:
        """The total as kernels take it: a tensor, or None and the number."""
        return (self.total, 0) if isinstance(self.total, torch.Tensor) else (None, self.total)

    def offset(self, keys: int) -> "int | torch.Tensor":
        """Slot of a layer's first key: sliding layers hold the last slots only, static caches hold empty ones too.

        Raises:
            StepFlowUnsupportedError: There are more keys than tokens.
        """
        if isinstance(self.total, torch.Tensor):
            return (self.total - keys).clamp(min=0)
        if keys > self.total and not self.state.is_static:
            raise StepFlowUnsupportedError(
                f"attention got {keys} keys for {self.total} tokens, so StepFlow cannot tell which key is which token "
                "(it did not find the cache)",
                hint="use a release of transformers that hf-stepflow was tested with, detach StepFlow from this "
                "model, or call it inside `with model.disable_stepflow():`",
            )
        return max(self.total - keys, 0)

    def key_columns(self, keys: int, *fields: int) -> list[torch.Tensor]:
        """Record fields of a layer's keys, int32 [B, K] each; slots not filled yet hold anything."""
        offset = self.offset(keys)
        records = self.state.records
        if isinstance(offset, int) and offset + keys <= records.shape[1]:
            return [records[:, offset : offset + keys, name] for name in fields]
        slots = (torch.arange(keys, device=records.device) + offset).clamp(max=records.shape[1] - 1)
        return list(records.index_select(1, slots)[..., list(fields)].unbind(-1))

    def key_groups(
        self, records: torch.Tensor, keys: int, visible: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Finds the keys of the segment S and of the bridge B of some queries (docs/method.md, "Odds-Equal Bridge").

        Groups are compared by label, which serves any mixture of rounds, tool results and padding.

        Args:
            records: int32 [B, c, F] of the queries.
            keys: Number of keys of the layer, K.
            visible: Bool broadcastable to [B, 1, c, K], or None for all; it may cover the first of the keys alone.

        Returns:
            same, bridge: bool [B, 1 or H, c, K], K as `visible` has it; both empty for queries that OEB leaves alone.
        """
        settings = self.plan.settings
        seen = keys if visible is None or visible.shape[-1] == 1 else visible.shape[-1]
        (labels,) = (column[:, None, None, :seen].to(records.device) for column in self.key_columns(keys, Field.LABEL))
        slots = torch.arange(seen, device=records.device) + self.offset(keys)
        query = records[:, None, :, None, :]
        label = query[..., Field.LABEL]
        active = query[..., Field.ACTIVE] > 0
        same = labels == label
        thinking = label % 3 == THINKING
        if settings.bridge_scope == "step":
            same = same & ((slots >= query[..., Field.STEP_SLOT]) | (label % 3 == SUMMARY))
        bridge = torch.where(thinking, ~same & (labels >= 0), labels == label - 1)
        if settings.sink_tokens:
            first = query[..., Field.FIRST_SLOT]
            bridge = bridge & ~((slots >= first) & (slots < first + settings.sink_tokens))
        same, bridge = same & active, bridge & active
        if visible is not None:
            same, bridge = same & visible, bridge & visible
        return same, bridge


class _ThreadSlot(threading.local):
    """State of one thread: nested overrides of the settings, the prompt's length, and the pass that runs."""

    def __init__(self) -> None:
        self.overrides: list[FlowRules | None] = []
        self.prompt_length: int | None = None
        self.current: FlowPass | None = None


class FlowRuntime:
    """StepFlow on one model.

    Attributes:
        rules: The preset, in force where no call overrides it.
        tokenizer: The model's tokenizer.
        heads: {layer: query heads} of its softmax attention layers.
        base_implementation: The attention implementation underneath.
        last: The state and plan of the last pass, for the report.
        hands_down: Whether the last pass reached attention as an argument everywhere; None before the first.
        is_on: Whether StepFlow runs outside blocks with their own settings. `custom_generate` puts it on a model for
            the calls of one thread alone; calls of other threads then run as if StepFlow were not there.
    """

    def __init__(
        self,
        settings: StepFlowSettings,
        tokenizer: Any,
        heads: dict[int, int],
        base_implementation: str,
        ends: list[int],
        is_on: bool = True,
    ):
        self.tokenizer = tokenizer
        self.heads = heads
        self.base_implementation = base_implementation
        self.end_of_turn_ids = ends
        self.is_on = is_on
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
        """The step rules for these settings, built once for each tokenizer."""
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

        Inside a block with its own rules, settings that ask for the same steps keep the step rules of that block.

        Raises:
            StepFlowConfigError: The settings do not fit them.
        """
        around = self.effective if self.is_overridden else None
        if around is not None and all(
            getattr(settings, name) == getattr(around.plan.settings, name) for name in _STEP_SETTINGS
        ):
            return FlowRules(self.plan_for(settings), around.vocabulary)
        return FlowRules(self.plan_for(settings), self.vocabulary_for(settings))

    @contextmanager
    def override(self, rules: FlowRules | None, prompt_length: int | None = None) -> Iterator[None]:
        """Puts other settings in force (None: StepFlow off) for the calls of this thread inside the block."""
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

    @property
    def effective(self) -> FlowRules | None:
        """The settings in force in this thread; None where StepFlow is off."""
        overrides = self._slot.overrides
        return overrides[-1] if overrides else self.rules if self.is_on else None

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

    def run(
        self, model: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs the forward pass of an attached model.

        Args:
            model: The model.
            forward: The base class's forward, a function.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call; `prompt_length` is StepFlow's own.
        """
        prompt_length = kwargs.pop("prompt_length", None)
        parameters, takes_more = _parameters(forward)
        paged = getattr(kwargs.get("cache"), "stepflow_records", None)  # continuous batching, under rules of its own
        rules = self._active_rules() if paged is None else paged.rules
        if rules is None:
            state = state_of(cache_of(kwargs))
            if state is not None:
                state.is_behind = True
            # Said outright: layers that are recomputed for a backward pass ask again when the settings may be others.
            return forward(model, *args, **kwargs, **({"stepflow_pass": False} if takes_more else {}))
        kwargs = dict(zip(parameters, args, strict=False)) | kwargs
        if paged is None:
            flow = self._begin(model, rules, kwargs, prompt_length)
        else:
            self.last, flow = None, paged.label(kwargs)
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
        if compiling and self.hands_down is False:
            raise StepFlowUnsupportedError(
                f"{type(model).__name__} does not hand arguments down to attention, so StepFlow cannot be compiled",
                hint="generate without compilation, or detach StepFlow",
            )
        ids = kwargs.get("input_ids")
        if kwargs.get("cu_seq_lens_q") is not None:
            raise StepFlowUnsupportedError(
                "StepFlow would read sequences that are packed into one row as one sequence",
                hint="pass them as rows of a padded batch; for continuous batching call generate_batch of the model",
            )
        if ids is None:
            raise StepFlowInputError(
                "StepFlow reads steps from token ids, but the model was called with inputs_embeds",
                hint="pass input_ids, or call inside `with model.disable_stepflow():`",
            )
        mask = kwargs.get("attention_mask")
        state, cached = self._state(cache_of(kwargs), rules.vocabulary, ids, mask)
        known = self._slot.prompt_length
        if prompt_length is None and known is not None and rules.plan.settings.implicit_thinking and not compiling:
            prompt_length = known + state.virtual_tokens
        padding = padding_of(mask, ids, state.length if cached is None else cached)
        kernels = kernels_on(ids.device)
        if kernels is not None and ids.shape[1] <= _DEVICE_TOKENS:
            if cached is not None and state.is_behind:
                state.follow(int(cached), mask)
            records, host = state.append_by_kernel(kernels, ids, padding, prompt_length), None
        elif ids.shape[1] == 1 and (compiling or ids.shape[0] > _HOST_ROWS):
            if cached is not None:
                state.follow(int(cached), mask)
            records, host = state.append_in_tensors(ids, padding, prompt_length), None
        else:
            append = append_uncompiled if compiling else append_on_host
            records, host = append(state, ids, padding, prompt_length, cached, mask)
        if compiling:
            total = torch.as_tensor(state.length, device=ids.device)
            flow = FlowPass.of(rules.plan, state, records, None, total)
        else:
            flow = FlowPass.of(rules.plan, state, records, host, state.length if host is None else state.count)
        state.is_behind = False
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
            capacity = slots_of(cache)
        state = FlowState(vocabulary, ids.shape[0], ids.device, capacity)
        state.tally = Tally(ids.shape[0], self.heads, ids.device, capacity is not None)
        if cache is not None:
            state.follow(int(cache.get_seq_length()), mask)
            if ids.shape[1] == self._slot.prompt_length:  # the whole prompt: what lies before it is no part of it
                state.virtual_tokens = state.count
            put_state_on(cache, state)
        return state, None

    def _finish(self, model: Any, flow: FlowPass, output: Any) -> None:
        """Leaves the state on a cache that the model made itself, and checks what attention saw."""
        self.hands_down = all(flow.reached.values())
        missed: frozenset[int] = flow.plan.changed - flow.reached.keys()
        if missed:
            # Drafts by early exit run the first layers only, and the config says how many.
            depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
            missed = frozenset(layer for layer in missed if depth is None or layer < depth)
        if missed:
            raise StepFlowUnsupportedError(
                f"layers {sorted(missed)} of {type(model).__name__} did not call StepFlow's attention function",
                hint="name layers in oeb_layers and smi_layers that run, or detach StepFlow from this model",
            )
        parts = output if isinstance(output, tuple) else cache_argument(output).values()
        for made in parts:
            if hasattr(made, "get_seq_length") and state_of(made) is None:
                put_state_on(made, flow.state)

    def report(self) -> FlowReport:
        """Reports what the last generate or forward did.

        Raises:
            StepFlowInputError: Nothing has run yet.
        """
        if self.last is None:
            raise StepFlowInputError(
                "there is nothing to report: no pass has run with StepFlow on, or the last one was of continuous "
                "batching, which keeps no report",
                hint="call generate or forward first",
            )
        state, plan = self.last
        records = state.records[:, : state.count].tolist()
        return FlowReport.of(records, state.tally, plan.layers, plan.tau.keys() | plan.inject, self.tokenizer)


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model's forward, or None."""
    return next((arguments[name] for name in _CACHE_NAMES if arguments.get(name) is not None), None)


def cache_argument(output: Any) -> dict[str, Any]:
    """The cache in a model's output, as the argument of its next forward; empty if there is none."""
    for name in _CACHE_NAMES:
        cache = getattr(output, name, None)
        if cache is not None:
            return {name: cache}
    return {}


_PARAMETERS: dict[Callable[..., Any], tuple[list[str], bool]] = {}


def _parameters(forward: Callable[..., Any]) -> tuple[list[str], bool]:
    """Names of the arguments of a model's forward, and whether it takes free keyword arguments."""
    if forward not in _PARAMETERS:
        parameters = inspect.signature(forward).parameters
        free = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        _PARAMETERS[forward] = list(parameters)[1:], free
    return _PARAMETERS[forward]
