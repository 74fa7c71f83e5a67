"""What there is to say of an answer: its steps, where two answers part, and what StepFlow did."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_stepflow.runtime.report import FlowReport
    from hf_stepflow.runtime.step_detector import StepVocabulary
    from hf_stepflow.runtime.trace import TraceStep


def written_steps(
    tokenizer: Any, prompt: list[int], ids: list[int], vocabulary: "StepVocabulary"
) -> "list[TraceStep]":
    """The thinking and summary steps of an answer, without those that its prompt holds.

    Args:
        tokenizer: the model's tokenizer.
        prompt: token ids of the prompt.
        ids: token ids of the answer.
        vocabulary: the step rules.
    """
    from hf_stepflow.runtime.trace import segment_trace

    trace = segment_trace(tokenizer, prompt + ids, vocabulary, prompt_length=len(prompt))
    return [step for step in trace.steps if step.label != "question" and step.end > len(prompt)]


def line_of(step: "TraceStep") -> str:
    """The text of a step as one line."""
    return " ".join((step.text or "").split())


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """The place of the first step in which two answers differ, one of them having ended included; None without any."""
    pairs = enumerate(zip_longest(one, other))
    return next((place for place, (left, right) in pairs if left != right), None)


def did(report: "FlowReport") -> str:
    """What StepFlow did, without the steps themselves."""
    return "\n".join(line for line in str(report).splitlines() if "tokens" not in line)
