"""Encodes problems as token ids."""

from typing import Any

from hf_stepflow.prompts import encode_prompt, encode_response

from .problems import Problem


def encode_problem(tokenizer: Any, problem: Problem) -> tuple[list[int], list[int]]:
    """Encodes the prompt and the one right response of a problem.

    Example:
        >>> from hf_stepflow import load_reasoner
        >>> from hf_stepflow.reasoner.levels import problems_of
        >>> from hf_stepflow.reasoner.prompts import encode_problem
        >>> _, tokenizer = load_reasoner()
        >>> prompt, response = encode_problem(tokenizer, problems_of("chains-4", "test", 1)[0])
    """
    return encode_prompt(tokenizer, problem.question), encode_response(tokenizer, problem.response)
