"""Encodes prompts and responses as token ids."""

from typing import Any

from hf_stepflow.runtime.errors import StepFlowInputError


def encode_prompt(tokenizer: Any, prompt: str, *, system: str | None = None, **template: Any) -> list[int]:
    """Encodes a user's message, in the chat template if the tokenizer has one.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The message.
        system: A system message before it.
        **template: Further arguments of the chat template.

    Raises:
        StepFlowInputError: There is a system message, but no chat template that could place it.
    """
    if tokenizer.chat_template is None:
        return tokenizer.encode(render_prompt(tokenizer, prompt, system=system))
    ids = tokenizer.apply_chat_template(
        _messages(prompt, system), add_generation_prompt=True, tokenize=True, return_dict=True, **template
    )
    return ids["input_ids"]


def render_prompt(tokenizer: Any, prompt: str, *, system: str | None = None, **template: Any) -> str:
    """The text that `encode_prompt` encodes; takes the same arguments and raises the same errors."""
    if tokenizer.chat_template is None:
        if system is not None:
            raise StepFlowInputError(
                "a system message needs a chat template, and the tokenizer has none",
                hint="put its text into the prompt",
            )
        return prompt
    return tokenizer.apply_chat_template(
        _messages(prompt, system), add_generation_prompt=True, tokenize=False, **template
    )


def _messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def encode_response(tokenizer: Any, response: str) -> list[int]:
    """Encodes a response, followed by the end of the turn if the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*tokenizer.encode(response, add_special_tokens=False), *end]
