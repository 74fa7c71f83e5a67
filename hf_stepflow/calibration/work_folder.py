"""The work folder of a calibration: what was found is kept there, each part under a hash of what it depends on.

Any number of processes may write into one folder: each part is a file of its own that appears whole or not at all, and
two processes that find the same part write the same file.
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

FORMAT = "hf-stepflow-calibration/1"


class WorkFolder:
    """Parts of a calibration by kind and content hash, on disk or, without a path, in memory.

    Args:
        path: the folder, made where there is none; or None.
        run: all that the results depend on, JSON-ready: a folder serves one run.
        about: what is worth knowing but may differ: versions, machine.
        processes: how many share the work: the time that each spends counts as that part of it.

    Raises:
        StepFlowInputError: the folder holds another run; what differs is named.
        StepFlowFileError: a folder that cannot be used, or that holds something else.
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
            if not header.exists() and any(not one.name.startswith(".") for one in self.path.iterdir()):
                raise StepFlowFileError(
                    f"{str(self.path)!r} holds other files and no run of a calibration",
                    hint="choose another work folder",
                )
            if header.exists():
                changes = changes_of_run(_read(header).get("run", {}), run)
                if changes:
                    raise another_run(self.path, changes)
            else:
                _write(header, {"format": FORMAT, "run": run, "about": about})
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise StepFlowFileError(f"the work folder {str(self.path)!r} cannot be used: {error}") from error
        self._before = sum(_read(file)["seconds"] for file in self.path.glob("*/*.json"))

    def get(self, kind: str, *parts: Any) -> Any:
        """What was found, or None.

        Args:
            kind: what it is: a folder's name.
            *parts: what it depends on beside the run, JSON-ready.
        """
        name = self._name(kind, parts)
        if name not in self._known and self.path is not None and (self.path / name).exists():
            self._known[name] = _read(self.path / name)["found"]
        return self._known.get(name)

    def put(self, kind: str, found: Any, *parts: Any) -> Any:
        """Keeps what was found (JSON-ready, not None) and returns it as it will be read."""
        name, now = self._name(kind, parts), time.monotonic()
        spent, self._marked = (now - self._marked) / self._processes, now
        found = json.loads(json.dumps(found))
        if self.path is not None:
            (self.path / kind).mkdir(exist_ok=True)
            _write(self.path / name, {"seconds": round(spent, 3), "found": found})
        self._known[name] = found
        return found

    def spent(self) -> float:
        """Seconds of work on this run, those before it was stopped included."""
        return self._before + time.monotonic() - self._started

    def _name(self, kind: str, parts: tuple[Any, ...]) -> str:
        return f"{kind}/{digest([self._context, *parts])}.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StepFlowFileError(f"{str(file)!r} cannot be read: {error}", hint="remove it, and go on") from error
    if not isinstance(data, dict):
        raise StepFlowFileError(f"{str(file)!r} holds {type(data).__name__}, expected an object", hint="remove it")
    return data


def _write(file: Path, data: dict[str, Any]) -> None:
    """Writes a file that is there whole or not at all, whatever happens."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with open(partial, "w", encoding="utf-8") as opened:
        json.dump(data, opened, ensure_ascii=False)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(partial, file)


Item = TypeVar("Item")

# How long processes wait for the slowest of them, which may be working on a long batch.
_PATIENCE = timedelta(hours=12)


@dataclass
class Workers:
    """This process among those that share the work. They meet in the work folder, on one file system.

    Attributes:
        rank: its number.
        count: how many there are.
        group: what they wait for one another by.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @classmethod
    def join(cls) -> "Workers":
        """The workers that the environment tells of (RANK, WORLD_SIZE ..., as accelerate and torchrun set them)."""
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
        """Whether this process decides, and speaks for all."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Returns once all have come here.

        Raises:
            StepFlowError: one of them is gone.
        """
        if self.count < 2:
            return
        from torch import distributed

        try:
            distributed.barrier(self.group)
        except RuntimeError as error:
            raise StepFlowError(
                f"another process of this calibration is gone: {(str(error) or 'no reason given').splitlines()[0]}",
                hint="start the same command again: it goes on where it was",
            ) from error
