"""The Python of a framework's page, run where the framework is."""

import re
from pathlib import Path
from typing import Any

PAGES = Path(__file__).resolve().parents[2] / "docs" / "frameworks"


def run_page(name: str) -> dict[str, Any]:
    """Run the Python blocks of docs/frameworks/NAME.md, in order, as one program, and return what they define."""
    blocks = re.findall(r"^```python\n(.*?)^```", (PAGES / f"{name}.md").read_text(), flags=re.M | re.S)
    assert blocks, f"{name}.md has no Python"
    names: dict[str, Any] = {"__name__": "example"}
    for i, block in enumerate(blocks):
        exec(compile(block, f"{name}.md:{i}", "exec"), names)
    return names
