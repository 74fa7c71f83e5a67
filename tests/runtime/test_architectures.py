"""A cross-section of model types is supported or refused with its reason; docs/architectures.md has all of them."""

import re
from typing import Any

import pytest
import transformers

from hf_stepflow.runtime.attention_interface import attention_modules
from hf_stepflow.runtime.errors import StepFlowUnsupportedError
from scripts.architectures import IS_RELEASE_OF_PAGE, PAGE, TABLE_HEAD, page, table
from tests.support.sweep import SweepResult, check_model_type
from tests.support.tiny_models import causal_model_types, tiny_model

# One type for each thing that families do differently.
SUPPORTED = {
    "llama": "grouped queries",
    "gpt2": "learned positions, joint projections",
    "bert": "an encoder used as decoder",
    "bart": "a decoder with cross-attention",
    "gemma2": "softcap and sliding windows",
    "gemma3": "a composite config with a vision tower",
    "got_ocr2": "a vision tower outside the attention interface",
    "gpt_oss": "learned sinks, experts",
    "granite_swa": "sinks on the output",
    "deepseek_v3": "latent attention: values narrower than keys",
    "llama4_text": "attention in chunks",
    "qwen3_next": "most layers linear",
    "bamba": "a hybrid with a cache of its own in older releases",
    "mllama": "layers that run only with an image",
    "nemotron": "no arguments handed down to attention",
    "inkling_text": "a bias on the logits",
    "doge": "a mask for each head",
}
REFUSED = {
    "falcon": "does not use Transformers' attention interface",
    "git": "no causal self-attention",
    "zamba2": "no layer index",
    "hrm_text": "more than one self-attention module at layer index 0",
    "diffllama": "combines 2 attention calls",
    "deepseek_v32": "hands indices to attention",
    "inkling2_text": "hands sinks to attention",
    "deepseek_v4": "keys that stand for many tokens",
}


IN_EVERY_RELEASE = (
    "llama gpt2 bart gemma2 gemma3 got_ocr2 gpt_oss deepseek_v3 llama4_text qwen3_next bamba falcon".split()
)


def _check(model_type: str, **settings: Any) -> SweepResult:
    if not IS_RELEASE_OF_PAGE and (settings or model_type not in IN_EVERY_RELEASE):
        pytest.skip(f"the code of {model_type} is another in transformers {transformers.__version__}")
    return check_model_type(model_type, **settings)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_a_cross_section_of_model_types_is_served(model_type: str) -> None:
    assert _check(model_type).status == "supported"


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        # Its last layers compute their last query only, before the first token.
        ("gemma4_text", {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("gemma2", {"query_pre_attn_scalar": 4, "attn_logit_softcapping": 1.0}),
        ("granite", {"attention_multiplier": 0.1}),
    ],
)
def test_settings_that_tiny_configs_leave_alone_are_served(model_type: str, settings: dict[str, Any]) -> None:
    assert _check(model_type, **settings).status == "supported"


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_stepflow_would_miss_or_distort_is_refused(model_type: str) -> None:
    result = _check(model_type)
    assert result.status == "refused"
    assert REFUSED[model_type] in result.reason


@pytest.mark.skipif(not IS_RELEASE_OF_PAGE, reason="BERT's code is another in this release")
def test_an_encoder_is_refused() -> None:
    with pytest.raises(StepFlowUnsupportedError, match="is_decoder=True"):
        attention_modules(tiny_model("bert", is_decoder=False))


@pytest.mark.skipif(not IS_RELEASE_OF_PAGE, reason="docs/architectures.md was written for another release")
def test_the_page_is_what_the_script_writes() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text.partition(TABLE_HEAD)[2].splitlines()) == text


@pytest.mark.slow
@pytest.mark.skipif(not IS_RELEASE_OF_PAGE, reason="docs/architectures.md was written for another release")
def test_the_page_matches_the_sweep() -> None:
    results = [check_model_type(model_type) for model_type in causal_model_types()]
    assert all(result.status == "supported" or result.reason for result in results)
    assert sum(result.status == "supported" for result in results) > 80
    assert _without_notes(page(table(results))) == _without_notes(PAGE.read_text(encoding="utf-8"))


def _without_notes(text: str) -> list[str]:
    """The lines of the page without the notes on supported types, which may depend on how a processor rounds."""
    return [re.sub(r"^(\| \S+ \| supported \|.*\|.*\|).*\|$", r"\1", line) for line in text.splitlines()]
