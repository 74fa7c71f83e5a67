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

    Tabs stand for four spaces, and docstrings end after their first paragraph. Code that has travelled stays as it is.

    Args:
        file: the file.
    """
    source = file.read_text(encoding="utf-8")
    lines = source.split("\n")
    for first, last in reversed(_docstrings(ast.parse(source))):
        end = next((number for number in range(first, last) if not lines[number].strip()), None)
        if end is not None:
            lines[end - 1 : last] = [lines[end - 1] + '"""']
    return "\n".join(map(_with_tabs, lines))


def copy_code(folder: Path, *entries: str) -> None:
    """Copies `code_files` into a folder, as `travelling_code`."""
    for file in code_files(*entries):
        (folder / file.name).write_bytes(travelling_code(file).encode())


def _docstrings(tree: ast.Module) -> list[tuple[int, int]]:
    """First and last lines of the docstrings that are shortened, counted from 1, in order."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    found = [
        node.body[0]
        for node in nodes
        if ast.get_docstring(node, clean=False) is not None and getattr(node, "name", None) not in _DOCUMENTED
    ]
    return sorted((docstring.lineno, docstring.end_lineno or docstring.lineno) for docstring in found)


def _with_tabs(line: str) -> str:
    text = line.lstrip(" ")
    indents, rest = divmod(len(line) - len(text), len(_INDENTATION))
    return "\t" * indents + " " * rest + text
