"""The Odds-Equal Bridge (OEB): a floor under the attention mass on earlier context.

Source: "Reasoning Fails Where Step Flow Breaks" (arXiv 2604.06695), docs/method.md, "Odds-Equal Bridge". The keys
that a query sees fall into the current segment S, the bridge B and the others O. Where the mass p(B) is below the
floor, attention becomes the KL projection of p on {q : q(O) = p(O), q(B) = floor}: the masses of S and B change, the
proportions inside each group do not.

* `bridge_shifts` is the equation, on the log masses of the groups.
* `odds_equal_bridge` is the reference, on dense logits.
* `bridged_weights` is the general form: a group for each query and key. Each group has its own softmax, and the
  equation says how much mass each gets in the merged attention. So any mass keeps its digits, however small, without a
  second form for extreme masses and without asking the device.
* `bridged_merge` is the form where the keys of a group are a range: the output of ordinary attention, moved by that of
  attention over the bridge alone.
* `bridged_mixture` is the form where, besides, S and B are all that a query sees: attention over each, mixed.

Shapes: B batch, H query heads, Hkv key-value heads, G = H / Hkv, c queries, K keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .settings import StepFlowSettings
from .step_detector import THINKING, Field

BRIDGE_FLOORS = ("share", "absolute")

# From here on, log(1 + exp(x)) is x in float64, too.
_SOFTPLUS_LINEAR_FROM = 40.0


def bridge_shifts(
    log_same: Tensor,
    log_bridge: Tensor,
    log_total: Tensor | None,
    n_same: Tensor,
    n_bridge: Tensor,
    *,
    tau_max: float | Tensor,
    floor: str = "share",
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the shifts of the logits in S and B from the masses of the groups.

    With tau = min(sqrt(n_bridge / (n_bridge + n_same)), tau_max), the target masses are

        "share":     q(B) = tau * (p(S) + p(B)),  q(S) = (1 - tau) * (p(S) + p(B)),  where p(B) < q(B)
        "absolute":  q(B) = tau,                  q(S) = p(S) + p(B) - tau,          where p(B) < tau < p(S) + p(B)

    and the shifts are log(q(S) / p(S)) and log(q(B) / p(B)). They are formed from differences of log masses, so no
    small mass is ever exponentiated and a bridge of mass 1e-300 is lifted like any other.

    Args:
        log_same: Log mass of S: the log-sum-exp of its visible logits, under any normaliser that all three masses
            share. -inf or any finite value where S is empty. Shape [...]; the other arguments broadcast with it.
        log_bridge: Log mass of B, likewise.
        log_total: Log mass of all visible keys and learned sinks. Only the absolute floor uses it.
        n_same: Number of visible keys in S, of any integer or float dtype.
        n_bridge: Number of visible keys in B.
        tau_max: Cap of the floor, a float in [0, 1] or a tensor that broadcasts.
        floor: "share" or "absolute".

    Returns:
        The shift of S [...], the shift of B [...] (both at least float32, 0 where inactive), and a bool [...] that
        marks the rows that are bridged.

    Raises:
        ValueError: If `tau_max` is a float outside [0, 1], or `floor` is unknown or lacks `log_total`.
    """
    if floor not in BRIDGE_FLOORS:
        raise ValueError(f"floor must be one of {', '.join(BRIDGE_FLOORS)}, got {floor!r}")
    if not isinstance(tau_max, Tensor) and not 0.0 <= tau_max <= 1.0:
        raise ValueError(f"tau_max must be in [0, 1], got {tau_max}")

    dtype = torch.promote_types(torch.promote_types(log_same.dtype, log_bridge.dtype), torch.float32)
    n_same, n_bridge = n_same.to(dtype), n_bridge.to(dtype)
    n_both = n_same + n_bridge
    root = (n_bridge / n_both).sqrt()
    cap = tau_max.to(dtype) if isinstance(tau_max, Tensor) else root.new_full((), tau_max)
    tau = torch.minimum(root, cap)

    odds = log_bridge.to(dtype) - log_same.to(dtype)
    usable = (n_same > 0) & (n_bridge > 0) & odds.isfinite()
    odds = torch.where(usable, odds, 0.0)
    # log((p(S) + p(B)) / p(S))
    both_over_same = torch.nn.functional.softplus(odds, threshold=_SOFTPLUS_LINEAR_FROM)

    if floor == "share":
        # 1 - sqrt(r) = (1 - r) / (1 + sqrt(r)) stays positive where sqrt(r) rounds to 1.
        rest = torch.maximum(n_same / (n_both * (1 + root)), 1 - cap)
        shift_same = rest.log() + both_over_same
        shift_bridge = tau.log() + both_over_same - odds
        active = usable & (shift_bridge > 0)
    else:
        if log_total is None:
            raise ValueError("floor 'absolute' needs log_total, got None")
        total_over_same = torch.where(usable, log_total.to(dtype) - log_same.to(dtype), 0.0)
        held = (both_over_same - total_over_same).exp()
        feasible = held > tau
        shift_same = torch.where(feasible, held - tau, 1.0).log() + total_over_same
        shift_bridge = tau.log() + total_over_same - odds
        active = usable & feasible & (shift_bridge > 0)
    return torch.where(active, shift_same, 0.0), torch.where(active, shift_bridge, 0.0), active


def odds_equal_bridge(
    logits: Tensor,
    same: Tensor,
    bridge: Tensor,
    *,
    tau_max: float | Tensor,
    floor: str = "share",
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Applies the Odds-Equal Bridge to dense attention logits: the reference.

    A query and head without a visible key in S or in B, or whose bridge already holds the floor, keeps its logits bit
    for bit.

    Args:
        logits: Attention logits [B, H, c, K] after scaling, softcap and mask; -inf marks an invisible key. Pass
            float32 or float64 for an exact floor: half-precision logits are shifted in float32, then rounded.
        same: Bool, broadcastable to [B, H, c, K]: the keys of S. Invisible keys may be set and never count.
        bridge: Bool, broadcastable to [B, H, c, K]: the keys of B. No key may be in both groups.
        tau_max: Cap of the floor, in [0, 1]: a float, or a tensor broadcastable to [B, H, c] (for instance [H, 1],
            with 0 for the heads to leave alone).
        floor: "share" sets the floor as a share of the mass that S and B hold together; "absolute" is the paper's
            rule, which leaves a head alone where the floor reaches that mass.
        sink_logits: Learned sink logits [H], part of the softmax denominator, or None.

    Returns:
        Logits [B, H, c, K] of the dtype of `logits`. Their softmax, sinks included, is the projected attention.

    Raises:
        ValueError: If `tau_max` is a float outside [0, 1], or `floor`, the masks' dtype or the sinks' shape are wrong.

    Example:
        >>> import torch
        >>> question = torch.tensor([True, True, False])
        >>> logits = torch.tensor([[[[0.0, 0.0, 9.0]]]])
        >>> odds_equal_bridge(logits, ~question, question, tau_max=0.15).softmax(-1)[..., :2].sum()
        tensor(0.1500)
    """
    for name, mask in (("same", same), ("bridge", bridge)):
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} must be a bool mask, got {mask.dtype}")
    if sink_logits is not None and sink_logits.shape != logits.shape[1:2]:
        raise ValueError(
            f"sink_logits must hold one logit for each of the {logits.shape[1]} heads, got {list(sink_logits.shape)}"
        )

    work = logits.to(torch.promote_types(logits.dtype, torch.float32))
    visible = work > float("-inf")
    # An empty group gets a finite mass far below any real one, because log-sum-exp of -inf alone has a NaN gradient.
    nothing = torch.finfo(work.dtype).min / 2
    same, bridge = same & visible, bridge & visible
    log_same = work.masked_fill(~same, nothing).logsumexp(-1)
    log_bridge = work.masked_fill(~bridge, nothing).logsumexp(-1)
    log_total = None
    if floor == "absolute":
        log_total = work.masked_fill(~visible, nothing).logsumexp(-1)
        if sink_logits is not None:
            log_total = torch.logaddexp(log_total, sink_logits.to(work.dtype)[None, :, None])

    shift_same, shift_bridge, active = bridge_shifts(
        log_same, log_bridge, log_total, same.sum(-1), bridge.sum(-1), tau_max=tau_max, floor=floor
    )
    shift = torch.where(same, shift_same[..., None], shift_bridge[..., None])
    shifted = torch.where(active[..., None] & (same | bridge), work + shift, work)
    return shifted.to(logits.dtype)


def bridged_weights(
    logits: Tensor,
    same: Tensor,
    bridge: Tensor,
    *,
    tau_max: float | Tensor,
    floor: str,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the attention weights of many queries with the bridge.

    Args:
        logits: [B, H, c, K], float32 or float64, after scaling, softcap and mask; -inf marks an invisible key.
        same: Bool, broadcastable to the logits: visible keys of S.
        bridge: Bool, broadcastable to the logits: visible keys of B.
        tau_max: Cap of the floor, or one value a head, [H, 1].
        floor: "share" or "absolute".
        sink_logits: Learned sinks [H], in the denominator only.

    Returns:
        The weights [B, H, c, K], and the mass of the bridge before and after, [B, H, c].
    """
    nothing = torch.finfo(logits.dtype).min / 2
    # A finite stand-in for -inf: a query that sees no key at all gets weights that nobody uses, instead of NaN.
    logits = logits.clamp(min=nothing)
    # Products and sums with indicators: on a CPU torch.where takes several times as long, and everything is finite.
    in_same, in_bridge = same.to(logits.dtype), bridge.to(logits.dtype)
    others = 1 - in_same - in_bridge
    with torch.no_grad():  # the greatest logits cancel out, and so do their gradients
        top = logits.amax(-1, keepdim=True)
        lead = (logits + (1 - in_bridge) * nothing).amax(-1, keepdim=True) - top
    weights = torch.exp(logits - top - in_bridge * lead)
    sums = torch.stack([(weights * group).sum(-1) for group in (others, in_same, in_bridge)], -1)
    factors, before, after, total = _merged(
        sums,
        lead[..., 0],
        bridge_floors(same.sum(-1), bridge.sum(-1), tau_max, logits.dtype),
        floor,
        None if sink_logits is None else sink_logits.to(logits.dtype)[None, :, None] - top[..., 0],
    )
    factor_others, factor_same, factor_bridge = factors.split(1, -1)
    scale = (others * factor_others).addcmul(in_same, factor_same).addcmul(in_bridge, factor_bridge)
    return weights * scale, before / total, after / total


class Run(NamedTuple):
    """Neighbouring queries of one row whose bridge is one range of slots, the same for all of them.

    The keys of S are the slots from `same` to the query's own.

    Attributes:
        row: The row.
        first: The first query.
        last: The one after the last.
        same: The first slot of S.
        bridge: The slots of B, [start, end).
        has_others: Whether keys in neither group may hold mass, where the mask hides padding.
    """

    row: int
    first: int
    last: int
    same: int
    bridge: tuple[int, int]
    has_others: bool


def runs_of(records: list[list[list[int]]], slot: int, settings: StepFlowSettings) -> list[Run] | None:
    """The runs of the bridged queries, row by row; None where the keys of a group are not one range.

    Tool results within the round and padding within the trace are what divides a group.

    Args:
        records: The records of the queries of each row.
        slot: Slot of the first of them.
        settings: The settings.
    """
    runs: list[Run] = []
    for row, of_row in enumerate(records):
        first, ranges = 0, None
        for query, record in enumerate(of_row):
            now = None
            if record[Field.ACTIVE]:
                now = _ranges_of(record, slot + query, settings)
                if now is None:
                    return None
            if now != ranges:
                if ranges is not None:
                    runs.append(Run(row, first, query, *ranges))
                first, ranges = query, now
        if ranges is not None:
            runs.append(Run(row, first, len(of_row), *ranges))
    return runs


def is_divided(record: list[int], slot: int) -> bool:
    """Whether tool results in the round, or padding in the trace, may leave a group of a query in several ranges."""
    return record[Field.HAS_ASIDE] > 0 or record[Field.COUNT] != slot - record[Field.FIRST_SLOT] + 1


def _ranges_of(record: list[int], slot: int, settings: StepFlowSettings) -> "tuple[int, tuple[int, int], bool] | None":
    """The fields of a `Run` for one query; None where its groups are not ranges."""
    if is_divided(record, slot):
        return None
    first, start = record[Field.FIRST_SLOT], record[Field.THINKING_SLOT]
    after_sinks = first + settings.sink_tokens
    if record[Field.LABEL] % 3 == THINKING:
        if settings.bridge_scope == "step":
            start = max(start, record[Field.STEP_SLOT])
        return start, (after_sinks, max(start, after_sinks)), settings.sink_tokens > 0
    end = record[Field.SUMMARY_SLOT]
    start = max(start, after_sinks)
    return end, (start, max(end, start)), True


Attention = tuple[Tensor, Tensor]
"""The output of attention over some keys, [..., q, D], and its log-sum-exp over them, [..., q]."""


def bridged_merge(
    whole: Attention, bridge: Attention, same: Attention | None, floors: Tensor | float, floor: str, out: Tensor
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Bridges attention over all keys, given attention over the bridge alone.

    Moving mass from S to B moves the output along the difference of their means, so no weight is formed. Where S and
    B are all that a query sees, its mean of S need not be known: what it sees is a mixture of the two.

    Args:
        whole: Attention over all keys, [..., q, D] and [..., q]; the means may be in half precision.
        bridge: Attention over the bridge. Finite values where it is empty.
        same: Attention over the current segment; None where S and B are all that any of the queries sees.
        floors: The floors, as `bridge_floors` returns them, broadcastable to [..., q], or one for all.
        floor: "share" or "absolute".
        out: Where the output goes, [..., q, D]; may be that of `whole`.

    Returns:
        The output; the mass of the bridge before, [..., q]; and the mass that it has at least afterwards, [..., q] or
        of the shape of the floors.
    """
    log_bridge = bridge[1] - whole[1]
    mass = log_bridge.exp()
    if same is None:
        rest = floors - 1
        kept = torch.expm1(log_bridge).clamp(max=rest)  # minus the mass of S afterwards
        return _moved(whole[0], bridge[0], whole[0], 1 - rest / kept, out), mass, floors
    held = mass + (same[1] - whole[1]).exp()
    share = torch.where(floors < held, floors / held, 0.0) if floor == "absolute" else floors
    least = share * held
    return _moved(whole[0], bridge[0], same[0], (least - mass).clamp(min=0), out), mass, least


def bridged_mixture(
    same: Attention, bridge: Attention, floors: Tensor | float, out: Tensor
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Bridges attention to S and B, given attention over each, where they are all that the queries see.

    Args:
        same: Attention over the current segment, [..., q, D] and [..., q]; the means may be in half precision.
        bridge: Attention over the bridge. Finite values where it is empty.
        floors: The floors, as for `bridged_merge`; both rules ask for the same here.
        out: Where the output goes, [..., q, D].

    Returns:
        As `bridged_merge`.
    """
    mass = (bridge[1] - same[1]).sigmoid()
    return _moved(same[0], bridge[0], same[0], mass.clamp(min=floors), out), mass, floors


def _moved(whole: Tensor, there: Tensor, here: Tensor, moved: Tensor, out: Tensor) -> Tensor:
    """The output after a share of the attention mass has moved from one mean to another."""
    return torch.addcmul(whole, there - here, moved[..., None], out=out)


def bridge_floors(n_same: Tensor, n_bridge: Tensor, tau_max: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Returns tau = min(sqrt(n_bridge / (n_bridge + n_same)), tau_max), and 0 where a group is empty.

    Args:
        n_same: Number of visible keys in S.
        n_bridge: Number of visible keys in B.
        tau_max: Cap of the floor, a float or a tensor that broadcasts.
        dtype: Dtype of the result.
    """
    n_same, n_bridge = n_same.to(dtype), n_bridge.to(dtype)
    root = (n_bridge / (n_same + n_bridge).clamp(min=1)).sqrt()
    capped = torch.minimum(root, tau_max.to(dtype)) if isinstance(tau_max, Tensor) else root.clamp(max=tau_max)
    return capped * (n_same > 0)


def _merged(
    sums: Tensor, lead: Tensor, floors: Tensor, floor: str, sink_lead: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merges the softmaxes of the groups O, S and B, which the last dimension of size 3 lists.

    B has its own greatest logit, since it is lifted exactly where its mass may be too small for the number format. S
    and O need none: where their mass is that small, so is everything that becomes of it.

    Args:
        sums: The sum of exp(logit - top) of each group, [..., 3]; for B the top is that of B, else that of all keys.
        lead: The top of B minus that of all keys, [...].
        floors: The floors, as `bridge_floors` returns them, broadcastable to [...].
        floor: "share" or "absolute".
        sink_lead: Learned sinks minus the top of all keys, broadcastable to [...], or None.

    Returns:
        The factor of each group's exp(logit - top), [..., 3]; and the mass of B before and after and of everything, in
        one unit, [...].
    """
    others, same, own = sums.unbind(-1)
    bridge = own * lead.exp()
    held = same + bridge
    total = others + held
    if sink_lead is not None:
        total = total + sink_lead.exp()
    if floor == "absolute":
        floors = torch.where(floors * total < held, floors * total / held, 0.0)
    after = torch.maximum(bridge, floors * held)
    masses = torch.stack((others, held - after, after), -1)
    return masses / (sums.clamp(min=torch.finfo(sums.dtype).tiny) * total[..., None]), bridge, after, total


def joined(one: Attention, other: Attention) -> Attention:
    """Attention over the keys of both."""
    log_sum = torch.logaddexp(one[1], other[1])
    shares = ((part[1] - log_sum).exp()[..., None] for part in (one, other))
    first, second = (part[0] * share for part, share in zip((one, other), shares, strict=True))
    return (first + second).to(one[0].dtype), log_sum


class DecodeRanges(NamedTuple):
    """The ranges of one query a row.

    Attributes:
        keys: Number of keys.
        bias: Added to their logits, [B, 1, 1, keys]; None for nothing, and where attention over all is not wanted.
        has_others: Whether attention over all keys is wanted, since some row may see keys in neither group.
        bridge: The keys among which all rows have theirs of the bridge; None where there are none.
        same: The same for S; a row that is not bridged has all keys in S, unless attention over all is wanted.
        floors: The floors, [B, 1, 1] or [1 or B, Hkv, G], 0 for rows that are not bridged; or one for all.
        bridge_bias: Added to the logits of the bridge: far below any where a key is not the row's; None for nothing.
        same_bias: The same for S.
    """

    keys: int
    bias: Tensor | None
    has_others: bool = True
    bridge: tuple[int, int] | None = None
    same: tuple[int, int] | None = None
    floors: Tensor | float = 0.0
    bridge_bias: Tensor | None = None
    same_bias: Tensor | None = None


def slots_within(start: int, end: int, offset: int, keys: int) -> tuple[int, int]:
    """Slots as keys of a layer, as far as it still holds them."""
    start = min(max(start - offset, 0), keys)
    return start, min(max(end - offset, start), keys)
