"""Any objective in TRL's `AsyncGRPOTrainer`: `AsyncDRPOTrainer` and `AsyncDRPOConfig`.

Experimental, as the trainer is in TRL 1.16. Its batch is flat, with several completions in a row, and its ratio is to
the log-probabilities that vLLM reported: old is mu. Its `compute_loss` reads advantages, calls the model, and computes
a clipped surrogate. Here A := A w is written into these advantages once the model has been called, with the clip off.
Packing, the number of tokens that the loss is divided by, weight transfer and logs are TRL's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from drpo.adapters.grpo import REQUIRED, SAMPLING, log_figures
from drpo.adapters.record import LossRecord
from drpo.adapters.settings import Required, check_fields
from drpo.adapters.weighing import behavior_or_policy, objective_of, reweight, warn_untested
from drpo.errors import InputError

warn_untested("trl", "1.16.0", "1.16.0")

FIELDS: Required = {
    "epsilon": REQUIRED["epsilon"],
    "epsilon_high": REQUIRED["epsilon_high"],
    "temperature": (
        (1.0,),
        "a vLLM server reports log-probabilities at temperature 1, unless its command line says otherwise",
    ),
    **SAMPLING,
}


@dataclass
class AsyncDRPOConfig(AsyncGRPOConfig):  # type: ignore[misc]
    """`AsyncGRPOConfig` with an objective.

    Args:
        objective: its spec, such as "drpo(0.2)". There is no default.

    Raises:
        InputError: an objective that cannot be used, or a field with which the gradient would not be the objective's.
    """

    objective: str | None = None
    epsilon: float = 1.0
    epsilon_high: float | None = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        objective_of(self.objective, "objective")
        check_fields(self, FIELDS)


class AsyncDRPOTrainer(AsyncGRPOTrainer):  # type: ignore[misc]
    """`AsyncGRPOTrainer` whose gradient is that of `args.objective`.

    Args:
        *positional: as of AsyncGRPOTrainer.
        **named: as of AsyncGRPOTrainer; `args` is an `AsyncDRPOConfig`.

    Raises:
        InputError: `args` is not an AsyncDRPOConfig.
    """

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        if not isinstance(self.args, AsyncDRPOConfig):
            raise InputError(
                "args: AsyncDRPOTrainer needs an AsyncDRPOConfig, which says what objective='drpo(0.2)' or other to "
                "train with"
            )
        self._record = LossRecord(objective_of(self.args.objective, "objective"))

    def compute_loss(self, model: Callable[..., Any], inputs: dict[str, Any], *rest: Any, **named: Any) -> Tensor:
        """Call AsyncGRPOTrainer's, and raise InputError if the objective's loss did not run in it."""
        advantages, old = _Taken(inputs["advantages"]), _Taken(inputs["old_log_probs"])
        index = inputs["token_index"]

        def weighing(**arguments: Any) -> Any:
            outputs = model(**arguments)
            if advantages.part is not None and old.part is not None:
                logp = outputs.log_probs.detach().flatten()[index[index >= 0]]
                keep = logp.new_ones(logp.shape)
                columns = (logp, old.part.clone(), advantages.part.clone(), keep)
                self._record.note(*columns)
                completion = inputs["segment_id"][index >= 0]
                advantages.part.copy_(reweight(self._record.objective, *columns, completion))
                old.part.copy_(behavior_or_policy(*columns[:2], keep))
            return outputs

        batch = inputs | {"advantages": advantages, "old_log_probs": old}
        loss: Tensor = super().compute_loss(weighing, batch, *rest, **named)
        log_figures(self, self._record.take("compute_loss of this AsyncGRPOTrainer reads its batch in another way"))
        return loss


class _Taken:
    """A tensor of a batch, and the part of it that was read: a copy, which may be written to afterwards."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self.part: Tensor | None = None

    def __getitem__(self, selected: Tensor) -> Tensor:
        self.part = self.whole[selected]
        return self.part
