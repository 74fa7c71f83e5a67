"""One run: budgets, likelihoods, and answers under other step rules."""

import math

import pytest
import torch

from hf_stepflow.calibration.candidates import EMPTY, tidied
from hf_stepflow.calibration.proxy import Row
from hf_stepflow.calibration.run import ENDS, Budget, CalibrationRun, Sampling, parse_budget
from hf_stepflow.calibration.splits import batches_of
from hf_stepflow.calibration.verdict import random_steps
from hf_stepflow.calibration.work_folder import Workers, WorkFolder
from hf_stepflow.runtime.errors import StepFlowInputError
from tests.support.calibration import problems
from tests.support.flow import attach, byte_tokenizer, encode
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("40", Budget(40)),
        (7, Budget(7)),
        ("90s", Budget(1000, 90)),
        ("20m", Budget(1000, 1200)),
        ("1.5h", Budget(1000, 5400)),
        (Budget(3), Budget(3)),
    ],
)
def test_budgets(text: object, expected: Budget) -> None:
    assert parse_budget(text) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "0", "-3", "2.5", "ten", "5d", "0m", "nan"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(StepFlowInputError, match="budget"):
        parse_budget(text)


def test_stages_share_the_time() -> None:
    assert list(ENDS.values()) == sorted(ENDS.values())
    assert ENDS["ablations"] == 1
    assert Budget(1, 200).end_of("traces") == pytest.approx(200 * ENDS["traces"])
    assert Budget(1).end_of("traces") is None


def test_likelihoods_are_those_of_one_row_alone() -> None:
    model = attach(tiny_model("llama", seed=3), "paper")
    folder = WorkFolder(None, {}, {})
    run = CalibrationRun(model, byte_tokenizer(), Sampling(), folder, Workers(), progress=False)
    texts = [("How many?<think>", "Two of them. Then one."), ("Ann has 4 eggs.<think>", "Four.</think>It is 4.")]
    rows = [Row(str(at), tuple(encode(one)), tuple(encode(other)), True) for at, (one, other) in enumerate(texts)]
    for settings in (None, {**EMPTY, "oeb_layers": [0, 1], "tau_max": 0.4}):
        found = run.scores(settings, rows)
        for row, value in zip(rows, found, strict=True):
            with torch.no_grad(), model.use_stepflow(False if settings is None else settings):
                logits = model(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
            own = sum(float(logits[at - 1, row.ids[at]]) for at in range(len(row.prompt), len(row.ids)))
            assert value.log_likelihood == pytest.approx(own, rel=1e-4)
            wrong = [at for at in range(len(row.prompt), len(row.ids)) if logits[at - 1].argmax() != row.ids[at]]
            assert (value.errors, value.tokens) == (len(wrong), len(row.response))
        assert math.isfinite(sum(one.log_likelihood for one in found))
        assert run.scores(settings, rows) == found


def test_random_steps_are_in_force_for_their_control_alone() -> None:
    model = attach(tiny_model("llama"), "paper")
    runtime = model.stepflow_runtime
    own = runtime.rules.vocabulary
    random = random_steps(
        own, [(encode("Ann has two eggs.<think>Bob has three. So five in all.</think>Five."), 0)], seed=1
    )
    batches = batches_of(problems(3), 3, "calibration", 0)
    folder = WorkFolder(None, {}, {})
    run = CalibrationRun(model, byte_tokenizer(), Sampling(max_new_tokens=4), folder, Workers(), progress=False)
    for vocabulary in (random, None):
        run.answers({"arm": tidied({"smi_layers": [0], "alpha": 0.1})}, batches, "steps", vocabulary=vocabulary)
        state, plan = runtime.last
        assert state.vocabulary is (vocabulary or own)
        assert (plan.settings.alpha, plan.settings.tau_max) == (0.1, 0.0)
    assert runtime.rules.vocabulary is own
