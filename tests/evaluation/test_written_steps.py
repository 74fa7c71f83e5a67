"""Steps found in a text alone are those that the rules find in its tokens; two answers are aligned step by step."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_stepflow import StepVocabulary, segment_trace
from hf_stepflow.evaluation.aligned_steps import StepPair, align_steps
from hf_stepflow.evaluation.written_steps import TextSteps
from hf_stepflow.runtime.settings import StepFlowSettings
from tests.support.step_tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
WORDS = "So Wait, Dr. Ann has 7 points. e.g. 1.5 2. 文字。 … ok? | - `x` </think> <think> \\boxed{4} naïve 😀".split(
    " "
)
WORDS += ["\n", "\n\n"]


def compared(label: str, index: int, text: str) -> tuple[str, int, str]:
    """A step without blanks at its ends, and without the first byte of the marker after it."""
    return label, index, text.strip().removesuffix("<").strip()


def steps_by_tokens(text: str, vocabulary: StepVocabulary, opening: str) -> list[tuple[str, int, str]]:
    """The steps of a text cut into single bytes, which the rules read as any other tokens."""
    data = (opening + text).encode()
    steps = segment_trace(TOKENIZER, list(data), vocabulary).steps
    return [
        compared(step.label, step.index, data[step.start : step.end].decode())
        for step in steps
        if step.label != "question"
    ]


@pytest.mark.parametrize("rule", ["sentence", "paragraph"])
def test_they_are_those_of_the_tokens(rule: str) -> None:
    settings = StepFlowSettings(step_rule=rule, min_step_chars=6)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 40))) for _ in range(60)]
    cutter, vocabulary = TextSteps(texts, settings), StepVocabulary.from_tokenizer(TOKENIZER, settings)
    checked = 0
    for text in texts:
        for is_thinking in (False, True):
            head = text.split("</think>")[0]
            opening = "<think>" if is_thinking and "<think>" not in head else ""
            found = [
                compared(one.label, one.index, text[one.start : one.end])
                for one in cutter.cut(text, is_thinking)
                if one.label != "question"
            ]
            assert found == steps_by_tokens(text, vocabulary, opening), text
            checked += len(found)
    assert checked > 200


def test_thinking_may_be_implicit() -> None:
    settings = StepFlowSettings(implicit_thinking=True, min_step_chars=5, summary_start=["The answer is"])
    text = "Ann has 7 points. So Ben has 4. The answer is 4."
    found = TextSteps([text], settings).cut(text, is_thinking=True)
    assert [(one.label, text[one.start : one.end]) for one in found][:2] == [
        ("thinking", "Ann has 7 points."),
        ("thinking", " So Ben has 4."),
    ]


def test_special_tokens_are_in_no_step() -> None:
    settings = StepFlowSettings(
        thinking_start="<|channel|>analysis<|message|>", summary_start="<|channel|>final<|message|>", min_step_chars=5
    )
    text = (
        "<|channel|>analysis<|message|>Two and two. They make four.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is four.<|return|>"
    )
    found = TextSteps([text], settings).cut(text, is_thinking=True)
    assert [(one.label, text[one.start : one.end]) for one in found if one.index] == [
        ("thinking", "Two and two."),
        ("thinking", " They make four."),
        ("summary", "It is four."),
    ]


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc "), max_size=8))
def test_an_alignment_holds_every_step_once(first: list[str], other: list[str]) -> None:
    pairs = align_steps(first, other)
    assert [pair.first for pair in pairs if pair.first is not None] == list(range(len(first)))
    assert [pair.other for pair in pairs if pair.other is not None] == list(range(len(other)))
    for pair in pairs:
        if pair.is_same:
            assert first[pair.first] == other[pair.other]
    differs = next((place for place, pair in enumerate(pairs) if not pair.is_same), None)
    shared = [one == two for one, two in zip(first, other, strict=False)]
    common = shared.index(False) if False in shared else len(shared)
    assert differs == (None if first == other else common)


def test_a_common_beginning_stands_first() -> None:
    # The longest block that both share lies elsewhere.
    pairs = align_steps(["x", "y"], ["x", "z", "x", "y"])
    assert pairs[0] == StepPair(0, 0, True)
    assert align_steps(["a  b"], [" a b"]) == [StepPair(0, 0, True)]
