"""Right and wrong responses to score settings on: the model's own, and reference traces where problems carry them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.prompts import encode_prompt, encode_response
from hf_stepflow.runtime.step_detector import Field, StepVocabulary


@dataclass(frozen=True)
class Row:
    """A response to score.

    Attributes:
        problem: id of its problem.
        prompt: token ids.
        response: token ids, the end of the turn included.
        is_right: whether it is right.
        weight: problems of the split that this one stands for.
    """

    problem: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    is_right: bool
    weight: float = 1.0

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole of it."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Solved:
    """What the base made of a problem.

    Attributes:
        problem: the problem.
        accuracy: share of its responses that are right.
        tokens: length of the problem's trace: of its reference, else the mean of the model's own.
        steps: its thinking steps, of the same.
        results: the responses, as `evaluate` makes them.
    """

    problem: EvalProblem
    accuracy: float
    tokens: float
    steps: float
    results: list[dict[str, Any]]


def read_answers(
    problems: Sequence[EvalProblem],
    results: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    vocabulary: StepVocabulary,
    template: Mapping[str, Any],
) -> list[Solved]:
    """The base's answers by problem, for the problems that have any.

    Args:
        problems: of the calibration split.
        results: as `evaluate` makes them, token ids included.
        tokenizer: the model's tokenizer.
        vocabulary: its step rules.
        template: further arguments of the chat template.
    """
    own: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        own.setdefault(result["problem"], []).append(dict(result))
    solved = []
    for problem in problems:
        if problem.id not in own:
            continue
        rows = own[problem.id]
        if problem.trace is not None:
            prompt = encode_prompt(tokenizer, problem.prompt, **template)
            reference = encode_response(tokenizer, problem.trace)
            tokens, steps = float(len(reference)), float(_thinking_steps(vocabulary, prompt, reference))
        else:
            tokens = float(np.mean([len(row["ids"]) for row in rows]))
            steps = float(np.mean([row["steps"] for row in rows]))
        accuracy = float(np.mean([row["right"] for row in rows]))
        solved.append(Solved(problem, accuracy, tokens, steps, rows))
    return solved


def _thinking_steps(vocabulary: StepVocabulary, prompt: list[int], response: list[int]) -> int:
    records = vocabulary.scan(prompt + response, prompt_length=len(prompt))
    return max((record[Field.THINKING_STEPS] for record in records[len(prompt) :]), default=0)


def short_and_easy(solved: Sequence[Solved]) -> set[str]:
    """The problems that must not be harmed: solved every time, and of the shorter half of all traces."""
    if not solved:
        return set()
    middle = float(np.median([one.tokens for one in solved]))
    return {one.problem.id for one in solved if one.accuracy == 1 and one.tokens <= middle}


def rows_to_score(solved: Sequence[Solved], tokenizer: Any, template: Mapping[str, Any], limit: int) -> list[Row]:
    """Right and wrong responses to at most so many problems, half of them problems that the base gets wrong.

    A right response is the reference trace, or else the model's own right ones; a wrong one is the model's own. Every
    problem that is taken stands for those of its kind that are not.

    Args:
        solved: the base's answers, in a random order.
        tokenizer: the model's tokenizer.
        template: further arguments of the chat template.
        limit: problems to take.
    """
    missed = [one for one in solved if one.accuracy < 1]
    known = [one for one in solved if one.accuracy == 1]
    half = max(limit // 2, limit - len(known))
    chosen = missed[:half]
    chosen_known = known[: limit - len(chosen)]
    rows = []
    for kind, of in ((chosen, missed), (chosen_known, known)):
        for one in kind:
            prompt = tuple(encode_prompt(tokenizer, one.problem.prompt, **template))
            weight = len(of) / len(kind)
            if one.problem.trace is not None:
                right = [tuple(encode_response(tokenizer, one.problem.trace))]
            else:
                right = [tuple(result["ids"]) for result in one.results if result["right"]]
            wrong = [tuple(result["ids"]) for result in one.results if not result["right"]]
            rows += [Row(one.problem.id, prompt, response, True, weight) for response in dict.fromkeys(right)]
            rows += [Row(one.problem.id, prompt, response, False, weight) for response in dict.fromkeys(wrong)]
    return rows
