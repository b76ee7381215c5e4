"""The record that an objective's loss ran: shared by all adapters, so that no framework bypasses it in silence.

The metric `loss_tokens/<objective>` of `figures` says it in the framework's log: how many tokens the loss had, and with
which objective. Where the step is in reach, `LossRecord.take` asks; elsewhere `require_ran` asks a step's metrics.
"""

import re
from collections.abc import Iterable

from torch import Tensor

from drpo.adapters.weighing import LOSS_TOKENS, figures, loss_tokens_key
from drpo.errors import InputError
from drpo.objectives import Objective


class LossRecord:
    """The last call of an objective's loss, until somebody asks for it.

    Args:
        objective: as of `reweight`.

    Example:
        >>> import torch
        >>> from drpo.objectives import DRPO
        >>> record = LossRecord(DRPO(0.2))
        >>> _ = record.note(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2))
        >>> int(record.take("the framework")["loss_tokens/drpo_0.2"])
        2
        >>> record.take("the framework")
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: the framework: the loss of drpo_0.2 did not run in this step
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._figures: dict[str, Tensor] = {}

    def note(self, logp: Tensor, behavior_logp: Tensor, advantage: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """Record a call by its `figures`, and return them; the arguments are theirs."""
        self._figures = figures(self.objective, logp, behavior_logp, advantage, keep)
        return self._figures

    def take(self, who: str) -> dict[str, Tensor]:
        """Return the figures of the last call and forget them.

        Args:
            who: bypassed the loss, if it was, and what to do about it; begins the message.

        Raises:
            InputError: no call since the last time.
        """
        taken, self._figures = self._figures, {}
        if not taken:
            name = loss_tokens_key(self.objective).removeprefix(LOSS_TOKENS)
            raise InputError(f"{who}: the loss of {name} did not run in this step")
        return taken


def require_ran(metrics: Iterable[str], objective: Objective) -> None:
    """Raise unless the names of a step's metrics say that the loss ran with this objective.

    Args:
        metrics: their names, with any prefix, or a dictionary of them; behind a "/" or "@" may be how the framework
            reduces them.
        objective: of the run.

    Raises:
        InputError: no such name: the framework computes a loss of its own, or trains with another objective.

    Example:
        >>> from drpo.objectives import DRPO
        >>> require_ran({"actor/drpo/loss_tokens/drpo_0.2": 512.0}, DRPO(0.2))
        >>> require_ran({"actor/pg_loss": 0.1}, DRPO(0.2))
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: the step's metrics have no drpo/loss_tokens/drpo_0.2: the framework trained with a loss
        of its own; look for what replaces drpo's
    """
    wanted = loss_tokens_key(objective)
    names = list(metrics)
    if any(re.search(rf"(^|/){re.escape(wanted)}([/@]\w+)?$", name) for name in names):
        return
    others = sorted({re.split("[/@]", name.split(LOSS_TOKENS)[1])[0] for name in names if LOSS_TOKENS in name})
    if others:
        raise InputError(f"the step trained with {', '.join(others)}, not with {wanted.removeprefix(LOSS_TOKENS)}")
    raise InputError(
        f"the step's metrics have no drpo/{wanted}: the framework trained with a loss of its own; look for what "
        "replaces drpo's"
    )
