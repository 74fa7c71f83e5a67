"""FlowReport: what StepFlow did to a generation or a forward pass, by row and layer, and the sums behind it."""

import copy
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .bridge import is_divided
from .step_detector import Field
from .trace import TraceStep, steps_of_records

# Columns of Tally.bridge, for each row, layer and head.
QUERIES, LIFTED, BEFORE, AFTER = range(4)

# Decode steps that a layer may note before they are added up: bounds memory, and spreads the cost of adding.
_NOTES = 32

Note = tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | float]


class Tally:
    """Sums over the queries of each row and layer.

    Attributes:
        bridge: float32 [B, layers, H, 4]: queries with a floor, those lifted, and their mass before and after.
        injections: float32 [B, layers, 2]: number, and sum of norms relative to the head output.
    """

    def __init__(self, batch: int, heads: dict[int, int], device: torch.device, is_static: bool = False):
        most = max(heads.values(), default=0)
        self.bridge = torch.zeros(batch, len(heads), most, AFTER + 1, device=device)
        self.injections = torch.zeros(batch, len(heads), 2, device=device)
        self._place = {layer: (index, heads[layer]) for index, layer in enumerate(sorted(heads))}
        self._notes: dict[int, list[Note]] = {}
        self._elsewhere: dict[tuple[torch.device, int, int], torch.Tensor] = {}
        if is_static:  # else a compiled step runs without CUDA graphs
            for tensor in (self.bridge, self.injections):
                torch._dynamo.mark_static_address(tensor)

    def copy(self) -> "Tally":
        """An independent copy."""
        self.add_notes()
        copied = copy.copy(self)
        copied.bridge, copied.injections = self.bridge.clone(), self.injections.clone()
        copied._notes, copied._elsewhere = {}, {}
        return copied

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums of a layer, which may be changed in place: [B, H, 4] and [B, 2]."""
        place, heads = self._place[layer]
        return self.bridge[:, place, :heads], self.injections[:, place]

    def sums_on(self, device: torch.device, layer: int, part: int) -> torch.Tensor:
        """The sums of a layer that a kernel adds to (`of_layer`), on its device."""
        sums = self.of_layer(layer)[part]
        if sums.device == device:
            return sums
        key = device, layer, part
        if key not in self._elsewhere:
            self._elsewhere[key] = torch.zeros_like(sums, device=device)
        return self._elsewhere[key]

    def add_injections(self, layer: int, number: torch.Tensor, norm: torch.Tensor) -> None:
        """Adds the number of injections of a layer and the sum of their relative norms, both [B]."""
        sums = self.of_layer(layer)[1]
        sums += torch.stack((number, norm), 1).to(sums.device, sums.dtype)

    @torch.no_grad()
    def add_bridge(
        self, layer: int, before: torch.Tensor, after: torch.Tensor, usable: torch.Tensor, row: int | None = None
    ) -> None:
        """Adds the bridge of some queries.

        Args:
            layer: The layer.
            before: Mass of the bridge without the floor, [B, H, c].
            after: Its mass with it, [B, H, c].
            usable: Where the bridge had a say (non-zero), broadcastable to them.
            row: The row that they belong to; None for all.
        """
        chosen = usable.expand_as(before) > 0
        counts = torch.stack((chosen, (after > before) & chosen, before * chosen, after * chosen), -1).sum(2)
        sums = self.of_layer(layer)[0][slice(None) if row is None else slice(row, row + 1)]
        sums += counts.to(sums.device, sums.dtype)

    def note_bridge(
        self, layer: int, before: torch.Tensor, least: torch.Tensor | float, floors: torch.Tensor | float
    ) -> None:
        """As `add_bridge` for one query a row, to be added up later; afterwards the mass is at least `least`."""
        notes = self._notes.setdefault(layer, [])
        notes.append((before, least, floors))
        if len(notes) >= _NOTES:
            self._add_notes_of(layer)

    def add_notes(self) -> None:
        """Adds up what was noted."""
        for layer in list(self._notes):
            self._add_notes_of(layer)
        for (_, layer, part), sums in self._elsewhere.items():
            self.of_layer(layer)[part].add_(sums.to(self.bridge.device))
        self._elsewhere.clear()

    def _add_notes_of(self, layer: int) -> None:
        noted = [torch.as_tensor(part, dtype=note[0].dtype) for note in self._notes.pop(layer) for part in note]
        stacked = torch.stack(torch.broadcast_tensors(*noted), -1).flatten(1, -2).unflatten(-1, (-1, 3))
        before, least, floors = stacked.unbind(-1)
        self.add_bridge(layer, before, torch.maximum(before, least), floors)

    def select(self, rows: torch.Tensor) -> None:
        """Takes rows by index."""
        self.add_notes()
        self.bridge = self.bridge.index_select(0, rows)
        self.injections = self.injections.index_select(0, rows)

    def repeat(self, times: int) -> None:
        """Repeats each row in place."""
        self.add_notes()
        self.bridge = self.bridge.repeat_interleave(times, 0)
        self.injections = self.injections.repeat_interleave(times, 0)

    def zero_(self) -> None:
        """Forgets everything."""
        self._notes.clear()
        self._elsewhere.clear()
        self.bridge.zero_()
        self.injections.zero_()


@dataclass(frozen=True)
class LayerReport:
    """The effect of StepFlow in one layer on one row.

    Attributes:
        layer: Index of the layer.
        bridge_queries: Number of (token, head) pairs where the bridge applies: both groups visible, head chosen.
        bridged_share: Share of them below the floor, which were lifted; None where there were none.
        mass_before: Their mean attention mass on the bridge without the floor.
        mass_after: The same with it.
        injections: Number of tokens that got the previous step's momentum.
        injection_norm: Mean norm of the addition relative to the head output.
    """

    layer: int
    bridge_queries: int
    bridged_share: float | None
    mass_before: float | None
    mass_after: float | None
    injections: int
    injection_norm: float | None


@dataclass(frozen=True)
class RowReport:
    """Steps and layers of one row.

    Attributes:
        steps: The steps.
        layers: The layers that StepFlow was to change.
        bridged_by_label: Number of tokens whose bridge is no range of keys, because of tool results in their round or
            padding inside the trace; for them each key's label is looked at.
    """

    steps: list[TraceStep]
    layers: list[LayerReport]
    bridged_by_label: int = 0


@dataclass(frozen=True)
class FlowReport:
    """The effect of StepFlow in the last call: `print(report)` shows a table, `to_dict()` gives JSON-ready data.

    Queries that speculative decoding computed and then rejected count like any other.

    Attributes:
        rows: One entry a row of the batch.

    Example:
        >>> output = model.generate(**inputs)
        >>> print(model.stepflow_report())
    """

    rows: list[RowReport]

    @classmethod
    def of(
        cls,
        records: list[list[list[int]]],
        tally: Tally | None,
        layers: tuple[int, ...],
        changed: Collection[int],
        tokenizer: Any = None,
    ) -> "FlowReport":
        """Makes a report.

        Args:
            records: The records of all tokens, [B][T][FIELDS].
            tally: The sums, or None.
            layers: The layers of the tally.
            changed: The layers that StepFlow was to change.
            tokenizer: Gives the steps their texts.
        """
        sums = None
        if tally is not None:
            tally.add_notes()
            sums = torch.cat((tally.bridge.sum(2), tally.injections), 2).tolist()
        rows = []
        for index, row in enumerate(records):
            steps = steps_of_records(row, [record[Field.TOKEN] for record in row], tokenizer)
            amounts = [] if sums is None else zip(layers, sums[index], strict=True)
            by_label = sum(record[Field.ACTIVE] and is_divided(record, slot) for slot, record in enumerate(row))
            rows.append(RowReport(steps, [_layer_report(*one) for one in amounts if one[0] in changed], by_label))
        return cls(rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n\n".join(_row_text(index, row) for index, row in enumerate(self.rows))


def _layer_report(layer: int, amounts: list[float]) -> LayerReport:
    queries, lifted, before, after, injections, norms = amounts
    return LayerReport(
        layer,
        round(queries),
        lifted / queries if queries else None,
        before / queries if queries else None,
        after / queries if queries else None,
        round(injections),
        norms / injections if injections else None,
    )


def _row_text(index: int, row: RowReport) -> str:
    counts = {label: sum(step.label == label for step in row.steps) for label in ("thinking", "summary")}
    lines = [f"Row {index}: {counts['thinking']} thinking steps, {counts['summary']} summary steps"]
    for step in row.steps:
        if step.label != "question":
            text = "" if step.text is None else " ".join(step.text.split())
            text = text if len(text) <= 72 else text[:71] + "\u2026"
            lines.append(f"  {step.label:<8} {step.index:>3}  tokens {step.start:>5}-{step.end - 1:<5}  {text}")
    if row.bridged_by_label:
        lines.append(
            f"  {row.bridged_by_label} tokens bridged by label, since tool results or padding divide their keys"
        )
    if row.layers:
        lines.append(f"  {'layer':>5} {'heads bridged':>14} {'bridge mass':>17} {'injections':>11} {'norm':>6}")
    for layer in row.layers:
        share = "-" if layer.bridged_share is None else f"{layer.bridged_share:.1%}"
        mass = "-" if layer.mass_before is None else f"{layer.mass_before:.4f} > {layer.mass_after:.4f}"
        norm = "-" if layer.injection_norm is None else f"{layer.injection_norm:.3f}"
        lines.append(f"  {layer.layer:>5} {share:>14} {mass:>17} {layer.injections or '-':>11} {norm:>6}")
    return "\n".join(lines)
