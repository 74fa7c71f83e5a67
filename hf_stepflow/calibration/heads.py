"""Heads: each is tried alone under a mechanism, then those that profit are added to one another, the best first."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .candidates import Settings, tidied
from .proxy import ProxyScore

Head = tuple[int, int]

# The floor and the length temperature at which heads are tried.
PROBE_FLOOR = 0.2
PROBE_TEMPERATURE = 1.0

# The most heads to choose, and the number of refusals in a row that ends the choice.
MOST = 16
PATIENCE = 4


@dataclass(frozen=True)
class Heads:
    """The heads that profit from a mechanism.

    Attributes:
        gains: {(layer, head): proxy value of the mechanism on this head alone} for each head that was tried.
        chosen: The heads that profit together, in the order in which they were added.
        untried: The number of heads that there was no time for.
        slopes: {(layer, head): slope of the loss in the mass moved to the bridge}, by which the heads were ordered;
            empty where they were not.
    """

    gains: dict[Head, float]
    chosen: list[Head] = field(default_factory=list)
    untried: int = 0
    slopes: dict[Head, float] = field(default_factory=dict)

    @property
    def table(self) -> dict[int, list[int]]:
        """The chosen heads by layer."""
        return {int(layer): own for layer, own in table_of(self.chosen).items()}

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready data."""
        gains = [[layer, head, value] for (layer, head), value in self.gains.items()]
        slopes = [[layer, head, value] for (layer, head), value in self.slopes.items()]
        return asdict(self) | {"gains": gains, "chosen": [list(one) for one in self.chosen], "slopes": slopes}


def floor_on(heads: Sequence[Head]) -> Settings:
    """Returns settings that put a floor under these heads and do nothing else."""
    table = table_of(heads)
    return tidied({"oeb_layers": [int(layer) for layer in table], "oeb_heads": table, "tau_max": PROBE_FLOOR})


def temperature_on(heads: Sequence[Head], base: int) -> Settings:
    """Returns settings that sharpen these heads in contexts longer than the base and do nothing else."""
    probe = {"length_temperature": PROBE_TEMPERATURE, "length_temperature_base": base}
    return tidied({**probe, "length_temperature_heads": table_of(heads)})


def table_of(heads: Sequence[Head]) -> dict[str, list[int]]:
    """Groups heads by layer, in the JSON form of settings."""
    table: dict[str, list[int]] = {}
    for layer, head in sorted(heads):
        table.setdefault(str(layer), []).append(head)
    return table


def find_heads(
    heads: Sequence[Head],
    acting_on: Callable[[Sequence[Head]], Settings],
    scores: Callable[[Settings | None], list[Any]],
    score: Callable[[list[Any], list[Any]], ProxyScore],
    is_over: Callable[[Head, bool], bool],
) -> Heads:
    """Tries every head alone, then adds heads as long as the proxy grows by more than its error.

    Args:
        heads: (layer, head) pairs in the order in which to try them.
        acting_on: Returns settings with the mechanism on some heads.
        scores: Returns the score of each response under settings.
        score: Compares these before and after.
        is_over: Returns whether time is up; asked before each head is tried alone (False) or added to others (True).
    """
    base = scores(None)
    alone: dict[Head, ProxyScore] = {}
    for head in heads:
        if is_over(head, False):
            break
        alone[head] = score(base, scores(acting_on([head])))
    chosen: list[Head] = []
    current, refused = base, 0
    promising = [head for head, one in alone.items() if one.value > one.error and one.is_harmless]
    for head in sorted(promising, key=lambda one: -alone[one].value):
        if refused >= PATIENCE or len(chosen) >= MOST or (chosen and is_over(head, True)):
            break
        tried = scores(acting_on([*chosen, head]))
        gain = score(current, tried)
        if gain.value > gain.error and score(base, tried).is_harmless:
            chosen.append(head)
            current, refused = tried, 0
        else:
            refused += 1
    gains = {head: one.value for head, one in alone.items()}
    return Heads(gains, chosen, len(heads) - len(alone))
