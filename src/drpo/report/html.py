"""One self-contained HTML file: `page/page.html`, its figures and data, plotly.js; nothing reaches a network.

Jinja escapes every text. Data goes in as `payload.packed` text. The page's own policy (CSP) lets these scripts run and
no other, and refuses every request.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from itertools import chain
from pathlib import Path

import jinja2
from markupsafe import Markup

from drpo.files import replacing
from drpo.report.figures import Plot, plain, plotly, template
from drpo.report.payload import json_bytes, packed
from drpo.terminal import Sheet

REPORT = "report.html"
"""Its name in the folder that it is of."""
SCRIPTS = ("payload.js", "figures.js")


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        id: of its element.
        name: in the page's list of sections.
        title: above it.
        text: how to read it.
        plots: its figures.
        tables: of numbers.
        texts: tables of text; all but the first are folded.
        missing: is said where there are no figures.
        include: file of `page/` with what else there is.
    """

    id: str
    name: str
    title: str
    text: str
    plots: Sequence[Plot] = ()
    tables: Sequence[Sheet] = ()
    texts: Sequence[Sheet] = ()
    missing: str = ""
    include: str = ""


@dataclass(frozen=True)
class Page:
    """What a page is made of.

    Args:
        kind: of report.
        title: of the page.
        caution: what is to be minded; may be empty.
        result: what came of it, in a few words: a heading and a figure.
        lines: below the result.
        summary: pairs of a name and a value.
        sections: in order.
        scripts: files of `page/` that run before the figures are drawn.
        payloads: name -> bytes, for `payload(name)` in a script.
    """

    kind: str
    title: str
    caution: str
    result: tuple[str, str]
    lines: Sequence[str]
    summary: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    scripts: Sequence[str] = ()
    payloads: Mapping[str, bytes] = field(default_factory=dict)


def pieces(page: Page) -> Iterator[str]:
    """Yield the page as HTML, piece by piece; each payload is packed when its turn comes.

    Example:
        >>> text = "".join(pieces(Page("x", "a < b", "", ("", ""), [], [], [], payloads={"data": b"<script>"})))
        >>> "<title>a &lt; b</title>" in text, text.count("<script>")
        (True, 0)
    """
    library, packed_library = plotly_js()
    names = (SCRIPTS[0], *page.scripts, *SCRIPTS[1:])
    script = "\n".join(part(name) for name in names)
    plots = [plot for section in page.sections for plot in section.plots]
    figures = {plot.id: plain(plot.figure.to_plotly_json()) for plot in plots}
    data = {**page.payloads, "figures": json_bytes({"template": template(), "figures": figures})}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("drpo.report", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").generate(
        page=page,
        policy=policy([script, library]),
        style=Markup(part("style.css")),
        script=Markup(inline(script)),
        payloads=chain(((name, packed(column)) for name, column in data.items()), [("plotly", packed_library)]),
    )


@cache
def plotly_js() -> tuple[str, str]:
    """Return plotly's library, and the same packed."""
    library: str = plotly.offline.get_plotlyjs()
    return library, packed(library.encode())


def write(page: Page, path: Path) -> Path:
    """Write a page to a file, whole or not at all; return its path."""
    with replacing(path) as file:
        for piece in pieces(page):
            file.write(piece.encode("utf-8", "replace"))  # half a surrogate pair, as a name may have
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
    match = re.search(r"</script|<script|<!--", script, flags=re.IGNORECASE)
    if match:
        raise ValueError(f"a script must not hold {match[0]!r}")
    return script
