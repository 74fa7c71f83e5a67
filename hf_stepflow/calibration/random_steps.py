"""Steps that end anywhere: a control that shows whether it matters where a trace is cut."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from hf_stepflow.runtime.sentence_rules import START
from hf_stepflow.runtime.step_record import Feature, Field
from hf_stepflow.runtime.step_tables import LEADS_THINKING, RuleTable
from hf_stepflow.runtime.steps import StepVocabulary

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
    return replace(vocabulary, settings=settings, features=features, rules=rules, _on_device={}, _on_host=None)
