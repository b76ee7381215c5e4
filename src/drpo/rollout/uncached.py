"""Decoding without a cache, for models whose state between two tokens transformers' cache does not keep."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drpo.rollout.routes import ReadRoutes

POSITIONS = 16_384
"""Upper bound of positions, padding included, in one forward pass; bounds its memory."""


class UncachedDecoder:
    """Reads every row anew for every token: exact for any causal LM, at a cost that grows with the length squared.

    Args:
        model: any causal LM.
        prompts: each [P] int64.
        samples: how many adjacent rows continue each prompt.
    """

    full = False

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Tensor], samples: int) -> None:
        rows = [prompt for prompt in prompts for _ in range(samples)]
        self.model = model
        self.routes = ReadRoutes(None, len(rows))
        self.ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        self.length = torch.tensor([len(row) for row in rows], device=model.device)
        self.logits = self._read()

    def step(self, token: Tensor) -> Tensor:
        """Append token [B] and return the logits [B, V] of the next."""
        width = int(self.length.max()) + 1
        self.ids = nn.functional.pad(self.ids, (0, width - self.ids.shape[1]))
        self.ids = self.ids.scatter(1, self.length[:, None], token[:, None])
        self.length = self.length + 1
        return self._read()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (ascending) alone."""
        self.ids, self.length = self.ids[rows], self.length[rows]

    def _read(self) -> Tensor:
        """Return the logits [B, V] after each row."""
        at_once = max(1, POSITIONS // self.ids.shape[1])
        parts = zip(self.ids.split(at_once), self.length.split(at_once), strict=True)
        return torch.cat([self._last_logits(ids, length - 1) for ids, length in parts])

    def _last_logits(self, ids: Tensor, last: Tensor) -> Tensor:
        """Return the logits [B, V] at position `last` [B] of right-padded rows [B, L]."""
        wanted, which = last.unique(return_inverse=True)
        logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=wanted).logits
        # Not every model can leave logits out.
        at = which if logits.shape[1] == len(wanted) else last
        return logits[torch.arange(len(ids), device=ids.device), at]
