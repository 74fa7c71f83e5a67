"""Traces and saliency made up for tests of what is read from maps: no model, any structure."""

from collections.abc import Sequence

import numpy as np
import torch

from hf_stepflow.runtime.trace import Trace
from hf_stepflow.saliency.maps import INDICES, pair_counts
from hf_stepflow.saliency.result import StepSaliency

QUESTION, THINKING, SUMMARY, CONTROL = 0, 1, 2, -1
ABOUT = {"model": "made/up", "loss": "trace"}


def trace_of(*rounds: Sequence[tuple[int, int]]) -> Trace:
    """A trace of rounds, each a list of (label, tokens) by step; CONTROL tokens are in no step."""
    segments, steps, numbers = [], [], []
    for number, pieces in enumerate(rounds, 1):
        step, label = 0, QUESTION
        for piece, tokens in pieces:
            label = label if piece == CONTROL else piece
            step += piece in (THINKING, SUMMARY)
            segments += [label] * tokens
            steps += [{QUESTION: 0, CONTROL: -1}.get(piece, step)] * tokens
            numbers += [number] * tokens
    return Trace(torch.tensor(segments), torch.tensor(steps), torch.tensor(numbers))


def simple_trace(thinking: int, summary: int, tokens: int = 4) -> Trace:
    """One round of steps of equal length."""
    return trace_of([(QUESTION, tokens), *[(THINKING, tokens)] * thinking, *[(SUMMARY, tokens)] * summary])


def random_saliency(
    trace: Trace, layers: int = 2, seed: int = 0, about: dict | None = None, zero_beyond: int | None = None
) -> StepSaliency:
    """Maps of random positive cells, zero where a step lies further back than `zero_beyond` steps."""
    counts = pair_counts(trace)
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(layers, *counts.shape, generator=generator, dtype=torch.float64) + 0.01
    maps = maps * 10.0 ** -torch.arange(layers)[:, None, None]
    if zero_beyond is not None:
        maps = maps.triu(-zero_beyond)
    return StepSaliency(maps * counts, list(range(layers)), trace, about=dict(ABOUT if about is None else about))


def with_indices(values: np.ndarray, **changes) -> StepSaliency:
    """Saliency whose indices are given, [indices, L]."""
    trace = simple_trace(1, 0)
    layers = values.shape[1]
    made = {"layers": list(range(layers)), "trace": trace, "about": dict(ABOUT), **changes}
    saliency = StepSaliency(torch.ones(layers, 2, 2), **made)
    saliency.__dict__["indices"] = {
        name: torch.from_numpy(row.copy()) for name, row in zip(INDICES, values, strict=True)
    }
    return saliency
