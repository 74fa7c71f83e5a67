"""Problems by name: a file, a benchmark, or a difficulty of the embedded reasoner.

This module stands above `evaluation` and `reasoner`, neither of which knows the other's problems.
"""

from pathlib import Path

from .evaluation.problem import EvalProblem
from .evaluation.sources import BENCHMARKS, load_benchmark, read_problems
from .reasoner.levels import problems_of
from .runtime.errors import StepFlowInputError


def load_problems(
    source: str | Path, limit: int | None = None, *, split: str = "test", seed: int = 0
) -> list[EvalProblem]:
    """Loads problems to evaluate or calibrate on.

    Args:
        source: A JSONL file (`id, question, answer`, optionally `choices`, `tests`, `kind`, `trace`); a benchmark
            that the `datasets` library downloads: `aime24`, `aime25`, `amc23`, `math500`, `gpqa-diamond` or
            `livecodebench`; or a difficulty of the embedded reasoner, such as `reasoner:chains-4`.
        limit: How many problems, from the first on; None takes all of a file or benchmark, and 500 of a difficulty.
        split: The split of the reasoner's problems: `train`, `calibration` or `test`.
        seed: The seed that shuffles the choices of `gpqa-diamond`.

    Raises:
        StepFlowInputError: The file or name is unknown, or the limit is below one.
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
        return reasoner_problems(name.removeprefix("reasoner:"), limit or 500, split)
    if Path(source).is_file():
        return read_problems(Path(source))[:limit]
    if name in BENCHMARKS:
        return load_benchmark(name, seed)[:limit]
    raise StepFlowInputError(
        f"no problems by the name of {name!r}: it is neither a file nor a known name",
        hint=f"known: {', '.join(BENCHMARKS)}, reasoner:LEVEL, or the path of a JSONL file",
    )


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
