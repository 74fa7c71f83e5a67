"""The table of a page."""

from collections.abc import Sequence

from .page import element


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], below: Sequence[str] = ()) -> str:
    """Renders a table, which scrolls where the page is too narrow for it.

    Args:
        heads: The heads of the columns.
        rows: The texts of the cells; all but the first column are set to the right.
        below: For each row, HTML that stands below it over the whole width.
    """
    lines = [element("tr", *(element("th", text=head) for head in heads))]
    for index, row in enumerate(rows):
        lines.append(element("tr", *(element("td", text=cell) for cell in row)))
        if below:
            lines.append(element("tr", element("td", below[index], colspan=len(heads)), class_="below"))
    return element("div", element("table", *lines), class_="wide")
