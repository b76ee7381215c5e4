"""The site's own business: folders in the navigation, links that lead out of docs/, and short code on one line.

On a code host those links work as they stand. The site has no such files, so it links to the host where `repo_url` is
configured, and else says the path.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
SHORT_CODE = re.compile(r"<code>(?=[^<]*-)([^<\n]{1,32})</code>")
FENCE = re.compile(r"(^```.*?^```)", flags=re.M | re.S)


def on_config(config: Any) -> Any:
    """Put the files of a folder in the place of `folder/*.md` in the navigation."""
    config["nav"] = expanded(config["nav"], Path(config["docs_dir"]))
    return config


def expanded(nav: Any, docs: Path) -> Any:
    """Return a navigation with every pattern replaced by the files that it matches, by name."""
    if isinstance(nav, dict):
        return {title: expanded(inner, docs) for title, inner in nav.items()}
    if isinstance(nav, list):
        items: list[Any] = []
        for item in nav:
            if isinstance(item, str) and "*" in item:
                items += sorted(p.relative_to(docs).as_posix() for p in docs.glob(item))
            else:
                items.append(expanded(item, docs))
        return items
    return nav


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page, but for those in blocks of code."""
    parts = FENCE.split(markdown)
    return "".join(p if p.startswith("```") else rewritten(p, page.file.src_uri, config["repo_url"]) for p in parts)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Mark short code, such as `--updates`, which a browser would break after a hyphen (site.css)."""
    return SHORT_CODE.sub(r'<code class="short">\1</code>', html)


def rewritten(text: str, source: str, repository: str | None) -> str:
    """Return a text whose links out of docs/ lead to the repository, or say where the file is.

    Args:
        text: Markdown.
        source: the page, as a path in docs/.
        repository: its address, or None.
    """

    def one(match: re.Match[str]) -> str:
        image, words, target, anchor = match.group(1), match.group(2), match.group(3), match.group(4) or ""
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), target))
        if image or ":" in target or path.startswith("docs/"):
            return match.group(0)
        if repository:
            return f"[{words}]({repository.rstrip('/')}/blob/main/{path}{anchor})"
        return words if words.strip("`") == path else f"{words} (`{path}`)"

    return LINK.sub(one, text)
