"""Odds-Equal Bridge (OEB): the smallest change of one attention row that lifts the bridge to its floor, as two shifts.

Source: "Reasoning Fails Where Step Flow Breaks" (arXiv 2604.06695), the Odds-Equal Bridge. For one query and one head
the visible keys form three groups: S (`same`, the current segment), B (`bridge`, the context that must not be lost)
and O (all others, learned sinks included). With p the attention probabilities, OEB is the KL projection of p on
{q : q(O) = p(O), q(B) = floor}: one additive shift of the logits for each of S and B, and none for O.
"""

import torch
from torch import Tensor

BRIDGE_FLOORS = ("share", "absolute")

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
    """Computes the shifts of the Odds-Equal Bridge from group masses.

    With tau = min(sqrt(n_bridge / (n_bridge + n_same)), tau_max), the target masses are

        "share":     q(B) = tau * (p(S) + p(B)),  q(S) = (1 - tau) * (p(S) + p(B)),  where p(B) < q(B)
        "absolute":  q(B) = tau,                  q(S) = p(S) + p(B) - tau,          where p(B) < tau < p(S) + p(B)

    and the shifts are log(q(S) / p(S)) and log(q(B) / p(B)). They are formed from differences of the log masses, so
    that no small mass is ever exponentiated and a bridge of mass 1e-300 is lifted like any other.

    Args:
        log_same: Log mass of S: log-sum-exp of its visible logits, under any normaliser that all three share. -inf or
            any finite value where S is empty. Any shape [...]; the other arguments broadcast with it.
        log_bridge: Log mass of B, likewise.
        log_total: Log mass of all visible keys and learned sinks, used by the absolute floor only; None will do for
            "share".
        n_same: Number of visible keys in S, of any integer or float dtype.
        n_bridge: Number of visible keys in B.
        tau_max: The cap of the floor, a float in [0, 1] or a tensor that broadcasts.
        floor: "share" or "absolute".

    Returns:
        The shift of S [...], the shift of B [...] (both at least float32, 0 where inactive) and the bool [...] of the
        rows that are bridged.

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
