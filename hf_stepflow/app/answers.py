"""Answers as they are written: tokens from the thread that generates, cut into steps."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Thread
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from hf_stepflow.evaluation.answers import judge
from hf_stepflow.evaluation.arms import Arm
from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.evaluation.responses import Response
from hf_stepflow.evaluation.sampler import Sampler
from hf_stepflow.runtime.step_detector import StepVocabulary
from hf_stepflow.runtime.trace import TraceStep, segment_trace

from .model import LoadedModel

_SECONDS = 0.15  # between two views of an answer


@dataclass(frozen=True)
class Answer:
    """An answer, finished or not.

    Attributes:
        prompt: The token ids of the question.
        ids: Those of the answer so far.
        steps: Its thinking and summary steps so far.
        seconds: The time that it took; None while it is written.
        response: The whole response; None while it is written.
        outcome: The verdict, where the right answer is known and the response is there.
        text: Its plain text so far, where no step was found in it; else empty.
    """

    prompt: list[int]
    ids: list[int]
    steps: list[TraceStep]
    seconds: float | None = None
    response: Response | None = None
    outcome: str | None = None
    text: str = ""


def stream_answer(
    loaded: LoadedModel,
    question: str,
    stepflow: "dict[str, Any] | bool",
    max_new_tokens: int,
    problem: EvalProblem | None = None,
) -> Iterator[Answer]:
    """Answers a question greedily, and yields the answer as it grows.

    Where the caller stops asking, generation stops too.

    Args:
        loaded: The model.
        question: The text of the question.
        stepflow: False, or the settings that differ from the model's own.
        max_new_tokens: The most tokens of the answer.
        problem: The problem that the question is of, if the right answer is known.

    Yields:
        The answer so far, some times a second; the last one is whole.

    Raises:
        StepFlowError: The question is too long, or the settings do not fit the model.
    """
    prompt = loaded.encode(question, max_new_tokens)
    vocabulary = loaded.model.stepflow_runtime.rules.vocabulary
    tokens = _TokenQueue()
    sampler = Sampler(loaded.model, loaded.tokenizer, vocabulary, max_new_tokens, {"streamer": tokens})
    with closing(_in_thread(lambda: sampler.respond(Arm(stepflow=stepflow), [prompt], 0), tokens)) as views:
        for ids, made in views:
            if made is None:
                steps = written_steps(loaded.tokenizer, vocabulary, prompt, ids)
                yield Answer(prompt, ids, steps, text=_plain_text(loaded.tokenizer, steps, ids))
                continue
            (response,), seconds = made
            steps = written_steps(loaded.tokenizer, vocabulary, prompt, response.ids)
            outcome = None
            if problem is not None and problem.kind != "code":  # whose judgement would run what the model wrote
                outcome = judge(problem, response.summary, response.is_finished).outcome
            text = _plain_text(loaded.tokenizer, steps, response.ids)
            yield Answer(prompt, response.ids, steps, seconds, response, outcome, text)


def written_steps(tokenizer: Any, vocabulary: StepVocabulary, prompt: list[int], ids: list[int]) -> list[TraceStep]:
    """The thinking and summary steps of an answer, given as token ids after those of its prompt."""
    trace = segment_trace(tokenizer, prompt + ids, vocabulary, prompt_length=len(prompt))
    return [step for step in trace.steps if step.label != "question" and step.end > len(prompt)]


def _plain_text(tokenizer: Any, steps: list[TraceStep], ids: list[int]) -> str:
    """The text of an answer without steps, as of a model that writes no markers; empty if it has steps."""
    return "" if steps else str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


class _Stopped(Exception):
    """Ends a generation that nobody waits for."""


class _TokenQueue(BaseStreamer):
    """Hands tokens on from the thread that generates.

    Attributes:
        queue: Lists of token ids.
        is_stopped: Set by the reader to end the generation at its next token.
    """

    def __init__(self) -> None:
        self.queue: Queue[list[int]] = Queue()
        self.is_stopped = False
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt at the first call, then new tokens: int64 [T] or [1, T]."""
        if self.is_stopped:
            raise _Stopped
        if self._has_prompt:
            self.queue.put(value.reshape(-1).tolist())
        self._has_prompt = True

    def end(self) -> None:
        """Does nothing: the reader sees the thread end."""


def _in_thread(generate: Callable[[], Any], tokens: _TokenQueue) -> Generator[tuple[list[int], Any], None, None]:
    """Runs a generation in a thread: yields its tokens so far with None, at the end all of them with its result."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(generate())
        except _Stopped:
            pass
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    ids: list[int] = []
    try:
        while thread.is_alive():
            thread.join(_SECONDS)
            count = len(ids)
            ids += _waiting(tokens.queue)
            if len(ids) > count:
                yield list(ids), None
    finally:
        tokens.is_stopped = True
        thread.join()
    if errors:
        raise errors[0]
    yield ids + _waiting(tokens.queue), results[0]


def _waiting(queue: "Queue[list[int]]") -> list[int]:
    """All ids that wait in a queue."""
    ids: list[int] = []
    while True:
        try:
            ids += queue.get_nowait()
        except Empty:
            return ids
