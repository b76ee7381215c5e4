"""The experts that a sampler's routers choose, gathered row by row while rows are read and sampled."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from drpo.model.routing import RouteRecorder
from drpo.types import Generation, Routes
from drpo.types.routes import known, none_chosen


class ReadRoutes:
    """What was chosen for the tokens that rows read before they are sampled, and for each token since.

    Args:
        recorder: listens to the model; None gathers nothing.
        n: the number of rows.
    """

    def __init__(self, recorder: RouteRecorder | None, n: int) -> None:
        self._recorder = recorder
        self._before: Tensor | None = None
        self._read: list[Tensor | None] = [None] * n
        self._sampled: list[list[Tensor]] = [[] for _ in range(n)]  # of each row, [T, L, k] that follow one another
        self._steps: list[Tensor] = []  # since then, [rows, 1, L, k]

    def begin(self) -> None:
        """Note what was just read once for all rows; each of them reads on from there."""
        if self._recorder is not None:
            self._before = self._recorder.take(1)[0].cpu()

    @torch.inference_mode(mode=False)
    def read(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Note what these rows just read, left-padded: so many tokens of each."""
        if self._recorder is not None:
            table = self._recorder.take(len(rows)).cpu()
            for choices, row, n in zip(table, rows, lengths, strict=True):
                own = choices[len(choices) - n :]
                self._read[row] = torch.cat([own] if self._before is None else [self._before, own])

    def repeat(self, samples: int) -> None:
        """Let so many rows take the place of each."""
        self._read = [choices for choices in self._read for _ in range(samples)]
        self._sampled = [[] for _ in self._read]

    def step(self) -> None:
        """Note the token that every row just read."""
        if self._recorder is not None:
            self._steps.append(self._recorder.take(len(self._read)))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        if self._recorder is not None:
            self._settle()
            numbers = rows.tolist()
            self._read, self._sampled = [self._read[i] for i in numbers], [self._sampled[i] for i in numbers]

    def join(self, other: "ReadRoutes") -> None:
        """Add the rows of another after these."""
        if self._recorder is not None:
            self._settle()
            self._read, self._sampled = self._read + other._read, self._sampled + other._sampled

    def routes(self, row: int, prompt: Tensor, n: int) -> Routes | None:
        """Return the choices of a row; what of its prompt it did not read itself has none.

        Args:
            row: its number among the rows.
            prompt: [P], of the row.
            n: its sampled tokens, of which the last was not read.
        """
        if self._recorder is None:
            return None
        self._settle()
        read = self._read[row]
        assert read is not None
        sampled = none_chosen(n, read)
        if n > 1:
            sampled[:-1] = torch.cat(self._sampled[row])[: n - 1]
        n_lacking = len(prompt) - len(read)
        return Routes(torch.cat([none_chosen(n_lacking, read), read]) if n_lacking else read, sampled)

    def _settle(self) -> None:
        """Note the steps since the last call with their rows."""
        if self._steps:
            for sampled, choices in zip(self._sampled, torch.cat(self._steps, dim=1).cpu(), strict=True):
                sampled.append(choices)
            self._steps = []


def with_shared_prompts(generations: Sequence[Generation]) -> list[Generation]:
    """Return generations whose equal choices for a prompt are one tensor, where an engine reports them by sample."""
    first: dict[bytes, Tensor] = {}
    shared = []
    for g in generations:
        if (routes := g.routes) is not None:
            prompt = first.setdefault(routes.prompt.numpy().tobytes(), routes.prompt)
            shared.append(replace(g, routes=Routes(prompt, routes.tokens)))
        else:
            shared.append(g)
    return shared


def joined(prompt_length: int, pieces: Sequence[Generation | Tensor]) -> Routes | None:
    """Return the choices of a sequence of several turns: of each token those that were made first.

    The tokens between two turns, and the last of each turn, are read when the next turn begins.

    Args:
        prompt_length: P of the first turn.
        pieces: turns, and the tokens between them; the last is a turn.
    """
    turns = [piece for piece in pieces if isinstance(piece, Generation)]
    given = [turn.routes for turn in turns if turn.routes is not None]
    if len(given) < len(turns):
        return None
    lengths = [len(piece.token_ids) if isinstance(piece, Generation) else len(piece) for piece in pieces]
    tokens = none_chosen(sum(lengths), given[0].tokens)
    end = 0
    for piece, n in zip(pieces, lengths, strict=True):
        if isinstance(piece, Generation) and piece.routes is not None:
            before, read = tokens[:end], piece.routes.prompt[prompt_length:]
            lacking = ~known(before)
            before[lacking] = read[lacking]
            tokens[end : end + n] = piece.routes.tokens
        end += n
    return Routes(given[0].prompt, tokens)
