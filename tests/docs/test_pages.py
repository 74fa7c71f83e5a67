"""The pages of the documentation: links lead somewhere, and the names in them exist."""

import re
from importlib import import_module
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# `name`, `Class.name` (`room/file.py`)
NAMED = re.compile(r"((?:`[\w.]+`(?:, )?)+) \(`([\w/]+)\.py`\)")


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown renderer gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """The targets of a page's links and images."""
    blocks = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    found = [token.attrGet("href") or token.attrGet("src") for block in blocks for token in block.children or ()]
    return [str(target) for target in found if target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if not target.startswith(("https://", "http://")):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def test_the_index_lists_every_page() -> None:
    listed = set(
        re.findall(r"^\| \[([\w.]+)\]", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_functions_of_the_method_exist() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    found = [(name, module) for names, module in NAMED.findall(text) for name in re.findall(r"[\w.]+", names)]
    assert len(found) > 20
    for name, module in found:
        home = import_module("hf_stepflow." + module.replace("/", "."))
        *owner, last = name.split(".")
        for part in owner:
            home = getattr(home, part)
        assert hasattr(home, last) or last in getattr(home, "__annotations__", {}), f"{name} in {module}.py"
    # Every row of the tables of equations and of steps names one.
    for table in re.findall(r"^\| (?:equation|what) \| .*?(?=\n\n)", text, re.DOTALL | re.MULTILINE):
        for row in table.splitlines()[2:]:
            assert NAMED.search(row), row


def test_sources_refer_to_pages_and_sections_that_exist() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "hf_stepflow").rglob("*.py")]
    references = re.findall(r'docs/(\w+\.md)(?:, "([^"]+)")?', "\n".join(sources))
    assert len(references) > 10
    for page, section in references:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert not section or f"\n## {' '.join(section.split())}\n" in text, (page, section)
    assert not re.search(r"docs/method\.md, section|METHOD section", "\n".join(sources))


def test_readme_has_short_paragraphs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    paragraphs = [
        token for token in MarkdownIt("commonmark").enable("table").parse(text) if token.type == "paragraph_open"
    ]
    assert max(end - start for start, end in (token.map for token in paragraphs)) <= 5
