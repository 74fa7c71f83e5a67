"""A preset's file is data that nobody vouches for: whatever is in it, it is right or refused with an error of ours."""

import copy
import importlib.util
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_stepflow import load_preset
from hf_stepflow.presets import checks
from hf_stepflow.presets import preset as preset_module
from hf_stepflow.presets.strict_json import MAX_BYTES, calibrations_folder
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowError, StepFlowFileError
from tests.support.presets import MEASURED, NOTHING_COMPARED, OFF, RULE, edited, written

DEEP = '{"a":' * 11 + "1" + "}" * 11
TEXT = json.dumps(RULE)
HOSTILE = {
    "not JSON": (TEXT[:-3], "strict JSON"),
    "empty": ("", "strict JSON"),
    "a list": ("[1]", "holds list"),
    "a number": ("3", "holds int"),
    "NaN": (TEXT.replace("0.15", "NaN"), "NaN"),
    "Infinity": (TEXT.replace("0.15", "-Infinity"), "-Infinity"),
    "beyond a float": (TEXT.replace("0.15", "1e999"), "too large for a float"),
    "an endless integer": (TEXT.replace("0.15", "9" * 5000), "strict JSON"),
    "a key twice": (TEXT.replace('"alpha"', '"tau_max"'), "'tau_max' is given twice"),
    "too large": (TEXT + " " * MAX_BYTES, "bytes long"),
    "deep": (DEEP, "nested too deeply"),
    "very deep": ("[" * 60_000, "strict JSON|nested too deeply"),
    "deep inside": (TEXT.replace('"oeb_heads": null', '"oeb_heads": ' + DEEP), "nested too deeply"),
    "a control character": (TEXT.replace("NOT cal", "\\u001b[2JNOT cal"), "control character"),
    "half a pair": (TEXT.replace("</think>", "\\ud800"), "surrogate"),
    "a byte order mark": ("\ufeff" + TEXT, "strict JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path, case):
    text, words = HOSTILE[case]
    path = written(tmp_path, text)
    for load in (load_preset, preset_module.validate_preset):
        with pytest.raises(StepFlowFileError, match=words) as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "qwen3-8b.json"
    path.write_bytes(b'{"name": "\xff\xfe"}')
    with pytest.raises(StepFlowFileError, match="strict JSON"):
        load_preset(path)


def test_links_out_of_the_folder(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    written(outside, RULE)
    (inside / "qwen3-8b.json").symlink_to(outside / "qwen3-8b.json")
    with pytest.raises(StepFlowFileError, match="is a link out of its folder"):
        load_preset(inside / "qwen3-8b.json")
    (inside / "qwen3-8b.json").unlink()
    written(inside, RULE, "other.json")
    (inside / "qwen3-8b.json").symlink_to("other.json")
    assert load_preset(inside / "qwen3-8b.json").name == "qwen3-8b"
    (tmp_path / "by-link").symlink_to(outside)
    assert load_preset(tmp_path / "by-link" / "qwen3-8b.json").name == "qwen3-8b"
    with pytest.raises(StepFlowFileError, match="there is no file"):
        preset_module.validate_preset(inside / "none.json")


WRONG = [
    ({"extra": 1}, "extra is unknown"),
    ({"settings__tau": 0.2}, "settings.tau is unknown, expected 'tau_max'"),
    ({"settings__alpha": ...}, "settings.alpha is missing"),
    ({"provenance": ...}, "provenance is missing"),
    ({"schema_version": 2}, "schema_version is 2, expected 1"),
    ({"schema_version": True}, "schema_version is True"),
    ({"name": "../qwen3-8b"}, "name is '../qwen3-8b'"),
    ({"name": "a..b"}, "name is 'a..b'"),
    ({"name": "a/b"}, "name is 'a/b'"),
    ({"name": "other"}, "name is 'other', expected 'qwen3-8b'"),
    ({"name": ""}, "name"),
    ({"base_model": "Qwen3-8B"}, "base_model"),
    ({"base_model": "../../etc"}, "base_model"),
    ({"base_model": 3}, "base_model is 3"),
    ({"base_model_revision": "a/../b"}, "base_model_revision"),
    ({"architecture__num_hidden_layers": "36"}, "architecture.num_hidden_layers is '36'"),
    ({"architecture__num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"architecture__num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"architecture__attention_layers": []}, "attention_layers"),
    ({"architecture__attention_layers": [3, 1]}, "ascending"),
    ({"architecture__attention_layers": [36]}, "below 36"),
    ({"architecture": []}, r"architecture is \[\]"),
    ({"settings": None}, "settings is None, expected an object"),
    ({"settings__tau_max": 1.5}, r"settings.tau_max is 1.5, expected a number in \[0, 1\]"),
    ({"settings__tau_max": "0.15"}, "settings.tau_max is '0.15'"),
    ({"settings__tau_max": None}, "settings.tau_max is None"),
    ({"settings__implicit_thinking": 1}, "implicit_thinking is 1, expected true or false"),
    ({"settings__step_rule": "eval"}, "step_rule"),
    ({"settings__step_rule": ["sentence"]}, "step_rule"),
    ({"settings__oeb_layers": "bottom:2"}, "oeb_layers"),
    ({"settings__oeb_layers": [0, 36]}, "settings do not fit.*36"),
    ({"settings__oeb_layers": [0.5]}, r"oeb_layers\[0\]"),
    ({"settings__oeb_heads": {"0": [40]}}, "settings do not fit.*40"),
    ({"settings__oeb_heads": {"x": [0]}}, "settings.oeb_heads.x"),
    ({"settings__oeb_heads": {"0": [1.0]}}, r"oeb_heads.0\[0\] is 1.0"),
    ({"settings__oeb_heads": [1]}, "oeb_heads"),
    ({"settings__thinking_start": "x" * 201}, "thinking_start.*200 characters"),
    ({"settings__thinking_start": ["x" * 201]}, r"thinking_start\[0\]"),
    ({"settings__thinking_start": None}, "thinking could never start"),
    ({"settings__thinking_start": []}, "thinking_start"),
    ({"settings__summary_start": ["a"] * 1001}, "summary_start"),
    ({"settings__tool_start": "<tool>"}, "tool_end"),
    ({"settings__length_temperature": 0.5}, "length_temperature_base"),
    ({"settings__sink_tokens": 1.0}, "sink_tokens"),
    ({"provenance": {}}, "provenance.kind is None"),
    ({"provenance": "paper"}, "provenance.kind"),
    ({"provenance__kind": "official"}, "provenance.kind is 'official'"),
    ({"provenance__kind": ["rule"]}, "provenance.kind"),
    ({"provenance__calibrated": True}, "provenance.calibrated is True, expected false"),
    ({"provenance__statement": "The best settings."}, "NOT calibrated"),
    ({"settings__tau_max": 0.2}, "settings.tau_max is 0.2, expected 0.15 where provenance.kind is 'rule'"),
    ({"settings__bridge_floor": "absolute"}, "bridge_floor"),
    ({"provenance": MEASURED | {"verdict": "gain"}}, "provenance.verdict is 'gain'"),
    ({"provenance": MEASURED | {"verdict": "great"}}, "verdict"),
    ({"provenance": MEASURED | {"date": "2026-13-01"}}, "provenance.date"),
    ({"provenance": MEASURED | {"date": 20260301}}, "provenance.date"),
    ({"provenance": NOTHING_COMPARED}, r"provenance.deltas is \[\], expected at least one, because tau_max is not 0"),
    ({"provenance": NOTHING_COMPARED | {"p_value": 1.0}, **OFF}, "provenance.p_value is 1.0, expected null"),
    ({"provenance": NOTHING_COMPARED | {"verdict": "harm"}, **OFF}, "provenance.verdict is 'harm'"),
    ({"provenance": MEASURED | {"p_value": None}}, "provenance.p_value is None, expected a number"),
    ({"provenance": MEASURED | {"deltas": [MEASURED["deltas"][0] | {"low": 1.0}]}}, "low <= delta <= high"),
    ({"provenance": MEASURED | {"deltas": [MEASURED["deltas"][0] | {"high": 101}]}}, r"number in \[-100, 100\]"),
    ({"provenance": MEASURED | {"p_value": 2}}, "p_value"),
    ({"provenance": MEASURED | {"n": 0}}, "provenance.n"),
    ({"notes": "x" * 2001}, "notes"),
    ({"notes": ["x"]}, "notes"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=[str(changes)[:60] for changes, _ in WRONG])
def test_wrong_fields(tmp_path, monkeypatch, changes, words):
    """Refused by the package's own code, with file, field and value, whether or not jsonschema is there."""
    path = written(tmp_path, edited(**changes))
    with pytest.raises(StepFlowConfigError, match=words) as caught:
        preset_module.validate_preset(path)
    assert str(path) in caught.value.message
    monkeypatch.setattr(checks, "schema_problems", None)
    with pytest.raises(StepFlowConfigError, match=words):
        load_preset(path)


def test_measured_presets_may_have_found_nothing(tmp_path):
    for verdict, bounds in (("no measurable gain", (-1.2, 2.0)), ("gain", (0.1, 2.0)), ("harm", (-3.0, 0.4))):
        deltas = [MEASURED["deltas"][0] | {"low": bounds[0], "high": bounds[1]}]
        data = edited(provenance=MEASURED | {"verdict": verdict, "deltas": deltas}, settings__tau_max=0.3)
        assert verdict in str(preset_module.validate_preset(written(tmp_path, data)))


def test_where_nothing_was_compared_the_preset_is_the_base_model(tmp_path):
    preset = preset_module.validate_preset(written(tmp_path, edited(provenance=NOTHING_COMPARED, **OFF)))
    assert preset.provenance["deltas"] == []
    assert "no measurable gain" in str(preset)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
PATHS = [(key,) for key in RULE] + [
    (outer, key) for outer in ("architecture", "settings", "provenance") for key in RULE[outer]
]


@given(st.sampled_from(PATHS), JSON_VALUES)
def test_any_value_anywhere(tmp_path_factory, place, value):
    """Whatever a field holds, the file is either right for everyone or refused with an error of ours."""
    data = copy.deepcopy(RULE)
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    path = written(tmp_path_factory.mktemp("any"), data)
    problems = preset_module.find_problems(path)
    assert all(isinstance(problem, StepFlowError) for problem in problems)
    own = isinstance(problems[0], StepFlowFileError) if problems else False
    own = own or bool(checks.preset_problems(json.loads(path.read_text()), "qwen3-8b"))
    assert own == bool(problems)  # the schema finds nothing that our own code lets through


@given(JSON_VALUES)
def test_any_object_instead(tmp_path_factory, value):
    path = written(tmp_path_factory.mktemp("any"), json.dumps(value))
    with pytest.raises(StepFlowError):
        load_preset(path)


def test_without_jsonschema(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jsonschema" else find_spec(name))
    assert preset_module.validate_preset(written(tmp_path, RULE)).name == "qwen3-8b"


def test_the_schema_agrees():
    assert checks.schema_problems(RULE) == []
    for provenance in (MEASURED, NOTHING_COMPARED):
        assert checks.schema_problems(edited(provenance=provenance)) == []
    problems = checks.schema_problems(edited(settings__tau_max=3))
    assert [problem.field for problem in problems] == ["settings.tau_max"]
    schema = json.loads((calibrations_folder() / "schema.json").read_text())
    assert set(schema["properties"]["settings"]["properties"]) == set(checks.PRESET_SETTINGS)
