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
        self._steps: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        """Note what was just read once for all rows; each of them reads on from there."""
        if self._recorder is not None:
            self._before = self._recorder.take(1)[0].cpu()

    def read(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Note what these rows just read, left-padded: so many tokens of each."""
        if self._recorder is not None:
            table = self._recorder.take(len(rows)).cpu()
            for choices, row, n in zip(table, rows, lengths, strict=True):
                own = choices[len(choices) - n :]
                self._read[row] = own if self._before is None else torch.cat([self._before, own])

    def repeat(self, samples: int) -> None:
        """Let so many rows take the place of each."""
        self._read = [choices for choices in self._read for _ in range(samples)]

    def step(self, rows: Tensor) -> None:
        """Note the token that these rows just read."""
        if self._recorder is not None:
            self._steps.append((rows, self._recorder.take(len(rows))[:, 0]))

    def routes(self, prompts: Sequence[Tensor], lengths: Sequence[int]) -> list[Routes | None]:
        """Return the choices of every row; what of its prompt it did not read itself has none.

        Args:
            prompts: of each row, [P].
            lengths: sampled tokens of each row, of which the last was not read.
        """
        if self._recorder is None:
            return [None] * len(prompts)
        whole: dict[int, Tensor] = {}
        steps = self._sampled(max(lengths))
        found: list[Routes | None] = []
        for row, (prompt, n, read) in enumerate(zip(prompts, lengths, self._read, strict=True)):
            assert read is not None
            if id(read) not in whole:
                whole[id(read)] = torch.cat([none_chosen(len(prompt) - len(read), read), read])
            sampled = none_chosen(n, read)
            sampled[:-1] = steps[row, : n - 1]
            found.append(Routes(whole[id(read)], sampled))
        return found

    def _sampled(self, longest: int) -> Tensor:
        """Return what was chosen for each row's sampled tokens, [rows, longest, L, k]."""
        like = next(x for x in self._read if x is not None)
        table = like.new_zeros(len(self._read), longest, *like.shape[1:])
        for t, (rows, choices) in enumerate(self._steps[:longest]):
            table[rows.cpu(), t] = choices.cpu()
        return table


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
