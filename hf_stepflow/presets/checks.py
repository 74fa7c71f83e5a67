"""What a preset's data must be like: every field, its type, its bounds, and how the fields fit together.

The same rules as in `calibrations/schema.json`, in code of our own, so that hostile files are refused where the
package jsonschema is not installed; where it is, `validate_preset` asks both.
"""

import datetime
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from hf_stepflow.runtime.configuration_stepflow import (
    BASE,
    SEGMENTS,
    SETTING_NAMES,
    SETTINGS,
    StepFlowSettings,
)
from hf_stepflow.runtime.errors import StepFlowConfigError, shown
from hf_stepflow.runtime.forward import FlowPlan

from .architecture import Architecture
from .fields import Check, Problem, count, list_of, number, one_of, or_null, record, text, wrong
from .settings import BASE_SETTINGS, PRESET_SETTINGS
from .strict_json import calibrations_folder

SCHEMA_VERSION = 1
KINDS = ("paper", "rule", "measured")
NAME = r"[a-z0-9]+([._-][a-z0-9]+)*"
BASE_MODEL = r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*"
PAPER = "2604.06695"
# What a "rule" or "paper" preset may choose for its model: how thinking is found, not what is done to it.
_READING = tuple(name for name, setting in SETTINGS.items() if setting.group in (BASE, SEGMENTS))
_FLOOR = {"paper": "absolute", "rule": "share"}
_RESERVED_NAMES = ("auto", "preset", "rule", "schema")


def preset_problems(data: dict[str, Any], stem: str | None = None) -> list[Problem]:
    """What is wrong with the data of a preset.

    Args:
        data: from `read_json_object`.
        stem: the name that its file has, which must be the preset's; None where a file may have any name.
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
    """What is wrong between parts that are right by themselves."""
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
    """What is wrong with some settings of a preset, each by itself."""
    yield from record({}, {name: _setting(name) for name in SETTING_NAMES})(settings, field)


def preset_block_problems(block: Any, field: str) -> Iterator[Problem]:
    """What is wrong with the `stepflow_preset` of a config.json: what a preset holds beside its settings."""
    yield from record({"name": _NAME_CHECK, "architecture": _architecture, "provenance": _provenance}, _OPTIONAL)(
        block, field
    )


def schema_problems(data: dict[str, Any]) -> list[Problem]:
    """What the JSON schema says against a preset; nothing where the package jsonschema is not installed."""
    if importlib.util.find_spec("jsonschema") is None:
        return []
    from jsonschema import Draft202012Validator

    schema = json.loads((calibrations_folder() / "schema.json").read_text(encoding="utf-8"))
    return [
        Problem(
            ".".join(map(str, error.absolute_path)),
            f"is {shown(error.instance)}",
            f"what the schema says: {error.message[:200]}",
        )
        for error in Draft202012Validator(schema).iter_errors(data)
    ]


def _architecture(value: Any, field: str) -> Iterator[Problem]:
    problems = list(_ARCHITECTURE(value, field))
    yield from problems
    if not problems:
        layers, limit = value.get("attention_layers", []), value["num_hidden_layers"]
        if layers != sorted(layers) or max(layers, default=0) >= limit:
            yield from wrong(layers, f"{field}.attention_layers", f"ascending layers below {limit}")


def _setting(name: str) -> Check:
    """The check of one setting, by the settings table."""

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
            "verdict": one_of("gain", "no measurable gain", "harm"),
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
        yield from wrong(data["name"], "name", f"none of the names that mean something else: {_RESERVED_NAMES}")
    if stem is not None and data["name"] != stem:
        yield from wrong(data["name"], "name", f"{stem!r}, as its file is called")


def _provenance_problems(provenance: dict[str, Any], settings: StepFlowSettings) -> Iterator[Problem]:
    """A kind of provenance is a claim; settings that are another's, or a verdict that its figures deny, break it."""
    kind = provenance["kind"]
    if kind == "measured":
        for place, delta in enumerate(provenance["deltas"]):
            if not delta["low"] <= delta["delta"] <= delta["high"]:
                yield from wrong(delta, f"provenance.deltas[{place}]", "low <= delta <= high")
        if not provenance["deltas"]:
            yield from _nothing_compared(provenance, settings)
        elif provenance["p_value"] is None:
            yield from wrong(None, "provenance.p_value", "a number, where there are deltas")
        gains = any(delta["low"] > 0 for delta in provenance["deltas"])
        if provenance["verdict"] == "gain" and not gains:
            yield from wrong("gain", "provenance.verdict", "a delta whose interval lies above 0, or another verdict")
        return
    stated = StepFlowSettings(bridge_floor=_FLOOR[kind])
    for name in SETTING_NAMES:
        value, expected = getattr(settings, name), getattr(stated, name)
        if name not in _READING and value != expected:
            yield Problem(
                f"settings.{name}",
                f"is {shown(value)}",
                f"{expected!r} where provenance.kind is {kind!r}",
                hint='settings that were chosen for a model by measurement are of the kind "measured"',
            )


def _nothing_compared(provenance: dict[str, Any], settings: StepFlowSettings) -> Iterator[Problem]:
    """Without a comparison nothing can be claimed of settings but that they leave the model as it is."""
    on = [name for name in ("tau_max", "alpha", "length_temperature") if getattr(settings, name) != 0]
    if on:
        yield from wrong([], "provenance.deltas", f"at least one, since {on[0]} is not 0")
    if provenance["p_value"] is not None:
        yield from wrong(provenance["p_value"], "provenance.p_value", "null, where there are no deltas")
    if provenance["verdict"] != "no measurable gain":
        yield from wrong(provenance["verdict"], "provenance.verdict", "no measurable gain, where there are no deltas")
