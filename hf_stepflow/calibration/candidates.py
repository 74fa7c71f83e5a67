"""Candidates: settings that could be better than the base, and the space that the search draws them from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_stepflow.runtime.settings import BRIDGE, INJECTION, SETTINGS, TEMPERATURE, StepFlowSettings

from .bands import Proposal

Settings = dict[str, Any]
Table = dict[int, list[int]]

# {mechanism: its settings}.
MECHANISMS = {
    mechanism: tuple(name for name, setting in SETTINGS.items() if setting.group == group)
    for mechanism, group in (("OEB", BRIDGE), ("SMI", INJECTION), ("length temperature", TEMPERATURE))
}
_PAPER = {name: getattr(StepFlowSettings(), name) for names in MECHANISMS.values() for name in names}

# Every mechanism off. These settings leave the base as it is, bit for bit.
EMPTY: Settings = _PAPER | {"oeb_layers": "none", "tau_max": 0.0, "smi_layers": "none", "alpha": 0.0}

OFF = "off"
ALL, PROPOSED = "all", "proposed"

# The length temperature of the control for a winner without one.
CONTROL_TEMPERATURE = 1.0


def mechanisms(settings: Settings) -> list[str]:
    """Returns the mechanisms that act under settings."""
    is_on = {
        "OEB": settings["tau_max"] > 0 and settings["oeb_layers"] not in ("none", []),
        "SMI": settings["alpha"] != 0 and settings["smi_layers"] not in ("none", []),
        "length temperature": settings["length_temperature"] > 0,
    }
    return [name for name, on in is_on.items() if on]


def only(settings: Settings, *kept: str) -> Settings:
    """Returns the settings with all mechanisms but these off."""
    return EMPTY | {name: settings[name] for mechanism in kept for name in MECHANISMS[mechanism]}


def tidied(settings: Settings) -> Settings:
    """Returns the settings with everything that does not act as in `EMPTY`, so that equal effects compare equal."""
    whole = EMPTY | settings
    return only(whole, *mechanisms(whole))


def in_words(settings: Settings) -> str:
    """Returns the settings that act, for a line on the terminal.

    Example:
        >>> from hf_stepflow.calibration.candidates import in_words, tidied
        >>> in_words(tidied({"tau_max": 0.15, "oeb_layers": [0, 1], "oeb_heads": {"0": [1, 3], "1": [2]}}))
        'bridge 0.15 on 3 heads of layers 0-1'
    """
    parts = []
    acting = mechanisms(settings)
    if "OEB" in acting:
        place = _place(settings["oeb_layers"], settings["oeb_heads"])
        more = [f"scope {settings['bridge_scope']}"] * (settings["bridge_scope"] != _PAPER["bridge_scope"])
        more += [f"{settings['sink_tokens']} sink tokens out"] * bool(settings["sink_tokens"])
        more += [f"first {settings['oeb_span']} tokens of a step"] * (settings["oeb_span"] is not None)
        parts.append(", ".join([f"bridge {settings['tau_max']:.3g} on {place}", *more]))
    if "SMI" in acting:
        window = "" if settings["smi_window"] is None else f", last {settings['smi_window']} tokens"
        parts.append(f"injection {settings['alpha']:.3g} in {_place(settings['smi_layers'], None)}{window}")
    if "length temperature" in acting:
        heads = settings["length_temperature_heads"]
        place = "all heads" if heads is None else f"{sum(map(len, heads.values()))} heads"
        beyond = settings["length_temperature_base"]
        parts.append(f"temperature {settings['length_temperature']:.3g} beyond {beyond} tokens on {place}")
    return "; ".join(parts) or "the base"


def _place(layers: Any, heads: dict[str, list[int]] | None) -> str:
    """Names layers as ranges, and the number of heads in them."""
    if isinstance(layers, str):
        return layers
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    names = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    text = f"layer{'s' * (len(layers) != 1)} {names}"
    if heads is None:
        return text
    number = sum(map(len, heads.values()))
    return f"{number} head{'s' * (number != 1)} of {text}"


@dataclass(frozen=True)
class Space:
    """The space of the search.

    Attributes:
        bridges: {source: (layers, heads)} of the bridge; None for all heads.
        injections: {source: layers} of the injection.
        temperatures: {source: heads} of the length temperature; None for all heads.
        bases: Context lengths up to which the length temperature does nothing.
    """

    bridges: dict[str, tuple[list[int], Table | None]]
    injections: dict[str, list[int]]
    temperatures: dict[str, Table | None]
    bases: list[int]

    @classmethod
    def of(cls, proposals: Sequence[Proposal], heads: Mapping[str, Table], bases: Sequence[int]) -> "Space":
        """Returns the space that proposals span.

        Args:
            proposals: The bands.
            heads: The heads that profit from each mechanism, by layer; may be empty.
            bases: The context lengths.
        """
        bridges: dict[str, tuple[list[int], Table | None]] = {
            one.name: (one.oeb_layers, None) for one in proposals if one.oeb_layers
        }
        if heads["OEB"]:
            bridges["heads"] = (sorted(heads["OEB"]), heads["OEB"])
        injections = {one.name: one.smi_layers for one in proposals if one.smi_layers}
        temperatures: dict[str, Table | None] = {ALL: None}
        if heads["length temperature"]:
            temperatures[PROPOSED] = heads["length temperature"]
        return cls(bridges, injections, temperatures, sorted(set(bases)))

    def candidate(self, parameters: dict[str, Any]) -> Settings:
        """Returns the settings that parameters, as `suggest` returns them, stand for."""
        settings: Settings = {
            name: None if SETTINGS[name].optional and parameters[name] == 0 else parameters[name]
            for name in _searched(*MECHANISMS)
            if name in parameters
        }
        if parameters["bridge"] != OFF:
            layers, heads = self.bridges[parameters["bridge"]]
            settings |= {"oeb_layers": list(layers), "oeb_heads": _in_json(heads)}
        if parameters["injection"] != OFF:
            settings["smi_layers"] = list(self.injections[parameters["injection"]])
        if parameters["temperature"]:
            settings["length_temperature_base"] = parameters["length_temperature_base"]
            settings["length_temperature_heads"] = _in_json(self.temperatures[parameters["temperature_heads"]])
        return tidied(settings)

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Returns the parameters that an optuna trial suggests; a mechanism that is off has none of its own."""
        found: dict[str, Any] = {
            "bridge": trial.suggest_categorical("bridge", [OFF, *self.bridges]),
            "injection": trial.suggest_categorical("injection", [OFF, *self.injections]),
            "temperature": trial.suggest_categorical("temperature", [False, True]),
        }
        if found["bridge"] != OFF:
            found |= {name: _suggest(trial, name) for name in _searched("OEB")}
        if found["injection"] != OFF:
            found |= {name: _suggest(trial, name) for name in _searched("SMI")}
        if found["temperature"]:
            found |= {name: _suggest(trial, name) for name in _searched("length temperature")}
            found["length_temperature_base"] = trial.suggest_categorical("length_temperature_base", self.bases)
            found["temperature_heads"] = trial.suggest_categorical("temperature_heads", list(self.temperatures))
        return found

    def firsts(self) -> list[dict[str, Any]]:
        """Returns the trials that every search begins with: the paper's settings, then each proposal alone."""
        bridge, injection = ({name: _PAPER[name] or 0 for name in _searched(one)} for one in ("OEB", "SMI"))
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
            firsts.insert(0, off | {"bridge": "quarter", "injection": "quarter"} | bridge | injection)
        return firsts


def _searched(*kept: str) -> list[str]:
    """The settings of mechanisms for which the settings table has values to search."""
    return [name for mechanism in kept for name in MECHANISMS[mechanism] if SETTINGS[name].search]


def _suggest(trial: Any, name: str) -> Any:
    """A value from the settings table: numbers on a log scale; 0 stands for null."""
    values = SETTINGS[name].search
    if SETTINGS[name].kind == "number":
        return trial.suggest_float(name, *values, log=True)
    return trial.suggest_categorical(name, [0 if value is None else value for value in values])


def _in_json(heads: Table | None) -> dict[str, list[int]] | None:
    return None if heads is None else {str(layer): list(chosen) for layer, chosen in heads.items()}
