"""Calibration: finds settings of StepFlow for a model and a task, and judges them on held-out problems."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .result import Calibration
    from .stages import calibrate

__all__ = ["Calibration", "calibrate"]


def __getattr__(name: str) -> Any:
    if name == "calibrate":
        from .stages import calibrate

        return calibrate
    if name == "Calibration":
        from .result import Calibration

        return Calibration
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
