"""Settings for models: presets as data, where they come from, which model they fit, and how to find better ones."""

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
