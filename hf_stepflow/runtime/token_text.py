"""The bytes behind every token id of a tokenizer, and the markers of the segments found in them.

Step detection reads bytes instead of decoded strings. A marker (`<think>`, `</think>`, tool results) is a sequence of
symbols: where the tokenizer has a piece of it as an added token (`<|channel|>`), that token is one symbol; everything
else is bytes. So a marker may be one token, several tokens, or plain text that is cut into tokens in any way. One
automaton reads all markers, token by token. Source: docs/method.md, "Steps".
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"
# No space is guessed before these.
_CLOSING = frozenset(".,;:?!'\")]}%\u2019\u201d\u3002\uff0c\u3001\uff01\uff1f\uff1a\uff1b\u2026")


@dataclass(frozen=True)
class TokenText:
    """The text of each token id.

    Attributes:
        pieces: For each id its UTF-8 bytes; a character that is split over tokens is split here too.
        control: For each id whether it is a control token (special: it carries no text).
        guessed_space: Whether the tokenizer loses white space (WordPiece), so that the leading space of a piece is
            a guess.
    """

    pieces: list[bytes]
    control: list[bool]
    guessed_space: bool = False

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "TokenText":
        """Reads the pieces of a tokenizer: byte-level BPE, SentencePiece / Metaspace, WordPiece or plain words.

        Args:
            tokenizer: A `PreTrainedTokenizerBase`, fast or slow.
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


NONE, THINKING_START, SUMMARY_START, TOOL_START, TOOL_END = range(5)

NO_SYMBOL = -1
Symbol = int  # a byte (0..255), or 256 + token id for a token that is one symbol


@dataclass(frozen=True)
class MarkerTable:
    """The marker automaton over tokens.

    Attributes:
        row: long [V]: the row of each token in the tables below.
        next_state: long [rows, states].
        found: long [rows, states]: the last marker that the token completes (0 for none).
        depth: long [states]: how many symbols of a marker have been read.
        atoms: Ids of the tokens that are symbols of a marker.
        message_open: Id of the token that opens a message body where markers are message headers
            (`<|message|>` of `<|channel|>analysis<|message|>`), else None.
    """

    row: torch.Tensor
    next_state: torch.Tensor
    found: torch.Tensor
    depth: torch.Tensor
    atoms: frozenset[int]
    message_open: int | None

    def read(self, ids: Iterable[int]) -> int:
        """The marker that the last of these tokens completes (NONE for none)."""
        kind = state = 0
        for token in ids:
            row = int(self.row[token])
            kind, state = int(self.found[row, state]), int(self.next_state[row, state])
        return kind


def build_marker_table(markers: dict[int, list[str]], pieces: list[bytes], atoms: dict[str, int]) -> MarkerTable:
    """Compiles markers for one vocabulary.

    Args:
        markers: Texts of each kind of marker (THINKING_START ... TOOL_END).
        pieces: Bytes of each token id.
        atoms: Added tokens of the tokenizer by their text.
    """
    words = {_symbols(text, atoms): kind for kind, texts in markers.items() for text in texts}
    goto, found, depth = _aho_corasick(words)
    used = {symbol - 256 for word in words for symbol in word if symbol >= 256}
    rows = _Rows(goto, found)
    row = [rows.of((NO_SYMBOL,))] * len(pieces) + [rows.of(())]
    for index in _touched(words, pieces):
        row[index] = rows.of(tuple(pieces[index]))
    for index in used:
        row[index] = rows.of((256 + index,))
    headers = {word[-1] - 256 for word in words if len(word) > 1 and word[0] >= 256 and word[-1] >= 256}
    return MarkerTable(
        row=torch.tensor(row),
        next_state=torch.tensor([ends for ends, _ in rows.numbers]),
        found=torch.tensor([completed for _, completed in rows.numbers]),
        depth=torch.tensor(depth),
        atoms=frozenset(used),
        message_open=min(headers) if headers else None,
    )


class _Rows:
    """Collects the distinct rows of a `MarkerTable`: what a token does to each state."""

    def __init__(self, goto: list[dict[Symbol, int]], found: list[int]):
        self.goto = goto
        self.found = found
        self.numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        self._known: dict[tuple[Symbol, ...], int] = {}
        self._openings: dict[Symbol, tuple[list[tuple[int, int]], list[int]]] = {}

    def of(self, symbols: tuple[Symbol, ...]) -> int:
        """The row of a token that is spelled so."""
        if not symbols:
            return self._number([(state, NONE) for state in range(len(self.goto))])
        # The first symbol leaves few of the states apart; the others are read from those alone.
        met, place = self._opened(symbols[0])
        ends = [self._read(state, kind, symbols[1:]) for state, kind in met]
        key = (symbols[0], *(number for end in ends for number in end))
        if key not in self._known:
            self._known[key] = self._number([ends[number] for number in place])
        return self._known[key]

    def _opened(self, symbol: Symbol) -> tuple[list[tuple[int, int]], list[int]]:
        """The distinct (state, marker completed) after a first symbol, and which of them each state leads to."""
        if symbol not in self._openings:
            met: dict[tuple[int, int], int] = {}
            place = [met.setdefault(self._read(state, NONE, (symbol,)), len(met)) for state in range(len(self.goto))]
            self._openings[symbol] = list(met), place
        return self._openings[symbol]

    def _read(self, state: int, kind: int, symbols: tuple[Symbol, ...]) -> tuple[int, int]:
        for symbol in symbols:
            state = self.goto[state].get(symbol, 0)
            kind = self.found[state] or kind
        return state, kind

    def _number(self, ends: list[tuple[int, int]]) -> int:
        row = tuple(state for state, _ in ends), tuple(kind for _, kind in ends)
        return self.numbers.setdefault(row, len(self.numbers))


def _touched(words: Iterable[tuple[Symbol, ...]], pieces: list[bytes]) -> list[int]:
    """The tokens that may lead anywhere but to the start: inside a marker, at its end, or with an opening in them."""
    texts = {bytes(symbol for symbol in word if symbol < 256) for word in words}
    ends = {text[i:] for text in texts for i in range(1, len(text))}
    openings = {word[0] for word in words if word[0] < 256}

    def touches(piece: bytes) -> bool:
        if not openings.isdisjoint(piece) or any(piece[:i] in ends for i in range(1, len(piece) + 1)):
            return True
        return not piece or any(piece in text for text in texts)

    return [index for index, piece in enumerate(pieces) if touches(piece)]


def _symbols(text: str, atoms: dict[str, int]) -> tuple[Symbol, ...]:
    """The symbols of a marker: added tokens (longest first) whole, the rest as bytes."""
    inside = sorted((atom for atom in atoms if atom and atom in text), key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, inside)) + ")", text) if inside else [text]
    symbols: list[Symbol] = []
    for part in parts:
        symbols += [256 + atoms[part]] if part in atoms else list(part.encode("utf-8"))
    return tuple(symbols)


def _aho_corasick(words: dict[tuple[Symbol, ...], int]) -> tuple[list[dict[Symbol, int]], list[int], list[int]]:
    """The classical automaton: complete transitions for each state, what each state completes, and its depth."""
    goto: list[dict[Symbol, int]] = [{}]
    found, depth = [NONE], [0]
    for word, kind in words.items():
        state = 0
        for symbol in word:
            if symbol not in goto[state]:
                goto[state][symbol] = len(goto)
                goto.append({})
                found.append(NONE)
                depth.append(depth[state] + 1)
            state = goto[state][symbol]
        found[state] = kind
    fail = [0] * len(goto)
    queue = list(goto[0].values())
    for state in queue:
        for symbol, child in goto[state].items():
            queue.append(child)
            fail[child] = goto[fail[state]].get(symbol, 0)
        found[state] = found[state] or found[fail[state]]
        goto[state] = goto[fail[state]] | goto[state]
    return goto, found, depth
