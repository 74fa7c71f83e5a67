"""Counts of what StepFlow did in an engine: kept in a small file that its processes map."""

import atexit
import os
import tempfile
from pathlib import Path

import torch

NAMES = {
    "requests": "Requests with StepFlow.",
    "bridged_tokens": "Tokens to which the bridge applied, each counted once for all layers.",
    "injections": "Tokens that were injected, each counted once for all layers.",
}


class Counters:
    """The counts, int64, one row for the front end and one for each data-parallel rank.

    Args:
        path: The file, as `create` makes it.
        row: The row that this process adds to: 0 for the front end, 1 + its data-parallel rank for a worker.

    Example:
        >>> path = Counters.create(ranks=1)
        >>> Counters(path, row=1).add(bridged_tokens=7)
        >>> Counters(path).read()
        {'requests': 0, 'bridged_tokens': 7, 'injections': 0}
    """

    def __init__(self, path: str, row: int = 0):
        rows = Path(path).stat().st_size // (8 * len(NAMES))
        self._all = torch.from_file(path, shared=True, size=rows * len(NAMES), dtype=torch.int64).view(rows, -1)
        self._own = self._all[row]

    @staticmethod
    def create(ranks: int) -> str:
        """Makes the file for an engine of so many data-parallel ranks; it is deleted when this process ends."""
        handle, path = tempfile.mkstemp(prefix="stepflow-counters-")
        os.write(handle, bytes(8 * len(NAMES) * (1 + ranks)))
        os.close(handle)
        atexit.register(Path(path).unlink, missing_ok=True)
        return path

    def add(self, **counts: int) -> None:
        """Adds to some of the counts."""
        for place, name in enumerate(NAMES):
            if counts.get(name):
                self._own[place] += counts[name]

    def read(self) -> dict[str, int]:
        """The sums of all processes."""
        return dict(zip(NAMES, self._all.sum(0).tolist(), strict=True))
