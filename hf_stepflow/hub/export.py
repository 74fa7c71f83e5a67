"""Exporting a preset as a repository: a folder that transformers loads with trust_remote_code=True."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_stepflow.presets.preset import HUB_ID, Preset, load_preset
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowInputError
from hf_stepflow.runtime.repository import RepositoryFiles

from .base_facts import BaseFacts, facts_of
from .cards import preset_card
from .custom_generate import write_custom_generate
from .folder import fresh_folder
from .merged import check_base, fetch_base, write_merged

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where.
        kind: "preset", "merged" (with weights) or "custom_generate".
        preset: what was exported, None for "custom_generate".
        files: bytes by name.
        warnings: what a user has to know.
    """

    folder: Path
    kind: str
    preset: Preset | None
    files: dict[str, int]
    warnings: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        preset = self.preset
        return {
            "folder": str(self.folder),
            "kind": self.kind,
            "preset": None if preset is None else preset.name,
            "base_model": None if preset is None else preset.base_model,
            "base_model_revision": None if preset is None else preset.base_model_revision,
            "bytes": self.size,
            "files": self.files,
            "warnings": list(self.warnings),
        }


def export_preset(
    preset: "str | Path | Preset",
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    merge_weights: bool = False,
    repo_id: str | None = None,
    token: str | bool | None = None,
) -> Export:
    """Writes the repository of a preset.

    Args:
        preset: as for `load_preset`.
        folder: where to; a new folder, an empty one, or an earlier export without weights, which is replaced.
        base: Hub id of another base model than the preset's, or its folder, for trials on this machine.
        base_revision: revision of `base`; without `base`, of the preset's base model.
        merge_weights: write the base's weights and tokenizer too, so that the folder loads on its own.
        repo_id: of the repository that the folder is meant for; its card says it.
        token: for the base model and a preset on the Hub, as in huggingface_hub. It is never written.

    Raises:
        StepFlowFileError: no such preset; a folder with something else in it; weights that cannot be had.
        StepFlowConfigError: a base that the preset does not fit, or none.
        StepFlowUnsupportedError: weights that need code of their own.
    """
    preset = with_base(load_preset(preset, token=token), base, base_revision)
    assert preset.base_model is not None
    warnings = []
    if is_local(preset.base_model):
        warnings.append(
            f"the base model {preset.base_model!r} is a folder of this machine: nobody else can load this export"
        )
    with fresh_folder(Path(folder)) as new:
        if merge_weights:
            source = fetch_base(preset.base_model, preset.base_model_revision, token)
            check_base(source, preset.base_model)
            facts = _known(facts_of(str(source)), preset)
            write_merged(new, source, preset.base_model, preset.settings, facts.generation_config)
            warnings = []  # what is loaded is the folder itself
        else:
            facts = facts_of(preset.base_model, preset.base_model_revision, token)
            warnings += _left_out(facts, preset)
            block = preset.to_config().to_dict().get("stepflow_preset")
            files = RepositoryFiles.of_preset(preset.settings, block, facts.config, facts.generation_config)
            files.save_pretrained(new)
        if facts.config is not None:
            preset.check_model(facts.config)
        preset_card(preset, repo_id, kind="merged" if merge_weights else "preset").save(new / "README.md")
    for warning in warnings:
        logger.warning("%s", warning)
    return _told(Path(folder), "merged" if merge_weights else "preset", preset, warnings)


def export_custom_generate(folder: str | os.PathLike[str], *, repo_id: str | None = None) -> Export:
    """Writes the repository for `generate(custom_generate=...)`, which is one of its own, beside any model's.

    Args:
        folder: as for `export_preset`.
        repo_id: of the repository that the folder is meant for; its card says it.

    Raises:
        StepFlowFileError: a folder with something else in it.
    """
    with fresh_folder(Path(folder)) as new:
        write_custom_generate(new, repo_id)
    return _told(Path(folder), "custom_generate", None, [])


def with_base(preset: Preset, base: str | os.PathLike[str] | None, revision: str | None) -> Preset:
    """A preset for another base model, or another revision of its own.

    What a preset claims holds for the base that it was made for: "paper" and "measured" are not carried over to
    another model on the Hub. A folder is taken for a copy of the base.

    Raises:
        StepFlowConfigError: there is no base at all.
        StepFlowInputError: `base` is neither a Hub id nor a folder.
    """
    if base is None:
        if preset.base_model is None:
            raise StepFlowConfigError(f"the preset {preset.name!r} names no base model", hint="give one with --base")
        name, revision = preset.base_model, revision or preset.base_model_revision
    else:
        name = os.fspath(base)
        if is_local(name) and not os.path.isdir(name):
            raise StepFlowInputError(
                f"the base model {name!r} is neither a Hub id nor a folder",
                hint="an id looks like Qwen/Qwen3-8B",
            )
    settings = preset.settings.replace(base_model_name_or_path=name, base_model_revision=revision)
    is_another = base is not None and not is_local(name) and name.casefold() != (preset.base_model or "").casefold()
    if is_another and preset.kind in ("paper", "measured"):
        notes = f"Settings of the preset {preset.name}, which is for {preset.base_model}."
        preset = replace(preset, provenance={"kind": "unstated"}, notes=notes)
    return replace(preset, base_model=name, base_model_revision=revision, settings=settings)


def is_local(base: str) -> bool:
    """Whether a base model is a folder, which transformers prefers to a Hub id, or cannot be a Hub id."""
    return os.path.isdir(base) or HUB_ID.fullmatch(base) is None or ".." in base


def _known(facts: BaseFacts, preset: Preset) -> BaseFacts:
    if facts.config is None:
        raise StepFlowConfigError(
            f"the config of {preset.base_model!r} cannot be read: {facts.problem}",
            hint="export without --merge-weights does without it",
        )
    return facts


def _left_out(facts: BaseFacts, preset: Preset) -> list[str]:
    if facts.problem is None:
        return []
    return [
        f"the config of {preset.base_model!r} cannot be had here, so fields that tools read from it (vocab_size, "
        f"max_position_embeddings, ...) are left out, and whether the preset fits it is not checked: {facts.problem}"
    ]


def _told(folder: Path, kind: str, preset: Preset | None, warnings: list[str]) -> Export:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    return Export(folder, kind, preset, sizes, tuple(warnings))
