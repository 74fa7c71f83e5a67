"""One kit for the pages of this package: self-contained HTML with tables and SVG charts, in light and dark.

    >>> from hf_stepflow.report import PLOT_X, PLOT_Y, Axis, element, frame, page, svg, table
    >>> x, y = Axis.over([0.1, 0.3], *PLOT_X), Axis.over([2.0, 5.0], *PLOT_Y)
    >>> dot = element("circle", cx=x(0.3), cy=y(5.0), r=5, title="0.3 gives 5")
    >>> chart = svg("gain over tau_max", frame(x, y, "tau_max", "gain"), dot)
    >>> text = page("A title", ["model", "seed 0"], [("Results", chart + table(["arm", "gain"], [["a & b", "5"]]))])

`element` escapes its text and its attributes; `table` escapes its cells. Whatever is passed as children, as a body or
as `below` is HTML already. `write_page` writes the page to a file. `scripted_page` renders an interactive page, which
brings its own style and script.
"""

from .chart import PLOT_X, PLOT_Y, Axis, forest, frame, svg
from .page import element, page, table, write_page
from .scripted import scripted_page

__all__ = [
    "PLOT_X",
    "PLOT_Y",
    "Axis",
    "element",
    "forest",
    "frame",
    "page",
    "scripted_page",
    "svg",
    "table",
    "write_page",
]
