"""Finds the tokens of a prompt that come from the problem's text: what attention steering emphasises."""

from typing import Any

from hf_stepflow.prompts import render_prompt
from hf_stepflow.runtime.errors import StepFlowInputError, StepFlowUnsupportedError, shown

# Stands in the place of the user's message, to find where the chat template puts it.
_PLACE = "the-user-s-message-stands-here"


def emphasised_tokens(tokenizer: Any, question: str, message: str, ids: list[int], **template: Any) -> list[int]:
    """The places of a question's tokens in its prompt.

    A token belongs to the question if at least one of its characters does. What the chat template writes around the
    user's message, a system message, and an instruction after the question are not emphasised.

    Args:
        tokenizer: The model's tokenizer.
        question: The text to look for, with which the message begins.
        message: The user's message.
        ids: The token ids of the prompt, as `encode_prompt` gives them for the message.
        **template: Further arguments of `encode_prompt`.

    Returns:
        Indices into `ids`, in order.

    Raises:
        StepFlowUnsupportedError: The tokenizer does not tell which characters a token stands for.
        StepFlowInputError: The question is not found in the prompt.
    """
    if not tokenizer.is_fast:
        raise StepFlowUnsupportedError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for, so attention cannot be "
            "steered towards the question",
            hint="load the model with a fast tokenizer",
        )
    text = render_prompt(tokenizer, message, **template)
    start, end = _find_question(tokenizer, text, question, template)
    encoded = tokenizer(text, add_special_tokens=tokenizer.chat_template is None, return_offsets_mapping=True)
    if list(encoded["input_ids"]) != list(ids):
        raise StepFlowInputError(
            f"the rendered prompt {shown(text)} does not encode to the {len(ids)} token ids of the prompt, so the "
            "tokens of the question are not known",
            hint="leave the arms that steer attention out",
        )
    offsets = encoded["offset_mapping"]
    return [place for place, (first, last) in enumerate(offsets) if max(first, start) < min(last, end)]


def _find_question(tokenizer: Any, text: str, question: str, template: dict[str, Any]) -> tuple[int, int]:
    """The characters of the question in the rendered prompt: the first, and the one after the last."""
    question = question.strip()  # as many templates do
    around = render_prompt(tokenizer, _PLACE, **template).split(_PLACE)
    if len(around) == 2 and text.startswith(around[0]) and text.endswith(around[1]):
        start = text.find(question, len(around[0]))
        if question and start >= 0 and start + len(question) <= len(text) - len(around[1]):
            return start, start + len(question)
    raise StepFlowInputError(
        f"the question {shown(question)} is not found as it is in the prompt that the chat template renders",
        hint="leave the arms that steer attention out, or pass another chat template",
    )
