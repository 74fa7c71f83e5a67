"""Step-Saliency on every model type that StepFlow serves, against the naive oracle."""

import pytest
import torch
import transformers

from hf_stepflow import segment_trace, step_saliency
from hf_stepflow.runtime.attention_interface import attention_modules
from hf_stepflow.runtime.errors import StepFlowUnsupportedError
from hf_stepflow.runtime.settings import StepFlowSettings
from scripts.architectures import IS_RELEASE_OF_PAGE
from tests.support.flow import byte_tokenizer, encode
from tests.support.saliency_oracle import SaliencyOracle, oracle_map
from tests.support.tiny_models import UNBUILDABLE, causal_model_types, tiny_model

IDS = encode("Who?<think>One red. Two blue. Three green.</think>Three.\n\nBye now.")
# Masks made from hidden states, masks that are indexed, a position bias with a gradient, a decoder inside a decoder.
SPECIAL = ("doge", "inkling_text", "llama4_text", "opt", "qwen4_exp_text", "recurrent_gemma")
# Families whose own attention is in float32, whatever the model.
ROUNDED = 1e-6


def naive_maps(model, trace) -> torch.Tensor:
    """From autograd through the oracle's attention, or, where masks are no plain ones, through the family's own."""
    targets = torch.tensor(IDS)
    if model.config.model_type != "doge":
        tokens = SaliencyOracle(model)(IDS, lambda logits: torch.nn.functional.cross_entropy(logits[:-1], targets[1:]))
        weights = [tokens[layer].mean(0) for layer in sorted(tokens)]
    else:
        own = model(targets[None]).logits
        model.set_attn_implementation("eager")
        if not IS_RELEASE_OF_PAGE and not torch.allclose(model(targets[None]).logits, own, atol=1e-4):
            pytest.skip(f"the kernels of doge differ from each other in transformers {transformers.__version__}")
        output = model(targets[None], labels=targets[None], output_attentions=True, use_cache=False)
        for one in output.attentions:
            one.retain_grad()
        output.loss.backward()
        weights = [(one * one.grad).abs()[0].mean(0).detach() for one in output.attentions]
    return torch.stack([oracle_map(one, trace, "causal") for one in weights])


def serves(model) -> bool:
    """Whether StepFlow reaches the model's attention, in this release of transformers."""
    try:
        attention_modules(model)
    except StepFlowUnsupportedError:
        return False
    return True


def check(model_type: str) -> None:
    if model_type not in causal_model_types() or model_type in UNBUILDABLE:
        pytest.skip(f"this transformers cannot build {model_type}")
    model = tiny_model(model_type, dtype=torch.float64)
    if not serves(model):
        with pytest.raises(StepFlowUnsupportedError):
            step_saliency(model, IDS, tokenizer=byte_tokenizer())
        return
    trace = segment_trace(byte_tokenizer(), IDS, StepFlowSettings(min_step_chars=3))
    found = step_saliency(model, IDS, trace, chunk_size=11)
    if model_type != "ctrl":  # it has no layers that can be checkpointed
        again = step_saliency(model, IDS, trace, chunk_size=11, checkpoints=True)
        torch.testing.assert_close(again.maps, found.maps, rtol=1e-9, atol=0)
    expected = naive_maps(model, trace)
    assert float((found.maps - expected).abs().max() / expected.abs().max()) < ROUNDED


@pytest.mark.parametrize("model_type", SPECIAL)
def test_families_that_do_it_their_way(model_type: str) -> None:
    check(model_type)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [one for one in causal_model_types() if one not in SPECIAL])
def test_every_model_type(model_type: str) -> None:
    check(model_type)


def test_layers_that_cannot_be_checkpointed() -> None:
    model = tiny_model("ctrl")
    if not IS_RELEASE_OF_PAGE and not serves(model):
        pytest.skip(f"StepFlow does not reach the attention of ctrl in transformers {transformers.__version__}")
    with pytest.raises(StepFlowUnsupportedError, match="checkpoints=False"):
        step_saliency(model, IDS, tokenizer=byte_tokenizer(), checkpoints=True)
