"""The work folder: every result is kept under a hash of its inputs, and the processes of a calibration meet there.

Any number of processes may write into one folder. Each result is a file of its own that appears whole or not at all,
and two processes that compute the same result write the same file.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from hf_stepflow.evaluation.store import another_run, changes_of_run, digest
from hf_stepflow.runtime.errors import StepFlowError, StepFlowFileError

FORMAT = "hf-stepflow-calibration/2"

# The file with what was found out before the run: problems, batch size. It may stand in an empty folder.
SETUP = "setup.json"

Item = TypeVar("Item")

# How long processes wait for the slowest one, which may be working on a long batch.
_PATIENCE = timedelta(hours=12)


class WorkFolder:
    """Results of a calibration by kind and content hash, on disk or, without a path, in memory.

    Args:
        path: The folder, which is created if necessary; or None.
        run: Everything that results depend on, JSON-ready; a folder holds one run.
        about: Versions and machine, which may differ between processes of one run.
        processes: The number of processes that share the work; the time of each counts by this fraction.

    Raises:
        StepFlowInputError: The folder holds another run; the message names the differences.
        StepFlowFileError: The folder cannot be used, or holds other files or a calibration of another format.
    """

    def __init__(self, path: str | Path | None, run: dict[str, Any], about: dict[str, Any], processes: int = 1):
        self.path = None if path is None else Path(path)
        self._context = digest(run)
        self._known: dict[str, Any] = {}
        self._processes = processes
        self._started = self._marked = time.monotonic()
        self._before = 0.0
        if self.path is None:
            return
        header = self.path / "run.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if header.exists():
                known = _read(header)
                if known.get("format") != FORMAT:
                    raise StepFlowFileError(
                        f"{str(self.path)!r} holds a calibration of the format {known.get('format')!r}, expected "
                        f"{FORMAT!r}: its gate and verdict knew no strata",
                        hint="choose another work folder, or finish it with the release that began it",
                    )
                changes = changes_of_run(known.get("run", {}), run)
                if changes:
                    raise another_run(self.path, changes)
            elif any(one.name != SETUP and not one.name.startswith(".") for one in self.path.iterdir()):
                raise StepFlowFileError(
                    f"{str(self.path)!r} holds other files and no run of a calibration",
                    hint="choose another work folder",
                )
            else:
                _write(header, {"format": FORMAT, "run": run, "about": about})
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise StepFlowFileError(f"the work folder {str(self.path)!r} cannot be used: {error}") from error
        self._before = sum(_read(file)["seconds"] for file in self.path.glob("*/*.json"))

    def get(self, kind: str, *parts: Any) -> Any:
        """Returns a result of one kind by everything it depends on apart from the run, or None if there is none."""
        name = self._name(kind, parts)
        if name not in self._known and self.path is not None and (self.path / name).exists():
            self._known[name] = _read(self.path / name)["found"]
        return self._known.get(name)

    def put(self, kind: str, found: Any, *parts: Any) -> None:
        """Keeps a result, JSON-ready and not None."""
        name, now = self._name(kind, parts), time.monotonic()
        spent, self._marked = (now - self._marked) / self._processes, now
        found = json.loads(json.dumps(found))
        if self.path is not None:
            (self.path / kind).mkdir(exist_ok=True)
            _write(self.path / name, {"seconds": round(spent, 3), "found": found})
        self._known[name] = found

    def spent(self) -> float:
        """Returns the seconds of work on this run, including those before it was interrupted."""
        return self._before + time.monotonic() - self._started

    def _name(self, kind: str, parts: tuple[Any, ...]) -> str:
        return f"{kind}/{digest([self._context, *parts])}.json"


@dataclass
class Workers:
    """This process among those that share a calibration: one, or those started by `accelerate launch`.

    Attributes:
        rank: The number of this process.
        count: The number of processes.
        group: The process group to wait for.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @classmethod
    def join(cls) -> "Workers":
        """Joins the processes that the environment describes (WORLD_SIZE ..., set by accelerate and torchrun)."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count < 2:
            return cls()
        from torch import distributed

        if distributed.is_initialized():
            group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        else:
            distributed.init_process_group("gloo", timeout=_PATIENCE)
            group = None
        return cls(distributed.get_rank(), count, group)

    @property
    def is_first(self) -> bool:
        """Whether this process decides for all."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Returns the part of the items that is this process's to do."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Waits until all processes have called this.

        Raises:
            StepFlowError: Another process has ended.
        """
        if self.count < 2:
            return
        from torch import distributed

        try:
            distributed.barrier(self.group)
        except RuntimeError as error:
            raise StepFlowError(
                f"another process of this calibration is gone: {(str(error) or 'no reason given').splitlines()[0]}",
                hint="start the same command again: it continues where it stopped",
            ) from error


def read_setup(folder: Path) -> dict[str, Any]:
    """Reads what an earlier start of the command found out before its run; empty if there was none.

    Raises:
        StepFlowFileError: The file cannot be read.
    """
    return _read(folder / SETUP) if (folder / SETUP).exists() else {}


def write_setup(folder: Path, setup: dict[str, Any]) -> None:
    """Keeps what was found out before the run, so that the same command continues the same run.

    Raises:
        StepFlowFileError: The folder cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / SETUP, setup)
    except OSError as error:
        raise StepFlowFileError(f"the work folder {str(folder)!r} cannot be used: {error}") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StepFlowFileError(
            f"{str(file)!r} cannot be read: {error}", hint="remove it and start the command again"
        ) from error
    if not isinstance(data, dict):
        raise StepFlowFileError(f"{str(file)!r} holds {type(data).__name__}, expected an object", hint="remove it")
    return data


def _write(file: Path, data: dict[str, Any]) -> None:
    """Writes a file that appears whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with open(partial, "w", encoding="utf-8") as opened:
        json.dump(data, opened, ensure_ascii=False)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(partial, file)
