"""The import graph of hf_stepflow, read from its sources: no circles, no imports from a higher floor."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "hf_stepflow"
# Rooms from the ground up; the package's own __init__ is on top of them all.
FLOORS = (
    ("runtime",),
    ("prompts", "report", "saliency", "evaluation", "serving", "verification"),
    ("presets",),
    ("calibration", "hub", "reasoner"),
    ("problems", "vllm"),
    ("cli", "app"),
    ("",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ENTRIES = ("configuration_stepflow", "modeling_stepflow", "tokenization_stepflow")
# Imported by name at run time, if installed: the package resolves a preset's name for code that has travelled.
LOOKED_UP = [("runtime.repository", "hf_stepflow")]


def module_name(file: Path) -> str:
    """The dotted name below hf_stepflow: "" for the package itself, "cli" for cli/__init__.py."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}


def imports(name: str) -> list[tuple[int, str]]:
    """Line and absolute name of every module that a module imports, anywhere in it."""
    found = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = origin(name, node)
            # `from package import name` imports package.name if that is a module, and the package if it is not.
            for alias in node.names:
                inner = f"{home}.{alias.name}"
                found.append((node.lineno, inner if inner.removeprefix("hf_stepflow.") in FILES else home))
    return found


def origin(name: str, node: ast.ImportFrom) -> str:
    """The absolute name of what stands between `from` and `import`."""
    if node.level == 0:
        return node.module or ""
    parts = ["hf_stepflow", *(part for part in name.split(".") if part)]
    depth = node.level - (FILES[name].name == "__init__.py")
    return ".".join(parts[: len(parts) - depth] + ([node.module] if node.module else []))


def is_ours(target: str) -> bool:
    return target.partition(".")[0] == "hf_stepflow"


# For each module, the modules of hf_stepflow that it imports, with a line where it does.
GRAPH = {
    name: {target.removeprefix("hf_stepflow").lstrip("."): line for line, target in imports(name) if is_ours(target)}
    for name in FILES
}


def travelling() -> list[str]:
    """The modules of runtime that a preset repository holds: the entries, and all that they import."""
    found: set[str] = set()
    waiting = [f"runtime.{entry}" for entry in ENTRIES]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [target for target in GRAPH[name] if target.startswith("runtime.")]
    return sorted(found)


def test_the_graph_is_whole() -> None:
    assert {target for targets in GRAPH.values() for target in targets} <= FILES.keys()
    assert len(GRAPH) > 50
    assert sum(map(len, GRAPH.values())) > 150
    # Nothing is imported around it.
    calls = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    imported = [(name, node.args[0]) for name, node in calls if ast.unparse(node.func).endswith("import_module")]
    named = [(name, argument.value) for name, argument in imported if isinstance(argument, ast.Constant)]
    assert [(name, target) for name, target in named if is_ours(target)] == LOOKED_UP


def test_there_is_no_circle() -> None:
    try:
        graphlib.TopologicalSorter(GRAPH).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(name or "hf_stepflow" for name in reversed(error.args[1])))


def test_no_module_imports_from_a_higher_floor() -> None:
    assert {name.partition(".")[0] for name in FILES} <= set(FLOOR_OF), "a room without a floor"
    offenders = [
        f"{FILES[name].relative_to(PACKAGE.parent)}:{line} imports {target or 'hf_stepflow'}"
        for name, targets in GRAPH.items()
        for target, line in targets.items()
        if FLOOR_OF[target.partition(".")[0]] > FLOOR_OF[name.partition(".")[0]]
    ]
    assert not offenders, "\n".join(offenders)


def test_travelling_code_needs_torch_and_transformers_only() -> None:
    known = {"torch", "transformers", *sys.stdlib_module_names}
    offenders = []
    for name in {*travelling(), "runtime.generate"}:
        for line, target in imports(name):
            needed = known | ({"triton"} if name == "runtime.kernels" else set())  # which nothing needs
            if target.partition(".")[0] not in needed and not target.startswith("hf_stepflow.runtime."):
                offenders.append(f"{FILES[name].name}:{line} imports {target}")
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.ImportFrom) and (
                node.level > 1 or (node.level == 0 and is_ours(node.module or ""))
            ):
                offenders.append(f"{FILES[name].name}:{node.lineno} names its neighbour by more than `.x`")
    assert not offenders, "\n".join(offenders)


def test_a_preset_repository_holds_few_files() -> None:
    # The kernels and the paged cache of continuous batching are files of their own: most models run without either.
    assert len(travelling()) <= 19, ", ".join(travelling())
