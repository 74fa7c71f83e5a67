"""Presets to work on: one that is right, with changes, in files."""

import copy
import json
import logging
from pathlib import Path

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.presets.strict_json import calibrations_folder
from tests.support.flow import byte_tokenizer

RULE = json.loads((calibrations_folder() / "qwen3-8b.json").read_text())
MEASURED = {
    "kind": "measured",
    "date": "2026-03-01",
    "library_version": "0.1.0",
    "dataset": "math500",
    "n": 500,
    "deltas": [{"metric": "accuracy", "delta": 0.4, "low": -1.2, "high": 2.0, "confidence": 0.95}],
    "p_value": 0.61,
    "command": "hf-stepflow eval --model M --problems math500",
    "verdict": "no measurable gain",
}
# What a calibration states that found no candidate to hold against the base, and what its settings then are.
NOTHING_COMPARED = MEASURED | {"deltas": [], "p_value": None}
OFF = {"settings__tau_max": 0.0, "settings__alpha": 0.0}


def edited(**changes) -> dict:
    """A right preset with changes, by dotted name with __ for the dot; ... takes a field out."""
    data = copy.deepcopy(RULE)
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = data
        for key in outer:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return data


def written(folder: Path, data: object, name: str = "qwen3-8b.json") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def tiny_preset(folder: Path, model_type: str = "llama", name: str = "tiny", **changes) -> Path:
    """A preset that fits the tiny models."""
    architecture = {
        "model_type": model_type, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    data = edited(name=name, base_model="org/Tiny", architecture=architecture, **changes)
    return written(folder, data, f"{name}.json")


def attached(model, source):
    """StepFlow on a model, with the preset or the settings that are meant."""
    return StepFlowModelForCausalLM.attach(model, source, tokenizer=byte_tokenizer())


def heard(caplog, monkeypatch):
    """Where warnings of the package are heard."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog.at_level(logging.WARNING, "hf_stepflow")
