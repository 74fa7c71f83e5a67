"""Where a step may end: the sentence, paragraph and cue rules, and their tables over the tokens of a vocabulary.

The rules are a finite automaton that reads one character class at a time. Compiled for a tokenizer, every token
becomes a table from state to state, so the same rules serve a finished text, a stream of tokens, and a batch of
streams in tensors. Source: docs/method.md, "Steps": sentence ends for thinking, blank lines for the
summary.

An *event* stands at the character that begins new text: SENTENCE after a sentence end, PARAGRAPH after a blank line,
CUE at the last letter of a cue word that opens a line.

A token is spelled in *signs*, one character for each symbol of the rules, shortened where the rules see no difference;
tokens of one signature (" apple", " house") share a row of the table.
"""

import re
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

SENTENCE, PARAGRAPH, CUE = 1, 2, 3

# Words whose period never ends a sentence; "e.g.", "i.e.", "p.m." need no entry: one letter between periods is enough.
ABBREVIATIONS = frozenset(
    "al approx ca cf cor def dr eg eq eqs fig figs ie lem mr mrs ms prof prop ref refs resp st thm vs".split()
)
# Words whose period ends a sentence unless a small letter follows; so does an ellipsis.
SOFT_ABBREVIATIONS = frozenset(["etc"])
CUE_WORDS = ("Wait", "But", "Alternatively", "However", "Hmm", "Actually", "Step")

# Symbols: ASCII letters stand for themselves, so do the bytes of multi-byte stops; the rest are classes.
SPACE, NEWLINE, DIGIT, DOT, END_MARK, COLON, CLOSER, EMPHASIS, BULLET, WIDE_STOP, ELLIPSIS, OTHER = (
    "SPACE NEWLINE DIGIT DOT END_MARK COLON CLOSER EMPHASIS BULLET WIDE_STOP ELLIPSIS OTHER".split()
)
GUESSED_SPACE, SMALL_WORD, CAPITAL_WORD = "GUESSED_SPACE", "SMALL_WORD", "CAPITAL_WORD"
CHARACTER_CLASSES = {
    SPACE: " \t\r\f\v",
    NEWLINE: "\n",
    DIGIT: "0123456789",
    DOT: ".",
    END_MARK: "?!",
    COLON: ":\uff1a",
    CLOSER: "\"')]}`$\u2019\u201d\u00bb\uff09\u3011\u300d\u300f",
    EMPHASIS: "*_",
    BULLET: "-#>+",
    WIDE_STOP: "\u3002\uff01\uff1f\uff0e\uff61",
    ELLIPSIS: "\u2026",
}
_CLASS_OF = {character: name for name, characters in CHARACTER_CLASSES.items() for character in characters}
# What a multi-byte mark becomes when its bytes arrive in different tokens.
_SPLIT_MARKS = {character.encode(): _CLASS_OF[character] for character in "\u3002\uff01\uff1f\uff0e\uff61\uff1a\u2026"}
_SPLIT_PREFIXES = {mark[:size] for mark in _SPLIT_MARKS for size in range(1, len(mark))}
SPLIT_BYTES = tuple(sorted({byte for mark in _SPLIT_MARKS for byte in mark}))
_BLANKS = (SPACE, NEWLINE, GUESSED_SPACE)

State = tuple[str, str]
START: State = ("line_start", "")
Step = Callable[[State, "str | int"], tuple[State, int]]


def _prefixes(words: frozenset[str]) -> frozenset[str]:
    return frozenset(word[:size] for word in words for size in range(1, len(word) + 1))


_KNOWN = _prefixes(ABBREVIATIONS | SOFT_ABBREVIATIONS)
_CUE_PREFIXES = _prefixes(frozenset(CUE_WORDS))


def _infixes(words: Iterable[str]) -> frozenset[str]:
    return frozenset(word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, len(word) + 1))


_KNOWN_INFIXES = _infixes(ABBREVIATIONS | SOFT_ABBREVIATIONS)
_CUE_INFIXES = _infixes(CUE_WORDS)


def keeps_letters(run: str) -> bool:
    """Whether a run of letters could be part of a word that the rules know, and so must be read letter by letter."""
    return len(run) == 1 or run in _CUE_INFIXES or run.lower() in _KNOWN_INFIXES


def _word(known: str, letter: str) -> str:
    """The word state after one more letter: a prefix of a known word, "?" for one unknown letter, "*" for the rest."""
    grown = known + letter.lower()
    if grown in _KNOWN:
        return grown
    return "?" if known == "" else "*"


def sentence_step(state: State, symbol: "str | int") -> tuple[State, int]:
    """One character of the sentence rules.

    States are pairs (phase, detail). In phase "text" the detail is the current word: "" none, a prefix of a known
    abbreviation, "?" one other letter, "*" any other word, "dotted" one letter after a period that follows one letter.
    The "pending" phases have seen the end of a sentence and wait for the next text.

    Returns:
        The next state, and the event at this character (0 for none).
    """
    phase, detail = state
    if phase in ("pending", "pending_soft", "pending_guess", "wide"):
        return _pending_step(phase, detail, symbol)
    if phase == "bytes":
        return _split_step(detail, symbol)
    return _text_step(phase, detail, symbol), 0


def _pending_step(phase: str, detail: str, symbol: "str | int") -> tuple[State, int]:
    """Detail "" or "1": no or one line break so far, "2": a blank line."""
    if symbol == NEWLINE:
        return ("pending", "2" if detail else "1"), 0
    if symbol in _BLANKS:
        return ("pending" if phase == "wide" else phase, detail), 0
    if phase == "wide" and symbol in (CLOSER, EMPHASIS, WIDE_STOP, DOT, END_MARK, ELLIPSIS):
        return (phase, detail), 0
    small = symbol == SMALL_WORD or (isinstance(symbol, str) and len(symbol) == 1 and symbol.islower())
    if (phase == "pending_soft" and small) or (phase == "pending_guess" and symbol == DIGIT):
        return _text_step("text", "", symbol), 0
    return sentence_step(START, symbol)[0], PARAGRAPH if detail == "2" else SENTENCE


def _split_step(prefix: str, symbol: "str | int") -> tuple[State, int]:
    """Inside a character whose bytes come one by one."""
    if isinstance(symbol, int):
        grown = bytes.fromhex(prefix) + bytes([symbol])
        if grown in _SPLIT_MARKS:
            return _text_step("text", "", _SPLIT_MARKS[grown]), 0
        if grown in _SPLIT_PREFIXES:
            return ("bytes", grown.hex()), 0
    return _text_step("text", "", symbol), 0


def _text_step(phase: str, detail: str, symbol: "str | int") -> State:
    stopped = phase in ("stop", "end_mark", "soft")
    at_line_start = phase in ("line_start", "new_line", "bullet")
    if isinstance(symbol, int):
        return ("bytes", bytes([symbol]).hex()) if bytes([symbol]) in _SPLIT_PREFIXES else ("text", "")
    if symbol in (SPACE, GUESSED_SPACE):
        return _after_space(phase, detail, symbol == GUESSED_SPACE)
    if symbol == NEWLINE:
        if stopped or phase == "colon":
            return ("pending", "1")
        return {"new_line": ("pending", "2"), "line_start": START}.get(phase, ("new_line", ""))
    if symbol == DOT:
        return _after_dot(phase, detail)
    if symbol in (CLOSER, EMPHASIS) and stopped:
        return (phase, "")
    if symbol in (EMPHASIS, BULLET) and at_line_start:
        return ("bullet", "")
    if symbol == DIGIT:
        return ("list_number", "") if at_line_start or phase == "list_number" else ("text", "*")
    simple = {END_MARK: "end_mark", COLON: "colon", WIDE_STOP: "wide", ELLIPSIS: "soft"}
    if symbol in simple:
        return (simple[symbol], "")
    if symbol in (SMALL_WORD, CAPITAL_WORD):
        return ("text", "*")
    if len(symbol) == 1:
        if phase == "stop" and detail == "letter":
            return ("text", "dotted")
        if phase == "list_number":
            return ("text", "*")
        if phase != "text" or detail in ("", "after_abbreviation"):
            return ("text", _word("", symbol))
        if detail in ("after_dotted", "guessed"):
            return ("text", "dotted")
        return ("text", "*" if detail in ("?", "*", "dotted") else _word(detail, symbol))
    return ("text", "")


def _after_space(phase: str, detail: str, guessed: bool) -> State:
    if phase == "stop":
        return ("pending_guess" if guessed else "pending", "")
    if phase in ("end_mark", "soft"):
        return ("pending_soft" if phase == "soft" else "pending", "")
    if phase in ("colon", "line_start", "new_line", "bullet"):
        return (phase, "")
    if detail == "guessed" and guessed:
        return (phase, detail)
    return ("text", "")


def _after_dot(phase: str, detail: str) -> State:
    if phase == "list_number":
        return ("text", "")
    if phase in ("stop", "soft"):
        return ("soft", "")
    if phase == "end_mark":
        return ("end_mark", "")
    if phase == "text":
        if detail in ABBREVIATIONS:
            return ("text", "after_abbreviation")
        if detail in SOFT_ABBREVIATIONS:
            return ("soft", "")
        if detail == "dotted":
            return ("text", "after_dotted")
        if detail in ("after_dotted", "after_abbreviation", "guessed"):
            return ("soft", "")
        if len(detail) == 1 and detail != "*":
            return ("stop", "letter")
    return ("stop", "")


def guessed_sentence_step(state: State, symbol: "str | int") -> tuple[State, int]:
    """`sentence_step` for tokenizers that lose white space, where "e.g." and "i.e." arrive as "e. g." and "i. e."."""
    if state in (("text", "e"), ("text", "i")) and symbol == DOT:
        return ("text", "guessed"), 0
    return sentence_step(state, symbol)


def cue_step(state: State, symbol: "str | int") -> tuple[State, int]:
    """One character of the cue rule: a cue word, capitals as listed, that opens a line (list marks may precede it).

    Phase "cue" holds the letters so far; "cue_end" has read a whole cue word and waits whether a letter follows.
    Blank lines are tracked too, for the summary.
    """
    phase, detail = state
    if phase == "cue_end":
        if isinstance(symbol, str) and (len(symbol) == 1 or symbol in (SMALL_WORD, CAPITAL_WORD)):
            return ("text", ""), 0
        return cue_step(("text", ""), symbol)[0], CUE
    if symbol == NEWLINE:
        return {"new_line": ("pending", ""), "pending": ("pending", ""), "line_start": START}.get(
            phase, ("new_line", "")
        ), 0
    if symbol in (SPACE, GUESSED_SPACE) and phase in ("line_start", "new_line", "bullet", "pending"):
        return (phase, ""), 0
    event = PARAGRAPH if phase == "pending" else 0
    if symbol in (EMPHASIS, BULLET) and phase in ("line_start", "new_line", "bullet", "pending"):
        return ("bullet", ""), event
    if isinstance(symbol, str) and len(symbol) == 1 and phase != "text":
        grown = detail + symbol
        if grown in CUE_WORDS:
            return ("cue_end", ""), event
        if grown in _CUE_PREFIXES:
            return ("cue", grown), event
    return ("text", ""), event


# Bits of a piece of a sentence: see `_measure`.
HAS_WORD, HAS_CONTENT, OPENS_WITH_BAR, CLOSES_WITH_BAR, HAS_BODY = 1, 2, 4, 8, 16
_WHITE = " \t\r\f\v\n"
_STOPS = ".?!:\u3002\uff01\uff1f"
_NOT_A_NUMBER = re.compile(rf"[^0-9.,\-{_WHITE}]")
_NOT_A_RULE = re.compile(rf"[^\-=*_|:+~#.{_WHITE}]")
_CONTINUATION_BYTES = re.compile("[\udc80-\udcbf]")

# Bits of a transition above the next state.
STATE_BITS = 12
STATE_MASK = (1 << STATE_BITS) - 1
LEADS_THINKING, INSIDE_THINKING, LEADS_SUMMARY, INSIDE_SUMMARY = (1 << (STATE_BITS + bit) for bit in range(4))
_RULE_EVENTS = {"sentence": {SENTENCE, PARAGRAPH}, "paragraph": {PARAGRAPH}, "cue": {CUE}}

# Signs: letters and the bytes of split characters stand for themselves, a class for its first character.
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SIGN_OF = {name: characters[0] for name, characters in CHARACTER_CLASSES.items()}
_SIGN_OF |= {OTHER: "\x01", GUESSED_SPACE: "\x02", SMALL_WORD: "\x03", CAPITAL_WORD: "\x04"}
_SPLIT_SIGNS = {chr(0xDC00 + byte): byte for byte in SPLIT_BYTES}
_SYMBOL_OF: "dict[str, str | int]" = {sign: name for name, sign in _SIGN_OF.items()}
_SYMBOL_OF |= _SPLIT_SIGNS | {letter: letter for letter in _LETTERS}
_BLANK_SIGNS = _SIGN_OF[SPACE] + _SIGN_OF[NEWLINE] + _SIGN_OF[GUESSED_SPACE]
_COLLAPSED = (_SIGN_OF[SPACE], _SIGN_OF[DIGIT], _SIGN_OF[OTHER])
_WORD = re.compile("[A-Za-z]{2,}")
_BORDER = "\ud800"  # between tokens; no text decodes to it


class _Signs(dict[int, str]):
    """The sign of each character, for `str.translate`."""

    def __missing__(self, code: int) -> str:
        return _SIGN_OF[OTHER]


_SIGNS = _Signs({ord(sign): sign for sign in (_BORDER, *_LETTERS, *_SPLIT_SIGNS)})
_SIGNS.update(
    (ord(character), _SIGN_OF[name]) for name, characters in CHARACTER_CLASSES.items() for character in characters
)


@dataclass(frozen=True)
class RuleTable:
    """The sentence rules over tokens.

    Attributes:
        row: int32 [V]: row of each token in `transition`.
        transition: long [rows, states]: next state, and the bits LEADS_* (a boundary before the token's first text)
            and INSIDE_* (one further inside).
        parts: int32 [V, 4]: blanks before the text, characters of the text, blanks after it, flags.
        split_row: int32 [V]: row in `split_variant` of the tokens that may hold a boundary inside, else 0.
        split_variant: long [split rows, states]: row in `split`.
        split: long [variants, 9]: the parts before the first and after the last boundary inside, and whether a whole
            sentence long enough stands between.
        states: What each state of the rules is.
    """

    row: torch.Tensor
    transition: torch.Tensor
    parts: torch.Tensor
    split_row: torch.Tensor
    split_variant: torch.Tensor
    split: torch.Tensor
    states: list[State]


def long_enough(length: Any, flags: Any, min_step_chars: int) -> Any:
    """Whether the end of a sentence is a boundary: not short, not a bare number, not a table row or rule.

    Takes the length and flags of a sentence, or tensors of them, and returns a bool or a tensor of bools.
    """
    words, bars = HAS_WORD | HAS_CONTENT, OPENS_WITH_BAR | CLOSES_WITH_BAR
    return (length >= min_step_chars) & ((flags & words) == words) & ((flags & bars) != bars)


def build_rule_table(pieces: list[bytes], rule: str, min_step_chars: int, guessed_space: bool) -> RuleTable:
    """Compiles the rules for the pieces of a tokenizer (one row more than `pieces`, for unknown ids).

    Args:
        pieces: Bytes of each token id; b"" for control tokens.
        rule: "sentence", "paragraph" or "cue".
        min_step_chars: The end of a shorter sentence is no boundary.
        guessed_space: The tokenizer loses white space.
    """
    step = cue_step if rule == "cue" else guessed_sentence_step if guessed_space else sentence_step
    machine = _Machine(step, _RULE_EVENTS[rule])
    texts = [piece.decode("utf-8", "surrogateescape") for piece in (*pieces, b"")]
    spelled, signatures = _spell(texts, guessed_space)
    unique = sorted(set(signatures), key=len, reverse=True)
    rows: dict[tuple[int, ...], int] = {}
    row_of = {
        signature: rows.setdefault(tuple(row), len(rows))
        for signature, row in zip(unique, machine.transitions(unique).tolist(), strict=True)
    }
    row = [row_of[signature] for signature in signatures]
    inside = [[state for state, code in enumerate(key) if code & INSIDE_THINKING] for key in rows]
    splits = _Splits(machine, min_step_chars)
    split_row = [0] * len(row)
    for index, key in enumerate(row):
        if inside[key]:
            split_row[index] = splits.row(texts[index], spelled[index], inside[key])
    return RuleTable(
        row=_column(row),
        transition=torch.tensor(list(rows)),
        parts=_column(number for text in texts for number in _measure(text)).view(-1, 4),
        split_row=_column(split_row),
        split_variant=torch.tensor(list(splits.rows)),
        split=torch.tensor(list(splits.variants)),
        states=machine.states,
    )


def _column(values: Iterable[int]) -> torch.Tensor:
    """int32, by way of a buffer: several times faster than torch.tensor on a long list."""
    return torch.frombuffer(array("i", values), dtype=torch.int32)


def _spell(texts: list[str], guessed_space: bool) -> tuple[list[str], list[str]]:
    """The signs of each token, and its signature: unknown words and repeated signs shortened.

    All tokens in one string: a few passes over a million characters instead of a few calls for each token.
    """
    signs = (_BORDER + _BORDER.join(texts)).translate(_SIGNS)
    if guessed_space:
        signs = signs.replace(_BORDER + _SIGN_OF[SPACE], _BORDER + _SIGN_OF[GUESSED_SPACE])
    short = signs
    for sign in _COLLAPSED:
        short = re.sub(sign + sign + "+", sign, short)
    words = _Words()
    short = _WORD.sub(lambda match: words[match[0]], short)
    return signs.split(_BORDER)[1:], short.split(_BORDER)[1:]


class _Words(dict[str, str]):
    """The signature of each run of letters."""

    def __missing__(self, run: str) -> str:
        unknown = _SIGN_OF[SMALL_WORD if run[0].islower() else CAPITAL_WORD]
        self[run] = short = run if keeps_letters(run) else unknown
        return short


class _Machine:
    """The rules over all states at once. State 0 is the start of a segment."""

    def __init__(self, step: Step, thinking_events: set[int]):
        self.thinking_events = thinking_events
        self.states: list[State] = [START]
        index = {START: 0}
        self.arrows: list[dict[str, tuple[int, int]]] = []
        for state in self.states:
            arrow = {}
            for sign, symbol in _SYMBOL_OF.items():
                target, event = step(state, symbol)
                if target not in index:
                    index[target] = len(self.states)
                    self.states.append(target)
                arrow[sign] = (index[target], event)
            self.arrows.append(arrow)
        self.cue_end = index.get(("cue_end", ""), -1)

    def transitions(self, signatures: list[str]) -> torch.Tensor:
        """The effect of each signature on each state.

        Args:
            signatures: Longest first.

        Returns:
            long [signatures, states], as `RuleTable.transition`.
        """
        place = {sign: number for number, sign in enumerate(_SYMBOL_OF)}
        arrows = torch.tensor([[arrow[sign] for arrow in self.arrows] for sign in _SYMBOL_OF])
        following, events = arrows.unbind(2)
        before = torch.arange(len(self.states))
        state = before.repeat(len(signatures), 1)
        bits = torch.zeros_like(state)
        blanks = [len(signature) - len(signature.lstrip(_BLANK_SIGNS)) for signature in signatures]
        first_text = torch.tensor(blanks)[:, None]
        remaining = sum(map(bool, signatures))
        with_text = slice(remaining)
        for position in range(len(signatures[0])):
            while len(signatures[remaining - 1]) <= position:
                remaining -= 1
            sign = torch.tensor([place[signature[position]] for signature in signatures[:remaining]])[:, None]
            event = events[sign, state[:remaining]]
            state[:remaining] = following[sign, state[:remaining]]
            cue = event == CUE
            leads = cue | (first_text[:remaining] == position)
            counts = sum(event == kind for kind in self.thinking_events) > 0
            if position == 0:
                counts &= ~(cue & (before == self.cue_end))  # counted with the token that ended in the cue word
            bits[:remaining] |= torch.where(leads, LEADS_THINKING, INSIDE_THINKING) * counts
            bits[:remaining] |= torch.where(leads, LEADS_SUMMARY, INSIDE_SUMMARY) * (event == PARAGRAPH)
        bits[with_text] |= LEADS_THINKING * (state[with_text] == self.cue_end)
        return state | bits

    def cuts(self, signs: str, states: list[int]) -> dict[tuple[int, ...], list[int]]:
        """Where boundaries stand inside a token, past its first text: the states before it, by the places."""
        first_text = len(signs) - len(signs.lstrip(_BLANK_SIGNS))
        paths: dict[tuple[int, tuple[int, ...]], list[int]] = {(state, ()): [state] for state in states}
        for position, sign in enumerate(signs):
            met: dict[tuple[int, tuple[int, ...]], list[int]] = {}
            for (state, cuts), starts in paths.items():
                state, event = self.arrows[state][sign]
                if event in self.thinking_events and position > first_text:
                    cuts = (*cuts, position)
                met.setdefault((state, cuts), []).extend(starts)
            paths = met
        by_cuts: dict[tuple[int, ...], list[int]] = {}
        for (_, cuts), starts in paths.items():
            by_cuts.setdefault(cuts, []).extend(starts)
        return by_cuts


class _Splits:
    """Collects the rows of `RuleTable.split_variant` and `RuleTable.split`; row 0 of both is "nothing inside"."""

    def __init__(self, machine: _Machine, min_step_chars: int):
        self.machine = machine
        self.min_step_chars = min_step_chars
        self.variants: dict[tuple[int, ...], int] = {(0,) * 9: 0}
        self.rows: dict[tuple[int, ...], int] = {(0,) * len(machine.states): 0}

    def row(self, text: str, signs: str, states: list[int]) -> int:
        """The row of one token, which holds a boundary inside after some states."""
        variant = [0] * len(self.machine.states)
        for cuts, before in self.machine.cuts(signs, states).items():
            whole = [_measure(text[a:b]) for a, b in pairwise(cuts)]
            between = any(long_enough(part[1], part[3], self.min_step_chars) for part in whole)
            parts = (*_measure(text[: cuts[0]]), *_measure(text[cuts[-1] :]), int(between))
            number = self.variants.setdefault(parts, len(self.variants))
            for state in before:
                variant[state] = number
        return self.rows.setdefault(tuple(variant), len(self.rows))


def _measure(text: str) -> tuple[int, int, int, int]:
    """Blanks before, characters of, and blanks after the text of a piece, and its flags.

    HAS_WORD: anything beyond digits and number marks; HAS_CONTENT: anything beyond the marks of a table rule;
    OPENS_WITH_BAR, CLOSES_WITH_BAR: "|" first, and last before the stop; HAS_BODY: anything but stops.
    A character that is split over tokens counts with its first byte: where no character begins, all is blank.
    """
    tail = text.lstrip(_WHITE)
    core = tail.rstrip(_WHITE)
    before, length, after = len(text) - len(tail), len(core), len(tail) - len(core)
    if core.isalpha():
        return before, length, after, HAS_WORD | HAS_CONTENT | HAS_BODY
    if not core.isascii():
        length -= len(_CONTINUATION_BYTES.findall(core))
    if length == 0:
        return before + after, 0, 0, 0
    body = core.rstrip(_STOPS + _WHITE)
    flags = HAS_WORD * bool(_NOT_A_NUMBER.search(core)) | HAS_CONTENT * bool(_NOT_A_RULE.search(core))
    flags |= OPENS_WITH_BAR * core.startswith("|") | CLOSES_WITH_BAR * body.endswith("|") | HAS_BODY * bool(body)
    return before, length, after, flags
