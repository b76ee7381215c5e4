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
        offset: characters of the answer before it; never less than that of the token before.
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
        tokens: whose text begins in that part; those that have none, such as special tokens, are left out.
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
        self._whole = ""  # with the first bytes of a character
        self._sent = 0  # characters of it
        self._waiting: list[TextToken] = []
        self._offset = 0  # of the last token that was returned

    def add(self, token: SampledToken) -> Piece:
        """Return the text that a token made certain; with a finish reason if a stop text is complete."""
        self._ids.append(token.id)
        whole = self._decoded()
        self._waiting.append(TextToken(token, self._begin(token, whole)))
        self._whole = whole
        self._grow(whole.rstrip(_PART))
        found = [at for text in self._stop if (at := self._text.find(text, self._sent)) >= 0]
        if found:
            return self._piece(min(found), (token,), "stop")
        return self._piece(len(self._text) - self._held(), (token,))

    def end(self, finish_reason: FinishReason) -> Piece:
        """Return the rest, after the last token."""
        self._grow(self._decoded())
        return self._piece(len(self._text), (), finish_reason)

    def _decoded(self, ids: Sequence[int] | None = None) -> str:
        ids = self._ids if ids is None else ids
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _begin(self, token: SampledToken, whole: str) -> int:
        """Return where the text of a further token begins: behind the others, or with bytes that it goes on from."""
        goes_on = self._whole.endswith(_PART) and not (
            whole.startswith(self._whole) and (len(whole) > len(self._whole) or not self._decoded([token.id]))
        )
        if not goes_on:
            return len(self._whole)
        return max([len(self._text), *(waiting.offset for waiting in self._waiting[-1:])])

    def _grow(self, text: str) -> None:
        """Add the text that is certain now: a token has it up to the next offset, of one offset the last token."""
        end = len(text)
        for i in range(len(self._waiting) - 1, -1, -1):
            waiting = self._waiting[i]
            begin = max(waiting.offset, len(self._text))
            if begin < end:
                self._waiting[i] = replace(waiting, text=waiting.text + text[begin:end])
                end = begin
        if self._waiting and end > len(self._text):  # of bytes at the end of a token that was returned already
            self._waiting[0] = replace(self._waiting[0], text=text[len(self._text) : end] + self._waiting[0].text)
        self._text = text

    def _held(self) -> int:
        """Return how many characters at the end may begin a stop text."""
        most = max(map(len, self._stop), default=1) - 1
        lengths = range(min(most, len(self._text) - self._sent), 0, -1)
        return next((n for n in lengths if any(s.startswith(self._text[-n:]) for s in self._stop)), 0)

    def _piece(self, end: int, sampled: tuple[SampledToken, ...], finish_reason: FinishReason | None = None) -> Piece:
        text = self._text[self._sent : end]
        tokens = [t for t in self._waiting if t.offset < end and (t.text or self._decoded([t.token.id]))]
        self._waiting = [t for t in self._waiting if t.offset >= end]
        for i, token in enumerate(tokens):  # of bytes that are no characters the text may become shorter
            self._offset = max(self._offset, token.offset)
            tokens[i] = replace(token, offset=self._offset)
        self._sent = end
        return Piece(text, tuple(tokens), sampled, finish_reason)
