"""Reads finished traces from files."""

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
        prompt: The question, which goes through the chat template; None where `response` is the whole trace, markers
            included.
        response: The text after the prompt.
    """

    prompt: str | None
    response: str

    def encode(self, tokenizer: Any) -> tuple[list[int], int | None]:
        """Returns the token ids and the length of the prompt (None if unknown)."""
        response = tokenizer.encode(self.response, add_special_tokens=False)
        if self.prompt is None:
            return response, None
        prompt = encode_prompt(tokenizer, self.prompt)
        return prompt + response, len(prompt)


def read_traces(path: str | Path) -> list[WrittenTrace]:
    """Reads traces: JSONL with `prompt` and `response`, or `text`, in each line; any other file is one whole trace.

    Args:
        path: The file to read.

    Raises:
        StepFlowFileError: If the file is missing or empty, or a line is not a trace.
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
    where = f"line {number} of {str(path)!r}"
    try:
        data = json.loads(line)
    except ValueError as error:
        raise StepFlowFileError(f"{where} is no JSON: {error}") from error
    if not isinstance(data, dict) or not ({"prompt", "response"} if "response" in data else {"text"}) <= data.keys():
        raise StepFlowFileError(
            f"{where} must be an object with `prompt` and `response`, or `text`",
            hint='for instance {"prompt": "How many?", "response": "Two and two.</think>Four."}',
        )
    prompt, response = (data["prompt"], data["response"]) if "response" in data else (None, data["text"])
    if not isinstance(response, str) or not response or not (prompt is None or isinstance(prompt, str)):
        raise StepFlowFileError(f"{where} must hold texts that are not empty")
    return WrittenTrace(prompt, response)
