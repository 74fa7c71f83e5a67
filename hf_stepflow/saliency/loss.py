"""The loss whose gradient Step-Saliency follows, and its gradient at the last hidden states, without [T, V] logits.

Shapes: B batch, T tokens, D width of the hidden states, V vocabulary.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.step_detector import SUMMARY
from hf_stepflow.runtime.trace import Trace

from .capture import replace_attribute

# Elements of the logits that exist at a time.
LOGITS = 1 << 23


def loss_of_trace(loss: "str | tuple[int, int]", trace: Trace, vocabulary: int) -> "torch.Tensor | tuple[int, int]":
    """Resolves a loss on one trace.

    Args:
        loss: "trace", the mean next-token cross-entropy of all tokens but the first; "summary", that of the summary's
            tokens; or (position, token_id), the logit of a token at a position.
        trace: The trace, T tokens.
        vocabulary: The number of token ids.

    Returns:
        The weights of the positions' cross-entropies, float64 [T - 1], summing to 1; or the position and the token.

    Raises:
        StepFlowInputError: If the loss is none of these, or the trace has no such tokens.
    """
    if loss in ("trace", "summary"):
        counts = trace.segment_ids[1:] >= 0 if loss == "trace" else trace.segment_ids[1:] == SUMMARY
        if not counts.any():
            what = "two tokens" if loss == "trace" else "a summary"
            raise StepFlowInputError(
                f"loss={loss!r} needs a trace with {what}, and this one of {len(trace)} tokens has none",
                hint='take loss="trace", or a trace that ends its thinking' if loss != "trace" else None,
            )
        return counts.double() / counts.sum()
    if not (isinstance(loss, tuple) and len(loss) == 2 and all(type(one) is int for one in loss)):
        raise StepFlowInputError(f'loss must be "trace", "summary" or (position, token_id), got {loss!r}')
    position, token = loss
    if not 0 <= position < len(trace) or not 0 <= token < vocabulary:
        raise StepFlowInputError(
            f"loss=(position, token_id) needs a position below {len(trace)} and a token below {vocabulary}, got {loss}"
        )
    return loss


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
        losses: For each row the result of `loss_of_trace`.
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


def _logits(model: Any, decoder: Any, kind: type, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Turns hidden states [1, n, D] into logits [1, n, V] by the model's own head, scaling and softcap.

    In this thread, the decoder returns the hidden states meanwhile; hooks on it have acted already.
    """
    given = (hidden,) if kind is tuple else kind(last_hidden_state=hidden)
    original, thread = decoder.forward, threading.get_ident()

    def forward(*args: Any, **kwargs: Any) -> Any:
        return given if threading.get_ident() == thread else original(*args, **kwargs)

    with ExitStack() as undo:
        replace_attribute(undo, decoder, "forward", forward)
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            replace_attribute(undo, decoder, hooks, OrderedDict())
        output = model(input_ids=ids, use_cache=False, return_dict=kind is not tuple)
    return output[0] if isinstance(output, tuple) else output.logits
