"""Claim: what `hf-stepflow calibrate` finds on the embedded reasoner, with a modest budget.

The command is run as a user would type it; what it writes is kept in benchmarks/reasoner_calibration/LEVELS/. A run
that was stopped is continued.

Run: python benchmarks/reasoner_calibration.py LEVEL [LEVEL ...] [--budget 15m] [--limit 400] --work FOLDER
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).with_suffix("")


def calibrate(levels: list[str], budget: str, limit: int, work: Path) -> int:
    """Calibrates the reasoner on some difficulties."""
    words = ["reasoner", *(word for level in levels for word in ("--problems", f"reasoner:{level}"))]
    words += ["--limit", str(limit), "--budget", budget, "--max-new-tokens", "1200", "--batch-size", "32"]
    return run_and_keep(words, "reasoner", work, FOLDER / "-".join(levels))


def run_and_keep(words: list[str], name: str, work: Path, folder: Path) -> int:
    """Runs the command in the work folder and keeps preset, result and report.

    Args:
        words: of `hf-stepflow calibrate`, without those that say where results go.
        name: of the preset.
        work: folder to work in.
        folder: where the three files are kept.

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
        for file in (f"{name}.json", "report.html"):
            shutil.copy(work / file, folder / file)
    return done.returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("levels", nargs="+")
    parser.add_argument("--budget", default="15m")
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--work", type=Path, required=True, help="folder to work in, which is not kept")
    args = parser.parse_args()
    sys.exit(calibrate(args.levels, args.budget, args.limit, args.work.resolve()))
