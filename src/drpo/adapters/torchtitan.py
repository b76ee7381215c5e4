"""Any objective in torchtitan's RL: `with_objective(config, "drpo(0.2)")` in a config function.

Experimental. torchtitan builds its loss from `trainer.loss`, a `BaseLoss.Config`, in the trainer's processes, and
`DRPOLoss` is one more loss. `DRPOController` checks the configuration as it is after the command line, and asks each
step's metrics whether the loss ran. Packing, the number of tokens that the loss is divided by, chunks and engines are
torchtitan's.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, compute_logprobs
from torchtitan.experiments.rl.controller import Controller

from drpo.adapters.record import require_ran
from drpo.adapters.settings import Required, check_fields
from drpo.adapters.weighing import LOSS_TOKENS, figures, objective_of, token_loss, warn_untested
from drpo.errors import InputError
from drpo.objectives import Objective

FIELD = "trainer.loss.objective"
_DISTRIBUTION = "the trainer scores at temperature 1 over the whole vocabulary: mu would be another distribution"
SAMPLING: Required = {"temperature": ((1.0,), _DISTRIBUTION), "top_p": ((1.0,), _DISTRIBUTION)}
"""Field of `generator.sampling` -> the values with which mu is the sampler's; torchtitan's defaults are others."""


class DRPOLoss(BaseLoss):  # type: ignore[misc]
    """An objective's loss, summed over the trained tokens that have a log-probability of the generator's.

    Args:
        config: its objective.
        compile_config: of no effect, as in torchtitan's losses of RL.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        """The loss in a configuration.

        Args:
            objective: its spec, such as "drpo(0.2)"; there is no default.
        """

        objective: str | None = None

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.objective = _tokenwise(config.objective)

    def __call__(
        self, logits: Tensor, labels: Tensor, global_valid_tokens: float | None = None, *, generator_logprobs: Tensor,
        advantages: Tensor, loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Return the loss of a micro-batch or a chunk of it, and metrics that add up to the step's.

            loss = sum over kept tokens of objective(pi, mu, A) / global_valid_tokens

        Args:
            logits: [B, L, V], or [T, V].
            labels: [B, L] or [T], the tokens that the logits predict.
            global_valid_tokens: the kept tokens of the whole step; None means 1.
            generator_logprobs: nats, the generator's; a token without a finite one is not kept, as in torchtitan.
            advantages: per token.
            loss_mask: True where a token is trained.
        """
        logp, entropy = compute_logprobs(logits, labels, return_entropy=True)
        keep = loss_mask & generator_logprobs.isfinite()
        columns = (logp, generator_logprobs, advantages, keep)
        n_tokens = 1 if global_valid_tokens is None else max(global_valid_tokens, 1)
        loss = token_loss(self.objective, *columns).sum() / n_tokens
        region = figures(self.objective, *columns)
        share = keep.sum() / n_tokens
        moved = torch.where(keep, logp.detach() - generator_logprobs, 0.0)
        metrics = {
            "loss/mean": loss.detach(),
            "trainer/entropy/mean": torch.where(keep, entropy, 0.0).sum() / n_tokens,
            "bit_wise/logprob_diff/max": moved.abs().max(),
            "drpo/prob_diff_mean": region["prob_diff_mean"] * share,
            "drpo/prob_diff/max": region["prob_diff_max"],
            "drpo/unscored_frac": (loss_mask & ~keep).sum() / n_tokens + region["unscored"] * share,
            **{f"drpo/{name}/frac": share for name in region if name.startswith(LOSS_TOKENS)},
        }
        if "out_of_region" in region:
            metrics["drpo/out_of_region_frac"] = region["out_of_region"] * share
        return loss, metrics


class DRPOController(Controller):  # type: ignore[misc]
    """torchtitan's controller, which refuses a set-up where mu is not the sampler's and a step without the loss."""

    @dataclass(kw_only=True, slots=True)
    class Config(Controller.Config):  # type: ignore[misc]
        """The fields of `Controller.Config`; made by `with_objective`."""

    def __init__(self, config: Config) -> None:
        objective = check(config)
        super().__init__(config)
        log = self.metrics_processor.log

        def asked(step: int, metrics: Iterable[Any], *, is_validation: bool = False) -> None:
            logged = list(metrics)
            if not is_validation:
                require_ran([metric.key for metric in logged], objective)
            log(step, logged, is_validation=is_validation)

        self.metrics_processor.log = asked


def with_objective(config: Any, objective: str) -> DRPOController.Config:
    """Return torchtitan's configuration with an objective as its loss, in the chunks that its loss was computed in.

    Args:
        config: a `Controller.Config`; not changed.
        objective: its spec, such as "drpo(0.2)".

    Raises:
        InputError: an objective that cannot be used, or the configuration of another controller.
    """
    _tokenwise(objective)
    if type(config) is not Controller.Config:
        raise InputError(
            f"with_objective takes torchtitan's Controller.Config, not {type(config).__qualname__}: in a controller of "
            "your own set trainer.loss to DRPOLoss.Config, and call drpo.adapters.torchtitan.check"
        )
    loss: Any = DRPOLoss.Config(objective=objective)
    if isinstance(config.trainer.loss, ChunkedLossWrapper.Config):
        loss = replace(config.trainer.loss, loss_fn=loss)
    same = {field.name: getattr(config, field.name) for field in fields(config)}
    return DRPOController.Config(**same | {"trainer": replace(config.trainer, loss=loss)})


def check(config: Any) -> Objective:
    """Return the configuration's objective; raise InputError, naming the field, where mu would not be the sampler's.

    Args:
        config: a `Controller.Config`.
    """
    warn_untested("torchtitan", "0.3.0", "0.3.0")
    loss = config.trainer.loss
    loss = loss.loss_fn if isinstance(loss, ChunkedLossWrapper.Config) else loss
    if not isinstance(loss, DRPOLoss.Config):
        raise InputError(
            f"trainer.loss={type(loss).__qualname__}: it is another loss, and the objective would be ignored; let "
            "with_objective set it"
        )
    check_fields(config.generator.sampling, SAMPLING, setting="--generator.sampling.{} {}")
    return _tokenwise(loss.objective)


def _tokenwise(spec: str | None) -> Objective:
    objective = objective_of(spec, FIELD)
    if not objective.tokenwise:
        raise InputError(
            f"{FIELD}={spec!r} needs whole completions, which torchtitan packs into rows and cuts into chunks without "
            "telling its loss where they end; use an objective of tokens, such as 'drpo(0.2)'"
        )
    return objective
