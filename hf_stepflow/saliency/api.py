"""step_saliency: the maps of one trace or of many."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import transformers
from transformers.utils import logging

from hf_stepflow.runtime.attention import AttentionCall, Output
from hf_stepflow.runtime.attention_interface import attention_modules
from hf_stepflow.runtime.errors import StepFlowInputError, StepFlowUnsupportedError
from hf_stepflow.runtime.settings import Layers, resolve_layers
from hf_stepflow.runtime.trace import Trace, segment_trace

from .capture import Capture, KeptOutputs
from .kernel import salient_attention
from .loss import hidden_gradient, loss_of_trace
from .maps import BatchSums, pair_counts
from .memory import Budget
from .result import StepSaliency

MEASURES = ("saliency", "attention", "signed")

# Tokens of a batch, padding included.
_BATCH_TOKENS = 4096


def step_saliency(
    model: Any,
    input_ids: Any,
    trace: "Trace | Sequence[Trace] | None" = None,
    *,
    tokenizer: Any = None,
    loss: "str | tuple[int, int]" = "trace",
    measure: str = "saliency",
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
    """Measures how much each step of a trace draws on each other step, layer by layer.

    The saliency of a pair of tokens is I = mean over heads of |A * dL/dA|, where A are the attention weights of a
    layer and L is the loss; the saliency of a pair of steps is the mean of I over their token pairs (docs/method.md,
    "Step-Saliency"). The result is exact and takes memory linear in the trace. With StepFlow attached and on, A are
    the weights after the bridge. No other thread may call the model meanwhile; calls of step_saliency in other
    threads wait.

    Args:
        model: A causal language model that StepFlow supports, with StepFlow attached or not, quantised or with
            adapters. Its modes, hooks, configs and gradients are restored afterwards.
        input_ids: Token ids of one trace, [T] or [1, T]; or of several, as a list or as [B, T] with `attention_mask`.
        trace: The steps, a `Trace` for each row; None cuts them by the tokenizer.
        tokenizer: The model's tokenizer; needed where `trace` is None and StepFlow is not attached.
        loss: "trace", the mean next-token cross-entropy; "summary", that of the summary's tokens; or (position,
            token_id), the logit of a token at a position.
        measure: "saliency", |A * dL/dA|; or, to compare with it, "attention", A alone; or "signed", -A * dL/dA, whose
            sum over token pairs is by how much the loss would rise, to first order, if the pairs' weights became
            zero. docs/saliency.md says which of them to trust.
        layers: The layers to measure: a list, "bottom:F", "top:F", or None for all with softmax attention.
        pooling: "causal", means over pairs of a token and an earlier one or itself; "block", over all pairs, as
            published.
        chunk_size: Queries that are worked on at a time; None chooses. It changes memory and time, not the result.
        per_head: Whether to keep the heads apart.
        attention_mask: Which tokens are not padding, [B, T]; 0 for padding.
        prompt_length: For implicit thinking, the length of the prompt in each trace, padding not counted.
        config: Step settings for the tokenizer; None takes StepFlow's settings in force, or the defaults.
        checkpoints: Whether to compute layers a second time instead of keeping them; None does from 4096 tokens on.
        progress: Whether to show a bar over traces and layers after two seconds.

    Returns:
        A `StepSaliency`, or a list where several traces were given.

    Raises:
        StepFlowInputError: If an argument does not fit.
        StepFlowUnsupportedError: If StepFlow cannot reach the model's attention.
        StepFlowMemoryError: If a trace does not fit into memory, before any trace is computed.

    Example:
        >>> from hf_stepflow import load_reasoner, step_saliency
        >>> model, tokenizer = load_reasoner()
        >>> print(step_saliency(model, tokenizer.encode("Any trace."), tokenizer=tokenizer))  # doctest: +SKIP
    """
    model = _plain_model(model)
    rows, is_single = _rows(input_ids, attention_mask)
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise StepFlowInputError(f"chunk_size must be a positive number of queries, got {chunk_size!r}")
    if measure not in MEASURES:
        raise StepFlowInputError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    lengths = _prompt_lengths(prompt_length, rows)
    modules = attention_modules(model)
    capture = Capture(model, modules)
    traces = _traces(capture, rows, trace, tokenizer, config, lengths)
    if isinstance(layers, int):
        raise StepFlowInputError(f"layers must be a list or a band, got {layers}", hint=f"layers=[{layers}]")
    wanted = sorted(set(resolve_layers("layers", "all" if layers is None else layers, list(modules))))
    if not wanted:
        raise StepFlowInputError(f"layers={layers!r} names none", hint="leave it out to measure all layers")
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    for row, one in zip(rows, traces, strict=True):
        pair_counts(one, pooling)
        if int(row.max()) >= vocabulary or int(row.min()) < 0:
            raise StepFlowInputError(
                f"input_ids must lie in 0 to {vocabulary - 1}, got {int(row.min())} to {int(row.max())}"
            )
    with torch.inference_mode(False):  # autograd takes no weights that were made in this mode
        losses = [loss_of_trace(loss, one, vocabulary) for one in traces]
    if checkpoints not in (None, True, False):
        raise StepFlowInputError(f"checkpoints must be True, False or None, got {checkpoints!r}")
    results: dict[int, StepSaliency] = {}
    # Transformers' tqdm honours the switch that turns all its bars off.
    bar = logging.tqdm(unit=" layers", desc="Step-Saliency", delay=2, leave=False, disable=not progress)
    with torch.inference_mode(False), capture.exclusive(), bar:
        budget = Budget(capture, wanted, chunk_size, checkpoints)
        call = _Call(capture, budget, wanted, loss, measure, pooling, per_head, bar)
        for batch in budget.plan(_batches(rows, lengths), rows):
            own = [(rows[index], traces[index], losses[index]) for index in batch]
            results.update(zip(batch, call.maps(own, lengths[batch[0]]), strict=True))
    return results[0] if is_single else [results[index] for index in range(len(rows))]


@dataclass(frozen=True)
class _Call:
    """The part of a call that all batches share: the arguments of `step_saliency`, checked.

    Attributes:
        bar: The progress bar.
    """

    capture: Capture
    budget: Budget
    layers: list[int]
    loss: "str | tuple[int, int]"
    measure: str
    pooling: str
    per_head: bool
    bar: Any

    def maps(self, batch: list[tuple[torch.Tensor, Trace, Any]], prompt_length: int | None) -> list[StepSaliency]:
        """Computes the maps of one batch.

        Args:
            batch: For each row its token ids, long [T], its steps, and its loss as `loss_of_trace` returns it.
            prompt_length: The length of each row's prompt.

        Raises:
            StepFlowMemoryError: If the batch does not fit.
            StepFlowInputError: If the loss is not a finite number.
        """
        capture, model, device = self.capture, self.capture.model, self.capture.device
        rows, traces, losses = (list(column) for column in zip(*batch, strict=True))
        # Padding stands on the right, where no token of a trace sees it.
        ids = torch.nn.utils.rnn.pad_sequence([row.cpu() for row in rows], batch_first=True).to(device)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]).long().to(device)
        chunk_size = self.budget.chunk(*ids.shape)
        # A mean over a long trace leaves half precision few digits.
        scale = 2.0 ** math.ceil(math.log2(ids.shape[1])) if model.dtype == torch.float16 else 1.0
        sums = BatchSums(traces, self.layers, self.per_head, self.bar.update)
        for_stepflow = {} if capture.rules is None else {"attention_mask": mask, "prompt_length": prompt_length}

        def attend(call: AttentionCall, kept: KeptOutputs | None) -> Output:
            collect = sums.collector(call.layer, call.query) if call.layer in self.layers else None
            return salient_attention(call, chunk_size, collect, kept, self.measure)

        def run() -> Any:
            return model(input_ids=ids, use_cache=False, logits_to_keep=1, **for_stepflow)

        with capture.running(run, attend, checkpoints=self.budget.checkpoints(ids.shape[1])) as decoded:
            with capture.stepflow_off():
                gradient, values = hidden_gradient(model, capture.decoder, decoded, ids, losses, scale)
            if not torch.isfinite(gradient).all():
                raise StepFlowInputError(
                    f"the model's loss or its gradient is not a number on this trace (losses {values})",
                    hint="look at the model's weights, or load it in another dtype",
                )
            torch.autograd.backward(decoded[0], gradient)
        about = self._about()
        unit = 1.0 if self.measure == "attention" else scale
        return [
            StepSaliency(part / unit, list(self.layers), trace, self.pooling, about | {"loss_value": value})
            for part, trace, value in zip(sums.finished(), traces, values, strict=True)
        ]

    def _about(self) -> dict[str, Any]:
        """The origin of the maps, for their file."""
        model, rules = self.capture.model, self.capture.rules
        return {
            "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
            "revision": getattr(model.config, "_commit_hash", None),
            "architecture": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "measure": self.measure,
            "loss": self.loss if isinstance(self.loss, str) else list(self.loss),
            "stepflow": None if rules is None else rules.plan.settings.to_dict(),
            "hf_stepflow": version("hf-stepflow"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def _plain_model(model: Any) -> Any:
    """The causal language model inside a PEFT model."""
    if not isinstance(model, torch.nn.Module):
        raise StepFlowInputError(f"model must be a loaded causal language model, got {type(model).__name__}")
    adapters: Any = getattr(model, "peft_config", None)
    if adapters is None or not hasattr(model, "get_base_model"):
        return model
    learned = [name for name, one in adapters.items() if one.is_prompt_learning]
    if learned:
        raise StepFlowUnsupportedError(
            f"the adapters {', '.join(learned)} put virtual tokens before the trace, which belong to no step",
            hint="measure the model without them",
        )
    inner: Any = model
    return inner.get_base_model()


def _rows(input_ids: Any, attention_mask: Any) -> tuple[list[torch.Tensor], bool]:
    """The traces' token ids without padding, and whether one trace was given rather than a list."""
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
    capture: Capture, rows: list[torch.Tensor], trace: Any, tokenizer: Any, config: Any, lengths: list[int | None]
) -> list[Trace]:
    """The trace of each row, as given or cut by the tokenizer."""
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
    runtime = getattr(capture.model, "stepflow_runtime", None)
    if runtime is not None:
        tokenizer = runtime.tokenizer if tokenizer is None else tokenizer
        # The settings in force cut the pass, also inside a block of other settings.
        config = (capture.rules or runtime.rules).vocabulary if config is None else config
    if tokenizer is None:
        raise StepFlowInputError("the steps are not known", hint="pass trace=segment_trace(...), or tokenizer=...")
    return [segment_trace(tokenizer, row.cpu(), config, length) for row, length in zip(rows, lengths, strict=True)]


def _batches(rows: list[torch.Tensor], lengths: list[int | None]) -> list[list[int]]:
    """Groups traces of similar length and equal prompt length."""
    batches: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda one: (lengths[one] or 0, len(rows[one]))):
        last = batches[-1] if batches else []
        if last and lengths[last[0]] == lengths[index] and (len(last) + 1) * len(rows[index]) <= _BATCH_TOKENS:
            last.append(index)
        else:
            batches.append([index])
    return batches
