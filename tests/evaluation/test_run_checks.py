"""Runs that can mean nothing are refused, stopped or warned of: by their settings, and by their first responses."""

import logging
from pathlib import Path

import pytest

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.evaluation.arms import Arm
from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.evaluation.run_checks import FEWEST, FirstResponses
from hf_stepflow.evaluation.store import read_results
from hf_stepflow.problems import load_problems
from hf_stepflow.reasoner import load_reasoner
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowInputError
from hf_stepflow.runtime.settings import FlowPlan, StepFlowSettings
from tests.support.scripted import scripted_model

OPENED = "{{ messages[0]['content'] }}\n<think>"
EGGS = [EvalProblem(str(number), f"How many eggs are {number} eggs?", "B", ("one", "two")) for number in range(12)]
EGGS = [EvalProblem(one.id, one.question, one.answer, one.choices, kind="choice") for one in EGGS]
RIGHT = "First there is one egg. Then there is another one.</think>The answer is B."


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    for name in ("hf_stepflow", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    return caplog


def run(text, arms=None, template: str = OPENED, problems=EGGS, **options):
    model, tokenizer = scripted_model(text if callable(text) else lambda _: text, template)
    options = {"max_new_tokens": 200, "progress": False, "batch_size": 6, **options}
    return evaluate(model, problems, arms or {"base": False}, tokenizer=tokenizer, **options)


def test_no_answer_in_the_first_batch_stops_the_run(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    text = "So there are eggs.</think>" + "Well. " * 55 + "I cannot tell."
    with pytest.raises(StepFlowInputError) as caught:
        run(text, out=out, max_new_tokens=400)
    assert "no answer was found in any of the first 6 finished responses of the arm 'base'" in caught.value.message
    assert "thinking starts after '<think>', the summary after '</think>'" in caught.value.message
    assert "Well. I cannot tell." in caught.value.message  # the end of a response, which is where an answer would be
    assert len(caught.value.message) < 1000
    assert "\\boxed{}" in caught.value.hint
    assert "implicit_thinking" in caught.value.hint
    assert "--no-check" in caught.value.hint
    assert len(read_results(out)[1]) == 6
    with pytest.raises(StepFlowInputError):  # without another batch
        run(lambda _: pytest.fail("it generates"), out=out, max_new_tokens=400)
    assert run(text, out=out, max_new_tokens=400, check=False).is_complete


def test_a_single_answer_lets_it_go_on() -> None:
    result = run(lambda prompt: "The answer is B." if " 3 eggs" in prompt else "Who knows.", template="{{ messages }}")
    assert result.arms()[0].outcomes == {"no answer": 11, "correct": 1}


def test_few_responses_stop_nothing(warnings) -> None:
    assert run("Who knows.", problems=EGGS[: FEWEST - 1]).is_complete
    assert "no answer was found in any of the first 3 finished responses" in warnings.text
    with pytest.raises(StepFlowInputError, match=f"first {FEWEST} finished"):
        run("Who knows.", batch_size=1)


def test_responses_that_are_cut_give_a_warning(warnings) -> None:
    assert run("And so on and so on...", max_new_tokens=21).is_complete
    assert "None of the first 6 responses of the arm 'base' ended within max_new_tokens=21" in warnings.text
    assert warnings.text.count("None of the first") == 1


@pytest.mark.parametrize(
    ("text", "template", "settings", "words"),
    [
        ("The answer is B.", "{{ messages[0]['content'] }}", {}, "the bridge and the injection .*no thinking step"),
        (
            "The answer is B.",
            "{{ messages[0]['content'] }}",
            {"alpha": 0},
            "the bridge did nothing .*no thinking step",
        ),
        ("The answer is B.", "{{ messages[0]['content'] }}", {"tau_max": 0}, "the injection did nothing"),
    ],
)
def test_stepflow_that_never_acts_stops_the_run(text: str, template: str, settings: dict, words: str) -> None:
    with pytest.raises(StepFlowConfigError, match=words) as caught:
        run(text, {"base": False, "flow": settings}, template)
    assert "of the first 6 responses of the arm 'flow'" in caught.value.message
    assert "implicit_thinking=True" in caught.value.hint
    assert run(text, {"base": False, "flow": settings}, template, check=False).is_complete
    assert run(text, {"base": False, "flow": settings | {"implicit_thinking": True}}, template).is_complete
    assert run(text, {"base": False}, template).is_complete  # the base needs no steps


def test_steps_that_are_too_few_for_the_injection(warnings) -> None:
    """A single step has none before it: alpha alone does nothing, and beside the bridge it is worth a warning."""
    row = {"outcome": "correct", "steps": 1, "text": "", "problem": "1"}
    bridged = {**row, "stepflow": {"bridged_share": 0.1, "injections": 0}}
    idle = {**row, "stepflow": {"bridged_share": None, "injections": 0}}
    settings = StepFlowSettings()
    plan = FlowPlan.resolve(settings, {0: 2, 1: 2})
    alone = FlowPlan.resolve(settings.replace(tau_max=0), {0: 2, 1: 2})
    with pytest.raises(StepFlowConfigError, match=r"the injection did nothing .*too few steps") as caught:
        FirstResponses("flow", alone.settings, alone, 100).check([idle] * FEWEST)
    assert "min_step_chars" in caught.value.hint
    FirstResponses("flow", settings, plan, 100).check([bridged] * FEWEST)
    assert "the injection did nothing" in warnings.text
    warnings.clear()
    first = FirstResponses("flow", settings, plan, 100)
    first.check([bridged] * (FEWEST - 1))
    first.check([bridged] * FEWEST + [{**row, "stepflow": {"bridged_share": 0.1, "injections": 2}}], is_all=True)
    # A limit that cuts every response is another matter, of which there is a warning.
    FirstResponses("flow", settings, alone, 100).check([idle | {"outcome": "unfinished"}] * FEWEST)
    assert "did nothing" in warnings.text
    assert "None of the first 4 responses of the arm 'flow' ended" in warnings.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tau_max": 0.3, "oeb_layers": "none"}, r"tau_max=0.3, but oeb_layers='none' leave it no layer"),
        ({"tau_max": 0.3, "oeb_heads": {}}, r"tau_max=0.3, but oeb_layers='bottom:0.25' and oeb_heads=\{\}"),
        ({"alpha": 0.1, "smi_layers": []}, r"alpha=0.1, but smi_layers=\[\] leave it no layer"),
        (
            {"length_temperature": 1, "length_temperature_base": 64, "length_temperature_layers": "none"},
            "length_temperature=1, but length_temperature_layers='none'",
        ),
        (
            {"length_temperature": 1, "length_temperature_base": 4096},
            "in contexts of more than 4096 tokens, and a prompt with its response has 2.. at most",
        ),
        ({"sink_tokens": 1000}, "the first 1000 tokens out of the bridge"),
    ],
)
def test_settings_that_cannot_act_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(StepFlowConfigError, match=words):
        run(lambda _: pytest.fail("it generates"), {"base": False, "flow": settings})


def test_a_mechanism_may_be_turned_off(warnings) -> None:
    arms = {
        "base": False,
        "bridge": {"alpha": 0},
        "injection": {"oeb_layers": "none"},
        "off": {"alpha": 0, "tau_max": 0},
    }
    assert run(RIGHT, arms).is_complete
    assert "The arm 'off' is the base" in warnings.text
    assert warnings.text.count("is the base") == 1


def test_layers_of_the_model_count_too() -> None:
    model, tokenizer = scripted_model(lambda _: RIGHT, OPENED)
    StepFlowModelForCausalLM.attach(model, {"oeb_layers": "none"}, tokenizer=tokenizer)
    with pytest.raises(StepFlowConfigError, match=r"'flow' asks for tau_max=0\.2, but oeb_layers='none'"):
        evaluate(
            model,
            EGGS,
            {"base": False, "flow": {"tau_max": 0.2}},
            tokenizer=tokenizer,
            max_new_tokens=9,
            progress=False,
        )


def test_markers_that_nothing_makes(warnings) -> None:
    settings = {"thinking_start": "<reason>", "summary_start": "</reason>"}
    assert run(RIGHT, {"base": False, "flow": settings}, problems=EGGS[:2]).is_complete
    assert "Neither the vocabulary nor the chat template nor a prompt has '<reason>'" in warnings.text
    warnings.clear()
    for arm, template in (
        ({}, "{{ messages[0]['content'] }}"),  # a token of its own
        (settings, "{{ messages[0]['content'] }}{{ '<reason>' if enable_thinking else '' }}"),
        ({"implicit_thinking": True}, "{{ messages[0]['content'] }}"),
    ):
        assert run(RIGHT, {"base": False, "flow": arm}, template, problems=EGGS[:2]).is_complete
    told = [EvalProblem("1", "Think between <reason> and </reason>: one egg?", "1", kind="number")]
    assert run("1", {"base": False, "flow": settings}, "{{ messages[0]['content'] }}", problems=told).is_complete
    assert "Neither the vocabulary" not in warnings.text


def test_a_limit_below_every_right_response(warnings) -> None:
    problems = load_problems("reasoner:chains-4", 3)
    model, tokenizer = load_reasoner()
    arms = {"base": False, "long": Arm(length_factor=2)}
    evaluate(model, problems, arms, tokenizer=tokenizer, max_new_tokens=5, progress=False)
    assert "max_new_tokens=10 is less than the" in warnings.text
    warnings.clear()
    evaluate(model, problems, arms, tokenizer=tokenizer, max_new_tokens=200, progress=False)
    assert "is less than the" not in warnings.text
