"""step_saliency: the maps of one trace or of many."""

from collections.abc import Sequence
from typing import Any

import torch

from hf_stepflow.runtime.attention_interface import attention_modules
from hf_stepflow.runtime.configuration_stepflow import Layers, resolve_layers
from hf_stepflow.runtime.errors import StepFlowInputError, StepFlowUnsupportedError
from hf_stepflow.runtime.trace import Trace, segment_trace

from .capture import Watch
from .loss import check_loss
from .pooling import pair_counts
from .result import StepSaliency
from .session import Session

# Tokens, padding included, that are put into one batch.
_BATCH_TOKENS = 4096


def step_saliency(
    model: Any,
    input_ids: Any,
    trace: "Trace | Sequence[Trace] | None" = None,
    *,
    tokenizer: Any = None,
    loss: "str | tuple[int, int]" = "trace",
    layers: Layers | None = None,
    pooling: str = "causal",
    chunk_size: int | None = None,
    per_head: bool = False,
    attention_mask: torch.Tensor | None = None,
    prompt_length: "int | Sequence[int | None] | None" = None,
    config: Any = None,
    checkpoints: bool | None = None,
    progress: bool = True,
) -> "StepSaliency | list[StepSaliency]":
    """Step-Saliency: how much each step of a trace draws on each other, layer by layer (paper; METHOD section 2).

    At the level of tokens I = mean over heads of |A * dL/dA|, with A the attention weights of a layer and L the loss;
    at the level of steps the mean of I over the token pairs of two steps. Exact, in memory linear in the trace. With
    StepFlow attached and on, A are the weights after the bridge. Nobody else may call the model meanwhile; calls of
    step_saliency in other threads wait.

    Args:
        model: a causal language model that StepFlow supports, with StepFlow attached or not, quantised or with
            adapters. Its modes, hooks, configs and gradients are as before afterwards.
        input_ids: token ids of one trace, [T] or [1, T]; or several: a list of such, or [B, T] with `attention_mask`.
        trace: the steps, one `Trace` for each; None cuts them by the tokenizer.
        tokenizer: the model's tokenizer; needed where `trace` is None and StepFlow is not attached.
        loss: "trace", the mean next-token cross-entropy; "summary", that of the summary's tokens; or (position,
            token_id), the logit of a token at a position.
        layers: the layers to look at: a list, "bottom:F", "top:F", or None for all with softmax attention.
        pooling: "causal", means over pairs of a token and an earlier one; "block", over all pairs as published.
        chunk_size: queries of a tile; None chooses. It changes memory and time, not the result.
        per_head: keep the heads apart.
        attention_mask: [B, T], zeros where rows are padded.
        prompt_length: for implicit thinking, where the prompt ends in each trace, padding not counted.
        config: step settings for the tokenizer; None takes those of StepFlow that are in force, or the defaults.
        checkpoints: compute layers a second time instead of keeping them; None does from 4096 tokens on.
        progress: show a bar over traces and layers, if there is more than a moment to wait.

    Returns:
        A `StepSaliency`, or a list where several traces were given.

    Raises:
        StepFlowInputError: an argument that does not fit.
        StepFlowUnsupportedError: a model that StepFlow cannot reach.
        StepFlowMemoryError: a trace that does not fit into memory, before any of it is taken.
    """
    model = _plain_model(model)
    rows, is_single = _rows(input_ids, attention_mask)
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise StepFlowInputError(f"chunk_size must be a positive number of queries, got {chunk_size!r}")
    lengths = _prompt_lengths(prompt_length, rows)
    traces = _traces(model, rows, trace, tokenizer, config, lengths)
    modules = attention_modules(model)
    if isinstance(layers, int):
        raise StepFlowInputError(f"layers must be a list or a band, got {layers}", hint=f"layers=[{layers}]")
    wanted = sorted(set(resolve_layers("layers", "all" if layers is None else layers, list(modules))))
    if not wanted:
        raise StepFlowInputError(f"layers={layers!r} names none", hint="leave it out to look at all layers")
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    for row, one in zip(rows, traces, strict=True):
        pair_counts(one, pooling)
        check_loss(loss, one, vocabulary)
        if int(row.max()) >= vocabulary or int(row.min()) < 0:
            raise StepFlowInputError(
                f"input_ids must lie in 0 to {vocabulary - 1}, got {int(row.min())} to {int(row.max())}"
            )
    if checkpoints not in (None, True, False):
        raise StepFlowInputError(f"checkpoints must be True, False or None, got {checkpoints!r}")
    session = Session(Watch(model, modules), wanted, loss, pooling, chunk_size, per_head, checkpoints, progress)
    results: list[StepSaliency | None] = [None] * len(rows)
    with torch.inference_mode(False), session:
        for batch in session.plan(_batches(rows, lengths), rows):
            found = session.run([rows[i] for i in batch], [traces[i] for i in batch], lengths[batch[0]])
            for index, maps in zip(batch, found, strict=True):
                results[index] = maps
    done = [one for one in results if one is not None]
    return done[0] if is_single else done


def _plain_model(model: Any) -> Any:
    """The causal language model inside a PEFT model.

    Raises:
        StepFlowInputError: no model at all.
        StepFlowUnsupportedError: adapters that are virtual tokens.
    """
    if not isinstance(model, torch.nn.Module):
        raise StepFlowInputError(f"model must be a loaded causal language model, got {type(model).__name__}")
    adapters: Any = getattr(model, "peft_config", None)
    if adapters is None or not hasattr(model, "get_base_model"):
        return model
    learned = [name for name, one in adapters.items() if one.is_prompt_learning]
    if learned:
        raise StepFlowUnsupportedError(
            f"the adapters {', '.join(learned)} put virtual tokens before the trace, which belong to no step",
            hint="look at the model without them",
        )
    inner: Any = model
    return inner.get_base_model()


def _rows(input_ids: Any, attention_mask: Any) -> tuple[list[torch.Tensor], bool]:
    """The traces' token ids without padding, and whether one trace was given and not a list."""
    try:
        if isinstance(input_ids, str | dict) or hasattr(input_ids, "keys"):
            raise TypeError(f"got {type(input_ids).__name__}")
        is_nested = not isinstance(input_ids, torch.Tensor) and len(input_ids) > 0 and hasattr(input_ids[0], "__len__")
        if is_nested:
            given = [torch.as_tensor(one) for one in input_ids]
        else:
            whole = torch.as_tensor(input_ids)
            given = [whole] if whole.ndim == 1 else list(whole)
        given = [one[0] if one.ndim == 2 and one.shape[0] == 1 else one for one in given]
        wrong = [one for one in given if one.ndim != 1 or one.is_floating_point() or one.dtype == torch.bool]
        if wrong:
            raise TypeError(f"got {wrong[0].dtype} of shape {list(wrong[0].shape)}")
        masks = None if attention_mask is None else [torch.as_tensor(one).bool() for one in attention_mask]
    except (TypeError, ValueError, RuntimeError) as error:
        raise StepFlowInputError(
            f"input_ids must be rows of token ids, [T] each: {error}",
            hint='for text, tokenizer(text, return_tensors="pt")["input_ids"]',
        ) from error
    if masks is not None:
        if [len(one) for one in masks] != [len(one) for one in given]:
            raise StepFlowInputError(
                f"attention_mask must have the shape of input_ids, rows of {[len(one) for one in given]}, got "
                f"{[len(one) for one in masks]}"
            )
        given = [row[mask.to(row.device)] for row, mask in zip(given, masks, strict=True)]
    short = [index for index, row in enumerate(given) if len(row) < 2]
    if short or not given:
        raise StepFlowInputError(f"a trace needs two tokens at least, traces {short} have less", hint="leave them out")
    return [row.long() for row in given], not is_nested and len(given) == 1


def _prompt_lengths(prompt_length: Any, rows: list[torch.Tensor]) -> list[int | None]:
    given = list(prompt_length) if hasattr(prompt_length, "__len__") else [prompt_length] * len(rows)
    if len(given) != len(rows):
        raise StepFlowInputError(f"prompt_length must be one number or {len(rows)}, got {len(given)}")
    for one, row in zip(given, rows, strict=True):
        if one is not None and (isinstance(one, bool) or one != int(one) or not 0 <= one <= len(row)):
            raise StepFlowInputError(f"prompt_length must be a number of tokens, 0 to {len(row)}, got {one!r}")
    return [None if one is None else int(one) for one in given]


def _traces(
    model: Any, rows: list[torch.Tensor], trace: Any, tokenizer: Any, config: Any, lengths: list[int | None]
) -> list[Trace]:
    """The trace of each row: those given, or cut by the tokenizer."""
    if trace is not None:
        traces = [trace] if isinstance(trace, Trace) else list(trace)
        if not all(isinstance(one, Trace) for one in traces):
            raise StepFlowInputError("trace must be a Trace, or a list of them", hint="segment_trace(...) makes one")
        found, expected = [len(one) for one in traces], [len(row) for row in rows]
        if found != expected:
            raise StepFlowInputError(
                f"trace must describe input_ids without padding: {expected} tokens, got {found}",
                hint="segment_trace(tokenizer, ids) makes one",
            )
        return traces
    runtime = getattr(model, "stepflow_runtime", None)
    if runtime is not None:
        tokenizer = runtime.tokenizer if tokenizer is None else tokenizer
        # Steps end where they do in the pass: inside a block of other settings, by those.
        config = (runtime.effective or runtime.rules).vocabulary if config is None else config
    if tokenizer is None:
        raise StepFlowInputError("the steps are not known", hint="pass trace=segment_trace(...), or tokenizer=...")
    return [segment_trace(tokenizer, row.cpu(), config, length) for row, length in zip(rows, lengths, strict=True)]


def _batches(rows: list[torch.Tensor], lengths: list[int | None]) -> list[list[int]]:
    """Traces of about one length and one prompt length together."""
    batches: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda one: (lengths[one] or 0, len(rows[one]))):
        last = batches[-1] if batches else []
        if last and lengths[last[0]] == lengths[index] and (len(last) + 1) * len(rows[index]) <= _BATCH_TOKENS:
            last.append(index)
        else:
            batches.append([index])
    return batches
