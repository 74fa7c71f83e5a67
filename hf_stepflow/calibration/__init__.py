"""Calibration: finds settings of StepFlow for a model and a task, and judges them on held-out problems."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .result import Calibration
    from .stages import calibrate

__all__ = ["Calibration", "calibrate"]


def __getattr__(name: str) -> Any:
    homes = {"calibrate": "stages", "Calibration": "result"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{homes[name]}", __name__), name)
