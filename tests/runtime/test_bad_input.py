"""Bad input gets an error that names the value, what was expected and the way out, and changes nothing."""

import json
import logging
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hf_stepflow import StepFlowConfig, StepFlowModelForCausalLM, StepVocabulary, Trace, segment_trace
from hf_stepflow.cli import EXIT_ERROR, main
from hf_stepflow.runtime.configuration_stepflow import read_settings
from hf_stepflow.runtime.errors import (
    StepFlowConfigError,
    StepFlowError,
    StepFlowFileError,
    StepFlowInputError,
    StepFlowUnsupportedError,
)
from hf_stepflow.runtime.settings import StepFlowSettings
from tests.support.flow import byte_tokenizer, encode
from tests.support.tiny_models import tiny_model

PROMPT = torch.tensor([encode("Two eggs?<think>Add one. Then two.")])


def snapshot(model):
    """What attaching could change."""
    return (
        type(model),
        model.config._attn_implementation,
        set(model.__dict__),
        len(model._forward_pre_hooks),
        len(model._forward_hooks),
        [name for name, module in model.named_modules() if "stepflow_link" in module.__dict__],
        model.generation_config.to_dict(),
    )


def refused(model, config, error, *words, tokenizer=None):
    before = snapshot(model)
    with pytest.raises(error) as caught:
        StepFlowModelForCausalLM.attach(model, config, tokenizer=tokenizer or byte_tokenizer())
    assert snapshot(model) == before
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tau_max": 1.5}, ["tau_max", "[0, 1]", "1.5"]),
        ({"tau_max": -0.1}, ["tau_max", "-0.1"]),
        ({"alpha": math.nan}, ["alpha", "[-100, 100]", "nan"]),
        ({"alpha": "much"}, ["alpha", "'much'"]),
        ({"alpha": True}, ["alpha", "True"]),
        ({"oeb_layers": "bottom:1.5"}, ["oeb_layers", "0 < F <= 1", "bottom:1.5"]),
        ({"oeb_layers": "lower:0.2"}, ["oeb_layers", "lower:0.2"]),
        ({"smi_layers": [2, 2]}, ["smi_layers", "each layer once", "[2, 2]"]),
        ({"smi_layers": [-1]}, ["smi_layers[0]", "-1"]),
        ({"oeb_layers": "bottom:0.8", "smi_layers": "top:0.6"}, ["overlap", "bottom:0.8", "top:0.6"]),
        ({"bridge_scope": "word"}, ["bridge_scope", '"segment" or "step"', "'word'"]),
        ({"bridge_floor": "soft"}, ["bridge_floor", "'soft'"]),
        ({"step_rule": "lines"}, ["step_rule", "'lines'"]),
        ({"oeb_span": 0}, ["oeb_span", "[1, ", "0"]),
        ({"smi_window": 2.5}, ["smi_window", "2.5"]),
        ({"sink_tokens": -1}, ["sink_tokens", "-1"]),
        ({"min_step_chars": -3}, ["min_step_chars", "-3"]),
        ({"oeb_heads": {"0": [1, 1]}}, ["oeb_heads", "each head once"]),
        ({"oeb_heads": [1, 2]}, ["oeb_heads", "[1, 2]"]),
        ({"length_temperature": 0.5}, ["length_temperature_base", "trained length"]),
        ({"length_temperature": 0.5, "length_temperature_base": 1}, ["length_temperature_base", "1"]),
        ({"thinking_start": None}, ["thinking_start", "implicit_thinking"]),
        ({"thinking_start": [""]}, ["thinking_start[0]", "1 to 200 characters"]),
        ({"tool_start": "<tool>"}, ["tool_start", "tool_end"]),
        ({"implicit_thinking": "yes"}, ["implicit_thinking", "'yes'"]),
        ({"tau": 0.2}, ["'tau'", "did you mean"]),
    ],
)
def test_settings(settings, words):
    with pytest.raises(StepFlowConfigError) as caught:
        read_settings(settings)
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"oeb_layers": [0, 9]}, ["oeb_layers", "[9]", "0 to 3"]),
        ({"smi_layers": [4]}, ["smi_layers", "[4]"]),
        ({"oeb_heads": {0: [7]}}, ["oeb_heads", "[7]", "query heads"]),
        ({"oeb_heads": {8: [0]}}, ["oeb_heads", "layer 8"]),
    ],
)
def test_settings_that_do_not_fit_the_model(config, words):
    refused(tiny_model("llama"), config, StepFlowConfigError, *words)


def test_a_call_with_bad_settings_runs_nothing():
    model = StepFlowModelForCausalLM.attach(tiny_model("llama"), None, tokenizer=byte_tokenizer())
    for bad in ({"tau_max": 2}, {"tau": 1}, {"oeb_layers": [11]}, "no/such/file"):
        with pytest.raises(StepFlowError):
            model.generate(PROMPT, max_new_tokens=2, stepflow=bad)
    with pytest.raises(StepFlowConfigError, match="alpha"):
        model.generate(PROMPT, generation_config=GenerationConfig(max_new_tokens=2, stepflow={"alpha": math.inf}))
    assert model.stepflow_config.tau_max == 0.15
    assert model.generate(PROMPT, max_new_tokens=2, do_sample=False).shape[1] == PROMPT.shape[1] + 2


def word_tokenizer():
    vocabulary = {word: index for index, word in enumerate(["<unk>", "one", "two", "."])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_markers_that_the_tokenizer_lacks():
    refused(
        tiny_model("llama"), None, StepFlowConfigError, "'<think>'", "implicit_thinking", tokenizer=word_tokenizer()
    )
    with pytest.raises(StepFlowConfigError, match="cannot write the marker"):
        segment_trace(word_tokenizer(), [1, 2, 3], {"thinking_start": "one", "summary_start": "three"})


def test_no_tokenizer():
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(StepFlowConfigError, match="pass tokenizer="):
        StepFlowModelForCausalLM.attach(model)
    with pytest.raises(StepFlowConfigError, match="none could be loaded from 'no/such/place'"):
        StepFlowModelForCausalLM.attach(model, {"base_model_name_or_path": "no/such/place"})
    with pytest.raises(StepFlowConfigError, match="got None"):
        StepVocabulary.from_tokenizer(None)
    assert snapshot(model) == before


@pytest.mark.parametrize("family", ["falcon", "mamba", "bloom"])
def test_architectures_outside_the_interface(family):
    refused(tiny_model(family), None, StepFlowUnsupportedError, type(tiny_model(family)).__name__, "architectures.md")


def test_unknown_attention_implementation():
    model = tiny_model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    refused(model, None, StepFlowUnsupportedError, "'flash_attention_2'", 'attn_implementation="sdpa"')


def test_attaching_twice():
    model = StepFlowModelForCausalLM.attach(tiny_model("llama"), None, tokenizer=byte_tokenizer())
    with pytest.raises(StepFlowInputError, match="detach_stepflow"):
        StepFlowModelForCausalLM.attach(model, None, tokenizer=byte_tokenizer())


def test_ways_of_calling_that_steps_cannot_be_read_from():
    model = StepFlowModelForCausalLM.attach(tiny_model("llama"), None, tokenizer=byte_tokenizer())
    embeddings = model.get_input_embeddings()(PROMPT)
    with pytest.raises(StepFlowInputError, match="disable_stepflow"):
        model(inputs_embeds=embeddings)
    with pytest.raises(StepFlowInputError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=2)
    with pytest.raises(StepFlowUnsupportedError, match="generate_batch"):
        model.generate(PROMPT, cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(StepFlowUnsupportedError, match="packed"):
        model(PROMPT, cu_seq_lens_q=torch.tensor([0, 10, PROMPT.shape[1]]))
    with model.disable_stepflow(), torch.no_grad():
        assert torch.isfinite(model(inputs_embeds=embeddings).logits).all()


def test_prompts_without_a_token():
    model = StepFlowModelForCausalLM.attach(tiny_model("llama"), None, tokenizer=byte_tokenizer())
    with pytest.raises(StepFlowInputError, match="empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)
    ids = PROMPT.repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with pytest.raises(StepFlowInputError, match=r"rows \[1\] .* padding only"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)


def test_a_cache_whose_rows_were_changed_by_hand():
    model = StepFlowModelForCausalLM.attach(tiny_model("llama"), None, tokenizer=byte_tokenizer())
    cache = model(PROMPT, use_cache=True).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.repeat(2, 1, 1, 1), layer.values.repeat(2, 1, 1, 1)
    with pytest.raises(StepFlowInputError, match=r"for 1 rows, but input_ids has 2\n.*batch_repeat_interleave"):
        model(PROMPT[:, :1].repeat(2, 1), past_key_values=cache)


def test_nothing_to_report():
    model = StepFlowModelForCausalLM.attach(tiny_model("llama"), None, tokenizer=byte_tokenizer())
    with pytest.raises(StepFlowInputError, match="call generate"):
        model.stepflow_report()


def test_files(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(StepFlowFileError, match="no StepFlow settings"):
        read_settings(tmp_path / "missing.json")
    assert issubclass(StepFlowFileError, OSError)
    broken = tmp_path / "broken.json"
    broken.write_text('{"tau_max": 0.2,')
    with pytest.raises(StepFlowFileError, match="is not JSON"):
        read_settings(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StepFlowFileError, match="is not JSON"):
        read_settings(str(broken))
    broken.write_text("[1, 2]")
    with pytest.raises(StepFlowFileError, match="holds list"):
        read_settings(broken)
    newer = tmp_path / "newer.json"
    newer.write_text(json.dumps({"tau_max": 0.2, "bridge_colour": "red"}))
    with caplog.at_level(logging.WARNING, "hf_stepflow"):
        assert read_settings(newer).tau_max == 0.2
    assert "bridge_colour" in caplog.text
    assert "upgrade" in caplog.text


def test_a_config_refuses_misspelt_settings():
    with pytest.raises(StepFlowConfigError, match=r"unknown StepFlow setting 'tau_mx'.*\n.*did you mean 'tau_max'"):
        StepFlowConfig(tau_mx=0.1)
    assert StepFlowConfig(architectures=["X"], anything_else=1).tau_max == 0.15  # Transformers' own business


def test_config_round_trip(tmp_path):
    config = StepFlowConfig(tau_max=0.3, oeb_heads={1: [0, 2]}, thinking_start=["<a>", "<b>"])
    config.save_pretrained(tmp_path)
    assert read_settings(tmp_path) == config.settings == read_settings(StepFlowConfig.from_pretrained(tmp_path))
    assert read_settings(None) == StepFlowSettings()
    with pytest.raises(StepFlowConfigError, match="a StepFlowConfig, a dict, a path or None, got int"):
        read_settings(3)


def test_traces():
    with pytest.raises(StepFlowInputError, match=r"\[T\]"):
        Trace([0, 1], [0])
    with pytest.raises(StepFlowInputError, match="segment_ids"):
        Trace([0, 5], [0, 0])
    with pytest.raises(StepFlowInputError, match="one row"):
        segment_trace(byte_tokenizer(), PROMPT.repeat(2, 1))


@pytest.mark.parametrize("text", ["-1", "1.5", "x"])
@pytest.mark.parametrize(
    "words",
    [
        ["demo"],
        ["diagnose", "--model", "reasoner", "--compare", "no-such.jsonl", "none.jsonl"],
        ["eval", "--model", "reasoner", "--problems", "reasoner:chains-2"],
        ["calibrate", "reasoner", "--problems", "reasoner:chains-2"],
        ["generate", "--model", "reasoner", "--prompt", "How many?"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_refuses_a_seed_before_it_works(capsys, words, text):
    with pytest.raises(SystemExit) as caught:
        main([*words, "--seed", text])
    assert caught.value.code == EXIT_ERROR
    assert f"argument --seed: a seed is a whole number from 0 on, below 2^63, got '{text}'" in capsys.readouterr().err


def test_a_whole_number_is_a_number():
    model = StepFlowModelForCausalLM.attach(tiny_model("llama"), tokenizer=byte_tokenizer())
    asked = {"attention_mask": torch.ones_like(PROMPT), "do_sample": False, "max_new_tokens": 4}
    whole, same = ({"tau_max": number} for number in (1, 1.0))
    assert torch.equal(*(model.generate(PROMPT, stepflow=settings, **asked) for settings in (whole, same)))
