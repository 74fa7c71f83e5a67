"""The embedded reasoner: its problems are true and kept apart, its training repeats, its files are what they claim."""

import dataclasses
import doctest
import json
import re
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_stepflow.evaluation.scoring import score_traces
from hf_stepflow.evaluation.statistics import stats
from hf_stepflow.prompts import encode_prompt
from hf_stepflow.reasoner import FOLDER, load_reasoner, release, train
from hf_stepflow.reasoner.levels import LEVELS, SPLITS, problems_of, split_of
from hf_stepflow.reasoner.prompts import CONTROL_TOKENS, SIZE, build_tokenizer, encode_problem
from hf_stepflow.reasoner.train import Muon, Recipe, orthogonalise
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.trace import segment_trace

PROBLEMS = [problem for level in LEVELS for problem in problems_of(level, "test", 12)]


def solved(question: str) -> int:
    """The answer, worked out from the question alone."""
    asked = re.search(r"How many points does (\w+) have\?", question)
    assert asked is not None
    known = {name: int(value) for name, value in re.findall(r"(\w+) has (\d+) points", question)}
    gaps = re.findall(r"(\w+) has (\d+) (more|fewer) than (\w+)", question)
    while asked.group(1) not in known:
        for name, gap, relation, other in gaps:
            if other in known:
                known[name] = known[other] + (int(gap) if relation == "more" else -int(gap))
    return known[asked.group(1)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)
def test_problems_are_true(problem) -> None:
    assert int(problem.answer) == solved(problem.question)
    assert 0 <= int(problem.answer) <= 99
    for left, right in re.findall(r"((?:\d+ [+-] )+\d+) is (\d+)", problem.thinking):
        assert eval(left) == int(right)
    # Every statement of the thinking is a premise, or follows from the counting.
    for premise in re.findall(r"\w+ has \d+ \w+ than \w+\.", problem.thinking):
        assert premise in problem.question
    for name, start, end, stride in re.findall(r"(\w+) counts from (\d+) to (\d+) by (\d+)\.", problem.question):
        numbers = range(int(start) + int(stride), int(end) + 1, int(stride))
        assert "".join(f" {name} now counts {number}." for number in numbers) + f" {name} is done." in problem.thinking


def test_problems_are_drawn_again() -> None:
    assert problems_of("chains-4", "test", 3, start=5) == problems_of("chains-4", "test", 8)[5:]
    recipe = Recipe()
    assert train.draw_training_problem(recipe, 7, 3) == train.draw_training_problem(recipe, 7, 3)
    assert train.draw_training_problem(recipe, 7, 3) != train.draw_training_problem(recipe, 8, 3)
    with pytest.raises(StepFlowInputError, match=r"no split 'dev'\n.*train, calibration, test"):
        problems_of("chains-4", "dev", 1)


def test_splits_never_share_a_question() -> None:
    questions = {
        split: {problem.question for level in ("chains-2", "errands-10") for problem in problems_of(level, split, 150)}
        for split in SPLITS
    }
    trained = {
        train.draw_training_problem(Recipe(), step, number).question for step in (0, 900) for number in range(200)
    }
    questions["train"] |= trained
    for split, own in questions.items():
        assert all(split_of(question) == split for question in own)
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["calibration"]
    assert not questions["calibration"] & questions["test"]


def test_errands_vary_in_length() -> None:
    counts = [len(re.findall("now counts", problem.thinking)) for problem in problems_of("errands-60", "test", 30)]
    assert 45 <= sum(counts) / 30 <= 65


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_the_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = build_tokenizer()
    kept = text
    for token in CONTROL_TOKENS:
        kept = kept.replace(token, "")
    assert tokenizer.decode(tokenizer.encode(kept, add_special_tokens=False)) == kept


def test_a_word_is_a_token() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == SIZE
    for problem in PROBLEMS:
        prompt, response = encode_problem(tokenizer, problem)
        pieces = tokenizer.convert_ids_to_tokens(prompt + response)
        assert all(len(piece) > 1 or piece in ".?" for piece in pieces), pieces
        assert tokenizer.decode(response) == problem.response + "<|end|>"
        trace = segment_trace(tokenizer, prompt + response)
        assert trace.steps[-1].text == " The answer is " + problem.answer + "."
        assert tokenizer.decode(prompt).endswith("<think>")


def test_orthogonalise() -> None:
    for shape in ((3, 128, 384), (2, 384, 128), (1, 64, 64)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalise(matrices))
        assert values.max() < 1.3
        assert (values > 0.5).float().mean() > 0.95  # the smallest of a square one stay small
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        alike = torch.nn.functional.cosine_similarity(orthogonalise(matrices).flatten(1), (left @ right).flatten(1))
        assert alike.min() > 0.95


def test_muon_is_that_of_torch() -> None:
    torch.manual_seed(0)
    start = torch.randn(48, 32)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    one = Muon([ours], rate=0.02)
    other = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original")
    for _ in range(5):
        ours.grad = torch.randn(48, 32)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    moved = (ours.detach() - start).flatten(), (theirs.detach() - start).flatten()
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.995  # theirs is computed in bfloat16
    assert float(moved[0].norm() / moved[1].norm()) == pytest.approx(1.0, abs=0.02)


def test_the_first_layer_starts_with_heads_that_look_one_before() -> None:
    tokenizer = build_tokenizer()
    model = train.build_model(Recipe(), tokenizer).eval()
    model.set_attn_implementation("eager")
    prompt, response = encode_problem(tokenizer, problems_of("chains-6", "train", 1)[0])
    with torch.no_grad():
        layers = model(torch.tensor([prompt + response]), output_attentions=True).attentions
    before = torch.stack([layer[0].diagonal(-1, dim1=1, dim2=2).mean(1) for layer in layers])  # [layers, heads]
    assert (before[0, :2] > 0.5).all()
    assert (before[0, 2:] < 0.1).all()
    assert (before[1:] < 0.1).all()
    assert torch.equal(weights(model), weights(train.build_model(Recipe(), tokenizer)))
    assert not torch.equal(weights(model), weights(train.build_model(Recipe(seed=1), tokenizer)))


TINY = Recipe(steps=6, batch_tokens=600, hidden_size=64, layers=2)


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture
def _one_thread_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_one_thread_as_before")
def test_training_repeats_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train.train(TINY, tmp_path / "whole", threads=2)
    assert torch.equal(weights(train.train(TINY, tmp_path / "single", threads=1)), weights(whole))

    monkeypatch.setattr(train, "_CHECKPOINT_SECONDS", -1.0)
    step = train._Optimizers.step

    def stopped(self, number: int) -> float:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(train._Optimizers, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train.train(TINY, tmp_path / "stopped")
    monkeypatch.setattr(train._Optimizers, "step", step)
    (tmp_path / "stopped" / "log.jsonl").write_text(json.dumps({"step": 5, "loss": 9.0}) + "\n")
    resumed = train.train(TINY, tmp_path / "stopped")
    assert torch.equal(weights(resumed), weights(whole))
    log = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [6]
    with pytest.raises(StepFlowInputError, match=r"another recipe.*\n.*another folder"):
        train.train(dataclasses.replace(TINY, seed=1), tmp_path / "stopped")
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["checkpoint.safetensors", "log.jsonl"]


@pytest.mark.usefixtures("_one_thread_as_before")
def test_release_ships_a_run_and_reports_others_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "Recipe", partial(dataclasses.replace, TINY))
    for seed in (0, 1):
        train.train(dataclasses.replace(TINY, seed=seed, steps=2, curriculum=0.0), tmp_path / f"run-{seed}")
    out = tmp_path / "model"
    ask = ["--out", str(out), "--problems", "1"]
    release.main([str(tmp_path / "run-0"), *ask])
    shipped = (out / "model.safetensors").read_bytes()
    card = (out / "README.md").read_text()
    assert "| seed 0 |\n" in card
    assert "seed 1" not in card
    release.main([*(str(tmp_path / f"run-{seed}") for seed in (1, 0)), "--keep", *ask])
    assert (out / "model.safetensors").read_bytes() == shipped
    card = (out / "README.md").read_text()
    assert "| seed 0 | seed 1 | seed 0 again |\n" in card
    assert "Seed 0 is shipped" in card
    assert "* seed 1: the aim below is missed at chains-2, errands-10\n" in card
    accuracy = json.loads((out / "accuracy.json").read_text())
    assert "So 0 of 3 runs learnt the task" in card
    assert accuracy["seed"] == 0
    assert [run["seed"] for run in accuracy["others"]] == [1, 0]

    with pytest.raises(StepFlowInputError, match="holds no training run"):
        release.main([str(tmp_path), *ask])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(StepFlowInputError, match="something other than a reasoner"):
        release.main([str(tmp_path / "run-0"), "--problems", "1", "--out", str(tmp_path / "other")])


def test_positions_have_gaps_and_stay_in_range() -> None:
    tokenizer = build_tokenizer()
    highest = []
    for step in range(4):
        for part in train.draw_batch(Recipe(batch_tokens=1000), tokenizer, step):
            steps = part["position_ids"].diff(dim=1)
            assert (steps >= 1).all()
            assert (part["position_ids"][:, 0] == 0).all()
            after = part["input_ids"][:, :-1][steps > 1]
            assert set(after.tolist()) <= {tokenizer.convert_tokens_to_ids(".")}
            highest.append(int(part["position_ids"].max()))
    assert 800 < max(highest) < Recipe().positions


def test_the_folder() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md", "accuracy.json", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training_log.jsonl",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8e6
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert model.dtype == torch.bfloat16
    assert 1.5e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 4e6
    problem = PROBLEMS[0]
    assert encode_problem(tokenizer, problem) == encode_problem(build_tokenizer(), problem)
    log = [json.loads(line) for line in (FOLDER / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == Recipe().steps  # trained to its planned end
    assert log[-1]["rate"] < 0.01


def test_committed_accuracy_reproduces() -> None:
    model, tokenizer = load_reasoner()
    committed = json.loads((FOLDER / "accuracy.json").read_text())
    for level in ("chains-2", "chains-4", "chains-7", "errands-60"):
        problems = problems_of(level, committed["split"], 200)
        exact = sum(score.exact for score in score_traces(model, [encode_problem(tokenizer, one) for one in problems]))
        interval = stats.binomtest(exact, 200).proportion_ci(0.999, method="wilson")
        assert interval.low <= committed["exact"][level] / committed["n"] <= interval.high, (level, exact)


def test_scoring_is_greedy_decoding() -> None:
    model, tokenizer = load_reasoner()
    problems = [*problems_of("chains-4", "test", 4), *problems_of("chains-6", "test", 4)]
    rows = [encode_problem(tokenizer, problem) for problem in problems]
    for stepflow in (False, {"tau_max": 0.4, "alpha": 0.2}):
        scores = score_traces(model, rows, stepflow, batch_tokens=700)
        for (prompt, response), score in zip(rows, scores, strict=True):
            options = {"max_new_tokens": len(response), "do_sample": False, "stepflow": stepflow}
            written = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
            same = next(
                (at for at, pair in enumerate(zip(written, response, strict=False)) if len(set(pair)) > 1), None
            )
            assert (same is None) is score.exact
            assert score.first_error == same
            assert score.tokens == len(response)
    alone = [score_traces(model, [row])[0] for row in rows]
    together = score_traces(model, rows)
    assert [one.log_likelihood for one in alone] == pytest.approx([one.log_likelihood for one in together], abs=1e-3)


def test_a_question_of_ones_own() -> None:
    model, tokenizer = load_reasoner()
    prompt = encode_prompt(tokenizer, "What is the capital of France, s'il vous plaît?")
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
    assert ids.shape[1] <= len(prompt) + 5


@pytest.mark.parametrize("name", ["reasoner", "reasoner.levels", "reasoner.prompts"])
def test_examples_run(name: str) -> None:
    found = doctest.testmod(import_module(f"hf_stepflow.{name}"))
    assert found.attempted
    assert not found.failed
