"""Candidates: settings that could be better than the base, and the space that the search draws them from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_stepflow.runtime.configuration_stepflow import BRIDGE, INJECTION, SETTINGS, TEMPERATURE

from .bands import Proposal

Settings = dict[str, Any]

# All that acts, off. These settings leave the base as it is, bit for bit.
EMPTY: Settings = {
    "oeb_layers": "none",
    "oeb_heads": None,
    "tau_max": 0.0,
    "bridge_scope": "segment",
    "bridge_floor": "share",
    "sink_tokens": 0,
    "oeb_span": None,
    "smi_layers": "none",
    "alpha": 0.0,
    "smi_window": None,
    "length_temperature": 0.0,
    "length_temperature_base": None,
    "length_temperature_layers": "all",
    "length_temperature_heads": None,
}
_GROUPS = {"OEB": BRIDGE, "SMI": INJECTION, "length temperature": TEMPERATURE}
MECHANISMS = {
    name: tuple(setting for setting, row in SETTINGS.items() if row.group == group) for name, group in _GROUPS.items()
}

OFF = "off"
ALL, PROPOSED = "all", "proposed"
# The temperature that stands in where the winner has none.
CONTROL_TEMPERATURE = 1.0


def mechanisms(settings: Settings) -> list[str]:
    """The mechanisms that act under some settings."""
    is_on = {
        "OEB": settings["tau_max"] > 0 and settings["oeb_layers"] not in ("none", []),
        "SMI": settings["alpha"] != 0 and settings["smi_layers"] not in ("none", []),
        "length temperature": settings["length_temperature"] > 0,
    }
    return [name for name, on in is_on.items() if on]


def only(settings: Settings, *kept: str) -> Settings:
    """Settings with the other mechanisms off.

    Args:
        settings: the settings.
        *kept: keys of `MECHANISMS`.
    """
    return EMPTY | {name: settings[name] for mechanism in kept for name in MECHANISMS[mechanism]}


def tidied(settings: Settings) -> Settings:
    """Settings in which all that does not act is as in `EMPTY`: two that do the same are then equal.

    Args:
        settings: some of those in `EMPTY`.
    """
    whole = EMPTY | settings
    return only(whole, *mechanisms(whole))


@dataclass(frozen=True)
class Space:
    """What the search chooses from.

    Attributes:
        bridges: layers and heads of the bridge by the name of who proposed them: {name: (layers, heads)}.
        injections: layers of the injection by name.
        temperatures: heads of the length temperature by name: {name: heads}, None for all.
        bases: context lengths up to which the length temperature does nothing.
    """

    bridges: dict[str, tuple[list[int], dict[int, list[int]] | None]]
    injections: dict[str, list[int]]
    temperatures: dict[str, dict[int, list[int]] | None]
    bases: list[int]

    @classmethod
    def of(
        cls, proposals: Sequence[Proposal], heads: Mapping[str, dict[int, list[int]]], bases: Sequence[int]
    ) -> "Space":
        """The space that proposals span.

        Args:
            proposals: bands.
            heads: {layer: heads} that profit from a mechanism by its name, empty if none do.
            bases: context lengths.
        """
        bridges: dict[str, tuple[list[int], dict[int, list[int]] | None]] = {
            one.name: (one.oeb_layers, None) for one in proposals if one.oeb_layers
        }
        if heads["OEB"]:
            bridges["heads"] = (sorted(heads["OEB"]), heads["OEB"])
        injections = {one.name: one.smi_layers for one in proposals if one.smi_layers}
        temperatures: dict[str, dict[int, list[int]] | None] = {ALL: None}
        if heads["length temperature"]:
            temperatures[PROPOSED] = heads["length temperature"]
        return cls(bridges, injections, temperatures, sorted(set(bases)))

    def candidate(self, parameters: dict[str, Any]) -> Settings:
        """The settings that some parameters stand for.

        Args:
            parameters: as `suggest` gives them.
        """
        settings: Settings = {}
        if parameters["bridge"] != OFF:
            layers, heads = self.bridges[parameters["bridge"]]
            settings |= {"oeb_layers": list(layers), "oeb_heads": _written(heads), "tau_max": parameters["tau_max"]}
            settings |= {"bridge_scope": parameters["bridge_scope"], "sink_tokens": parameters["sink_tokens"]}
        if parameters["injection"] != OFF:
            window = parameters["smi_window"]
            settings |= {"smi_layers": list(self.injections[parameters["injection"]]), "alpha": parameters["alpha"]}
            settings |= {"smi_window": None if window == 0 else window}
        if parameters["temperature"]:
            settings["length_temperature"] = parameters["length_temperature"]
            settings["length_temperature_base"] = parameters["length_temperature_base"]
            settings["length_temperature_heads"] = _written(self.temperatures[parameters["temperature_heads"]])
        return tidied(settings)

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Parameters that an optuna trial suggests, in a tree: what is off has no settings."""
        found: dict[str, Any] = {
            "bridge": trial.suggest_categorical("bridge", [OFF, *self.bridges]),
            "injection": trial.suggest_categorical("injection", [OFF, *self.injections]),
            "temperature": trial.suggest_categorical("temperature", [False, True]),
        }
        if found["bridge"] != OFF:
            found["tau_max"] = _suggest_float(trial, "tau_max")
            found["bridge_scope"] = trial.suggest_categorical("bridge_scope", list(SETTINGS["bridge_scope"].search))
            found["sink_tokens"] = trial.suggest_categorical("sink_tokens", list(SETTINGS["sink_tokens"].search))
        if found["injection"] != OFF:
            found["alpha"] = _suggest_float(trial, "alpha")
            found["smi_window"] = trial.suggest_categorical(
                "smi_window", [window or 0 for window in SETTINGS["smi_window"].search]
            )
        if found["temperature"]:
            found["length_temperature"] = _suggest_float(trial, "length_temperature")
            found["length_temperature_base"] = trial.suggest_categorical("length_temperature_base", self.bases)
            found["temperature_heads"] = trial.suggest_categorical("temperature_heads", list(self.temperatures))
        return found

    def firsts(self) -> list[dict[str, Any]]:
        """What every search begins with: the paper's settings, each mechanism alone, and each proposal."""
        bridge = {"tau_max": 0.15, "bridge_scope": "segment", "sink_tokens": 0}
        injection = {"alpha": 0.06, "smi_window": 0}
        off = {"bridge": OFF, "injection": OFF, "temperature": False}
        warm = off | {"temperature": True, "length_temperature_base": self.bases[0]}
        firsts: list[dict[str, Any]] = [off | {"bridge": name} | bridge for name in self.bridges]
        firsts += [off | {"injection": name} | injection for name in self.injections]
        firsts += [
            warm | {"length_temperature": gamma, "temperature_heads": name}
            for name in self.temperatures
            for gamma in (0.5, 1.0)
        ]
        if "quarter" in self.bridges and "quarter" in self.injections:
            both = {"bridge": "quarter", "injection": "quarter", "temperature": False} | bridge | injection
            firsts.insert(0, both)
        return firsts


def _suggest_float(trial: Any, name: str) -> float:
    """A value of a setting from the range that the settings table gives the search, on a log scale."""
    return trial.suggest_float(name, *SETTINGS[name].search, log=True)


def _written(heads: dict[int, list[int]] | None) -> dict[str, list[int]] | None:
    """Heads as JSON has them."""
    return None if heads is None else {str(layer): list(chosen) for layer, chosen in heads.items()}
