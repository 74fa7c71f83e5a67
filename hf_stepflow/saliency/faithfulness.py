"""Faithfulness: whether step maps name the steps that the model needs, judged by suppressing steps one by one.

Shapes: L layers, S steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.trace import Trace

from .api import step_saliency
from .maps import pair_counts, step_of_token
from .suppression import suppressed_likelihoods, suppression_effects

# The judged maps: the measure of `step_saliency`, and whether it is a mean over token pairs or their sum.
MAPS = {
    "saliency": ("saliency", "mean"),
    "saliency_sum": ("saliency", "sum"),
    "attention": ("attention", "mean"),
    "attention_sum": ("attention", "sum"),
    "signed": ("signed", "mean"),
    "signed_sum": ("signed", "sum"),
}
RANDOM, TRUTH = "random", "truth"

_FEWEST = 3  # earlier steps that make an order


@dataclass(frozen=True)
class Faithfulness:
    """How well maps of one trace agree with suppression; the keys of the dicts are those of `MAPS`, and `random`.

    Attributes:
        layers: The layers.
        effects: What step i loses when step j is suppressed, in nats, [S, S]; see `suppression_effects`.
        thinking: Spearman's correlation between a map's row and the effects on the same step, over the thinking steps
            before it; the mean over thinking steps with at least three before them. One number a layer, then that of
            the mean over layers. NaN where no step qualifies.
        summary: The same for the summary, all of its steps as one.
        thinking_size: As `thinking`, with the sizes of the effects, up or down: maps without a sign know no more.
        summary_size: As `summary`, with the sizes of the effects.
        deletion: The area under the log likelihood of the summary, in nats a token, while thinking steps are
            suppressed one after another, the highest in the map (mean over layers) first. Lower is truer. Also
            `truth`, which orders by the effects themselves. NaN without a summary or with too few steps.
        insertion: The same, while all are suppressed and come back one after another. Higher is truer.
    """

    layers: list[int]
    effects: Tensor
    thinking: dict[str, list[float]]
    summary: dict[str, list[float]]
    thinking_size: dict[str, list[float]]
    summary_size: dict[str, list[float]]
    deletion: dict[str, float]
    insertion: dict[str, float]


def measure_faithfulness(
    model: Any,
    input_ids: Any,
    trace: Trace | None = None,
    *,
    tokenizer: Any = None,
    config: Any = None,
    prompt_length: int | None = None,
    points: int = 5,
    seed: int = 0,
) -> Faithfulness:
    """Judges Step-Saliency and other maps of one trace by suppressing its thinking steps.

    Maps of thinking steps are those of the loss of the whole trace, the summary's are those of its own loss. Questions
    are not suppressed: every trace needs its question, and models keep attention sinks there.

    Args:
        model: A causal language model that StepFlow supports, with StepFlow off.
        input_ids: Token ids of one trace, [T] or [1, T].
        trace: Its steps; None cuts them by the tokenizer.
        tokenizer: The model's tokenizer; needed where `trace` is None and StepFlow is not attached.
        config: Step settings for the tokenizer.
        prompt_length: For implicit thinking, the length of the prompt.
        points: The points of the deletion and insertion curves, beside the one where nothing has changed yet.
        seed: The seed of the random order.

    Raises:
        StepFlowInputError: An argument does not fit.
        StepFlowUnsupportedError: StepFlow is on, or cannot reach the model's attention.

    Example:
        >>> from hf_stepflow import load_reasoner
        >>> from hf_stepflow.saliency.faithfulness import measure_faithfulness
        >>> model, tokenizer = load_reasoner()
        >>> with model.disable_stepflow():  # doctest: +SKIP
        ...     found = measure_faithfulness(model, ids, tokenizer=tokenizer)
    """
    if type(points) is not int or points < 1:
        raise StepFlowInputError(f"points must be a whole number of at least 1, got {points!r}")
    steps = {"tokenizer": tokenizer, "config": config, "prompt_length": prompt_length, "progress": False}
    first = step_saliency(model, input_ids, trace, **steps)
    if isinstance(first, list):
        raise StepFlowInputError(f"measure_faithfulness takes one trace, got {len(first)}", hint="call it for each")
    trace, layers = first.trace, first.layers
    effects = suppression_effects(model, input_ids, trace)
    random = torch.rand(first.sums.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    counts = pair_counts(trace)
    sums = {"saliency": first.sums.double()}
    sums |= {name: _sums(model, input_ids, trace, name, "trace") for name in ("attention", "signed")}
    maps = _both_poolings(sums, counts.clamp(min=1)) | {RANDOM: random}
    found = [
        {name: _over_thinking(trace, one, each) for name, each in maps.items()} for one in (effects, effects.abs())
    ]
    readers, thoughts = _summary_and_its_thinking(trace)
    if len(thoughts) < _FEWEST:
        no_row, no_area = dict.fromkeys(maps, [math.nan] * (len(layers) + 1)), dict.fromkeys((*maps, TRUTH), math.nan)
        return Faithfulness(layers, effects, found[0], no_row, found[1], no_row, no_area, no_area)
    sums |= {name: _sums(model, input_ids, trace, name, "summary") for name in ("saliency", "signed")}
    rows = {name: one[:, readers][:, :, thoughts].sum(1) for name, one in (sums | {RANDOM: random}).items()}
    scores = {RANDOM: rows.pop(RANDOM)} | _both_poolings(rows, counts[readers][:, thoughts].sum(0))
    truth = effects[readers][:, thoughts].sum(0)
    orders = {name: _order(one.mean(0), thoughts) for name, one in scores.items()} | {TRUTH: _order(truth, thoughts)}
    own = [{name: _correlations(one, each) for name, one in scores.items()} for each in (truth, truth.abs())]
    areas = _areas(model, input_ids, trace, readers, orders, points)
    return Faithfulness(layers, effects, found[0], own[0], found[1], own[1], *areas)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation; NaN where either side has one value throughout.

    Example:
        >>> from hf_stepflow.saliency.faithfulness import rank_correlation
        >>> rank_correlation([1, 2, 3], [10, 30, 20])
        0.5
    """
    from scipy.stats import rankdata

    ranks = [rankdata(side) for side in (first, second)]
    one, other = (rank - rank.mean() for rank in ranks)
    norm = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / norm if norm > 0 else math.nan


def _sums(model: Any, input_ids: Any, trace: Trace, measure: str, loss: str) -> Tensor:
    """A measure summed over token pairs, float64 [L, S, S]."""
    found = step_saliency(model, input_ids, trace, loss=loss, measure=measure, progress=False)
    assert not isinstance(found, list)
    return found.sums.double()


def _both_poolings(sums: dict[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
    """By the keys of `MAPS`: means over token pairs, and sums."""
    return {name: sums[measure] / (counts if pooling == "mean" else 1) for name, (measure, pooling) in MAPS.items()}


def _summary_and_its_thinking(trace: Trace) -> tuple[list[int], list[int]]:
    """The steps of the last summary and the thinking steps before it in its round, as places in `trace.steps`."""
    rounds = [step.round for step in trace.steps if step.label == "summary"]
    if not rounds:
        return [], []
    readers = [place for place, step in enumerate(trace.steps) if (step.label, step.round) == ("summary", rounds[-1])]
    thoughts = [
        place for place, step in enumerate(trace.steps) if (step.label, step.round) == ("thinking", rounds[-1])
    ]
    return readers, [place for place in thoughts if place < readers[0]]


def _over_thinking(trace: Trace, effects: Tensor, maps: Tensor) -> list[float]:
    """Correlations of each layer and of the mean over layers, as means over thinking steps."""
    found = []
    for reader, step in enumerate(trace.steps):
        if step.label != "thinking":
            continue
        before = [
            place
            for place, other in enumerate(trace.steps[:reader])
            if (other.label, other.round) == ("thinking", step.round)
        ]
        if len(before) >= _FEWEST:
            found.append(_correlations(maps[:, reader][:, before], effects[reader, before]))
    table = np.array(found).reshape(len(found), len(maps) + 1)
    known = ~np.isnan(table)
    sums = np.where(known, table, 0.0).sum(0)
    return [float(total / n) if n else math.nan for total, n in zip(sums, known.sum(0), strict=True)]


def _correlations(scores: Tensor, truth: Tensor) -> list[float]:
    """Correlations of the rows of [L, steps] and of their mean with [steps]."""
    return [rank_correlation(row.tolist(), truth.tolist()) for row in (*scores, scores.mean(0))]


def _order(scores: Tensor, places: Sequence[int]) -> list[int]:
    """Places by their scores, the highest first; the earlier ones first among equals."""
    return [places[index] for index in scores.argsort(descending=True, stable=True).tolist()]


def _areas(
    model: Any, input_ids: Any, trace: Trace, readers: list[int], orders: dict[str, list[int]], points: int
) -> list[dict[str, float]]:
    """The areas under the deletion and the insertion curve of each order, by the trapezium rule."""
    from scipy.integrate import trapezoid

    number = len(next(iter(orders.values())))
    cuts = [round(number * point / points) for point in range(points + 1)]
    wanted = {}
    for name, order in orders.items():
        wanted[name] = [frozenset(order[:cut]) for cut in cuts], [frozenset(order[cut:]) for cut in cuts]
    sets = list(dict.fromkeys(one for both in wanted.values() for curve in both for one in curve))
    likelihoods = suppressed_likelihoods(model, input_ids, trace, [sorted(one) for one in sets])
    tokens = int(torch.isin(step_of_token(trace), torch.tensor(readers)).sum())
    height = dict(zip(sets, (likelihoods[:, readers].sum(1) / tokens).tolist(), strict=True))
    share = [cut / number for cut in cuts]
    return [
        {name: float(trapezoid([height[one] for one in both[which]], share)) for name, both in wanted.items()}
        for which in range(2)
    ]
