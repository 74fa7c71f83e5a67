"""The demo: what a newcomer sees first."""

import json
from pathlib import Path

import pytest

from hf_stepflow.cli import main
from hf_stepflow.cli.demo import _visible_rows


def test_it_shows_both_answers_and_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, picture = tmp_path / "demo.html", tmp_path / "demo.svg"
    words = ["demo", "--difficulty", "chains-2", "--seed", "5", "--problems", "6"]
    assert main([*words, "--html", str(page), "--svg", str(picture)]) == 0
    shown = capsys.readouterr().out
    for text in ("chains-2, seed 5", "Base model", "With StepFlow", "The right answer is", "bridge mass", "n = 6"):
        assert text in shown
    assert "Base model" in page.read_text()
    assert picture.read_text().startswith("<svg")
    assert "url(http" not in picture.read_text()
    # The same seed is the same problem.
    assert main([*words[:-1], "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["question"].split()[0] in shown
    assert told["comparison"] is None
    assert told["base"]["outcome"] == "correct"
    assert told["report"]["rows"]


def test_a_page_and_a_picture_beside_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, picture = tmp_path / "demo.html", tmp_path / "demo.svg"
    words = ["demo", "--difficulty", "chains-2", "--seed", "5", "--problems", "4", "--json"]
    assert main([*words, "--html", str(page), "--svg", str(picture)]) == 0
    told = json.loads(capsys.readouterr().out)  # nothing else was printed
    assert told["comparison"] is not None
    assert "chains-2, seed 5" in page.read_text()
    assert "n = 4" in page.read_text()
    assert picture.read_text().startswith("<svg")


def test_a_question_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    question = "Ben has 4 points. How many points does Ben have?"
    assert main(["demo", "--problem", question, "--problems", "0"]) == 0
    shown = capsys.readouterr().out
    assert question in shown
    assert "The right answer" not in shown


def test_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["demo", "--difficulty", "chains-99"]) == 2
    assert "hint: levels: chains-2" in capsys.readouterr().err
    assert main(["demo", "--problems", "-1"]) == 2
    assert "--problems must be at least 0, got -1" in capsys.readouterr().err
    for option in ("--html", "--svg"):
        # Refused although the level is wrong too: before anything is drawn or answered.
        assert main(["demo", "--difficulty", "chains-99", option, str(tmp_path / "no" / "demo.out")]) == 2
        assert "there is no folder" in capsys.readouterr().err


def test_long_answers_are_cut_in_the_middle() -> None:
    assert _visible_rows(12, 3) == list(range(12))
    shown = _visible_rows(200, 100)
    assert shown[:8] == list(range(8))
    assert shown[-1] == 199
    assert 100 in shown
    assert None in shown
    assert len(shown) < 50
