"""What a calibration may spend: a number of candidates, or a time that its stages share."""

import re
from dataclasses import dataclass

from hf_stepflow.runtime.errors import StepFlowInputError

# Candidates of the search where no budget is given, or only a time is: more than a short time allows.
CANDIDATES = 40
MANY_CANDIDATES = 1000

# Up to which share of the time each stage may run. What one leaves over, the next ones have.
ENDS = {
    "traces": 0.15,
    "bands": 0.2,
    "bridge heads": 0.26,
    "bridge heads together": 0.29,
    "temperature heads": 0.35,
    "temperature heads together": 0.38,
    "search": 0.54,
    "generation": 0.71,
    "verdict": 0.85,
    "ablations": 1.0,
}

_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """What may be spent.

    Attributes:
        candidates: settings that the search scores, at most.
        seconds: of all stages together, or None for no limit.
    """

    candidates: int = CANDIDATES
    seconds: float | None = None

    def end_of(self, stage: str) -> float | None:
        """Seconds from the start after which a stage begins nothing more; None for no limit.

        Args:
            stage: a key of `ENDS`.
        """
        return None if self.seconds is None else ENDS[stage] * self.seconds


def parse_budget(text: "str | int | Budget") -> Budget:
    """A budget from what a user writes: `40` candidates, or `90s`, `20m`, `1.5h`.

    Raises:
        StepFlowInputError: something else, or nothing at all to spend.
    """
    if isinstance(text, Budget):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(text).strip())
    number = float(match[1]) if match else 0.0
    if match is None or number <= 0 or (not match[2] and number != int(number)):
        raise StepFlowInputError(
            f"the budget must be a number of candidates or a time, got {text!r}", hint="write 40, 90s, 20m or 1.5h"
        )
    if not match[2]:
        return Budget(candidates=int(number))
    return Budget(MANY_CANDIDATES, number * _UNITS[match[2]])
