"""calibrate stops at the base's first batch if it shows no answers or no steps."""

from pathlib import Path

import pytest

from hf_stepflow.calibration import calibrate
from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.runtime.errors import StepFlowConfigError, StepFlowInputError
from tests.support.scripted import PLAIN_CHAT, scripted_model

PROBLEMS = [
    EvalProblem(str(number), f"How many are {number}?", "B", ("one", "two"), kind="choice") for number in range(40)
]
OPENED = PLAIN_CHAT + "<think>"


def run(text: str, template: str, work: Path, **options):
    model, tokenizer = scripted_model(lambda _: text, template)
    return calibrate(
        model, tokenizer, PROBLEMS, budget=1, max_new_tokens=100, batch_size=8, work=work, progress=False, **options
    )


@pytest.mark.parametrize(
    ("text", "template", "error", "words"),
    [
        (
            "So it is two.</think>Who knows.",
            OPENED,
            StepFlowInputError,
            r"no answer was found .* first 8 .*Who knows\.",
        ),
        ("The answer is B.", PLAIN_CHAT, StepFlowConfigError, "no thinking step .* first 8 responses of the base"),
    ],
)
def test_the_first_batch_stops_it(tmp_path: Path, text: str, template: str, error: type, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        run(text, template, tmp_path / "work")
    assert "implicit_thinking" in caught.value.hint
    assert "--no-check" not in caught.value.hint
    assert len(list((tmp_path / "work" / "answers").iterdir())) == 1  # of the base, and no other batch


def test_a_plain_model_reaches_the_gate(tmp_path: Path) -> None:
    result = run("There is one. So it is \\boxed{B}", PLAIN_CHAT, tmp_path, stepflow={"implicit_thinking": True})
    assert not result.gate.is_open  # it makes no mistake
    assert result.exit_status == 3
