"""Checks of single fields of data from outside: types, bounds and shapes.

A check is a function of a value and the name of its field that yields the problems it finds.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hf_stepflow.runtime.errors import shown


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a preset.

    Attributes:
        field: where, as in `settings.tau_max`; empty for the whole.
        found: what is there.
        expected: what should be.
        hint: the way out, if there is more to say.
    """

    field: str
    found: str
    expected: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.field} {self.found}, expected {self.expected}".strip()


Check = Callable[[Any, str], Iterator[Problem]]


def wrong(value: Any, field: str, expected: str) -> Iterator[Problem]:
    """The problem of a value that is not what was expected."""
    yield Problem(field, f"is {shown(value)}", expected)


def text(
    value: Any, field: str, longest: int = 2000, pattern: str | None = None, what: str = "text"
) -> Iterator[Problem]:
    """A text that is not blank, and all of it matches a pattern."""
    if not isinstance(value, str) or not value.strip() or len(value) > longest:
        yield from wrong(value, field, f"{what} of 1 to {longest} characters")
    elif pattern is not None and not re.fullmatch(pattern, value):
        yield from wrong(value, field, what)


def number(value: Any, field: str, low: float, high: float) -> Iterator[Problem]:
    """A number within bounds; the reader has refused those that are not finite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        yield from wrong(value, field, f"a number in [{low:g}, {high:g}]")


def count(value: Any, field: str, low: int = 0, high: int = 10**9) -> Iterator[Problem]:
    """A whole number within bounds; true and 1.0 are none."""
    if type(value) is not int or not low <= value <= high:
        yield from wrong(value, field, f"a whole number in [{low}, {high}]")


def one_of(*choices: Any) -> Check:
    """One of these very values."""

    def check(value: Any, field: str) -> Iterator[Problem]:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            yield from wrong(value, field, " or ".join(map(json.dumps, choices)))

    return check


def or_null(inner: Check) -> Check:
    """Null, or what another check asks for."""
    return lambda value, field: iter(()) if value is None else inner(value, field)


def list_of(inner: Check, longest: int, shortest: int = 0, each_once: bool = False) -> Check:
    """A list whose entries all pass a check."""

    def check(value: Any, field: str) -> Iterator[Problem]:
        if not isinstance(value, list) or not shortest <= len(value) <= longest:
            yield from wrong(value, field, f"a list of {shortest} to {longest} entries")
            return
        problems = [problem for place, item in enumerate(value) for problem in inner(item, f"{field}[{place}]")]
        yield from problems
        if each_once and not problems and len(set(value)) < len(value):
            yield from wrong(value, field, "each entry once")

    return check


def record(required: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    """An object with these keys and no others."""
    known = required | (optional or {})

    def check(value: Any, field: str) -> Iterator[Problem]:
        if not isinstance(value, dict):
            yield from wrong(value, field, "an object")
            return
        inside = f"{field}." if field else ""
        for key in value:
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                expected = f"{close[0]!r}" if close else f"one of {', '.join(known)}"
                yield Problem(f"{inside}{key[:60]}", "is unknown", expected)
        for key in required:
            if key not in value:
                yield Problem(f"{inside}{key}", "is missing", "to be stated")
        for key, item in value.items():
            if key in known:
                yield from known[key](item, inside + key)

    return check
