"""A preset whose base is quantised while it is loaded, by a real quantiser."""

import pytest
import torch
from optimum.quanto import QTensor
from transformers import AutoModelForCausalLM, QuantoConfig

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.hub.export import export_preset
from tests.support.flow import SHORT_TEXT, byte_tokenizer, encode
from tests.support.hub_models import SETTINGS, save_base, strong_preset

IDS = torch.tensor([encode(SHORT_TEXT)])
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    save_base(folder / "base")
    export_preset(strong_preset(folder), folder / "preset", base=folder / "base")
    return folder


@pytest.mark.parametrize("weights", ["int8", "int4"])
@torch.no_grad()
def test_the_base_of_a_preset_is_quantised(home, weights):
    quantised = AutoModelForCausalLM.from_pretrained(home / "base", quantization_config=QuantoConfig(weights=weights))
    plain = quantised(IDS).logits
    expected = StepFlowModelForCausalLM.attach(quantised, SETTINGS, tokenizer=byte_tokenizer())
    assert not torch.equal(expected(IDS).logits, plain)

    config = QuantoConfig(weights=weights)
    loaded = AutoModelForCausalLM.from_pretrained(home / "preset", trust_remote_code=True, quantization_config=config)
    linear = [module for module in loaded.model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 4 * 7
    assert {(type(module).__name__, module.weight.qtype.name) for module in linear} == {("QLinear", f"q{weights}")}
    assert all(isinstance(module.weight, QTensor) for module in linear)
    assert loaded.config.quantization_config.weights == weights
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)
    assert torch.equal(loaded.generate(IDS, **GREEDY), expected.generate(IDS, **GREEDY))
    assert loaded.stepflow_report().rows[0].steps
    assert torch.equal(loaded.detach_stepflow()(IDS).logits, plain)

    here = StepFlowModelForCausalLM.from_pretrained(home / "preset", quantization_config=QuantoConfig(weights=weights))
    assert torch.equal(here(IDS).logits, expected(IDS).logits)
