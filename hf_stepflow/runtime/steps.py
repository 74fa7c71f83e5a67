"""Segments and steps of a token stream: question, thinking, summary, and the steps inside them.

Source: METHOD section 1 (docs/method.md, "Steps"). Everything about a token depends on the tokens up to it alone, so a
finished trace, a prefill and a token-by-token decode give the same labels.

Two routes compute the same records (`step_record.Field`): `StepVocabulary.scan` walks a piece of text on the host
(prefill); `StepVocabulary.advance` takes one token per row in tensors, without any host read (decode).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .configuration_stepflow import StepFlowSettings, read_settings
from .errors import StepFlowConfigError
from .markers import SUMMARY_START, THINKING_START, TOOL_END, TOOL_START, MarkerTable, build_marker_table
from .step_record import FEATURES, Feature, empty_record
from .step_tables import RuleTable, build_rule_table
from .step_tensors import StepTensors
from .step_walk import StepWalk
from .token_text import TokenText


@dataclass
class StepVocabulary:
    """What every token of a tokenizer means to the step rules: computed once, used for any number of traces.

    Attributes:
        settings: the step settings it was built for.
        features: int64 [V + 1, FEATURES]; the last row stands for unknown ids.
        rules: transitions of the sentence rules.
        markers: transitions of the marker automaton.
        marker_ids: how the tokenizer writes the markers of each kind (`markers.THINKING_START` ...).
    """

    settings: StepFlowSettings
    features: torch.Tensor
    rules: RuleTable
    markers: MarkerTable
    marker_ids: dict[int, list[list[int]]]
    _on_device: dict[torch.device, StepTensors] = field(default_factory=dict, repr=False)
    _on_host: StepWalk | None = field(default=None, repr=False)

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, config: Any = None, *, end_of_turn_ids: Sequence[int] | None = None
    ) -> "StepVocabulary":
        """Reads a tokenizer once.

        Args:
            tokenizer: a `PreTrainedTokenizerBase` (byte-level BPE, SentencePiece / Metaspace, WordPiece, words).
            config: a `StepFlowConfig`, settings, a dict or a path; None for the defaults.
            end_of_turn_ids: tokens that close a round; None takes the tokenizer's eos token.

        Raises:
            StepFlowConfigError: a marker that the tokenizer cannot write.
        """
        settings = read_settings(config)
        if tokenizer is None:
            raise StepFlowConfigError(
                "StepFlow needs the model's tokenizer to find steps, got None", hint="pass tokenizer=..."
            )
        text = TokenText.from_tokenizer(tokenizer)
        kinds = {
            THINKING_START: settings.markers("thinking_start"),
            SUMMARY_START: settings.markers("summary_start"),
            TOOL_START: settings.markers("tool_start"),
            TOOL_END: settings.markers("tool_end"),
        }
        if settings.implicit_thinking:
            kinds[THINKING_START] = []
        marker_ids = {kind: [_spelled(tokenizer, marker) for marker in kinds[kind]] for kind in kinds}
        markers = _read_markers(tokenizer, text, kinds, marker_ids)
        if end_of_turn_ids is None:
            end_of_turn_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ends = [index for index in end_of_turn_ids if 0 <= index < len(text.pieces)]
        special = [index for index, is_control in enumerate(text.control) if is_control]
        control = sorted({*special, *markers.atoms, *ends})
        pieces = text.pieces.copy()
        for index in control:
            pieces[index] = b""
        rules = build_rule_table(pieces, settings.step_rule, settings.min_step_chars, text.guessed_space)
        features = torch.zeros(len(pieces) + 1, FEATURES, dtype=torch.long)
        features[:, Feature.RULE_ROW] = rules.row
        features[:, Feature.MARKER_ROW] = markers.row
        features[:, Feature.BEFORE : Feature.FLAGS + 1] = rules.parts
        features[:, Feature.SPLIT_ROW] = rules.split_row
        features[:-1, Feature.BYTES] = torch.tensor([len(piece.strip(b" \t\r\f\v\n")) for piece in pieces])
        features[control, Feature.CONTROL] = 1
        features[special, Feature.SPECIAL] = 1
        features[ends, Feature.END_OF_TURN] = 1
        if markers.message_open is not None:
            features[markers.message_open, Feature.OPENS_MESSAGE] = 1
        return cls(settings, features, rules, markers, marker_ids)

    @property
    def size(self) -> int:
        """Number of known token ids."""
        return self.features.shape[0] - 1

    def scan(
        self,
        ids: Sequence[int],
        record: list[int] | None = None,
        *,
        start: int = 0,
        padding: Sequence[bool] | None = None,
        prompt_length: int | None = None,
    ) -> list[list[int]]:
        """The records of a finished piece of one row.

        Args:
            ids: token ids.
            record: the record before them, None at the start of a trace.
            start: slot of the first of them.
            padding: which of them are padding.
            prompt_length: slot at which implicit thinking starts, None for never.
        """
        if self._on_host is None:
            self._on_host = StepWalk(self)
        walk = self._on_host
        record = empty_record() if record is None else record
        records = []
        if not self.settings.implicit_thinking:
            prompt_length = None
        for offset, token in enumerate(ids):
            hidden = padding is not None and padding[offset]
            record = walk.step(record, token, start + offset, hidden, prompt_length)
            records.append(record)
        return records

    def advance(
        self,
        record: torch.Tensor,
        ids: torch.Tensor,
        slot: "int | torch.Tensor",
        padding: torch.Tensor | None = None,
        prompt_length: "int | torch.Tensor | None" = None,
    ) -> torch.Tensor:
        """The records of one more token per row, in tensors only.

        Args:
            record: int64 [B, FIELDS], the records before.
            ids: int64 [B].
            slot: slot of the tokens.
            padding: bool [B], rows whose token is padding.
            prompt_length: slot (or [B] slots) at which implicit thinking starts, None for never.

        Returns:
            int64 [B, FIELDS].
        """
        tables = self._on_device.get(ids.device)
        if tables is None:
            tables = self._on_device[ids.device] = StepTensors.of(self, ids.device)
        if not self.settings.implicit_thinking:
            prompt_length = None
        return tables.advance(record, ids, slot, padding, prompt_length)


def _read_markers(
    tokenizer: Any, text: TokenText, kinds: dict[int, list[str]], marker_ids: dict[int, list[list[int]]]
) -> MarkerTable:
    if text.guessed_space:
        kinds = {kind: [text.join(ids) for ids in spelled] for kind, spelled in marker_ids.items()}
    atoms = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    markers = build_marker_table(kinds, text.pieces, atoms)
    for kind, texts in kinds.items():
        for marker, ids in zip(texts, marker_ids[kind], strict=True):
            if markers.read(ids) != kind:
                raise _unwritable(marker)
    return markers


def _spelled(tokenizer: Any, marker: str) -> list[int]:
    """The ids of a marker."""
    ids = tokenizer.encode(marker, add_special_tokens=False)
    if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
        raise _unwritable(marker)
    return ids


def _unwritable(marker: str) -> StepFlowConfigError:
    return StepFlowConfigError(
        f"the tokenizer cannot write the marker {marker!r}",
        hint="set thinking_start and summary_start to the markers of this model, or implicit_thinking=True",
    )
