"""Reads preset files from untrusted sources: limits first, then strict JSON; nothing is ever executed."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from hf_stepflow.runtime.errors import StepFlowFileError, shown

MAX_BYTES = 64 * 1024
MAX_DEPTH = 10

# Control characters (terminals obey them), marks that change the direction of text (which then reads differently from
# what is stored) and lone surrogates (no encoding can write them). Markers may hold line breaks.
_BAD_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_HINT = "docs/presets.md shows an example of a preset file"


def calibrations_folder() -> Path:
    """Returns the folder of the presets that come with the package.

    A wheel holds it inside the package, a checkout of the repository beside it.

    Raises:
        StepFlowFileError: Neither folder exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "calibrations", package.parent / "calibrations"):
        if (folder / "schema.json").is_file():
            return folder
    raise StepFlowFileError(
        f"the presets of hf-stepflow are missing: no calibrations folder beside or inside {str(package)!r}",
        hint="reinstall the package",
    )


def read_json_object(file: Path) -> dict[str, Any]:
    """Reads the object in a small JSON file.

    Args:
        file: The file. A link is followed only within its folder.

    Raises:
        StepFlowFileError: The file does not exist, is too large, links out of its folder, or is not strict JSON, which
            has no NaN, Infinity, numbers too large for a float, repeated keys, deep nesting or control characters.
    """
    name = str(file)
    if not os.path.isfile(file):  # unlike Path's own, it takes a name that no file can have
        raise StepFlowFileError(
            f"there is no file {shown(name)}", hint="`hf-stepflow presets list` shows the known names"
        )
    check_link(file)
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise StepFlowFileError(f"{name!r} cannot be read: {error}", hint="check its permissions") from error
    if len(content) > MAX_BYTES:
        _refuse(name, f"is {file.stat().st_size} bytes long, expected at most {MAX_BYTES}")
    try:
        data = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object_without_twins,
            parse_constant=_no_constant,
            parse_float=_finite_float,
        )
    except RecursionError:
        _refuse(name, f"is nested too deeply, expected at most {MAX_DEPTH} levels")
    except ValueError as error:  # broken JSON, broken UTF-8, an integer of thousands of digits, and our own hooks
        _refuse(name, f"is not strict JSON: {error}")
    if not isinstance(data, dict):
        _refuse(name, f"holds {type(data).__name__}, expected an object")
    _check_contents(name, data, 1)
    return data


def _refuse(name: str, problem: str) -> NoReturn:
    raise StepFlowFileError(f"{name!r} {problem}", hint=_HINT)


def check_link(file: Path) -> None:
    """Refuses a link that leads out of its folder: a downloaded folder could otherwise expose any file here.

    Raises:
        StepFlowFileError: The link leads out of its folder.
    """
    if not file.is_symlink():
        return
    target, folder = file.resolve(), file.parent.resolve()
    roots = {folder}
    if folder.parent.name == "snapshots":
        # In a Hub cache, snapshots/REVISION/FILE links to a blob of the same repository. Blobs from Xet storage link
        # on to blobs that all repositories of the cache share.
        repository = folder.parent.parent
        roots = {repository, repository.parent / "blobs"}
    if roots.isdisjoint(target.parents):
        raise StepFlowFileError(
            f"{str(file)!r} is a link out of its folder, to {str(target)!r}", hint="give the path of the file itself"
        )


def _check_contents(name: str, value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        _refuse(name, f"is nested too deeply, expected at most {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_contents(name, key, depth)
            _check_contents(name, item, depth + 1 if isinstance(item, dict | list) else depth)
    elif isinstance(value, list):
        for item in value:
            _check_contents(name, item, depth + 1 if isinstance(item, dict | list) else depth)
    elif isinstance(value, str) and _BAD_CHARACTERS.search(value):
        _refuse(name, f"holds a control character or a lone surrogate in {value[:60]!r}, expected plain text")


def _object_without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        twins = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"the key {twins[0]!r} is given twice in one object")
    return data


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:30]} is too large for a float")
    return number
