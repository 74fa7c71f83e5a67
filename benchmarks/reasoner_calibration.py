"""Runs `hf-stepflow calibrate` on the embedded reasoner, and compares its preset with the base at every difficulty.

The script runs the command as a user would type it, on both families of problems at once, once for each seed. It keeps
the output of a seed in benchmarks/reasoner_calibration/seed-N/, and with `--publish N` the preset of that seed also in
calibrations/. A stopped run continues. Part "difficulties" compares the preset in calibrations/ with the base on the
test split, which calibration does not see: exact traces by teacher-forced scoring, in float32, on the same problems
for both.

Run: python -m benchmarks.reasoner_calibration [calibrate] [difficulties] [--seeds 0 1 2] [--publish N]
    [--limit 640] [--budget 60] [--problems 1000] [--work FOLDER]
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hf_stepflow.evaluation.scoring import score_traces
from hf_stepflow.evaluation.statistics import adjust, compare, proportion
from hf_stepflow.evaluation.store import machine
from hf_stepflow.hub.cards import table
from hf_stepflow.presets.preset import RECORD
from hf_stepflow.presets.strict_json import calibrations_folder
from hf_stepflow.reasoner import load_reasoner
from hf_stepflow.reasoner.levels import LEVELS, problems_of
from hf_stepflow.reasoner.prompts import encode_problem

FOLDER = Path(__file__).with_suffix("")
NAME = "stepflow-tiny-reasoner"
NOTES = "The base model is the reasoner that ships with the package hf-stepflow (hf_stepflow.reasoner.load_reasoner)."
# Each family has easy levels, and levels with longer problems than those of the training.
LEVELS_TO_CALIBRATE = ("chains-4", "chains-6", "chains-7", "errands-30", "errands-120", "errands-180")
TOKENS, BATCH = 1200, 32


def calibrate(seed: int, limit: int, budget: str, work: Path, is_published: bool) -> int:
    """Calibrates the reasoner on both families and returns the exit status."""
    words = ["reasoner", *(word for level in LEVELS_TO_CALIBRATE for word in ("--problems", f"reasoner:{level}"))]
    words += ["--limit", str(limit), "--budget", budget, "--max-new-tokens", str(TOKENS), "--batch-size", str(BATCH)]
    words += ["--seed", str(seed)]
    others = [calibrations_folder()] if is_published else []
    return run_and_keep(words, NAME, NOTES, work / f"seed-{seed}", FOLDER / f"seed-{seed}", *others)


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
        shutil.copy(work / f"{name}-calibration" / RECORD, folder / RECORD)
        preset = json.loads((work / f"{name}.json").read_text())
        preset["notes"] = f"{notes} {preset['notes']}"[:2000]
        for kept in (folder, *others):
            text = json.dumps(preset, indent=2, ensure_ascii=False) + "\n"
            (kept / f"{name}.json").write_text(text, encoding="utf-8")
    return done.returncode


def difficulties(number: int) -> None:
    """Compares the preset with the base at every level, and prints the table."""
    preset = calibrations_folder() / f"{NAME}.json"
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
    parser.add_argument("parts", nargs="*", default=["calibrate", "difficulties"], help="parts to run (default: both)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="seeds to calibrate with")
    parser.add_argument("--publish", type=int, help="seed whose preset goes into calibrations/ (default: none)")
    parser.add_argument("--limit", type=int, default=640, help="problems of each level (default: 640)")
    parser.add_argument("--budget", default="60", help="candidates of each search, or a time (default: 60)")
    parser.add_argument("--problems", type=int, default=1000, help="test problems of each level (default: 1000)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/reasoner-calibration"),
        help="folder of the runs, which lets a stopped run continue",
    )
    args = parser.parse_args()
    statuses = [
        calibrate(seed, args.limit, args.budget, args.work.resolve(), seed == args.publish)
        for seed in args.seeds
        if "calibrate" in args.parts
    ]
    if "difficulties" in args.parts and all(status in (0, 3) for status in statuses):
        torch.set_num_threads(1)
        difficulties(args.problems)
    sys.exit(max(statuses, default=0))
