"""Problems as token ids."""

from typing import Any

from hf_stepflow.prompts import encode_prompt, encode_response

from .problems import Problem


def encode_problem(tokenizer: Any, problem: Problem) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the one right response."""
    return encode_prompt(tokenizer, problem.question), encode_response(tokenizer, problem.response)
