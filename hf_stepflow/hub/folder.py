"""A folder that is there as a whole or not at all, and the folders that an export may take the place of."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from hf_stepflow.runtime.configuration_stepflow import read_json
from hf_stepflow.runtime.errors import StepFlowFileError
from hf_stepflow.runtime.repository import PRESET_CODE

DATA = ("README.md", "config.json", "generation_config.json", "tokenizer_config.json")
CUSTOM_GENERATE = "custom_generate"


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, beside the target; after the block it is the target, unless the block raised.

    Args:
        target: not there yet, empty, or an earlier export without weights, which it replaces.

    Raises:
        StepFlowFileError: something else is there, or cannot be made there.
    """
    target = target.resolve()
    _check(target)
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


def _check(target: Path) -> None:
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
    """The files that an export would have written, as far as the folder holds one; releases differ in their code."""
    names: set[str] = set()
    if all((target / f"{name}.py").is_file() for name in PRESET_CODE):
        names |= {*DATA, *_code(target, PRESET_CODE)}
    elif (target / "config.json").is_file() and read_json(target)[1].get("model_type") == "stepflow":
        names |= set(DATA)  # its code is in another repository
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
    except (OSError, UnicodeDecodeError):  # imports a file that is not there: no export, which is whole
        return []
