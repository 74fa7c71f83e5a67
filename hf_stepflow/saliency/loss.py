"""The loss whose gradient Step-Saliency follows, and its gradient at the last hidden states, without [T, V] logits.

Shapes: B batch, T tokens, D width of the hidden states, V vocabulary.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.step_detector import SUMMARY
from hf_stepflow.runtime.trace import Trace

# Elements of the logits that exist at a time.
LOGITS = 1 << 23


def loss_weights(loss: "str | tuple[int, int]", trace: Trace) -> torch.Tensor:
    """Weighs each position's next-token cross-entropy.

    Args:
        loss: "trace", the mean over all tokens but the first, or "summary", over the summary's tokens.
        trace: The trace.

    Returns:
        The weights, float64 [T - 1], summing to 1.

    Raises:
        StepFlowInputError: If the trace has no such tokens.
    """
    counts = trace.segment_ids[1:] >= 0 if loss == "trace" else trace.segment_ids[1:] == SUMMARY
    if not counts.any():
        what = "two tokens" if loss == "trace" else "a summary"
        raise StepFlowInputError(
            f"loss={loss!r} needs a trace with {what}, and this one of {len(trace)} tokens has none",
            hint='take loss="trace", or a trace that ends its thinking' if loss != "trace" else None,
        )
    return counts.double() / counts.sum()


def check_loss(loss: Any, trace: Trace, vocabulary: int) -> None:
    """Checks that a loss exists on this trace.

    Raises:
        StepFlowInputError: If it does not.
    """
    if loss in ("trace", "summary"):
        loss_weights(loss, trace)
        return
    if not (isinstance(loss, tuple) and len(loss) == 2 and all(type(one) is int for one in loss)):
        raise StepFlowInputError(f'loss must be "trace", "summary" or (position, token_id), got {loss!r}')
    position, token = loss
    if not 0 <= position < len(trace) or not 0 <= token < vocabulary:
        raise StepFlowInputError(
            f"loss=(position, token_id) needs a position below {len(trace)} and a token below {vocabulary}, got {loss}"
        )


def hidden_gradient(
    model: Any,
    decoder: Any,
    decoded: Any,
    ids: torch.Tensor,
    losses: "Sequence[torch.Tensor | tuple[int, int]]",
    scale: float = 1.0,
) -> tuple[torch.Tensor, list[float]]:
    """Computes the gradient of the sum of the rows' losses at the last hidden states.

    Args:
        model: The causal language model, whose own code turns hidden states into logits.
        decoder: The part of it that makes hidden states.
        decoded: The output of the decoder; the last hidden states [B, T, D] come first.
        ids: Token ids, long [B, T].
        losses: For each row the weights of `loss_weights`, or the position and the token whose logit is the loss.
        scale: A factor of the gradient, so that half precision does not lose it.

    Returns:
        The gradient [B, T, D], and the loss of each row.
    """
    hidden = decoded[0]
    gradient = torch.zeros_like(hidden)
    values = [0.0] * len(losses)
    chunk = max(1, LOGITS // model.config.get_text_config(decoder=True).vocab_size)
    for row, loss in enumerate(losses):
        if isinstance(loss, tuple):
            ranges = [(loss[0], loss[0] + 1)]
        else:
            used = loss.nonzero()[:, 0]
            first, last = int(used[0]), int(used[-1]) + 1
            ranges = [(start, min(start + chunk, last)) for start in range(first, last, chunk)]
        for start, end in ranges:
            part = hidden[row : row + 1, start:end].detach().requires_grad_()
            logits = _logits(model, decoder, type(decoded), part, ids[row : row + 1, start:end])[0]
            work = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if isinstance(loss, tuple):
                value = work[0, loss[1]]
            else:
                each = torch.nn.functional.cross_entropy(work, ids[row, start + 1 : end + 1], reduction="none")
                value = (each * loss[start:end].to(each)).sum()
            gradient[row, start:end] = torch.autograd.grad(value * scale, part)[0][0]
            values[row] += float(value.detach())
    return gradient, values


def decoder_output(decoder: Any, run: Callable[[], Any]) -> Any:
    """Returns the output of a model's decoder when `run` calls the model."""
    kept: list[Any] = []
    hook = decoder.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        run()
    finally:
        hook.remove()
    return kept[-1]


def _logits(model: Any, decoder: Any, kind: type, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Turns hidden states [1, n, D] into logits [1, n, V] by the model's own head, scaling and softcap."""
    given = (hidden,) if kind is tuple else kind(last_hidden_state=hidden)
    with _decoder_returns(decoder, given):
        output = model(input_ids=ids, use_cache=False, return_dict=kind is not tuple)
    return output[0] if isinstance(output, tuple) else output.logits


@contextmanager
def _decoder_returns(decoder: Any, output: Any) -> Iterator[None]:
    """Makes the decoder return `output` in this thread; hooks on it have acted already."""
    own, original, thread = decoder.__dict__.get("forward"), decoder.forward, threading.get_ident()
    hooks = decoder._forward_hooks, decoder._forward_pre_hooks

    def forward(*args: Any, **kwargs: Any) -> Any:
        return output if threading.get_ident() == thread else original(*args, **kwargs)

    decoder.forward = forward
    decoder._forward_hooks, decoder._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        decoder._forward_hooks, decoder._forward_pre_hooks = hooks
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
