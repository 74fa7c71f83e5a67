"""The steps of every row of a generation, followed by a logits processor.

A logits processor sees nothing but the ids of each row, and rows change places (beams) or lose tokens (drafts that
were rejected), so each row is followed by finding the row of the call before that it shares most with.
"""

import torch
from transformers import LogitsProcessor

from .errors import StepFlowInputError
from .flow_state import FlowState
from .step_record import empty_record
from .steps import StepVocabulary


class StepFollower(LogitsProcessor):
    """The records of every row of a generation, kept from call to call.

    Args:
        vocabulary: the step rules of the model's tokenizer.
        prompt_length: where implicit thinking starts; None takes the length of the first call.
        pad_token_id: tokens of this id before a row's first other token are padding.

    Attributes:
        records: the last record of each row.

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
