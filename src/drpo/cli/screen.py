"""Answers on the terminal while they are sampled, and each token's probability: a colour there, a number elsewhere."""

import json
import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from rich.color import ColorSystem
from rich.style import Style
from transformers import PreTrainedTokenizerBase

from drpo.errors import printable
from drpo.serving.text import Piece, TextToken
from drpo.terminal import Terminal

COLOURS = ((0.9, ""), (0.5, "green"), (0.1, "yellow"), (0.0, "bold red"))
"""From which probability on a token has which style; a token without a colour was nearly certain."""
CUT = "cut here; --max-new-tokens lets an answer be longer"
LEAST = 3
"""So many of an answer's least probable tokens are listed below it."""


class Screen(Protocol):
    """Shows answers."""

    def waiting(self, text: str) -> AbstractContextManager[object]:
        """Say what is waited for, until the end of the block."""
        ...

    def note(self, text: str) -> None:
        """Say something that no model said."""
        ...

    def title(self, name: str) -> None:
        """Say whose answer follows."""
        ...

    def piece(self, piece: Piece) -> None:
        """Show a part of an answer."""
        ...

    def end(self, pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> None:
        """Show what there is to say of an answer that is over."""
        ...


class Lines:
    """Plain text: an answer ends with a line's end, and its tokens follow with their probabilities, a line each.

    Args:
        probabilities: show them.
    """

    def __init__(self, probabilities: bool) -> None:
        self._probabilities = probabilities

    def waiting(self, text: str) -> AbstractContextManager[object]:
        """Say on standard error what is waited for."""
        return Terminal(stderr=True).status(text)

    def note(self, text: str) -> None:
        """Say it on standard error."""
        print(printable(text), file=sys.stderr)

    def title(self, name: str) -> None:
        """Write the name in brackets."""
        write(f"[{printable(name)}]\n")

    def piece(self, piece: Piece) -> None:
        """Write its text."""
        write(printable(piece.text))

    def end(self, pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> None:
        """End the line, and list the tokens."""
        write("\n")
        if is_cut(pieces):
            self.note(CUT)
        if self._probabilities:
            write("".join(f"{p:.4g}\t{text}\n" for p, text in probabilities(pieces, tokenizer)))


class Colours(Lines):
    """The same on a terminal, where a token's colour says how probable it was."""

    def piece(self, piece: Piece) -> None:
        """Write its tokens, each in the colour of its probability."""
        if not self._probabilities:
            super().piece(piece)
        for token in piece.tokens if self._probabilities else ():
            write(coloured(token))

    def title(self, name: str) -> None:
        """Write the name in bold."""
        write(_styled(f"[{printable(name)}]", "bold") + "\n")

    def end(self, pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> None:
        """End the line, and list the least probable tokens."""
        write((_styled(f" ({CUT})", "dim") if is_cut(pieces) else "") + "\n")
        if self._probabilities:
            least = sorted(probabilities(pieces, tokenizer), key=lambda pair: pair[0])[:LEAST]
            told = ", ".join(f"{text} {p:.3g}" for p, text in least)
            legend = ", ".join(f"{_styled(f'{at:g}', style)}" for at, style in COLOURS if style)
            write(_styled(f"least probable: {told}; colours from ", "dim") + legend + "\n")


def screen_of(probabilities: bool) -> Screen:
    """Return what fits standard output: colours on a terminal that has them (NO_COLOR is respected), else lines."""
    return Colours(probabilities) if Terminal().color_system is not None else Lines(probabilities)


def is_cut(pieces: Sequence[Piece]) -> bool:
    """Whether an answer ended at the limit of tokens."""
    return bool(pieces) and pieces[-1].finish_reason == "length"


def probabilities(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> list[tuple[float, str]]:
    """Return the probability of every sampled token of an answer, and the token as a string of JSON."""
    sampled = [token for piece in pieces for token in piece.sampled]
    texts = (printable(tokenizer.decode([token.id])) for token in sampled)
    return [(math.exp(t.logp), json.dumps(text, ensure_ascii=False)) for t, text in zip(sampled, texts, strict=True)]


def coloured(token: TextToken) -> str:
    """Return a token's text in the colour of its probability."""
    p = math.exp(token.token.logp)
    return _styled(printable(token.text), next(style for least, style in COLOURS if p >= least))


def _styled(text: str, style: str) -> str:
    return Style.parse(style).render(text, color_system=ColorSystem.STANDARD) if style and text else text


def write(text: str) -> None:
    """Write to standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
