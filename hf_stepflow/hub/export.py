"""Exports a preset as a repository: a folder that transformers loads with trust_remote_code=True."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from hf_stepflow.presets.preset import HUB_ID, RECORD, Preset, load_preset, record_beside
from hf_stepflow.presets.strict_json import read_json_object
from hf_stepflow.runtime.configuration_stepflow import read_json
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowFileError, StepFlowInputError
from hf_stepflow.runtime.repository import CUSTOM_GENERATE, PRESET_CODE, RepositoryFiles, write_custom_generate

from .base import check_base, current_commit, facts_of, fetch_base, write_merged
from .cards import Kind, code_card, custom_generate_card, preset_card

logger = logging.get_logger(__name__)

# The files of an export that are not code.
_DATA = ("README.md", "config.json", "generation_config.json", "tokenizer_config.json", RECORD)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Export:
    """A repository that was written to a folder.

    Attributes:
        folder: The folder.
        kind: "preset", "merged" (with weights), "custom_generate" or "code".
        preset: The preset, None for "custom_generate" and "code".
        files: The size of each file in bytes, by name.
        warnings: Warnings for the user.
    """

    folder: Path
    kind: str
    preset: Preset | None
    files: dict[str, int]
    warnings: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready data."""
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
    code_repo: str | None = None,
    repo_id: str | None = None,
    token: str | bool | None = None,
) -> Export:
    """Writes the repository of a preset; the record of its calibration comes along where it lies beside the preset.

    Args:
        preset: The preset, as for `load_preset`.
        folder: A new folder, an empty one, or an earlier export without weights, which is replaced.
        base: Hub id of another base model than the preset's, or its folder, for trials on this machine.
        base_revision: Revision of `base`; without `base`, of the preset's base model.
        merge_weights: Write the base's weights and tokenizer too, so that the folder loads on its own.
        code_repo: Repository on the Hub that holds the code, "org/name" or "org/name@revision"; the folder then
            holds none. None brings the code.
        repo_id: Id of the repository that the folder is meant for, for its card.
        token: Token for the base model and a preset on the Hub, as in huggingface_hub. It is never written.

    Raises:
        StepFlowFileError: There is no such preset; the folder holds something else; the weights, or a branch or tag
            of the code, cannot be had.
        StepFlowConfigError: The preset does not fit the base, or names none.
        StepFlowInputError: `code_repo` is no repository, or is combined with weights.
        StepFlowUnsupportedError: The weights need code of their own.

    Example:
        >>> from hf_stepflow.hub.export import export_preset
        >>> export = export_preset("qwen3-8b", "my-preset")  # doctest: +SKIP
    """
    preset = with_base(load_preset(preset, token=token), base, base_revision)
    assert preset.base_model is not None
    if code_repo is not None and merge_weights:
        raise StepFlowInputError("code_repo and merge_weights do not go together", hint="leave one of them out")
    code, code_revision, warnings = _code_at(code_repo, token)
    if is_local(preset.base_model):
        warnings.append(
            f"the base model {preset.base_model!r} is a folder of this machine: nobody else can load this export"
        )
    with _fresh_folder(Path(folder)) as new:
        if merge_weights:
            source = fetch_base(preset.base_model, preset.base_model_revision, token)
            check_base(source, preset.base_model)
            facts = facts_of(str(source))
            if facts.config is None:
                raise StepFlowConfigError(
                    f"the config of {preset.base_model!r} cannot be read: {facts.problem}",
                    hint="export without --merge-weights does without it",
                )
            write_merged(new, source, preset.base_model, preset.settings, facts.generation_config)
            warnings = []  # what is loaded is the folder itself
        else:
            facts = facts_of(preset.base_model, preset.base_model_revision, token)
            if facts.problem is not None:
                warnings.append(
                    f"the config of {preset.base_model!r} cannot be had here, so fields that tools read from it "
                    "(vocab_size, max_position_embeddings, ...) are left out, and whether the preset fits it is not "
                    f"checked: {facts.problem}"
                )
            block = preset.to_config().to_dict().get("stepflow_preset")
            files = RepositoryFiles.of_preset(
                preset.settings, block, facts.config, facts.generation_config, code, code_revision
            )
            files.save_pretrained(new)
        if facts.config is not None:
            preset.check_model(facts.config)
        if preset.kind == "measured" and preset.path is not None and record_beside(preset.path).is_file():
            record = read_json_object(record_beside(preset.path))
            (new / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        kind: Kind = "merged" if merge_weights else "preset"
        preset_card(preset, repo_id, kind=kind, code_repo=code, code_revision=code_revision).save(new / "README.md")
    for warning in warnings:
        logger.warning("%s", warning)
    return _written(Path(folder), kind, preset, warnings)


def export_custom_generate(folder: str | os.PathLike[str], *, repo_id: str | None = None) -> Export:
    """Writes the repository for `generate(custom_generate=...)`, separate from any model's.

    Args:
        folder: As for `export_preset`.
        repo_id: As for `export_preset`.

    Raises:
        StepFlowFileError: The folder holds something else.
    """
    with _fresh_folder(Path(folder)) as new:
        write_custom_generate(new)
        # One bound a line: that is how transformers reads it.
        lines = sorted(f"transformers{bound}\n" for bound in transformers_range())
        (new / CUSTOM_GENERATE / "requirements.txt").write_text("".join(lines), encoding="utf-8")
        custom_generate_card(repo_id).save(new / "README.md")
    return _written(Path(folder), CUSTOM_GENERATE, None, [])


def export_code(folder: str | os.PathLike[str], *, repo_id: str | None = None) -> Export:
    """Writes the repository with the code that presets without code name (`export_preset(code_repo=...)`).

    Args:
        folder: As for `export_preset`.
        repo_id: As for `export_preset`.

    Raises:
        StepFlowFileError: The folder holds something else.
    """
    with _fresh_folder(Path(folder)) as new:
        RepositoryFiles(PRESET_CODE).save_pretrained(new)
        code_card(repo_id).save(new / "README.md")
    return _written(Path(folder), "code", None, [])


def transformers_range() -> Any:
    """Returns the versions of transformers that the installed hf-stepflow asks for, as a `SpecifierSet`."""
    from packaging.requirements import Requirement

    requirements = map(Requirement, metadata.requires("hf-stepflow") or [])
    return next(requirement.specifier for requirement in requirements if requirement.name == "transformers")


def with_base(preset: Preset, base: str | os.PathLike[str] | None, revision: str | None) -> Preset:
    """Returns a preset for another base model, or for another revision of its own.

    The claims of a preset hold for its own base only: "paper" and "measured" do not carry over to another model on the
    Hub. A folder counts as a copy of the base.

    Raises:
        StepFlowConfigError: Neither the preset nor `base` names a base model.
        StepFlowInputError: `base` is neither a Hub id nor a folder; or a lock file pins another one.
    """
    lock = preset.lock
    if lock is not None and (base is not None or revision not in (None, lock.base_revision)):
        raise StepFlowInputError(
            f"{lock} pins {lock.base_model} at {lock.base_revision}, and another base was asked for",
            hint=f"leave the base out, or take the preset {lock.source!r} itself",
        )
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
    """Returns whether a base model is a folder, which transformers prefers to a Hub id, or cannot be a Hub id."""
    return os.path.isdir(base) or HUB_ID.fullmatch(base) is None or ".." in base


def _code_at(code_repo: str | None, token: Any) -> tuple[str | None, str | None, list[str]]:
    """Returns the repository of the code, the commit to record for it, and warnings."""
    if code_repo is None:
        return None, None, []
    repo_id, _, revision = code_repo.partition("@")
    if HUB_ID.fullmatch(repo_id) is None or "--" in repo_id or ".." in repo_id or code_repo.endswith("@"):
        raise StepFlowInputError(
            f"code_repo is {code_repo!r}, expected a repository on the Hub",
            hint='it looks like "org/name" or "org/name@revision"',
        )
    if _COMMIT.fullmatch(revision):
        return repo_id, revision, []
    commit, problem = current_commit(repo_id, token, revision or None)
    if commit is None and revision:
        raise StepFlowFileError(
            f"the code cannot be pinned to {revision!r} of {repo_id!r}: {problem}",
            hint="name a commit in full, which is recorded without asking the Hub",
        )
    warning = f"the commit of the code in {repo_id!r} is not recorded, since it cannot be had: {problem}"
    return repo_id, commit, [] if commit is not None else [warning]


def _written(folder: Path, kind: str, preset: Preset | None, warnings: list[str]) -> Export:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    return Export(folder, kind, preset, sizes, tuple(warnings))


@contextmanager
def _fresh_folder(target: Path) -> Iterator[Path]:
    """Yields a folder beside the target; after the block it takes the target's place, unless the block raised.

    The target may be missing, empty, or an earlier export without weights; anything else is refused.
    """
    target = target.resolve()
    _check_target(target)
    mark = secrets.token_hex(4)
    new, old = target.with_name(f".{target.name}.{mark}.new"), target.with_name(f".{target.name}.{mark}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
    except OSError as error:
        raise StepFlowFileError(
            f"{str(target)!r} cannot be made: {error.strerror}", hint="give a folder that you may write to"
        ) from error
    try:
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise StepFlowFileError(f"{str(target)!r} is a file, expected a folder", hint="give the name of a folder")
    known = _of_an_export(target)
    for file in target.rglob("*"):
        name = str(file.relative_to(target))
        if name not in known and (file.is_symlink() or not file.is_dir()):
            raise StepFlowFileError(
                f"the folder {str(target)!r} holds {name!r}, which no export of settings and code writes",
                hint="give a new folder, or remove that one first",
            )


def _of_an_export(target: Path) -> set[str]:
    """Lists the files of an earlier export in a folder, if there is one; releases differ in their code."""
    names: set[str] = set()
    if all((target / f"{name}.py").is_file() for name in PRESET_CODE):
        names |= {*_DATA, *_code(target, PRESET_CODE)}
    elif (target / "config.json").is_file() and read_json(target)[1].get("model_type") == "stepflow":
        names |= set(_DATA)  # its code is in another repository
    folder = target / CUSTOM_GENERATE
    if (folder / "generate.py").is_file() and (folder / "modeling_stepflow.py").is_file():
        names |= {
            "README.md",
            *(os.path.join(CUSTOM_GENERATE, name) for name in ("requirements.txt", *_code(folder, ("generate",)))),
        }
    return names


def _code(folder: Path, entries: tuple[str, ...]) -> set[str]:
    files = {f"{name}.py" for name in entries}
    for name in sorted(files):
        files |= {Path(file).name for file in _imported(folder / name) if Path(file).parent == folder}
    return files


def _imported(file: Path) -> list[str]:
    try:
        return get_relative_import_files(file)
    except (OSError, UnicodeDecodeError):  # it imports a missing file, so it is not an export, which is complete
        return []
