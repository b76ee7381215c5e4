"""Sampled tokens -> text, in pieces as they become certain, up to a stop text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from drpo.rollout.stream import SampledToken
from drpo.types import FinishReason

_PART = "\ufffd"
"""What the first bytes of a character are decoded to."""


@dataclass(frozen=True)
class TextToken:
    """A sampled token and its part of the text.

    Args:
        token: as sampled.
        offset: characters of the answer before it.
        text: the characters that it completed; "" where it holds only a part of a character.
    """

    token: SampledToken
    offset: int
    text: str = ""


@dataclass(frozen=True)
class Piece:
    """The text that a further token made certain.

    Args:
        text: the next part of the answer; may be empty.
        tokens: whose text begins in that part.
        sampled: all tokens sampled since the previous piece, also those without text (ends of turns).
        finish_reason: of the last piece; else None.
    """

    text: str
    tokens: tuple[TextToken, ...]
    sampled: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None


class TextStream:
    r"""Decodes an answer while it is sampled; the pieces join to the text of the whole answer.

    A character is returned once its bytes are complete. Text that may begin a stop text is held back until it cannot.

    Args:
        tokenizer: decodes, without special tokens.
        stop: texts before which the answer ends.

    Example:
        >>> from drpo.model.loading import tiny
        >>> _, tokenizer = tiny()
        >>> stream = TextStream(tokenizer, stop=("\n\n",))
        >>> ids = tokenizer("3 \u2264 4\n\n5")["input_ids"]
        >>> [stream.add(SampledToken(i, -0.1)).text for i in ids[:5]]
        ['3', ' ', '', '', '\u2264']
        >>> [stream.add(SampledToken(i, -0.1)).text for i in ids[5:8]]
        [' ', '4', '']
        >>> piece = stream.add(SampledToken(ids[8], -0.1))
        >>> piece.text, piece.finish_reason
        ('', 'stop')
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._text = ""  # that is certain
        self._sent = 0  # characters of it
        self._waiting: list[TextToken] = []

    def add(self, token: SampledToken) -> Piece:
        """Return the text that a token made certain; with a finish reason if a stop text is complete."""
        self._ids.append(token.id)
        self._waiting.append(TextToken(token, len(self._text)))
        self._grow(self._decoded().rstrip(_PART))
        found = [at for text in self._stop if (at := self._text.find(text, self._sent)) >= 0]
        if found:
            return self._piece(min(found), (token,), "stop")
        return self._piece(len(self._text) - self._held(), (token,))

    def end(self, finish_reason: FinishReason) -> Piece:
        """Return the rest, after the last token."""
        self._grow(self._decoded())
        return self._piece(len(self._text), (), finish_reason)

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _grow(self, text: str) -> None:
        """Add the text that is certain now; the new part belongs to the last token."""
        last = self._waiting[-1] if self._waiting else None
        if last is not None:
            self._waiting[-1] = replace(last, text=last.text + text[len(self._text) :])
        self._text = text

    def _held(self) -> int:
        """Return how many characters at the end may begin a stop text."""
        most = max(map(len, self._stop), default=1) - 1
        lengths = range(min(most, len(self._text) - self._sent), 0, -1)
        return next((n for n in lengths if any(s.startswith(self._text[-n:]) for s in self._stop)), 0)

    def _piece(self, end: int, sampled: tuple[SampledToken, ...], finish_reason: FinishReason | None = None) -> Piece:
        text = self._text[self._sent : end]
        tokens = tuple(t for t in self._waiting if t.offset < end)
        self._waiting = [t for t in self._waiting if t.offset >= end]
        self._sent = end
        return Piece(text, tokens, sampled, finish_reason)
