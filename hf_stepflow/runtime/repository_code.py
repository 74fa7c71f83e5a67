"""The code that travels to repositories: files of this folder, with all that they import from it."""

import ast
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

_HERE = Path(__file__).parent
_INDENTATION = " " * 4
# Whoever reads a repository's config.json looks up here what its fields mean.
_DOCUMENTED = ("StepFlowSettings",)


def code_files(*entries: str) -> list[Path]:
    """Files of this folder, and those that they import relatively, directly or not, by name.

    Args:
        entries: names of modules.
    """
    files = [_HERE / f"{name}.py" for name in entries]
    needed = {Path(found) for file in files for found in get_relative_import_files(file)}
    return sorted({*files, *needed})


def travelling_code(file: Path) -> str:
    """A file as it stands in repositories: the same program, a quarter smaller, for people to read.

    Tabs stand for four spaces, and docstrings end after their first paragraph; private functions have none. Code that
    has travelled stays as it is.

    Args:
        file: the file.
    """
    source = file.read_text(encoding="utf-8")
    lines = source.split("\n")
    for first, last, is_private in reversed(_docstrings(ast.parse(source))):
        if is_private:
            del lines[first - 1 : last]
            continue
        end = next((number for number in range(first, last) if not lines[number].strip()), None)
        if end is not None:
            lines[end - 1 : last] = [lines[end - 1] + '"""']
    return "\n".join(map(_with_tabs, lines))


def copy_code(folder: Path, *entries: str) -> None:
    """Copies `code_files` into a folder, as `travelling_code`."""
    for file in code_files(*entries):
        (folder / file.name).write_bytes(travelling_code(file).encode())


def _docstrings(tree: ast.Module) -> list[tuple[int, int, bool]]:
    """First and last lines, counted from 1, of docstrings that change, and whether each is a private function's."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        name = getattr(node, "name", "")
        if ast.get_docstring(node, clean=False) is not None and name not in _DOCUMENTED:
            is_private = isinstance(node, ast.FunctionDef) and name.startswith("_") and not name.endswith("__")
            docstring = node.body[0]
            found.append((docstring.lineno, docstring.end_lineno or docstring.lineno, is_private))
    return sorted(found)


def _with_tabs(line: str) -> str:
    text = line.lstrip(" ")
    indents, rest = divmod(len(line) - len(text), len(_INDENTATION))
    return "\t" * indents + " " * rest + text
