"""Problems as token ids."""

from typing import Any

from hf_stepflow.prompts import encode_prompt

from .problems import Problem


def encode_response(tokenizer: Any, response: str) -> list[int]:
    """Token ids of a response, the end of the turn included."""
    return [*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id]


def encode_problem(tokenizer: Any, problem: Problem) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the one right response."""
    return encode_prompt(tokenizer, problem.question), encode_response(tokenizer, problem.response)
