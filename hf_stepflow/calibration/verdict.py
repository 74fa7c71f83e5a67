"""The verdict: the winner against the base on the held-out problems, once, and ablations that show what helped."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from hf_stepflow.evaluation.result import EvaluationResult, percent
from hf_stepflow.evaluation.statistics import Estimate, PairedComparison, adjust, compare
from hf_stepflow.runtime.step_detector import Feature, Field, StepVocabulary
from hf_stepflow.runtime.step_rules import LEADS_THINKING, START, RuleTable

from .candidates import CONTROL_TEMPERATURE, MECHANISMS, Settings, mechanisms, only, tidied
from .heads import table_of
from .non_inferiority import BOUND, non_inferiority, problems_needed
from .non_inferiority import LEVEL as NON_INFERIOR
from .strata import TERCILES

GAIN, NO_GAIN, HARM, TRADE = "gain", "no measurable gain", "harm", "trade"
# A gain whose problems are too few to exclude harm in every stratum.
UNPROVEN = "gain, harm not excluded"
# Of a stratum: harm beyond the bound is excluded; or there are too few problems to say.
NO_HARM, OPEN = "no harm", "too few problems"
LEVEL = 0.05

BASE = "base"

MIDDLE = "bands in the middle"
RANDOM_HEADS = {"OEB": "random bridge heads", "length temperature": "random temperature heads"}
RANDOM_STEPS = "random step boundaries"

# The states of the generator behind random steps, a prime; token ids count by their remainder.
_STATES = 1021
_KINDS = 64


@dataclass(frozen=True)
class Measured(PairedComparison):
    """Settings compared with the base on the same problems.

    Attributes:
        name: The name of the settings.
        base: The base's accuracy.
        accuracy: The accuracy under the settings.
        tokens_ratio: Tokens per answer, relative to the base's.
        seconds_ratio: Time, relative to the base's.
        changed: The share of responses whose text differs.
    """

    name: str
    base: Estimate
    accuracy: Estimate
    tokens_ratio: Estimate
    seconds_ratio: Estimate
    changed: float

    @property
    def verdict(self) -> str:
        """A gain or a harm if both the interval and the exact test show it, else no measurable gain."""
        low, high = self.delta.low, self.delta.high
        if low is None or high is None or low <= 0 <= high or self.p_value >= LEVEL:
            return NO_GAIN
        return GAIN if low > 0 else HARM

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready data with the verdict."""
        return asdict(self) | {"verdict": self.verdict}

    def __str__(self) -> str:
        """One sentence."""
        harm = "" if self.harm_rate is None else f", breaks {self.harm_rate.value:.1%} of what the base solves"
        power = "no difference" if self.smallest_delta is None else f"{100 * self.smallest_delta:.1f} points"
        return (
            f"{percent(self.delta, '+')} points on {self.problems} problems (base {100 * self.base.value:.1f}), "
            f"gained {self.gained}, lost {self.lost}{harm}, p = {self.p_value:.3g}; n could have shown {power}; "
            f"tokens x{self.tokens_ratio.value:.2f}, time x{self.seconds_ratio.value:.2f}, {self.changed:.0%} of the "
            "responses changed."
        )


@dataclass(frozen=True)
class Stratum:
    """Settings compared with the base on the problems of one stratum.

    Attributes:
        name: The source, and the tercile of length.
        problems: The number of problems.
        base: The base's accuracy.
        delta: The difference in accuracy, with its interval.
        gained: The number of results that only the settings have right.
        lost: The number of results that only the base has right.
        p_value: The exact two-sided p-value that nothing changes.
        adjusted_p_value: The same after Holm's adjustment for the number of strata.
        harm_p_value: The one-sided p-value that the bound or more is lost.
        needed: The number of problems that would exclude this loss with a chance of 80 %; None if it is excluded.
    """

    name: str
    problems: int
    base: float
    delta: Estimate
    gained: int
    lost: int
    p_value: float
    adjusted_p_value: float
    harm_p_value: float
    needed: int | None

    @property
    def verdict(self) -> str:
        """`gain` or `harm` by the adjusted test; else `no harm` if the loss is excluded, or `too few problems`."""
        if self.adjusted_p_value < LEVEL and self.delta.value < 0:
            return HARM
        if self.adjusted_p_value < LEVEL and self.is_harmless:
            return GAIN
        return NO_HARM if self.is_harmless else OPEN

    @property
    def is_harmless(self) -> bool:
        """Whether a loss of the bound or more is excluded.

        All strata have to pass, so each is tested at the full level: an intersection-union test (Berger, Technometrics
        24, 1982, p. 295).
        """
        return self.harm_p_value <= NON_INFERIOR

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready data with the verdict."""
        return asdict(self) | {"verdict": self.verdict}


def judge_strata(
    results: Mapping[str, Sequence[dict[str, Any]]],
    name: str,
    strata: Mapping[str, str],
    bound: float = BOUND,
    seed: int = 0,
) -> list[Stratum]:
    """Compares an arm with the base in every stratum, by their responses as `CalibrationRun.answers` returns them.

    Args:
        results: {arm: responses}.
        name: The arm.
        strata: {problem: stratum}.
        bound: The loss of accuracy to exclude, a share.
        seed: The seed of resampling.
    """
    by_problem: dict[str, dict[str, list[bool]]] = {}
    for arm in (BASE, name):
        for row in sorted(results[arm], key=lambda one: one["sample"]):
            by_problem.setdefault(row["problem"], {}).setdefault(arm, []).append(row["right"])
    grouped: dict[str, list[dict[str, list[bool]]]] = {}
    for problem, rows in sorted(by_problem.items()):
        grouped.setdefault(strata[problem], []).append(rows)
    names = sorted(grouped, key=_by_length)
    pairs = [([one[BASE] for one in grouped[key]], [one[name] for one in grouped[key]]) for key in names]
    compared = [compare(base, own, seed) for base, own in pairs]
    found = []
    for key, (base, own), one, adjusted in zip(
        names, pairs, compared, adjust([one.p_value for one in compared]), strict=True
    ):
        changes = [float(np.mean(second) - np.mean(first)) for first, second in zip(base, own, strict=True)]
        p_value = non_inferiority(changes, bound)
        found.append(
            Stratum(
                key,
                one.problems,
                float(np.mean([np.mean(first) for first in base])),
                one.delta,
                one.gained,
                one.lost,
                one.p_value,
                adjusted,
                p_value,
                None if p_value <= NON_INFERIOR else problems_needed(float(np.mean(np.square(changes))), bound),
            )
        )
    return found


def _by_length(name: str) -> tuple[str, int]:
    source, _, tercile = name.rpartition(", ")
    return (source, TERCILES.index(tercile)) if tercile in TERCILES else (name, 0)


def overall(measured: "Measured | None", strata: Sequence[Stratum]) -> str:
    """Returns the verdict on settings from the whole and from every stratum.

    Args:
        measured: The comparison on all problems; None if nothing was compared.
        strata: The comparisons in each stratum.
    """
    if measured is None:
        return NO_GAIN
    verdicts = [one.verdict for one in strata]
    if HARM in verdicts and measured.verdict != HARM and (measured.verdict == GAIN or GAIN in verdicts):
        return TRADE
    if HARM in verdicts:
        return HARM
    if measured.verdict == GAIN and not all(one.is_harmless for one in strata):
        return UNPROVEN
    return measured.verdict


def measure(
    results: Mapping[str, Sequence[dict[str, Any]]], name: str, *, against: str = BASE, samples: int = 1, seed: int = 0
) -> Measured:
    """Compares an arm with another, by their responses as `CalibrationRun.answers` returns them."""
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
    return Measured(
        **vars(found.paired),
        name=name,
        base=base.accuracy,
        accuracy=own.accuracy,
        tokens_ratio=found.tokens_ratio,
        seconds_ratio=found.seconds_ratio,
        changed=found.changed,
    )


def ablations(
    winner: Settings, heads: dict[int, int], base_length: int, seed: int
) -> tuple[dict[str, Settings], dict[str, str]]:
    """Returns the ablations that make sense for the winner, and the reason for leaving out each of the others.

    Args:
        winner: The winner's settings.
        heads: {layer: query heads} of the model's softmax attention layers.
        base_length: The base of the length temperature in its control, for a winner without one.
        seed: The seed of the random heads.

    Returns:
        {name: settings} and {name: reason for leaving it out}. `RANDOM_STEPS` has the winner's settings.
    """
    acting = mechanisms(winner)
    found: dict[str, Settings] = {}
    left_out: dict[str, str] = {}
    for mechanism in MECHANISMS:
        name = f"{mechanism} only"
        if acting == [mechanism]:
            left_out[name] = "it is the winner"
        elif mechanism in acting:
            found[name] = only(winner, mechanism)
        elif mechanism == "length temperature":
            control = {"length_temperature": CONTROL_TEMPERATURE, "length_temperature_base": base_length}
            found[name] = tidied(control)
        else:
            left_out[name] = f"the winner has no {mechanism}"
    if not {"OEB", "SMI"} & set(acting):
        left_out[MIDDLE] = "the winner has no bands"
    elif (moved := _in_the_middle(winner, heads)) == winner:
        left_out[MIDDLE] = "the winner's bands are there"
    else:
        found[MIDDLE] = moved
    for mechanism, name in RANDOM_HEADS.items():
        if mechanism not in acting:
            left_out[name] = f"the winner has no {mechanism}"
        elif (others := _random_heads(mechanism, winner, heads, seed)) is None:
            left_out[name] = f"the winner's {mechanism} takes too many heads to find as many others"
        else:
            found[name] = others
    if depends_on_steps(winner):
        found[RANDOM_STEPS] = winner
    else:
        left_out[RANDOM_STEPS] = "the winner does not depend on where steps end"
    return found, left_out


def depends_on_steps(settings: Settings) -> bool:
    """Whether it matters to these settings where steps end."""
    acting = mechanisms(settings)
    return "SMI" in acting or ("OEB" in acting and settings["bridge_scope"] == "step")


def _in_the_middle(winner: Settings, heads: dict[int, int]) -> Settings:
    """Moves the bands to the middle of the layers; their widths and head numbers stay."""
    layers = sorted(heads)
    moved: dict[str, Any] = dict(winner)
    for name in ("oeb_layers", "smi_layers"):
        if winner[name] not in ("none", []):
            width = len(winner[name])
            start = (len(layers) - width) // 2
            moved[name] = layers[start : start + width]
    table = winner["oeb_heads"]
    if table is not None:
        pairs = zip(sorted(map(int, table)), moved["oeb_layers"], strict=True)
        moved["oeb_heads"] = {str(new): [head for head in table[str(old)] if head < heads[new]] for old, new in pairs}
    return moved


def _random_heads(mechanism: str, winner: Settings, heads: dict[int, int], seed: int) -> Settings | None:
    """Moves a mechanism to as many other heads; None if there are not enough."""
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


def random_steps(vocabulary: StepVocabulary, traces: Sequence[tuple[Sequence[int], int]], seed: int) -> StepVocabulary:
    """Returns step rules that cut at random places, about as often as the given rules cut by the text.

    A congruential generator, which every token of the thinking advances, draws the places. So each place depends only
    on the tokens before it, as every boundary must. A step may be as short as one word.

    Args:
        vocabulary: The rules that cut by the text.
        traces: Token ids of whole traces and the lengths of their prompts, from which the frequency is taken.
        seed: The seed of the places.
    """
    wanted = _count_steps(vocabulary, traces)
    low, high = 0.0, 1.0
    for _ in range(12):  # the count is no simple function of the chance, since pieces without a word are no steps
        middle = (low + high) / 2
        is_rare = _count_steps(_cut_by_chance(vocabulary, middle, seed), traces) < wanted
        low, high = (middle, high) if is_rare else (low, middle)
    return _cut_by_chance(vocabulary, high, seed)


def _count_steps(vocabulary: StepVocabulary, traces: Sequence[tuple[Sequence[int], int]]) -> int:
    return sum(
        vocabulary.scan(list(ids), prompt_length=length)[-1][Field.THINKING_STEPS] for ids, length in traces if ids
    )


def _cut_by_chance(vocabulary: StepVocabulary, chance: float, seed: int) -> StepVocabulary:
    """Returns step rules that end a step with this chance before each token."""
    state = torch.arange(_STATES)
    kind = torch.arange(_KINDS)[:, None]
    following = (state * 233 + kind * 97 + seed % _STATES + 1) % _STATES
    # Hashed once more, so that neighbouring states do not draw neighbouring numbers.
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
        states=[START] * _STATES,  # in none of them has a sentence ended
    )
    settings = vocabulary.settings.replace(min_step_chars=0)
    return replace(vocabulary, settings=settings, features=features, rules=rules)
