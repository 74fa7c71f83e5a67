"""The steps of responses that are known as text alone, such as those of a results file."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_stepflow.runtime.settings import StepFlowSettings
from hf_stepflow.runtime.step_detector import StepVocabulary
from hf_stepflow.runtime.trace import steps_of_records

# Special tokens as tokenizers spell them: <|im_end|>, <s>, </s>, <eos>, <end_of_turn>.
_SPECIAL = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|(?:start|end)_of_turn)>")
# Every character stands in one piece; stops and line breaks stand alone, so that a boundary lies between two pieces.
_WORD = r" ?[^\W\d_]+|\d+|."


@dataclass(frozen=True)
class WrittenStep:
    """One step of a text.

    Attributes:
        label: "thinking", "summary" or "question" (what is neither, such as the result of a tool).
        index: Its number inside the round; 0 for a question.
        start, end: The characters of it, [start, end).
    """

    label: str
    index: int
    start: int
    end: int


class TextSteps:
    """Cuts texts into steps by the rules of a run.

    The rules read words instead of a model's tokens. A response whose prompt opened the thinking says so by its
    markers: the thinking ends, and does not start.

    Args:
        texts: All texts that will be cut.
        settings: The settings with markers and step rules.
    """

    def __init__(self, texts: Iterable[str], settings: StepFlowSettings):
        tokenizer = _WordTokenizer(_markers(settings))
        for text in texts:
            tokenizer.learn(text)
        self._tokenizer = tokenizer
        self._settings = settings
        self._vocabulary = StepVocabulary.from_tokenizer(tokenizer, settings)

    def cut(self, text: str, is_thinking: bool) -> list[WrittenStep]:
        """Returns the steps of a response.

        Args:
            text: The response, with its markers.
            is_thinking: Whether a thinking step was found in it when it was generated.

        Example:
            >>> from hf_stepflow.evaluation.written_steps import TextSteps
            >>> from hf_stepflow.runtime.settings import StepFlowSettings
            >>> text = "Ann has 7 points. So Ben has 4.</think> The answer is 4."
            >>> steps = TextSteps([text], StepFlowSettings()).cut(text, is_thinking=True)
            >>> [(step.label, text[step.start : step.end]) for step in steps]
            [('thinking', 'Ann has 7 points.'), ('thinking', ' So Ben has 4.'), ('summary', ' The answer is 4.')]
        """
        pieces = self._tokenizer.split(text)
        ends = [0]
        for piece in pieces:
            ends.append(ends[-1] + len(piece))
        opening = self._tokenizer.encode(self._opening(text)) if is_thinking else []
        ids = opening + [self._tokenizer.known[piece] for piece in pieces]
        records = self._vocabulary.scan(ids, prompt_length=0)[len(opening) :]
        return [
            WrittenStep(step.label, step.index, ends[step.start], ends[step.end]) for step in steps_of_records(records)
        ]

    def _opening(self, text: str) -> str:
        """The marker that the prompt must have ended with: the first one, if the text lacks it before its summary."""
        if self._settings.implicit_thinking:
            return ""
        starts = self._settings.markers("thinking_start")
        summary = [text.find(marker) for marker in self._settings.markers("summary_start") if marker in text]
        head = text[: min(summary)] if summary else text
        return "" if any(marker in head for marker in starts) else starts[0]


def _markers(settings: StepFlowSettings) -> list[str]:
    names = ("thinking_start", "summary_start", "tool_start", "tool_end")
    return [marker for name in names for marker in settings.markers(name)]


@dataclass(frozen=True)
class _Special:
    content: str
    special: bool = True


class _WordTokenizer:
    """As much of a tokenizer as `StepVocabulary.from_tokenizer` reads, over the words of the texts that it learned.

    Attributes:
        known: The id of each piece.
        added_tokens_decoder: The special tokens by id.
    """

    backend_tokenizer = None
    unk_token_id = None
    eos_token_id = None

    def __init__(self, markers: Sequence[str]):
        # A marker is one piece, unless it is made of special tokens, which the rules read one by one.
        whole = [re.escape(marker) for marker in sorted(markers, key=len, reverse=True) if not _SPECIAL.search(marker)]
        self._piece = re.compile("|".join([f"({_SPECIAL.pattern})", *whole, _WORD]), re.DOTALL)
        self.known: dict[str, int] = {}
        self.added_tokens_decoder: dict[int, _Special] = {}
        for marker in markers:
            self.learn(marker)

    def split(self, text: str) -> list[str]:
        return [match[0] for match in self._piece.finditer(text)]

    def learn(self, text: str) -> None:
        for match in self._piece.finditer(text):
            index = self.known.setdefault(match[0], len(self.known))
            if match[1]:
                self.added_tokens_decoder[index] = _Special(match[0])

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [self.known[piece] for piece in self.split(text)]

    def get_vocab(self) -> dict[bytes, int]:
        """The pieces as bytes, whose spelling need not be guessed."""
        return {piece.encode("utf-8", "surrogatepass"): index for piece, index in self.known.items()}

    @property
    def all_special_ids(self) -> list[int]:
        return list(self.added_tokens_decoder)

    def __len__(self) -> int:
        return len(self.known)
