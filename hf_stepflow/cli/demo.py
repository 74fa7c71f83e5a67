"""`hf-stepflow demo`: the embedded reasoner thinks through a problem, without StepFlow and with it."""

import argparse
import io
import json
import random
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError

from .answers import did, first_difference, line_of, written_steps
from .paths import demand_folders
from .seeds import read_seed

# Tokens of an answer to a question of the user's own; drawn ones may take twice what their longest right trace takes.
_LONGEST = 1000
_ROWS = 40


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    Attributes:
        steps: texts of its steps, thinking and summary.
        text: the whole of it.
        tokens: its length.
        outcome: how it was judged, or None where the right answer is not known.
    """

    steps: list[str]
    text: str
    tokens: int
    outcome: str | None


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds description, arguments and example to the parser of this subcommand."""
    parser.description = (
        "A tiny reasoning model that comes with the package answers a problem, greedily, as it is and with StepFlow\n"
        "at the paper's settings, step by step; then both answer more problems and are compared. Nothing is fetched.\n"
        "The problem is drawn by a seed that is shown, never chosen. The model knows invented problems only: what\n"
        "helps or harms it need not help or harm a real model."
    )
    parser.epilog = "example: hf-stepflow demo --difficulty errands-120 --seed 7"
    parser.add_argument("--difficulty", default="chains-7", help="level of the problems (default: chains-7)")
    parser.add_argument("--seed", type=read_seed, help="draws the problem (default: another one each time)")
    parser.add_argument("--problem", metavar="TEXT", help="a question of your own, in the words that the model knows")
    parser.add_argument("--problems", type=int, default=100, help="of the comparison; 0 for none (default: 100)")
    parser.add_argument("--html", type=Path, help="write what is shown to this page as well")
    parser.add_argument("--svg", type=Path, help="write what is shown to this picture as well")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Answers, reports, compares."""
    from transformers.utils import logging

    from hf_stepflow.evaluation.problem import EvalProblem
    from hf_stepflow.problems import reasoner_problems
    from hf_stepflow.reasoner import load_reasoner

    demand_folders(args.html, args.svg)
    console = _console(args)
    logging.disable_progress_bar()
    seed = random.randrange(100_000) if args.seed is None else args.seed
    if args.problems < 0:
        raise StepFlowInputError(f"--problems must be at least 0, got {args.problems}", hint="0 compares nothing")
    model, tokenizer = load_reasoner()
    (problem,) = reasoner_problems(args.difficulty, 1, start=seed)
    is_known = args.problem is None
    if not is_known:
        problem = EvalProblem("your own", args.problem, "0", kind="number")
    question, right = problem.question, problem.answer if is_known else None
    limit = _limit(tokenizer, args.difficulty, seed, args.problems)
    longest = limit if is_known else _LONGEST
    base = _answer(model, tokenizer, problem, False, is_known, longest)
    with_stepflow = _answer(model, tokenizer, problem, True, is_known, longest)
    report = model.stepflow_report()
    asked = f"{args.difficulty}, seed {seed}" if args.problem is None else "your own"
    if console is not None:
        from rich.markup import escape

        console.print(f"[bold]Question[/] ({asked}): {escape(question)}\n")
        console.print(_side_by_side(base, with_stepflow))
        if right is not None:
            console.print(f"The right answer is [bold]{right}[/].\n")
        console.print(f"[bold]What StepFlow did[/]\n{did(report)}\n")
    result = _compare(model, args.difficulty, seed, args.problems, limit, progress=not args.json)
    if console is not None:
        if result is not None:
            title = f"[bold]Both on {args.problems} more problems[/]"
            console.print(f"{title} ({args.difficulty}, from seed {seed + 1} on)")
            console.print(str(result), markup=False)
        _write(console, args)
    if args.json:
        told = {
            "problem": asked,
            "question": question,
            "right": right,
            "base": vars(base),
            "stepflow": vars(with_stepflow),
            "report": report.to_dict(),
            "comparison": None if result is None else result.to_dict(),
        }
        print(json.dumps(told, indent=2))
    return 0


def _console(args: argparse.Namespace) -> Any:
    """Where the text goes: with --json to the page and picture alone, and nowhere (None) if none was asked for."""
    if args.json and args.html is None and args.svg is None:
        return None
    from rich.console import Console

    file = io.StringIO() if args.json else None
    return Console(file=file, record=True, highlight=False, width=None if args.svg is None else 130)


def _write(console: Any, args: argparse.Namespace) -> None:
    """The page and the picture of what the console was given."""
    if args.svg is not None:
        picture = console.export_svg(title="hf-stepflow demo", clear=False)
        args.svg.write_text(re.sub(r"@font-face\s*\{.*?\}", "", picture, flags=re.DOTALL))  # they would be fetched
    if args.html is not None:
        console.save_html(str(args.html), clear=False)


def _limit(tokenizer: Any, level: str, seed: int, number: int) -> int:
    """Tokens of an answer that has surely gone astray: the one shown and those of the comparison."""
    from hf_stepflow.reasoner.levels import problems_of
    from hf_stepflow.reasoner.prompts import encode_problem

    problems = problems_of(level, "test", number + 1, start=seed)
    return 2 * max(len(encode_problem(tokenizer, problem)[1]) for problem in problems)


def _answer(model: Any, tokenizer: Any, problem: Any, stepflow: bool, is_known: bool, longest: int) -> Answer:
    from hf_stepflow.evaluation.answers import judge
    from hf_stepflow.evaluation.arms import Arm
    from hf_stepflow.evaluation.sampler import Sampler

    vocabulary = model.stepflow_runtime.rules.vocabulary
    sampler = Sampler(model, tokenizer, vocabulary, longest)
    prompt = sampler.encode(problem)
    (response,), _ = sampler.respond(Arm(stepflow=stepflow), [prompt], seed=0)
    steps = [line_of(step) for step in written_steps(tokenizer, prompt, response.ids, vocabulary)]
    outcome = judge(problem, response.summary, response.is_finished).outcome if is_known else None
    return Answer(steps, response.text, len(response.ids), outcome)


def _side_by_side(base: Answer, with_stepflow: Answer) -> Any:
    """Both answers in columns, steps numbered, the first step that differs marked."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(expand=True)
    table.add_column("", justify="right", no_wrap=True)
    for name, answer in (("Base model", base), ("With StepFlow", with_stepflow)):
        colour = {None: "", "correct": "[green]"}.get(answer.outcome, "[red]")
        verdict = "" if answer.outcome is None else f", {colour}{answer.outcome}[/]"
        table.add_column(f"{name} ({answer.tokens} tokens{verdict})", ratio=1)
    pairs = list(zip_longest(base.steps, with_stepflow.steps, fillvalue=""))
    first = first_difference(base.steps, with_stepflow.steps)
    for place in _shown(len(pairs), first):
        if place is None:
            table.add_row("...", "...", "...")
            continue
        style = "bold yellow" if place == first else None
        table.add_row(f"{place + 1}{' !' if place == first else ''}", *map(escape, pairs[place]), style=style)
    table.caption = "! first difference" if first is not None else "no difference"
    return table


def _shown(length: int, first: int | None) -> list[int | None]:
    """The steps to show: all if they are few, else the first ones, those around the difference, and the last ones."""
    if length <= _ROWS:
        return list(range(length))
    middle = 0 if first is None else first
    kept = sorted({*range(8), *range(max(0, middle - 5), min(length, middle + 10)), *range(length - 8, length)})
    shown: list[int | None] = []
    for place in kept:
        if shown and shown[-1] != place - 1:
            shown.append(None)
        shown.append(place)
    return shown


def _compare(model: Any, level: str, seed: int, number: int, limit: int, progress: bool) -> Any:
    from hf_stepflow.evaluation.run import evaluate
    from hf_stepflow.problems import reasoner_problems

    if number == 0:
        return None
    problems = reasoner_problems(level, number, start=seed + 1)
    return evaluate(model, problems, batch_size=50, max_new_tokens=limit, seed=seed, progress=progress)
