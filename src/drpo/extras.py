"""Which extra of drpo has a library, for the message where the library is missing."""

from collections.abc import Mapping

EXTRA: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *(
                "transformers",
                "tokenizers",
                "huggingface_hub",
                "packaging",
                "safetensors",
                "scipy",
                "psutil",
                "pyarrow",
            ),
            *("tyro", "rich", "msgspec", "docstring_parser", "matplotlib", "plotext", "plotly", "jinja2", "markupsafe"),
            "urllib3",
        ),
        "report",
    ),
    **dict.fromkeys(("gguf", "peft", "math_verify", "sympy", "datasets", "httpx2", "bm25s"), "train"),
    "reasoning_gym": "gym",
    "lm_eval": "lm-eval",
    "inspect_ai": "inspect",
    "vllm": "vllm",
}
"""Module -> the smallest extra that installs it."""
WHOLE = "train"
"""The extra that brings all commands; it includes `report`."""


def missing(error: ImportError) -> str | None:
    """Return what to install where an import failed because a library of an extra is not there; else None.

    Args:
        error: of the import.

    Example:
        >>> missing(ModuleNotFoundError("No module named 'rich'", name="rich"))
        "rich is not installed; run pip install 'drpo[train]'"
        >>> missing(ModuleNotFoundError("No module named 'my_rewards'", name="my_rewards")) is None
        True
    """
    library = (error.name or "").partition(".")[0]
    extra = EXTRA.get(library)
    if extra is None or not isinstance(error, ModuleNotFoundError):
        return None
    return f"{library} is not installed; run pip install 'drpo[{WHOLE if extra == 'report' else extra}]'"
