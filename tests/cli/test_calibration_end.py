"""The questions at the end of a calibration, and that what they start may fail."""

from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_stepflow.calibration.pareto import Outcome
from hf_stepflow.cli import calibration_end
from hf_stepflow.cli.calibration_end import ask_for_candidate, offer
from hf_stepflow.presets.preset import load_preset
from hf_stepflow.problems import load_problems
from hf_stepflow.reasoner import FOLDER
from hf_stepflow.runtime.errors import StepFlowFileError

FRONT = [
    Outcome(12, 480, 0.039, 0.002, 1.0, [], "bridge 0.15 on 6 heads of layers 0-3"),
    Outcome(3, 240, 0.031, 0.0, 0.99, ["chains, long"], "injection 0.06 in layers 6-7"),
]


@pytest.fixture
def types(monkeypatch):
    """Answers questions with lines, then with the end of the input."""

    def answer(*lines: str) -> None:
        waiting = list(lines)

        def read(text: str) -> str:
            print(text)
            if not waiting:
                raise EOFError
            return waiting.pop(0)

        monkeypatch.setattr("builtins.input", read)

    return answer


def test_a_candidate_is_chosen_from_the_table(types, capsys) -> None:
    types("7", "#3")
    assert ask_for_candidate(FRONT, 12) == 3
    printed = capsys.readouterr().out
    assert "*#12 480 +3.9 0.2 x1.00 bridge 0.15 on 6 heads of layers 0-3" in " ".join(printed.split())
    assert "injection 0.06 in layers 6-7; harms chains, long" in printed
    assert "'7' is none of #3, #12" in printed
    types("")
    assert ask_for_candidate(FRONT, None) is None
    types()  # the end of the input
    assert ask_for_candidate(FRONT, 12) is None
    assert ask_for_candidate([], None) is None


def test_each_offer_may_fail_without_losing_the_result(types, capsys, tmp_path, monkeypatch) -> None:
    model, tokenizer = (one.from_pretrained(FOLDER) for one in (AutoModelForCausalLM, AutoTokenizer))
    preset = load_preset("stepflow-tiny-reasoner")
    result = SimpleNamespace(run={"settings": {}}, settings={"tau_max": 0.1})

    def refuse(*args, **options):
        raise StepFlowFileError("the Hub cannot be reached", hint="check the connection")

    monkeypatch.setattr("hf_stepflow.hub.push.push_preset", refuse)
    good = tmp_path / "stepflow-tiny-reasoner.json"
    types(
        "what",
        "save",
        str(tmp_path),
        "s",
        str(good),
        "save",
        "/proc/no/x.json",
        "push",
        "me/it",
        "c",
    )
    offer(model, tokenizer, result, preset, {}, load_problems("reasoner:chains-2", 1), 60)
    printed = capsys.readouterr()
    assert "'what' is none of save, push, compare" in printed.out
    assert load_preset(good).to_dict() == preset.to_dict()
    assert "That failed: the Hub cannot be reached\nhint: check the connection" in printed.err
    assert "cannot be written" in printed.err
    assert "base\n" in printed.out
    assert "candidate\n" in printed.out
    assert "Right answer: " in printed.out
    assert not hasattr(model, "stepflow_runtime")


def test_nobody_is_asked_without_a_terminal() -> None:
    assert not calibration_end.is_terminal()
