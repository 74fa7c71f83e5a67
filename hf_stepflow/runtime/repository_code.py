"""The code that travels to repositories: files of this folder, byte for byte, with all that they import from it."""

import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

_HERE = Path(__file__).parent


def code_files(*entries: str) -> list[Path]:
    """Files of this folder, and those that they import relatively, directly or not, by name.

    Args:
        entries: names of modules.
    """
    files = [_HERE / f"{name}.py" for name in entries]
    needed = {Path(found) for file in files for found in get_relative_import_files(file)}
    return sorted({*files, *needed})


def copy_code(folder: Path, *entries: str) -> None:
    """Copies `code_files` into a folder."""
    for file in code_files(*entries):
        shutil.copyfile(file, folder / file.name)
