"""One forward pass as attention sees it: the records of its queries, the labels of its keys, and what is to be done.

Shapes: B batch, H query heads, Hkv key-value heads, q queries, K keys that a layer sees, F record fields.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from .configuration_stepflow import StepFlowSettings, resolve_layers
from .errors import StepFlowConfigError, StepFlowUnsupportedError
from .flow_state import FlowState
from .step_record import SUMMARY, THINKING, Field


@dataclass(frozen=True)
class FlowPlan:
    """Settings resolved against one model: what happens in which layer.

    Attributes:
        settings: the settings.
        layers: the softmax attention layers of the model.
        tau: {layer: tau_max, or one value per query head} of the bridge's layers.
        inject: layers of the injection.
        gamma: {layer: length temperature, or one value per query head}.
    """

    settings: StepFlowSettings
    layers: tuple[int, ...]
    tau: dict[int, float | tuple[float, ...]]
    inject: frozenset[int]
    gamma: dict[int, float | tuple[float, ...]]

    @classmethod
    def resolve(cls, settings: StepFlowSettings, heads: dict[int, int]) -> "FlowPlan":
        """Resolves settings against the attention layers of a model.

        Args:
            settings: the settings.
            heads: {layer: number of query heads} of the softmax attention layers.

        Raises:
            StepFlowConfigError: layers or heads that the model does not have.
        """
        layers = sorted(heads)
        oeb = resolve_layers("oeb_layers", settings.oeb_layers, layers) if settings.tau_max > 0 else []
        smi = resolve_layers("smi_layers", settings.smi_layers, layers) if settings.alpha != 0 else []
        hot = resolve_layers("length_temperature_layers", settings.length_temperature_layers, layers)
        hot = hot if settings.length_temperature > 0 else []
        return cls(
            settings,
            tuple(layers),
            _by_head("oeb_heads", settings.oeb_heads, settings.tau_max, oeb, heads),
            frozenset(smi),
            _by_head(
                "length_temperature_heads",
                settings.length_temperature_heads,
                settings.length_temperature,
                hot,
                heads,
            ),
        )

    @property
    def is_idle(self) -> bool:
        """Whether nothing is ever to be done."""
        return not (self.tau or self.inject or self.gamma)


def _by_head(
    name: str, table: dict[int, list[int]] | None, value: float, layers: list[int], heads: dict[int, int]
) -> dict[int, float | tuple[float, ...]]:
    if table is None:
        return dict.fromkeys(layers, value)
    for layer, chosen in table.items():
        if layer not in heads or max(chosen, default=0) >= heads[layer]:
            raise StepFlowConfigError(
                f"{name} names heads {chosen} of layer {layer}, which this model does not have",
                hint=f"query heads by attention layer: {heads}",
            )
        if layers and chosen and layer not in layers:
            raise StepFlowConfigError(
                f"{name} names heads of layer {layer}, but only layers {layers} are asked for",
                hint=f"name the layers of the table in {name.replace('heads', 'layers')}",
            )
    return {
        layer: tuple(value if head in table[layer] else 0.0 for head in range(heads[layer]))
        for layer in layers
        if table.get(layer)
    }


@dataclass
class FlowPass:
    """What attention needs to know in one forward pass.

    Attributes:
        plan: what happens in which layer.
        state: the records of all slots.
        records: int32 [B, q, F] of the queries.
        host: the same on the host, [B][q][F], or None where nothing may be read there (compiled).
        total: slots after this pass: an int, or a tensor [] where compiled.
        has_active, has_trigger: whether any query is bridged or injected; True where it is not known.
        seen_layers: layers whose attention has been reached (not tracked where compiled).
        is_handed_down: whether each of them got the pass as an argument.
    """

    plan: FlowPlan
    state: FlowState
    records: torch.Tensor
    host: list[list[list[int]]] | None
    total: "int | torch.Tensor"
    has_active: bool = True
    has_trigger: bool = True
    seen_layers: set[int] = field(default_factory=set)
    is_handed_down: bool = True
    _memo: list[tuple[Any, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.host is not None:
            self.has_active = any(record[Field.ACTIVE] for row in self.host for record in row)
            self.has_trigger = any(record[Field.TRIGGER] for row in self.host for record in row)

    @property
    def queries(self) -> int:
        """Number of queries."""
        return self.records.shape[1]

    def last(self, queries: int) -> "FlowPass":
        """This pass for a layer that computes its last queries only (some families skip the rest of a prefill)."""
        if queries == self.queries:
            return self
        known = self.memo("last", None, queries)
        if known is not None:
            return known
        host = None if self.host is None else [row[-queries:] for row in self.host]
        part = FlowPass(self.plan, self.state, self.records[:, -queries:], host, self.total)
        return self.remember(part, "last", None, queries)

    def memo(self, name: str, key: Any, *rest: Any) -> Any:
        """What was stored for this mask (by identity) in this pass, or None: masks are shared by many layers."""
        for entry in self._memo:
            if entry[0] == name and entry[1] is key and entry[2] == rest:
                return entry[3]
        return None

    def remember(self, value: Any, name: str, key: Any, *rest: Any) -> Any:
        """Stores a value for `memo` and returns it."""
        self._memo.append((name, key, rest, value))
        return value

    def offset(self, keys: int) -> "int | torch.Tensor":
        """Slot of a layer's first key: sliding layers hold the last slots only, static caches hold empty ones too.

        Raises:
            StepFlowUnsupportedError: keys that are no tokens.
        """
        if isinstance(self.total, torch.Tensor):
            return (self.total - keys).clamp(min=0)
        if keys > self.total and not self.state.is_static:
            raise StepFlowUnsupportedError(
                f"attention got {keys} keys for {self.total} tokens, so StepFlow cannot tell which key is which token",
                hint="detach StepFlow from this model, or call it inside `with model.disable_stepflow():`",
            )
        return max(self.total - keys, 0)

    def key_columns(self, keys: int, *fields: int) -> list[torch.Tensor]:
        """Record fields of a layer's keys, int32 [B, K] each; slots not filled yet hold anything."""
        offset = self.offset(keys)
        records = self.state.records
        if isinstance(offset, int) and offset + keys <= records.shape[1]:
            return [records[:, offset : offset + keys, name] for name in fields]
        slots = (torch.arange(keys, device=records.device) + offset).clamp(max=records.shape[1] - 1)
        taken = records.index_select(1, slots)
        return [taken[:, :, name] for name in fields]


def key_groups(
    flow: FlowPass, records: torch.Tensor, keys: int, visible: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of the current segment S and of the bridge B, for some queries (METHOD section 3).

    The general form, by label: it serves any mixture of rounds, tool results and padding.

    Args:
        flow: the pass.
        records: int32 [B, c, F] of the queries.
        keys: K, the number of keys of the layer.
        visible: bool broadcastable to [B, 1, c, K], or None for all; it may tell of the first of the keys alone.

    Returns:
        same, bridge: bool [B, 1 or H, c, K], K as `visible` has it; both empty for queries that OEB leaves alone.
    """
    settings = flow.plan.settings
    seen = keys if visible is None or visible.shape[-1] == 1 else visible.shape[-1]
    (labels,) = (column[:, None, None, :seen].to(records.device) for column in flow.key_columns(keys, Field.LABEL))
    slots = torch.arange(seen, device=records.device) + flow.offset(keys)
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
