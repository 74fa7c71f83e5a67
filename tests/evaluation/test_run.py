"""The paired runner: the same for every arm, resumable after a kill, and nothing left behind on the model."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_stepflow.cli import main
from hf_stepflow.evaluation.arms import Arm, make_arms, parse_arm
from hf_stepflow.evaluation.page import write_report
from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.evaluation.result import EvaluationResult
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.evaluation.sampler import Sampler
from hf_stepflow.evaluation.store import ResultStore, read_results
from hf_stepflow.problems import load_problems
from hf_stepflow.reasoner import FOLDER, load_reasoner
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowFileError, StepFlowInputError
from tests.support.flow import byte_tokenizer
from tests.support.tiny_models import tiny_model

PROBLEMS = [*load_problems("reasoner:chains-2", 6), *load_problems("reasoner:chains-4", 6)]
ARMS = {"base": False, "stepflow": {"tau_max": 0.3, "alpha": 0.1}}


@pytest.fixture(scope="module")
def reasoner():
    return load_reasoner()


def run(reasoner, **options) -> EvaluationResult:
    options = {"problems": PROBLEMS, "arms": ARMS, "max_new_tokens": 200, "progress": False, **options}
    return evaluate(reasoner[0], **options)


def responses_of(result: EvaluationResult) -> list[dict]:
    """The results without fields that depend on the clock, the batches, or the last digits of sums."""
    ordered = sorted(result.results, key=lambda one: (one["arm"], one["problem"], one["sample"]))
    return [
        {key: value for key, value in one.items() if key not in ("seconds", "batch", "of", "stepflow")}
        for one in ordered
    ]


def test_arms_run_on_the_same_problems(reasoner) -> None:
    result = run(reasoner)
    assert result.is_complete
    assert [one.name for one in result.arms()] == ["base", "stepflow"]
    for name in ARMS:
        own = [one for one in result.results if one["arm"] == name]
        assert sorted(one["problem"] for one in own) == sorted(problem.id for problem in PROBLEMS)
        assert all(("stepflow" in one) is (name == "stepflow") for one in own)
        assert all(one["tokens"] > 5 and one["steps"] >= 1 for one in own)
    strong = [one["stepflow"] for one in result.results if one["arm"] == "stepflow"]
    assert all(one["mass_after"] > one["mass_before"] for one in strong)
    assert any(one["injections"] for one in strong)
    (comparison,) = result.comparisons
    assert comparison.changed > 0
    text = str(result)
    assert "stepflow: " in text
    assert "n = 12" in text
    json.dumps(result.to_dict())


def test_batches_and_padding_change_nothing(reasoner) -> None:
    expected = responses_of(run(reasoner, batch_size=1))
    assert responses_of(run(reasoner, batch_size=5)) == expected
    assert responses_of(run(reasoner, batch_size=12, problems=PROBLEMS[::-1])) == expected


def test_it_answers_as_generate_does(reasoner) -> None:
    model, tokenizer = reasoner
    result = run(reasoner, problems=PROBLEMS[-1:])
    messages = [{"role": "user", "content": PROBLEMS[-1].question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for one in result.results:
        ids = model.generate(**inputs, max_new_tokens=200, do_sample=False, stepflow=ARMS[one["arm"]])
        assert tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]) == one["text"]


def test_samples_are_drawn_by_the_seed(reasoner) -> None:
    options = {"do_sample": True, "temperature": 1.5, "n_samples": 3, "problems": PROBLEMS[:4], "batch_size": 5}
    first = run(reasoner, seed=1, **options)
    state = torch.get_rng_state()
    assert responses_of(run(reasoner, seed=1, **options)) == responses_of(first)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's randomness is not used up
    other = run(reasoner, seed=2, **options)
    assert [one["text"] for one in other.results] != [one["text"] for one in first.results]
    assert len(first.results) == 2 * 4 * 3
    # Arms that do the same draw the same: seeds are shared, which is what makes them pairs.
    twins = run(reasoner, arms={"one": False, "two": False}, seed=1, **options)
    texts = {name: [row["text"] for row in responses_of(twins) if row["arm"] == name] for name in ("one", "two")}
    assert texts["one"] == texts["two"]


def test_baselines(reasoner) -> None:
    arms = {
        "base": False,
        "vote": Arm(samples=5, temperature=1.0),
        "budget": Arm(max_steps=2),
        "thorough": Arm(min_steps=40),
        "long": Arm(length_factor=2.0),
    }
    result = run(reasoner, arms=arms, max_new_tokens=60, problems=PROBLEMS[-4:])
    by_arm = {name: [one for one in result.results if one["arm"] == name] for name in arms}
    assert all(one["steps"] <= 2 for one in by_arm["budget"])
    assert all(one["outcome"] == "unfinished" for one in by_arm["thorough"])
    assert all(one["tokens"] <= 60 for one in by_arm["base"])
    assert any(one["tokens"] > 60 for one in by_arm["long"])
    assert sum(one["tokens"] for one in by_arm["vote"]) > 2 * sum(one["tokens"] for one in by_arm["base"])


def test_the_model_is_left_as_it_was() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32").train()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    before = type(model), str(model.generation_config), model.config._attn_implementation
    result = evaluate(model, PROBLEMS[:2], tokenizer=tokenizer, max_new_tokens=20, progress=False)
    assert len(result.results) == 4
    assert (type(model), str(model.generation_config), model.config._attn_implementation) == before
    assert model.training
    with pytest.raises(StepFlowConfigError):
        evaluate(model, PROBLEMS[:2], {"far": {"oeb_layers": [99]}}, tokenizer=tokenizer, progress=False)
    assert type(model) is before[0]
    # The folder names its tokenizer, and a base arm alone needs no StepFlow.
    assert evaluate(model, PROBLEMS[:1], {"base": False}, max_new_tokens=5, progress=False).is_complete


def test_a_model_without_template_and_markers() -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    problems = [EvalProblem("1", "Two eggs?", "4"), {"id": 2, "question": "One egg more?", "answer": 5}]
    result = evaluate(model, problems, tokenizer=tokenizer, max_new_tokens=8, progress=False)
    assert {one["outcome"] for one in result.results} <= {"unfinished", "no answer", "wrong"}
    assert result.comparisons[0].paired.problems == 2


# A run that takes its time between batches, to be killed in between.
SLOW = """
import sys, time
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.evaluation.sampler import Sampler
from hf_stepflow.problems import load_problems
from hf_stepflow.reasoner import load_reasoner
kept = Sampler.run
def slow(*arguments):
    time.sleep(0.3)
    return kept(*arguments)
Sampler.run = slow
problems = [*load_problems("reasoner:chains-2", 6), *load_problems("reasoner:chains-4", 6)]
arms = {"base": False, "stepflow": {"tau_max": 0.3, "alpha": 0.1}}
evaluate(load_reasoner()[0], problems, arms, max_new_tokens=200, progress=False, batch_size=2, out=sys.argv[1])
"""


def test_a_killed_run_goes_on(reasoner, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SLOW), str(out)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not out.exists() or out.read_bytes().count(b"\n") < 5):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    _, kept, _ = read_results(out)
    assert 4 <= len(kept) < 24
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # as a crash in the middle of a batch's write leaves it
    kept = kept[: len(kept) - kept[-1]["of"]]
    partial = EvaluationResult.load(out)
    assert partial.results == kept
    assert not partial.is_complete
    assert "Not finished" in str(partial)
    whole = run(reasoner, batch_size=2, out=out)
    assert whole.is_complete
    assert read_results(out)[1][: len(kept)] == kept
    assert len(read_results(out)[1]) == 24
    assert responses_of(EvaluationResult.load(out)) == responses_of(run(reasoner, batch_size=2))


def test_a_budget_follows_the_steps_of_its_arm() -> None:
    """Where the arm's own settings say what is a step, the budget counts those."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    rules = {"implicit_thinking": True, "thinking_start": None, "min_step_chars": 4}
    arms = {"base": False, "short": Arm(stepflow=rules, max_steps=2), "idle": Arm(max_steps=2)}
    template = {"chat_template": "{{ messages[0]['content'] }}"}  # without <think>
    result = evaluate(
        model, PROBLEMS[-2:], arms, tokenizer=tokenizer, max_new_tokens=60, progress=False, template=template
    )
    steps = {name: [one["steps"] for one in result.results if one["arm"] == name] for name in arms}
    assert all(0 < number <= 2 for number in steps["short"])
    assert steps["idle"] == [0, 0]


def test_beams_are_judged_without_a_report(reasoner) -> None:
    result = run(reasoner, problems=PROBLEMS[:3], num_beams=2, max_new_tokens=60)
    assert len(result.results) == 6
    assert not any("stepflow" in one for one in result.results)


def test_a_change_of_the_generation_config_is_another_run(reasoner, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    run(reasoner, problems=PROBLEMS[:1], out=out, max_new_tokens=10)
    reasoner[0].generation_config.repetition_penalty = 5.0
    try:
        with pytest.raises(StepFlowInputError, match=r"generation_config.repetition_penalty: .* there, 5.0 now"):
            run(reasoner, problems=PROBLEMS[:1], out=out, max_new_tokens=10)
    finally:
        reasoner[0].generation_config.repetition_penalty = None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 5}, "seed: 0 there, 5 now"),
        ({"problems": PROBLEMS[1:]}, "n_problems: 12 there, 11 now"),
        (
            {"arms": {"base": False, "stepflow": {"tau_max": 0.5}}},
            "arms.stepflow.stepflow.tau_max: 0.3 there, 0.5 now",
        ),
        ({"arms": dict(reversed(ARMS.items()))}, "arms in another order"),
        ({"max_new_tokens": 100}, "max_new_tokens"),
    ],
)
def test_another_run_is_not_mixed_in(reasoner, tmp_path: Path, change: dict, words: str) -> None:
    out = tmp_path / "results.jsonl"
    header = run(reasoner, problems=PROBLEMS, out=None, max_new_tokens=1).run | {"max_new_tokens": 200}
    ResultStore(out, header)
    before = out.read_bytes()
    with pytest.raises(StepFlowInputError, match=f"holds another run.*{words}"):
        run(reasoner, out=out, **change)
    assert out.read_bytes() == before


def test_files_that_are_no_results(reasoner, tmp_path: Path) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("my notes\n")
    with pytest.raises(StepFlowFileError, match="not JSON"):
        run(reasoner, out=out)
    out.write_text('{"a": 1}\n')
    with pytest.raises(StepFlowFileError, match="not a results file"):
        run(reasoner, out=out)
    assert out.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"problems": []}, "no problems"),
        ({"problems": [PROBLEMS[0]] * 2}, "comes twice"),
        ({"arms": {}}, "at least one entry"),
        ({"arms": {"x": 3}}, "must be False, True"),
        ({"n_samples": 2}, "do_sample=True"),
        ({"batch_size": 0}, "at least 1"),
        ({"max_new_tokens": 8192}, r"has 8192 positions\n.*max_new_tokens of at most"),
        ({"n_samples": 2.5, "do_sample": True}, "n_samples must be a whole number of at least 1, got 2.5"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"do_sample": True, "temperature": 0}, "temperature must be a number above 0, got 0"),
        ({"do_sample": True, "temperature": -0.5}, "temperature must be a number above 0, got -0.5"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be a number above 0, got nan"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"problems": [EvalProblem("1", "?", "five", kind="number")]}, "not a number"),
        ({"problems": [EvalProblem("1", "?", "-", tests='[["1", "1"]]', kind="code")]}, "run_code=True"),
        ({"streamer": object()}, "JSON-ready"),
        ({"arms": {"x": {"tau": 0.1}}}, "tau"),
    ],
)
def test_bad_arguments(reasoner, options: dict, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "run", lambda *_: pytest.fail("it generates"))
    with pytest.raises((StepFlowInputError, StepFlowConfigError), match=words):
        run(reasoner, **options)


def test_arms_of_the_command_line() -> None:
    assert parse_arm("base") == ("base", Arm())
    assert parse_arm("stepflow") == ("stepflow", Arm(stepflow=True))
    name, arm = parse_arm("wide=stepflow:tau_max=0.15,oeb_layers=[0,1,2],smi_layers=top:0.5,implicit_thinking=true")
    assert name == "wide"
    assert arm.stepflow == {
        "tau_max": 0.15,
        "oeb_layers": [0, 1, 2],
        "smi_layers": "top:0.5",
        "implicit_thinking": True,
    }
    both = parse_arm("self-consistency:samples=3,tau_max=0.2")
    assert both == ("self-consistency:samples=3,tau_max=0.2", Arm(stepflow={"tau_max": 0.2}, samples=3))
    assert parse_arm("budget-forcing:max_steps=4")[1] == Arm(max_steps=4)
    assert make_arms({"a": Arm(samples=2), "b": True})["b"] == Arm(stepflow=True)
    bad = "beam", "base:tau_max=1", "stepflow:tau_max", "budget-forcing", "budget-forcing:min_steps=3,max_steps=1"
    for text in (*bad, "self-consistency:samples=x", "self-consistency:samples=2.5", "longer:length_factor=long"):
        with pytest.raises((StepFlowInputError, StepFlowConfigError)):
            parse_arm(text)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = tmp_path / "results.jsonl", tmp_path / "report.html"
    words = [
        "eval",
        "--model",
        "reasoner",
        "--problems",
        "reasoner:chains-2",
        "--limit",
        "4",
        "--max-new-tokens",
        "80",
    ]
    arms = ["--arm", "base", "--arm", "stepflow:tau_max=0.9"]
    assert main([*words, *arms, "--out", str(out), "--report", str(report)]) == 0
    assert "stepflow:tau_max=0.9: " in capsys.readouterr().out
    page = report.read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http-equiv", "")
    assert main([*words, *arms, "--out", str(out), "--json"]) == 0  # everything is there already
    assert json.loads(capsys.readouterr().out)["is_complete"]
    assert main([*words, "--arm", "beam"]) == 2
    assert "hint: kinds: base" in capsys.readouterr().err
    assert main([*words, "--arm", "base", "--arm", "base"]) == 2
    assert main(["eval", "--model", "no/such/folder", "--problems", "reasoner:chains-2"]) == 2
    assert "could not be loaded" in capsys.readouterr().err
    assert main([*words, "--report", str(tmp_path / "no" / "page.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main([*words, "--temperature", "-1"]) == 2
    assert "--temperature must be 0 or more, got -1.0" in capsys.readouterr().err
    assert main([*words, "--stepflow", "tau=0.1"]) == 2
    assert "unknown StepFlow setting 'tau'" in capsys.readouterr().err
    assert main([*words, "--device", "warp"]) == 2
    assert "could not be moved" in capsys.readouterr().err


def test_without_math_verify_it_is_refused_at_once(reasoner, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr("hf_stepflow.evaluation.sampler.Sampler.run", None)  # nothing is generated
    with pytest.raises(StepFlowInputError, match=r"needs math-verify.*\n.*hf-stepflow\[eval\]"):
        run(reasoner)


def test_the_report_escapes_what_a_model_wrote(tmp_path: Path) -> None:
    arm = Arm().to_dict()
    header = {"arms": {"base": arm, "<b>": arm}, "n_problems": 1, "n_samples": 1, "seed": 0, "dtype": "float32"}
    header["max_new_tokens"] = 9
    row = {"problem": "1", "sample": 0, "batch": 0, "tokens": 3, "seconds": 1.0, "steps": 1, "answer": None}
    results = [
        {**row, "arm": "base", "outcome": "correct", "right": True, "text": "<script>alert(1)</script>"},
        {**row, "arm": "<b>", "outcome": "wrong", "right": False, "text": "</pre><img src=x>"},
    ]
    write_report(EvaluationResult(header, {}, results), [EvalProblem("1", "<i>?", "2")], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page


def test_right_responses_come_with_problems_and_are_never_shown(reasoner, tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"id": 1, "question": "2 + 2?", "answer": 4, "trace": "So 4.</think> It is 4."}))
    (problem,) = load_problems(path)
    assert problem.trace == "So 4.</think> It is 4."
    assert "So 4" not in problem.prompt
    assert "So 4" not in json.dumps(problem.asked())
    assert all(one.trace.endswith(f"The answer is {one.answer}.") for one in PROBLEMS)
    path.write_text(json.dumps({"id": 1, "question": "2 + 2?", "answer": 4, "trace": ["So 4."]}))
    with pytest.raises(StepFlowFileError, match="trace of problem '1' must be"):
        load_problems(path)


def test_token_ids_are_kept_where_asked_for(reasoner) -> None:
    tokenizer = reasoner[1]
    kept = run(reasoner, arms={"base": False}, keep_ids=True)
    assert all(tokenizer.decode(one["ids"]) == one["text"] for one in kept.results)
    assert not any("ids" in one for one in run(reasoner, arms={"base": False}).results)


def test_inside_a_block_that_says_when_stepflow_is_on_it_is_refused(reasoner) -> None:
    """Arms with StepFlow would run without it, and be reported as if they had."""
    model, _ = reasoner
    for block in (model.disable_stepflow(), model.use_stepflow({"tau_max": 0.3})):
        with block, pytest.raises(StepFlowInputError, match=r"disable_stepflow or use_stepflow\n.*outside"):
            run(reasoner)
