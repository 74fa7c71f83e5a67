"""Commands that need no model start without torch and transformers, so they answer at once."""

import subprocess
import sys
from pathlib import Path

CALIBRATIONS = Path(__file__).parents[2] / "calibrations"
SCRIPT = """
import sys
from hf_stepflow.cli import main

heavy = {"torch", "transformers", "huggingface_hub", "numpy"}
for words in sys.argv[1:]:
    try:
        main(words.split())
    except SystemExit:
        pass
    found = heavy & sys.modules.keys()
    assert not found, f"{words} imports {sorted(found)}"
"""


def test_commands_about_presets_import_nothing_heavy() -> None:
    file = CALIBRATIONS / "qwen3-8b.json"
    words = [
        "--help",
        "presets --help",
        "presets list",
        "presets list --kind measured --json",
        "presets show qwen3-8b",
        "presets show Qwen/Qwen3-8B --json",
        "presets diff qwen3-8b qwen3-4b",
        f"presets validate {file}",
        "presets settings",
    ]
    subprocess.run([sys.executable, "-c", SCRIPT, *words], check=True, stdout=subprocess.DEVNULL)
