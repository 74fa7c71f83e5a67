"""What is shown while a run goes on: paired differences, the speed, the time left, and the markers at the start."""

import re
import sys

import pytest
import torch

from hf_stepflow.evaluation import progress
from hf_stepflow.evaluation.progress import RunProgress, TokenCounter, announce, running_accuracies
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.problems import load_problems
from hf_stepflow.reasoner import load_reasoner


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch):
    """The module of huggingface_hub that shows bars, whatever the environment says."""
    module = sys.modules["huggingface_hub.utils.tqdm"]
    monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(module, "progress_bar_states", {})
    return module


def row(arm: str, problem: str, right: bool, sample: int = 0, seconds: float = 2.0) -> dict:
    return {"arm": arm, "problem": problem, "sample": sample, "right": right, "seconds": seconds, "tokens": 10}


def test_differences_are_paired() -> None:
    """Batches of easy problems that one arm has answered and the other has not are no difference."""
    results = [row("base", str(number), True) for number in range(8)]
    results += [row("flow", str(number), number != 3) for number in range(4)]
    assert running_accuracies(["base", "flow"], results) == "base 100.0%, flow -25.0 (n = 4)"
    results += [row("flow", "9", False)]  # the base has not answered it
    assert running_accuracies(["base", "flow"], results) == "base 100.0%, flow -25.0 (n = 4)"
    assert running_accuracies(["base", "flow"], results[:8]) == "base 100.0%"
    assert running_accuracies(["base", "flow"], []) == ""
    samples = [row("base", "1", True, 0), row("base", "1", False, 1), row("flow", "1", True, 1)]
    assert running_accuracies(["base", "flow"], samples) == "base 50.0%, flow +100.0 (n = 1)"


def test_the_last_difference_is_that_of_the_result() -> None:
    model, tokenizer = load_reasoner()
    problems = load_problems("reasoner:chains-4", 6)
    arms = {"base": False, "flow": {"tau_max": 0.9}}
    result = evaluate(model, problems, arms, tokenizer=tokenizer, max_new_tokens=120, progress=False, batch_size=2)
    delta = 100 * result.comparisons[0].paired.delta.value
    assert f"flow {delta:+.1f} (n = 6)" in running_accuracies(arms, result.results)


def test_tokens_are_counted_while_a_batch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    counted: list[int] = []
    counter = TokenCounter(counted.append, width=2, pad=0)
    ids = torch.tensor([[0, 5, 7, 8, 9], [5, 6, 7, 2, 0]])
    assert counter(ids, None).tolist() == [False, False]
    assert counted == [5]


def test_a_run_shows_its_speed_and_the_time_left(bars, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    model, tokenizer = load_reasoner()
    problems = load_problems("reasoner:chains-2", 4)
    evaluate(model, problems, {"base": False, "flow": {}}, tokenizer=tokenizer, max_new_tokens=60, batch_size=2)
    shown = capsys.readouterr().err
    assert shown.startswith("Judging base, flow: thinking starts after '<think>', the summary after '</think>'")
    assert re.search(r"0/8 responses \[[\d:]+, [\d,]+ tokens/s, \d+:\d\d left at most\]", shown)
    assert re.search(
        r"4/8 responses \[[\d:]+, base [\d.]+%, flow [+-][\d.]+ \(n = 2\), [\d,]+ tokens/s, \d+:\d\d left\]", shown
    )
    assert "8/8 responses" in shown


def test_the_time_left_counts_each_arm_by_its_own_speed(bars, capsys) -> None:
    results = [row("base", "1", True, seconds=10.0)]
    bar = RunProgress(["base", "vote"], 3, results, {"base": 100, "vote": 800}, True)
    bar.begin("vote", 1)
    assert "0:50 left]" in capsys.readouterr().err  # 2 more of base, and 3 of an arm that is not known yet
    results.append(row("vote", "1", True, seconds=60.0))
    bar.end()
    bar.begin("base", 1)
    assert "2/6 responses [" in capsys.readouterr().err
    bar.count(5)
    assert "2:20 left]" in capsys.readouterr().err
    bar.close()


def test_what_is_announced_can_be_turned_off(bars, monkeypatch, capsys) -> None:
    announce("Judging base.", False)
    announce("Judging base.")
    monkeypatch.setattr(bars, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    announce("Judging base.")
    assert capsys.readouterr().err == "Judging base.\n"
