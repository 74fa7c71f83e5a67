"""`hf-stepflow diagnose` as a user types it, on the embedded reasoner."""

import json
from pathlib import Path

import pytest
import torch

from hf_stepflow import StepSaliency, load_problems, load_reasoner, step_saliency
from hf_stepflow.cli import main
from hf_stepflow.cli.diagnose import WrittenTrace, read_traces
from hf_stepflow.reasoner.levels import problems_of
from hf_stepflow.runtime.errors import StepFlowFileError
from tests.support.flow import byte_tokenizer
from tests.support.tiny_models import tiny_model

QUESTION = load_problems("reasoner:chains-2", 1)[0].question


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Two files of four traces, `correct.jsonl` and `wrong.jsonl`."""
    for name, start in (("correct", 0), ("wrong", 4)):
        problems = problems_of("chains-2", "calibration", 4, start)
        lines = [json.dumps({"prompt": one.question, "response": one.response}) for one in problems]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_prompt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "maps.safetensors"
    assert main(["diagnose", "--model", "reasoner", "--prompt", QUESTION, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "1 question" in text
    assert max(map(len, text.splitlines()[:12])) <= 80
    maps = StepSaliency.load(out)
    assert maps.steps[0].label == "question"
    assert maps.steps[-1].label == "summary"
    assert maps.layers == list(range(8))


def test_a_prompt_is_looked_at_in_the_tokens_that_the_model_wrote(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path / "model")
    prompt = torch.tensor([tokenizer.encode("Two eggs?")])
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24)[0]
    # Bytes of which some are no character: as text they are not what the model wrote.
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != ids.tolist()
    out = tmp_path / "maps.safetensors"
    words = ["diagnose", "--model", str(tmp_path / "model"), "--prompt", "Two eggs?", "--max-new-tokens", "24"]
    assert main([*words, "--implicit-thinking", "--out", str(out)]) == 0
    found = StepSaliency.load(out)
    expected = step_saliency(
        model, ids, tokenizer=tokenizer, config={"implicit_thinking": True}, prompt_length=prompt.shape[1]
    )
    assert found.steps == expected.steps
    assert found.steps[0].end == prompt.shape[1]
    assert torch.equal(found.maps, expected.maps)


@pytest.mark.parametrize("suffix", [".html", ".png", ".svg"])
def test_a_trace_in_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str) -> None:
    _, tokenizer = load_reasoner()
    problem = problems_of("chains-2", "calibration", 1)[0]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.question}], add_generation_prompt=True, tokenize=False
    )
    (tmp_path / "trace.txt").write_text(prompt + problem.response)
    out = tmp_path / f"report{suffix}"
    words = ["diagnose", "--model", "reasoner", "--trace", str(tmp_path / "trace.txt"), "--out", str(out), "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert {step["label"] for step in told["steps"]} == {"question", "thinking", "summary"}
    assert len(told["indices"]["lock_in"]) == 8
    assert out.stat().st_size > 5000


def test_with_stepflow_on(capsys: pytest.CaptureFixture[str], tmp_path: Path, written: Path) -> None:
    (tmp_path / "one.jsonl").write_text((written / "wrong.jsonl").read_text().splitlines()[0])
    (tmp_path / "stepflow.json").write_text(json.dumps({"tau_max": 0.5}))
    words = ["diagnose", "--model", "reasoner", "--trace", str(tmp_path / "one.jsonl"), "--json"]
    told = []
    for more in ([], ["--stepflow", str(tmp_path / "stepflow.json")]):
        assert main([*words, *more]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["about"]["stepflow"] is None
    assert told[1]["about"]["stepflow"]["tau_max"] == 0.5
    assert told[1]["indices"]["question"] != told[0]["indices"]["question"]


def test_right_against_wrong(capsys: pytest.CaptureFixture[str], written: Path) -> None:
    files = [str(written / "correct.jsonl"), str(written / "wrong.jsonl")]
    words = ["diagnose", "--model", "reasoner", "--compare", *files]
    assert main([*words, "--paired", "--out", str(written / "profile.png")]) == 0
    assert "lock" in capsys.readouterr().out
    assert (written / "profile.png").stat().st_size > 5000
    assert main([*words, "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trace", "{}/nothing.txt"], "cannot be read"),
        (["--trace", "{}/empty.txt"], "is empty"),
        (["--trace", "{}/wrong.jsonl"], "holds 4 traces"),
        (["--prompt", "x", "--out", "report.docx"], "--out must end in"),
        (["--prompt", "x", "--out", "{}/no/report.html"], "no folder"),
        (["--compare", "{}/correct.jsonl", "{}/short.jsonl", "--paired"], "same length"),
        (["--compare", "{}/correct.jsonl", "{}/wrong.jsonl", "--out", "{}/a.html"], "--out must end in"),
        (["--prompt", "x", "--paired"], "--paired needs --compare"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens must be 1 or more"),
        (["--prompt", "  "], "--prompt is empty"),
        (["--trace", "{}/text.txt", "--implicit-thinking"], "does not say where"),
        (["--prompt", "x", "--stepflow", "no-such-preset"], "no-such-preset"),
        (["--prompt", "x", "--stepflow", "tau_max=2"], "tau_max must be a number in [0, 1], got 2"),
        (["--prompt", "x", "--steps", "{}/s.json", "--stepflow", "{}/s.json"], "both say"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], written: Path, words: list[str], message: str) -> None:
    (written / "empty.txt").write_text("\n")
    (written / "short.jsonl").write_text((written / "wrong.jsonl").read_text().splitlines()[0])
    (written / "s.json").write_text("{}")
    (written / "text.txt").write_text("Why? So.")
    assert main(["diagnose", "--model", "reasoner", *[word.replace("{}", str(written)) for word in words]]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"prompt": "a"}',
        '{"response": "a"}',
        '{"text": "a", "response": "a"}',
        '{"prompt": 3, "response": "a"}',
        '{"text": ""}',
    ],
)
def test_lines_that_are_no_trace(tmp_path: Path, line: str) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n\n" + line + "\n")
    with pytest.raises(StepFlowFileError, match="line 3"):
        read_traces(path)


def test_texts_are_read_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text("\ufeffWhy?<think>So.</think>Thus.", encoding="utf-8")
    assert read_traces(path) == [WrittenTrace(None, "Why?<think>So.</think>Thus.")]
    for name in ("traces.jsonl", "TRACES.JSONL"):
        path = tmp_path / name
        path.write_text(json.dumps({"text": "One\u2028line."}, ensure_ascii=False), encoding="utf-8")
        assert read_traces(path) == [WrittenTrace(None, "One\u2028line.")]
