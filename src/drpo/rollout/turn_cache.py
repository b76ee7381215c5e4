"""What was computed of rows that will probably go on: their keys and values, by the generation that they end with."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from drpo.rollout.cache import GroupCache, KeptPrompt, KeptRow
from drpo.types import Generation, Request


@dataclass(frozen=True, eq=False)
class Continued:
    """A request whose prompt begins with a kept row.

    Args:
        row: the kept row.
        tokens: [T] int64, T >= 1; the rest of the prompt.
    """

    row: KeptRow
    tokens: Tensor


class TurnCache:
    """Keeps the rows of one round of turns for the next round.

    A row's keys and values go when its generation does, or when they are taken. The rows kept in one round, and each of
    their prompts once, have at most `max_bytes`:

        (sum over prompts of P + sum over rows of S) * sum over layers of K (D + E) * bytes of a number

    for prompts of P tokens, S further tokens of a row, K key-value heads, keys of D and values of E numbers. What does
    not fit is not kept, and read anew.

    Args:
        max_bytes: see above.
    """

    def __init__(self, max_bytes: int) -> None:
        self._rows: WeakKeyDictionary[Generation, tuple[Tensor, KeptRow]] = WeakKeyDictionary()
        self._prompts: WeakSet[KeptPrompt] = WeakSet()
        self._bytes_left = max_bytes

    def put(self, generation: Generation, request: Request, cache: GroupCache, row: int) -> None:
        """Keep a row of a cache up to the end of its generation, unless it does not fit."""
        prompt, n_sampled = cache.kept_prompt(row), len(generation.token_ids)
        n_tokens = cache.n_own(row, n_sampled) + (0 if prompt in self._prompts else prompt.length)
        if n_tokens * cache.token_bytes > self._bytes_left:
            return
        self._bytes_left -= n_tokens * cache.token_bytes
        self._prompts.add(prompt)
        ids = torch.cat([request.prompt_ids, generation.token_ids])
        self._rows[generation] = ids, cache.kept_row(row, n_sampled)

    def take(self, request: Request) -> Continued | None:
        """Return what a request continues, once; None if that is not kept, or not what its prompt begins with."""
        if request.after is None or (kept := self._rows.pop(request.after, None)) is None:
            return None
        (ids, row), n_read = kept, len(kept[0]) - 1  # the last token was sampled, but not read
        if not torch.equal(request.prompt_ids[: n_read + 1], ids):
            return None
        return Continued(row, request.prompt_ids[n_read:])

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)
