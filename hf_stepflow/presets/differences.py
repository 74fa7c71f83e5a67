"""The differences between two presets, field by field."""

from dataclasses import dataclass
from typing import Any

from .preset import Preset

# Whoever compares two presets asks first where they come from, and then what they set.
_ORDER = ("provenance", "base_model", "base_model_revision", "architecture", "settings", "notes", "name")


@dataclass(frozen=True)
class Difference:
    """One field that two presets fill differently.

    Attributes:
        field: Its name, such as `settings.tau_max`.
        first: Its value in the first preset; None where it has none.
        second: Its value in the second preset; None where it has none.
    """

    field: str
    first: Any
    second: Any


def differences(first: Preset, second: Preset) -> list[Difference]:
    """Lists what two presets differ in, provenance first.

    Args:
        first: A preset.
        second: Another.

    Example:
        >>> from hf_stepflow import load_preset
        >>> from hf_stepflow.presets.differences import differences
        >>> one, other = load_preset("qwen3-8b"), load_preset("qwen3-4b")
        >>> [each.field for each in differences(one, other) if each.field.startswith("settings.")]
        []
    """
    one, other = _fields(first), _fields(second)
    names = dict.fromkeys([*one, *other])
    found = [Difference(name, one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)]
    return sorted(found, key=lambda each: _ORDER.index(each.field.partition(".")[0]))


def _fields(preset: Preset) -> dict[str, Any]:
    """The fields of a preset by their dotted names; lists and tables of heads stay whole."""
    data = preset.to_dict()
    del data["schema_version"]
    fields: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            fields |= {f"{name}.{key}": part for key, part in value.items()}
        else:
            fields[name] = value
    return fields
