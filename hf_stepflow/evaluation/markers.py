"""The markers by which steps and answers are found: in words, in a tokenizer, and in its chat template."""

from collections.abc import Iterable, Sequence
from typing import Any

from hf_stepflow.runtime.errors import shown
from hf_stepflow.runtime.settings import StepFlowSettings


def describe_markers(settings: StepFlowSettings) -> str:
    """Says in one sentence where thinking and the summary start, and where the answer is looked for.

    Example:
        >>> from hf_stepflow.evaluation.markers import describe_markers
        >>> from hf_stepflow.runtime.settings import StepFlowSettings
        >>> describe_markers(StepFlowSettings())
        "thinking starts after '<think>', the summary after '</think>'; the answer is in the summary, or without one \
anywhere in the response"
    """
    summary = _either(settings.markers("summary_start"))
    if settings.implicit_thinking:
        start = f", the summary after {summary}" if summary else ", no summary"
        return f"thinking starts at the end of the prompt{start}; the answer is anywhere in the response"
    start = f", the summary after {summary}" if summary else ""
    return (
        f"thinking starts after {_either(settings.markers('thinking_start'))}{start}; "
        "the answer is in the summary, or without one anywhere in the response"
    )


def _either(markers: Iterable[str]) -> str:
    return " or ".join(shown(marker) for marker in markers)


def find_marker(tokenizer: Any, text: str) -> dict[str, Any]:
    """Looks for a marker in the vocabulary of a tokenizer, as a single token, and in its chat template."""
    template = str(tokenizer.chat_template or "")
    return {"text": text, "single_token": text in tokenizer.get_vocab(), "in_template": text in template}


def unknown_markers(tokenizer: Any, settings: StepFlowSettings, prompts: Iterable[Sequence[int]] = ()) -> list[str]:
    """Returns the markers that start thinking if nothing shows that the model knows any of them.

    Args:
        tokenizer: The model's tokenizer.
        settings: The settings.
        prompts: The token ids of prompts, which may hold a marker as text.
    """
    if settings.implicit_thinking:
        return []
    markers = settings.markers("thinking_start")
    # The prompts show what the template makes of a problem; decoding all of them would take long.
    texts = [tokenizer.decode(ids) for ids, _ in zip(prompts, range(8), strict=False)]
    for marker in markers:
        found = find_marker(tokenizer, marker)
        if found["single_token"] or found["in_template"] or any(marker in text for text in texts):
            return []
    return markers
