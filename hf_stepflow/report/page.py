"""The page: one HTML file with the style inside, which loads nothing; its elements and its tables."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from hf_stepflow.runtime.errors import StepFlowFileError

STYLE = """:root { --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --paper: #ffffff; --good: #1a7f37; --bad: #c62828;
        --mark: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --line: #3d444d; --paper: #0d1117; --good: #3fb950; --bad: #ff7b72;
          --mark: #58a6ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem;
       margin: 2rem auto; padding: 0 1rem; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.lead { font-size: 1.25rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { white-space: nowrap; text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
tr:has(+ tr.below) td { border-bottom: none; padding-bottom: 0; }
tr.below td { text-align: left; white-space: normal; overflow-wrap: anywhere; color: var(--soft); font-size: 13px;
              padding-top: .1rem; } tr.below b { color: var(--bad); font-weight: 600; }
details { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem; margin: .5rem 0; }
summary { cursor: pointer; } .wide { overflow-x: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; margin: .3rem 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
svg { display: block; max-width: 100%; height: auto; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; } svg .small { font-size: 11px; }
svg .strong { font-weight: 600; } svg .soft { fill: var(--soft); } svg .grid { stroke: var(--line); }
svg .zero { stroke: var(--soft); stroke-dasharray: 4 3; } svg .bar { stroke: var(--mark); stroke-width: 2; }
svg circle, svg .mark { fill: var(--mark); } svg .pale { fill: var(--line); }
svg .good { fill: var(--good); } svg .bad { fill: var(--bad); }
svg .ring { fill: none; stroke: var(--ink); stroke-width: 2; }
svg .dashed { fill: none; stroke: var(--soft); stroke-dasharray: 5 3; }
svg .knot { fill: var(--paper); stroke: var(--soft); }
@media (max-width: 45rem) {
  .pair { grid-template-columns: 1fr; } th, td { padding: .3rem; font-size: 13px; white-space: normal; }
  svg.chart text { font-size: 16px; } .wide svg { max-width: none; } }
"""

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
$style</style></head><body>
<h1>$title</h1>
<p class="soft">$facts</p>
$lead
$sections
</body></html>
""")


def page(title: str, facts: Sequence[object], sections: Sequence[tuple[str, str]], lead: str = "") -> str:
    """Renders a page.

    The style has the text classes `soft`, `good`, `bad`, `lead` and `pair` (two columns), and for marks of a chart
    `good`, `bad`, `pale`, `mark`, `ring`, `dashed` and `knot`.

    Args:
        title: The title, also the first heading.
        facts: What was run, as one soft line below the title.
        sections: The heading and the HTML of each section.
        lead: HTML above the sections.
    """
    return _PAGE.substitute(
        title=escape(title),
        style=STYLE,
        facts=escape(" · ".join(map(str, facts))),
        lead=lead,
        sections="\n".join(f"<h2>{escape(heading)}</h2>\n{body}" for heading, body in sections),
    )


def write_page(path: str | Path, text: str) -> None:
    """Writes a page to a file.

    Raises:
        StepFlowFileError: The path cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise StepFlowFileError(
            f"{str(path)!r} cannot be written: {error}", hint="give a file in a folder that exists"
        ) from error


def element(name: str, *children: str, text: object = "", title: str = "", **attributes: object) -> str:
    """Renders one element of HTML or SVG.

    Args:
        name: The name of its tag.
        *children: HTML that stands inside.
        text: Text that stands inside, before the children; escaped.
        title: A tooltip of an SVG element; escaped.
        **attributes: Attributes, escaped: `class_` for `class`, `text_anchor` for `text-anchor`; floats are rounded
            to one decimal.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{f"{value:.1f}" if isinstance(value, float) else escape(str(value))}"'
        for key, value in attributes.items()
    )
    tooltip = f"<title>{escape(title)}</title>" if title else ""
    return f"<{name}{pairs}>{tooltip}{escape(str(text))}{''.join(children)}</{name}>"


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
