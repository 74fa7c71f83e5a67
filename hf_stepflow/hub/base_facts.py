"""What a base model's repository says about it, as far as it can be reached: configs, and where its branch is."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, GenerationConfig


@dataclass(frozen=True)
class BaseFacts:
    """What is known of a base model.

    Attributes:
        config: its config, None where it cannot be had.
        generation_config: the generation config that it loads with, None likewise.
        problem: why not, or None.
    """

    config: Any = None
    generation_config: Any = None
    problem: str | None = None


def facts_of(base: str, revision: str | None = None, token: str | bool | None = None) -> BaseFacts:
    """Reads them, from the Hub, its cache or a folder; nothing of the base's is executed.

    Args:
        base: Hub id or folder.
        revision: of the base.
        token: for it, as in huggingface_hub.
    """
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, token=token, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:  # older releases stumble over JSON that is no object
        return BaseFacts(problem=(str(error) or type(error).__name__).strip().splitlines()[0])
    try:
        generation = GenerationConfig.from_pretrained(base, revision=revision or "main", token=token)
    except OSError:  # there is none: the model makes it from its config
        generation = GenerationConfig.from_model_config(config)
    return BaseFacts(config, generation)


def current_commit(base: str, token: str | bool | None = None) -> tuple[str | None, str | None]:
    """The commit that a base model's repository on the Hub is at, or None and why it cannot be had.

    Args:
        base: Hub id.
        token: for it, as in huggingface_hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of the transport too

    try:
        return HfApi(token=token).model_info(base).sha, None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        return None, (str(error) or type(error).__name__).strip().splitlines()[0]
