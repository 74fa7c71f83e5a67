"""`hf-stepflow view`: one HTML page that shows every response of a run, step by step."""

import argparse
from pathlib import Path

from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError

from .arguments import demand_folders


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the description, the arguments and an example."""
    parser.description = (
        "Writes a page that shows every response of a run: problems to choose and to search, arms side by side,\n"
        "steps aligned and the first difference marked; filters for what an arm gained or lost, for loops and for\n"
        "responses that were cut off. The page is one file, which needs no network and opens in any browser.\n\n"
        "RESULTS is a file of `hf-stepflow eval --out`, finished or not. It holds responses and no questions:\n"
        "--problems names the source that the run was given; the page then shows questions and right answers too."
    )
    parser.epilog = (
        "examples:\n"
        "  hf-stepflow view results.jsonl\n"
        "  hf-stepflow view results.jsonl --problems reasoner:chains-7 --out run.html"
    )
    parser.add_argument("results", metavar="RESULTS", type=Path, help="a results file")
    parser.add_argument("--out", type=Path, help="the page to write (default: RESULTS with the ending .html)")
    parser.add_argument("--problems", help="the problems of the run, as for `hf-stepflow eval`")
    parser.add_argument("--split", default="test", help="split that the problems are from (default: test)")


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints its path."""
    from hf_stepflow.evaluation.result import EvaluationResult
    from hf_stepflow.evaluation.viewer import write_viewer

    path = args.results.with_suffix(".html") if args.out is None else args.out
    demand_folders(path)
    if path.exists() and path.samefile(args.results):
        raise StepFlowInputError(f"--out {str(path)!r} is the results file itself", hint="name another file")
    try:
        result = EvaluationResult.load(args.results)
    except StepFlowFileError as error:
        raise StepFlowFileError(
            error.message, hint="give a file that `hf-stepflow eval --out` wrote, as it wrote it"
        ) from error
    problems = None
    if args.problems is not None:
        from hf_stepflow.problems import load_problems

        asked = result.run
        problems = load_problems(args.problems, asked["n_problems"], split=args.split, seed=asked["seed"])
    write_viewer(result, path, problems, progress=True)
    print(f"{path}: {len(result.run['arms'])} arms, {path.stat().st_size / 1e6:.1f} MB")
    return 0
