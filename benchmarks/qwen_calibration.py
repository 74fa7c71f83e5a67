"""Runs `hf-stepflow calibrate` on Qwen2.5-Coder-1.5B-Instruct, whose folder is given, on three kinds of problems.

The model reasons in the open, so thinking is implicit: from the end of the prompt to a phrase such as "The answer is".
The problems are GSM8K, from a JSONL file (id, question, answer), and two tasks of stepflow-suite. A stopped run
continues. The script keeps the preset, the result, the report and the record in benchmarks/qwen_calibration/, and the
preset also in calibrations/, whatever the verdict.

Run: python -m benchmarks.qwen_calibration --model FOLDER --gsm8k FILE [--budget 4h] [--limit 200] [--work FOLDER]
"""

import argparse
import sys
from pathlib import Path

from benchmarks.reasoner_calibration import run_and_keep
from hf_stepflow.presets.strict_json import calibrations_folder

FOLDER = Path(__file__).with_suffix("")
BASE_MODEL = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
NAME = "qwen2.5-coder-1.5b-instruct"
TASKS = ("stepflow-suite:legs@medium", "stepflow-suite:sums@medium")
NOTES = "Measured on GSM8K and two tasks of stepflow-suite. benchmarks/qwen_calibration.py runs the command."


def calibrate(args: argparse.Namespace) -> int:
    """Runs the command in the work folder and keeps what it writes; returns its exit status."""
    words = [str(args.model.resolve()), "--base-model", BASE_MODEL, "--dtype", args.dtype, "--device", args.device]
    for source in (str(args.gsm8k.resolve()), *args.tasks):
        words += ["--problems", source]
    words += ["--limit", str(args.limit), "--budget", args.budget, "--max-new-tokens", str(args.max_new_tokens)]
    words += ["--stepflow", "implicit_thinking=true", "--scored", str(args.scored), "--seed", str(args.seed)]
    return run_and_keep(words, NAME, NOTES, args.work.resolve(), FOLDER, calibrations_folder())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--gsm8k", type=Path, required=True, help="JSONL file of GSM8K: id, question, answer")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), help="further sources of problems")
    parser.add_argument("--limit", type=int, default=200, help="problems of each source (default: 200)")
    parser.add_argument("--budget", default="4h", help="time of the calibration (default: 4h)")
    parser.add_argument("--max-new-tokens", type=int, default=400, help="tokens of a response (default: 400)")
    parser.add_argument("--scored", type=int, default=32, help="problems scored for each candidate (default: 32)")
    parser.add_argument("--dtype", default="float32", help="dtype of the weights (default: float32)")
    parser.add_argument("--device", default="cpu", help="device (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    parser.add_argument(
        "--work", type=Path, default=Path("build/qwen-calibration"), help="folder of the run, which lets it continue"
    )
    sys.exit(calibrate(parser.parse_args()))
