"""The order of heads: how the loss would change if a little mass moved to the bridge, from one backward pass a trace.

Moving a mass e from the current segment S of a query to its bridge B, in proportion to the weights in each, changes
the head's output by e (o_B - o_S), where o_B and o_S are the outputs of attention over B and over S alone. The
derivative of the loss in e, summed over the queries, is the signed Step-Saliency of the bridge and the segment, each
divided by its mass: sum_t dL/do_t (o_B - o_S). It is a slope at zero: a floor that moves much mass may do otherwise.
"""

from collections.abc import Sequence
from typing import Any

import torch

from hf_stepflow.runtime.attention import AttentionCall, Output, visible_keys
from hf_stepflow.runtime.attention_interface import attention_modules
from hf_stepflow.runtime.trace import Trace, segment_trace
from hf_stepflow.saliency.capture import Capture, KeptOutputs
from hf_stepflow.saliency.kernel import salient_attention
from hf_stepflow.saliency.loss import hidden_gradient

from .heads import Head

# Queries that are worked on at a time.
_CHUNK = 256


def bridge_slopes(
    model: Any, traces: Sequence[tuple[Sequence[int], int]], tokenizer: Any, config: Any = None
) -> dict[Head, float]:
    """Returns the derivative of the mean loss of responses in the mass that a head moves to its bridge.

    A negative slope says that the loss falls where the head looks at the bridge a little more. While thinking, the
    bridge is the question and the segment the thinking; in the summary they are the thinking and the summary.

    Args:
        model: The model, analysed with StepFlow off.
        traces: Token ids of prompt and response, and the length of the prompt, of each trace.
        tokenizer: The model's tokenizer.
        config: Step settings or a vocabulary; None for the defaults.

    Returns:
        {(layer, head): slope in nats a token, for a unit of mass at every query}, the mean over the traces.

    Raises:
        StepFlowUnsupportedError: The model's attention is out of reach.

    Example:
        >>> from hf_stepflow.calibration.order import bridge_slopes
        >>> slopes = bridge_slopes(model, [(ids, 20)], tokenizer)  # doctest: +SKIP
        >>> sorted(slopes, key=slopes.get)[:4]  # the heads to try first  # doctest: +SKIP
    """
    modules = attention_modules(model)
    capture = Capture(model, modules)
    total: dict[Head, float] = {}
    with torch.inference_mode(False), capture.exclusive():
        for ids, prompt_length in traces:
            trace = segment_trace(tokenizer, list(ids), config, prompt_length)
            slopes = _slopes_of(capture, list(ids), prompt_length, trace)
            for layer, values in slopes.items():
                for head, value in enumerate(values.tolist()):
                    total[layer, head] = total.get((layer, head), 0.0) + value / len(traces)
    return total


def _slopes_of(capture: Capture, ids: list[int], prompt_length: int, trace: Trace) -> dict[int, torch.Tensor]:
    """The slopes of one trace by layer: float64 [H]."""
    model, device = capture.model, capture.device
    rows = torch.tensor([ids], device=device)
    segments, steps = torch.as_tensor(trace.segment_ids).to(device), torch.as_tensor(trace.step_ids).to(device)
    is_asking = (segments >= 1) & (steps >= 0)  # markers stand in a segment and belong to no step
    moved: dict[int, torch.Tensor] = {}

    def attend(call: AttentionCall, kept: KeptOutputs | None) -> Output:
        output, weights = salient_attention(call, _CHUNK, None, kept)
        change = _bridge_minus_segment(call, segments, is_asking)
        mass = moved.setdefault(call.layer, torch.zeros(change.shape[2], device=output.device, requires_grad=True))
        return output + (mass[None, None, :, None] * change).to(output.dtype), weights

    weights = torch.zeros(len(ids) - 1, dtype=torch.float64)
    weights[prompt_length - 1 :] = 1 / (len(ids) - prompt_length)

    def run() -> Any:
        return model(input_ids=rows, use_cache=False, logits_to_keep=1)

    with capture.stepflow_off(), capture.running(run, attend, checkpoints=False) as decoded:
        gradient, _ = hidden_gradient(model, capture.decoder, decoded, rows, [weights])
        torch.autograd.backward(decoded[0], gradient)
    return {layer: mass.grad.double().cpu() for layer, mass in moved.items() if mass.grad is not None}


@torch.no_grad()
def _bridge_minus_segment(call: AttentionCall, segments: torch.Tensor, is_asking: torch.Tensor) -> torch.Tensor:
    """The change of the output for a unit of mass moved from the segment to the bridge: [1, T, H, Dv].

    Zero for queries of the question, for markers, and for queries that see no key of the one or the other.

    Args:
        call: The call of attention over a whole trace.
        segments: The segment of every token, long [T]: 0 question, 1 thinking, 2 summary.
        is_asking: Which queries have a bridge, bool [T].
    """
    number, heads = len(segments), call.query.shape[1]
    value = call.value.repeat_interleave(heads // call.value.shape[1], 1)
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    change = torch.zeros(1, heads, number, value.shape[-1], device=value.device, dtype=value.dtype)
    for start in range(0, number, _CHUNK):
        end = min(start + _CHUNK, number)
        logits = call.logits(call.query[:, :, start:end], number)
        if call.mask is None:
            visible = torch.ones(end - start, number, dtype=torch.bool, device=value.device).tril(start)[None, None]
        else:
            visible, bias = visible_keys(None, call.mask, start, end, number, number)
            logits = logits if bias is None else logits + bias
        bias = call.kwargs.get("position_bias")
        logits = logits if bias is None else logits + bias[:, :, start:end, :number]
        own = segments[start:end, None]
        parts = []
        for wanted in (own - 1, own):  # the bridge, then the segment
            seen = visible & (segments[None, :] == wanted)[None, None]
            parts.append((seen.any(-1, keepdim=True), logits.masked_fill(~seen, -torch.inf).softmax(-1)))
        (has_bridge, bridge), (has_segment, segment) = parts
        is_moved = has_bridge & has_segment & is_asking[start:end, None][None, None]
        change[:, :, start:end] = torch.where(is_moved, (bridge - segment).to(value.dtype) @ value, 0.0)
    return change.transpose(1, 2)


def by_slope(heads: Sequence[Head], slopes: dict[Head, float]) -> list[Head]:
    """Returns heads in the order in which to try them: the steepest fall of the loss first."""
    return sorted(heads, key=lambda one: (slopes.get(one, 0.0), one))


def steepest_band(layers: Sequence[int], slopes: dict[Head, float], width: int) -> list[int]:
    """Returns the run of `width` layers over which the loss falls most; empty if it falls over none.

    Args:
        layers: The layers with softmax attention, ascending.
        slopes: The slopes of their heads.
        width: The number of layers.
    """
    sums = [sum(value for (layer, _), value in slopes.items() if layer == one) for one in layers]
    starts = range(len(layers) - width + 1)
    best = min(starts, key=lambda start: sum(sums[start : start + width]))
    return list(layers[best : best + width]) if sum(sums[best : best + width]) < 0 else []
