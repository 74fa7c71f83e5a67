"""Prompts and responses as token ids."""

from typing import Any


def encode_prompt(tokenizer: Any, prompt: str, **template: Any) -> list[int]:
    """Token ids of a user's message: in the chat template if there is one, else the plain text.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the message.
        **template: further arguments of the chat template.
    """
    if tokenizer.chat_template is None:
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **template
    )
    return ids["input_ids"]


def encode_response(tokenizer: Any, response: str) -> list[int]:
    """Token ids of a response, the end of the turn included where the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*tokenizer.encode(response, add_special_tokens=False), *end]
