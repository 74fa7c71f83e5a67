"""Both on more problems: an evaluation in a thread, read from its results file while it runs."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

from hf_stepflow.evaluation.arms import Arm
from hf_stepflow.evaluation.engine import TransformersEngine
from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.evaluation.result import EvaluationResult
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.evaluation.sampler import Sampler

from .model import LoadedModel

BATCH = 8
_SECONDS = 0.5  # between two looks at the results file


def stream_comparison(
    loaded: LoadedModel, problems: Sequence[EvalProblem], settings: dict[str, Any], max_new_tokens: int
) -> Iterator[EvaluationResult]:
    """Compares the base with StepFlow on problems, and yields the result as it grows, after every batch.

    Where the caller stops asking, the run stops at its next batch.

    Args:
        loaded: The model.
        problems: The problems.
        settings: The settings that differ from the model's own.
        max_new_tokens: The most tokens of a response.

    Yields:
        The result so far; the last one is whole.

    Raises:
        StepFlowError: As `evaluate`.
    """
    stop = Event()
    engine = _StoppableEngine(loaded, stop)
    results: list[EvaluationResult] = []
    errors: list[BaseException] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.jsonl"

        def run() -> None:
            options: dict[str, Any] = {"batch_size": BATCH, "max_new_tokens": max_new_tokens, "check": False}
            try:
                results.append(
                    evaluate(
                        engine, problems, {"base": False, "stepflow": settings}, out=path, progress=False, **options
                    )
                )
            except _Stopped:
                pass
            except BaseException as error:
                errors.append(error)

        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            size = 0
            while thread.is_alive():
                time.sleep(_SECONDS)
                now = path.stat().st_size if path.exists() else 0
                if now > size:
                    size = now
                    yield EvaluationResult.load(path)
        finally:
            stop.set()
            thread.join()
    if errors:
        raise errors[0]
    yield results[0]


class _Stopped(Exception):
    """Ends a run that nobody waits for."""


class _StoppableSampler(Sampler):
    """A sampler that generates no further batch once an event is set."""

    stop: Event

    def respond(self, *args: Any, **kwargs: Any) -> Any:
        """As `Sampler`."""
        if self.stop.is_set():
            raise _Stopped
        return super().respond(*args, **kwargs)


class _StoppableEngine(TransformersEngine):
    """The engine of a model that has StepFlow attached, whose runs end where an event is set."""

    def __init__(self, loaded: LoadedModel, stop: Event):
        super().__init__(loaded.model, loaded.tokenizer, loaded.model.stepflow_runtime)
        self._stop = stop

    def sampler(self, arms: dict[str, Arm], *args: Any) -> Sampler:
        """As `Engine`."""
        sampler = _StoppableSampler(self._model, self.tokenizer, self.vocabulary, *args)
        sampler.stop = self._stop
        return sampler
