"""How many tokens a text has at least, from its bytes, so that one that cannot fit is not tokenised first."""

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

_LOSSLESS = frozenset({"ByteLevel", "Split", "Digits", "Metaspace", "NFC", "Replace", "Prepend", "Sequence"})
"""Normalizers and pre-tokenizers behind which no character is lost."""
_SAFETY = 2
"""Divides the bound: what a normaliser joins at the borders of special tokens is far less."""


def least_tokens(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> int:
    """Return a number of tokens that a text has at least, where it has more than `most`; 0 where it may have as few.

    It is bytes / (2 b), where b is the number of bytes of the longest token: each token of a vocabulary that spells
    every byte stands for at most b. Tokenizers that lose or replace characters have no such bound, and return 0.

    Args:
        tokenizer: the model's.
        text: with its chat template.
        most: tokens that are allowed.

    Example:
        >>> from drpo.model.loading import tiny
        >>> least_tokens(tiny()[1], "a" * 1000, 99), least_tokens(tiny()[1], "a" * 1000, 100)
        (100, 0)
    """
    if len(text) * 4 <= most:  # a character has at most 4 bytes, and a token at least one
        return 0
    longest = _longest_token(tokenizer)
    if longest is None:
        return 0
    normalizer = tokenizer.backend_tokenizer.normalizer
    normal = text if normalizer is None else normalizer.normalize_str(text)
    least = len(normal.encode("utf-8", "replace")) // (_SAFETY * longest)
    return least if least > most else 0


@lru_cache(maxsize=4)
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The bytes of the longest token; None where a token may stand for any number of bytes, as one for the unknown."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    spec: dict[str, Any] = json.loads(backend.to_str())
    model, added = spec["model"], spec["added_tokens"]
    parts = [*_parts(spec["normalizer"]), *_parts(spec["pre_tokenizer"])]
    letters = {part["type"] for part in parts}
    if model["type"] != "BPE" or not letters <= _LOSSLESS or any(t["lstrip"] or t["rstrip"] for t in added):
        return None
    if any(part.get("behavior") == "Removed" for part in parts):
        return None
    in_bytes = [f"<0x{i:02X}>" for i in range(256)] if model["byte_fallback"] else ByteLevel.alphabet()
    if not (model["byte_fallback"] or "ByteLevel" in letters) or not set(in_bytes) <= model["vocab"].keys():
        return None
    return max(len(token.encode()) for token in [*model["vocab"], *(t["content"] for t in added)])


def _parts(spec: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer, and what it is made of."""
    if spec is not None:
        yield spec
        for part in [*spec.get("normalizers", ()), *spec.get("pretokenizers", ())]:
            yield from _parts(part)
