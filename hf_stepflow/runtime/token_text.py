"""The raw bytes behind every token id of a tokenizer: what step detection reads instead of decoded strings."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"
# No space is guessed before these.
_CLOSING = frozenset(".,;:?!'\")]}%\u2019\u201d\u3002\uff0c\u3001\uff01\uff1f\uff1a\uff1b\u2026")


@dataclass(frozen=True)
class TokenText:
    """The text of each token id.

    Attributes:
        pieces: for each id its UTF-8 bytes; a character that is split over tokens is split here too.
        control: for each id whether it is a control token (special: it carries no text of its own).
        guessed_space: whether the tokenizer loses white space (WordPiece), so that the leading space of a piece is
            a guess.
    """

    pieces: list[bytes]
    control: list[bool]
    guessed_space: bool = False

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "TokenText":
        """Reads the pieces of a tokenizer: byte-level BPE, SentencePiece / Metaspace, WordPiece or plain words.

        Args:
            tokenizer: a `PreTrainedTokenizerBase`, fast or slow.
        """
        ids = tokenizer.get_vocab()
        spelling = _spelling(tokenizer, [token for token in ids if isinstance(token, str)])
        size = max([len(tokenizer) - 1, *ids.values()]) + 1
        pieces, control = [b""] * size, [False] * size
        for token, index in ids.items():
            pieces[index] = token if isinstance(token, bytes) else spelling.to_bytes(token)
        for index, added in tokenizer.added_tokens_decoder.items():
            pieces[index] = added.content.encode("utf-8", "surrogatepass")
            control[index] = bool(added.special)
        for index in tokenizer.all_special_ids:
            control[index] = True
        return cls(pieces, control, spelling.kind in ("wordpiece", "words"))

    def join(self, ids: Iterable[int]) -> str:
        """The text of some tokens, as the rules read it."""
        return b"".join(self.pieces[index] for index in ids).decode("utf-8", "replace")


@dataclass(frozen=True)
class _Spelling:
    """How a tokenizer writes text into its vocabulary."""

    kind: str
    prefix: str = "##"

    def to_bytes(self, token: str) -> bytes:
        if self.kind == "byte_level":
            try:
                return token.translate(_BYTE_LEVEL).encode("latin-1")
            except UnicodeEncodeError:  # a token added as plain text
                return token.encode("utf-8", "surrogatepass")
        if self.kind == "metaspace":
            byte = _BYTE_PIECE.fullmatch(token)
            text = token.replace(_METASPACE, " ")
            return bytes([int(byte[1], 16)]) if byte else text.encode("utf-8", "surrogatepass")
        if self.kind == "wordpiece" and token.startswith(self.prefix):
            token = token[len(self.prefix) :]
        elif self.kind in ("wordpiece", "words") and not _CLOSING.issuperset(token):
            token = " " + token
        elif self.kind == "word_end":
            token = token.replace("</w>", " ")
        return token.encode("utf-8", "surrogatepass")


def _byte_level_alphabet() -> dict[int, int]:
    """The byte for each character that byte-level BPE writes: printable ones stand for themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + rank: byte for rank, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


def _spelling(tokenizer: Any, tokens: list[str]) -> _Spelling:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _guess_spelling(tokens)
    if backend.decoder is None:
        return _Spelling("words")
    stages = json.loads(backend.decoder.__getstate__())
    stages = stages.get("decoders", [stages])
    kinds = {stage["type"]: stage for stage in stages}
    replaces_metaspace = any(_METASPACE in json.dumps(stage, ensure_ascii=False) for stage in stages)
    if "ByteLevel" in kinds:
        return _Spelling("byte_level")
    if "Metaspace" in kinds or "ByteFallback" in kinds or replaces_metaspace:
        return _Spelling("metaspace")
    if "WordPiece" in kinds:
        return _Spelling("wordpiece", kinds["WordPiece"]["prefix"])
    if "BPEDecoder" in kinds:
        return _Spelling("word_end")
    return _Spelling("plain")


def _guess_spelling(tokens: list[str]) -> _Spelling:
    """A tokenizer written in Python has no decoder to ask: the marks in its vocabulary tell."""
    for mark, kind in (("\u0120", "byte_level"), (_METASPACE, "metaspace"), ("##", "wordpiece"), ("</w>", "word_end")):
        if sum(mark in token for token in tokens) > max(1, len(tokens) // 1000):
            return _Spelling(kind)
    return _Spelling("plain")
