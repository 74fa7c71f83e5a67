"""Claim: whether what docs/evidence.md says of the shipped reasoner holds for reasoners trained from other seeds.

Exact traces on the same problems of the test split, float32, under the arms that had moved the shipped one most. What
is found is kept in benchmarks/reasoner_seeds/, a file a seed; a level that is there already is not computed again.

Run: make train-seeds, then python benchmarks/reasoner_seeds.py build/reasoner-1 build/reasoner-2 [--levels ...]
     python benchmarks/reasoner_seeds.py prints the tables of what is there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from reasoner_evidence import ARMS, about, traces, traces_table

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.evaluation.runner import model_digest
from hf_stepflow.reasoner.levels import LEVELS
from hf_stepflow.reasoner.release import load_run
from hf_stepflow.reasoner.vocabulary import build_tokenizer

FOLDER = Path(__file__).with_suffix("")
ASKED = {name: ARMS[name] for name in ("paper", 'scope "step"', "length temperature")}


def measure(run: Path, levels: list[str], number: int) -> None:
    """Adds to the file of a run's seed what is missing there."""
    tokenizer = build_tokenizer()
    found = load_run(run, tokenizer)
    model = StepFlowModelForCausalLM.attach(found.model, tokenizer=tokenizer)
    seed = found.recipe.seed
    path = FOLDER / f"seed-{seed}.json"
    asked = {"seed": seed, "n": number, "model": model_digest(model), "settings": ASKED}
    known = json.loads(path.read_text()) if path.exists() else {}
    is_same = {name: known.get(name) for name in asked} == json.loads(json.dumps(asked))
    rows: dict[str, Any] = known["levels"] if is_same else {}
    for level in levels:
        if level in rows:
            continue
        rows[level] = {"seed": seed, **traces(model, tokenizer, level, number, ASKED)}
        ordered = {level: rows[level] for level in LEVELS if level in rows}
        text = json.dumps({**asked, "about": about(model), "levels": ordered}, indent=1)
        path.write_text(text + "\n")
        print(f"seed {seed} {level} done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished training runs")
    parser.add_argument("--levels", nargs="*", default=list(LEVELS))
    parser.add_argument("--problems", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for run in args.runs:
        measure(run, args.levels, args.problems)
    known = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("seed-*.json"))]
    print(traces_table([row for one in known for row in one["levels"].values()], first="seed"))


if __name__ == "__main__":
    main()
