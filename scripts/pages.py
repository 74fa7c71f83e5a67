"""Pages whose tables are written from the outputs of the benchmarks."""

from collections.abc import Callable, Mapping
from pathlib import Path

Parts = Mapping[str, Callable[[], str]]
"""What stands between `<!-- NAME -->` and `<!-- end of NAME -->`, by name."""


def page_text(page: Path, parts: Parts) -> str:
    """A page with its parts made anew.

    Raises:
        ValueError: The page does not have the markers of a part.
    """
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if start not in text or end not in text:
            raise ValueError(f"{page.name} has no part between {start.strip()} and {end}")
        before, _, rest = text.partition(start)
        text = f"{before}{start}{part()}\n{end}{rest.partition(end)[2]}"
    return text


def write_pages(pages: Mapping[Path, Parts]) -> None:
    """Writes pages with their parts made anew."""
    for page, parts in pages.items():
        page.write_text(page_text(page, parts), encoding="utf-8")
