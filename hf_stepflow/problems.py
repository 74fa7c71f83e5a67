"""Problems by name: a file, a benchmark, or a difficulty of the reasoner."""

from pathlib import Path

from .evaluation.problem import EvalProblem
from .evaluation.sources import BENCHMARKS, load_benchmark, read_problems
from .reasoner.levels import problems_of
from .runtime.errors import StepFlowInputError


def load_problems(
    source: str | Path, limit: int | None = None, *, split: str = "test", seed: int = 0
) -> list[EvalProblem]:
    """Problems by name.

    Args:
        source: a JSONL file (`id, question, answer`, optionally `choices`, `tests`, `kind`, `trace`); a difficulty
            of the embedded reasoner, such as `reasoner:chains-4`; or a benchmark: `aime24`, `aime25`, `amc23`,
            `math500`, `gpqa-diamond`, `livecodebench`, fetched by the `datasets` library.
        limit: how many, from the first on; None takes all of a file or benchmark, and 500 of a generator.
        split: of the reasoner's problems: `train`, `calibration` or `test`.
        seed: shuffles the choices of `gpqa-diamond`.

    Raises:
        StepFlowInputError: no such file or name, or a limit below one.
        StepFlowFileError: a file that is not what it should be; the line is named.
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
        f"no problems by the name of {name!r}: no such file, and not a known name",
        hint=f"known: {', '.join(BENCHMARKS)}, reasoner:LEVEL, or the path of a JSONL file",
    )


def reasoner_problems(level: str, number: int, split: str = "test", start: int = 0) -> list[EvalProblem]:
    """Problems of the embedded reasoner.

    Args:
        level: their difficulty, a key of `hf_stepflow.reasoner.levels.LEVELS`.
        number: how many.
        split: `train`, `calibration` or `test`.
        start: the first of them.

    Raises:
        StepFlowInputError: no such level or split.
    """
    drawn = problems_of(level, split, number, start)
    return [EvalProblem(one.id, one.question, one.answer, kind="number", trace=one.response) for one in drawn]
