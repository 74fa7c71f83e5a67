"""Where a step may end, read one character at a time.

A finite automaton over character classes, so that every token becomes a table from state to state: the same rules
serve a finished text, a stream of tokens, and a batch of streams in tensors. Source: section 1 of the method notes
(docs/method.md, "Steps"): sentence ends for thinking, blank lines for the summary.

An *event* stands at the character that begins new text: SENTENCE after a sentence end, PARAGRAPH after a blank line,
CUE at the last letter of a cue word that opens a line.
"""

from collections.abc import Callable, Iterable

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
