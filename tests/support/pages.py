"""What tests read of a report: its payloads, its figures, and its columns of tokens."""

import base64
import gzip
import json
import re
from typing import Any

import numpy as np
import plotly.graph_objects
from numpy.typing import NDArray

from drpo.report.figures import Plot


def unpacked(text: str) -> bytes:
    """What `payload.packed` packed."""
    return gzip.decompress(base64.b64decode(text))


def payload(page: str, name: str) -> bytes:
    """One of a page's payloads."""
    found = re.search(rf'<script type="application/gzip" id="payload-{name}">([^<]*)</script>', page)
    assert found
    return unpacked(found[1])


def figures(page: str) -> dict[str, Any]:
    """The figures of a page by name; plotly refuses one that has a field it does not know."""
    found: dict[str, Any] = json.loads(payload(page, "figures"))["figures"]
    for figure in found.values():
        plotly.graph_objects.Figure(figure)
    return found


def traces(plot: Plot, name: str) -> list[Any]:
    """The traces of a figure that have a name."""
    return [trace for trace in plot.figure.data if trace.name == name]


def read_column(planes: bytes) -> NDArray[np.uint32]:
    """What `payload.column_bytes` wrote."""
    return np.frombuffer(planes, dtype=np.uint8).reshape(4, -1).T.copy().view("<u4").reshape(-1)
