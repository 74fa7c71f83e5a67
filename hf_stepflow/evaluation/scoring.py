"""Teacher-forced scoring: whether greedy decoding would write a given trace, token by token, in one forward pass."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from hf_stepflow.runtime.errors import StepFlowInputError

from .sampler import prepared

# Positions, over all rows of a batch, whose probabilities exist at once.
_PIECE = 512

# The token ids of a prompt and of its response.
Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class TraceScore:
    """The score of one given response.

    Attributes:
        exact: Whether every token was the likeliest, so that greedy decoding writes this very response.
        first_error: The index in the response of the first token that was not, or None.
        errors: The number of tokens that were not.
        tokens: The length of the response.
        log_likelihood: The log likelihood of the whole response, in nats.
    """

    exact: bool
    first_error: int | None
    errors: int
    tokens: int
    log_likelihood: float


@torch.no_grad()
def score_traces(
    model: Any,
    rows: Sequence[Row],
    stepflow: Any = False,
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int], Any] | None = None,
) -> list[TraceScore]:
    """Scores given responses under one setting of StepFlow.

    Args:
        model: The model; StepFlow must be attached unless `stepflow` is False.
        rows: The token ids of each prompt and of its response.
        stepflow: The StepFlow settings, as for `generate`.
        batch_tokens: The number of tokens of a batch, including padding; a batch has at least one row.
        progress: A function that is called after each batch with the number of its rows.

    Returns:
        The score of each row.

    Raises:
        StepFlowInputError: The settings need StepFlow, which is not attached; or a row has no prompt or no response.

    Example:
        >>> from hf_stepflow import load_reasoner, score_traces
        >>> model, tokenizer = load_reasoner()
        >>> score_traces(model, [(tokenizer.encode("Ann has"), tokenizer.encode(" 3 points."))])[0].tokens > 1
        True
    """
    attached = getattr(model, "stepflow_runtime", None) is not None
    if not attached and stepflow is not False:
        raise StepFlowInputError(
            f"StepFlow is not attached to this model, so stepflow={stepflow!r} would do nothing",
            hint="attach it first: StepFlowModelForCausalLM.attach(model, tokenizer=tokenizer)",
        )
    empty = [index for index, row in enumerate(rows) if not all(row)]
    if empty:
        raise StepFlowInputError(
            f"rows {empty[:10]} have no prompt or no response", hint="give each at least one token"
        )
    scores: dict[int, TraceScore] = {}
    with prepared(model), model.use_stepflow(stepflow) if attached else nullcontext():
        for batch in batches(rows, batch_tokens):
            made = _score(model, [rows[index] for index in batch], attached)
            scores.update(zip(batch, made, strict=True))
            if progress is not None:
                progress(len(batch))
    return [scores[index] for index in range(len(rows))]


def batches(rows: Sequence[Row], batch_tokens: int) -> Iterable[list[int]]:
    """Groups the indices of rows that go through the model together, shortest rows first."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index]))):
        if batch and (len(batch) + 1) * sum(_widths([rows[one] for one in [*batch, index]])) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _widths(rows: Sequence[Row]) -> tuple[int, int]:
    """The number of tokens of the longest prompt and of the longest response."""
    return max(len(prompt) for prompt, _ in rows), max(len(response) for _, response in rows)


def _score(model: Any, rows: list[Row], attached: bool) -> list[TraceScore]:
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
    right, likelihood = (part.cpu() for part in _compare(output.logits[:, -after - 1 : -1], ids[:, before:]))
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

    Works on a piece of the response at a time: float32 probabilities of the whole would take several times the memory
    of the logits.

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
