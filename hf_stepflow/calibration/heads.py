"""Which heads profit from the bridge: each tried alone by one forward pass, then together, one after another."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .candidates import tidied
from .proxy import ProxyScore

Settings = dict[str, Any]
Head = tuple[int, int]

# The floor under which heads are tried.
PROBE = 0.2

# Heads that may be chosen, and refusals in a row after which no more are tried.
MOST = 16
PATIENCE = 4


@dataclass(frozen=True)
class Heads:
    """What was found.

    Attributes:
        gains: {(layer, head): proxy value of a floor on this head alone}, of those that were tried.
        chosen: those that profit together, in the order in which they were added.
        untried: heads for which there was no time.
    """

    gains: dict[Head, float]
    chosen: list[Head] = field(default_factory=list)
    untried: int = 0

    @property
    def table(self) -> dict[int, list[int]]:
        """The chosen ones as `oeb_heads` takes them."""
        table: dict[int, list[int]] = {}
        for layer, head in sorted(self.chosen):
            table.setdefault(layer, []).append(head)
        return table

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        gains = [[layer, head, value] for (layer, head), value in self.gains.items()]
        return asdict(self) | {"gains": gains, "chosen": [list(one) for one in self.chosen]}


def floor_on(heads: Sequence[Head], tau_max: float = PROBE) -> Settings:
    """Settings that put a floor under these heads and do nothing else."""
    table: dict[str, list[int]] = {}
    for layer, head in sorted(heads):
        table.setdefault(str(layer), []).append(head)
    return tidied({"oeb_layers": [int(layer) for layer in table], "oeb_heads": table, "tau_max": tau_max})


def find_heads(
    heads: Sequence[Head],
    likelihoods: Callable[[Settings | None], list[float]],
    score: Callable[[list[float], list[float]], ProxyScore],
    is_over: Callable[[Head], bool],
) -> Heads:
    """Tries every head alone, then adds heads as long as the proxy grows by more than its error.

    Args:
        heads: (layer, head), the first to be tried first.
        likelihoods: of the responses under settings.
        score: holds likelihoods against others (before, after).
        is_over: whether time is up, asked before each head.
    """
    base = likelihoods(None)
    alone: dict[Head, ProxyScore] = {}
    for head in heads:
        if is_over(head):
            break
        alone[head] = score(base, likelihoods(floor_on([head])))
    chosen: list[Head] = []
    current, refused = base, 0
    promising = [head for head, one in alone.items() if one.value > one.error and one.is_harmless]
    for head in sorted(promising, key=lambda one: -alone[one].value):
        if refused >= PATIENCE or len(chosen) >= MOST:
            break
        tried = likelihoods(floor_on([*chosen, head]))
        gain = score(current, tried)
        if gain.value > gain.error and score(base, tried).is_harmless:
            chosen.append(head)
            current, refused = tried, 0
        else:
            refused += 1
    gains = {head: one.value for head, one in alone.items()}
    return Heads(gains, chosen, len(heads) - len(alone))
