"""README.md and the quickstart: their Python runs as it is written, and the figures are those of committed outputs.

Only ids and the question are replaced: a Hub on the loopback serves the ids, and the embedded reasoner understands the
question.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_stepflow import StepFlowModelForCausalLM, segment_trace
from hf_stepflow.hub.push import push_preset
from hf_stepflow.reasoner import FOLDER
from tests.support.presets import edited, written

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
FIRST, ATTACHED, STEPS, LOADED, PIPELINE = BLOCK.findall(README)
BASE, PRESET = "org/Reasoner", "test-org/preset"
STANDS_FOR = {
    "Qwen/Qwen3-8B": BASE,
    "your-name/qwen3-8b-stepflow": PRESET,
    "A shop sells pens at 3 for 2 euros. What do 12 pens cost?": (
        "Ben has 4 points. Ann has 3 more than Ben. How many points does Ann have?"
    ),
}
SETTINGS = {"tau_max": 0.15, "alpha": 0.06}

# Runs programs, each made of blocks, and prints what each printed and the model that it leaves.
RUN = """
import contextlib, io, json, os, sys
os.chdir(given["folder"])
if given["alone"]:
    sys.modules["hf_stepflow"] = None  # as where transformers alone is installed
import torch
torch.set_num_threads(1)
torch.manual_seed(0)  # pipelines sample
results = []
for blocks in given["programs"]:
    names, result = {}, {"printed": []}
    for block in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block, "README.md", "exec"), names)
        result["printed"].append(printed.getvalue())
    model = names["model"] if "model" in names else names["pipe"].model
    with torch.no_grad():
        result["logits"] = model(torch.tensor([given["ids"]])).logits.float().tolist()
    result["tau_max"] = model.stepflow_config.tau_max if hasattr(model, "stepflow_config") else None
    result["ids"] = names["output"][0].tolist() if "output" in names else None
    results.append(result)
print(json.dumps(results))
"""


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture
def run(hub, tmp_path, tokenizer):
    """Runs blocks of README.md in a fresh process, for which the Hub has the embedded reasoner and a preset for it."""
    base = tmp_path / "base"
    shutil.copytree(FOLDER, base)
    generation = json.loads((base / "generation_config.json").read_text())
    generation["exponential_decay_length_penalty"] = [40, 1.5]  # a few steps, and then the end
    (base / "generation_config.json").write_text(json.dumps(generation))
    hub.api().create_repo(BASE)
    hub.api().upload_folder(repo_id=BASE, folder_path=base)
    architecture = {"model_type": "qwen3", "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    preset = edited(name="reasoner", base_model=BASE, architecture=architecture)
    push_preset(written(tmp_path, preset, "reasoner.json"), PRESET, token=hub.token)

    def run(*programs: list[str], alone: bool) -> list[dict]:
        for text, other in STANDS_FOR.items():
            assert text in README
            programs = [[block.replace(text, other) for block in blocks] for blocks in programs]
        given = {"programs": programs, "alone": alone, "ids": trace(tokenizer)[0].tolist(), "folder": str(tmp_path)}
        done = hub.run(f"given = {given!r}\n{RUN}", tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def trace(tokenizer) -> torch.Tensor:
    text = "<|user|> Who?<|end|><|assistant|><think> Sue has 4 points. So Ola has 6 points.</think> 6<|end|>"
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


@torch.no_grad()
def logits(tokenizer, **options) -> tuple[list, list]:
    """Of the trace, with StepFlow and without."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, **options)
    plain = model(trace(tokenizer)).logits.float().tolist()
    model = StepFlowModelForCausalLM.attach(model, SETTINGS, tokenizer=tokenizer)
    return model(trace(tokenizer)).logits.float().tolist(), plain


def test_the_first_screen(run, tokenizer):
    *with_stepflow, last = FIRST.splitlines()
    assert last.startswith("model.detach_stepflow()")
    on, off = run(["\n".join(with_stepflow)], [FIRST], alone=False)
    assert (on["tau_max"], off["tau_max"]) == (SETTINGS["tau_max"], None)
    assert (on["logits"], off["logits"]) == logits(tokenizer, dtype="auto")


def test_a_model_that_was_loaded(run, tokenizer):
    (result,) = run([ATTACHED, STEPS], alone=False)
    report, steps = result["printed"]
    found = segment_trace(tokenizer, result["ids"]).steps
    thinking, summary = ([step for step in found if step.label == label] for label in ("thinking", "summary"))
    assert len(thinking) > 2
    assert report.startswith(f"Row 0: {len(thinking)} thinking steps, {len(summary)} summary steps\n")
    injections = re.findall(r"^ +[67] .* (\d+) +[\d.]+$", report, re.MULTILINE)
    assert injections == [str(len(thinking) - 1 + bool(summary))] * 2
    assert re.findall(r"^ +[01] .* [\d.]+% +([\d.]+) > ([\d.]+)", report, re.MULTILINE)
    assert steps == "".join(f"{step.label} {step.index} {step.text}\n" for step in found)
    assert result["tau_max"] is None
    assert result["logits"] == logits(tokenizer, dtype="auto")[1]


def test_a_preset_repository(run, tokenizer):
    with_stepflow, without = logits(tokenizer)
    assert with_stepflow != without
    loaded, piped = run([LOADED], [PIPELINE], alone=True)
    for result in (loaded, piped):
        assert result["tau_max"] == SETTINGS["tau_max"]
        assert result["logits"] == with_stepflow
    assert loaded["printed"] == [""]
    (answer,) = piped["printed"]
    assert len(segment_trace(tokenizer, tokenizer("<think>" + answer).input_ids).steps) > 2


def test_the_quickstart(run, tokenizer):
    blocks = BLOCK.findall(QUICKSTART)
    (result,) = run(blocks, alone=False)
    printed = dict(zip(blocks, result["printed"], strict=True))
    (report,) = (text for block, text in printed.items() if "stepflow_report" in block)
    assert report.startswith("Row 0: ")
    found = segment_trace(tokenizer, result["ids"]).steps
    (steps,) = (text for block, text in printed.items() if "segment_trace" in block)
    assert len(steps.splitlines()) == len(found) > 3
    (followed,) = (text for block, text in printed.items() if "on_step" in block)
    assert followed.count("label='thinking'") >= 3
    assert result["tau_max"] is None
