"""Naive float64 oracles of the method: one query, one head and one key at a time, written from the definitions alone.

They share no code with the package and are slow on purpose. Lists index tokens of one row without padding.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

QUESTION, THINKING, SUMMARY = 0, 1, 2
NO_STEP = -1

INVISIBLE = float("-inf")


def oracle_bridge(
    logits: list[float],
    same: list[bool],
    bridge: list[bool],
    tau_max: float,
    floor: str = "share",
    sink: float | None = None,
) -> tuple[list[float], float]:
    """The attention of one query and head after the Odds-Equal Bridge.

    Every group keeps its inner proportions, so the result is each group's own softmax times the group's new mass.

    Args:
        logits: One attention logit a key; -inf is an invisible key.
        same: Which keys are in S.
        bridge: Which keys are in B.
        tau_max: The cap of the floor.
        floor: "share" or "absolute".
        sink: The learned sink's logit, or None.

    Returns:
        The probability of every key, and the sink's.
    """
    visible = [key for key, logit in enumerate(logits) if logit > INVISIBLE]
    members = {
        "S": [key for key in visible if same[key]],
        "B": [key for key in visible if bridge[key]],
        "O": [key for key in visible if not same[key] and not bridge[key]],
    }
    everything = [logits[key] for key in visible] + ([] if sink is None else [sink])
    if not everything:
        return [0.0] * len(logits), 0.0
    top = max(everything)
    denominator = math.fsum(math.exp(logit - top) for logit in everything)
    mass = {
        group: math.fsum(math.exp(logits[key] - top) for key in keys) / denominator for group, keys in members.items()
    }

    new_mass = dict(mass)
    if members["S"] and members["B"]:
        tau = min(math.sqrt(len(members["B"]) / (len(members["B"]) + len(members["S"]))), tau_max)
        held = mass["S"] + mass["B"]
        if floor == "share":
            if mass["B"] < tau * held:
                new_mass["B"] = tau * held
                new_mass["S"] = held - tau * held
        elif floor == "absolute":
            if mass["B"] < tau < held:
                new_mass["B"] = tau
                new_mass["S"] = held - tau
        else:
            raise ValueError(f"floor must be share or absolute, got {floor!r}")

    probabilities = [0.0] * len(logits)
    for group, keys in members.items():
        group_top = max((logits[key] for key in keys), default=0.0)
        group_denominator = math.fsum(math.exp(logits[key] - group_top) for key in keys)
        for key in keys:
            probabilities[key] = new_mass[group] * math.exp(logits[key] - group_top) / group_denominator
    return probabilities, 0.0 if sink is None else math.exp(sink - top) / denominator


def oracle_momentum(
    value: Tensor, start: list[int], end: list[int], window: int | None = None, members: Tensor | None = None
) -> Tensor:
    """The mean value vectors of the previous steps, slot by slot.

    Args:
        value: Value vectors [B, Hkv, K, D].
        start: First slot of each row's previous step; negative for none.
        end: The slot after its last one.
        window: How many of its last slots count, or None for all.
        members: Bool [B, K] of the slots that may count, or None.

    Returns:
        The means [B, Hkv, D] in float64; zeros where no slot counts.
    """
    batch, heads, _, width = value.shape
    means = torch.zeros(batch, heads, width, dtype=torch.float64)
    for row in range(batch):
        if start[row] < 0:
            continue
        slots = list(range(start[row], end[row]))
        if window is not None:
            slots = slots[-window:] if window > 0 else []
        if members is not None:
            slots = [slot for slot in slots if members[row, slot]]
        for head in range(heads):
            means[row, head] = _mean_of(value[row, head].double(), slots)
    return means


def _mean_of(vectors: Tensor, slots: list[int]) -> Tensor:
    """The mean of some of the vectors [K, D]; zeros for none."""
    total = torch.zeros(vectors.shape[-1], dtype=torch.float64)
    for slot in slots:
        total = total + vectors[slot]
    return total / max(len(slots), 1)


@dataclass
class OracleSettings:
    """The settings of the method; the defaults are those of the package, with every layer list empty."""

    tau_max: float = 0.15
    alpha: float = 0.06
    oeb_layers: list[int] = field(default_factory=list)
    smi_layers: list[int] = field(default_factory=list)
    bridge_scope: str = "segment"
    bridge_floor: str = "share"
    sink_tokens: int = 0
    oeb_span: int | None = None
    oeb_heads: dict[int, list[int]] | None = None
    smi_window: int | None = None
    length_temperature: float = 0.0
    length_temperature_base: float | None = None
    length_temperature_layers: list[int] | None = None
    length_temperature_heads: dict[int, list[int]] | None = None


@dataclass
class OracleTrace:
    """What every token of one row is.

    Attributes:
        segment: 0 question, 1 thinking, 2 summary.
        round: 0 before any thinking, then 1, 2 and so on.
        step: The step's id within its round, counting from 1; 0 in the question, -1 in no step.
        control: Whether the token is a marker or another control token.
    """

    segment: list[int]
    round: list[int]
    step: list[int]
    control: list[bool]

    def __post_init__(self) -> None:
        lengths = {len(self.segment), len(self.round), len(self.step), len(self.control)}
        if len(lengths) != 1:
            raise ValueError(f"the lists of a trace must be of one length, got {sorted(lengths)}")

    def step_tokens(self, token: int) -> list[int]:
        """The tokens of the step that a token lies in, up to that token; empty for a token in no step."""
        if self.step[token] < 1:
            return []
        return [
            other
            for other in range(token + 1)
            if self.round[other] == self.round[token] and self.step[other] == self.step[token]
        ]

    def thinking_steps(self, token: int) -> list[int]:
        """The ids of the thinking steps that have begun in a token's round, up to that token, in order."""
        begun: list[int] = []
        for other in range(token + 1):
            in_round = self.round[other] == self.round[token]
            if (
                in_round
                and self.segment[other] == THINKING
                and self.step[other] >= 1
                and self.step[other] not in begun
            ):
                begun.append(self.step[other])
        return begun

    def first_thinking_token(self, token: int, step: int) -> int:
        """The first token of a thinking step of a token's round."""
        return next(
            other
            for other in range(token + 1)
            if self.round[other] == self.round[token] and self.segment[other] == THINKING and self.step[other] == step
        )


def oracle_groups(trace: OracleTrace, settings: OracleSettings, query: int) -> tuple[list[int], list[int]] | None:
    """The groups S and B of one query, before the mask.

    Args:
        trace: The labels of the row.
        settings: The settings.
        query: The query's position.

    Returns:
        The keys of S and of B among the keys 0 ... query, or None where OEB leaves the query alone.
    """
    if trace.control[query] or trace.segment[query] == QUESTION:
        return None
    if settings.oeb_span is not None:
        step = trace.step_tokens(query)
        if not step or query - step[0] >= settings.oeb_span:
            return None

    keys = range(query + 1)
    in_round = [trace.round[key] == trace.round[query] for key in keys]
    thinking = [key for key in keys if in_round[key] and trace.segment[key] == THINKING]
    begun = trace.thinking_steps(query)
    if trace.segment[query] == THINKING:
        same = thinking
        if settings.bridge_scope == "step" and begun:
            start = trace.first_thinking_token(query, begun[-1])
            same = [key for key in thinking if key >= start]
        bridge = [key for key in keys if key not in same]
    else:
        if not begun:
            return None
        same = [key for key in keys if in_round[key] and trace.segment[key] == SUMMARY]
        bridge = thinking
    return same, [key for key in bridge if key >= settings.sink_tokens]


def oracle_previous_step(trace: OracleTrace, settings: OracleSettings, query: int) -> list[int]:
    """The tokens G whose values one query receives, before the mask.

    Args:
        trace: The labels of the row.
        settings: The settings.
        query: The query's position.

    Returns:
        The tokens, in order; empty where nothing is injected.
    """
    if trace.control[query] or trace.segment[query] == QUESTION or trace.step_tokens(query) != [query]:
        return []
    if trace.segment[query] == SUMMARY:
        for earlier in range(query):
            same_summary = trace.round[earlier] == trace.round[query] and trace.segment[earlier] == SUMMARY
            if same_summary and trace.step[earlier] >= 1:
                return []
    begun = [step for step in trace.thinking_steps(query) if step != trace.step[query]]
    if not begun:
        return []
    tokens = [
        token
        for token in range(query)
        if trace.round[token] == trace.round[query]
        and trace.segment[token] == THINKING
        and trace.step[token] == begun[-1]
        and not trace.control[token]
    ]
    if settings.smi_window is None:
        return tokens
    return tokens[-settings.smi_window :] if settings.smi_window > 0 else []


@dataclass
class BridgeRecord:
    """What OEB met at one layer, head and query: the masses before and after, the sink's in O.

    Attributes:
        before: p(S), p(B), p(O).
        after: q(S), q(B), q(O).
    """

    before: tuple[float, float, float]
    after: tuple[float, float, float]


class OracleStepFlow:
    """The method on a whole model: one teacher-forced forward in float64, without cache.

    Calling it with `input_ids` [1, T] and the trace of these tokens gives logits [T, V] in float64. Weights and
    activations are float64, except where a model casts to float32 itself (norms and rotary angles, in most).

    Args:
        model: A causal language model whose attention goes through the attention interface. It is copied.
        settings: The settings.

    Attributes:
        bridges: What OEB met in the last call, by (layer, head, query), for every query with a key in S and in B.
        injections: The tokens that made G in the last call, by (layer, query).
    """

    NAME = "naive_float64_oracle"
    UNKNOWN = ("indices", "block_indices", "sinks")

    def __init__(self, model: PreTrainedModel, settings: OracleSettings) -> None:
        self.settings = settings
        self.bridges: dict[tuple[int, int, int], BridgeRecord] = {}
        self.injections: dict[tuple[int, int], list[int]] = {}
        self._model = copy.deepcopy(model).double().eval()
        self._trace: OracleTrace | None = None
        self._layers: set[int] = set()

    def __call__(self, input_ids: Tensor, trace: OracleTrace) -> Tensor:
        if input_ids.shape != (1, len(trace.segment)):
            raise ValueError(
                f"input_ids must be [1, {len(trace.segment)}] like the trace, got {list(input_ids.shape)}"
            )
        self._trace, self._layers, self.bridges, self.injections = trace, set(), {}, {}
        with _registered(self.NAME, self._attention), torch.no_grad():
            self._model.set_attn_implementation(self.NAME)
            logits = self._model(input_ids=input_ids, use_cache=False).logits[0].double()
        wanted = {*self.settings.oeb_layers, *self.settings.smi_layers}
        if not self._layers or not wanted <= self._layers:
            raise ValueError(
                f"layers {sorted(wanted)} are asked for, but only {sorted(self._layers)} of "
                f"{type(self._model).__name__} went through the attention interface"
            )
        return logits

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of q [1, H, T, D], k [1, Hkv, T, D] and v [1, Hkv, T, Dv], giving [1, T, H, Dv]."""
        for name in self.UNKNOWN:
            if kwargs.get(name) is not None:
                raise ValueError(f"the oracle does not know the attention argument {name!r}")
        layer = int(module.layer_idx)
        self._layers.add(layer)
        _, heads, length, width = query.shape
        group_size = heads // key.shape[1]
        scaling = width**-0.5 if scaling is None else scaling
        output = torch.zeros(1, length, heads, value.shape[-1], dtype=torch.float64)
        for head in range(heads):
            keys, values = key[0, head // group_size].double(), value[0, head // group_size].double()
            sink = None if s_aux is None else float(s_aux[head])
            for position in range(length):
                bias = _additive_mask(attention_mask, head, position, length)
                temperature = self._temperature(layer, head, sum(entry > INVISIBLE for entry in bias))
                scaled_query = query[0, head, position].double() * (temperature * scaling)
                logits = []
                for slot in range(length):
                    logit = float(scaled_query @ keys[slot]) if bias[slot] > INVISIBLE else 0.0
                    if softcap is not None:
                        logit = softcap * math.tanh(logit / softcap)
                    if position_bias is not None:
                        logit += float(_entry(position_bias, head, position, slot))
                    logits.append(logit + bias[slot])
                probabilities = self._attend(layer, head, position, logits, sink)
                for slot, probability in enumerate(probabilities):
                    if probability > 0.0:
                        output[0, position, head] += probability * values[slot]
                output[0, position, head] += self._injection(layer, position, logits, values)
        return output.to(query.dtype), None

    def _temperature(self, layer: int, head: int, visible: int) -> float:
        """The factor s(n) of a query that sees n keys."""
        settings = self.settings
        layers, heads = settings.length_temperature_layers, settings.length_temperature_heads
        if settings.length_temperature == 0.0 or visible == 0 or (layers is not None and layer not in layers):
            return 1.0
        if heads is not None and head not in heads.get(layer, []):
            return 1.0
        if settings.length_temperature_base is None:
            raise ValueError("length_temperature_base must be given where length_temperature is not 0")
        return max(1.0, math.log(visible) / math.log(settings.length_temperature_base)) ** settings.length_temperature

    def _attend(self, layer: int, head: int, position: int, logits: list[float], sink: float | None) -> list[float]:
        """The probabilities of one query and head, bridged where the settings say so."""
        settings = self.settings
        chosen = layer in settings.oeb_layers and (
            settings.oeb_heads is None or head in settings.oeb_heads.get(layer, [])
        )
        groups = oracle_groups(self._trace, settings, position) if chosen else None
        same, bridge = groups or ([], [])
        is_same = [slot in same for slot in range(len(logits))]
        is_bridge = [slot in bridge for slot in range(len(logits))]
        before, sink_before = oracle_bridge(logits, is_same, is_bridge, 0.0, settings.bridge_floor, sink)
        after, sink_after = oracle_bridge(logits, is_same, is_bridge, settings.tau_max, settings.bridge_floor, sink)
        if any(logits[slot] > INVISIBLE for slot in same) and any(logits[slot] > INVISIBLE for slot in bridge):
            self.bridges[layer, head, position] = BridgeRecord(
                _masses(before, sink_before, is_same, is_bridge), _masses(after, sink_after, is_same, is_bridge)
            )
        return after

    def _injection(self, layer: int, position: int, logits: list[float], values: Tensor) -> Tensor:
        """What SMI adds to one head's output [Dv]."""
        previous = []
        if layer in self.settings.smi_layers and self.settings.alpha != 0.0:
            previous = oracle_previous_step(self._trace, self.settings, position)
        visible = [slot for slot in previous if logits[slot] > INVISIBLE]
        if visible:
            self.injections[layer, position] = visible
        return self.settings.alpha * _mean_of(values, visible)


def _masses(
    probabilities: list[float], sink: float, same: list[bool], bridge: list[bool]
) -> tuple[float, float, float]:
    """Sums probabilities over S, B and O."""
    in_same = math.fsum(entry for entry, member in zip(probabilities, same, strict=True) if member)
    in_bridge = math.fsum(entry for entry, member in zip(probabilities, bridge, strict=True) if member)
    return in_same, in_bridge, math.fsum(probabilities) + sink - in_same - in_bridge


def _additive_mask(mask: Tensor | None, head: int, position: int, length: int) -> list[float]:
    """What the mask adds to every key of one query: -inf for the invisible ones."""
    if mask is None:
        return [0.0 if slot <= position else INVISIBLE for slot in range(length)]
    entries = [_entry(mask, head, position, slot) for slot in range(length)]
    if mask.dtype == torch.bool:
        return [0.0 if entry else INVISIBLE for entry in entries]
    lowest = torch.finfo(mask.dtype).min / 2
    return [float(entry) if entry > lowest else INVISIBLE for entry in entries]


def _entry(table: Tensor, head: int, position: int, slot: int) -> Tensor:
    """One entry of a table [1, H or 1, T or 1, T]."""
    return table[0, min(head, table.shape[1] - 1), min(position, table.shape[2] - 1), slot]


def _mask_always(*args: Any, **kwargs: Any) -> Tensor | None:
    """The bool mask of transformers, spelled out even where it is plainly causal."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


@contextmanager
def _registered(name: str, attention: Callable[..., Any]) -> Iterator[None]:
    """Registers an attention function and the mask it needs for as long as the context lasts."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _mask_always)
    try:
        yield
    finally:
        del AttentionInterface._global_mapping[name]
        del AttentionMaskInterface._global_mapping[name]
