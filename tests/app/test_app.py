"""The app without its page: the model and its settings, answers while they are written, a comparison, and HTML."""

import json
import re
import socket
import sys
import threading
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest

from hf_stepflow import StepFlowError, evaluate
from hf_stepflow.app import load_model
from hf_stepflow.app.answers import Answer, stream_answer
from hf_stepflow.app.comparison import BATCH, stream_comparison
from hf_stepflow.app.layout import _problem_of
from hf_stepflow.app.model import OWN, PAPER, choices, draw_problem, draw_problems, read_band, shown_band
from hf_stepflow.app.panels import answers_panel, comparison_panel, effect_panel, saliency_panel
from hf_stepflow.cli import main
from hf_stepflow.cli.terminal import answer
from hf_stepflow.evaluation.result import EvaluationResult
from hf_stepflow.evaluation.sampler import Sampler
from hf_stepflow.presets.preset import load_preset
from hf_stepflow.runtime.trace import TraceStep
from hf_stepflow.saliency.api import step_saliency

CONTROLS = {"tau_max": 0.3, "alpha": 0.0, "oeb_layers": "[0, 2]", "smi_layers": "none"}
EVIL = "</pre><script>taken()</script><img src=x onerror=taken()>"


@pytest.fixture(scope="module")
def loaded():
    return load_model("reasoner")


def test_settings_come_from_a_choice_and_the_controls(loaded) -> None:
    assert {OWN, PAPER, "stepflow-tiny-reasoner", "qwen3-8b"} <= set(choices())
    preset = load_preset("stepflow-tiny-reasoner").settings.to_dict()
    layers = shown_band(preset["oeb_layers"])
    chosen = loaded.chosen_settings("stepflow-tiny-reasoner", **CONTROLS | {"oeb_layers": layers})
    assert chosen["tau_max"] == 0.3
    assert chosen["oeb_heads"] == preset["oeb_heads"]
    assert not {"thinking_start", "step_rule", "base_model_name_or_path"} & chosen.keys()
    assert loaded.chosen_settings(OWN, **CONTROLS)["oeb_layers"] == [0, 2]
    with pytest.raises(StepFlowError, match="no list of layers"):
        read_band("[0,")
    for wrong in ({"oeb_layers": "[99]"}, {"oeb_layers": "half"}, {"tau_max": 2.0}):
        with pytest.raises(StepFlowError):
            loaded.chosen_settings(PAPER, **CONTROLS | wrong)
    with pytest.raises(StepFlowError):
        loaded.chosen_settings("no such preset", **CONTROLS)


def test_problems_are_drawn_by_a_seed(tmp_path: Path) -> None:
    problem, seed = draw_problem("reasoner:chains-4")
    assert draw_problem("reasoner:chains-4", seed) == (problem, seed)
    assert problem.id == f"chains-4/test/{seed}"
    assert [one.id for one in draw_problems("reasoner:chains-4", 2, 5)] == ["chains-4/test/5", "chains-4/test/6"]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"id": n, "question": f"{n}?", "answer": "1"}) + "\n" for n in range(3)))
    assert [one.id for one in draw_problems(str(file), 5, 4)] == ["1", "2", "0"]
    with pytest.raises(StepFlowError, match="no level"):
        draw_problem("reasoner:chains-99")


def test_what_the_model_cannot_take(loaded) -> None:
    with pytest.raises(StepFlowError, match="no question"):
        loaded.encode("  ", 10)
    with pytest.raises(StepFlowError, match="'Bob'"):
        loaded.encode("Bob has 4 points. How many points does Bob have?", 10)
    with pytest.raises(StepFlowError, match="positions"):
        loaded.encode(draw_problem("reasoner:chains-2", 0)[0].prompt, 10**6)
    with pytest.raises(StepFlowError, match="no name"):
        load_model(" ")


def test_an_answer_grows_to_that_of_the_terminal(loaded) -> None:
    problem, _ = draw_problem("reasoner:chains-2", 3)
    settings = loaded.chosen_settings(OWN, **CONTROLS | {"alpha": 0.06, "smi_layers": "top:0.25"})
    views = list(stream_answer(loaded, problem.prompt, settings, 80, problem))
    *growing, last = views
    assert growing
    for before, after in pairwise(views):
        assert after.ids[: len(before.ids)] == before.ids
        assert before.response is None
    assert last.response is not None
    assert last.outcome in ("correct", "wrong")
    assert last.response.report is not None
    with loaded.model.use_stepflow(settings):
        vocabulary = loaded.model.stepflow_runtime.rules.vocabulary
        expected = answer(Sampler(loaded.model, loaded.tokenizer, vocabulary, 80), last.prompt, True)
    assert last.ids == expected.response.ids
    assert last.steps == expected.steps
    # A question that somebody typed has no right answer.
    *_, typed = stream_answer(loaded, problem.prompt, False, 20)
    assert typed.outcome is None
    assert typed.response.report is None
    session = {"problem": problem}
    assert _problem_of(session, problem.prompt) is problem
    assert _problem_of(session, problem.prompt + " ") is None


def test_nobody_waits_for_a_generation_that_is_left(loaded) -> None:
    before = threading.active_count()
    views = stream_answer(loaded, draw_problem("reasoner:chains-8", 0)[0].prompt, False, 400)
    first = next(views)
    assert first.response is None
    views.close()
    assert threading.active_count() == before
    with pytest.raises(StepFlowError, match="layer"):
        list(stream_answer(loaded, draw_problem("reasoner:chains-2", 0)[0].prompt, {"oeb_layers": [99]}, 8))


def test_a_comparison_is_read_while_it_runs(loaded) -> None:
    problems = draw_problems("reasoner:chains-2", BATCH + 2, 7)
    settings = {"tau_max": 0.3}
    views = list(stream_comparison(loaded, problems, settings, 24))
    counts = [len(view.results) for view in views]
    assert counts == sorted(counts)
    assert counts[-1] == 2 * len(problems)
    arms = {"base": False, "stepflow": settings}
    expected = evaluate(loaded.model, problems, arms, max_new_tokens=24, batch_size=BATCH, progress=False, check=False)
    assert [one["text"] for one in views[-1].results] == [one["text"] for one in expected.results]
    page = comparison_panel(views[-1])
    assert f"{counts[-1]} of {counts[-1]} responses" in page
    assert "(finished)" in page
    ET.fromstring(page)
    partial = EvaluationResult(expected.run, {}, expected.results[:-2])
    assert "(so far)" in comparison_panel(partial)
    assert "responses" in comparison_panel(EvaluationResult(expected.run, {}, expected.results[:3]))
    running = stream_comparison(loaded, problems, settings, 24)
    next(running)
    before = threading.active_count()
    running.close()
    assert threading.active_count() < before


def answer_of(*texts: str, done: bool = True) -> Answer:
    steps = [TraceStep("thinking", 1, place + 1, place, place + 1, text) for place, text in enumerate(texts)]
    response = type("Response", (), {"is_finished": True, "report": None})() if done else None
    return Answer([], list(range(len(texts))), steps, 1.0 if done else None, response, "wrong" if done else None)


def rows_of(page: str) -> list[str]:
    return re.findall(r'class="sf-row sf-([\w -]+)"', page)


def test_two_answers_side_by_side() -> None:
    base = answer_of("a", "b", EVIL)
    page = answers_panel(base, answer_of("a", "c", EVIL))
    assert rows_of(page) == ["same", "apart sf-first", "same"]
    assert page.count("first difference") == 1
    assert ">2|3<" in answers_panel(answer_of("a", "c"), answer_of("a", "b", "c"))
    assert "<script" not in page
    assert "<img" not in page
    assert "".join(ET.fromstring(page).itertext()).count(EVIL) == 1
    assert "no difference" in answers_panel(base, base)
    # While one is written, what it has not reached differs from nothing.
    assert rows_of(answers_panel(base, None)) == ["waiting"] * 3
    assert rows_of(answers_panel(base, answer_of("a", "c", done=False))) == ["same", "waiting", "waiting"]
    assert rows_of(answers_panel(base, answer_of("x", "b", done=False)))[0] == "apart sf-first"
    assert rows_of(answers_panel(answer_of("a"), answer_of("a", "b", "c", done=False))) == [
        "same",
        "apart sf-first",
        "waiting",
    ]


def test_an_answer_without_steps_is_shown_whole() -> None:
    response = answer_of().response
    base, other = (Answer([], [1, 2], [], 1.0, response, text=text) for text in (f"one {EVIL}", "two"))
    page = answers_panel(base, other)
    assert rows_of(page) == ["apart sf-first"]
    assert page.count("0 steps") == 2
    assert f"one {EVIL}" in "".join(ET.fromstring(page).itertext())
    assert rows_of(answers_panel(base, base)) == ["same"]
    assert rows_of(answers_panel(base, None)) == ["waiting"]


def test_an_answer_without_thinking_is_written_all_the_same(loaded, monkeypatch) -> None:
    monkeypatch.setattr("hf_stepflow.app.answers.written_steps", lambda *_: [])
    *_, last = stream_answer(loaded, draw_problem("reasoner:chains-2", 1)[0].prompt, False, 20)
    assert last.text == loaded.tokenizer.decode(last.ids, skip_special_tokens=True).strip() != ""


def test_the_effect_and_the_map(loaded) -> None:
    problem, _ = draw_problem("reasoner:chains-2", 1)
    *_, last = stream_answer(loaded, problem.prompt, {}, 60, problem)
    page = effect_panel(last.response.report)
    assert len(re.findall("<tr>", page)) == 1 + len(last.response.report.layers)
    ET.fromstring(f"<div>{page}</div>")
    assert "ask for nothing" in effect_panel(None)
    maps = step_saliency(loaded.model, last.prompt + last.ids, prompt_length=len(last.prompt), progress=False)
    maps.about["model"] = EVIL
    frame = ET.fromstring(saliency_panel(maps))
    assert frame.get("sandbox") == "allow-scripts"
    assert frame.get("srcdoc").startswith("<!doctype html>")
    assert not list(frame)


def test_what_the_command_lacks(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert "pip install 'hf-stepflow[app]'" in capsys.readouterr().err


def test_a_port_that_is_none(capsys) -> None:
    assert main(["app", "--port", "70000"]) == 2
    assert "--port must be from 1 to 65535, got 70000" in capsys.readouterr().err


def test_a_port_that_is_taken(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"cannot be served on 127.0.0.1:{port}: Address already in use" in error
    assert "choose another --port" in error
