"""Problems by name: a file, one of the paper's six benchmarks, a generator, or a difficulty of the embedded reasoner.

This module stands above `evaluation` and `reasoner`, neither of which knows the other's problems.
"""

import base64
import json
import pickletools
import random
import textwrap
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .evaluation.generated import draw_problems, generators, parse_generator
from .evaluation.problem import EvalProblem, problem_of
from .evaluation.suite import LENGTHS, SUITE, suite_task
from .reasoner.levels import LEVELS, problems_of
from .runtime.errors import StepFlowFileError, StepFlowInputError

logger = logging.get_logger(__name__)

DRAWN = 500  # problems of a source without end, unless a limit is given


def load_problems(
    source: str | Path, limit: int | None = None, *, split: str = "test", seed: int = 0
) -> list[EvalProblem]:
    """Loads problems to evaluate or calibrate on.

    Args:
        source: A JSONL file (`id, question, answer`, optionally `choices`, `tests`, `kind`, `trace`); a benchmark
            that the `datasets` library downloads: `aime24`, `aime25`, `amc23`, `math500`, `gpqa-diamond` or
            `livecodebench`; a difficulty of the embedded reasoner, such as `reasoner:chains-4`; a generator of
            reasoning-gym with its knobs, such as `reasoning-gym:chain_sum,min_terms=8,max_terms=8`; or a task of the
            suite (not yet measured on any model), such as `stepflow-suite:sums@long`.
        limit: How many problems, from the first on; None takes all of a file or benchmark, and 500 of the others.
        split: The split of the problems that are drawn: `train`, `calibration` or `test`. No question is in two.
        seed: The seed of a generator, and of the order of the choices of `gpqa-diamond`.

    Raises:
        StepFlowInputError: The file, name or knob is unknown, a package is missing, or the limit is below one.
        StepFlowFileError: The file or the benchmark cannot be read; the error names the line.

    Example:
        >>> from hf_stepflow import load_problems
        >>> [problem.id for problem in load_problems("reasoner:chains-4", 2)]
        ['chains-4/test/0', 'chains-4/test/1']
    """
    name = str(source)
    if limit is not None and limit < 1:
        raise StepFlowInputError(f"limit must be at least 1, got {limit}", hint="leave it out to take all problems")
    if name.startswith("reasoner:"):
        return reasoner_problems(name.removeprefix("reasoner:"), limit or DRAWN, split)
    if name.startswith("reasoning-gym:"):
        generator, knobs = parse_generator(name.removeprefix("reasoning-gym:"))
        return draw_problems(generator, knobs, limit or DRAWN, split, seed)
    if name.startswith("stepflow-suite:"):
        task, knobs = suite_task(name.removeprefix("stepflow-suite:"))
        return draw_problems(task.generator, knobs, limit or DRAWN, split, seed)
    if Path(source).is_file():
        return read_problems(Path(source))[:limit]
    if name in BENCHMARKS:
        return load_benchmark(name, seed)[:limit]
    raise StepFlowInputError(
        f"no problems by the name of {name!r}: it is neither a file nor a known name",
        hint=f"known: {', '.join(BENCHMARKS)}, reasoner:LEVEL, reasoning-gym:NAME, stepflow-suite:TASK@LENGTH, or the "
        "path of a JSONL file; `hf-stepflow eval --list-problems` lists all",
    )


def describe_sources() -> str:
    """Returns all sources of problems as text: names, sizes and knobs with their defaults."""
    lines = ["FILE.jsonl", "  one problem a line: id, question, answer, optionally choices, tests, kind, trace", ""]
    lines.append("Benchmarks, which the datasets library downloads")
    lines += [f"  {name:<14} {one.size}" for name, one in BENCHMARKS.items()]
    lines += ["", f"reasoner:LEVEL, without end ({DRAWN} unless --limit says otherwise)"]
    lines += textwrap.wrap(", ".join(LEVELS), 116, initial_indent="  ", subsequent_indent="  ")
    lines += ["", f"stepflow-suite:TASK@LENGTH, without end ({DRAWN} unless --limit says otherwise); lengths: "
              f"{', '.join(LENGTHS)}", "  candidate tasks, not yet measured on any model"]  # fmt: skip
    for name, task in SUITE.items():
        lines.append(f"  {name:<14} {task.strains}: {task.meaning}")
        for length in LENGTHS:
            knobs = ",".join(f"{key}={value}" for key, value in task.knobs[length].items())
            lines.append(f"  {'':<14} {length:<6} = {task.generator},{knobs}")
    lines += ["", f"reasoning-gym:NAME[,KEY=VALUE...], without end ({DRAWN} unless --limit says otherwise)"]
    try:
        for name, defaults in generators().items():
            written = (f"{key}={textwrap.shorten(json.dumps(value), 60)}" for key, value in defaults.items())
            lines += textwrap.wrap(
                f"{name:<28} {' '.join(written)}",
                116,
                initial_indent="  ",
                subsequent_indent=" " * 31,
                break_long_words=False,
            )
    except StepFlowInputError as error:
        lines.append(f"  {error.message}: {error.hint}")
    return "\n".join(lines)


def reasoner_problems(level: str, number: int, split: str = "test", start: int = 0) -> list[EvalProblem]:
    """Draws problems of the embedded reasoner.

    Args:
        level: The difficulty, a key of `hf_stepflow.reasoner.levels.LEVELS`.
        number: How many problems.
        split: `train`, `calibration` or `test`.
        start: The index of the first problem.

    Raises:
        StepFlowInputError: The level or the split does not exist.
    """
    drawn = problems_of(level, split, number, start)
    return [EvalProblem(one.id, one.question, one.answer, kind="number", trace=one.response) for one in drawn]


def read_problems(path: Path) -> list[EvalProblem]:
    """Reads the problems of a JSONL file.

    Raises:
        StepFlowFileError: A line is not a problem, or repeats an id.
    """
    problems: dict[str, EvalProblem] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StepFlowFileError(f"{path} cannot be read: {error}", hint="a problems file is JSONL in UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            problem = problem_of(json.loads(line))
        except (json.JSONDecodeError, StepFlowInputError) as error:
            raise StepFlowFileError(
                f"{path}, line {number}: {error}",
                hint='each line is an object such as {"id": "1", "question": "2 + 2?", "answer": "4"}',
            ) from error
        if problem.id in problems:
            raise StepFlowFileError(
                f"{path}, line {number}: the id {problem.id!r} comes twice", hint="make ids unique"
            )
        problems[problem.id] = problem
    if not problems:
        raise StepFlowFileError(f"{path} holds no problems", hint="one JSON object a line")
    return list(problems.values())


_MATH = "{}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_CHOICE = "{}\n\nPlease reason step by step, and end with the letter of the right choice within \\boxed{{}}.\n"
_CODE = (
    "{}\n\nPlease reason step by step, then write a Python program that reads standard input and writes standard "
    "output, in one block marked ```python."
)


@dataclass(frozen=True)
class Benchmark:
    """A data set on the Hub, and how its rows become problems.

    Attributes:
        convert: Makes a problem of a row's number, the row and the seed; None if the row cannot be checked.
        arguments: The arguments of `load_dataset`.
        size: The number of problems, in words.
        hint: The way out if the data set cannot be loaded.
    """

    convert: Callable[[int, dict[str, Any], int], EvalProblem | None]
    arguments: dict[str, str]
    size: str
    hint: str = "check the connection, or pass the path of a JSONL file"


def _mathematics(number: int, row: dict[str, Any], seed: int, question: str = "problem") -> EvalProblem:
    return EvalProblem(str(number), _MATH.format(row[question]), str(row["answer"]), kind="math")


def _gpqa(number: int, row: dict[str, Any], seed: int) -> EvalProblem:
    right = row["Correct Answer"].strip()
    choices = [right, *(row[f"Incorrect Answer {one}"].strip() for one in (1, 2, 3))]
    random.Random(f"{seed}/{number}").shuffle(choices)
    letter = "ABCD"[choices.index(right)]
    return EvalProblem(str(number), _CHOICE.format(row["Question"].strip()), letter, tuple(choices), kind="choice")


def _live_code(number: int, row: dict[str, Any], seed: int) -> EvalProblem | None:
    tests = json.loads(row["public_test_cases"]) + _private_tests(row["private_test_cases"])
    if any(test["testtype"] != "stdin" for test in tests):
        return None  # asks for a function to be called, which the checker does not do
    pairs = json.dumps([[test["input"], test["output"]] for test in tests])
    return EvalProblem(str(row["question_id"]), _CODE.format(row["question_content"]), "-", tests=pairs, kind="code")


def _private_tests(text: str) -> list[dict[str, str]]:
    """Reads the hidden tests: JSON, or a JSON text that was pickled, compressed and encoded."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        # genops lists what a pickle holds and runs none of it; the only text in it is the JSON.
        listed = pickletools.genops(zlib.decompress(base64.b64decode(text)))
        return json.loads(next(argument for _, argument, _ in listed if isinstance(argument, str)))


BENCHMARKS = {
    "aime24": Benchmark(_mathematics, {"path": "HuggingFaceH4/aime_2024", "split": "train"}, "30 problems"),
    "aime25": Benchmark(_mathematics, {"path": "math-ai/aime25", "split": "test"}, "30 problems"),
    "amc23": Benchmark(
        partial(_mathematics, question="question"), {"path": "math-ai/amc23", "split": "test"}, "40 problems"
    ),
    "math500": Benchmark(_mathematics, {"path": "HuggingFaceH4/MATH-500", "split": "test"}, "500 problems"),
    "gpqa-diamond": Benchmark(
        _gpqa,
        {"path": "Idavidrein/gpqa", "name": "gpqa_diamond", "split": "train"},
        "198 problems",
        "accept its terms on the Hub, then log in (hf auth login)",
    ),
    # Read as JSON, since the data set would otherwise run a script.
    "livecodebench": Benchmark(
        _live_code,
        {
            "path": "json",
            "data_files": "hf://datasets/livecodebench/code_generation_lite/test.jsonl",
            "split": "train",
        },
        "400 problems, less those that ask for a function",
        "check the connection; its answers are programs, which are run to be checked (--run-code)",
    ),
}


def load_benchmark(name: str, seed: int = 0) -> list[EvalProblem]:
    """Loads all problems of a benchmark; the `datasets` library downloads and caches it.

    Args:
        name: A key of `BENCHMARKS`.
        seed: The seed that shuffles the choices of a multiple choice.

    Raises:
        StepFlowFileError: The benchmark could not be downloaded or read.
    """
    import datasets

    benchmark = BENCHMARKS[name]
    try:
        rows = datasets.load_dataset(**benchmark.arguments)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        source = benchmark.arguments.get("data_files") or benchmark.arguments["path"]
        raise StepFlowFileError(f"{name} ({source}) could not be loaded: {error}", hint=benchmark.hint) from error
    problems = [benchmark.convert(number, row, seed) for number, row in enumerate(rows)]
    kept = [problem for problem in problems if problem is not None]
    if len(kept) < len(problems):
        left_out = len(problems) - len(kept)
        logger.warning("%s: left out %d of %d problems, which cannot be checked", name, left_out, len(problems))
    return kept
