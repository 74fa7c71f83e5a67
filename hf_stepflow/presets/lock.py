"""Lock files: a preset, the code that runs it and its base model, pinned by revisions and hashes.

A lock file is read wherever a preset is. What it pins is checked each time: the preset and the code when the file is
read, the base model by whoever loads it.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_stepflow.runtime.errors import StepFlowConfigError, shown

FORMAT = "hf-stepflow lock 1"
_FIELDS = {
    "format": ("format",),
    "preset": ("source", "revision", "sha256"),
    "code": ("version", "sha256"),
    "base": ("model", "revision"),
}
_SHA256, _COMMIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Lock:
    """The contents of a lock file.

    Attributes:
        source: The preset's name in this package, path, or Hub id.
        revision: The commit of its repository; None for a preset that is no repository on the Hub.
        preset_sha256: The hash of the preset's data.
        code_version: The version of hf-stepflow.
        code_sha256: The hash of the code that runs in a model.
        base_model: The Hub id of the base model.
        base_revision: The commit of the base model.
        path: The lock file, or None.
    """

    source: str
    revision: str | None
    preset_sha256: str
    code_version: str
    code_sha256: str
    base_model: str
    base_revision: str
    path: Path | None = None

    @classmethod
    def read(cls, data: dict[str, Any], path: Path) -> "Lock":
        """Reads the contents of a lock file.

        Raises:
            StepFlowConfigError: A field is missing, unknown or wrong; the message names it.
        """
        for name, inner in _FIELDS.items():
            given = data.get(name)
            fields = {name: given} if name == "format" else given
            if not isinstance(fields, dict) or set(fields) != set(inner):
                raise _wrong(path, f"{name} must hold {', '.join(inner)}, got {shown(given)}")
        unknown = sorted(set(data) - set(_FIELDS))
        if unknown:
            raise _wrong(path, f"unknown field {shown(unknown[0])}")
        preset, code, base = data["preset"], data["code"], data["base"]
        expected = {
            "preset.source": (preset["source"], lambda value: isinstance(value, str) and 0 < len(value) <= 500),
            "preset.revision": (preset["revision"], lambda value: value is None or _is(_COMMIT, value)),
            "preset.sha256": (preset["sha256"], lambda value: _is(_SHA256, value)),
            "code.version": (code["version"], lambda value: isinstance(value, str)),
            "code.sha256": (code["sha256"], lambda value: _is(_SHA256, value)),
            "base.model": (base["model"], lambda value: isinstance(value, str) and 0 < len(value) <= 500),
            "base.revision": (base["revision"], lambda value: _is(_COMMIT, value)),
        }
        for name, (value, is_right) in expected.items():
            if not is_right(value):
                raise _wrong(path, f"{name} is {shown(value)}, which no lock file has")
        return cls(
            preset["source"], preset["revision"], preset["sha256"], code["version"], code["sha256"],
            base["model"], base["revision"], path,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON-ready contents of a lock file."""
        return {
            "format": FORMAT,
            "preset": {"source": self.source, "revision": self.revision, "sha256": self.preset_sha256},
            "code": {"version": self.code_version, "sha256": self.code_sha256},
            "base": {"model": self.base_model, "revision": self.base_revision},
        }

    def check_code(self) -> None:
        """Refuses code other than the locked one.

        Raises:
            StepFlowConfigError: The installed hf-stepflow runs other code in a model.
        """
        if code_sha256() != self.code_sha256:
            raise StepFlowConfigError(
                f"{self} pins the code of hf-stepflow {self.code_version}, but this is another: version "
                f"{metadata.version('hf-stepflow')} with the hash {code_sha256()[:12]}..., expected "
                f"{self.code_sha256[:12]}...",
                hint=f"pip install hf-stepflow=={self.code_version}, or lock the preset anew",
            )

    def check_preset(self, data: dict[str, Any]) -> None:
        """Refuses a preset with other contents than the locked one.

        Args:
            data: The preset as data.

        Raises:
            StepFlowConfigError: It differs.
        """
        found = data_sha256(data)
        if found != self.preset_sha256:
            raise StepFlowConfigError(
                f"{self} pins the preset {self.source!r}, but its contents have changed: their hash is "
                f"{found[:12]}..., expected {self.preset_sha256[:12]}...",
                hint="compare it with what you locked by `hf-stepflow presets diff`, and lock it anew",
            )

    def check_base(self, model: str, commit: str | None) -> None:
        """Refuses a base model of another name or commit.

        Args:
            model: The name that the model was loaded by.
            commit: The commit that it was loaded at; None where that is not known, as for a folder.

        Raises:
            StepFlowConfigError: It is not the locked one.
        """
        if model.casefold() != self.base_model.casefold() or commit != self.base_revision:
            at = f"at commit {commit}" if commit else "at no known commit"
            raise StepFlowConfigError(
                f"{self} pins {self.base_model} at commit {self.base_revision}, but this is {model} {at}",
                hint=f"load {self.base_model!r} with revision={self.base_revision!r}",
            )

    def __str__(self) -> str:
        return "the lock" if self.path is None else f"the lock file {str(self.path)!r}"


def code_sha256() -> str:
    """The hash of the installed code that runs in a model: of the names and bytes of all its files."""
    from hf_stepflow.runtime.repository import PRESET_CODE, code_files

    digest = hashlib.sha256()
    for file in code_files(*PRESET_CODE):
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def data_sha256(data: dict[str, Any]) -> str:
    """The hash of JSON-ready data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _is(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _wrong(path: Path, problem: str) -> StepFlowConfigError:
    return StepFlowConfigError(f"{str(path)!r}: {problem}", hint="write it anew: `hf-stepflow presets lock`")
