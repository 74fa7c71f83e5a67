"""Text from outside in Markdown, so that it stays text: no markup, no HTML, no new lines or table cells."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

# What Markdown, HTML and the Hub's formulas read as markup inside a line; an underscore inside a word is none.
_MARKUP = re.compile(r"[&<>\\`*\[\]{}|~$#^@]|(?<![^\W_])_|_(?![^\W_])")
_PLAIN_CODE = re.compile(r"[\w .,:;/<>()\[\]{}\"'=+-]+", re.ASCII)


def inline_text(value: Any) -> str:
    """A value as one line of plain text, to stand after other text of its line.

    A bare web address may still become a link to what it shows.
    """
    return _escaped(one_line(value))


def inline_code(value: Any) -> str:
    """A value as one line of code."""
    text = one_line(value)
    # Backticks would not keep a pipe or a backslash inside a table's cell.
    return f"`{text}`" if _PLAIN_CODE.fullmatch(text) else f"<code>{_escaped(text)}</code>"


def json_code(value: Any) -> str:
    """A JSON value as code; characters that would not be visible stand there as JSON escapes."""
    written = json.dumps(value, ensure_ascii=False)
    return inline_code(written if written.isprintable() else json.dumps(value))


def one_line(value: Any) -> str:
    """A value as text in one line, without control, formatting and other invisible characters."""
    visible = "".join(character if character.isprintable() else " " for character in str(value))
    return " ".join(visible.split())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escaped(text: str) -> str:
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)
