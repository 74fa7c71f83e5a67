"""How responses are read: with and without the markers of the settings."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_stepflow import StepFlowConfig, StepFlowModelForCausalLM
from hf_stepflow.evaluation.problem import EvalProblem
from hf_stepflow.evaluation.run import evaluate
from hf_stepflow.runtime.configuration_stepflow import read_settings, settings_from_data
from hf_stepflow.runtime.errors import StepFlowConfigError
from hf_stepflow.runtime.settings import ANSWER_PHRASES, StepFlowSettings
from hf_stepflow.runtime.step_detector import SUMMARY_START, StepVocabulary
from tests.support.scripted import scripted_model

EGGS = EvalProblem("eggs", "Two eggs and one egg?", "3", kind="number")
HALF = EvalProblem("half", "One egg for two?", "\\frac{1}{2}", kind="math")
CHOICE = EvalProblem("choice", "How many?", "B", ("two", "three"), kind="choice")
IMPLICIT = {"implicit_thinking": True}


def outcomes(problem: EvalProblem, text: str, settings: dict, template: str | None = None) -> dict[str, str]:
    """The outcome of one response in the arm without StepFlow and in the arm with it."""
    model, tokenizer = scripted_model(lambda _: text, *([] if template is None else [template]))
    StepFlowModelForCausalLM.attach(model, settings, tokenizer=tokenizer)
    result = evaluate(model, [problem], tokenizer=tokenizer, max_new_tokens=400, progress=False)
    return {row["arm"]: row["outcome"] for row in result.results}


@pytest.mark.parametrize("settings", [IMPLICIT, {}, IMPLICIT | {"summary_start": "</think>"}])
@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (EGGS, "Two eggs and one egg make three eggs. So we get \\boxed{3}."),
        (EGGS, "First there are 2 eggs. Then there is 1 more. The answer is 3."),
        (EGGS, "There are 2 and 1, which is 3"),
        (HALF, "Each gets half of one egg. So the result is \\boxed{\\frac{1}{2}}."),
        (CHOICE, "Two and one make three. The answer is B."),
        (CHOICE, "Two and one make three. So it is \\boxed{B}"),
    ],
)
def test_a_plain_model_that_ends_its_turn_has_answered(problem: EvalProblem, text: str, settings: dict) -> None:
    assert outcomes(problem, text, settings) == {"base": "correct", "stepflow": "correct"}


@pytest.mark.parametrize("settings", [IMPLICIT, {}])
def test_a_turn_that_was_not_ended_is_unfinished(settings: dict) -> None:
    text = "So we get \\boxed{3}, and now let us see whether that is..."
    assert set(outcomes(EGGS, text, settings).values()) == {"unfinished"}


def test_a_summary_decides_where_there_is_one() -> None:
    opened = "{{ messages[0]['content'] }}\n<think>"
    assert set(outcomes(EGGS, "Maybe \\boxed{2}, or not.</think>It is 3.", {}, opened).values()) == {"correct"}
    assert set(outcomes(EGGS, "It is \\boxed{3}.</think>It is 2.", {}, opened).values()) == {"wrong"}
    # Without any text in the summary, or without a summary, the whole response is the answer.
    assert set(outcomes(EGGS, "It is \\boxed{3}.</think>\n", {}, opened).values()) == {"correct"}
    assert set(outcomes(EGGS, "It is \\boxed{3}.", {}, opened).values()) == {"correct"}


def test_the_summary_of_implicit_thinking() -> None:
    phrases = list(ANSWER_PHRASES)
    assert StepFlowSettings().replace(**IMPLICIT).summary_start == phrases
    assert read_settings(dict(IMPLICIT)).summary_start == phrases
    assert StepFlowConfig(**IMPLICIT).summary_start == phrases
    assert settings_from_data(dict(IMPLICIT), "a file").summary_start == phrases
    # Off again, and the defaults of each.
    assert StepFlowSettings().replace(**IMPLICIT).replace(implicit_thinking=False) == StepFlowSettings()
    assert StepFlowSettings().replace(implicit_thinking=False) == StepFlowSettings()
    # A value that is given stays, the default of explicit thinking included, here and in stored settings.
    for given in ("</think>", "So:", None):
        settings = StepFlowSettings().replace(**IMPLICIT, summary_start=given)
        assert settings.summary_start == given
        assert read_settings(settings.to_dict()) == settings
        assert StepFlowConfig(**settings.to_dict()).settings == settings
        assert settings.replace(tau_max=0.2).summary_start == given
    assert StepFlowSettings(summary_start="So:").replace(**IMPLICIT).summary_start == "So:"


def test_a_default_asks_no_tokenizer_for_more_than_it_can_write() -> None:
    words = {word: index for index, word in enumerate(["<unk>", "The", "answer", "is", "three"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    vocabulary = StepVocabulary.from_tokenizer(tokenizer, IMPLICIT)
    assert vocabulary.marker_ids[SUMMARY_START] == [tokenizer.encode("The answer is", add_special_tokens=False)]
    with pytest.raises(StepFlowConfigError, match="cannot write the marker"):
        StepVocabulary.from_tokenizer(tokenizer, IMPLICIT | {"summary_start": ["The answer is", "Final answer"]})
