"""Teacher-forced scoring: one forward pass tells whether greedy decoding would write a given trace, token by token."""

import inspect
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from hf_stepflow.runtime.errors import StepFlowInputError

# Positions, over all rows of a batch, whose probabilities are held at once.
_PIECE = 512


@dataclass(frozen=True)
class TraceScore:
    """How a model takes one given response.

    Attributes:
        exact: every token was the likeliest, so that greedy decoding writes this very response.
        first_error: place of the first token in the response that was not, or None.
        errors: number of tokens that were not.
        tokens: length of the response.
        log_likelihood: of the whole response, in nats.
    """

    exact: bool
    first_error: int | None
    errors: int
    tokens: int
    log_likelihood: float


@torch.no_grad()
def score_traces(
    model: Any,
    rows: Sequence[tuple[list[int], list[int]]],
    stepflow: Any = False,
    *,
    batch_tokens: int = 8192,
    progress: Any = None,
) -> list[TraceScore]:
    """Scores given responses under one setting of StepFlow.

    Args:
        model: the model; StepFlow must be attached unless `stepflow` is False.
        rows: token ids of each prompt and of its response.
        stepflow: as for `generate`.
        batch_tokens: tokens of a batch, padding included; at least one row goes into each.
        progress: called with the number of rows done after each batch.

    Raises:
        StepFlowInputError: settings for a model without StepFlow, or a row without prompt or response.
    """
    attached = getattr(model, "stepflow_runtime", None) is not None
    if not attached and stepflow is not False:
        raise StepFlowInputError(
            f"StepFlow is not attached to this model, so that stepflow={stepflow!r} would do nothing",
            hint="attach it first: StepFlowModelForCausalLM.attach(model, tokenizer=tokenizer)",
        )
    empty = [index for index, row in enumerate(rows) if not all(row)]
    if empty:
        raise StepFlowInputError(
            f"rows {empty[:10]} have no prompt or no response", hint="each needs a token at least"
        )
    scores: list[TraceScore | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index])))
    was_training = model.training
    model.eval()
    try:
        with model.use_stepflow(stepflow) if attached else nullcontext():
            for batch in _batches(order, rows, batch_tokens):
                for index, score in zip(batch, _score(model, [rows[index] for index in batch], attached), strict=True):
                    scores[index] = score
                if progress is not None:
                    progress(len(batch))
    finally:
        model.train(was_training)
    return [score for score in scores if score is not None]


def _batches(
    order: Iterable[int], rows: Sequence[tuple[list[int], list[int]]], batch_tokens: int
) -> Iterable[list[int]]:
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * sum(_widths([rows[one] for one in [*batch, index]])) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _widths(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest response."""
    return max(len(prompt) for prompt, _ in rows), max(len(response) for _, response in rows)


def _score(model: Any, rows: list[tuple[list[int], list[int]]], attached: bool) -> list[TraceScore]:
    # Prompts are padded on the left and responses on the right: all responses start in one column.
    before, after = _widths(rows)
    ids = torch.zeros(len(rows), before + after, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(rows):
        place = slice(before - len(prompt), before + len(response))
        ids[row, place] = torch.tensor(prompt + response)
        mask[row, place] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    extra: dict[str, Any] = {}
    if attached and model.stepflow_runtime.effective is not None:
        extra["prompt_length"] = before
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        extra["logits_to_keep"] = after + 1
    output = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, **extra)
    logits, targets = output.logits[:, -after - 1 : -1], ids[:, before:]
    right, likelihood = (part.cpu() for part in _compare(logits, targets))
    found = []
    for row, (_, response) in enumerate(rows):
        part = slice(0, len(response))
        wrong = (~right[row, part]).nonzero().flatten().tolist()
        first = wrong[0] if wrong else None
        found.append(
            TraceScore(not wrong, first, len(wrong), len(response), float(likelihood[row, part].double().sum()))
        )
    return found


def _compare(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each token is the likeliest, and its log likelihood.

    A piece of the response at a time: probabilities in float32 of all of it would take several times the memory of
    the logits.

    Args:
        logits: [rows, tokens, vocabulary], in the model's precision.
        targets: [rows, tokens], the ids of the response.

    Returns:
        Both [rows, tokens]; log likelihoods in float32.
    """
    right, likelihood = [], []
    size = max(1, _PIECE // len(targets))
    for piece, ids in zip(logits.split(size, 1), targets.split(size, 1), strict=True):
        right.append(piece.argmax(-1) == ids)
        likelihood.append(piece.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0])
    return torch.cat(right, 1), torch.cat(likelihood, 1)
