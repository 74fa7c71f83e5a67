"""`hf-stepflow generate` as a user types it, on the embedded reasoner."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_stepflow import StepFlowModelForCausalLM, StepVocabulary, load_problems, load_reasoner, segment_trace
from hf_stepflow.cli import generate, main, terminal
from hf_stepflow.cli.terminal import StepPrinter
from hf_stepflow.prompts import encode_prompt
from hf_stepflow.reasoner import FOLDER
from hf_stepflow.runtime.errors import StepFlowInputError
from tests.support.flow import TRACES, byte_tokenizer, encode

QUESTION = load_problems("reasoner:chains-2", 1)[0].question
ASK = ["generate", "--model", "reasoner", "--prompt", QUESTION]


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    """The one JSON object that a call prints."""
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def expected(settings: dict | None, **options) -> list[int]:
    """Token ids of the answer by the library alone; None: of the base."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")
    if settings is not None:
        StepFlowModelForCausalLM.attach(model, settings, tokenizer=tokenizer)
    ids = torch.tensor([encode_prompt(tokenizer, QUESTION)])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **{"max_new_tokens": 2048} | options)
    return made[0, ids.shape[1] :].tolist()


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    prompt, ids = encode_prompt(tokenizer, QUESTION), expected({})
    steps = [step for step in segment_trace(tokenizer, prompt + ids).steps if step.label != "question"]
    assert main(ASK) == 0
    shown = capsys.readouterr().out
    answer, length, report = shown.split("\n\n")
    lines = [f"{step.index:>4}  {step.text.strip()}" for step in steps]
    lines.insert(-1, "      </think>")
    assert answer.splitlines() == lines
    assert length.startswith(f"{len(ids)} tokens in ")
    assert "cut off" not in length
    assert report.startswith(f"Row 0: {len(steps) - 1} thinking steps, 1 summary steps\n")
    assert "bridge mass" in report
    assert "\x1b" not in shown


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    data = told(capsys, *ASK)
    tokenizer, ids = AutoTokenizer.from_pretrained(FOLDER), expected({})
    assert data["prompt"] == QUESTION
    assert data["text"] == tokenizer.decode(ids[:-1])
    assert data["summary"].startswith("The answer is")
    assert data["tokens"] == len(ids)
    assert data["seconds"] > 0
    assert data["is_finished"]
    assert data["settings"]["tau_max"] == 0.15
    assert [step["index"] for step in data["steps"]] == list(range(1, len(data["steps"]) + 1))
    assert [step["label"] for step in data["steps"][-2:]] == ["thinking", "summary"]
    assert "".join(step["text"] for step in data["steps"][:-1]) == data["text"].split("</think>")[0]
    assert any(layer["injections"] for layer in data["report"]["rows"][0]["layers"])


def test_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = {"tau_max": 0.9, "alpha": 0.0, "oeb_layers": [0, 1, 2]}
    (tmp_path / "strong.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = tokenizer.decode(expected(settings, max_new_tokens=40))
    for source in (str(tmp_path / "strong.json"), "tau_max=0.9,alpha=0,oeb_layers=[0,1,2]"):
        data = told(capsys, *ASK, "--stepflow", source, "--max-new-tokens", "40")
        assert data["text"] == text
        assert data["settings"]["oeb_layers"] == [0, 1, 2]
        assert not data["is_finished"]
    assert main([*ASK, "--stepflow", "auto", "--max-new-tokens", "5"]) == 0
    assert "5 tokens in" in capsys.readouterr().out


def test_off(capsys: pytest.CaptureFixture[str]) -> None:
    data = told(capsys, *ASK, "--stepflow", "off")
    assert data["text"] == AutoTokenizer.from_pretrained(FOLDER).decode(expected(None)[:-1])
    assert data["settings"] is None
    assert data["report"] is None
    assert len(data["steps"]) > 2
    assert main([*ASK, "--stepflow", "off"]) == 0
    assert "   1  " in capsys.readouterr().out


def test_the_settings_that_a_model_was_saved_with(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, _ = load_reasoner({"tau_max": 0.4})
    model.save_pretrained(tmp_path / "whole")
    words = ["generate", "--model", str(tmp_path / "whole"), "--prompt", QUESTION, "--max-new-tokens", "5"]
    assert told(capsys, *words)["settings"]["tau_max"] == 0.4
    # A preset has no weights.
    model.save_pretrained(tmp_path / "preset", preset_only=True)
    assert main(["generate", "--model", str(tmp_path / "preset"), "--prompt", QUESTION]) == 2
    assert f"hint: --model {FOLDER} --stepflow {tmp_path / 'preset'}" in capsys.readouterr().err


def test_both_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*ASK, "--compare", "--stepflow", "tau_max=0.9", "--max-new-tokens", "60"]
    data = told(capsys, *words)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert data["base"]["text"] == tokenizer.decode(expected(None)[:-1])
    assert data["stepflow"]["text"] == tokenizer.decode(expected({"tau_max": 0.9}, max_new_tokens=60))
    assert data["base"]["report"] is None
    assert data["stepflow"]["report"]["rows"]
    first = data["first_difference"]
    sides = [data[name]["steps"][first]["text"] for name in ("base", "stepflow")]
    assert sides[0] != sides[1]
    assert all(data["base"]["steps"][place] == data["stepflow"]["steps"][place] for place in range(first))
    assert main(words) == 0
    shown = capsys.readouterr().out
    parts = ("Base model\n", "With StepFlow\n", f"First difference: step {first + 1}\n")
    assert sorted(parts, key=shown.index) == list(parts)
    assert f"  With StepFlow  {sides[1].strip()}\n" in shown
    assert "cut off by --max-new-tokens" in shown
    # Where StepFlow does too little to change anything.
    assert main([*ASK, "--compare", "--stepflow", "tau_max=0,alpha=0"]) == 0
    shown = capsys.readouterr().out
    assert "No difference: " in shown
    assert "its settings ask for nothing" in shown


def test_sampling(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*ASK, "--max-new-tokens", "30", "--temperature", "9"]
    first = told(capsys, *words, "--seed", "1")["text"]
    assert told(capsys, *words, "--seed", "1")["text"] == first
    assert told(capsys, *words, "--seed", "2")["text"] != first
    greedy = AutoTokenizer.from_pretrained(FOLDER).decode(expected({}, max_new_tokens=30))
    assert first != greedy
    assert told(capsys, *words, "--seed", "1", "--top-p", "1e-6")["text"] == greedy
    assert told(capsys, *words[:-1], "0")["text"] == greedy


def test_where_the_prompt_is_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["--stepflow", "off", "--max-new-tokens", "1"]
    question = "Ann has 4 points.\nHow many points does Ann have?"
    (tmp_path / "question.txt").write_text(f"\ufeff{question}\n", encoding="utf-8")
    words = ["generate", "--model", "reasoner", *short]
    assert told(capsys, *words, "--prompt-file", str(tmp_path / "question.txt"))["prompt"] == question
    for source in ("--prompt", "--prompt-file"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n"))
        assert told(capsys, *words, source, "-")["prompt"] == question


def test_what_the_model_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    given = []

    def take(sampler, ids, *rest) -> None:
        given.append(ids)
        raise StepFlowInputError("that will do")

    monkeypatch.setattr(terminal, "answer", take)
    for more in ([], ["--system", "Be brief."], ["--no-chat-template"]):
        assert main([*ASK, *more]) == 2
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    with_system = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert given == [encode_prompt(tokenizer, QUESTION), with_system, tokenizer.encode(QUESTION)]
    assert len({len(ids) for ids in given}) == 3
    tokenizer.chat_template = None
    with pytest.raises(StepFlowInputError, match="needs a chat template"):
        encode_prompt(tokenizer, QUESTION, system="Be brief.")


def test_no_thinking(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASK, "--stepflow", "thinking_start=<|pad|>", "--max-new-tokens", "8"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("      Zoe has 3 more than Hal.")
    assert "no thinking was found.\n`hf-stepflow doctor reasoner`" in shown


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ([], "expected one of --prompt and --prompt-file, got neither", "--prompt TEXT"),
        (["--prompt", "x", "--prompt-file", "y"], "got both", "--prompt TEXT"),
        (["--prompt", " \n"], "the prompt is empty: --prompt holds no text", "ask something"),
        (["--prompt-file", "{}/empty.txt"], "empty.txt' holds no text", "ask something"),
        (["--prompt-file", "{}/none.txt"], "No such file", "UTF-8"),
        (["--prompt-file", "{}/latin.txt"], "the prompt cannot be read", "UTF-8"),
        (["--prompt", "\udcff"], "the prompt cannot be read", "UTF-8"),
        (["--prompt", "x", "--stepflow", "qwen3-8"], "there is no preset 'qwen3-8'", "did you mean 'qwen3-8b'?"),
        (["--prompt", "x", "--stepflow", "tau_max=2"], "tau_max must be a number in [0, 1], got 2", None),
        (["--prompt", "x", "--stepflow", "tau=0.1"], "unknown StepFlow setting 'tau'", "did you mean 'tau_max'?"),
        (["--prompt", "x", "--stepflow", "tau_max=0.1,alpha"], "expected KEY=VALUE, got 'alpha'", "for instance"),
        (["--prompt", "x", "--stepflow", "{}/bad.json"], "alpha must be a number in [-100, 100]", None),
        (["--prompt", "x", "--max-new-tokens", "-1"], "--max-new-tokens must be 1 or more, got -1", None),
        (["--prompt", "x", "--temperature", "-0.5"], "--temperature must be 0 or more, got -0.5", "0 is greedy"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature must be 0 or more, got nan", "0 is greedy"),
        (["--prompt", "x", "--top-p", "1.5"], "--top-p must be above 0 and at most 1, got 1.5", "for instance"),
        (["--prompt", "x", "--compare", "--stepflow", "off"], "--compare needs StepFlow", "leave one of them out"),
        (["--prompt", "x", "--system", "y", "--no-chat-template"], "--system needs the chat template", "leave out"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    message: str,
    hint: str | None,
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.json").write_text(json.dumps({"alpha": "much"}))
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("the model was loaded"))
    assert main(["generate", "--model", "reasoner", *[word.replace("{}", str(tmp_path)) for word in words]]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    error, *rest = shown.err.splitlines()
    assert message in error
    assert len(rest) == (hint is not None)
    assert hint is None or rest[0].startswith("hint: ")
    assert hint is None or hint in rest[0]


def test_what_only_the_model_tells(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*ASK, "--max-new-tokens", "9000"]) == 2
    error = capsys.readouterr().err
    assert "this model has 8192 positions" in error
    assert "hint: --max-new-tokens 8" in error
    assert main([*ASK, "--stepflow", "qwen3-8b"]) == 2
    assert "is for qwen3 with 36 layers" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "x", "--system", "y"]) == 2
    assert "refuses: no system role here\nhint: leave out --system" in capsys.readouterr().err


def test_it_can_be_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "load", interrupt)
    assert main(ASK) == 130
    assert capsys.readouterr().err == "\nhf-stepflow: interrupted\n"


class Terminal(io.StringIO):
    """What says of itself that it is a terminal."""

    def isatty(self) -> bool:
        return True


def printed(text: str, out: io.StringIO) -> str:
    """A trace's response, token by token, through the printer."""
    tokenizer = byte_tokenizer()
    question, marker, response = text.partition("<think>")
    printer = StepPrinter(tokenizer, StepVocabulary.from_tokenizer(tokenizer), [2], out)
    for _ in range(2):  # it is ready for another answer
        printer.put(torch.tensor([encode(question + marker)]))
        for token in encode(response + "<eos>"):
            printer.put(torch.tensor([token]))
        printer.end()
    one, other = out.getvalue()[: len(out.getvalue()) // 2], out.getvalue()[len(out.getvalue()) // 2 :]
    assert one == other
    return one


def test_steps_have_lines_of_their_own() -> None:
    assert printed(TRACES[0], io.StringIO()) == (
        "   1  Bob has three more than Ann.\n"
        "   2  So it is seven then.\n"
        "   3  Wait, check that again please.\n"
        "   4  Yes it is right.\n"
        "      </think>\n"
        "   5  The answer is 7.\n"
        "   6  That is all of it.\n"
    )
    # Lines inside of a step stand under it; characters of several bytes appear as a whole.
    text = "Why?<think>Because of\nthe café, so it says. And of 東京 as well.\n\n\n</think>\n\nSo."
    assert printed(text, io.StringIO()) == (
        "   1  Because of\n      the café, so it says.\n   2  And of 東京 as well.\n      </think>\n   3  So.\n"
    )
    assert printed("Why?<think>", io.StringIO()) == ""


def test_thinking_is_dimmed_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = printed(TRACES[1], io.StringIO())
    shown = printed(TRACES[1], Terminal())
    assert shown.replace("\x1b[2m", "").replace("\x1b[0m", "") == plain
    thinking, summary = shown.split("Nine")
    assert "\x1b[2m   1  F\x1b[0m" in thinking
    assert "\x1b" not in summary
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(TRACES[1], Terminal()) == plain
