"""Answers of OpenAI's API: whole, or as the chunks of a stream."""

import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from drpo.serving.requests import CompletionRequest
from drpo.serving.text import Piece, TextToken

UNLIKELY = -9999.0
"""In place of an infinite log-probability, which JSON has no number for; as OpenAI's API has it."""


@dataclass(frozen=True)
class Response:
    """An answer: the fields that all its chunks share.

    Args:
        request: as it was read.
        tokenizer: names tokens.
        id: of the answer, without the prefix of its kind.
        created: seconds since 1970.
    """

    request: CompletionRequest
    tokenizer: PreTrainedTokenizerBase
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Iterable[tuple[int, Piece]]) -> dict[str, Any]:
        """Return the answer to a request.

        Args:
            pieces: (number of the choice, piece); in order within a choice.
        """
        of_choice: dict[int, list[Piece]] = {}
        for index, piece in pieces:
            of_choice.setdefault(index, []).append(piece)
        choices = [self._choice(index, joined(found)) for index, found in sorted(of_choice.items())]
        if self.request.kind == "chat":
            for choice in choices:
                choice["message"] = {"role": "assistant", "content": choice.pop("text"), "refusal": None}
        sampled = sum(len(piece.sampled) for found in of_choice.values() for piece in found)
        return self._framed("chat.completion", choices) | {"usage": self._usage(sampled)}

    def chunks(self, pieces: Iterable[tuple[int, Piece]]) -> Iterator[dict[str, Any]]:
        """Yield the answer to a request as the chunks of a stream; arguments as for `whole`."""
        begun: set[int] = set()
        sampled = 0
        for index, piece in pieces:
            sampled += len(piece.sampled)
            if not (piece.text or piece.tokens or piece.finish_reason):
                continue  # held back
            choice = self._choice(index, piece)
            if self.request.kind == "chat":
                role = {} if index in begun else {"role": "assistant"}
                choice["delta"] = role | {"content": choice.pop("text")}
            begun.add(index)
            yield self._framed("chat.completion.chunk", [choice]) | self._no_usage()
        if self.request.include_usage:
            yield self._framed("chat.completion.chunk", []) | {"usage": self._usage(sampled)}

    def _no_usage(self) -> dict[str, None]:
        return {"usage": None} if self.request.include_usage else {}

    def _framed(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        id, kind = (
            (f"chatcmpl-{self.id}", kind) if self.request.kind == "chat" else (f"cmpl-{self.id}", "text_completion")
        )
        return {
            "id": id, "object": kind, "created": self.created, "model": self.request.model, "choices": choices,
        }  # fmt: skip

    def _usage(self, sampled: int) -> dict[str, int]:
        """Count the prompts' tokens, each prompt once, and all sampled tokens, ends of turns included."""
        read = sum(map(len, self.request.prompts))
        return {"prompt_tokens": read, "completion_tokens": sampled, "total_tokens": read + sampled}

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs:
            logprobs = self._of_chat(piece) if self.request.kind == "chat" else self._of_text(piece)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _of_chat(self, piece: Piece) -> dict[str, Any]:
        """Return log-probabilities in the form of /v1/chat/completions."""
        content = [
            named(self.tokenizer, t.token.id, t.token.logp)
            | {"top_logprobs": [named(self.tokenizer, i, logp) for i, logp in t.token.top]}
            for t in piece.tokens
        ]
        return {"content": content, "refusal": None}

    def _of_text(self, piece: Piece) -> dict[str, Any]:
        """Return log-probabilities in the form of /v1/completions."""
        return {
            "tokens": [self._name(t.token.id) for t in piece.tokens],
            "token_logprobs": [max(t.token.logp, UNLIKELY) for t in piece.tokens],
            "top_logprobs": [self._top(t) for t in piece.tokens],
            "text_offset": [t.offset for t in piece.tokens],
        }

    def _top(self, token: TextToken) -> Mapping[str, float] | None:
        pairs = [(self._name(i), max(logp, UNLIKELY)) for i, logp in reversed(token.token.top)]
        return dict(pairs) if pairs else None  # of tokens with the same name the most probable one

    def _name(self, token_id: int) -> str:
        return str(self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))


def joined(pieces: list[Piece]) -> Piece:
    """Return the pieces of an answer as one."""
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        tuple(token for piece in pieces for token in piece.sampled),
        pieces[-1].finish_reason,
    )


def named(tokenizer: PreTrainedTokenizerBase, token_id: int, logp: float) -> dict[str, Any]:
    """Return a token with its log-probability, in the form of /v1/chat/completions."""
    data = token_bytes(tokenizer, token_id)
    text = str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
    return {"token": text, "logprob": max(logp, UNLIKELY), "bytes": None if data is None else list(data)}


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes | None:
    r"""Return the bytes of a token; None where they are unknown.

    Args:
        tokenizer: its tokens are letters for bytes (byte-level), or texts and single bytes such as <0xE2>.
        token_id: of the token.

    Example:
        >>> from drpo.model.loading import tiny
        >>> _, tokenizer = tiny()
        >>> [token_bytes(tokenizer, i) for i in tokenizer("\u2264a")["input_ids"]]
        [b'\xe2', b'\x89', b'\xa4', b'a']
    """
    symbol = str(tokenizer.convert_ids_to_tokens(token_id))
    text = str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
    if all(letter in _BYTES for letter in symbol):
        data = bytes(_BYTES[letter] for letter in symbol)
        if data.decode(errors="replace") == text:
            return data
    if single := re.fullmatch(r"<0x([0-9A-F]{2})>", symbol):
        return bytes([int(single[1], 16)])
    return None if "\ufffd" in text else text.encode("utf-8", "replace")


def _byte_letters() -> dict[str, int]:
    """Return the letters that byte-level tokenizers have for bytes: printable Latin ones, and further ones in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    further = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(further)}
    assert letters.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return letters


_BYTES = _byte_letters()
