"""Names of models, and whether one can be right; read without torch and without loading anything."""

from pathlib import Path

from drpo.errors import InputError

SMOLLM2 = "smollm2-135m"
"""SmolLM2-135M-Instruct, fetched once through pip."""
TINY = "tiny"
"""A random model of two layers, made in memory."""


def require_there(name: str) -> None:
    """Raise if the name is a path to a missing folder, before asking the hub.

    Args:
        name: as for `drpo.model.loading.load`.

    Raises:
        InputError: the name is written as a path, and there is no such folder.
    """
    written_so = name.startswith(("./", "../", "/", "~", "runs/")) or name.endswith("/") or name.count("/") > 1
    if (written_so or Path(name).is_file()) and not Path(name).is_dir():
        raise InputError(f"model={name!r}: no such folder; give {SMOLLM2!r}, {TINY!r}, a folder or a hub id")
