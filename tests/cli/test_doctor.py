"""`hf-stepflow doctor MODEL`: what it says of models that StepFlow runs on, does not run on, and cannot read."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from hf_stepflow import list_presets
from hf_stepflow.cli import main
from hf_stepflow.cli.doctor import examine_model, render_model
from hf_stepflow.runtime.errors import StepFlowFileError
from tests.support.hub_models import save_base
from tests.support.tiny_models import tiny_config, tiny_model


def told(capsys, *words, status=0):
    assert main(["doctor", *map(str, words), "--json"]) == status
    return json.loads(capsys.readouterr().out)["model"]


def test_a_supported_model(tmp_path, capsys):
    report = told(capsys, save_base(tmp_path / "model"))
    assert (report["model_type"], report["supported"]) == ("llama", True)
    assert report["architecture"] == "llama with 4 layers, 4 query heads, 2 key-value heads"
    assert report["kernels"] == {"sdpa": None, "eager": None, "flex_attention": None}
    assert report["layers"] == {"softmax_attention": [0, 1, 2, 3], "sliding_window": [], "sinks": [], "latent": []}
    preset = report["preset"]
    assert (preset["name"], preset["kind"], preset["oeb_layers"], preset["smi_layers"]) == ("rule", "rule", [0], [3])
    assert report["fitting_presets"] == []
    markers = report["markers"]
    assert markers["thinking_start"] == [{"text": "<think>", "single_token": True, "in_template": True}]
    assert markers["summary_start"] == [{"text": "</think>", "single_token": True, "in_template": False}]
    assert markers["template_opens_thinking"] is True
    assert markers["problem"] is None


def test_no_weights_are_read(tmp_path, monkeypatch):
    folder = save_base(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)
    assert examine_model(str(folder))["supported"]


def test_sinks_windows_and_channels(tmp_path, capsys):
    report = told(capsys, save_base(tmp_path / "model", "gpt_oss"))
    assert report["layers"]["sinks"] == [0, 1, 2, 3]
    assert report["layers"]["sliding_window"] == [0, 2]
    assert "does not support" in report["kernels"]["sdpa"]
    assert report["kernels"]["eager"] is None
    markers = report["markers"]
    assert markers["thinking_start"][0]["text"] == "<|channel|>analysis<|message|>"
    assert markers["thinking_start"][0]["single_token"] is False
    assert [each["text"] for each in markers["others_found"]["thinking_start"]] == ["<think>"]
    assert markers["template_opens_thinking"] is False
    assert main(["doctor", str(tmp_path / "model")]) == 0
    text = capsys.readouterr().out
    assert "learned sinks   layers 0 to 3 (4)" in text
    assert "sliding window  layers 0, 2" in text
    assert "also found: <think>" in text
    assert "hint            set thinking_start" in text


def test_latent_attention_and_hybrids(tmp_path):
    assert examine_model(str(save_base(tmp_path / "mla", "deepseek_v3")))["layers"]["latent"] == [0, 1, 2, 3]
    report = examine_model(str(save_base(tmp_path / "hybrid", "nemotron_h")))
    assert report["layers"]["softmax_attention"] == [2]
    assert report["preset"]["oeb_layers"] == report["preset"]["smi_layers"] == [2]
    assert "(1 with softmax attention)" in report["architecture"]


def test_the_reasoner(capsys):
    report = told(capsys, "reasoner")
    assert report["supported"]
    assert report["markers"]["template_opens_thinking"] is True
    assert main(["doctor", "reasoner"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "supported       yes" in lines
    assert "thinking        starts at the end of the prompt" in lines
    assert max(map(len, lines)) <= 120


def test_presets_that_fit(tmp_path):
    preset = next(preset for preset in list_presets() if preset.name == "qwen3-0.6b")
    config = tiny_config("qwen3", **{key: value for key, value in preset.architecture.to_dict().items()
                                     if key.startswith("num_")}, layer_types=["full_attention"] * 28)  # fmt: skip
    config.save_pretrained(tmp_path)
    report = examine_model(str(tmp_path))
    assert "qwen3-0.6b" in report["fitting_presets"]
    assert report["preset"]["oeb_layers"] == list(range(7))
    assert "cannot write the marker '<think>'" in report["markers"]["problem"]  # there are no tokenizer files
    assert "qwen3-0.6b" in render_model(report)


def test_an_unsupported_model(tmp_path, capsys):
    tiny_model("falcon").save_pretrained(tmp_path)
    report = told(capsys, tmp_path, status=1)
    assert not report["supported"]
    assert "does not use Transformers' attention interface" in report["reason"]
    assert "docs/architectures.md" in report["hint"]
    assert main(["doctor", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "supported       NO" in text
    assert "attention interface" in text


def test_no_language_model(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    report = told(capsys, tmp_path, status=1)
    assert "no causal language model" in report["reason"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "no-such-type"}', "{}"])
def test_what_cannot_be_read(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["doctor", str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert "error: the config of" in error
    assert "hint: give a folder" in error
    with pytest.raises(StepFlowFileError):
        examine_model(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("template", "opens", "problem"),
    [
        ("{{ messages[0].content }}", False, None),
        ("{{ raise_exception('no') }}", None, "cannot be filled in: no"),
        ("{% if %}", None, "cannot be filled in"),
        (None, None, "no chat template"),
    ],
)
def test_chat_templates(tmp_path, template, opens, problem):
    folder = save_base(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    markers = examine_model(str(folder))["markers"]
    assert markers["template_opens_thinking"] is opens
    assert markers["problem"] is None if problem is None else problem in markers["problem"]


def test_a_broken_tokenizer(tmp_path):
    folder = save_base(tmp_path / "model")
    shutil.copy(folder / "config.json", folder / "tokenizer.json")
    report = examine_model(str(folder))
    assert report["supported"]
    assert "no tokenizer could be loaded" in report["markers"]["problem"]


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--help"])
    assert caught.value.code == 0
    assert "Exit status 0" in capsys.readouterr().out


def test_it_says_by_which_markers_answers_are_judged(tmp_path, capsys):
    report = told(capsys, "reasoner")["markers"]
    assert report["judged_by"].startswith(
        "thinking starts after '<think>', the summary after '</think>'; the answer is"
    )
    assert report["unknown"] == []
    folder = save_base(tmp_path / "model", "gpt_oss")
    assert told(capsys, folder)["markers"]["unknown"] == ["<|channel|>analysis<|message|>"]
    assert main(["doctor", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "eval judges by  thinking starts after '<|channel|>analysis<|message|>', the summary after" in text
    assert "warning         neither the vocabulary nor the chat template has '<|channel|>analysis<|message|>'" in text
