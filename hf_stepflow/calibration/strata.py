"""Strata: problems grouped by their source and by terciles of length, in each of which settings must do no harm."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TERCILES = ("short", "medium", "long")

# The source of problems whose ids name none.
PROBLEMS = "problems"


def source_of(name: str) -> str:
    """Returns the source that an id names: the part before its first slash, without a level of difficulty.

    Levels of one family are one source, because errors that rise with length show across them.

    Args:
        name: The id of a problem, or the name of a source as `load_problems` takes it.

    Example:
        >>> from hf_stepflow.calibration.strata import source_of
        >>> [source_of(name) for name in ("chains-7/test/3", "stepflow-suite:legs@short", "12")]
        ['chains', 'stepflow-suite:legs', 'problems']
    """
    head, slash, _ = name.partition("/")
    if not slash and ":" not in head:
        return PROBLEMS
    return re.sub(r"(@.*|,.*|-\d+)$", "", head) or PROBLEMS


@dataclass(frozen=True)
class Strata:
    """The strata of a calibration, fixed on the calibration split.

    A length must not depend on how the problem was answered: that of the reference trace, or of the prompt.

    Attributes:
        sources: {id: source} of every problem, of either split.
        ends: {source: the largest lengths of its short and of its medium problems}; without the sources whose problems
            all have one length.
    """

    sources: dict[str, str]
    ends: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, problems: Iterable[str], lengths: Sequence[float], sources: Mapping[str, str]) -> "Strata":
        """Finds the terciles of each source.

        Args:
            problems: The ids of the calibration split.
            lengths: Their lengths, in tokens.
            sources: {id: source} of every problem, of either split.
        """
        own: dict[str, list[float]] = {}
        for name, length in zip(problems, lengths, strict=True):
            own.setdefault(sources[name], []).append(length)
        found = {}
        for source, values in own.items():
            if min(values) < max(values):
                low, high = np.quantile(values, [1 / 3, 2 / 3], method="lower")
                found[source] = (float(low), float(high))
        return cls(dict(sources), found)

    def name(self, problem: str, length: float) -> str:
        """Returns the stratum of a problem: its source, and where lengths differ its tercile."""
        source = self.sources[problem]
        if source not in self.ends:
            return source
        low, high = self.ends[source]
        return f"{source}, {TERCILES[int(length > low) + int(length > high)]}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the ends of the terciles, JSON-ready."""
        return {source: list(ends) for source, ends in self.ends.items()}
