"""`hf-stepflow demo`: the embedded reasoner thinks through a problem, without StepFlow and with it."""

import argparse
import io
import json
import math
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_stepflow.runtime.errors import StepFlowInputError

from .arguments import demand_folders, read_seed

if TYPE_CHECKING:
    from .terminal import Answer

_LONGEST = 1000  # tokens of an answer to the user's own question
_ROWS = 40
_BATCH = 50  # problems that are answered together in the comparison
_TRIED = 16  # tokens of each problem from which the time of the comparison is estimated


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the description, the arguments and an example."""
    parser.description = (
        "A tiny reasoning model that comes with the package answers a problem greedily, on its own and with StepFlow\n"
        "at the paper's settings, step by step; then both answer more problems and are compared. Nothing is\n"
        "downloaded. A printed seed draws the problem; none is hand-picked. The model knows only invented problems:\n"
        "settings that help or harm it need not do the same to a real model."
    )
    parser.epilog = "example: hf-stepflow demo --difficulty errands-120 --seed 7"
    parser.add_argument("--difficulty", default="chains-7", help="level of the problems (default: chains-7)")
    parser.add_argument("--seed", type=read_seed, help="seed that draws the problem (default: a new one each time)")
    parser.add_argument("--problem", metavar="TEXT", help="your own question, in words that the model knows")
    parser.add_argument("--problems", type=int, default=100, help="problems to compare on; 0 for none (default: 100)")
    parser.add_argument("--html", type=Path, help="also write the output as an HTML page")
    parser.add_argument("--svg", type=Path, help="also write the output as a picture")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Answers one problem, prints what StepFlow did, and compares both on more problems."""
    import math_verify  # noqa: F401  # its absence is reported before anything is answered
    from transformers.utils import logging

    from hf_stepflow.evaluation.answers import judge
    from hf_stepflow.evaluation.problem import EvalProblem
    from hf_stepflow.evaluation.run import evaluate
    from hf_stepflow.evaluation.sampler import Sampler
    from hf_stepflow.problems import reasoner_problems
    from hf_stepflow.prompts import encode_response
    from hf_stepflow.reasoner import load_reasoner
    from hf_stepflow.reasoner.language import check_readable

    from .terminal import answer, effect_of

    demand_folders(args.html, args.svg)
    console = _console(args)
    logging.disable_progress_bar()
    seed = random.randrange(100_000) if args.seed is None else args.seed
    if args.problems < 0:
        raise StepFlowInputError(f"--problems must be at least 0, got {args.problems}", hint="0 skips the comparison")
    if args.problem is not None:
        check_readable(args.problem)
    model, tokenizer = load_reasoner()
    problem, *others = drawn = reasoner_problems(args.difficulty, 1 + args.problems, start=seed)
    limit = 2 * max(len(encode_response(tokenizer, str(one.trace))) for one in drawn)  # longer answers went astray
    source, longest, is_known = f"{args.difficulty}, seed {seed}", limit, args.problem is None
    if not is_known:
        problem = EvalProblem("your own", args.problem, "0", kind="number")
        source, longest = "your own", _LONGEST
    right = problem.answer if is_known else None
    sampler = Sampler(model, tokenizer, model.stepflow_runtime.rules.vocabulary, longest)
    prompt = sampler.encode(problem)
    answers = [answer(sampler, prompt, is_on) for is_on in (False, True)]
    report = model.stepflow_report()
    outcomes = [
        judge(problem, one.response.summary, one.response.is_finished).outcome if is_known else None for one in answers
    ]
    if console is not None:
        from rich.markup import escape

        console.print(f"[bold]Question[/] ({source}): {escape(problem.question)}\n")
        console.print(_side_by_side(answers, outcomes))
        if right is not None:
            console.print(f"The right answer is [bold]{right}[/].\n")
        console.print(f"[bold]What StepFlow did[/]\n{effect_of(report)}\n")
    result = None
    if others:
        if not args.json:
            steps = max(len(encode_response(tokenizer, str(one.trace))) for one in others)
            seconds = _expected_seconds(sampler, others, steps)
            print(
                f"Both answer {len(others)} more problems now, which takes some {_duration(seconds)}.", file=sys.stderr
            )
        result = evaluate(model, others, batch_size=_BATCH, max_new_tokens=limit, seed=seed, progress=not args.json)
    if console is not None:
        if result is not None:
            title = f"[bold]Both on {args.problems} more problems[/]"
            console.print(f"{title} ({args.difficulty}, from seed {seed + 1} on)")
            console.print(str(result), markup=False)
        _write(console, args)
    if args.json:
        base, with_stepflow = (
            {"steps": one.lines, "text": one.response.text, "tokens": len(one.response.ids), "outcome": outcome}
            for one, outcome in zip(answers, outcomes, strict=True)
        )
        data = {
            "problem": source,
            "question": problem.question,
            "right": right,
            "base": base,
            "stepflow": with_stepflow,
            "report": report.to_dict(),
            "comparison": None if result is None else result.to_dict(),
        }
        print(json.dumps(data, indent=2))
    return 0


def _expected_seconds(sampler: Any, problems: Sequence[Any], steps: int) -> float:
    """The time of the comparison, by the first tokens of its first batch.

    Args:
        sampler: The sampler of the demo.
        problems: The problems to compare on.
        steps: The number of tokens of the longest right answer, for which a batch waits.
    """
    from hf_stepflow.evaluation.arms import Arm

    prompts = [sampler.encode(problem) for problem in problems[:_BATCH]]
    reading, writing = (
        replace(sampler, max_new_tokens=number).respond(Arm(), prompts, 0)[1] for number in (1, 1 + _TRIED)
    )
    batches = math.ceil(len(problems) / _BATCH)
    return 2 * batches * (reading + steps * (writing - reading) / _TRIED)


def _duration(seconds: float) -> str:
    return f"{max(5, 5 * round(seconds / 5))} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _console(args: argparse.Namespace) -> Any:
    """Makes the console for the text; with --json it feeds only the files, and is None if there are none."""
    if args.json and args.html is None and args.svg is None:
        return None
    from rich.console import Console

    file = io.StringIO() if args.json else None
    return Console(file=file, record=True, highlight=False, width=None if args.svg is None else 130)


def _write(console: Any, args: argparse.Namespace) -> None:
    """Writes the text of the console as the page and the picture that were asked for."""
    if args.svg is not None:
        picture = console.export_svg(title="hf-stepflow demo", clear=False)
        args.svg.write_text(re.sub(r"@font-face\s*\{.*?\}", "", picture, flags=re.DOTALL))  # viewers would fetch fonts
    if args.html is not None:
        console.save_html(str(args.html), clear=False)


def _side_by_side(answers: "list[Answer]", outcomes: Sequence[str | None]) -> Any:
    """Makes a table of both answers, with numbered steps and the first difference marked."""
    from rich.markup import escape
    from rich.table import Table

    from .terminal import first_difference

    table = Table(expand=True)
    table.add_column("", justify="right", no_wrap=True)
    for name, one, outcome in zip(("Base model", "With StepFlow"), answers, outcomes, strict=True):
        colour = {None: "", "correct": "[green]"}.get(outcome, "[red]")
        verdict = "" if outcome is None else f", {colour}{outcome}[/]"
        table.add_column(f"{name} ({len(one.response.ids)} tokens{verdict})", ratio=1)
    base, with_stepflow = (one.lines for one in answers)
    pairs = list(zip_longest(base, with_stepflow, fillvalue=""))
    first = first_difference(base, with_stepflow)
    for place in _visible_rows(len(pairs), first):
        if place is None:
            table.add_row("...", "...", "...")
            continue
        style = "bold yellow" if place == first else None
        table.add_row(f"{place + 1}{' !' if place == first else ''}", *map(escape, pairs[place]), style=style)
    table.caption = "! first difference" if first is not None else "no difference"
    return table


def _visible_rows(length: int, first: int | None) -> list[int | None]:
    """Selects the rows to print; None marks a gap.

    Few rows are all printed; of many, the first ones, those around the first difference, and the last ones.
    """
    if length <= _ROWS:
        return list(range(length))
    middle = 0 if first is None else first
    kept = sorted({*range(8), *range(max(0, middle - 5), min(length, middle + 10)), *range(length - 8, length)})
    rows: list[int | None] = []
    for place in kept:
        if rows and rows[-1] != place - 1:
            rows.append(None)
        rows.append(place)
    return rows
