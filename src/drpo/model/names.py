"""Names of models, and an early check of them. No torch."""

from pathlib import Path

from drpo.errors import InputError

SMOLLM2 = "smollm2-135m"
"""SmolLM2-135M-Instruct, fetched once through pip."""
TINY = "tiny"
"""A random model of two layers, built in memory."""


def require_there(name: str) -> None:
    """Raise if the name is a path to a missing folder, before asking the hub.

    Args:
        name: as for `drpo.model.loading.load`.

    Raises:
        InputError: the name is a path and there is no such folder.
    """
    is_path = name.startswith(("./", "../", "/", "~", "runs/")) or name.endswith("/") or name.count("/") > 1
    if (is_path or Path(name).is_file()) and not Path(name).is_dir():
        raise InputError(f"model={name!r}: no such folder; give {SMOLLM2!r}, {TINY!r}, a folder or a hub id")
