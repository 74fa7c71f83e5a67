"""Finds the presets for a base model: those of this package, and those that anyone has pushed to the Hub."""

from dataclasses import dataclass
from typing import Any

from hf_stepflow.presets.preset import Preset, list_presets, load_preset
from hf_stepflow.runtime.errors import StepFlowError, StepFlowFileError

from .base import first_line


@dataclass(frozen=True)
class FoundPreset:
    """A preset for a base model.

    Attributes:
        source: Its name in this package, or the id of its repository on the Hub.
        preset: The preset; None where the repository's config.json holds none that can be read.
        problem: The reason why it cannot be read, or None.
    """

    source: str
    preset: Preset | None
    problem: str | None = None

    @property
    def is_of_package(self) -> bool:
        """Whether the preset comes with this package."""
        return "/" not in self.source


def search_presets(
    base_model: str, *, online: bool = True, limit: int = 20, token: str | bool | None = None
) -> list[FoundPreset]:
    """Finds the presets for a base model.

    On the Hub a preset is found by the metadata of its card: the tag `stepflow` and the base model. Of each repository
    only config.json is fetched, and none of its code runs.

    Args:
        base_model: The Hub id of the base model, in any case for the presets of this package.
        online: Whether to ask the Hub too.
        limit: The greatest number of repositories to look at, those with the most downloads first.
        token: The token for the Hub, as in huggingface_hub.

    Raises:
        StepFlowFileError: The Hub cannot be reached.

    Example:
        >>> from hf_stepflow.hub.search import search_presets
        >>> [found.source for found in search_presets("Qwen/Qwen3-8B", online=False)]
        ['qwen3-8b']
    """
    found = [FoundPreset(preset.name, preset) for preset in list_presets(base_model=base_model)]
    return (
        found + [_look_at(repo_id, token) for repo_id in _repositories(base_model, limit, token)] if online else found
    )


def _repositories(base_model: str, limit: int, token: Any) -> list[str]:
    """Ids of the repositories whose cards name StepFlow and the base model."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of the transport too

    try:
        asked = HfApi(token=token).list_models(
            filter=["stepflow", f"base_model:{base_model}"], sort="downloads", limit=limit
        )
        return [info.id for info in asked]
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise StepFlowFileError(
            f"the Hub could not be asked for presets of {base_model!r}: {first_line(error)}",
            hint="--offline looks in this package alone",
        ) from error


def _look_at(repo_id: str, token: Any) -> FoundPreset:
    try:
        return FoundPreset(repo_id, load_preset(repo_id, token=token))
    except StepFlowError as error:  # one broken repository hides none of the others
        return FoundPreset(repo_id, None, error.message)
