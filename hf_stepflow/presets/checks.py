"""Checks a preset's data: every field, its type and bounds, and how the fields fit together.

`calibrations/schema.json` states the same rules. They are also written here, so that hostile files are refused where
the package jsonschema is not installed; where it is installed, `validate_preset` applies both.

A check is a function of a value and the name of its field that yields the problems it finds.
"""

import datetime
import difflib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from hf_stepflow.runtime.errors import StepFlowConfigError, shown
from hf_stepflow.runtime.settings import BASE, SEGMENTS, SETTING_NAMES, SETTINGS, FlowPlan, StepFlowSettings

from .architecture import Architecture
from .strict_json import calibrations_folder

# A preset has fields of its own for the base model.
BASE_SETTINGS = tuple(name for name, setting in SETTINGS.items() if setting.group == BASE)
PRESET_SETTINGS = tuple(name for name in SETTINGS if name not in BASE_SETTINGS)
SCHEMA_VERSION = 1
KINDS = ("paper", "rule", "measured")
NAME = r"[a-z0-9]+([._-][a-z0-9]+)*"
BASE_MODEL = r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*"
PAPER = "2604.06695"
# A "rule" or "paper" preset may set how thinking is found in its model, and nothing else.
_READING = tuple(name for name, setting in SETTINGS.items() if setting.group in (BASE, SEGMENTS))
_FLOOR = {"paper": "absolute", "rule": "share"}
_RESERVED_NAMES = ("auto", "preset", "rule", "schema")


@dataclass(frozen=True)
class Problem:
    """One error in a preset.

    Attributes:
        field: Where, as in `settings.tau_max`; empty for the whole.
        found: What is there.
        expected: What should be there.
        hint: The way out, or None.
    """

    field: str
    found: str
    expected: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.field} {self.found}, expected {self.expected}".strip()


Check = Callable[[Any, str], Iterator[Problem]]


def preset_problems(data: dict[str, Any], stem: str | None = None) -> list[Problem]:
    """Lists what is wrong with the data of a preset.

    Args:
        data: The data, from `read_json_object`.
        stem: The name of the file, which the preset must share; None if the file may have any name.
    """
    problems = list(_PRESET(data, ""))
    if not problems:
        settings = data["settings"] | {BASE_SETTINGS[0]: data["base_model"]}
        problems = [
            *_name_problems(data, stem),
            *fitting_problems(settings, data["architecture"], data["provenance"]),
        ]
    return problems


def identity_problems(name: str, base_model: str, revision: str | None) -> list[Problem]:
    """Checks a preset's name and base model before the rest is read.

    Args:
        name: The name of the preset.
        base_model: The Hub id of its model.
        revision: The model's revision, None for any.
    """
    data = {"name": name, "base_model": base_model, "base_model_revision": revision}
    return [*record(_IDENTITY, _REVISED)(data, ""), *_name_problems(data, None)]


def fitting_problems(
    settings: dict[str, Any], architecture: dict[str, Any], provenance: dict[str, Any]
) -> Iterator[Problem]:
    """Yields the problems between parts that are valid by themselves."""
    meant = Architecture.from_dict(architecture)
    try:
        checked = StepFlowSettings(**settings)
        # As on the model itself: bands and lists of layers against its layers, head tables against its heads.
        FlowPlan.resolve(checked, dict.fromkeys(meant.layers, architecture["num_attention_heads"]))
    except StepFlowConfigError as error:
        yield Problem("settings", f"do not fit: {error.message}", f"settings for {meant}", error.hint)
        return
    yield from _provenance_problems(provenance, checked)


def settings_problems(settings: Any, field: str) -> Iterator[Problem]:
    """Yields what is wrong with each of some settings of a preset."""
    yield from record({}, {name: _setting(name) for name in SETTING_NAMES})(settings, field)


def preset_block_problems(block: Any, field: str) -> Iterator[Problem]:
    """Yields what is wrong with the block `stepflow_preset` of a config.json, which holds all but the settings."""
    yield from record({"name": _NAME_CHECK, "architecture": _architecture, "provenance": _provenance}, _OPTIONAL)(
        block, field
    )


def schema_problems(data: dict[str, Any]) -> list[Problem]:
    """Lists the violations of the JSON schema; none if the package jsonschema is not installed."""
    if importlib.util.find_spec("jsonschema") is None:
        return []
    from jsonschema import Draft202012Validator

    schema = json.loads((calibrations_folder() / "schema.json").read_text(encoding="utf-8"))
    return [
        Problem(
            ".".join(map(str, error.absolute_path)),
            f"is {shown(error.instance)}",
            f"a value that the schema allows: {error.message[:200]}",
        )
        for error in Draft202012Validator(schema).iter_errors(data)
    ]


def wrong(value: Any, field: str, expected: str) -> Iterator[Problem]:
    """Yields the problem of a value that is not the expected one."""
    yield Problem(field, f"is {shown(value)}", expected)


def text(
    value: Any, field: str, longest: int = 2000, pattern: str | None = None, what: str = "text"
) -> Iterator[Problem]:
    """Checks for a text that is not blank and matches a pattern as a whole."""
    if not isinstance(value, str) or not value.strip() or len(value) > longest:
        yield from wrong(value, field, f"{what} of 1 to {longest} characters")
    elif pattern is not None and not re.fullmatch(pattern, value):
        yield from wrong(value, field, what)


def number(value: Any, field: str, low: float, high: float) -> Iterator[Problem]:
    """Checks for a number within bounds; the reader has refused numbers that are not finite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        yield from wrong(value, field, f"a number in [{low:g}, {high:g}]")


def count(value: Any, field: str, low: int = 0, high: int = 10**9) -> Iterator[Problem]:
    """Checks for a whole number within bounds; true and 1.0 are not whole numbers."""
    if type(value) is not int or not low <= value <= high:
        yield from wrong(value, field, f"a whole number in [{low}, {high}]")


def one_of(*choices: Any) -> Check:
    """Makes a check for one of these values, of the same type."""

    def check(value: Any, field: str) -> Iterator[Problem]:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            yield from wrong(value, field, " or ".join(map(json.dumps, choices)))

    return check


def or_null(inner: Check) -> Check:
    """Makes a check that accepts null and whatever another check accepts."""
    return lambda value, field: iter(()) if value is None else inner(value, field)


def list_of(inner: Check, longest: int, shortest: int = 0, each_once: bool = False) -> Check:
    """Makes a check for a list whose entries all pass a check."""

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
    """Makes a check for an object with these keys and no others."""
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
                yield Problem(f"{inside}{key}", "is missing", "a value")
        for key, item in value.items():
            if key in known:
                yield from known[key](item, inside + key)

    return check


def _architecture(value: Any, field: str) -> Iterator[Problem]:
    problems = list(_ARCHITECTURE(value, field))
    yield from problems
    if not problems:
        layers, limit = value.get("attention_layers", []), value["num_hidden_layers"]
        if layers != sorted(layers) or max(layers, default=0) >= limit:
            yield from wrong(layers, f"{field}.attention_layers", f"ascending layers below {limit}")


def _setting(name: str) -> Check:
    """Makes the check of one setting from the settings table."""

    def check(value: Any, field: str) -> Iterator[Problem]:
        problem = SETTINGS[name].problem(value)
        if problem is not None:
            place, part, expected = problem
            yield Problem(field + place, f"is {shown(part)}", expected)

    return check


def _settings(value: Any, field: str) -> Iterator[Problem]:
    checks = {name: _setting(name) for name in PRESET_SETTINGS}
    newer = {name: checks.pop(name) for name in PRESET_SETTINGS if SETTINGS[name].is_new}
    yield from record(checks, newer)(value, field)


def _provenance(value: Any, field: str) -> Iterator[Problem]:
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in KINDS:
        yield from wrong(kind if isinstance(value, dict) else value, f"{field}.kind", " or ".join(map(repr, KINDS)))
        return
    yield from _PROVENANCE[kind](value, field)


def _date(value: Any, field: str) -> Iterator[Problem]:
    try:
        is_date = isinstance(value, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value) is not None
        is_date = is_date and bool(datetime.date.fromisoformat(value))
    except ValueError:
        is_date = False
    if not is_date:
        yield from wrong(value, field, "a date such as 2026-03-01")


def _statement(value: Any, field: str) -> Iterator[Problem]:
    yield from text(value, field)
    if isinstance(value, str) and not re.search("[Nn][Oo][Tt] calibrated for this model", value):
        yield from wrong(value, field, 'a text that says "NOT calibrated for this model"')


_NAME_CHECK: Check = partial(text, longest=100, pattern=NAME, what="a name of a-z, 0-9 and single - . _ between them")
_BASE: Check = partial(
    text,
    longest=200,
    pattern=BASE_MODEL,
    what="a Hub id such as Qwen/Qwen3-8B",
)
_REVISION: Check = or_null(
    partial(text, longest=200, pattern=r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_./-]*", what="a revision")
)
_IDENTITY: dict[str, Check] = {"name": _NAME_CHECK, "base_model": _BASE}
_REVISED: dict[str, Check] = {"base_model_revision": _REVISION}
_OPTIONAL: dict[str, Check] = {"notes": text}
_ARCHITECTURE = record(
    {
        "model_type": partial(text, longest=100, pattern=r"[A-Za-z0-9_-]+", what="a model type of transformers"),
        "num_hidden_layers": partial(count, low=1, high=1000),
        "num_attention_heads": partial(count, low=1, high=10_000),
        "num_key_value_heads": partial(count, low=1, high=10_000),
    },
    {"attention_layers": list_of(partial(count, high=999), 1000, 1, each_once=True)},
)
_SHORT = partial(text, longest=200)
_DIFFERENCE = partial(number, low=-100, high=100)  # percentage points
_PROVENANCE = {
    "paper": record(
        {
            "kind": one_of("paper"),
            "arxiv": one_of(PAPER),
            "section": _SHORT,
            "statement": text,
            "figures": list_of(
                record(
                    {
                        "benchmark": _SHORT,
                        "base": partial(number, low=0, high=100),
                        "stepflow": partial(number, low=0, high=100),
                    }
                ),
                50,
            ),
        }
    ),
    "rule": record({"kind": one_of("rule"), "calibrated": one_of(False), "statement": _statement}),
    "measured": record(
        {
            "kind": one_of("measured"),
            "date": _date,
            "library_version": _SHORT,
            "dataset": _SHORT,
            "n": partial(count, low=1),
            "deltas": list_of(
                record(
                    {
                        "metric": _SHORT,
                        "delta": _DIFFERENCE,
                        "low": _DIFFERENCE,
                        "high": _DIFFERENCE,
                        "confidence": partial(number, low=0, high=1),
                    }
                ),
                50,
            ),
            "p_value": or_null(partial(number, low=0, high=1)),
            "command": partial(text, longest=1000),
            "verdict": one_of("gain", "gain, harm not excluded", "trade", "no measurable gain", "harm"),
        },
        {"seed": count, "machine": _SHORT},
    ),
}
_PRESET = record(
    {
        "schema_version": one_of(SCHEMA_VERSION),
        **_IDENTITY,
        "architecture": _architecture,
        "settings": _settings,
        "provenance": _provenance,
    },
    _REVISED | _OPTIONAL,
)


def _name_problems(data: dict[str, Any], stem: str | None) -> Iterator[Problem]:
    if data["name"] in _RESERVED_NAMES:
        yield from wrong(data["name"], "name", f"a name other than the reserved ones: {', '.join(_RESERVED_NAMES)}")
    if stem is not None and data["name"] != stem:
        yield from wrong(data["name"], "name", f"{stem!r}, the name of its file")


def _provenance_problems(provenance: dict[str, Any], settings: StepFlowSettings) -> Iterator[Problem]:
    """Yields where settings or figures contradict the claim that the kind of provenance makes."""
    kind = provenance["kind"]
    if kind == "measured":
        for place, delta in enumerate(provenance["deltas"]):
            if not delta["low"] <= delta["delta"] <= delta["high"]:
                yield from wrong(delta, f"provenance.deltas[{place}]", "low <= delta <= high")
        if not provenance["deltas"]:
            yield from _nothing_compared(provenance, settings)
        elif provenance["p_value"] is None:
            yield from wrong(None, "provenance.p_value", "a number, because there are deltas")
        gains = any(delta["low"] > 0 for delta in provenance["deltas"])
        if provenance["verdict"] in ("gain", "gain, harm not excluded") and not gains:
            yield from wrong(
                provenance["verdict"], "provenance.verdict", "a delta whose interval lies above 0, or another verdict"
            )
        return
    stated = StepFlowSettings(bridge_floor=_FLOOR[kind])
    for name in SETTING_NAMES:
        value, expected = getattr(settings, name), getattr(stated, name)
        if name not in _READING and value != expected:
            yield Problem(
                f"settings.{name}",
                f"is {shown(value)}",
                f"{expected!r} where provenance.kind is {kind!r}",
                hint='use the kind "measured" for settings that were chosen by measurement',
            )


def _nothing_compared(provenance: dict[str, Any], settings: StepFlowSettings) -> Iterator[Problem]:
    """Yields the claims that need a comparison: without one, settings may only leave the model unchanged."""
    on = [name for name in ("tau_max", "alpha", "length_temperature") if getattr(settings, name) != 0]
    if on:
        yield from wrong([], "provenance.deltas", f"at least one, because {on[0]} is not 0")
    if provenance["p_value"] is not None:
        yield from wrong(provenance["p_value"], "provenance.p_value", "null, because there are no deltas")
    if provenance["verdict"] != "no measurable gain":
        yield from wrong(
            provenance["verdict"], "provenance.verdict", "no measurable gain, because there are no deltas"
        )
