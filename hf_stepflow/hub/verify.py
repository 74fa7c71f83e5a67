"""Checks the code of a repository against the releases of hf-stepflow, and records a release."""

import fnmatch
import hashlib
import json
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_stepflow.runtime.configuration_stepflow import read_object
from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError
from hf_stepflow.runtime.repository import PRESET_CODE, code_files

from .base import first_line

RELEASES = Path(__file__).with_name("code_hashes.json")
# The files of a repository that run, and those whose auto_map names what runs.
_CODE, _CONFIGS = "*.py", "*config.json"


@dataclass(frozen=True)
class CodeFile:
    """A Python file of a repository.

    Attributes:
        path: Its path in the repository.
        sha256: The hash of its bytes.
        versions: The versions of hf-stepflow that hold a file of this name with these bytes.
    """

    path: str
    sha256: str
    versions: tuple[str, ...]


@dataclass(frozen=True)
class Verification:
    """The code of a repository, and of the repositories that its auto_map names.

    Attributes:
        source: The folder or Hub id.
        revision: The revision that was looked at, None for a folder.
        files: Its Python files.
        named: The repositories that it takes code from.
    """

    source: str
    revision: str | None
    files: tuple[CodeFile, ...]
    named: "tuple[Verification, ...]" = ()

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions that hold every one of the files."""
        common = [set(file.versions) for file in self.files]
        return tuple(sorted(set.intersection(*common))) if common else ()

    @property
    def is_released(self) -> bool:
        """Whether all code, here and in the named repositories, is that of one version per repository."""
        return (not self.files or bool(self.versions)) and all(each.is_released for each in self.named)

    def __str__(self) -> str:
        revision = "" if self.revision is None else f" at {self.revision}"
        lines = [f"{self.source}{revision}: {len(self.files)} Python files"]
        width = max((len(file.path) for file in self.files), default=0)
        for file in self.files:
            found = f"hf-stepflow {', '.join(file.versions)}" if file.versions else "NOT a file of any release"
            lines.append(f"  {file.path:<{width}}  {found}")
        if self.files and not self.versions and all(file.versions for file in self.files):
            lines.append("  NOT the files of one release: no version holds all of them")
        return "\n".join([*lines, *map(str, self.named)])

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready data."""
        return {
            "source": self.source,
            "revision": self.revision,
            "released": self.is_released,
            "versions": list(self.versions),
            "files": {file.path: {"sha256": file.sha256, "versions": list(file.versions)} for file in self.files},
            "named": [each.to_dict() for each in self.named],
        }


def verify_code(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Verification:
    """Says of each Python file of a repository which versions of hf-stepflow hold it; runs none of them.

    Args:
        source: A folder or Hub id.
        revision: Branch, tag or commit of a repository on the Hub.
        token: The token for it, as in huggingface_hub.

    Returns:
        The files, with those of the repositories that an `auto_map` of its config files names.

    Raises:
        StepFlowFileError: The repository cannot be reached or read.

    Example:
        >>> from hf_stepflow.hub.verify import verify_code
        >>> verify_code("my-preset").is_released  # doctest: +SKIP
    """
    return _verify(os.fspath(source), revision, token, set())


def code_hashes() -> dict[str, dict[str, str]]:
    """The SHA-256 of every file that travels, by version and name.

    Returns:
        The recorded releases; and the installed package, where its version is not recorded yet.
    """
    releases, version = read_object(RELEASES, RELEASES.name), metadata.version("hf-stepflow")
    return releases if version in releases else releases | {f"{version} (installed here, not released)": _own_hashes()}


def record_release() -> str:
    """Adds the files of this version to the recorded releases, and returns the version.

    Raises:
        StepFlowInputError: Other files are recorded under this version already.
    """
    releases, version = read_object(RELEASES, RELEASES.name), metadata.version("hf-stepflow")
    if releases.get(version, _own_hashes()) != _own_hashes():
        raise StepFlowInputError(
            f"version {version} is released, with other files", hint="raise the version in pyproject.toml"
        )
    text = json.dumps(releases | {version: _own_hashes()}, indent=1, sort_keys=True) + "\n"
    RELEASES.write_text(text, encoding="utf-8")
    return version


def _own_hashes() -> dict[str, str]:
    return {file.name: _sha256(file) for file in code_files(*PRESET_CODE, "generate")}


def _verify(source: str, revision: str | None, token: Any, seen: set[str]) -> Verification:
    seen.add(source)
    folder = Path(source) if os.path.isdir(source) else _fetched(source, revision, token)
    hashes = code_hashes()
    files: list[CodeFile] = []
    named: dict[str, str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if fnmatch.fnmatch(path.name.lower(), _CODE) and path.is_file():
            found = _sha256(path)
            versions = tuple(version for version in hashes if hashes[version].get(path.name) == found)
            files.append(CodeFile(name, found, versions))
        elif fnmatch.fnmatch(path.name.lower(), _CONFIGS) and path.is_file():
            config = read_object(path, f"{name} of {source!r}")
            recorded = config.get("stepflow_code_revision")
            for repository in _named_repositories(config.get("auto_map")):
                named[repository] = recorded or named.get(repository)
    elsewhere = tuple(_verify(each, named[each], token, seen) for each in sorted(named) if each not in seen)
    commit = None if os.path.isdir(source) else folder.name
    return Verification(source, commit, tuple(files), elsewhere)


def _fetched(repo_id: str, revision: str | None, token: Any) -> Path:
    """The code and the configs of a repository, from the Hub or its cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=[_CODE, _CONFIGS]))
    except (OSError, ValueError) as error:
        raise StepFlowFileError(
            f"{repo_id!r} cannot be fetched: {first_line(error)}",
            hint="give a folder, or the id of a repository on the Hub",
        ) from error


def _named_repositories(auto_map: Any) -> list[str]:
    """The repositories before `--` in an auto_map, whose values are names or lists of names."""
    if isinstance(auto_map, dict):
        return [found for value in auto_map.values() for found in _named_repositories(value)]
    if isinstance(auto_map, list):
        return [found for value in auto_map for found in _named_repositories(value)]
    return [auto_map.split("--")[0]] if isinstance(auto_map, str) and "--" in auto_map else []


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    print(f"{RELEASES.name}: version {record_release()}")
