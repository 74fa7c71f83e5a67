"""Writes what is derived from the settings table: the schema of presets, and the table in docs/presets.md.

`python -m scripts.settings`, which `make docs` runs.
"""

import json
import re
from pathlib import Path

from hf_stepflow.presets.settings import settings_rows, settings_schema

ROOT = Path(__file__).resolve().parents[1]
SCHEMA, PAGE = ROOT / "calibrations" / "schema.json", ROOT / "docs" / "presets.md"
_TABLE = re.compile(r"(<!-- settings -->\n).*?(<!-- end of settings -->)", re.DOTALL)


def schema_text() -> str:
    """The schema file with the settings of the table."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    schema["properties"]["settings"] = settings_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def page_text() -> str:
    """The page with the table of settings."""
    lines = ["| part | setting | default | values | meaning |", "|---|---|---|---|---|"]
    for group, name, *texts in settings_rows():
        cells = [group, f"`{name}`", f"`{texts[0]}`", *texts[1:]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    table = "\n".join(lines)
    return _TABLE.sub(lambda match: f"{match[1]}{table}\n{match[2]}", PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    PAGE.write_text(page_text(), encoding="utf-8")
