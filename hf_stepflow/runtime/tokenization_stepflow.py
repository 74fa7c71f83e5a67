"""The tokenizer of a preset repository, which holds no tokenizer files: the one of its base model."""

from typing import Any

from transformers import AutoTokenizer
from transformers.utils import logging

from .configuration_stepflow import (
    StepFlowConfig,
    adapter_base,
    base_of,
    fetching,
    meant_for_base,
    read_repository_file,
    trust_for,
)
from .errors import StepFlowConfigError, StepFlowError
from .settings import StepFlowSettings

logger = logging.get_logger(__name__)


class StepFlowTokenizer:
    """Redirects `AutoTokenizer.from_pretrained` from a preset repository to the tokenizer of the base model.

    The class has no instances: it loads an ordinary tokenizer, which saves itself as one.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads the tokenizer of the preset's base model.

        Args:
            pretrained_model_name_or_path: Folder or Hub id of the preset.
            *args: Passed on.
            **kwargs: Passed on, except those that locate files in the preset's repository.

        Raises:
            StepFlowConfigError: The preset names no base model, or its tokenizer cannot be loaded.
        """
        data = read_repository_file(pretrained_model_name_or_path, "config.json", kwargs)
        base, revision = base_of(StepFlowConfig.from_dict(data), pretrained_model_name_or_path)
        return load_base_tokenizer(base, revision, *args, **meant_for_base(kwargs))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Does nothing: the base's tokenizer saves itself."""


def load_base_tokenizer(path: Any, revision: str | None, *args: Any, **kwargs: Any) -> Any:
    """Loads the tokenizer of a model.

    Args:
        path: Folder or Hub id of the model; an adapter without a tokenizer has that of its model.
        revision: Revision of the model.
        *args: Passed on to `AutoTokenizer.from_pretrained`.
        **kwargs: Passed on, but code of the model's own runs only where transformers has none for it.

    Raises:
        StepFlowConfigError: The tokenizer cannot be loaded.
    """
    where = fetching(kwargs) | {"revision": revision}
    try:
        if not read_repository_file(path, "tokenizer_config.json", where):
            adapted = adapter_base(path, where)
            if adapted is not None:
                return load_base_tokenizer(adapted, None, *args, **kwargs)
        kwargs["trust_remote_code"] = trust_for(path, kwargs.get("trust_remote_code"), where)
        return AutoTokenizer.from_pretrained(path, *args, revision=revision, **kwargs)
    except StepFlowError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise StepFlowConfigError(
            f"StepFlow finds steps by the model's tokenizer, and none could be loaded from {str(path)!r}: {error}",
            hint="where the model is private or gated, pass token=...; to put StepFlow on it, pass tokenizer=...",
        ) from error


def tokenizer_of(model: Any, settings: StepFlowSettings) -> Any:
    """Loads the tokenizer of the base that the settings name, or of the model's own path.

    Raises:
        StepFlowConfigError: Neither is named, or the tokenizer cannot be loaded.
    """
    path = settings.base_model_name_or_path or getattr(model.config, "_name_or_path", "")
    if not path:
        raise StepFlowConfigError(
            "StepFlow needs the model's tokenizer to find steps, and the model names no path to load it from",
            hint="pass tokenizer=...",
        )
    return load_base_tokenizer(path, settings.base_model_revision)


def end_of_turn_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that close a turn: the eos ids of generation config, config and tokenizer."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found |= set(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return sorted(found)


def warn_if_never_thinking(tokenizer: Any, settings: StepFlowSettings) -> None:
    """Warns where the default marker is used with a tokenizer that does not have it."""
    if settings.thinking_start != "<think>" or settings.implicit_thinking:
        return
    if settings.thinking_start not in tokenizer.get_vocab():
        logger.warning(
            "The tokenizer has no token %r; StepFlow will look for it in the text. If this model does not mark its "
            "thinking, set implicit_thinking=True, or StepFlow has nothing to do.",
            settings.thinking_start,
        )
