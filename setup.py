"""The readme that a package index shows: README.md, whose relative links would lead nowhere there."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|mailto:|#)([^)\s]+)\)")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
NOTE = "*Pages that are named here as `docs/...` are in the source distribution.*"


def index_readme(text: str, source: str | None) -> str:
    """Return a readme without relative links: they lead to the source, or without an address are the names of files.

    Args:
        text: Markdown; what is in fences stays as it is.
        source: the address of the project's source, `https://host/owner/name`.
    """

    def absolute(link: re.Match[str]) -> str:
        picture, words, path = link.groups()
        if source is not None:
            return f"{picture}[{words}]({source}/{'raw' if picture else 'blob'}/main/{path})"
        page = path.partition("#")[0]
        if picture:
            return f"*{words}: `{page}`*"
        return words if words == page else f"{words} (`{page}`)"

    parts = FENCED.split(text)
    parts[::2] = [LINK.sub(absolute, part) for part in parts[::2]]
    written = "".join(parts)
    return written if source is not None else written.replace("\n\n", f"\n\n{NOTE}\n\n", 1)


if __name__ == "__main__":
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    setup(
        long_description=index_readme((ROOT / "README.md").read_text(encoding="utf-8"), urls.get("Source")),
        long_description_content_type="text/markdown",
    )
