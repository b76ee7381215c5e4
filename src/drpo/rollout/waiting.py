"""Which of the rows to be sampled are read together, and when."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from drpo.rollout.cache import KeptPrompt
from drpo.rollout.turn_cache import Continued

JOIN_SHARE = 0.5
"""Rows join a batch of which at most this share is left; estimates how many are worth a copy of the cache."""


class Waiting:
    """Parts of rows that wait for their turn; each part is read as a whole.

    At most `max_rows` rows are sampled together. What is taken when depends on the rows that are left, never on time,
    so the same requests make the same batches.

    Args:
        queues: parts, as the numbers of their rows; those of a queue have the same number of rows, at most `max_rows`.
            Parts of two queues are not read together, though they may be sampled together.
        max_rows: see above.

    Example:
        >>> waiting = Waiting([[[0], [1]], [[2, 3], [4, 5], [6, 7]]], max_rows=4)
        >>> waiting.take(), waiting.take(3, 9), waiting.take(2, 1), waiting.take(2, 9), waiting.take(), waiting.take()
        ([[0], [1]], [], [], [[2, 3]], [[4, 5], [6, 7]], [])
    """

    def __init__(self, queues: Iterable[Sequence[Sequence[int]]], max_rows: int) -> None:
        self._queues = [list(queue) for queue in queues if queue]
        self._max_rows = max_rows

    def __len__(self) -> int:
        """Return how many parts wait."""
        return sum(map(len, self._queues))

    def take(self, n_left: int = 0, n_joining: int | None = None) -> list[Sequence[int]]:
        """Return the parts that are read now.

        Args:
            n_left: rows of the batch that they join, 0 for a new one.
            n_joining: if more rows than these would join it, none do: few at a time would keep the batch from ending,
                and a full one from beginning. None is without a bound.
        """
        if not self._queues or n_left > JOIN_SHARE * self._max_rows:
            return []
        queue, room = self._queues[0], self._max_rows - n_left
        n = min(room // len(queue[0]), len(queue))
        if n_joining is not None and n * len(queue[0]) > n_joining:
            return []
        taken, queue[:n] = queue[:n], []
        self._queues = [queue for queue in self._queues if queue]
        return taken


def by_prompt(prompts: Mapping[int, Tensor], max_rows: int) -> list[list[int]]:
    """Return the rows in parts of one prompt, all of the same size, the shortest prompt first.

    The size divides the rows of every run of equal prompts: where these numbers have no common divisor, a prompt is
    read once for each of its rows.

    Args:
        prompts: of each row, by number, [P] int64; adjacent equal ones stand in the same parts.
        max_rows: upper bound of rows in a part.

    Example:
        >>> a, b = torch.tensor([1, 2]), torch.tensor([3])
        >>> by_prompt({0: a, 1: a, 2: b, 5: b}, 4), by_prompt({0: a, 1: a, 2: b, 3: a}, 4)
        ([[2, 5], [0, 1]], [[2], [0], [1], [3]])
    """
    runs: list[list[int]] = []
    for i, prompt in prompts.items():
        if runs and (prompt is (last := prompts[runs[-1][0]]) or torch.equal(prompt, last)):
            runs[-1].append(i)
        else:
            runs.append([i])
    common = math.gcd(*map(len, runs))
    size = next((n for n in range(min(common, max_rows), 0, -1) if common % n == 0), 1)
    parts = [run[start : start + size] for run in runs for start in range(0, len(run), size)]
    return sorted(parts, key=lambda part: len(prompts[part[0]]))


def by_kept_prompt(rows: Mapping[int, Continued]) -> list[list[int]]:
    """Return rows that continue kept ones, one by one, the shortest prompt first and those of a prompt adjacent.

    Args:
        rows: by number.
    """
    rows_of: dict[KeptPrompt, list[int]] = {}
    for i, continued in rows.items():
        rows_of.setdefault(continued.row.prompt, []).append(i)
    return [[i] for prompt in sorted(rows_of, key=lambda p: p.length) for i in rows_of[prompt]]
