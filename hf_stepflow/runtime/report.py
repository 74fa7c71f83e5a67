"""FlowReport: what StepFlow did to a generation or a forward pass, by row and layer."""

from dataclasses import asdict, dataclass
from typing import Any

from .flow_pass import FlowPlan
from .flow_state import FlowState
from .step_record import Field
from .tally import BRIDGE_QUERIES, BRIDGED, INJECTION_NORM, INJECTIONS, MASS_AFTER, MASS_BEFORE
from .trace_steps import TraceStep, steps_of_records


@dataclass(frozen=True)
class LayerReport:
    """What happened in one layer to one row.

    Attributes:
        layer: its index.
        bridge_queries: (token, head) pairs that the bridge looked at: both groups visible, head chosen.
        bridged_share: share of them below the floor, and so lifted; None where there were none.
        mass_before, mass_after: their mean attention mass on the bridge.
        injections: tokens that got the previous step's momentum.
        injection_norm: mean norm of the addition relative to the head output.
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
    """Steps and layers of one row."""

    steps: list[TraceStep]
    layers: list[LayerReport]


@dataclass(frozen=True)
class FlowReport:
    """What StepFlow did: `print(report)` is a table, `to_dict()` is JSON.

    Queries that speculative decoding computed and then rejected count like any other.

    Attributes:
        rows: one entry a row of the batch.
    """

    rows: list[RowReport]

    @classmethod
    def of(cls, state: FlowState, plan: FlowPlan, tokenizer: Any = None) -> "FlowReport":
        """Reads a state once.

        Args:
            state: the state after the last pass.
            plan: the plan it ran under.
            tokenizer: gives the steps their texts.
        """
        records = state.records[:, : state.count].tolist()
        tally = None
        if state.tally is not None:
            state.tally.settle()
            tally = state.tally.sums.tolist()
        rows = []
        for index, row in enumerate(records):
            steps = steps_of_records(row, [record[Field.TOKEN] for record in row], tokenizer)
            layers = [] if tally is None else _layer_reports(plan, tally[index])
            rows.append(RowReport(steps, layers))
        return cls(rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n\n".join(_row_text(index, row) for index, row in enumerate(self.rows))


def _layer_reports(plan: FlowPlan, tally: list[list[float]]) -> list[LayerReport]:
    reports = []
    for layer, amounts in zip(plan.layers, tally, strict=True):
        if layer not in plan.tau and layer not in plan.inject:
            continue
        queries, injections = amounts[BRIDGE_QUERIES], amounts[INJECTIONS]
        reports.append(
            LayerReport(
                layer,
                round(queries),
                amounts[BRIDGED] / queries if queries else None,
                amounts[MASS_BEFORE] / queries if queries else None,
                amounts[MASS_AFTER] / queries if queries else None,
                round(injections),
                amounts[INJECTION_NORM] / injections if injections else None,
            )
        )
    return reports


def _row_text(index: int, row: RowReport) -> str:
    counts = {label: sum(step.label == label for step in row.steps) for label in ("thinking", "summary")}
    lines = [f"Row {index}: {counts['thinking']} thinking steps, {counts['summary']} summary steps"]
    for step in row.steps:
        if step.label != "question":
            text = "" if step.text is None else " ".join(step.text.split())
            text = text if len(text) <= 72 else text[:71] + "\u2026"
            lines.append(f"  {step.label:<8} {step.index:>3}  tokens {step.start:>5}-{step.end - 1:<5}  {text}")
    if row.layers:
        lines.append(f"  {'layer':>5} {'heads bridged':>14} {'bridge mass':>17} {'injections':>11} {'norm':>6}")
    for layer in row.layers:
        share = "-" if layer.bridged_share is None else f"{layer.bridged_share:.1%}"
        mass = "-" if layer.mass_before is None else f"{layer.mass_before:.4f} > {layer.mass_after:.4f}"
        norm = "-" if layer.injection_norm is None else f"{layer.injection_norm:.3f}"
        lines.append(f"  {layer.layer:>5} {share:>14} {mass:>17} {layer.injections or '-':>11} {norm:>6}")
    return "\n".join(lines)
