"""`hf-stepflow verify`: what works is proved, and a model that was tampered with fails where it was."""

import json

import pytest
import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_stepflow import load_reasoner
from hf_stepflow.cli import main
from hf_stepflow.reasoner import FOLDER
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.verification import Verification, verify_model
from tests.support.flow import VARIANTS, attach
from tests.support.tiny_models import tiny_model

FLOOR, INJECTION, REFERENCE = (
    "floor in every bridged layer",
    "injection in every layer of it",
    "equal to the reference",
)
DECODE, ACTIVE, OFF, STEPS = "token by token as at once", "StepFlow is active", "off is off", "steps are found"
EVERYTHING = [STEPS, FLOOR, INJECTION, REFERENCE, DECODE, ACTIVE, OFF]
SETTINGS = {"tau_max": 0.4}


@pytest.fixture
def model():
    return load_reasoner(SETTINGS)[0]


def failed(found: Verification) -> list[str]:
    return [check.name for check in found.checks if not check.passed]


def test_a_model_that_works(model):
    preset = model._stepflow_preset
    ids = torch.tensor([[5, 6, 7]])
    before = type(model), model.stepflow_config.to_dict(), model.generation_config.to_dict(), model(ids).logits
    found = verify_model(model, "reasoner", tokens=4)
    assert found.passed
    assert [check.name for check in found.checks] == EVERYTHING
    numbers = {check.name: check.numbers for check in found.checks}
    assert numbers[FLOOR]["layers"] == [0, 1]
    assert numbers[FLOOR]["queries"] > numbers[FLOOR]["lifted"] > 0
    assert abs(numbers[FLOOR]["least_floors"] - 1) < 1e-4
    assert numbers[INJECTION] == {"layers": [6, 7], "tokens": 16, "least_share": pytest.approx(1, abs=1e-3)}
    assert numbers[REFERENCE]["error"] < 1e-5
    assert numbers[ACTIVE]["difference"] > 1
    assert found.engine.startswith("transformers ")
    assert found.settings == SETTINGS
    assert found.trace == {"tokens": 77, "thinking steps": 4, "summary steps": 2}
    assert found.cost["tokens"] == 4
    assert found.cost["ratio"] > 0.5
    assert model._stepflow_preset is preset
    after = type(model), model.stepflow_config.to_dict(), model.generation_config.to_dict(), model(ids).logits
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma3_text", "gemma2", "deepseek_v3", "qwen3_next"])
def test_families(family):
    found = verify_model(attach(tiny_model(family), "paper"), family, tokens=1)
    assert failed(found) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings(variant):
    found = verify_model(attach(tiny_model("llama"), variant), "llama", tokens=1)
    assert failed(found) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(dtype):
    found = verify_model(load_reasoner(SETTINGS, dtype=dtype)[0], "reasoner", tokens=1)
    assert failed(found) == []
    assert dtype in found.machine["runs as"]


def halved(attend, base, *call, **kwargs):
    """Half of what StepFlow does, where it bridges."""
    output, weights = attend(*call, **kwargs)
    layer = call[0].stepflow_link.layer
    return (output + plain(base, *call, **kwargs)) / 2 if layer < 2 else output, weights


def halved_in_decoding(attend, base, *call, **kwargs):
    return halved(attend, base, *call, **kwargs) if call[1].shape[2] == 1 else attend(*call, **kwargs)


def without_injection(attend, base, *call, **kwargs):
    output, weights = attend(*call, **kwargs)
    layer = call[0].stepflow_link.layer
    return plain(base, *call, **kwargs) if layer > 5 else output, weights


def plain(base, *call, stepflow_pass=None, **kwargs):
    return base(*call, **kwargs)[0]


def bypassed(attend, base, *call, stepflow_pass=None, **kwargs):
    return base(*call, **kwargs)


@pytest.mark.parametrize(
    ("tamper", "where"),
    [
        (halved, {FLOOR, REFERENCE}),
        (halved_in_decoding, {FLOOR, REFERENCE, DECODE}),
        (without_injection, {INJECTION, REFERENCE}),
        (bypassed, {"runs"}),
    ],
)
def test_attention_that_was_tampered_with(model, tamper, where):
    name = next(module.config._attn_implementation for module in model.modules() if "stepflow_link" in vars(module))
    attend, base = ALL_ATTENTION_FUNCTIONS[name], ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register(name, lambda *call, **kwargs: tamper(attend, base, *call, **kwargs))
    try:
        found = verify_model(model, "reasoner", tokens=1)
    finally:
        AttentionInterface.register(name, attend)
    assert set(failed(found)) == where
    assert "FAILED" in str(found)
    assert failed(verify_model(model, "reasoner", tokens=1)) == []


def test_a_layer_that_was_taken_out(model):
    module = next(module for module in model.modules() if "stepflow_link" in vars(module))
    link = vars(module).pop("stepflow_link")
    found = verify_model(model, "reasoner", tokens=1)
    assert failed(found)
    assert not found.passed
    module.stepflow_link = link
    assert failed(verify_model(model, "reasoner", tokens=1)) == []


def test_a_model_that_is_another_while_stepflow_is_attached(model):
    def shift(module, inputs, output):
        if hasattr(model, "stepflow_runtime"):
            return output * 1.000001
        return output

    handle = model.lm_head.register_forward_hook(shift)
    found = verify_model(model, "reasoner", tokens=1)
    handle.remove()
    assert failed(found) == [OFF]


def test_settings_that_switch_everything_off():
    found = verify_model(load_reasoner({"tau_max": 0.0, "alpha": 0.0})[0], "reasoner", tokens=1)
    assert ACTIVE in failed(found)
    assert OFF not in failed(found)


def test_a_model_without_stepflow_is_refused():
    with pytest.raises(StepFlowInputError, match="not attached"):
        verify_model(tiny_model("llama"), "tiny")


# The command


def test_the_command(capsys):
    assert main(["verify", "reasoner", "--stepflow", "tau_max=0.4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1] == "```"
    assert lines[1] == "hf-stepflow verify: PASSED"
    assert [line.split(": ")[0].split(maxsplit=1)[1] for line in lines if line.startswith("ok ")] == EVERYTHING
    assert "settings      tau_max=0.4" in lines
    assert lines[-2].startswith("a token costs ")

    assert main(["verify", "reasoner", "--stepflow", "tau_max=0,alpha=0", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["model"]) == (False, "reasoner")
    assert found["engine"].startswith("transformers ")
    assert {"name", "passed", "found", "numbers"} == set(found["checks"][0])


def test_the_command_on_repositories(capsys, tmp_path):
    model = load_reasoner(SETTINGS)[0]
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "preset", preset_only=True)
    for kind in ("whole", "preset"):
        assert main(["verify", str(tmp_path / kind), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["settings"] == SETTINGS
    # Any other model takes the rule.
    assert main(["verify", str(FOLDER), "--json"]) == 0
    assert main(["verify", str(tmp_path / "nothing")]) == 2
