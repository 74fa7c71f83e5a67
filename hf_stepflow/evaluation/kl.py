"""KL: how far an arm moves the next-token predictions of the model on text without a task.

The text stands where the arm acts: as the model's thinking, after a user's message. StepFlow's bridge needs thinking,
so on bare text it would do nothing in a model with markers, whatever it does to answers. Of a trace with a summary,
only the thinking is measured. Methods that emphasise the question emphasise the user's message. At most 160 tokens of
a text are read.

Source: the Kullback-Leibler divergence of the arm's distribution from the model's own, sum of p log(p / q) with p the
model's own, at every token of the text; both read the same tokens.

Shapes: T tokens of prompt and text, n measured tokens, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_stepflow.prompts import encode_prompt
from hf_stepflow.runtime.errors import StepFlowInputError
from hf_stepflow.runtime.step_detector import THINKING, Field, StepVocabulary

from .arms import Arm
from .damage import NextTokenKL
from .emphasis import emphasised_tokens
from .neutral import NeutralText
from .rivals import steered
from .sampler import prepared

# Positions whose probabilities exist at once, and tokens of a text.
_PIECE, _LONGEST = 64, 160


@dataclass(frozen=True)
class Row:
    """One text as token ids.

    Attributes:
        ids: The prompt, what opens the thinking, and the text, T tokens.
        prompt_length: The number of tokens of the prompt.
        measured: The places of the tokens after which predictions are compared.
        is_thinking: Whether the measured tokens are thinking.
    """

    ids: list[int]
    prompt_length: int
    measured: list[int]
    is_thinking: bool


def kl_to_base(
    model: Any,
    tokenizer: Any,
    arms: Mapping[str, Arm],
    texts: Sequence[NeutralText],
    vocabularies: Mapping[str, StepVocabulary],
    positions: int | None = None,
    **template: Any,
) -> dict[str, NextTokenKL]:
    """Measures the KL of every arm to the model without StepFlow and without a rival.

    Other methods of an arm (votes, budgets, instructions) change no prediction on a given text and are left out.

    Args:
        model: The model, with StepFlow attached if an arm has it.
        tokenizer: The model's tokenizer.
        arms: The arms.
        texts: The texts.
        vocabularies: The step rules of each arm.
        positions: The positions that the model has; longer texts are cut.
        **template: Further arguments of the chat template.

    Returns:
        The divergence of each arm with StepFlow or a rival.

    Raises:
        StepFlowInputError: There is no text, or none has a token to measure.

    Example:
        >>> from hf_stepflow import Arm, load_reasoner
        >>> from hf_stepflow.evaluation.kl import kl_to_base
        >>> from hf_stepflow.evaluation.neutral import NeutralText
        >>> model, tokenizer = load_reasoner()
        >>> text = NeutralText("How many points does Ann have?", " Ann has 3 points. Ben has 4 points.")
        >>> rules = {"flow": model.stepflow_runtime.rules.vocabulary}
        >>> kl_to_base(model, tokenizer, {"flow": Arm(stepflow={"tau_max": 0.3})}, [text], rules)["flow"].tokens
        6
    """
    acting = {name: arm for name, arm in arms.items() if arm.stepflow is not False or arm.rival is not None}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in acting}
    is_thinking = dict.fromkeys(acting, True)
    with torch.no_grad(), prepared(model), _report_kept(model):
        for text in texts:
            places: list[int] = []
            if any(arm.rival is not None for arm in acting.values()):
                prompt = encode_prompt(tokenizer, text.prompt, **template)
                places = emphasised_tokens(tokenizer, text.prompt, text.prompt, prompt, **template)
            base: dict[str, torch.Tensor] = {}
            known: dict[str, torch.Tensor] = {}
            for name, arm in acting.items():
                row = make_row(tokenizer, text, vocabularies[name], positions, **template)
                is_thinking[name] &= row.is_thinking
                if repr(row) not in base:
                    base[repr(row)] = _logits(model, row, Arm(), places)
                key = repr((arm.stepflow, arm.rival, arm.rival_parameters, row))  # methods on top change nothing
                if key not in known:
                    known[key] = _divergence(base[repr(row)], _logits(model, row, arm, places))
                found[name].append(known[key])
    if any(sum(map(len, parts)) == 0 for parts in found.values()):
        raise StepFlowInputError(
            f"there are no tokens to compare predictions on in {len(texts)} texts and {positions} positions",
            hint="give texts of some sentences, or leave this measurement out (kl=False, --no-kl)",
        )
    return {name: _summary(torch.cat(parts).numpy(), is_thinking[name]) for name, parts in found.items()}


def make_row(
    tokenizer: Any, text: NeutralText, vocabulary: StepVocabulary, positions: int | None = None, **template: Any
) -> Row:
    """Puts a text into the thinking that follows a user's message.

    Where the chat template does not open the thinking, the model's marker does; implicit thinking opens by itself.
    """
    prompt = encode_prompt(tokenizer, text.prompt, **template)
    settings = vocabulary.settings
    opening: list[int] = []
    if not settings.implicit_thinking and vocabulary.scan(prompt)[-1][Field.SEGMENT] != THINKING:
        marker = next(iter(settings.markers("thinking_start")), "")
        opening = tokenizer.encode(marker, add_special_tokens=False) if marker else []
    start = len(prompt) + len(opening)
    room = _LONGEST if positions is None else max(min(_LONGEST, positions - start), 0)
    ids = prompt + opening + tokenizer.encode(text.text, add_special_tokens=False)[:room]
    records = vocabulary.scan(ids, prompt_length=len(prompt))
    body = range(start, len(ids))
    thinking = [place for place in body if records[place][Field.LABEL] % 3 == THINKING]
    return Row(ids, len(prompt), thinking or list(body), bool(thinking))


@contextmanager
def _report_kept(model: Any) -> Iterator[None]:
    """Keeps StepFlow's report of the last `generate`."""
    runtime = getattr(model, "stepflow_runtime", None)
    if runtime is None:
        yield
        return
    before = runtime.last, runtime.hands_down
    try:
        yield
    finally:
        runtime.last, runtime.hands_down = before


@contextmanager
def _acting(model: Any, arm: Arm, row: Row, places: list[int]) -> Iterator[None]:
    """Turns an arm's intervention on, and everything else off."""
    attached = getattr(model, "stepflow_runtime", None) is not None
    stepflow: Any = {} if arm.stepflow is True else arm.stepflow
    flow: AbstractContextManager[Any] = model.use_stepflow(stepflow) if attached else nullcontext()
    rival = arm.steering
    with flow, nullcontext() if rival is None else steered(model, rival, [row.prompt_length], [places]):
        yield


def _logits(model: Any, row: Row, arm: Arm, places: list[int]) -> torch.Tensor:
    """The logits after the measured tokens, [n, V]."""
    ids = torch.tensor([row.ids], device=model.device)
    with _acting(model, arm, row, places):
        is_on = getattr(getattr(model, "stepflow_runtime", None), "effective", None) is not None
        extra = {"prompt_length": row.prompt_length} if is_on else {}
        return model(ids, attention_mask=torch.ones_like(ids), use_cache=False, **extra).logits[0, row.measured]


def _divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The divergence at each position, float64 [n] on the CPU; a piece of them at a time."""
    parts = []
    wide = torch.promote_types(first.dtype, torch.float32)
    for one, other in zip(first.split(_PIECE), second.split(_PIECE), strict=True):
        p, q = one.to(wide).log_softmax(-1), other.to(wide).log_softmax(-1)
        terms = torch.where(p > -math.inf, p.exp() * (p - q), 0.0)
        parts.append(terms.sum(-1).clamp(min=0).double().cpu())  # rounding may go below 0
    return torch.cat(parts)


def _summary(values: np.ndarray, is_thinking: bool) -> NextTokenKL:
    if not all(map(math.isfinite, values)):
        raise StepFlowInputError(
            f"{int((~np.isfinite(values)).sum())} of {len(values)} predictions differ without bound",
            hint="look at the arm's settings, or load the model in another dtype",
        )
    median, high = np.percentile(values, [50, 95])
    return NextTokenKL(float(median), float(high), float(values.mean()), len(values), is_thinking)
