"""Lets the site's reader of docstrings see our examples as examples: it knows the heading "Examples:" alone."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the heading."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of each object as it is read."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
