"""Compares StepFlow with methods that steer attention otherwise, on the embedded reasoner, with what each damages.

Every arm answers the same problems of the test split, greedy, in float32, at its published defaults; nothing is chosen
on the test split. Responses are cut at twice the length of the level's longest right trace, as in
`benchmarks.reasoner_evidence`.

The script keeps the responses in build/reasoner_rivals/, so that a stopped run continues, and writes the summary of
each level to benchmarks/reasoner_rivals/ once the level is complete.

Run: python -m benchmarks.reasoner_rivals [run|table] [--levels chains-7 errands-60] [--problems 300]
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from hf_stepflow.evaluation.arms import Arm
from hf_stepflow.evaluation.result import amount, percent
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.evaluation.statistics import Estimate, adjust
from hf_stepflow.problems import load_problems
from hf_stepflow.prompts import encode_response
from hf_stepflow.reasoner import load_reasoner

FOLDER = Path(__file__).resolve().with_suffix("")
RESPONSES = FOLDER.parents[1] / "build" / FOLDER.name
# The temperature starts at 300 tokens, the longest context of the reasoner's training.
ARMS: dict[str, Any] = {
    "base": False,
    "paper": {"tau_max": 0.15, "alpha": 0.06},
    "pasta": Arm(rival="pasta"),
    "spotlight": Arm(rival="spotlight"),
    "instaboost": Arm(rival="instaboost"),
    "length temperature": {
        "tau_max": 0.0, "alpha": 0.0, "length_temperature": 1.0, "length_temperature_base": 300,
    },
}  # fmt: skip


def run(level: str, number: int) -> dict[str, Any]:
    """Runs every arm on one level."""
    model, tokenizer = load_reasoner()
    problems = load_problems(f"reasoner:{level}", number)
    limit = 2 * max(len(encode_response(tokenizer, str(one.trace))) for one in problems)
    out = RESPONSES / f"{level}.jsonl"
    result = evaluate(model, problems, ARMS, batch_size=50, max_new_tokens=limit, out=out, check=False)
    summary = result.to_dict()
    summary["about"]["model"] = "the embedded reasoner"
    return {"level": level, "n": number, **summary}


def table(levels: Iterable[dict[str, Any]]) -> str:
    """Makes the table of all levels for docs/evidence.md; p-values are adjusted by Holm over all of it."""
    levels = list(levels)
    p_values = iter(adjust([one["paired"]["p_value"] for level in levels for one in level["comparisons"]]))
    lines = ["| level | n | arm | right, % | difference | p (Holm) | breaks, % | tokens | loops, % | KL p95 |"]
    lines.append("|---" * 10 + "|")
    for level in levels:
        compared = {one["name"]: one for one in level["comparisons"]}
        for arm in level["damage"]:
            one = compared.get(arm["name"])
            cells = [level["level"], str(level["n"]), arm["name"], percent(Estimate(**arm["accuracy"]))]
            if one is None:
                cells += ["", "", "", "", _share(arm["loop_rate"]), ""]
            else:
                cells += [percent(Estimate(**one["paired"]["delta"]), "+"), f"{next(p_values):.2g}"]
                cells += ["" if arm["harm_rate"] is None else percent(Estimate(**arm["harm_rate"]))]
                cells += [f"x{amount(Estimate(**arm['length']), 2)}", _share(arm["loop_rate"])]
                cells += ["" if arm["kl"] is None else f"{arm['kl']['high']:.2g}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(one: dict[str, float] | None) -> str:
    return "" if one is None else f"{100 * one['value']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["run", "table"], help="parts to run (default: both)")
    parser.add_argument("--levels", nargs="*", default=["chains-7", "errands-60"], help="levels of the problems")
    parser.add_argument("--problems", type=int, default=300, help="problems of each level (default: 300)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for level in args.levels if "run" in args.parts else ():
        (FOLDER / f"{level}.json").write_text(json.dumps(run(level, args.problems), indent=1) + "\n")
    if "table" in args.parts:
        print(table(json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))))


if __name__ == "__main__":
    main()
