"""The trace that a verified model reads, and whose keys are whose in it: docs/method.md, written a second time."""

from dataclasses import dataclass
from typing import Any

import torch

from hf_stepflow.prompts import encode_prompt
from hf_stepflow.runtime.trace import segment_trace

QUESTION = "Ben has 4 points. Ann has 3 more than Ben. Eve has 5 more than Ann. How many points does Eve have?"
# Steps under each step rule: sentences, paragraphs, and lines that open with a cue word.
STEPS = (
    "Ben has 4 points.",
    "So Ann has 4 + 3 = 7 points.",
    "Wait, Eve has 5 more than Ann.",
    "So Eve has 12 points.",
)
ANSWER = "Eve has 12 points.\n\nThe answer is 12."


@dataclass
class ReadTrace:
    """The trace, and which keys are whose: docs/method.md, written a second time.

    Attributes:
        rules: The settings in force.
        ids: long [1, T].
        prompt_length: Where the prompt ends.
        segment: Segment of each token: 0 question, 1 thinking, 2 summary.
        step: Step of each token, -1 in no step.
        same: Bool [T, T]: the keys of S for each query, before the mask.
        bridge: Bool [T, T]: those of B.
        checked: Bool [T]: the queries of S and B that are in a step, and so are bridged.
        plain: Bool [T]: the queries of the question, which are not.
        group: Group of each key, [T]: S and B consist of whole groups.
        previous: {first token of a step: the tokens of the step before}.
    """

    rules: Any
    ids: torch.Tensor
    prompt_length: int
    segment: list[int]
    step: list[int]
    same: torch.Tensor
    bridge: torch.Tensor
    checked: torch.Tensor
    plain: torch.Tensor
    group: torch.Tensor
    previous: dict[int, list[int]]

    @property
    def settings(self) -> Any:
        """The settings."""
        return self.rules.plan.settings

    @classmethod
    def of(cls, model: Any) -> "ReadTrace":
        """Makes the trace for a model's settings and tokenizer."""
        runtime = model.stepflow_runtime
        rules = model._call_rules(None, None) or runtime.rules
        settings, tokenizer = rules.plan.settings, runtime.tokenizer
        prompt = list(encode_prompt(tokenizer, QUESTION))
        start, end = settings.markers("thinking_start"), settings.markers("summary_start")
        opened = settings.implicit_thinking or any(tokenizer.decode(prompt).rstrip().endswith(mark) for mark in start)
        text = ("" if opened else start[0] + "\n") + "\n\n".join(STEPS) + f"\n\n{end[0]}\n\n{ANSWER}"
        ids = prompt + tokenizer.encode(text, add_special_tokens=False)
        found = segment_trace(tokenizer, ids, rules.vocabulary, prompt_length=len(prompt))
        segment, step = found.segment_ids.tolist(), found.step_ids.tolist()
        numbers = torch.arange(len(ids))
        same = torch.zeros(len(ids), len(ids), dtype=torch.bool)
        bridge, checked = same.clone(), torch.zeros(len(ids), dtype=torch.bool)
        starts = _starts(segment, step)
        is_thinking, is_summary = (torch.tensor([each == kind for each in segment]) for kind in (1, 2))
        for query in range(len(ids)):
            if segment[query] < 1 or step[query] < 1:
                continue
            if settings.oeb_span is not None and query - starts[step[query]] >= settings.oeb_span:
                continue
            if segment[query] == 1:
                since = starts[step[query]] if settings.bridge_scope == "step" else 0
                same[query] = is_thinking & (numbers >= since)
                bridge[query] = ~same[query]
            else:
                same[query], bridge[query] = is_summary, is_thinking
            bridge[query] &= numbers >= settings.sink_tokens
            checked[query] = True
        run = [sum(start <= token for start in starts.values()) for token in range(len(ids))]
        keys = [(segment[token], run[token], token < settings.sink_tokens) for token in range(len(ids))]
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        return cls(
            rules,
            torch.tensor([ids], device=model.device),
            len(prompt),
            segment,
            step,
            same,
            bridge,
            checked,
            torch.tensor([each == 0 for each in segment]),
            torch.tensor([places[key] for key in keys]),
            _previous(segment, step, settings.smi_window),
        )

    def lengths(self) -> dict[str, int]:
        """The number of tokens and steps."""
        steps = [
            len({s for s, kind in zip(self.step, self.segment, strict=True) if kind == k and s > 0}) for k in (1, 2)
        ]
        return {"tokens": len(self.segment), "thinking steps": steps[0], "summary steps": steps[1]}


def _starts(segment: list[int], step: list[int]) -> dict[int, int]:
    """The first token of each step, by its number."""
    starts: dict[int, int] = {}
    for token, (kind, number) in enumerate(zip(segment, step, strict=True)):
        if kind > 0 and number > 0:
            starts.setdefault(number, token)
    return starts


def _previous(segment: list[int], step: list[int], window: int | None) -> dict[int, list[int]]:
    """The tokens of the thinking step before each first token of a step; the summary's first step counts alone."""
    starts = _starts(segment, step)
    thinking = [number for number, token in starts.items() if segment[token] == 1]
    summary = [number for number, token in starts.items() if segment[token] == 2][:1]
    found = {}
    for earlier, number in zip(thinking, [*thinking[1:], *summary], strict=False):
        tokens = [token for token, each in enumerate(step) if each == earlier and segment[token] == 1]
        kept = tokens if window is None else tokens[len(tokens) - min(window, len(tokens)) :]
        if kept:
            found[starts[number]] = kept
    return found
