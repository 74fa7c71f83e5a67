"""Interactive pages: one HTML file with its style, its script and its data inside, which loads nothing."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any


def scripted_page(folder: Path, scripts: Sequence[str], data: Any) -> str:
    """Renders a page whose script and style alone may run, whatever texts its data holds.

    Args:
        folder: The folder with `page.html`, `page.css` and the scripts. The page names $policy, $style, $script and
            $data.
        scripts: The names of the scripts without `.js`, in the order in which they run.
        data: What the script reads, JSON-ready.
    """
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = "".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in scripts)
    policy = f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; base-uri 'none'"
    # JSON without "<" cannot close the script element around it.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = Template((folder / "page.html").read_text(encoding="utf-8"))
    return page.substitute(policy=policy, style=style, script=script, data=text)


def _digest(source: str) -> str:
    """The name of an inline script or style in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
