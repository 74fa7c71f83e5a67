"""Checks of the paths that subcommands write to, before any work is done."""

from pathlib import Path

from hf_stepflow.runtime.errors import StepFlowInputError


def demand_folders(*paths: Path | None) -> None:
    """Refuses files in folders that do not exist.

    Args:
        *paths: files to be written; None for those that were not asked for.

    Raises:
        StepFlowInputError: there is no such folder.
    """
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise StepFlowInputError(
                f"there is no folder {str(path.parent)!r}", hint="make it, or choose another path"
            )
