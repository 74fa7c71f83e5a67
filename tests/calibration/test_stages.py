"""calibrate from end to end on the embedded reasoner: what it finds, resumes, refuses and writes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hf_stepflow.calibration import calibrate, stages
from hf_stepflow.calibration.candidates import EMPTY
from hf_stepflow.calibration.page import write_report
from hf_stepflow.calibration.result import NOTHING_FOUND, write_preset
from hf_stepflow.calibration.search import halve
from hf_stepflow.calibration.work_folder import WorkFolder
from hf_stepflow.cli import main
from hf_stepflow.presets.architecture import architecture_of
from hf_stepflow.presets.preset import load_preset, validate_preset
from hf_stepflow.problems import load_problems
from hf_stepflow.reasoner import load_reasoner
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowInputError
from tests.support.flow import attach, byte_tokenizer
from tests.support.tiny_models import tiny_model

PROBLEMS = load_problems("reasoner:chains-2", 28, split="calibration")
# Forced past the gate, since the reasoner makes hardly an error here: every stage runs, and quickly.
OPTIONS = {"budget": 9, "max_new_tokens": 44, "batch_size": 16, "scored": 4, "force": True, "progress": False}


@pytest.fixture(scope="module")
def reasoner():
    return load_reasoner()


def run(reasoner, **options):
    options = {"problems": PROBLEMS, **OPTIONS, **options}
    return calibrate(*reasoner, options.pop("problems"), **options)


def findings(result) -> dict:
    """The result without what depends on the clock."""
    data = result.to_dict()
    for name in ("seconds", "about", "timing"):
        del data[name]
    text = re.sub(r'"seconds_ratio": (\{[^{}]*\}|null)', '"seconds_ratio": 0', json.dumps(data))
    return json.loads(text)


@pytest.fixture(scope="module", autouse=True)
def _some_winner():
    """Where nothing is better than the base, the first candidate goes on to the verdict: it has to be tested too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "halve", lambda *given: replace(halve(*given), winner=0))
        yield


@pytest.fixture(scope="module")
def whole(reasoner):
    return run(reasoner)


def test_every_stage_runs(reasoner, whole) -> None:
    model = reasoner[0]
    assert whole.is_forced
    assert whole.gate.problems + whole.held_out == len(PROBLEMS)
    assert whole.bands.proposals[0].name == "quarter"
    assert len(whole.heads["OEB"].gains) == 4 * 4  # the heads of the shallow half
    assert len(whole.heads["length temperature"].gains) == 8 * 4
    assert 8 <= len(whole.trials) <= 9
    assert whole.halving.rungs
    assert len(whole.points) == 8
    assert (whole.default, whole.chosen) == (0, 0)
    assert len(whole.answers) == 2
    assert whole.measured.problems == whole.held_out
    assert whole.measured.p_value > 0.01  # the paper's settings do nothing to speak of to so easy problems
    assert list(whole.ablations) == [
        "OEB only", "SMI only", "length temperature only", "bands in the middle",
        "random bridge heads", "random step boundaries",
    ]  # fmt: skip
    assert {one.base.problems for one in whole.ablations.values()} == {whole.held_out}
    assert whole.left_out == {"random temperature heads": "the winner has no length temperature"}
    assert whole.run["n_problems"] == len(PROBLEMS)
    assert model.stepflow_runtime.settings.tau_max == 0.15  # as it was attached
    assert str(whole).endswith(f"Verdict: {whole.verdict}")
    json.dumps(whole.to_dict(), allow_nan=False)


def test_interrupted_anywhere_it_finds_the_same(reasoner, whole, tmp_path: Path, monkeypatch) -> None:
    put, left = WorkFolder.put, [0]

    def put_and_die(self, kind, found, *parts):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return put(self, kind, found, *parts)

    monkeypatch.setattr(WorkFolder, "put", put_and_die)
    kills = 0
    while True:
        left[0] = 36
        try:
            again = run(reasoner, work=tmp_path / "work")
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 2
    assert findings(again) == findings(whole)
    left[0] = 0
    assert findings(run(reasoner, work=tmp_path / "work")) == findings(whole)  # nothing is computed again


def test_another_run_is_refused_and_nothing_is_touched(reasoner, tmp_path: Path) -> None:
    options = {"work": tmp_path / "work", "force": False}
    run(reasoner, **options)
    before = {path: path.read_bytes() for path in (tmp_path / "work").rglob("*") if path.is_file()}
    for changed, name in (
        ({"seed": 1}, "seed"),
        ({"budget": 3}, "budget.candidates"),
        ({"problems": PROBLEMS[:-1]}, "n_problems"),
        ({"max_new_tokens": 45}, "sampling.max_new_tokens"),
    ):
        with pytest.raises(StepFlowInputError, match=name):
            run(reasoner, **{**options, **changed})
    assert before == {path: path.read_bytes() for path in (tmp_path / "work").rglob("*") if path.is_file()}


def test_a_closed_gate_gives_the_empty_preset(reasoner, tmp_path: Path) -> None:
    result = run(reasoner, force=False)
    assert not result.gate.is_open
    assert (result.verdict, result.exit_status) == ("no measurable gain", NOTHING_FOUND)
    assert result.settings == EMPTY
    assert result.trials == []
    preset = result.preset("empty", "org/reasoner", architecture_of(reasoner[0]), "calibrate", "chains-2")
    write_preset(preset, tmp_path / "empty.json")
    read = validate_preset(tmp_path / "empty.json")
    assert read.settings.tau_max == 0
    # Nothing was held against the base, so no difference is claimed, not even one of 0.
    assert (read.provenance["deltas"], read.provenance["p_value"]) == ([], None)
    assert "Gate: " in preset.notes
    write_report(result, tmp_path / "empty.html", preset)
    assert "Not reached." in (tmp_path / "empty.html").read_text()


def test_force_goes_on_where_the_gate_was_closed(reasoner, whole, tmp_path: Path) -> None:
    work = tmp_path / "work"

    def answers() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in work.glob("answers/*.json")}

    assert not run(reasoner, work=work, force=False).trials
    before = answers()
    assert findings(run(reasoner, work=work)) == findings(whole)
    assert before
    after = answers()
    assert {path: after[path] for path in before} == before  # the base's answers are not made again
    with pytest.raises(StepFlowInputError, match="force: true there, false now"):
        run(reasoner, work=work, force=False)  # it would take the verdict back
    assert answers() == after


def test_presets_of_every_verdict_are_valid(reasoner, whole, tmp_path: Path) -> None:
    preset = whole.preset("found", "org/reasoner", architecture_of(reasoner[0]), "calibrate", "chains-2")
    write_preset(preset, tmp_path / "found.json")
    read = validate_preset(tmp_path / "found.json")
    assert read.kind == "measured"
    assert read.provenance["seed"] == 0
    assert {name: value for name, value in read.settings.to_dict().items() if name in EMPTY} == whole.settings
    with pytest.raises(StepFlowConfigError, match="base_model"):
        whole.preset("found", "no hub id", architecture_of(reasoner[0]), "calibrate", "chains-2")


def test_the_report_is_one_page(reasoner, whole, tmp_path: Path) -> None:
    preset = whole.preset("found", "org/reasoner", architecture_of(reasoner[0]), "c", "<script>alert(1)</script>")
    write_report(whole, tmp_path / "page.html", preset)
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"(src|href)=", page)
    assert page.count("<svg") >= 5
    assert page.count('<rect class="good grid"') + page.count('<rect class="bad grid"') == 4 * 4 + 8 * 4
    assert page.count("</svg>") == page.count("<svg")


def test_another_candidate_is_chosen_before_the_held_out_split_is_opened(reasoner, tmp_path: Path, capsys) -> None:
    options = {"budget": 2, "scored": 2, "work": tmp_path / "work"}
    asked = []

    def choose(front, default):
        asked.append(default)
        assert not any("held-out" in path.read_text() for path in (tmp_path / "work").rglob("*.json"))
        return 1

    with pytest.raises(StepFlowInputError, match="#77 has answered no problems"):
        run(reasoner, choose=77, **options)
    found = run(reasoner, choose=choose, **options)
    assert (asked, found.default, found.chosen, found.measured.problems) == ([0], 0, 1, found.held_out)
    assert "Chosen by hand before the held-out split was opened: #1; by the rule #0." in found.sentences()
    for again in (None, 1):
        assert findings(run(reasoner, choose=again, **options)) == findings(found)
    with pytest.raises(StepFlowInputError, match="#1 was chosen in this run, and #0 is asked for"):
        run(reasoner, choose=0, **options)


def test_sampled_responses(reasoner) -> None:
    result = run(reasoner, samples=2, budget=1, max_new_tokens=30, scored=2)
    assert result.run["sampling"]["samples"] == 2
    if result.measured is not None:
        assert result.measured.harm_rate is None


def test_a_time_is_kept_to(reasoner, tmp_path: Path) -> None:
    problems = load_problems("reasoner:chains-4", 400, split="calibration")
    start = time.monotonic()
    result = run(reasoner, problems=problems, budget="6s", max_new_tokens=120, scored=8, work=tmp_path / "work")
    assert time.monotonic() - start < 6 + 15  # what is begun is finished, and something is answered in any case
    assert result.gate.problems < len(problems) / 2
    again = run(reasoner, problems=problems, budget="6s", max_new_tokens=120, scored=8, work=tmp_path / "work")
    assert findings(again) == findings(result)


def test_a_model_without_stepflow_is_given_back_as_it_was() -> None:
    model = tiny_model("llama")
    kind = type(model)
    problems = [
        {"id": at, "question": f"{at} eggs?", "answer": at, "trace": f"So {at}.</think>{at}"} for at in range(30)
    ]
    result = calibrate(model, byte_tokenizer(), problems, max_new_tokens=4, progress=False)
    assert "0 of" in result.gate.reason
    assert type(model) is kind
    assert not hasattr(model, "stepflow_runtime")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "soon"}, "budget"),
        ({"samples": 0}, "samples"),
        ({"temperature": 0.0}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"scored": 1}, "scored must be"),
        ({"problems": []}, "no problems"),
        ({"problems": PROBLEMS[:6]}, "each needs 8"),
        ({"problems": [*PROBLEMS, PROBLEMS[0]]}, "comes twice"),
        ({"problems": [{"id": 1, "question": "?", "answer": "1", "trace": 5}]}, "trace of problem .* must be"),
        ({"stepflow": {"tau_max": 0.1}}, "attached"),
    ],
)
def test_bad_input_is_refused(reasoner, options: dict, message: str) -> None:
    with pytest.raises(StepFlowInputError, match=message):
        run(reasoner, **options)


@pytest.mark.parametrize(("package", "extra"), [("optuna", "calibrate"), ("math_verify", "eval")])
def test_a_missing_package_is_named_before_any_work(tmp_path: Path, monkeypatch, package: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    problems = [{"id": at, "question": f"{at} eggs?", "answer": at} for at in range(30)]
    with pytest.raises(StepFlowInputError, match=rf"needs {package.replace('_', '-')}.*\n.*hf-stepflow\[{extra}\]"):
        calibrate(tiny_model("llama"), byte_tokenizer(), problems, max_new_tokens=4, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("part", ["question", "trace"])
def test_a_problem_too_long_is_refused_before_any_work(tmp_path: Path, part: str) -> None:
    model = tiny_model("llama")
    room = model.config.max_position_embeddings
    for long in range(30):  # of either split
        asked = [{"id": at, "question": f"{at} eggs?", "answer": at, "trace": "Some."} for at in range(30)]
        asked[long][part] += "s" * room
        with pytest.raises(StepFlowInputError, match=rf"of problem '{long}' .*{room} positions"):
            calibrate(model, byte_tokenizer(), asked, max_new_tokens=4, work=tmp_path / "work", progress=False)
    assert not (tmp_path / "work").exists()
    assert not hasattr(model, "stepflow_runtime")


def test_more_new_tokens_than_fit_are_refused() -> None:
    model = tiny_model("llama")
    problems = [{"id": at, "question": f"{at + 10} eggs?", "answer": at} for at in range(30)]
    with pytest.raises(StepFlowInputError, match=r"at most 504"):  # of 512 positions
        calibrate(model, byte_tokenizer(), problems, max_new_tokens=505, progress=False)


def test_settings_of_the_attached_model_do_not_leak_into_candidates() -> None:
    model = attach(tiny_model("llama"), "paper")
    problems = [{"id": at, "question": f"{at} eggs?", "answer": at} for at in range(30)]
    result = calibrate(model, byte_tokenizer(), problems, max_new_tokens=4, progress=False)
    preset = result.preset("tiny", "org/tiny", architecture_of(model), "c", "eggs")
    assert preset.settings.min_step_chars == 5  # how it reads
    assert (preset.settings.tau_max, preset.settings.alpha) == (0, 0)  # not what it does


# The command


def command(tmp_path: Path, *more: str) -> list[str]:
    return [
        "calibrate", "reasoner", "--problems", "reasoner:chains-2", "--limit", "28", "--max-new-tokens", "44",
        "--batch-size", "8", "--scored", "6", "--budget", "9", "--out", str(tmp_path / "mine.json"), *more,
    ]  # fmt: skip


def test_the_command(tmp_path: Path, capsys) -> None:
    status = main(command(tmp_path, "--report", str(tmp_path / "mine.html"), "--json"))
    printed = json.loads(capsys.readouterr().out)
    assert status == NOTHING_FOUND
    assert printed["verdict"] == "no measurable gain"
    assert printed["preset"]["base_model"] == "hf-stepflow/reasoner"
    assert load_preset(tmp_path / "mine.json").to_dict() == printed["preset"]
    assert (tmp_path / "mine.html").exists()
    assert (tmp_path / "mine-calibration" / "run.json").exists()
    assert main(command(tmp_path)) == NOTHING_FOUND
    assert "Verdict: no measurable gain" in capsys.readouterr().out
    assert main(command(tmp_path, "--seed", "3")) == 2
    assert "holds another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "Mine.json"], "name is 'Mine', expected a name of a-z"),
        (["--out", "mine.txt"], "NAME.json"),
        (["--out", "preset.json"], "other than the reserved ones"),
        (["--out", "schema.json"], "other than the reserved ones"),
        (["--out", f"{'m' * 101}.json"], "1 to 100 characters"),
        (["--revision", "a..b"], "expected a revision"),
        (["--out", "no-such-folder/mine.json"], "no folder"),
        (["--base-model", "no id"], "Hub id"),
        (["--stepflow", "no-such-preset"], "no preset"),
        (["--problems", "reasoner:no-such-level"], "no level"),
        (["--budget", "long"], "budget"),
    ],
)
def test_the_command_refuses_bad_input(tmp_path: Path, monkeypatch, capsys, words: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "hint: " in error
    assert list(tmp_path.iterdir()) == []


def test_sources_that_number_their_problems_alike(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, things in (("a", "eggs"), ("b", "pens")):
        rows = [{"id": at, "question": f"{at} {things}?", "answer": at} for at in range(20)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["calibrate", "reasoner", "--max-new-tokens", "4", "--out", "mine.json"]
    assert main([*words, "--problems", "a.jsonl", "--problems", "b.jsonl"]) == NOTHING_FOUND
    kept = json.loads(Path("mine-calibration/run.json").read_text())
    assert kept["run"]["n_problems"] == 40
    ids = {one["problem"] for file in Path().glob("*/answers/*.json") for one in json.loads(file.read_text())["found"]}
    assert {one.rpartition("/")[0] for one in ids} == {"a.jsonl", "b.jsonl"}
    monkeypatch.setattr("hf_stepflow.cli.calibrate.load", None)  # refused before the model is loaded
    assert main([*words, "--problems", "a.jsonl", "--problems", "a.jsonl"]) == 2
    assert "a.jsonl is given twice" in capsys.readouterr().err


@pytest.mark.slow
def test_a_kill_loses_at_most_a_batch(tmp_path: Path) -> None:
    """The process is killed outright while it works, and the command then goes on."""
    words = [sys.executable, "-m", "hf_stepflow.cli", *command(tmp_path, "--force", "--json")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    work = tmp_path / "mine-calibration"

    def done() -> set[Path]:
        return set(work.glob("*/*.json"))

    first = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(done()) < 12 and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = {path: path.stat().st_mtime_ns for path in done()}
    assert len(kept) >= 12
    second = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode in (0, NOTHING_FOUND), second.stderr
    assert json.loads(second.stdout)["trials"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # what was there was not computed again
