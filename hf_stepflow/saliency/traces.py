"""Traces that were written before, from files: what `diagnose` reads and a comparison of groups is made of."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_stepflow.prompts import encode_prompt
from hf_stepflow.runtime.errors import StepFlowFileError


@dataclass(frozen=True)
class WrittenTrace:
    """A trace as text.

    Attributes:
        prompt: the question, which goes through the chat template; None where `response` is the whole trace, markers
            and all.
        response: what follows it.
    """

    prompt: str | None
    response: str

    def encode(self, tokenizer: Any) -> tuple[list[int], int | None]:
        """Token ids, and where the prompt ends (None where that is not known)."""
        response = tokenizer.encode(self.response, add_special_tokens=False)
        if self.prompt is None:
            return response, None
        prompt = encode_prompt(tokenizer, self.prompt)
        return prompt + response, len(prompt)


def read_traces(path: str | Path) -> list[WrittenTrace]:
    """Reads traces: JSONL with `prompt` and `response`, or `text`, in each line; any other file is one whole trace.

    Raises:
        StepFlowFileError: a file that is missing, empty or not what it should be.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StepFlowFileError(f"{str(path)!r} cannot be read: {error}") from error
    if path.suffix.lower() != ".jsonl":
        if not content.strip():
            raise StepFlowFileError(f"{str(path)!r} is empty", hint="give a file that holds a trace")
        return [WrittenTrace(None, content)]
    traces = [_read_line(path, number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not traces:
        raise StepFlowFileError(f"{str(path)!r} holds no trace", hint="one JSON object a line: prompt, response")
    return traces


def _read_line(path: Path, number: int, line: str) -> WrittenTrace:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise StepFlowFileError(f"line {number} of {str(path)!r} is no JSON: {error}") from error
    if not isinstance(data, dict) or not ({"prompt", "response"} if "response" in data else {"text"}) <= data.keys():
        raise StepFlowFileError(
            f"line {number} of {str(path)!r} must be an object with `prompt` and `response`, or `text`",
            hint='for instance {"prompt": "How many?", "response": "Two and two.</think>Four."}',
        )
    prompt, response = (data["prompt"], data["response"]) if "response" in data else (None, data["text"])
    if not isinstance(response, str) or not response or not (prompt is None or isinstance(prompt, str)):
        raise StepFlowFileError(f"line {number} of {str(path)!r} must hold texts that are not empty")
    return WrittenTrace(prompt, response)
