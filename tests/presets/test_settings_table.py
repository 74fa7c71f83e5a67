"""The table of settings: derived files are up to date, and a bound changed in the table changes everywhere."""

import dataclasses
import json

import pytest
from jsonschema import Draft202012Validator

from hf_stepflow.calibration.candidates import Space
from hf_stepflow.cli import main
from hf_stepflow.hub.cards import preset_card
from hf_stepflow.presets.preset import load_preset
from hf_stepflow.runtime.configuration_stepflow import StepFlowConfig
from hf_stepflow.runtime.errors import StepFlowConfigError
from hf_stepflow.runtime.settings import SETTINGS, StepFlowSettings
from scripts import settings as script
from tests.support.presets import edited, written


class Asked:
    """An optuna trial that remembers the ranges it is asked for and takes the last choice."""

    def __init__(self):
        self.ranges = {}

    def suggest_float(self, name, low, high, log):
        self.ranges[name] = (low, high)
        return high

    def suggest_categorical(self, name, choices):
        self.ranges[name] = tuple(choices)
        return choices[-1]


def test_derived_files_are_up_to_date():
    assert script.SCHEMA.read_text(encoding="utf-8") == script.schema_text()
    assert script.PAGE.read_text(encoding="utf-8") == script.page_text()


def test_every_default_and_committed_bound_is_right():
    for name, setting in SETTINGS.items():
        assert setting.problem(getattr(StepFlowSettings(), name)) is None
        assert setting.meaning.endswith(".")


def test_a_bound_changed_in_the_table_changes_everywhere(monkeypatch, tmp_path, capsys):
    preset = written(tmp_path, edited(settings__alpha=7.5, provenance__kind="measured"), "qwen3-8b.json")
    assert StepFlowConfig(alpha=7.5).alpha == 7.5
    monkeypatch.setitem(SETTINGS, "alpha", dataclasses.replace(SETTINGS["alpha"], high=5, search=(0.02, 4.0)))
    for refused in (lambda: StepFlowConfig(alpha=7.5), lambda: load_preset(preset)):
        with pytest.raises(StepFlowConfigError, match=r"a number in \[-100, 5\]"):
            refused()
    schema = script.settings_schema()
    assert schema["properties"]["alpha"]["maximum"] == 5
    good = json.loads(preset.read_text())["settings"]
    assert [error.json_path for error in Draft202012Validator(schema).iter_errors(good)] == ["$.alpha"]
    assert main(["presets", "settings"]) == 0
    assert "Values: a number in [-100, 5]." in capsys.readouterr().out
    trial = Asked()
    Space({}, {"quarter": [3]}, {"all": None}, [64]).suggest(trial)
    assert trial.ranges["alpha"] == (0.02, 4.0)


def test_presets_may_leave_out_a_newer_setting(monkeypatch, tmp_path):
    file = written(tmp_path, edited(settings__alpha=...))
    with pytest.raises(StepFlowConfigError, match=r"settings\.alpha is missing"):
        load_preset(file)
    monkeypatch.setitem(SETTINGS, "alpha", dataclasses.replace(SETTINGS["alpha"], is_new=True))
    assert load_preset(file).settings.alpha == StepFlowSettings().alpha
    assert not list(
        Draft202012Validator(script.settings_schema()).iter_errors(json.loads(file.read_text())["settings"])
    )


def test_a_setting_moved_to_another_part_moves_in_the_card(monkeypatch):
    monkeypatch.setitem(SETTINGS, "alpha", dataclasses.replace(SETTINGS["alpha"], group="another part"))
    assert "| another part | `alpha` |" in str(preset_card(load_preset("qwen3-8b")))
