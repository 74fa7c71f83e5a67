"""Measures what StepFlow adds to other methods on the embedded reasoner, at the same number of generated tokens.

Every method runs alone and with StepFlow at the paper's settings, on the same problems of the test split, in float32.
Decoding is greedy except for votes. Nothing is chosen on the test split: the limits on steps and tokens come from the
right responses to 100 problems of the calibration split (`limits`), and votes are sampled at temperature 1, the
model's own distribution.

The script keeps the responses in build/reasoner_combinations/, so that a stopped run continues, and writes the summary
of each level to benchmarks/reasoner_combinations/ once the level is complete.

Run: python -m benchmarks.reasoner_combinations [run|table] [--levels chains-7 errands-90] [--problems 200]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from hf_stepflow.evaluation.arms import PLAN_AND_SOLVE, Arm, combine_arms
from hf_stepflow.evaluation.result import amount, percent
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.evaluation.statistics import Estimate
from hf_stepflow.problems import load_problems
from hf_stepflow.reasoner import load_reasoner
from hf_stepflow.reasoner.levels import problems_of
from hf_stepflow.reasoner.prompts import encode_problem
from hf_stepflow.runtime.step_detector import Field

FOLDER = Path(__file__).resolve().with_suffix("")
RESPONSES = FOLDER.parents[1] / "build" / FOLDER.name
SETTINGS: dict[str, Any] = {"base": False, "paper": {"tau_max": 0.15, "alpha": 0.06}}
VOTES = 4


def limits(model: Any, tokenizer: Any, level: str) -> dict[str, int]:
    """Counts the thinking steps and tokens of the right responses to 100 problems of the calibration split."""
    vocabulary = model.stepflow_runtime.rules.vocabulary
    steps, tokens = [], []
    for problem in problems_of(level, "calibration", 100):
        prompt, response = encode_problem(tokenizer, problem)
        steps.append(max(record[Field.THINKING_STEPS] for record in vocabulary.scan(prompt + response)))
        tokens.append(len(response))
    return {"median_steps": sorted(steps)[50], "most_steps": max(steps), "most_tokens": max(tokens)}


def run(level: str, number: int) -> dict[str, Any]:
    """Runs every setting alone and with every method on one level."""
    model, tokenizer = load_reasoner()
    known = limits(model, tokenizer, level)
    methods = {
        f"self-consistency, {VOTES} votes": Arm(samples=VOTES, temperature=1.0),
        "budget forcing by steps": Arm(min_steps=known["median_steps"], max_steps=known["most_steps"]),
        "longer generation, x2": Arm(length_factor=2.0),
        "plan-and-solve": Arm(instruction=PLAN_AND_SOLVE),
    }
    result = evaluate(
        model,
        load_problems(f"reasoner:{level}", number),
        combine_arms(SETTINGS, methods),
        batch_size=50,
        max_new_tokens=known["most_tokens"] * 6 // 5,
        out=RESPONSES / f"{level}.jsonl",
    )
    summary = result.to_dict()
    summary["about"]["model"] = "the embedded reasoner"
    return {"level": level, "n": number, "limits": known, **summary}


def table(found: dict[str, Any]) -> str:
    """Makes the table of one level for docs/combinations.md."""
    lines = [
        "| arm | right, % | tokens a problem | to base | to the method alone | to base, same tokens | unfinished |",
        "|---" * 7 + "|",
    ]
    for arm, one in zip(found["arms"], found["compute"]["arms"], strict=True):
        differences = [_points(one[name]) for name in ("to_first", "to_method", "to_matched")]
        cells = [arm["name"], percent(Estimate(**arm["accuracy"])), amount(Estimate(**one["tokens"])), *differences]
        cells.append(f"{100 * arm['outcomes'].get('unfinished', 0) / found['n']:.1f} %")
        lines.append("| " + " | ".join(cells) + " |")
    curve = [
        f"{point['samples']} at {point['tokens']['value']:.0f} tokens {percent(Estimate(**point['accuracy']))} %"
        for point in found["compute"]["curve"]
    ]
    return "\n".join([f"{found['level']}, n = {found['n']}:", "", *lines, "", "Base, voting: " + "; ".join(curve)])


def _points(one: dict[str, float] | None) -> str:
    return "" if one is None else percent(Estimate(**one), "+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["run", "table"], help="parts to run (default: both)")
    parser.add_argument("--levels", nargs="*", default=["chains-7", "errands-90"], help="levels of the problems")
    parser.add_argument("--problems", type=int, default=200, help="problems of each level (default: 200)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    FOLDER.mkdir(exist_ok=True)
    for level in args.levels:
        path = FOLDER / f"{level}.json"
        if "run" in args.parts:
            path.write_text(json.dumps(run(level, args.problems), indent=1) + "\n")
        if "table" in args.parts and path.exists():
            print(table(json.loads(path.read_text())) + "\n")


if __name__ == "__main__":
    main()
