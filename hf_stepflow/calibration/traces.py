"""Traces: the base's answers to the calibration split, and the right and wrong responses to score candidates on."""

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
        problem: The id of its problem.
        prompt: Token ids of the prompt.
        response: Token ids of the response, including the end of the turn.
        is_right: Whether the response is right.
        weight: How many problems of the split this one stands for.
    """

    problem: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    is_right: bool
    weight: float = 1.0

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids of prompt and response."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Solved:
    """The base's answers to one problem.

    Attributes:
        problem: The problem.
        accuracy: The share of right responses.
        tokens: The length of the reference trace, or without one the mean length of the responses.
        steps: The number of thinking steps, by the same rule.
        results: The responses, as `evaluate` records them.
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
    """Groups the base's answers, as `evaluate` records them with token ids, by problem.

    Problems without an answer are left out.
    """
    answered: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        answered.setdefault(result["problem"], []).append(dict(result))
    solved = []
    for problem in problems:
        if problem.id not in answered:
            continue
        own = answered[problem.id]
        if problem.trace is not None:
            prompt = encode_prompt(tokenizer, problem.prompt, **template)
            reference = encode_response(tokenizer, problem.trace)
            records = vocabulary.scan(prompt + reference, prompt_length=len(prompt))[len(prompt) :]
            tokens = float(len(reference))
            steps = float(max((record[Field.THINKING_STEPS] for record in records), default=0))
        else:
            tokens = float(np.mean([len(result["ids"]) for result in own]))
            steps = float(np.mean([result["steps"] for result in own]))
        accuracy = float(np.mean([result["right"] for result in own]))
        solved.append(Solved(problem, accuracy, tokens, steps, own))
    return solved


def short_and_easy(solved: Sequence[Solved]) -> set[str]:
    """Returns the ids of problems that must not be harmed: always solved, with a trace of at most median length."""
    if not solved:
        return set()
    middle = float(np.median([one.tokens for one in solved]))
    return {one.problem.id for one in solved if one.accuracy == 1 and one.tokens <= middle}


def rows_to_score(solved: Sequence[Solved], tokenizer: Any, template: Mapping[str, Any], limit: int) -> list[Row]:
    """Chooses responses to score: half of them to problems that the base misses.

    The right response to a problem is its reference trace, or without one each of the model's own right responses; the
    wrong ones are the model's own. Every chosen problem also stands for those of its kind that were left out.

    Args:
        solved: The base's answers, in a random order.
        tokenizer: The model's tokenizer.
        template: Further arguments of the chat template.
        limit: The largest number of problems to choose.
    """
    missed = [one for one in solved if one.accuracy < 1]
    known = [one for one in solved if one.accuracy == 1]
    chosen = missed[: max(limit // 2, limit - len(known))]
    rows = []
    for part, whole in ((chosen, missed), (known[: limit - len(chosen)], known)):
        for one in part:
            prompt = tuple(encode_prompt(tokenizer, one.problem.prompt, **template))
            right = [tuple(result["ids"]) for result in one.results if result["right"]]
            wrong = [tuple(result["ids"]) for result in one.results if not result["right"]]
            if one.problem.trace is not None:
                right = [tuple(encode_response(tokenizer, one.problem.trace))]
            rows += [
                Row(one.problem.id, prompt, response, is_right, len(whole) / len(part))
                for responses, is_right in ((right, True), (wrong, False))
                for response in dict.fromkeys(responses)
            ]
    return rows
