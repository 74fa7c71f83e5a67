"""Writes what is derived from the settings table: the schema of presets, and the table in docs/presets.md.

`python -m scripts.settings`, which `make docs` runs.
"""

import json
import re
from pathlib import Path
from typing import Any

from hf_stepflow.cli.presets import settings_rows
from hf_stepflow.presets.checks import PRESET_SETTINGS
from hf_stepflow.runtime.settings import BAND, MAX_LISTED, MAX_MARKER, MAX_NUMBER, NUMBER, SETTINGS, Setting

ROOT = Path(__file__).resolve().parents[1]
SCHEMA, PAGE = ROOT / "calibrations" / "schema.json", ROOT / "docs" / "presets.md"
_TABLE = re.compile(r"(<!-- settings -->\n).*?(<!-- end of settings -->)", re.DOTALL)


def schema_text() -> str:
    """The schema file with the settings of the table."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    schema["properties"]["settings"] = settings_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


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


def page_text() -> str:
    """The page with the table of settings."""
    lines = ["| part | setting | default | values | meaning |", "|---|---|---|---|---|"]
    for row in settings_rows():
        cells = [row["part"], f"`{row['name']}`", f"`{row['default']}`", row["values"], row["meaning"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    table = "\n".join(lines)
    return _TABLE.sub(lambda match: f"{match[1]}{table}\n{match[2]}", PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    PAGE.write_text(page_text(), encoding="utf-8")
