"""Suppression: how likely the steps of a trace are while no later token may attend to some of the others.

A step is suppressed by masking its keys from the query after its last token on, in every layer; its own tokens still
see it. The log likelihood that a later step loses is what the model took from the suppressed step, on any path.

Shapes: R rows, T tokens, S steps, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_stepflow.runtime.attention import AttentionCall, Output, visible_keys
from hf_stepflow.runtime.attention_interface import attention_modules
from hf_stepflow.runtime.errors import StepFlowInputError, StepFlowUnsupportedError
from hf_stepflow.runtime.trace import Trace

from .capture import Capture, KeptOutputs
from .kernel import chunk_length, salient_attention
from .maps import step_of_token

# Tokens of a batch, and elements of its logits.
_BATCH_TOKENS, _LOGITS = 1 << 13, 1 << 27


def suppressed_likelihoods(model: Any, input_ids: Any, trace: Trace, suppressed: Sequence[Sequence[int]]) -> Tensor:
    """The log likelihood of every step of a trace while attention to some steps is suppressed.

    Args:
        model: A causal language model that StepFlow supports, with StepFlow off.
        input_ids: Token ids of the trace, [T] or [1, T].
        trace: Its steps.
        suppressed: For each row the suppressed steps, as places in `trace.steps`; none for the model as it is.

    Returns:
        For each row and step, the sum over the step's tokens of their log likelihood, in nats, float64 [R, S]. The
        first token of a trace is not predicted.

    Raises:
        StepFlowInputError: The ids do not fit the trace, or there is no such step.
        StepFlowUnsupportedError: StepFlow is on, or cannot reach the model's attention.

    Example:
        >>> from hf_stepflow import load_reasoner, segment_trace
        >>> from hf_stepflow.saliency.suppression import suppressed_likelihoods
        >>> model, tokenizer = load_reasoner()
        >>> ids = tokenizer.encode("<|user|> Ann has 3 points.<|end|><|assistant|><think> Ann has 3 points.</think>")
        >>> with model.disable_stepflow():
        ...     suppressed_likelihoods(model, ids, segment_trace(tokenizer, ids), [[], [0]]).shape
        torch.Size([2, 2])
    """
    ids = torch.as_tensor(input_ids).reshape(-1)
    steps, place = len(trace.steps), step_of_token(trace)
    if len(ids) != len(trace):
        raise StepFlowInputError(f"input_ids must be the {len(trace)} tokens of the trace, got {len(ids)}")
    unknown = sorted({step for row in suppressed for step in row if not 0 <= step < steps})
    if unknown:
        raise StepFlowInputError(f"the trace has the steps 0 to {steps - 1}, got {unknown[:5]}")
    capture = Capture(model, attention_modules(model))
    if capture.rules is not None:
        raise StepFlowUnsupportedError(
            "suppression masks attention, and StepFlow would still inject the values of suppressed steps",
            hint="call it inside of model.disable_stepflow()",
        )
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    size = max(1, min(_BATCH_TOKENS // len(ids), _LOGITS // (len(ids) * vocabulary)))
    found = []
    with torch.inference_mode(False), capture.exclusive():
        for start in range(0, len(suppressed), size):
            hidden = torch.stack([_hidden(trace, place, row) for row in suppressed[start : start + size]])
            found.append(_by_step(_token_likelihoods(capture, ids, hidden), place, steps))
    return torch.cat(found) if found else torch.empty(0, steps, dtype=torch.float64)


def suppression_effects(model: Any, input_ids: Any, trace: Trace) -> Tensor:
    """Measures what every step loses when an earlier one is suppressed.

    Args:
        model: As for `suppressed_likelihoods`.
        input_ids: Token ids of the trace, [T] or [1, T].
        trace: Its steps.

    Returns:
        The log likelihood of step i as it is, minus that with step j suppressed, in nats, float64 [S, S]; NaN where j
        is not before i. Positive entries are steps that help.

    Raises:
        StepFlowError: As `suppressed_likelihoods`.
    """
    steps = len(trace.steps)
    likelihoods = suppressed_likelihoods(model, input_ids, trace, [[], *([step] for step in range(steps))])
    effects = (likelihoods[0] - likelihoods[1:]).T
    return effects.masked_fill(torch.ones(steps, steps, dtype=torch.bool).triu(), float("nan"))


def _hidden(trace: Trace, place: Tensor, suppressed: Sequence[int]) -> Tensor:
    """Which keys each query may not see, bool [T, T]."""
    hidden = torch.zeros(len(place), len(place), dtype=torch.bool)
    for step in suppressed:
        hidden[trace.steps[step].end :, place == step] = True
    return hidden


def _token_likelihoods(capture: Capture, ids: Tensor, hidden: Tensor) -> Tensor:
    """The log likelihood of every token but the first in every row, float64 [R, T - 1] on the CPU."""
    rows, hidden = ids.expand(len(hidden), -1).to(capture.device), hidden[:, None]

    def attend(call: AttentionCall, kept: KeptOutputs | None) -> Output:
        batch, heads, tokens, _ = call.query.shape
        return salient_attention(_without(call, hidden), chunk_length(batch, heads, tokens, call.query.device), None)

    logits: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            logits.append(capture.model(input_ids=rows, use_cache=False).logits)

    with capture.running(run, attend, checkpoints=False):
        found = []
        for row in logits[0].detach():  # a row at a time: probabilities of all would take as much memory again
            wide = row[:-1].to(torch.promote_types(row.dtype, torch.float32))
            found.append(-torch.nn.functional.cross_entropy(wide, rows[0, 1:].to(row.device), reduction="none"))
    return torch.stack(found).double().cpu()


def _without(call: AttentionCall, hidden: Tensor) -> AttentionCall:
    """A call in which some keys are hidden, [R, 1, T, T]."""
    tokens, device = call.query.shape[2], call.query.device
    hidden = hidden.to(device)
    if call.mask is None:  # plain causal attention
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        return replace(call, mask=causal & ~hidden)
    visible, bias = visible_keys(None, call.mask, 0, tokens, tokens, tokens)
    seen = visible.to(device) & ~hidden
    if bias is None:
        return replace(call, mask=seen)
    return replace(call, mask=torch.where(seen, bias, torch.finfo(bias.dtype).min))


def _by_step(tokens: Tensor, place: Tensor, steps: int) -> Tensor:
    """Sums over the tokens of each step: [R, T - 1] to [R, S]."""
    inside = place[1:] >= 0
    sums = torch.zeros(len(tokens), steps, dtype=tokens.dtype)
    return sums.index_add_(1, place[1:][inside], tokens[:, inside])
