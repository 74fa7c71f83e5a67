"""Measurements of a benchmark: a file that grows as they finish, and the comparison of the times of several arms."""

import hashlib
import json
import os
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hf_stepflow
from hf_stepflow.evaluation.store import machine

Row = dict[str, Any]
_REPEATS = 2000


class Measurements:
    """The rows of a benchmark, written after each measurement, so that an interrupted run continues.

    A row holds a name (the object of the measurement), `settings` (its method), `measured_on`, and the result. The
    file keeps the newest of the rows with one name. Rows from another machine stay until they are measured again.

    Args:
        path: The JSON file, or None to write nothing.
        about: The machine and the versions.
        same: The keys of `about` that must agree for a row to count as measured.

    Attributes:
        rows: All rows, those of the file first.
    """

    def __init__(self, path: Path | None, about: dict[str, Any], same: Sequence[str]):
        self.path = path
        self.about = about
        self.same = same
        self.rows: list[Row] = json.loads(path.read_text())["results"] if path is not None and path.exists() else []

    def has(self, name: Row, settings: Row) -> bool:
        """Returns whether the file holds a measurement under the same conditions that was not skipped."""
        return any(
            _goes_by(row, name)
            and "skipped" not in row
            and row.get("settings") == settings
            and all(row["measured_on"].get(key) == self.about.get(key) for key in self.same)
            for row in self.rows
        )

    def add(self, name: Row, settings: Row, result: Row) -> Row:
        """Adds a measurement, prints it, and writes the file.

        Returns:
            The row.
        """
        row = name | result | {"settings": settings, "measured_on": self.about}
        places = [place for place, known in enumerate(self.rows) if _goes_by(known, name)]
        if places:
            self.rows[places[0]] = row
        else:
            self.rows.append(row)
        if self.path is not None:
            written = self.path.with_name(self.path.name + ".part")
            written.write_text(json.dumps({"results": self.rows}, indent=1) + "\n", encoding="utf-8")
            os.replace(written, self.path)
        print(json.dumps(name | result), flush=True)
        return row


def _goes_by(row: Row, name: Row) -> bool:
    return all(row.get(key) == value for key, value in name.items())


def about(device: torch.device) -> dict[str, Any]:
    """Returns the machine, the versions, and a hash of the measured code."""
    files = sorted((Path(hf_stepflow.__file__).parent / "runtime").glob("*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    return machine(device) | {"stepflow": hf_stepflow.__version__, "code": code}


def compare(seconds: dict[str, list[float]], base: str = "base") -> Row:
    """Compares every arm with one of the arms.

    Args:
        seconds: {arm: times}; the times at one index belong to the same work, done by one arm after another.
        base: The arm to compare with.

    Returns:
        `median_ms` {arm: milliseconds}; and for every other arm `ARM_to_BASE`, the median of the ratios of times, and
        `ARM_to_BASE_95`, its 95 % bootstrap interval.
    """
    result: Row = {"median_ms": {arm: round(1e3 * statistics.median(taken), 4) for arm, taken in seconds.items()}}
    for arm in seconds:
        if arm != base:
            ratios = [one / other for one, other in zip(seconds[arm], seconds[base], strict=True)]
            result[f"{arm}_to_{base}"] = round(statistics.median(ratios), 4)
            result[f"{arm}_to_{base}_95"] = interval(ratios)
    return result


def interval(values: list[float]) -> list[float]:
    """Returns the 95 % bootstrap interval of the median."""
    draws = sorted(statistics.median(random.choices(values, k=len(values))) for _ in range(_REPEATS))
    return [round(draws[int(_REPEATS * q)], 4) for q in (0.025, 0.975)]
