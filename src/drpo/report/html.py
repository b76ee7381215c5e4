"""One self-contained HTML file: parts from `page/`, data and plotly inside it, and nothing that could reach a network.

Parts are files, in the order given: styles and scripts each become one block, so scripts share their names. Data goes
in as `payload.packed` text. The page's own policy (CSP) lets run these scripts and no other, and refuses every request.
"""

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

from drpo.files import write_text
from drpo.report.palette import COLORS
from drpo.report.payload import json_bytes, packed

FRAME_STYLES = ("frame.css",)
FRAME_SCRIPTS = ("frame.js", "plots.js")
PLOTLY = "plotly"
REPORT = "report.html"
"""Its name in the folder that it is of."""


@dataclass(frozen=True)
class Page:
    """What one kind of page is made of, besides the frame.

    Args:
        title: of the document; any text.
        body: file of its sections.
        styles: files that follow the frame's.
        scripts: files that follow the frame's; the last one starts the page.
        payloads: name -> bytes, for `payload(name)` in a script.
    """

    title: str
    body: str
    styles: Sequence[str]
    scripts: Sequence[str]
    payloads: Mapping[str, bytes]


def render(page: Page) -> str:
    """Return the page as HTML.

    Example:
        >>> text = render(Page("a < b", "run.html", (), (), {"data": b"<script>"}))
        >>> "<title>a &lt; b</title>" in text, text.count("<script>")
        (True, 0)
    """
    plotly = get_plotlyjs()
    script = "\n".join(part(name) for name in (*FRAME_SCRIPTS, *page.scripts))
    payloads = {**page.payloads, "palette": json_bytes(COLORS), PLOTLY: plotly.encode("utf-8")}
    return Template(part("frame.html")).substitute(
        title=html.escape(page.title),
        policy=policy([script, plotly]),
        style="\n".join(part(name) for name in (*FRAME_STYLES, *page.styles)),
        body=part(page.body),
        payloads="\n".join(
            f'<script type="application/gzip" id="payload-{name}">{packed(data)}</script>'
            for name, data in payloads.items()
        ),
        script=inline(script),
    )


def write(page: Page, path: Path) -> Path:
    """Write a page to a file, whole or not at all; return its path."""
    write_text(path, render(page))
    return path


def part(name: str) -> str:
    """Return a file of `page/`."""
    return (resources.files("drpo.report") / "page" / name).read_text(encoding="utf-8")


def policy(scripts: Sequence[str]) -> str:
    """Return the content security policy that lets a page run these scripts, and make no request.

    Example:
        >>> policy(["1"]).split("; ")[:2]
        ["default-src 'none'", "script-src 'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s='"]
    """
    sums = [base64.b64encode(hashlib.sha256(s.encode("utf-8")).digest()).decode("ascii") for s in scripts]
    allowed = " ".join(f"'sha256-{s}'" for s in sums)
    rules = ("default-src 'none'", f"script-src {allowed}", "style-src 'unsafe-inline'", "img-src data: blob:")
    return "; ".join((*rules, "base-uri 'none'", "form-action 'none'"))


def inline(script: str) -> str:
    """Return a script as it may stand in a page.

    Raises:
        ValueError: it holds what would end or change the element around it.

    Example:
        >>> inline("x = '</script>'")
        Traceback (most recent call last):
        ...
        ValueError: a script must not hold '</script'
    """
    found = re.search(r"</script|<script|<!--", script, flags=re.IGNORECASE)
    if found:
        raise ValueError(f"a script must not hold {found[0]!r}")
    return script
