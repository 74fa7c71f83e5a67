"""Stage 4: the winner against the base on the held-out problems, once, and the ablations that say what helped."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hf_stepflow.evaluation.result import ArmComparison, EvaluationResult
from hf_stepflow.evaluation.statistics import Estimate
from hf_stepflow.runtime.step_detector import Feature, Field, StepVocabulary
from hf_stepflow.runtime.step_rules import LEADS_THINKING, START, RuleTable

from .candidates import CONTROL_TEMPERATURE, Settings, mechanisms, only, tidied
from .heads import table_of

GAIN, NO_GAIN, HARM = "gain", "no measurable gain", "harm"
LEVEL = 0.05

BASE = "base"


@dataclass(frozen=True)
class Measured:
    """One set of settings against the base, on the same problems.

    Attributes:
        name: of the settings.
        problems: n.
        base: the base's accuracy.
        accuracy: that of the settings.
        delta: their difference, with a bootstrap interval over problems.
        p_value: exact McNemar test (of several samples a problem: a sign-flip test).
        gained, lost: responses that only one of both has right.
        harm_rate: share of the problems that the base solves and the settings break; None for several samples.
        tokens_ratio: tokens per answer, relative to the base's.
        seconds_ratio: time, relative to the base's.
        changed: share of the responses whose text differs.
        smallest_delta: the true difference that n could have shown four times in five; None for none.
    """

    name: str
    problems: int
    base: Estimate
    accuracy: Estimate
    delta: Estimate
    p_value: float
    gained: int
    lost: int
    harm_rate: Estimate | None
    tokens_ratio: Estimate
    seconds_ratio: Estimate
    changed: float
    smallest_delta: float | None

    @property
    def verdict(self) -> str:
        """A gain or a harm only where both the interval and the exact test say so."""
        low, high = self.delta.low, self.delta.high
        if low is None or high is None or low <= 0 <= high or self.p_value >= LEVEL:
            return NO_GAIN
        return GAIN if low > 0 else HARM

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data, with the verdict."""
        return asdict(self) | {"verdict": self.verdict}


def measure(
    results: Mapping[str, Sequence[dict[str, Any]]], name: str, *, against: str = BASE, samples: int = 1, seed: int = 0
) -> Measured:
    """Compares two arms.

    Args:
        results: responses by arm, as the laboratory gives them.
        name: the arm.
        against: what it is held against.
        samples: responses to each problem.
        seed: of the resampling.
    """
    rows = [{**row, "arm": arm} for arm in (against, name) for row in results[arm]]
    run = {
        "arms": {against: {}, name: {}},
        "n_problems": len({row["problem"] for row in rows}),
        "n_samples": samples,
        "seed": seed,
    }
    result = EvaluationResult(run, {}, rows)
    base, own = result.arms()
    (found,) = result.comparisons
    return _measured(found, base.accuracy, own.accuracy)


def _measured(found: ArmComparison, base: Estimate, accuracy: Estimate) -> Measured:
    paired = found.paired
    return Measured(
        name=found.name,
        problems=paired.problems,
        base=base,
        accuracy=accuracy,
        delta=paired.delta,
        p_value=paired.p_value,
        gained=paired.gained,
        lost=paired.lost,
        harm_rate=paired.harm_rate,
        tokens_ratio=found.tokens_ratio,
        seconds_ratio=found.seconds_ratio,
        changed=found.changed,
        smallest_delta=paired.smallest_delta,
    )


RANDOM_STEPS = "random step boundaries"
RANDOM_HEADS = {"OEB": "random bridge heads", "length temperature": "random temperature heads"}


def ablations(
    winner: Settings, heads: dict[int, int], base_length: int, seed: int
) -> tuple[dict[str, Settings], dict[str, str]]:
    """What to run beside the winner, and what there is no sense in running.

    Args:
        winner: its settings.
        heads: {layer: query heads} of the model's softmax attention layers.
        base_length: context length up to which the temperature does nothing, where the winner has none of its own.
        seed: of the random heads.

    Returns:
        Settings by name, and the reasons for those left out.
    """
    acting = mechanisms(winner)
    found: dict[str, Settings] = {}
    left_out: dict[str, str] = {}
    for name in ("OEB", "SMI"):
        if acting == [name]:
            left_out[f"{name} only"] = "it is the winner"
        elif name in acting:
            found[f"{name} only"] = only(winner, name)
        else:
            left_out[f"{name} only"] = f"the winner has no {name}"
    if acting == ["length temperature"]:
        left_out["length temperature only"] = "it is the winner"
    elif "length temperature" in acting:
        found["length temperature only"] = only(winner, "length temperature")
    else:
        control = {"length_temperature": CONTROL_TEMPERATURE, "length_temperature_base": base_length}
        found["length temperature only"] = tidied(control)
    if "OEB" in acting or "SMI" in acting:
        found["bands in the middle"] = _in_the_middle(winner, heads)
        if found["bands in the middle"] == winner:
            del found["bands in the middle"]
            left_out["bands in the middle"] = "the winner's bands are there"
    else:
        left_out["bands in the middle"] = "the winner has no bands"
    for mechanism, name in RANDOM_HEADS.items():
        moved = _random_heads(mechanism, winner, heads, seed) if mechanism in acting else None
        if moved is not None:
            found[name] = moved
        elif mechanism in acting:
            left_out[name] = f"the winner's {mechanism} takes too many heads to find as many others"
        else:
            left_out[name] = f"the winner has no {mechanism}"
    return found, left_out


def depends_on_steps(settings: Settings) -> bool:
    """Whether it matters to these settings where steps end."""
    acting = mechanisms(settings)
    return "SMI" in acting or ("OEB" in acting and settings["bridge_scope"] == "step")


def _in_the_middle(winner: Settings, heads: dict[int, int]) -> Settings:
    """The bands moved to the middle of the layers, as wide as they are; heads keep their numbers."""
    layers = sorted(heads)
    moved: dict[str, Any] = dict(winner)
    for name in ("oeb_layers", "smi_layers"):
        if winner[name] not in ("none", []):
            width = len(winner[name])
            start = (len(layers) - width) // 2
            moved[name] = list(layers[start : start + width])
    table = winner["oeb_heads"]
    if table is not None:
        pairs = zip(sorted(map(int, table)), moved["oeb_layers"], strict=True)
        moved["oeb_heads"] = {str(new): [head for head in table[str(old)] if head < heads[new]] for old, new in pairs}
    return moved


def _random_heads(mechanism: str, winner: Settings, heads: dict[int, int], seed: int) -> Settings | None:
    """A mechanism on as many other heads of the model; None where there are not enough."""
    name = "oeb_heads" if mechanism == "OEB" else "length_temperature_heads"
    layers, table = winner["oeb_layers"] if mechanism == "OEB" else heads, winner[name]
    own = {
        (layer, head)
        for layer in layers
        for head in (range(heads[layer]) if table is None else table.get(str(layer), []))
    }
    others = sorted({(layer, head) for layer, number in heads.items() for head in range(number)} - own)
    if len(others) < len(own):
        return None
    drawn = table_of(random.Random(f"{seed}/{name}").sample(others, len(own)))
    moved = {**winner, name: drawn}
    return {**moved, "oeb_layers": [int(layer) for layer in drawn]} if mechanism == "OEB" else moved


# States of the generator below, a prime; token ids count by their remainder.
_STATES = 1021
_KINDS = 64


def random_steps(vocabulary: StepVocabulary, traces: Sequence[tuple[Sequence[int], int]], seed: int) -> StepVocabulary:
    """Step rules that cut at random places about as often as others cut by the text.

    Random means: by a congruential generator that every token of the thinking drives on. So a place depends on the
    tokens up to it alone, as every boundary must. Steps may be as short as one word.

    Args:
        vocabulary: the rules that cut by the text.
        traces: token ids of whole traces, and the lengths of their prompts: they tell how often.
        seed: another one cuts elsewhere.
    """
    wanted = _steps(vocabulary, traces)
    low, high = 0.0, 1.0
    for _ in range(12):  # pieces without a word are no steps, which makes the relation of chance and number crooked
        middle = (low + high) / 2
        low, high = (middle, high) if _steps(_cutting(vocabulary, middle, seed), traces) < wanted else (low, middle)
    return _cutting(vocabulary, high, seed)


def _steps(vocabulary: StepVocabulary, traces: Sequence[tuple[Sequence[int], int]]) -> int:
    """Thinking steps of all traces."""
    return sum(
        vocabulary.scan(list(ids), prompt_length=length)[-1][Field.THINKING_STEPS] for ids, length in traces if ids
    )


def _cutting(vocabulary: StepVocabulary, chance: float, seed: int) -> StepVocabulary:
    """Rules that end a step with a given chance before each token."""
    state = torch.arange(_STATES)
    kind = torch.arange(_KINDS)[:, None]
    following = (state * 233 + kind * 97 + seed % _STATES + 1) % _STATES
    # A number unlike the next state's, lest neighbouring states tell of one another.
    drawn = (following * 611 + 7) % _STATES
    transition = following | torch.where(drawn < chance * _STATES, LEADS_THINKING, 0)
    features = vocabulary.features.clone()
    features[:, Feature.RULE_ROW] = torch.arange(len(features)) % _KINDS
    features[:, Feature.SPLIT_ROW] = 0
    rules = RuleTable(
        row=features[:-1, Feature.RULE_ROW].int(),
        transition=transition,
        parts=vocabulary.rules.parts,
        split_row=torch.zeros_like(vocabulary.rules.split_row),
        split_variant=torch.zeros(1, _STATES, dtype=torch.long),
        split=torch.zeros(1, 9, dtype=torch.long),
        states=[START] * _STATES,  # in which no sentence has ended
    )
    settings = vocabulary.settings.replace(min_step_chars=0)
    return replace(vocabulary, settings=settings, features=features, rules=rules)
