"""Runs `hf-stepflow calibrate` on the embedded reasoner, and compares its preset with the base at every difficulty.

The script runs the command as a user would type it: part "both" on both families of problems at once, part "chains" on
chains alone. It keeps the output in benchmarks/reasoner_calibration/, and the preset of the chains also in
calibrations/. A stopped run continues. Part "difficulties" compares that preset with the base on the test split, which
calibration does not see: exact traces by teacher-forced scoring, in float32, on the same problems for both.

Run: python -m benchmarks.reasoner_calibration [both] [chains] [difficulties] [--budget 100] [--problems 1000]
    [--work FOLDER]
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hf_stepflow.calibration.reproduce import NAME as REPRODUCE
from hf_stepflow.evaluation.scoring import score_traces
from hf_stepflow.evaluation.statistics import adjust, compare, proportion
from hf_stepflow.evaluation.store import machine
from hf_stepflow.hub.cards import table
from hf_stepflow.presets.strict_json import calibrations_folder
from hf_stepflow.reasoner import load_reasoner
from hf_stepflow.reasoner.levels import LEVELS, problems_of
from hf_stepflow.reasoner.prompts import encode_problem

FOLDER = Path(__file__).with_suffix("")
NAME = "stepflow-tiny-reasoner"
NOTES = "The base model is the reasoner that ships with the package hf-stepflow (hf_stepflow.reasoner.load_reasoner)."
# {part: (levels, problems of each level, largest number of tokens in a response)}. Each part has easy levels, and
# levels with longer problems than those of the training.
RUNS = {
    "both": (["chains-4", "chains-7", "errands-30", "errands-120", "errands-180"], 200, 1200),
    "chains": (["chains-4", "chains-6", "chains-7"], 600, 400),
}


def calibrate(part: str, budget: str, work: Path) -> int:
    """Calibrates the reasoner on the levels of one part and returns the exit status."""
    levels, limit, tokens = RUNS[part]
    words = ["reasoner", *(word for level in levels for word in ("--problems", f"reasoner:{level}"))]
    words += ["--limit", str(limit), "--budget", budget, "--max-new-tokens", str(tokens), "--batch-size", "32"]
    if part == "chains":
        return run_and_keep(words, NAME, NOTES, work / part, FOLDER, calibrations_folder())
    return run_and_keep(words, NAME, NOTES, work / part, FOLDER / part)


def run_and_keep(words: list[str], name: str, notes: str, work: Path, folder: Path, *others: Path) -> int:
    """Runs the command in the work folder and keeps the preset, the result, the report and the record.

    Args:
        words: The arguments of `hf-stepflow calibrate`, except those that name output files.
        name: The name of the preset.
        notes: The text that begins the notes of the preset.
        work: The folder to work in.
        folder: The folder for the four files.
        others: Further folders for the preset.

    Returns:
        The exit status of the command.
    """
    work.mkdir(parents=True, exist_ok=True)
    out = ["--out", f"{name}.json", "--report", "report.html", "--json"]
    command = [sys.executable, "-m", "hf_stepflow.cli", "calibrate", *words, *out]
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode in (0, 3):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(json.loads(done.stdout), indent=1) + "\n")
        shutil.copy(work / "report.html", folder / "report.html")
        shutil.copy(work / f"{name}-calibration" / REPRODUCE, folder / REPRODUCE)
        preset = json.loads((work / f"{name}.json").read_text())
        preset["notes"] = f"{notes} {preset['notes']}"[:2000]
        for kept in (folder, *others):
            text = json.dumps(preset, indent=2, ensure_ascii=False) + "\n"
            (kept / f"{name}.json").write_text(text, encoding="utf-8")
    return done.returncode


def difficulties(number: int) -> None:
    """Compares the preset with the base at every level, and prints the table."""
    preset = FOLDER / f"{NAME}.json"
    model, tokenizer = load_reasoner(str(preset))
    rows = []
    for level in LEVELS:
        problems = [encode_problem(tokenizer, problem) for problem in problems_of(level, "test", number)]
        # Large batches hold more padding, which takes longer on a CPU.
        base, own = (
            [[score.exact] for score in score_traces(model, problems, stepflow, batch_tokens=2048)]
            for stepflow in (False, True)
        )
        paired, accuracy = compare(base, own), proportion(sum(map(sum, base)), number)
        row = {"level": level, "n": number, "base": [accuracy.value, accuracy.low, accuracy.high]}
        row["delta"] = [paired.delta.value, paired.delta.low, paired.delta.high]
        rows.append({**row, "gained": paired.gained, "lost": paired.lost, "p_value": paired.p_value})
        print(f"{level} done", flush=True)
    about = {"dtype": str(model.dtype), **machine()}
    found = {"about": about, "settings": json.loads(preset.read_text())["settings"], "levels": rows}
    (FOLDER / "difficulties.json").write_text(json.dumps(found, indent=1) + "\n")
    print(difficulties_table(rows))


def difficulties_table(rows: list[dict[str, Any]]) -> str:
    """Makes the table of `difficulties`; each level is one comparison, and p-values are Holm-adjusted over them."""
    adjusted = adjust([row["p_value"] for row in rows])
    cells = []
    for row, p_value in zip(rows, adjusted, strict=True):
        delta, low, high = (100 * value for value in row["delta"])
        points = f"{delta:+.1f} [{low:+.1f}, {high:+.1f}]"
        shown = (row["level"], row["n"], f"{100 * row['base'][0]:.1f}", points, row["gained"], row["lost"])
        cells.append([*map(str, shown), f"{p_value:.2g}"])
    return table(("level", "n", "base, %", "difference", "gained", "lost", "p (Holm)"), cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=[*RUNS, "difficulties"], help="parts to run (default: all)")
    parser.add_argument("--budget", default="100", help="candidates of each search, or a time (default: 100)")
    parser.add_argument("--problems", type=int, default=1000, help="test problems of each level (default: 1000)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/reasoner-calibration"),
        help="folder of the runs, which lets a stopped run continue",
    )
    args = parser.parse_args()
    statuses = [calibrate(part, args.budget, args.work.resolve()) for part in RUNS if part in args.parts]
    if "difficulties" in args.parts and all(status in (0, 3) for status in statuses):
        torch.set_num_threads(1)
        difficulties(args.problems)
    sys.exit(max(statuses, default=0))
