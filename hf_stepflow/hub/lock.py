"""Writes lock files: looks up the commits of a preset and of its base model."""

import json
import os
from importlib import metadata
from pathlib import Path

from hf_stepflow.presets.lock import Lock, code_sha256, data_sha256
from hf_stepflow.presets.preset import HUB_ID, load_preset
from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError

from .base import current_commit


def lock_preset(
    source: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    token: str | bool | None = None,
) -> Lock:
    """Pins a preset, the installed code and the base model, and writes the lock file.

    Args:
        source: The preset: its name, path or Hub id, as for `load_preset`.
        out: The file to write; an existing lock file is replaced.
        revision: Branch, tag or commit of a preset repository; None for its main branch.
        base_revision: Branch, tag or commit of the base model; None for the preset's own, or else the main branch.
        token: The token for the Hub, as in huggingface_hub.

    Returns:
        What was pinned.

    Raises:
        StepFlowFileError: The preset or a commit cannot be had, or the file cannot be written.
        StepFlowInputError: The preset names no base model on the Hub, or a revision is given for a local preset.
    """
    preset = load_preset(source, revision=revision, token=token)
    commit = None
    if preset.lock is not None:
        raise StepFlowInputError(f"{str(source)!r} is a lock file itself", hint=f"lock {preset.lock.source!r}")
    is_repository = not os.path.exists(source) and preset.path is not None and preset.path.name == "config.json"
    if is_repository:
        commit = _commit_of(str(source), revision, token)
        preset = load_preset(source, revision=commit, token=token)
    elif revision is not None:
        raise StepFlowInputError(
            f"the preset {str(source)!r} is no repository on the Hub, so it has no revision {revision!r}",
            hint="leave the revision out: the contents of the preset are pinned by their hash",
        )
    if preset.base_model is None or not HUB_ID.fullmatch(preset.base_model) or os.path.isdir(preset.base_model):
        raise StepFlowInputError(
            f"the preset {str(source)!r} names the base model {preset.base_model!r}, which is none on the Hub",
            hint="only a base model on the Hub has a commit to pin",
        )
    base_commit = _commit_of(preset.base_model, base_revision or preset.base_model_revision, token)
    name = str(Path(source).resolve()) if os.path.exists(source) else str(source)
    lock = Lock(
        name, commit, data_sha256(preset.to_dict()), metadata.version("hf-stepflow"), code_sha256(),
        preset.base_model, base_commit, Path(out),
    )  # fmt: skip
    try:
        Path(out).write_text(json.dumps(lock.to_dict(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StepFlowFileError(f"{str(out)!r} cannot be written: {error}", hint="choose another path") from error
    return lock


def _commit_of(repo_id: str, revision: str | None, token: str | bool | None) -> str:
    commit, problem = current_commit(repo_id, token, revision)
    if commit is None:
        raise StepFlowFileError(
            f"the commit of {repo_id!r} cannot be had: {problem}", hint="a lock needs the Hub while it is written"
        )
    return commit
