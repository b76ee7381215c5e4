"""Any objective in open-instruct (Tulu): `python -m drpo.adapters.open_instruct --drpo-objective 'drpo(0.2)' ...`.

Experimental. Neither trainer (`grpo_fast` on DeepSpeed, `grpo` on OLMo-core) has a registry of losses. Both call, as
attributes of `open_instruct.grpo_utils` and for each packed batch, `compute_rho_correction`, which has the sampler's
log-probabilities and the response mask, `compute_grpo_loss`, and `populate_sample_loss_stats`. `equip` wraps the three
where Ray's workers import that module. Reductions, the KL to the reference, packing and asynchronous rollouts stay
open-instruct's.

The launcher tells the workers the objective in the environment variable DRPO_OBJECTIVE, and hands the remaining
arguments to the trainer.
"""

import argparse
import functools
import importlib
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import ray
import torch
from torch import Tensor

from drpo.adapters.imports import when_imported
from drpo.adapters.record import LossRecord
from drpo.adapters.settings import Required, check_fields, in_yaml
from drpo.adapters.weighing import objective_of, token_loss
from drpo.errors import InputError
from drpo.objectives import Objective, out_of_region
from drpo.objectives.contract import unchecked

VARIABLE = "DRPO_OBJECTIVE"
UTILS, LOADER = "open_instruct.grpo_utils", "open_instruct.data_loader"
TRAINERS = ("grpo_fast", "grpo")
HOOK = "drpo.adapters.open_instruct.patch"
WRAPPED = ("compute_rho_correction", "compute_grpo_loss", "populate_sample_loss_stats")
_DISTRIBUTION = "mu would not be the distribution over the whole vocabulary that the trainer scores with"
REQUIRED: Required = {
    "use_vllm_logprobs": (
        (True,),
        "the ratio would be to the trainer's own log-probabilities (--use_rho_correction false goes with it)",
    ),
    "use_rho_correction": ((False,), "it multiplies the loss by a ratio that the objective already contains"),
    "loss_fn": (("dapo",), "the objective is the loss; write CISPO as --drpo-objective 'cispo(...)'"),
    "mask_tool_use": ((True,), "tokens that a tool wrote would be trained, for which there is no mu"),
    "vllm_top_p": ((1.0,), _DISTRIBUTION),
}
"""Field of one of open-instruct's configurations -> its values and the reason."""
CONFIGURED = {UTILS: ("GRPOExperimentConfig",), LOADER: ("StreamingDataLoaderConfig", "VLLMConfig")}
"""Module -> its classes with these fields."""


def check(config: Any) -> None:
    """Raise InputError, naming the flag, for a configuration with which the loss would not be the objective's.

    Args:
        config: a `GRPOExperimentConfig`, `StreamingDataLoaderConfig` or `VLLMConfig`, or anything with their fields.
    """
    check_fields(config, REQUIRED, setting="--{} {}", written=in_yaml)
    temperature = getattr(config, "temperature", 1.0)
    if not temperature > 0:
        raise InputError(f"--temperature {temperature}: samples nothing; set --temperature 1")


def equip(utils: ModuleType, objective: Objective) -> None:
    """Make open-instruct's trainers compute an objective's loss, and log its figures under "drpo/".

    Args:
        utils: `open_instruct.grpo_utils`; three of its functions are wrapped.
        objective: a token-wise one, since rows hold several packed completions.

    Raises:
        InputError: an objective of whole sequences; a version without these functions.
    """
    if not objective.tokenwise:
        raise InputError(
            f"--drpo-objective {type(objective).__name__} needs whole completions, which open-instruct packs into rows "
            "without telling its loss where they end; use an objective of tokens, such as 'drpo(0.2)'"
        )
    missing = [name for name in WRAPPED if not hasattr(utils, name)]
    if missing:
        raise InputError(f"{UTILS} has no {missing[0]}: this version of open-instruct is not supported")
    correction_of, loss_of, stats_of = (getattr(utils, name) for name in WRAPPED)
    record = LossRecord(objective)
    batch: dict[str, Tensor] = {}

    @functools.wraps(correction_of)
    def compute_rho_correction(
        old_logprob: Tensor, vllm_logprobs: Tensor, response_mask: Tensor, advantages: Tensor, config: Any
    ) -> Any:
        batch.update(behavior_logp=vllm_logprobs, keep=response_mask)
        return correction_of(old_logprob, vllm_logprobs, response_mask, advantages, config)

    @functools.wraps(loss_of)
    def compute_grpo_loss(
        new_logprobs: Tensor, ratio: Tensor, advantages: Tensor, ref_logprobs: Tensor | None, config: Any,
        rho_weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        check(config)
        if not batch:
            raise InputError(
                f"{UTILS}.compute_rho_correction was not called before the loss, so the sampler's log-probabilities "
                "are unknown: this version of open-instruct is not supported"
            )
        # A token of the response without a log-probability has 1.0 in its place, which counts as broken.
        mu, keep = batch.pop("behavior_logp"), batch.pop("keep").bool()
        columns = (new_logprobs, mu, advantages, keep)
        record.note(*columns)
        arguments = {"ratio": ratio, "advantages": advantages, "ref_logprobs": ref_logprobs, "rho_weights": rho_weights}
        *_, kl = loss_of(new_logprobs=new_logprobs, config=config, **arguments)
        return token_loss(objective, *columns), _left(objective, *columns), kl

    @functools.wraps(stats_of)
    def populate_sample_loss_stats(stats: dict[str, Tensor], sample_idx: int, *rest: Any, **named: Any) -> None:
        who = f"open-instruct's trainer did not call {UTILS}.compute_grpo_loss"
        for name, value in record.take(who).items():
            column = stats.setdefault(f"drpo/{name}", torch.zeros_like(stats["loss/total_avg"]))
            column[sample_idx] = value
        stats_of(stats, sample_idx, *rest, **named)

    for name, function in zip(
        WRAPPED, (compute_rho_correction, compute_grpo_loss, populate_sample_loss_stats), strict=True
    ):
        setattr(utils, name, function)


def patch() -> None:
    """Set the objective of open-instruct's trainers in this process to the spec in DRPO_OBJECTIVE.

    Ray calls this function when a worker process starts. The modules are patched when they are imported.

    Raises:
        InputError: DRPO_OBJECTIVE is not set or invalid.
    """
    objective = objective_of(os.environ.get(VARIABLE), VARIABLE)
    when_imported(UTILS, functools.partial(equip, objective=objective))


def guard(module: ModuleType) -> None:
    """Make open-instruct's configurations in this module refuse what `check` refuses, when they are built."""
    for name in CONFIGURED[module.__name__]:
        kind = getattr(module, name)
        kind.__init__ = _checked(kind.__init__)


def hooked(init: Callable[..., Any], objective: str) -> Callable[..., Any]:
    """Return `ray.init` with the workers' set-up function and the objective in their environment.

    Raises:
        InputError: on a call: the runtime environment has another set-up function.
    """

    @functools.wraps(init)
    def with_hook(*positional: Any, runtime_env: dict[str, Any] | None = None, **named: Any) -> Any:
        environment = dict(runtime_env or {})
        if "worker_process_setup_hook" in environment:
            raise InputError(
                "ray.init has a worker_process_setup_hook already, and Ray takes one: let yours call "
                f"{HOOK}() and set {VARIABLE}"
            )
        environment["worker_process_setup_hook"] = HOOK
        environment["env_vars"] = {**environment.get("env_vars", {}), VARIABLE: objective}
        return init(*positional, runtime_env=environment, **named)

    return with_hook


def main(arguments: Sequence[str]) -> int:
    """Patch this process and Ray's workers, and run open-instruct's trainer; return 2 for invalid arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--drpo-objective")
    parser.add_argument("--drpo-trainer", choices=TRAINERS, default=TRAINERS[0])
    ours, theirs = parser.parse_known_args(arguments)
    module = f"open_instruct.{ours.drpo_trainer}"
    try:
        os.environ[VARIABLE] = ours.drpo_objective or ""
        objective_of(ours.drpo_objective, "--drpo-objective")
        patch()
        for name in CONFIGURED:
            guard(importlib.import_module(name))
        ray.init = hooked(ray.init, ours.drpo_objective)
        sys.argv = [module, *theirs]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except InputError as error:
        print(f"drpo: {getattr(error, 'cause', error)}", file=sys.stderr)  # a worker's error has a cause
        return 2
    return 0


def _left(objective: Objective, logp: Tensor, mu: Tensor, advantage: Tensor, keep: Tensor) -> Tensor:
    """1 at the tokens that have left the objective's region: what open-instruct logs as its share of clipped tokens."""
    columns = {"logp": logp.detach(), "behavior_logp": mu, "advantage": advantage, "keep": keep}
    left = out_of_region(objective, unchecked(**columns, sequence=torch.zeros_like(keep), divergence=None))
    return torch.zeros_like(logp.detach()) if left is None else (left & keep).to(logp.dtype)


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def checked(self: Any, *positional: Any, **named: Any) -> None:
        init(self, *positional, **named)
        check(self)
        if getattr(self, "load_ref_policy", False) and getattr(self, "beta", 0.0):
            warnings.warn(
                f"--beta {self.beta} (0.05 where it is not given) adds a KL to the reference beside the objective; "
                "--beta 0 --load_ref_policy false trains the objective alone",
                stacklevel=2,
            )

    return checked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
