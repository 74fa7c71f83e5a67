"""Watches the attention of a model, and compares each call with the reference.

The reference works on the call's own queries, keys and values: `odds_equal_bridge` on dense logits, and the mean value
of the previous step. The masses that attention gives to the bridge are not computed but observed: the same call runs
again with values that say which keys are whose.

Shapes: H query heads, q queries, K keys, G groups of keys, D width of values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_stepflow.runtime.bridge import odds_equal_bridge

from .trace import ReadTrace


@dataclass
class Seen:
    """The findings in one layer.

    Attributes:
        queries: Number of queries and heads that were compared.
        error: Largest error of an output, relative to the largest value.
        floors: Number of queries and heads with a floor.
        lifted: Number of them whose bridge was below it without StepFlow.
        lowest: Smallest observed mass of the bridge relative to the floor.
        injections: Number of tokens that should get an injection.
        moved: Smallest norm of what they got, relative to what they should get.
    """

    queries: int = 0
    error: float = 0.0
    floors: int = 0
    lifted: int = 0
    lowest: float = float("inf")
    injections: int = 0
    moved: float = float("inf")


class Watch:
    """Compares every call of attention in the layers of StepFlow with the reference."""

    def __init__(self, model: Any, trace: ReadTrace):
        self.trace = trace
        self.plan = trace.rules.plan
        self.base_name = model.stepflow_runtime.base_implementation
        self.total = 0  # tokens up to the end of the pass that runs
        self.seen: dict[int, Seen] = {}
        module = next(module for module in model.modules() if "stepflow_link" in vars(module))
        self.name = module.config._attn_implementation
        self.attend = ALL_ATTENTION_FUNCTIONS[self.name]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the passes of the block."""
        ALL_ATTENTION_FUNCTIONS[self.name] = self._attention
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[self.name]

    def _attention(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        output = self.attend(module, query, key, value, mask, **kwargs)
        link = getattr(module, "stepflow_link", None)
        if link is not None and link.layer in {*self.plan.tau, *self.plan.inject, *self.plan.gamma}:
            self._compare(link.layer, module, query, key, value, mask, kwargs, output[0])
        return output

    def _compare(
        self,
        layer: int,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> None:
        trace, seen = self.trace, self.seen.setdefault(layer, Seen())
        device, dtype = query.device, torch.promote_types(query.dtype, torch.float32)
        heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
        rows = torch.arange(self.total - queries, self.total)
        columns = torch.arange(self.total - keys, self.total)
        visible, bias = _visible(mask, rows, columns, getattr(module, "sliding_window", None))
        visible = visible.to(device)
        logits = self._logits(layer, query.to(dtype), key.to(dtype), visible, kwargs)
        if bias is not None:
            logits = logits + bias.to(device, dtype)
        logits = logits.masked_fill(~visible, float("-inf"))
        tau = self.plan.tau.get(layer, 0.0)
        caps = torch.tensor([tau] * heads if isinstance(tau, float) else list(tau), dtype=dtype, device=device)[
            :, None
        ]
        same, bridge = (groups[rows][:, columns].to(device) & visible for groups in (trace.same, trace.bridge))
        floor, sinks = self.plan.settings.bridge_floor, kwargs.get("s_aux")
        sinks = None if sinks is None else sinks.to(dtype)
        shifted = odds_equal_bridge(
            logits, same[None, None], bridge[None, None], tau_max=caps, floor=floor, sink_logits=sinks
        )
        spread = value[0].to(dtype).repeat_interleave(heads // value.shape[1], 0)  # [H, K, D]
        expected = torch.matmul(_probabilities(shifted[0], sinks), spread)  # [H, q, D]
        observed = output[0].to(dtype).transpose(0, 1)
        plain = _probabilities(logits[0], sinks)
        compared = trace.checked[rows] | trace.plain[rows]
        triggers = [place for place, row in enumerate(rows.tolist()) if row in trace.previous]
        if layer in self.plan.inject:
            for place in triggers:
                self._inject(seen, expected, observed, spread, place, rows, columns, visible)
        scale = value.abs().max().to(dtype)
        if compared.any():
            chosen = compared.to(device)
            error = (observed - expected)[:, chosen].abs().max() / scale
            seen.error = max(seen.error, float(error))
            seen.queries += int(compared.sum()) * heads
        checked = trace.checked[rows].clone()
        if layer in self.plan.inject:
            checked[triggers] = False  # the injection is in their output
        if layer in self.plan.tau and checked.any():
            masses = self._masses(module, query, key, value, mask, kwargs, columns)
            self._floors(seen, masses, plain, same, bridge, caps, checked.to(device), columns, rows)

    def _logits(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Logits [1, H, q, K] before the mask."""
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        gamma = self.plan.gamma.get(layer)
        if gamma is not None:
            number = visible.sum(-1).clamp(min=1).double().log()
            ratio = (number / torch.tensor(float(self.plan.settings.length_temperature_base)).log()).clamp(min=1.0)
            power = torch.tensor(gamma, dtype=torch.float64, device=query.device).reshape(-1, 1, 1)
            query = query * (ratio[None, :, None] ** power).to(query.dtype)
        logits = torch.matmul(query, key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT) * scaling
        softcap = None if self.base_name == "sdpa" else kwargs.get("softcap")
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        added = kwargs.get("position_bias")
        return logits if added is None else logits + added[:, :, -query.shape[2] :, : key.shape[2]]

    def _inject(
        self,
        seen: Seen,
        expected: torch.Tensor,
        observed: torch.Tensor,
        spread: torch.Tensor,
        place: int,
        rows: torch.Tensor,
        columns: torch.Tensor,
        visible: torch.Tensor,
    ) -> None:
        """Adds the injection of one token to what is expected, and notes what the token got."""
        first = int(columns[0])
        members = [token - first for token in self.trace.previous[int(rows[place])] if token >= first]
        members = [member for member in members if bool(visible[place, member])]
        if not members:
            return
        addition = self.plan.settings.alpha * spread[:, members].mean(1)
        got = observed[:, place] - expected[:, place]
        seen.injections += 1
        seen.moved = min(seen.moved, float((got * addition).sum() / (addition * addition).sum()))
        expected[:, place] += addition

    def _masses(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        kwargs: dict[str, Any],
        columns: torch.Tensor,
    ) -> torch.Tensor:
        """The mass of each group, [H, q, G], as attention itself gives it: its values say which keys are whose."""
        width, group = value.shape[-1], self.trace.group[columns].to(value.device)
        masses = []
        for first in range(0, int(self.trace.group.max()) + 1, width):
            channels = torch.arange(first, first + width, device=value.device)
            marked = (group[:, None] == channels).to(value.dtype).expand_as(value).contiguous()
            masses.append(self.attend(module, query, key, marked, mask, **kwargs)[0][0].transpose(0, 1))
        return torch.cat(masses, -1).to(torch.promote_types(value.dtype, torch.float32))

    def _floors(
        self,
        seen: Seen,
        masses: torch.Tensor,
        plain: torch.Tensor,
        same: torch.Tensor,
        bridge: torch.Tensor,
        caps: torch.Tensor,
        checked: torch.Tensor,
        columns: torch.Tensor,
        rows: torch.Tensor,
    ) -> None:
        """Compares the observed mass of the bridge with the floor."""
        group = self.trace.group[columns].to(masses.device)
        in_group = torch.nn.functional.one_hot(group, masses.shape[-1]).to(masses.dtype)  # [K, G]

        def mass(members: torch.Tensor) -> torch.Tensor:  # [q, K] -> [H, q]
            belongs = torch.matmul(members.to(masses.dtype), in_group) > 0
            return (masses * belongs).sum(-1)

        number = {"same": same.sum(-1), "bridge": bridge.sum(-1)}
        root = (number["bridge"] / (number["bridge"] + number["same"]).clamp(min=1)).sqrt()
        floor = torch.minimum(root.to(caps.dtype), caps)
        held = mass(same) + mass(bridge)
        before = (plain * bridge).sum(-1)
        whole = before + (plain * same).sum(-1)
        if self.plan.settings.bridge_floor == "share":
            needed, needed_before = floor * held, floor * whole
        else:
            needed, needed_before = floor * (floor < held), floor * (floor < whole)
        applies = checked & (number["same"] > 0) & (number["bridge"] > 0) & (needed > 0)
        if applies.any():
            seen.floors += int(applies.sum())
            seen.lifted += int((applies & (before < needed_before)).sum())
            seen.lowest = min(seen.lowest, float((mass(bridge) / needed)[applies].min()))


def _visible(
    mask: Any, rows: torch.Tensor, columns: torch.Tensor, window: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which keys the queries see, [q, K], and what the mask adds to their logits, [1, H or 1, q, K]."""
    if isinstance(mask, torch.Tensor):
        shown = mask[:1, :, :, : len(columns)]
        if mask.dtype == torch.bool:
            return shown[0, 0], None
        visible = shown > torch.finfo(mask.dtype).min / 2
        return visible[0, 0], torch.where(visible, shown, 0.0)
    visible = columns[None, :] <= rows[:, None]
    if mask is not None and window:  # flex attention; where there is no mask, no window cuts
        visible &= columns[None, :] > rows[:, None] - window
    return visible, None


def _probabilities(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the keys of logits [H, q, K], with learned sinks [H] in the denominator."""
    if sinks is None:
        return logits.softmax(-1)
    column = sinks[:, None, None].expand(*logits.shape[:2], 1)
    return torch.cat((logits, column), -1).softmax(-1)[..., :-1]
