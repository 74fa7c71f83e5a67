"""The repository for `generate(custom_generate=...)`: StepFlow for one call of any loaded model."""

from importlib import metadata
from pathlib import Path
from typing import Any

from hf_stepflow.runtime.repository import RepositoryFiles

from .cards import custom_generate_card
from .folder import CUSTOM_GENERATE


def write_custom_generate(folder: Path, repo_id: str | None = None) -> None:
    """Writes its files to a folder.

    Args:
        folder: an empty one.
        repo_id: of the repository, for its card.
    """
    code = folder / CUSTOM_GENERATE
    RepositoryFiles(("generate",)).save_pretrained(code)
    # One bound a line: that is how transformers reads it.
    lines = sorted(f"transformers{bound}\n" for bound in transformers_range())
    (code / "requirements.txt").write_text("".join(lines), encoding="utf-8")
    custom_generate_card(repo_id).save(folder / "README.md")


def transformers_range() -> Any:
    """Returns the versions of transformers that the installed hf-stepflow asks for, as a `SpecifierSet`."""
    from packaging.requirements import Requirement

    requirements = map(Requirement, metadata.requires("hf-stepflow") or [])
    return next(requirement.specifier for requirement in requirements if requirement.name == "transformers")
