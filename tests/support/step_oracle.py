# ruff: noqa: RUF001 (full-width punctuation is part of the rules)
"""A naive, offline answer to "which segment and step does each token belong to?", for a finished list of tokens.

Written from the notes on the method ("The trajectory") with plain string handling over the whole text, looking ahead
and back freely: nothing here is an automaton over tokens. What those notes leave open is decided so:

* White space is ASCII white space; a no-break or an ideographic space is text.
* The length of a sentence is counted for that sentence alone, from the last sentence end (whether or not that was a
  boundary), with its stop and without the blanks at both ends.
* Closing quotes, brackets and emphasis after a stop belong to the stop. An ellipsis, two or more periods, and "etc."
  end a sentence unless a small ASCII letter follows on the same line. A stop at the end of a line always ends one.
* A period after an abbreviation, after one letter that itself follows a one-letter word and a period ("e.g.", "p.m."),
  or after a number that opens a line or a sentence ("2. Then", "- 3. Then") ends nothing.
* A wide stop needs no white space; the stops and closers that follow it at once belong to it.
* A character whose bytes are cut over tokens is text to the rules, and so is a closing mark; only the wide stops, the
  wide colon and the ellipsis keep their meaning, as the first character of their cluster.
* A token that contains the first text of a new step starts it, whatever else it contains.
* Cue words are judged by tokens: the token that completes the word opens the new step, a cue word at the end of a
  token counts even if the next token goes on with letters, and the text before is measured up to that token.
* Tokens of leading white space in a segment are in no step. A control token inside thinking or summary closes a step.
* Markers written as text: a token that lies wholly inside a marker begun (two bytes or more, or one where no step is
  open or a boundary has been reached) is in no step, even if no marker comes of it.
* With implicit thinking the pattern that starts the summary is ordinary text of the last thinking step.
* A thinking-start marker while thinking continues the round; an end-of-turn token closes it.
* Markers that are message headers (`<|channel|>analysis<|message|>`): inside a round every special token opens a
  header and the text up to `<|message|>` is control; a message with any other header is an aside, labelled question.
* What a tool result quotes is text of it: between its markers, only its end and the end of the turn count. In a
  message that is an aside, an end of turn hands a tool call over, and the round goes on.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

QUESTION, THINKING, SUMMARY, ASIDE = range(4)

ABBREVIATIONS = set(
    "al approx ca cf cor def dr eg eq eqs fig figs ie lem mr mrs ms prof prop ref refs resp st thm vs".split()
)
CUES = "Wait But Alternatively However Hmm Actually Step".split()
BLANKS = " \t\r\f\v\n"
CLOSERS = "\"')]}`$’”»）】」』*_"
BULLETS = "-#>+*_"
WIDE_STOPS = "。！？．｡"
# Stand-ins for characters whose bytes are cut over tokens.
CUT_CHARACTER, CUT_WIDE_STOP, CUT_ELLIPSIS, CUT_COLON = "\ue000\ue001\ue002\ue003"
CUT_MARKS = dict.fromkeys(WIDE_STOPS, CUT_WIDE_STOP) | {"…": CUT_ELLIPSIS, "：": CUT_COLON}
# What a wide stop takes with it.
CLUSTER = CLOSERS + WIDE_STOPS + ".?!…"
FULL, SOFT, WIDE, LINE = "full", "soft", "wide", "line"


@dataclass(frozen=True)
class OracleToken:
    """One token: its bytes, whether it is special or ends a turn, and its name if it is one of `OracleRules.names`."""

    text: bytes = b""
    special: bool = False
    ends_turn: bool = False
    name: str | None = None


@dataclass(frozen=True)
class OracleRules:
    """The settings, and `names`: the texts that the tokenizer has as tokens of their own, whole in markers too."""

    names: frozenset[str] = frozenset()
    thinking_start: list[str] = field(default_factory=lambda: ["<think>"])
    summary_start: list[str] = field(default_factory=lambda: ["</think>"])
    tool_start: list[str] = field(default_factory=list)
    tool_end: list[str] = field(default_factory=list)
    implicit: bool = False
    prompt_length: int | None = None
    rule: str = "sentence"
    min_step_chars: int = 15

    def markers(self) -> dict[str, list[str]]:
        return {
            "thinking": [] if self.implicit else self.thinking_start,
            "summary": self.summary_start,
            "tool": self.tool_start,
            "tool end": self.tool_end,
        }


@dataclass
class Place:
    """Where a token stands: segment (0, 1, 2), round, step (-1 for none)."""

    segment: int
    round: int
    step: int = -1


def segment(tokens: list[OracleToken], rules: OracleRules) -> list[Place]:
    """The place of every token."""
    completed, matched = read_markers(tokens, rules)
    places, runs = label(tokens, completed, rules)
    steps_of_round: dict[int, int] = {}
    for run in runs:
        first = places[run[0]]
        texts = [tokens[i].text for i in run]
        boundaries = find_boundaries(texts, rules, first.segment == THINKING)
        is_open = False
        for position, i in enumerate(run):
            core = tokens[i].text.strip(BLANKS.encode())
            has_text = any(byte < 0x80 or byte >= 0xC0 for byte in core)
            closed = position in boundaries or not is_open
            held = not rules.implicit and has_text and matched[i] >= max(1 if closed else 2, len(core))
            if held:
                is_open = not closed
                continue
            if has_text and closed:
                steps_of_round[first.round] = steps_of_round.get(first.round, 0) + 1
                is_open = True
            if is_open:
                places[i].step = steps_of_round[first.round]
    return places


def read_markers(tokens: list[OracleToken], rules: OracleRules) -> tuple[list[str | None], list[int]]:
    """For each token the kind of the last marker it completes, and how much of a marker stands at its end."""
    sign_of = {name: chr(0xF0000 + i) for i, name in enumerate(sorted(rules.names, key=len, reverse=True))}

    def spell(text: str) -> str:
        if text in sign_of:
            return sign_of[text]
        for name in sign_of:
            before, found, after = text.partition(name)
            if found:
                return spell(before) + sign_of[name] + spell(after)
        return text.encode().decode("latin-1")

    markers = {spell(text): kind for kind, texts in rules.markers().items() for text in texts}
    longest_first = sorted(markers, key=len, reverse=True)
    stream, completed, matched = "", [], []
    for token in tokens:
        start = len(stream)
        whole = token.name and any(sign_of[token.name] in marker for marker in markers)
        stream += sign_of[token.name] if whole else token.text.decode("latin-1")
        ends = [
            markers[marker]
            for end in range(len(stream), start, -1)
            for marker in longest_first
            if stream.endswith(marker, 0, end)
        ]
        completed.append(ends[0] if ends else None)
        partial = [size for marker in markers for size in range(1, len(marker) + 1) if stream.endswith(marker[:size])]
        matched.append(max(partial, default=0))
    return completed, matched


def label(
    tokens: list[OracleToken], completed: list[str | None], rules: OracleRules
) -> tuple[list[Place], list[list[int]]]:
    """Segment and round of every token, and the runs of content tokens that nothing interrupts."""
    texts = [text for texts in rules.markers().values() for text in texts]
    in_markers = {name for name in rules.names if any(name in text for text in texts)}
    openers = {
        end
        for text in texts
        for start in in_markers
        for end in in_markers
        if text != start and text.startswith(start) and text.endswith(end)
    }
    places, runs, run = [], [], []
    where, behind, header, number = QUESTION, QUESTION, False, 0
    for i, token in enumerate(tokens):
        before = where, number
        if rules.implicit and rules.prompt_length is not None:
            if i < rules.prompt_length:
                where = QUESTION
            elif i == rules.prompt_length:
                where, header, number = THINKING, False, number + 1
        if (where, number) != before:
            run = []
        kind = completed[i]
        pattern = rules.implicit and kind == "summary"
        control = token.special or token.ends_turn or token.name in in_markers or header or (kind and not pattern)
        places.append(Place(where % ASIDE, number, -1 if control or where in (THINKING, SUMMARY) else 0))
        if control:
            run = []
        elif where in (THINKING, SUMMARY):
            if not run:
                runs.append(run)
            run.append(i)
        inner = behind if where == ASIDE else where
        if where == ASIDE and not header and kind in ("thinking", "summary"):
            kind = None
        if kind == "thinking":
            number += inner != THINKING
            where, header = THINKING, False
        elif kind == "summary" and where != QUESTION:
            where, header, run = SUMMARY, False, []
        elif kind == "tool" and where in (THINKING, SUMMARY):
            behind, where = where, ASIDE
        elif kind == "tool end" and where == ASIDE:
            where = behind
        elif token.ends_turn and where != QUESTION and not (openers and where == ASIDE):
            where, header = QUESTION, False
        elif header and token.name in openers:
            behind, where, header = inner, ASIDE, False
        elif openers and token.special and where != QUESTION:
            header = True
    return places, runs


def find_boundaries(texts: list[bytes], rules: OracleRules, thinking: bool) -> set[int]:
    """The tokens of a run that contain the first text after a boundary."""
    characters = list(read_characters(texts))
    text = "".join(character for character, _ in characters)
    owners = [owner for _, owner in characters]
    if not thinking:
        return {owners[start] for start, kind in sentence_starts(text) if kind == "paragraph"}
    if rules.rule == "cue":
        leads = sorted(set(cue_tokens(text, owners)))
        cuts = [sum(owner < lead for owner in owners) for lead in leads]
    else:
        cuts = [start for start, kind in sentence_starts(text) if rules.rule == "sentence" or kind == "paragraph"]
        leads = [owners[start] for start in cuts]
    sentences = [text[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
    return {lead for lead, sentence in zip(leads, sentences, strict=True) if counts(sentence, rules.min_step_chars)}


def read_characters(texts: list[bytes]) -> Iterator[tuple[str, int]]:
    """The characters of a run, each with the token that holds its first byte."""
    cut, owner = b"", 0
    for token, piece in enumerate(texts):
        for character in piece.decode("utf-8", "surrogateescape"):
            if not "\udc80" <= character <= "\udcff":
                cut = b""
                yield character, token
                continue
            byte = character.encode("utf-8", "surrogateescape")
            if byte >= b"\xc0":
                cut, owner = byte, token
            else:
                cut += byte
            with suppress(UnicodeDecodeError):
                yield CUT_MARKS.get(cut.decode(), CUT_CHARACTER), owner


def counts(sentence: str, minimum: int) -> bool:
    """Whether the end of a sentence is a boundary: not short, not a bare number, not a table row or rule."""
    core = sentence.strip(BLANKS)
    is_table_row = core.startswith("|") and core.rstrip(".?!:。！？" + BLANKS).endswith("|")
    is_number = all(character in "0123456789.,-" + BLANKS for character in core)
    is_table_rule = all(character in "-=*_|:+~#." + BLANKS for character in core)
    return len(core) >= minimum and not is_table_row and not is_number and not is_table_rule


def sentence_starts(text: str) -> list[tuple[int, str]]:
    """Where sentences start (the first is not listed), and whether a blank line or a sentence end stands before."""
    starts, begin = [], 0
    for i, character in enumerate(text):
        kind = None if character in BLANKS else ended(text[begin:i], character)
        if kind:
            starts.append((i, kind))
            begin = i
    return starts


def ended(before: str, following: str) -> str | None:
    body = before.rstrip(BLANKS)
    gap = before[len(body) :]
    if not body:
        return None
    if gap.count("\n") >= 2:
        return "paragraph"
    stop = last_stop(body)
    small = following.isascii() and following.islower()
    if (
        (stop and "\n" in gap)
        or (stop == WIDE and (gap or following not in CLUSTER))
        or (stop == FULL and gap)
        or (stop == SOFT and gap and not small)
    ):
        return "sentence"
    return None


def last_stop(body: str) -> str | None:
    """The stop at the end of a text."""
    core = body.rstrip(CLUSTER)
    if core.endswith(CUT_WIDE_STOP) or any(mark in body[len(core) :] for mark in WIDE_STOPS):
        return WIDE
    if body[-1] in ":：" + CUT_COLON:
        return LINE
    core = body.rstrip(CLOSERS)
    if core.endswith(("?", "!")):
        return FULL
    if core.endswith(("…", CUT_ELLIPSIS)):
        return SOFT
    return last_period(core) if core.endswith(".") else None


def last_period(text: str) -> str | None:
    """What the period at the end of a text means."""
    head = text[:-1]
    first_stop = head.rstrip(CLOSERS + ".")
    if first_stop.endswith(("?", "!")):
        return FULL
    if first_stop.endswith(("…", CUT_ELLIPSIS)):
        return SOFT
    stops = head.rstrip(CLOSERS)
    if stops.endswith(".") and (last_period(stops) or (stops == head and not is_list_number(stops[:-1]))):
        return SOFT
    if is_list_number(head):
        return None
    word = re.search("[A-Za-z]*\\Z", head)[0]
    rest = head[: len(head) - len(word)]
    if word and rest.endswith(".") and re.search("(^|[^A-Za-z0-9])[A-Za-z]\\Z", rest[:-1]):
        return None if len(word) == 1 else FULL
    if re.search("[0-9]\\Z", rest):
        return FULL
    if word.lower() in ABBREVIATIONS:
        return None
    return SOFT if word.lower() == "etc" else FULL


def is_list_number(head: str) -> bool:
    return bool(re.search(rf"(^|\n)[ \t\r\f\v{re.escape(BULLETS)}]*[0-9]+\Z", head))


def cue_tokens(text: str, owners: list[int]) -> Iterator[int]:
    """The tokens that complete a cue word at the start of a line."""
    for match in re.finditer(rf"(?:^|(?<=\n))[ \t\r\f\v{re.escape(BULLETS)}]*({'|'.join(CUES)})", text):
        last = match.end() - 1
        goes_on = text[match.end() : match.end() + 1]
        if not (goes_on.isascii() and goes_on.isalpha() and owners[last + 1] == owners[last]):
            yield owners[last]
