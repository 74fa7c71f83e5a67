"""The trace viewer: what its page holds, that texts stay texts, and what a browser makes of it."""

import base64
import json
import random
import re
import zlib
from pathlib import Path

import pytest

from hf_stepflow import EvaluationResult, load_problems
from hf_stepflow.cli import main
from hf_stepflow.evaluation.store import FORMAT, digest
from hf_stepflow.evaluation.viewer import LONGEST_TEXT, _shortened, viewer_content, write_viewer
from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError
from tests.support.browser import browser_page

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "results.jsonl"
TAKE = "document.title='taken'"
HOSTILE = f'</script><script>{TAKE}</script><!-- <img src=x onerror="{TAKE}"> & $data \ud800'


def result_of(texts: dict[str, list[str]], problems=None, **fields) -> EvaluationResult:
    """A run whose arms wrote these texts; a response is right if it ends in "4."."""
    arms = {name: {"stepflow": number > 0, "samples": 1} for number, name in enumerate(texts)}
    number = len(next(iter(texts.values())))
    names = [str(place) for place in range(number)] if problems is None else [one.id for one in problems]
    run = {
        "problems": digest([one.asked() for one in problems or ()]), "n_problems": number, "dtype": "float32",
        "settings": None, "arms": arms, "n_samples": 1, "seed": 0, "batch_size": number, "max_new_tokens": 99,
    }  # fmt: skip
    rows = []
    for arm, own in texts.items():
        for problem, text in zip(names, own, strict=True):
            right = text.endswith("4.")
            rows.append(
                {"problem": problem, "sample": 0, "arm": arm, "batch": 0, "of": number, "right": right, "steps": 1}
                | {"outcome": "correct" if right else "wrong", "answer": "4", "tokens": 9, "seconds": 1.0, "loops": 0}
                | {"text": text, **fields}
            )
    return EvaluationResult(run, {"model": "a/b"}, rows)


def content_of(page: Path) -> dict:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"))
    return json.loads(zlib.decompress(base64.b64decode(json.loads(data))))


def test_it_holds_the_run(tmp_path: Path) -> None:
    texts = {
        "base": ["This is one and one. Then two more.</think> It is 5.", "Never mind all that.</think> It is 4."],
        "flow": ["This is one and one. Then three more.</think> It is 4.", "Never mind all that.</think> It is 4."],
    }
    result = result_of(texts)
    write_viewer(result, tmp_path / "run.html")
    content = content_of(tmp_path / "run.html")
    assert content["facts"][:3] == ["a/b", "float32", "2 problems"]
    assert content["verdicts"] == result.verdicts()
    assert [arm["name"] for arm in content["arms"]] == ["base", "flow"]
    first, second = content["problems"]
    for place, name in enumerate(texts):
        pieces = first["responses"][place]["pieces"]
        assert "".join(text for _, _, text in pieces) == texts[name][0]
        assert [label for label, _, _ in pieces] == ["t", "t", "", "s"]
    assert first["rows"] == [[[0, 0, 1, 1], [1, 1, 0, 2]]]
    assert second["rows"] == [[[0, 0, 1, 2]]]
    assert not re.search(r"https?:|\burl\(|@import|<link|\bsrc=|\bfetch\(", (tmp_path / "run.html").read_text("utf-8"))


def test_a_file_of_an_earlier_release(tmp_path: Path, capsys) -> None:
    assert main(["view", str(FIXTURE), "--out", str(tmp_path / "run.html")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'run.html'}: 2 arms, ")
    content = content_of(tmp_path / "run.html")
    assert len(content["problems"]) == 2
    assert all("loops" not in one for entry in content["problems"] for one in entry["responses"])


def test_questions_come_with_the_problems() -> None:
    problems = load_problems("reasoner:chains-2", 2)
    result = result_of({"base": ["It is 4.", "It is 5."]}, problems)
    shown = viewer_content(result, problems)["problems"]
    assert [(one["id"], one["question"], one["answer"]) for one in shown] == [
        (one.id, one.prompt, one.answer) for one in problems
    ]
    with pytest.raises(StepFlowInputError, match="not the 2 that the run was asked"):
        viewer_content(result, problems[:1])


def test_an_unfinished_run() -> None:
    result = result_of({"base": ["It is 4.", "It is 5."], "flow": ["It is 4.", "It is 5."]})
    result.results.pop()
    shown = viewer_content(result)["problems"]
    assert [one["responses"][1] is None for one in shown] == [False, True]
    assert shown[1]["rows"] == [[[0, -1, 0, 1]]]
    result.results.clear()
    with pytest.raises(StepFlowInputError, match="no responses yet"):
        viewer_content(result)


def test_texts_cannot_leave_their_place(tmp_path: Path) -> None:
    result = result_of({HOSTILE: [HOSTILE], "flow": [HOSTILE + " 4."]})
    result.about["model"] = HOSTILE
    write_viewer(result, tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text("utf-8")
    assert text.count("<script") == text.count("</script>") == 2
    assert "taken" not in text
    assert "default-src 'none'" in text
    content = content_of(tmp_path / "run.html")
    pieces = content["problems"][0]["responses"][0]["pieces"]
    assert "".join(piece[2] for piece in pieces) == HOSTILE


def test_long_responses_are_cut_in_the_middle() -> None:
    steps = [["t", place, f"{place:>99} "] for place in range(1000)]
    shown = _shortened(steps)
    assert shown[:3] == steps[:3]
    assert shown[-3:] == steps[-3:]
    (note,) = [text for label, _, text in shown if label == "-"]
    assert note == "800 steps of 80,000 characters are left out here"
    assert _shortened(steps[:200]) == steps[:200]
    (one,) = _shortened([["t", 1, "x" * 50_000]])
    assert "30,000 characters are left out here" in one[2]
    assert len(one[2]) < LONGEST_TEXT + 60


def test_bad_input(tmp_path: Path, capsys) -> None:
    copy = tmp_path / "results.jsonl"
    copy.write_bytes(FIXTURE.read_bytes())
    assert main(["view", str(copy), "--out", str(copy)]) == 2
    assert "is the results file itself" in capsys.readouterr().err
    assert main(["view", str(tmp_path / "none.jsonl")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    copy.write_text(json.dumps({"format": FORMAT, "run": {}}) + "\nno JSON\n")
    assert main(["view", str(copy)]) == 2
    assert "line 2 is not JSON" in capsys.readouterr().err
    result = result_of({"base": ["It is 4."]})
    del result.results[0]["text"]
    with pytest.raises(StepFlowFileError, match="has no text"):
        viewer_content(result)


@pytest.mark.slow
def test_a_thousand_problems_are_one_small_file(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randrange(2, 9))) for _ in range(3000)]

    def text() -> str:
        sentences = [" ".join(draw.choices(words, k=12)).capitalize() + "." for _ in range(100)]
        return f"{' '.join(sentences)}</think> It is 4."

    result = result_of({arm: [text() for _ in range(1000)] for arm in ("base", "flow")})
    assert sum(len(one["text"]) for one in result.results) > 12e6
    write_viewer(result, tmp_path / "run.html")
    assert (tmp_path / "run.html").stat().st_size < 20e6
    with browser_page() as page:
        page.goto((tmp_path / "run.html").as_uri())
        page.wait_for_selector("html[data-ready=true]")
        assert page.locator("#list li").count() == 1000


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390])
def test_a_browser_shows_it(tmp_path: Path, width: int) -> None:
    texts = {
        "base": ["That is one and one. Then two.</think> It is 5.", "Never mind it all.</think> It is 4.", HOSTILE],
        "flow": ["That is one and one. Then three.</think> It is 4.", "Never mind it all.</think> It is 3.", HOSTILE],
        "other": ["So it goes on. And on.</think> It is 5.", "Nothing of that kind.</think> It is 5.", HOSTILE],
    }
    result = result_of(texts)
    result.results[-1] |= {"outcome": "unfinished", "loops": 1}
    write_viewer(result, tmp_path / "run.html")
    with browser_page(width, dark=width < 500) as page:
        page.goto((tmp_path / "run.html").as_uri())
        page.wait_for_selector("html[data-ready=true]")
        filters = page.locator("#filters label")
        assert [one.split() for one in filters.all_inner_texts()] == [
            ["All", "3"], ["Gained", "1"], ["Lost", "1"], ["Changed", "2"], ["Looped", "0"], ["Unfinished", "0"],
        ]  # fmt: skip
        assert page.locator(".row.first .text").all_inner_texts() == ["Then two.", "Then three."]
        assert page.locator(".row.same .chip").all_inner_texts() == ["1"]
        page.keyboard.press("3")
        assert page.inner_text("#title") == "1"
        page.keyboard.press("1")
        page.keyboard.press("j")
        assert page.inner_text("#title") == "2"
        assert page.title() == "StepFlow run · a/b"  # what a response says is no markup
        assert page.locator("article img").count() == 0
        page.select_option("#arm", label="other")
        assert [one.split()[1] for one in filters.all_inner_texts()] == ["3", "0", "1", "2", "1", "1"]
        page.keyboard.press("/")
        page.keyboard.type("THEN two")
        assert page.locator("#list li").count() == 1
        assert page.locator("#rows mark").all_inner_texts() == ["Then two"]
        page.keyboard.press("Escape")
        page.keyboard.press("w")
        assert page.locator("#rows pre").first.inner_text() == texts["base"][0]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("location.hash") == "#1"
