"""Control of generation by steps, for any model's `generate`: StepFlow need not be attached.

* `StepBoundaryLogitsProcessor` reports when a step has ended.
* `StepBudgetLogitsProcessor` bounds the number of thinking steps.
* `StepStreamer` hands out finished steps while another thread generates.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from queue import Queue
from typing import Any

import torch
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from .errors import StepFlowInputError
from .flow_state import FlowState
from .step_detector import THINKING, Feature, Field, StepVocabulary, empty_record
from .step_rules import INSIDE_THINKING, LEADS_THINKING, State, long_enough
from .token_text import SUMMARY_START
from .trace import TraceStep, finished_steps, open_step

# Phases of the rules in which a step may have ended, whatever follows; a paragraph ends at ("pending", "2").
_ENDED_PHASES = {
    "sentence": {"stop", "end_mark", "soft", "wide", "pending", "pending_soft", "pending_guess"},
    "cue": {"new_line", "pending", "bullet"},
}


class StepFollower(LogitsProcessor):
    """Follows the steps of every row of a generation: keeps the records of each from call to call.

    A logits processor sees nothing but the ids of each row, and rows change places (beams) or lose tokens (drafts that
    were rejected), so each row is followed by finding the row of the call before that it shares most with.

    Args:
        vocabulary: The step rules of the model's tokenizer.
        prompt_length: Where implicit thinking starts; None takes the length of the first call.
        pad_token_id: Tokens of this id before a row's first other token are padding.

    Attributes:
        records: The last record of each row.

    Raises:
        StepFlowInputError: `vocabulary` is something else.
    """

    supports_continuous_batching = False

    def __init__(self, vocabulary: StepVocabulary, prompt_length: int | None, pad_token_id: int | None):
        if not isinstance(vocabulary, StepVocabulary):
            raise StepFlowInputError(
                f"vocabulary must be a StepVocabulary, got {type(vocabulary).__name__}",
                hint="make one with StepVocabulary.from_tokenizer(tokenizer, config)",
            )
        self.vocabulary = vocabulary
        self.prompt_length = prompt_length
        self.pad_token_id = pad_token_id
        self.records: list[list[int]] = []
        self._ids = torch.empty(0, 0, dtype=torch.long)
        self._first_length = 0
        self._opening = 0
        self._state: FlowState | None = None

    def follow(self, ids: torch.Tensor) -> list[list[list[int]]]:
        """Reads what is new.

        A new generation begins where a row does not extend a prompt seen before, or more than one token is new.

        Args:
            ids: int64 [B, T], the rows so far.

        Returns:
            For each row the records of its new tokens, after the record before them; of a prompt the last one alone.
        """
        state, match = self._state, self._match(ids)
        if state is None or match is None:
            self._begin(ids)
            return [[record] for record in self.records]
        parents, common = match
        kept = min(common)
        if parents != list(range(state.batch)) or kept < state.count:
            state.select(torch.tensor(parents))
            state.crop(kept)
            self.records = state.records[:, kept - 1].tolist() if kept else [empty_record() for _ in parents]
            self._moved(parents, common)
        known = [[record] for record in self.records]
        if kept < ids.shape[1]:
            _, host = state.append(state.read(ids[:, kept:], None), self._opening, ids.device)
            for row, new in zip(known, host, strict=True):
                row += new
        self.records = [row[-1] for row in known]
        self._ids = ids.clone()  # some ways of generating write into one buffer
        return [row[shared - kept :] for row, shared in zip(known, common, strict=True)]

    def _match(self, ids: torch.Tensor) -> tuple[list[int], list[int]] | None:
        """The row that each row goes on from and how many tokens they share; None where a new generation begins."""
        old = self._ids
        if len(old) == 0 or not self._first_length < ids.shape[1] <= old.shape[1] + 1:
            return None
        length = min(ids.shape[1], old.shape[1])
        if ids.shape[0] == old.shape[0] and torch.equal(ids[:, :length], old[:, :length]):
            return list(range(ids.shape[0])), [length] * ids.shape[0]
        same = ids[:, None, :length] == old[None, :, :length]
        common, parents = same.long().cumprod(2).sum(2).max(1)
        if int(common.min()) < self._first_length:
            return None
        return parents.tolist(), common.tolist()

    def _begin(self, ids: torch.Tensor) -> None:
        """Reads the prompts of a generation."""
        batch, self._first_length = ids.shape
        self._opening = self._first_length if self.prompt_length is None else self.prompt_length
        self._state = FlowState(self.vocabulary, batch, ids.device)
        self._ids = ids.clone()
        self.records = [empty_record() for _ in range(batch)]
        if self._first_length:
            hidden = None if self.pad_token_id is None else (ids == self.pad_token_id).long().cumprod(1).bool()
            _, host = self._state.append(self._state.read(ids, hidden), self._opening, ids.device)
            self.records = [row[-1] for row in host]
        self._begun(batch)

    def _begun(self, rows: int) -> None:
        """A generation has begun."""

    def _moved(self, parents: list[int], common: list[int]) -> None:
        """Each row goes on from another one, of which it keeps so many tokens."""


class StepBoundaryLogitsProcessor(StepFollower):
    """Calls `on_step(row, step)` when a step has ended.

    A step has ended when the first token of the next step has been generated, or the token that ends its segment (the
    marker of the summary, the end of the turn). Scores are returned unchanged. Steps of the prompt are not reported,
    except one that is still open at its end. A logits processor never sees the last token: `finish` reports the rest.

    Rows are those of the batch that `generate` makes (beams and returned sequences count). With beams, the steps of
    each hypothesis that is still followed are reported. With an assistant model, drafts are followed too, so a step
    may be reported twice, or be rejected afterwards.

    Args:
        vocabulary: The step rules of the model's tokenizer.
        on_step: Called with the row and the `TraceStep`; its `start` and `end` are positions in the row, padding
            included.
        tokenizer: Gives the steps their text.
        prompt_length: Where implicit thinking starts, padding included; None takes the length of the first call.
        pad_token_id: Tokens of this id before a row's first other token are padding.

    Raises:
        StepFlowInputError: `vocabulary` is not a `StepVocabulary`.

    Example:
        >>> vocabulary = model.stepflow_runtime.rules.vocabulary
        >>> steps = StepBoundaryLogitsProcessor(vocabulary, lambda row, step: print(step.text), tokenizer=tokenizer)
    """

    def __init__(
        self,
        vocabulary: StepVocabulary,
        on_step: Callable[[int, TraceStep], None] | None = None,
        *,
        tokenizer: Any = None,
        prompt_length: int | None = None,
        pad_token_id: int | None = None,
    ):
        super().__init__(vocabulary, prompt_length, pad_token_id)
        self.on_step = on_step
        self.tokenizer = tokenizer

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Follows the rows, int64 [B, T]; returns the scores, [B, V], as they are."""
        self._report_new(input_ids)
        return scores

    def finish(self, sequences: torch.Tensor) -> None:
        """Reports the steps that the end of a generation leaves over.

        Args:
            sequences: The result of `generate`, int64 [B, T].
        """
        self._report_new(sequences)
        for row, record in enumerate(self.records):
            step = open_step(record)
            if step is not None:
                self._report(row, step, sequences)

    def _report_new(self, ids: torch.Tensor) -> None:
        for row, records in enumerate(self.follow(ids)):
            for before, after in pairwise(records):
                for step in finished_steps(before, after):
                    self._report(row, step, ids)

    def _report(self, row: int, step: TraceStep, ids: torch.Tensor) -> None:
        if self.on_step is not None:
            text = None if self.tokenizer is None else self.tokenizer.decode(ids[row, step.start : step.end].tolist())
            self.on_step(row, replace(step, text=text))


class StepBudgetLogitsProcessor(StepFollower):
    """Bounds the number of thinking steps: budget forcing, counted in steps instead of tokens.

    * While fewer than `min_steps` thinking steps are finished, thinking cannot end: no token that would complete a
      marker of the summary or end the turn can be generated, nor the first token of such a marker (unless that is a
      single byte of text, or the summary starts with a pattern of ordinary text). Where markers are message headers,
      no special token can be generated, as each of them ends the message.
    * Once `max_steps` are finished and the likeliest token would start another one, the marker of the summary is
      generated instead, token by token; other tokens that would start a step are ruled out before.

    A step counts as finished where its last sentence is complete and long enough to be a step. With implicit thinking
    the pattern that starts the summary is the text of one more step.

    Args:
        vocabulary: The step rules of the model's tokenizer.
        min_steps: Finished thinking steps before thinking may end.
        max_steps: Finished thinking steps after which it ends; None for no bound.
        summary_ids: Ids of what is generated to end thinking, which has to end in a summary-start marker; None for the
            first such marker as the tokenizer writes it.
        prompt_length: Where implicit thinking starts, padding included; None takes the length of the first call.
        pad_token_id: Tokens of this id before a row's first other token are padding.

    Raises:
        StepFlowInputError: Numbers that are negative or the wrong way round, ids that do not end thinking, or
            `max_steps` where no marker starts the summary.

    Example:
        >>> budget = StepBudgetLogitsProcessor(model.stepflow_runtime.rules.vocabulary, max_steps=2)
        >>> output = model.generate(**inputs, logits_processor=[budget], max_new_tokens=8)
    """

    def __init__(
        self,
        vocabulary: StepVocabulary,
        min_steps: int = 0,
        max_steps: int | None = None,
        *,
        summary_ids: Sequence[int] | None = None,
        prompt_length: int | None = None,
        pad_token_id: int | None = None,
    ):
        super().__init__(vocabulary, prompt_length, pad_token_id)
        for name, value in (("min_steps", min_steps), ("max_steps", 0 if max_steps is None else max_steps)):
            if type(value) is not int or value < 0:
                raise StepFlowInputError(f"{name} must be an integer of at least 0, got {value!r}")
        if max_steps is not None and min_steps > max_steps:
            raise StepFlowInputError(f"min_steps ({min_steps}) must not be greater than max_steps ({max_steps})")
        spelled = vocabulary.marker_ids[SUMMARY_START]
        if max_steps is not None and not spelled:
            raise StepFlowInputError(
                f"max_steps is {max_steps}, but summary_start is empty: there is no marker that could end thinking",
                hint='set summary_start to the text that starts the answer, e.g. "The answer is"',
            )
        if summary_ids is not None and vocabulary.markers.read(summary_ids) != SUMMARY_START:
            raise StepFlowInputError(
                f"summary_ids must end in a summary-start marker, got {list(summary_ids)}",
                hint=f"the markers are {vocabulary.settings.markers('summary_start')}",
            )
        self.min_steps = min_steps
        self.max_steps = max_steps
        self.summary_ids = list(summary_ids if summary_ids is not None else spelled[0] if spelled else [])
        self._banned: dict[tuple[int, int, int, torch.device], torch.Tensor] = {}
        # Slots at which each row was made to end its thinking; several where drafts were rejected.
        self._endings: list[list[int]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Follows the rows, int64 [B, T]; returns the scores, [B, V], with some of them ruled out."""
        self.follow(input_ids)
        bounded = scores.clone()
        for row, record in enumerate(self.records):
            if record[Field.SEGMENT] != THINKING:
                continue
            chances = bounded[row]
            written = self._written(input_ids[row], self._endings[row])
            if written is None and self._is_spent(record, chances):
                self._endings[row].append(input_ids.shape[1])
                written = 0
            if written is not None:
                chances.fill_(-torch.inf)
                chances[self.summary_ids[written]] = 0
            elif self._finished(record) < self.min_steps:
                chances[self._enders(record, chances)] = -torch.inf
        return bounded  # type: ignore[return-value]

    def _begun(self, rows: int) -> None:
        self._endings = [[] for _ in range(rows)]

    def _moved(self, parents: list[int], common: list[int]) -> None:
        old = self._endings
        self._endings = [
            [slot for slot in old[parent] if slot <= kept] for parent, kept in zip(parents, common, strict=True)
        ]

    def _written(self, ids: torch.Tensor, endings: list[int]) -> int | None:
        """How many of the ids that end thinking a row ends with, where it was made to; None for a row that was not."""
        for slot in endings:
            count = len(ids) - slot
            if 0 < count < len(self.summary_ids) and ids[slot:].tolist() == self.summary_ids[:count]:
                return count
        return None

    def _finished(self, record: list[int]) -> int:
        """Thinking steps that are whole."""
        state = self.vocabulary.rules.states[record[Field.RULE_STATE]]
        ended = _has_ended(self.vocabulary.settings.step_rule, state)
        minimum = self.vocabulary.settings.min_step_chars
        is_whole = ended and long_enough(record[Field.LENGTH], record[Field.FLAGS], minimum)
        return record[Field.THINKING_STEPS] - int(record[Field.STEP_OPEN] > 0 and not is_whole)

    def _is_spent(self, record: list[int], scores: torch.Tensor) -> bool:
        """Whether thinking has to end here, before a step too many; rules out other tokens that would start one."""
        if self.max_steps is None or record[Field.THINKING_STEPS] < self.max_steps or record[Field.IN_HEADER]:
            return False
        likeliest = torch.stack([scores.argmax()]).cpu()
        if len(self._starting(record, likeliest)):
            return True
        vocabulary = self.vocabulary
        starting = vocabulary.features[: min(vocabulary.size, len(scores)), Feature.LENGTH] > 0
        if record[Field.STEP_OPEN]:
            rows = vocabulary.features[: len(starting), Feature.RULE_ROW]
            codes = vocabulary.rules.transition[:, record[Field.RULE_STATE]][rows]
            starting &= (codes & (LEADS_THINKING | INSIDE_THINKING)) > 0
        scores[self._starting(record, starting.nonzero().flatten()).to(scores.device)] = -torch.inf
        return False

    def _starting(self, record: list[int], tokens: torch.Tensor) -> torch.Tensor:
        """Those of some tokens that would start a step, int64 [N]."""
        before = torch.tensor(record).expand(len(tokens), -1)
        after = self.vocabulary.advance(before, tokens, record[Field.COUNT])
        return tokens[after[:, Field.THINKING_STEPS] > record[Field.THINKING_STEPS]]

    def _enders(self, record: list[int], scores: torch.Tensor) -> torch.Tensor:
        """The tokens that would end thinking, or begin its end: bool [V]."""
        state, in_header = record[Field.MARKER_STATE], record[Field.IN_HEADER]
        key = (state, in_header, len(scores), scores.device)
        if key not in self._banned:
            markers, features = self.vocabulary.markers, self.vocabulary.features
            banned = markers.found[:, state][features[:, Feature.MARKER_ROW]] == SUMMARY_START
            banned |= features[:, Feature.END_OF_TURN] > 0
            if markers.message_open is not None:
                banned |= (features[:, Feature.SPECIAL] > 0) & (in_header == 0)
            elif not self.vocabulary.settings.implicit_thinking:
                for first in {ids[0] for ids in self.vocabulary.marker_ids[SUMMARY_START]}:
                    banned[first] |= first in markers.atoms or bool(features[first, Feature.BYTES] > 1)
            # A model may have more ids than its tokenizer, or fewer.
            fitted = torch.zeros(len(scores), dtype=torch.bool)
            width = min(self.vocabulary.size, len(scores))
            fitted[:width] = banned[:width]
            self._banned[key] = fitted.to(scores.device)
        return self._banned[key]


def _has_ended(rule: str, state: State) -> bool:
    """Whether the text so far may be all of a sentence (a paragraph, the lines of a cue word)."""
    return state == ("pending", "2") if rule == "paragraph" else state[0] in _ENDED_PHASES[rule]


class StepStreamer(BaseStreamer):
    """Yields finished steps, one by one, while `generate` runs in another thread: `TextIteratorStreamer` for steps.

    A step comes out as soon as it is known to be whole: with the first token of the next one, or with its segment.

    Example:
        >>> from threading import Thread
        >>> streamer = StepStreamer(tokenizer, timeout=60)
        >>> call = {**inputs, "streamer": streamer, "max_new_tokens": 40}
        >>> Thread(target=model.generate, kwargs=call).start()
        >>> first = next(iter(streamer))

    Args:
        tokenizer: The model's tokenizer.
        vocabulary: Its step rules, or the settings to make them from; None for the defaults.
        skip_prompt: Leave out the steps of the prompt (earlier rounds); the question is never among them.
        timeout: Seconds to wait for a step; `queue.Empty` is raised after that. None waits for ever.
        prompt_length: Where implicit thinking starts; None takes the length of the prompt.
        decode_kwargs: Passed on to the tokenizer's `decode`.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocabulary: Any = None,
        skip_prompt: bool = True,
        timeout: float | None = None,
        prompt_length: int | None = None,
        **decode_kwargs: Any,
    ):
        is_made = isinstance(vocabulary, StepVocabulary)
        self.vocabulary = vocabulary if is_made else StepVocabulary.from_tokenizer(tokenizer, vocabulary)
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.timeout = timeout
        self.prompt_length = prompt_length
        self.decode_kwargs = decode_kwargs
        self._queue: Queue[TraceStep | None] = Queue()
        self._opening = 0
        self._start()

    def _start(self) -> None:
        self._ids: list[int] = []
        self._record = empty_record()
        self._takes_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, then new tokens: int64 [T] or [1, T].

        Raises:
            StepFlowInputError: More than one row.
        """
        if value.ndim > 1 and value.shape[0] > 1:
            raise StepFlowInputError(
                f"StepStreamer follows one row, got {value.shape[0]}",
                hint="generate for one prompt, or use StepBoundaryLogitsProcessor, which follows a batch",
            )
        ids, start = value.reshape(-1).tolist(), len(self._ids)
        is_silent = self._takes_prompt and self.skip_prompt
        if self._takes_prompt:
            self._opening = len(ids) if self.prompt_length is None else self.prompt_length
            self._takes_prompt = False
        known = [self._record]
        known += self.vocabulary.scan(ids, self._record, start=start, prompt_length=self._opening)
        self._ids += ids
        self._record = known[-1]
        for before, after in pairwise([] if is_silent else known):
            for step in finished_steps(before, after):
                self._give(step)

    def end(self) -> None:
        """Gives out the step that the end leaves open, and ends the iteration."""
        step = open_step(self._record)
        if step is not None:
            self._give(step)
        self._queue.put(None)
        self._start()

    def _give(self, step: TraceStep) -> None:
        text = self.tokenizer.decode(self._ids[step.start : step.end], **self.decode_kwargs)
        self._queue.put(replace(step, text=text))

    def __iter__(self) -> Iterator[TraceStep]:
        return self

    def __next__(self) -> TraceStep:
        step = self._queue.get(timeout=self.timeout)
        if step is None:
            raise StopIteration
        return step
