"""How many tokens a text has at least, from its bytes, so that one that cannot fit is not tokenised first."""

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_LOSSLESS = frozenset({"ByteLevel", "Split", "Digits", "Metaspace", "NFC", "Replace", "Prepend", "Sequence"})
"""Normalizers and pre-tokenizers behind which no character is lost."""
SHORT = 50_000
"""Letters of a text that is tokenised so quickly that its tokens are better counted; it has no bound here."""
_SAFETY = 2
"""Divides the bound: what a normaliser joins at the borders of special tokens is far less."""


def least_tokens(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> int:
    """Return a number of tokens that a text has at least, where that is more than `most`; else 0.

    It is bytes / (2 b), where b is the number of bytes of the longest token: each token of a vocabulary of bytes stands
    for at most b of those that it spells. Other tokenizers may have one token for a text of any length, and return 0.

    Args:
        tokenizer: the model's.
        text: with its chat template.
        most: tokens that are allowed.

    Example:
        >>> from drpo.model.loading import tiny
        >>> least_tokens(tiny()[1], "a" * 10**6, 99_999), least_tokens(tiny()[1], "a" * 10**6, 100_000)
        (100000, 0)
    """
    if len(text) <= SHORT or (spelled := _spelled(tokenizer)) is None:
        return 0
    normalizer = tokenizer.backend_tokenizer.normalizer
    normal = text if normalizer is None else normalizer.normalize_str(text)
    least = len(normal.encode("utf-8", "replace").translate(None, spelled.lost)) // (_SAFETY * spelled.longest)
    return least if least > most else 0


class _Spelled(NamedTuple):
    """How a vocabulary spells texts.

    Args:
        longest: bytes of its longest token.
        lost: bytes that it has no token for, which it drops.
    """

    longest: int
    lost: bytes


@lru_cache(maxsize=4)
def _spelled(tokenizer: PreTrainedTokenizerBase) -> _Spelled | None:
    """Return it; None where a token may stand for any number of bytes, as one for the unknown."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    spec: dict[str, Any] = json.loads(backend.to_str())
    model, added = spec["model"], spec["added_tokens"]
    parts = [*_parts(spec["normalizer"]), *_parts(spec["pre_tokenizer"])]
    kinds = {part["type"] for part in parts}
    if model["type"] != "BPE" or not kinds <= _LOSSLESS or any(t["lstrip"] or t["rstrip"] for t in added):
        return None
    if any(part.get("behavior") == "Removed" for part in parts):
        return None
    vocabulary, others = model["vocab"], [len(t["content"].encode()) for t in added]
    if "ByteLevel" in kinds:  # each letter of a token is a byte
        lost = bytes(byte for byte, letter in bytes_to_unicode().items() if letter not in vocabulary)
        return None if model["unk_token"] else _Spelled(max(*map(len, vocabulary), *others), lost)
    if not (model["byte_fallback"] and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))):
        return None
    return _Spelled(max(*(len(token.encode()) for token in vocabulary), *others), b"")


def _parts(spec: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer, and what it is made of."""
    if spec is not None:
        yield spec
        for part in [*spec.get("normalizers", ()), *spec.get("pretokenizers", ())]:
            yield from _parts(part)
