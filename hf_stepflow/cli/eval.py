"""`hf-stepflow eval`: paired evaluation of StepFlow settings and baselines on any model."""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError

from .loading import add_model_arguments, find_stepflow, load
from .paths import demand_folders
from .sampling import add_sampling_arguments, sampling_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds description, arguments and example to the parser of this subcommand."""
    parser.description = (
        "Runs every arm on the same problems with the same seeds, and holds each against the first.\n\n"
        "MODEL is a folder or Hub id, or `reasoner`: the model that comes with this package.\n"
        "PROBLEMS is a JSONL file (id, question, answer), a benchmark (aime24, aime25, amc23, math500, gpqa-diamond,\n"
        "livecodebench), or a level of the reasoner's problems (reasoner:chains-7).\n"
        "An arm is [LABEL=]KIND[:KEY=VALUE,...]; kinds: base, stepflow (any StepFlow setting), and the methods\n"
        "self-consistency (samples, temperature), budget-forcing (min_steps, max_steps), longer (length_factor) and\n"
        "plan-and-solve. --with METHOD, written like an arm, adds the method to every arm: alone and with StepFlow,\n"
        "held against the first arm at the same number of generated tokens."
    )
    parser.epilog = (
        "examples:\n"
        "  hf-stepflow eval --model reasoner --problems reasoner:chains-7 --limit 100 \\\n"
        "      --arm base --arm stepflow:tau_max=0.15 --out results.jsonl --report report.html\n"
        "  hf-stepflow eval --model reasoner --problems reasoner:chains-7 --limit 100 --max-new-tokens 300 \\\n"
        "      --with self-consistency:samples=4 --with budget-forcing:min_steps=20 --with plan-and-solve"
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--stepflow",
        metavar="CONFIG",
        help="preset, JSON file, folder or KEY=VALUE,... with the settings that arms start from",
    )
    parser.add_argument("--problems", required=True, help="JSONL file, benchmark or reasoner:LEVEL")
    parser.add_argument("--split", default="test", help="of the reasoner's problems (default: test)")
    parser.add_argument("--limit", type=int, help="only the first N problems")
    parser.add_argument("--arm", action="append", default=[], help="repeat for each (default: base and stepflow)")
    parser.add_argument(
        "--with",
        action="append",
        default=[],
        dest="methods",
        metavar="METHOD",
        help="another method, alone and with every arm; repeat for each",
    )
    parser.add_argument("--samples", type=int, default=1, help="responses to each problem; above 1 they are sampled")
    add_sampling_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="default: 16")
    parser.add_argument("--run-code", action="store_true", help="run programs that the model writes, to check them")
    parser.add_argument("--out", type=Path, help="JSONL file of the results; a run that was stopped is continued")
    parser.add_argument("--report", type=Path, help="HTML page of the result")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints the result."""
    from hf_stepflow.evaluation.arms import combine_arms
    from hf_stepflow.evaluation.run import evaluate
    from hf_stepflow.problems import load_problems

    demand_folders(args.out, args.report)
    arms = _read_arms(args.arm or ["base", "stepflow"])
    if args.methods:
        arms = combine_arms(arms, _read_arms(args.methods))
    problems = load_problems(args.problems, args.limit, split=args.split, seed=args.seed)
    sampling = sampling_of(args, is_needed=args.samples > 1)
    stepflow = find_stepflow(args.stepflow)
    model, tokenizer = load(args.model, args.dtype, args.device, args.revision)
    if stepflow is not None:
        from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM

        StepFlowModelForCausalLM.attach(model, stepflow, tokenizer=tokenizer)
    result = evaluate(
        model,
        problems,
        arms,
        tokenizer=tokenizer,
        n_samples=args.samples,
        seed=args.seed,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        out=args.out,
        run_code=args.run_code,
        **sampling,
    )
    print(json.dumps(result.to_dict(), indent=2) if args.json else result)
    if args.report is not None:
        from hf_stepflow.evaluation.page import write_report

        write_report(result, problems, args.report)
    return 0


def _read_arms(texts: list[str]) -> dict[str, Any]:
    from hf_stepflow.evaluation.arms import parse_arm

    arms: dict[str, Any] = {}
    for text in texts:
        name, arm = parse_arm(text)
        if name in arms:
            raise StepFlowInputError(f"the arm {name!r} is given twice", hint="write LABEL=KIND to tell them apart")
        arms[name] = arm
    return arms
