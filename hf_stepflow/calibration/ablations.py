"""Ablations of the winner: whether it is the mechanism that helps, or anything done to the model."""

import random
from typing import Any

from .candidates import CONTROL_TEMPERATURE, Settings, mechanisms, only, tidied
from .heads import table_of

RANDOM_STEPS = "random step boundaries"
RANDOM_HEADS = {"OEB": "random bridge heads", "length temperature": "random temperature heads"}


def ablations(
    winner: Settings, heads: dict[int, int], base_length: int, seed: int
) -> tuple[dict[str, Settings], dict[str, str]]:
    """What to run beside the winner, and what there is no sense in running.

    Args:
        winner: its settings.
        heads: {layer: query heads} of the model's softmax attention layers.
        base_length: context length up to which the temperature does nothing, where the winner has none of its own.
        seed: of the random heads.

    Returns:
        Settings by name, and the reasons for those left out.
    """
    acting = mechanisms(winner)
    found: dict[str, Settings] = {}
    left_out: dict[str, str] = {}
    for name in ("OEB", "SMI"):
        if acting == [name]:
            left_out[f"{name} only"] = "it is the winner"
        elif name in acting:
            found[f"{name} only"] = only(winner, name)
        else:
            left_out[f"{name} only"] = f"the winner has no {name}"
    if acting == ["length temperature"]:
        left_out["length temperature only"] = "it is the winner"
    elif "length temperature" in acting:
        found["length temperature only"] = only(winner, "length temperature")
    else:
        control = {"length_temperature": CONTROL_TEMPERATURE, "length_temperature_base": base_length}
        found["length temperature only"] = tidied(control)
    if "OEB" in acting or "SMI" in acting:
        found["bands in the middle"] = _in_the_middle(winner, heads)
        if found["bands in the middle"] == winner:
            del found["bands in the middle"]
            left_out["bands in the middle"] = "the winner's bands are there"
    else:
        left_out["bands in the middle"] = "the winner has no bands"
    for mechanism, name in RANDOM_HEADS.items():
        moved = _random_heads(mechanism, winner, heads, seed) if mechanism in acting else None
        if moved is not None:
            found[name] = moved
        elif mechanism in acting:
            left_out[name] = f"the winner's {mechanism} takes too many heads to find as many others"
        else:
            left_out[name] = f"the winner has no {mechanism}"
    return found, left_out


def depends_on_steps(settings: Settings) -> bool:
    """Whether it matters to these settings where steps end."""
    acting = mechanisms(settings)
    return "SMI" in acting or ("OEB" in acting and settings["bridge_scope"] == "step")


def _in_the_middle(winner: Settings, heads: dict[int, int]) -> Settings:
    """The bands moved to the middle of the layers, as wide as they are; heads keep their numbers."""
    layers = sorted(heads)
    moved: dict[str, Any] = dict(winner)
    for name in ("oeb_layers", "smi_layers"):
        if winner[name] not in ("none", []):
            width = len(winner[name])
            start = (len(layers) - width) // 2
            moved[name] = list(layers[start : start + width])
    table = winner["oeb_heads"]
    if table is not None:
        pairs = zip(sorted(map(int, table)), moved["oeb_layers"], strict=True)
        moved["oeb_heads"] = {str(new): [head for head in table[str(old)] if head < heads[new]] for old, new in pairs}
    return moved


def _random_heads(mechanism: str, winner: Settings, heads: dict[int, int], seed: int) -> Settings | None:
    """A mechanism on as many other heads of the model; None where there are not enough."""
    name = "oeb_heads" if mechanism == "OEB" else "length_temperature_heads"
    layers, table = winner["oeb_layers"] if mechanism == "OEB" else heads, winner[name]
    own = {
        (layer, head)
        for layer in layers
        for head in (range(heads[layer]) if table is None else table.get(str(layer), []))
    }
    others = sorted({(layer, head) for layer, number in heads.items() for head in range(number)} - own)
    if len(others) < len(own):
        return None
    drawn = table_of(random.Random(f"{seed}/{name}").sample(others, len(own)))
    moved = {**winner, name: drawn}
    return {**moved, "oeb_layers": [int(layer) for layer in drawn]} if mechanism == "OEB" else moved
