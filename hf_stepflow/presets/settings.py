"""The settings table for readers: as the JSON schema of presets, and as rows of text."""

import json
from typing import Any

from hf_stepflow.runtime.configuration_stepflow import (
    BAND,
    BASE,
    MAX_LISTED,
    MAX_MARKER,
    MAX_NUMBER,
    NUMBER,
    SETTINGS,
    Setting,
    StepFlowSettings,
)

# A preset has fields of its own for the base model.
BASE_SETTINGS = tuple(name for name, setting in SETTINGS.items() if setting.group == BASE)
PRESET_SETTINGS = tuple(name for name in SETTINGS if name not in BASE_SETTINGS)


def settings_rows() -> list[tuple[str, str, str, str, str]]:
    """Group, name, default, values and meaning of every setting."""
    defaults = StepFlowSettings()
    return [
        (setting.group, name, json.dumps(getattr(defaults, name)), setting.expected, setting.meaning)
        for name, setting in SETTINGS.items()
    ]


def settings_schema() -> dict[str, Any]:
    """The part of `calibrations/schema.json` for the settings, from the settings table."""
    return {
        "description": "Every setting of StepFlowConfig, none left to a default.",
        "type": "object",
        "additionalProperties": False,
        "required": [name for name in PRESET_SETTINGS if not SETTINGS[name].is_new],
        "properties": {name: _setting_schema(SETTINGS[name]) for name in PRESET_SETTINGS},
    }


def _setting_schema(setting: Setting) -> dict[str, Any]:
    marker = {"type": "string", "minLength": 1, "maxLength": MAX_MARKER}
    number = {"type": "integer", "minimum": 0, "maximum": MAX_NUMBER}
    numbers = {"type": "array", "maxItems": MAX_LISTED, "uniqueItems": True, "items": number}
    bounds = {"minimum": setting.low, "maximum": setting.high}
    kinds: dict[str, dict[str, Any]] = {
        "number": {"type": "number", **bounds},
        "count": {"type": "integer", **bounds},
        "choice": {"enum": list(setting.choices)},
        "switch": {"type": "boolean"},
        "layers": {"anyOf": [{"type": "string", "pattern": f"^({BAND})$"}, numbers]},
        "heads": {
            "type": "object",
            "maxProperties": MAX_LISTED,
            "propertyNames": {"pattern": f"^({NUMBER})$"},
            "additionalProperties": numbers,
        },
        "markers": {"anyOf": [marker, {"type": "array", "maxItems": MAX_LISTED, "items": marker}]},
    }
    schema = kinds[setting.kind]
    return {"description": setting.meaning} | ({"anyOf": [{"type": "null"}, schema]} if setting.optional else schema)
