"""Stage 2, bands: Step-Saliency proposes layers, beside the quarter rule; interventions decide later.

Saliency that differs between right and wrong traces is a correlation, and may well not be what repairs them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_stepflow.runtime.configuration_stepflow import resolve_layers

# Traces of each kind that are looked at, at most, and those that a proposal needs.
TRACES = 24
FEWEST = 8

# Adjusted p-values of at most so much separate right from wrong: two indices share the usual 5 %.
LEVEL = 0.025


@dataclass(frozen=True)
class Proposal:
    """Layers for the bridge and for the injection.

    Attributes:
        name: who proposes: "quarter" (the paper's rule) or "saliency".
        oeb_layers: layers of the bridge; none if this proposes none.
        smi_layers: layers of the injection.
    """

    name: str
    oeb_layers: list[int]
    smi_layers: list[int]


@dataclass(frozen=True)
class Bands:
    """What was proposed, and on what evidence.

    Attributes:
        proposals: the quarter rule first.
        traces: how many right and wrong traces were compared; zeros if none were.
        layers: the layers that were looked at.
        effects: by index (`lock_in`, `decay_share`): for each layer the effect, wrong minus right in standard
            deviations (Hedges' g, None where values do not spread), its adjusted p-value and whether it separates.
        reason: one sentence.
    """

    proposals: list[Proposal]
    traces: tuple[int, int]
    layers: list[int]
    effects: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Bands":
        """What `to_dict` gave, read from JSON."""
        proposals = [Proposal(**one) for one in data["proposals"]]
        return cls(**{**data, "proposals": proposals, "traces": tuple(data["traces"])})


def quarter_rule(layers: Sequence[int]) -> Proposal:
    """The paper's bands.

    Args:
        layers: those with softmax attention, ascending.
    """
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
    """Proposes bands: lock-in that is stronger in wrong traces in the shallow half, decay in the deep half.

    Args:
        model: the model, StepFlow attached; it is looked at with StepFlow off.
        right: token ids of whole right traces, and the lengths of their prompts.
        wrong: the same of wrong ones.
        tokenizer: the model's tokenizer.
        layers: those with softmax attention, ascending.
        seed: of the resampling.
        progress: show a progress bar.
    """
    quarter = quarter_rule(layers)
    right, wrong = list(right)[:TRACES], list(wrong)[:TRACES]
    if min(len(right), len(wrong)) < FEWEST:
        reason = f"{len(right)} right and {len(wrong)} wrong traces are too few to compare (each {FEWEST} at least)"
        return Bands([quarter], (0, 0), list(layers), reason=reason)
    from hf_stepflow.saliency.compare import compare
    from hf_stepflow.saliency.engine import step_saliency

    vocabulary = model.stepflow_runtime.rules.vocabulary
    with model.disable_stepflow():
        maps: Any = step_saliency(
            model,
            [list(ids) for ids, _ in (*right, *wrong)],
            tokenizer=tokenizer,
            config=vocabulary,
            prompt_length=[length for _, length in (*right, *wrong)],
            progress=progress,
        )
    compared = compare(maps[: len(right)], maps[len(right) :], seed=seed, level=LEVEL)
    effects: dict[str, list[dict[str, Any]]] = {}
    for name in ("lock_in", "decay_share"):
        effects[name] = [
            {
                "effect": _number(one.effect),
                "p_value": _number(one.adjusted),
                "separates": one.separates,
                "difference": _number(one.difference),
            }
            for one in compared.indices[name]
        ]
    shallow, deep = bands_from(effects, list(layers))
    proposals = [quarter]
    if (shallow or deep) and (shallow, deep) != (quarter.oeb_layers, quarter.smi_layers):
        proposals.append(Proposal("saliency", shallow, deep))
    found = [f"lock-in in layers {shallow}"] * bool(shallow) + [f"decay in layers {deep}"] * bool(deep)
    reason = " and ".join(found) or "no layer separates right from wrong traces in the way that the paper describes"
    return Bands(proposals, (len(right), len(wrong)), list(layers), effects, reason)


def bands_from(effects: dict[str, list[dict[str, Any]]], layers: list[int]) -> tuple[list[int], list[int]]:
    """The longest run of separating layers in either half, the strongest effect first among equals.

    Args:
        effects: as in `Bands`.
        layers: the layers that they are of.

    Returns:
        Layers of the shallow half in which wrong traces show more lock-in, and of the deep half in which their summary
        draws less on the thinking.
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


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if value == value else None
