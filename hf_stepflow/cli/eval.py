"""`hf-stepflow eval`: compares StepFlow settings and other methods on the same problems."""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError

from .arguments import (
    add_engine_arguments,
    add_model_arguments,
    add_run_arguments,
    add_sampling_arguments,
    demand_folders,
    demand_no_engine_args,
    find_stepflow,
    load,
    load_engine,
    sampling_of,
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the description, the arguments and an example."""
    parser.description = (
        "Runs every arm on the same problems with the same seeds, and compares each with the first.\n\n"
        "MODEL is a folder or Hub id, or `reasoner`: the model that comes with this package.\n"
        "PROBLEMS is a JSONL file (id, question, answer), a benchmark (aime24, aime25, amc23, math500, gpqa-diamond,\n"
        "livecodebench), a level of the reasoner's problems (reasoner:chains-7), a generator of reasoning-gym with\n"
        "its knobs (reasoning-gym:chain_sum,min_terms=8,max_terms=8), or a task of the suite, which is not yet\n"
        "measured on any model (stepflow-suite:sums@long). --list-problems shows all.\n"
        "An arm is [LABEL=]KIND[:KEY=VALUE,...]; kinds: base, stepflow (any StepFlow setting), and the methods\n"
        "self-consistency (samples, temperature), budget-forcing (min_steps, max_steps), longer (length_factor) and\n"
        "plan-and-solve. --with METHOD, written like an arm, adds the method alone and combined with each StepFlow\n"
        "arm, and compares these with the first arm at the same number of generated tokens.\n"
        "Kinds that steer attention otherwise: pasta (alpha, heads), spotlight (target), instaboost (factor), all\n"
        "towards the question, and length-temperature (length_temperature_base), which is StepFlow's alone."
    )
    parser.epilog = (
        "examples:\n"
        "  hf-stepflow eval --model reasoner --problems reasoner:chains-7 --limit 100 \\\n"
        "      --arm base --arm stepflow:tau_max=0.15 --out results.jsonl --report report.html\n"
        "  hf-stepflow eval --model reasoner --problems reasoner:chains-7 --limit 100 --max-new-tokens 300 \\\n"
        "      --with self-consistency:samples=4 --with budget-forcing:min_steps=20 --with plan-and-solve"
    )
    add_model_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument(
        "--stepflow",
        metavar="CONFIG",
        help="where arms start from: preset, JSON file, folder, or settings KEY=VALUE,... of `presets settings`",
    )
    parser.add_argument("--problems", required=True, help="JSONL file, benchmark, generator or level (see above)")
    parser.add_argument(
        "--list-problems", action=_ListProblems, nargs=0, help="show sources of problems, sizes and knobs, and exit"
    )
    parser.add_argument("--split", default="test", help="split of problems that are drawn (default: test)")
    add_run_arguments(parser)
    parser.add_argument("--arm", action="append", default=[], help="repeat for each (default: base and stepflow)")
    parser.add_argument(
        "--with", action="append", default=[], dest="methods", metavar="METHOD", help="repeat for each method to add"
    )
    add_sampling_arguments(parser)
    parser.add_argument("--out", type=Path, help="JSONL file of the results; a run that was stopped resumes from it")
    parser.add_argument(
        "--until",
        type=str.lower,
        choices=("decided",),
        help="stop once every arm is measurably better or worse than the first, by a test that holds at any time",
    )
    parser.add_argument(
        "--no-kl", action="store_true", help="do not measure how far arms move predictions on text without a task"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="go on if the first responses show no answers, or no effect of StepFlow",
    )


class _ListProblems(argparse.Action):
    """Lists the sources of problems and exits, like `--help`, whatever else is missing."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from hf_stepflow.problems import describe_sources

        print(describe_sources())
        parser.exit()


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints the result."""
    from hf_stepflow.evaluation.arms import combine_arms
    from hf_stepflow.evaluation.run import evaluate
    from hf_stepflow.problems import load_problems

    demand_folders(args.out, args.report)
    demand_no_engine_args(args)
    arms = _read_arms(args.arm or ["base", "stepflow"])
    if args.methods:
        arms = combine_arms(arms, _read_arms(args.methods))
    problems = load_problems(args.problems, args.limit, split=args.split, seed=args.seed)
    sampling = sampling_of(args, is_needed=args.samples > 1)
    settings = find_stepflow(args.stepflow)
    model, tokenizer = load(args, settings) if args.engine == "transformers" else (load_engine(args, settings), None)
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
        check=not args.no_check,
        until=args.until,
        kl=not args.no_kl,
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
            raise StepFlowInputError(f"the arm {name!r} is given twice", hint="write LABEL=KIND to give it a name")
        arms[name] = arm
    return arms
