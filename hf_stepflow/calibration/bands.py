"""Bands: Step-Saliency proposes layers in addition to the quarter rule.

A difference in saliency between right and wrong traces is a correlation. Whether acting on these layers helps is
decided by interventions, in the stages that follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_stepflow.runtime.settings import resolve_layers

# The most traces of each kind that are compared, and the fewest that a proposal needs.
TRACES = 24
FEWEST = 8

# The largest adjusted p-value that separates right from wrong: two indices share the usual 5 %.
LEVEL = 0.025


@dataclass(frozen=True)
class Proposal:
    """Layers for the bridge and for the injection.

    Attributes:
        name: The source: "quarter" (the paper's rule) or "saliency".
        oeb_layers: Layers of the bridge; may be empty.
        smi_layers: Layers of the injection; may be empty.
    """

    name: str
    oeb_layers: list[int]
    smi_layers: list[int]


@dataclass(frozen=True)
class Bands:
    """The proposals and their evidence.

    Attributes:
        proposals: The proposals, the quarter rule first.
        traces: The numbers of right and wrong traces compared; zeros if none were.
        layers: The layers examined.
        effects: For `lock_in` and `decay_share`, the effect of each layer (wrong minus right in standard deviations,
            Hedges' g; None if values do not spread), its adjusted p-value and whether it separates.
        reason: The reason in one sentence.
    """

    proposals: list[Proposal]
    traces: tuple[int, int]
    layers: list[int]
    effects: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    reason: str = ""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Bands":
        """Reads the bands from `dataclasses.asdict` data that went through JSON."""
        proposals = [Proposal(**one) for one in data["proposals"]]
        return cls(**{**data, "proposals": proposals, "traces": tuple(data["traces"])})


def quarter_rule(layers: Sequence[int]) -> Proposal:
    """Returns the paper's bands among the layers with softmax attention, given in ascending order."""
    return Proposal(
        "quarter",
        resolve_layers("oeb_layers", "bottom:0.25", list(layers)),
        resolve_layers("smi_layers", "top:0.25", list(layers)),
    )


def propose_bands(
    model: Any,
    right: Sequence[tuple[Sequence[int], int]],
    wrong: Sequence[tuple[Sequence[int], int]],
    tokenizer: Any,
    layers: Sequence[int],
    seed: int = 0,
    progress: bool = True,
) -> Bands:
    """Proposes shallow layers with more lock-in in wrong traces, and deep layers with more decay.

    Args:
        model: The model with StepFlow attached; it is analysed with StepFlow off.
        right: For each right trace, its token ids and the length of its prompt.
        wrong: The same for each wrong trace.
        tokenizer: The model's tokenizer.
        layers: The layers with softmax attention, ascending.
        seed: The seed of the resampling.
        progress: Whether to show a progress bar.
    """
    quarter = quarter_rule(layers)
    right, wrong = list(right)[:TRACES], list(wrong)[:TRACES]
    if min(len(right), len(wrong)) < FEWEST:
        reason = f"{len(right)} right and {len(wrong)} wrong traces are too few to compare (at least {FEWEST} each)"
        return Bands([quarter], (0, 0), list(layers), reason=reason)
    from hf_stepflow.saliency.api import step_saliency
    from hf_stepflow.saliency.compare import compare

    with model.disable_stepflow():
        maps: Any = step_saliency(
            model,
            [list(ids) for ids, _ in (*right, *wrong)],
            tokenizer=tokenizer,
            config=model.stepflow_runtime.rules.vocabulary,
            prompt_length=[length for _, length in (*right, *wrong)],
            progress=progress,
        )
    compared = compare(maps[: len(right)], maps[len(right) :], seed=seed, level=LEVEL)
    effects: dict[str, list[dict[str, Any]]] = {
        name: [
            {
                "effect": _finite(one.effect),
                "p_value": _finite(one.adjusted),
                "separates": one.separates,
                "difference": _finite(one.difference),
            }
            for one in compared.indices[name]
        ]
        for name in ("lock_in", "decay_share")
    }
    shallow, deep = bands_from(effects, list(layers))
    proposals = [quarter]
    if (shallow or deep) and (shallow, deep) != (quarter.oeb_layers, quarter.smi_layers):
        proposals.append(Proposal("saliency", shallow, deep))
    found = [f"lock-in in layers {shallow}"] * bool(shallow) + [f"decay in layers {deep}"] * bool(deep)
    reason = " and ".join(found) or "no layer separates right from wrong traces in the way that the paper describes"
    return Bands(proposals, (len(right), len(wrong)), list(layers), effects, reason)


def bands_from(effects: dict[str, list[dict[str, Any]]], layers: list[int]) -> tuple[list[int], list[int]]:
    """Returns the longest run of separating layers in each half; among equals, the one with the strongest effect.

    Shallow layers separate by more lock-in in wrong traces; deep layers, by a summary of wrong traces that draws less
    on the thinking.
    """
    half = len(layers) // 2
    shallow = _longest_run(effects["lock_in"][:half], layers[:half], +1)
    deep = _longest_run(effects["decay_share"][half:], layers[half:], -1)
    return shallow, deep


def _longest_run(rows: list[dict[str, Any]], layers: list[int], sign: int) -> list[int]:
    runs: list[list[int]] = [[]]
    for at, row in enumerate(rows):
        if row["separates"] and (row["difference"] or 0) * sign > 0:
            runs[-1].append(at)
        elif runs[-1]:
            runs.append([])
    best = max(runs, key=lambda run: (len(run), max((abs(rows[at]["effect"] or 0) for at in run), default=0)))
    return [layers[at] for at in best]


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if value == value else None
