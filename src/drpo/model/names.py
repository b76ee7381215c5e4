"""Names of models, and an early check of them. No torch."""

from pathlib import Path

from drpo.errors import InputError, nearest
from drpo.lazily import lazily

hub = lazily("huggingface_hub")

SMOLLM2 = "smollm2-135m"
"""SmolLM2-135M-Instruct, fetched once through pip."""
TINY = "tiny"
"""A random model of two layers, built in memory."""


def require_there(name: str) -> None:
    """Raise if the name cannot be a model's, before asking the hub, which takes a minute to fail without a network.

    Args:
        name: as for `drpo.model.loading.load`. A hub id without an owner, such as gpt2, must be in the hub's cache.

    Raises:
        InputError: a path without a folder; or neither a known name nor a folder nor a hub id.
    """
    is_path = name.startswith(("./", "../", "/", "~", "runs/")) or name.endswith("/") or name.count("/") > 1
    if (is_path or Path(name).is_file()) and not Path(name).is_dir():
        raise InputError(f"model={name!r}: no such folder; give {SMOLLM2!r}, {TINY!r}, a folder or a hub id")
    is_known = name in (SMOLLM2, TINY) or "/" in name or ":" in name or Path(name).is_dir()
    if not is_known and not Path(hub.constants.HF_HUB_CACHE, f"models--{name}").is_dir():
        raise InputError(f"model={name!r}: no folder, and no hub id, owner/name{nearest(name, (SMOLLM2, TINY))}")
