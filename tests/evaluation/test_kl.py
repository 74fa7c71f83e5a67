"""The KL of an arm against the sum of its definition, on logits of naive float64 models."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from hf_stepflow.cli import main
from hf_stepflow.evaluation.arms import Arm
from hf_stepflow.evaluation.engine import Engine
from hf_stepflow.evaluation.kl import kl_to_base, make_row
from hf_stepflow.evaluation.neutral import PROSE, REQUEST, NeutralText, neutral_texts
from hf_stepflow.evaluation.result import EvaluationResult
from hf_stepflow.evaluation.rivals import make_rival
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.problems import load_problems
from hf_stepflow.reasoner import load_reasoner
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.step_detector import StepVocabulary
from hf_stepflow.runtime.trace import segment_trace
from tests.evaluation.test_rivals import Reference
from tests.support.flow import VARIANTS, attach, byte_tokenizer, encode, oracle_logits
from tests.support.tiny_models import tiny_model

TEXTS = [
    NeutralText("Tell me.", "The kettle sings. Then it is quiet now.\n\nAnd a cat sleeps here."),
    NeutralText("Go on.", "A river bends. It takes the earth away. So it goes."),
]


SHORT = [NeutralText("Hm?", "It is so. Now go on."), NeutralText("Yes?", "Rain fell. Then sun.")]


def divergences(first: torch.Tensor, second: torch.Tensor) -> list[float]:
    """Sum of p log(p / q), token by token of the vocabulary."""
    found = []
    for one, other in zip(first.double().tolist(), second.double().tolist(), strict=True):
        totals = [max(row) + math.log(math.fsum(math.exp(x - max(row)) for x in row)) for row in (one, other)]
        logs = [(x - totals[0], y - totals[1]) for x, y in zip(one, other, strict=True)]
        found.append(math.fsum(math.exp(p) * (p - q) for p, q in logs))
    return found


def check(found, expected: list[float]) -> None:
    assert found.tokens == len(expected)
    assert found.median == pytest.approx(np.median(expected), rel=1e-4)
    assert found.high == pytest.approx(np.percentile(expected, 95), rel=1e-4)
    assert found.mean == pytest.approx(np.mean(expected), rel=1e-4)
    assert found.median > 1e-4


@pytest.mark.parametrize("variant", ["paper", "implicit"])
def test_stepflow_equals_the_oracle(variant: str) -> None:
    settings, base = VARIANTS[variant], tiny_model("llama", dtype=torch.float64)
    expected = []
    for text in SHORT:
        opening = "" if settings.implicit_thinking else "<think>"
        before, ids = encode(text.prompt + opening), encode(text.prompt + opening + text.text)
        with torch.no_grad():
            plain = base(torch.tensor([ids])).logits[0]
        flow = oracle_logits(base, ids, settings, len(encode(text.prompt)))
        expected += divergences(plain[len(before) :], flow[len(before) :])
    model = attach(tiny_model("llama", dtype=torch.float64), settings)
    rules = model.stepflow_runtime.rules.vocabulary
    arms = {"base": Arm(), "flow": Arm(stepflow=True), "vote": Arm(stepflow=True, samples=4)}
    before = model.stepflow_runtime.last
    found = kl_to_base(model, byte_tokenizer(), arms, SHORT, dict.fromkeys(arms, rules))
    assert model.stepflow_runtime.last is before  # the report is of what the user ran
    check(found["flow"], expected)
    assert found.keys() == {"flow", "vote"}  # the base moves nothing
    assert found["vote"] == found["flow"]
    assert found["flow"].is_thinking


@pytest.mark.parametrize(("kind", "parameters"), [("instaboost", {"factor": 4.0}), ("spotlight", {"target": 0.6})])
def test_a_rival_equals_its_equations(kind: str, parameters: dict) -> None:
    model, naive = (tiny_model("qwen3", dtype=torch.float64) for _ in range(2))
    expected = []
    for text in TEXTS:
        before = encode(text.prompt + "<think>")
        ids = torch.tensor([before + encode(text.text)])
        question = set(range(len(encode(text.prompt))))
        reference = Reference(make_rival(kind, parameters), question, len(question), softcap=False)
        AttentionInterface.register("rival_reference", reference)
        naive.config._attn_implementation_internal = "rival_reference"
        with torch.no_grad():
            both = [one(ids).logits[0, len(before) :] for one in (model, naive)]
        expected += divergences(*both)
    arms = {"rival": Arm(rival=kind, rival_parameters=parameters)}
    vocabulary = StepVocabulary.from_tokenizer(byte_tokenizer())
    found = kl_to_base(model, byte_tokenizer(), arms, TEXTS, {"rival": vocabulary})
    check(found["rival"], expected)


def test_texts_are_thinking_and_fit() -> None:
    tokenizer = byte_tokenizer()
    vocabulary = StepVocabulary.from_tokenizer(tokenizer)
    row = make_row(tokenizer, NeutralText("Hi.", PROSE[0]), vocabulary)
    assert row.ids[: row.prompt_length + 1] == encode("Hi.<think>")
    assert row.measured == list(range(row.prompt_length + 1, row.prompt_length + 161))
    assert make_row(tokenizer, TEXTS[0], vocabulary, positions=30).ids == encode(
        "Tell me.<think>" + TEXTS[0].text
    )[:30]  # fmt: skip
    with pytest.raises(StepFlowInputError, match=r"no tokens to compare.* 5 positions"):
        kl_to_base(attach(tiny_model("llama"), "paper"), tokenizer, {"a": Arm(stepflow=True)}, TEXTS,
                   {"a": vocabulary}, 5)  # fmt: skip
    reasoner, problems = load_reasoner()[1], load_problems("reasoner:chains-2", 9)
    kind, texts = neutral_texts(reasoner, problems)
    assert (kind, len(texts)) == ("traces", 4)
    rules = StepVocabulary.from_tokenizer(reasoner)
    row = make_row(reasoner, texts[0], rules)
    assert "answer" not in reasoner.decode([row.ids[place] for place in row.measured])
    assert row.is_thinking
    assert neutral_texts(reasoner)[0] == "prose"
    assert neutral_texts(tokenizer)[1][0] == NeutralText(REQUEST, PROSE[0])


def test_prose_is_thinking_in_steps() -> None:
    for text in PROSE:
        trace = segment_trace(byte_tokenizer(), encode("Hi.<think>" + text))
        assert [step.label for step in trace.steps].count("thinking") >= 4
        assert trace.steps[-1].label == "thinking"


def test_a_run_measures_it_once_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, problems = load_reasoner()[0], load_problems("reasoner:chains-2", 2)
    arms = {"base": False, "strong": {"tau_max": 0.9, "oeb_layers": "all"}}
    options = {"max_new_tokens": 20, "progress": False, "check": False}
    out = tmp_path / "results.jsonl"
    result = evaluate(model, problems, arms, out=out, **options)
    first, second = result.damage
    assert first.kl is None
    assert second.kl is not None
    assert second.kl.high > second.kl.median >= 0
    assert "KL p95" in str(result)
    assert f"on {second.kl.tokens} tokens of traces, as thinking." in str(result)
    assert json.loads(json.dumps(result.to_dict()))["damage"][1]["kl"]["tokens"] == second.kl.tokens
    monkeypatch.setattr("hf_stepflow.evaluation.engine.kl_to_base", lambda *_, **__: pytest.fail("measured again"))
    assert evaluate(model, problems, arms, out=out, **options).damage == result.damage
    assert EvaluationResult.load(out).damage == result.damage
    without = evaluate(model, problems, arms, kl=False, **options)
    assert [one.kl for one in without.damage] == [None, None]
    assert "KL" not in str(without)


def test_engines_without_predictions_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    about = {"kl": Engine().next_token_kl({}, [], {})}
    model, problems = load_reasoner()[0], load_problems("reasoner:chains-2", 1)
    made = evaluate(model, problems, {"base": False}, max_new_tokens=5, progress=False, check=False)
    assert "KL" not in str(made)
    text = str(EvaluationResult(made.run, about, made.results))
    assert "KL was not measured: Engine gives no predictions on given texts." in text
    words = "eval --model reasoner --problems reasoner:chains-2 --limit 1 --max-new-tokens 5 --no-check --no-kl"
    assert main(words.split()) == 0
    assert "KL" not in capsys.readouterr().out
