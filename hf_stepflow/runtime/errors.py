"""The errors that StepFlow raises: each is a `StepFlowError` and the built-in kind that callers expect."""

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 3, 20, 20, 120, 120


def shown(value: Any) -> str:
    """A value for a message, cut where it is long or deep: it may come from a file that nobody vouches for."""
    return _SHORT.repr(value)


class StepFlowError(Exception):
    """Base of all errors that StepFlow raises.

    Args:
        message: What was given and what was expected.
        hint: The way out, shown on its own line.

    Attributes:
        message: As given.
        hint: As given.

    Example:
        >>> print(StepFlowError("tau_max must be a number in [0, 1], got 2", hint="try 0.15"))
        tau_max must be a number in [0, 1], got 2
        Hint: try 0.15
    """

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nHint: {self.hint}"


class StepFlowConfigError(StepFlowError, ValueError):
    """A setting of `StepFlowConfig` is wrong in itself or does not fit the model."""


class StepFlowInputError(StepFlowError, ValueError):
    """An argument of a call is wrong: its value, its shape or what it is combined with."""


class StepFlowUnsupportedError(StepFlowError, NotImplementedError):
    """The request cannot be honoured by this model, this transformers release or this way of generating."""


class StepFlowFileError(StepFlowError, OSError):
    """A file or repository is missing, unreadable or not what it should be."""
