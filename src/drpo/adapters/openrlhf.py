"""Any objective in OpenRLHF's PPO trainer: `python -m drpo.adapters.openrlhf --drpo-objective 'drpo(0.2)' ...`.

Experimental. The loss and the launcher are tested with OpenRLHF 0.11.0, 0.11.1 and 0.11.2 on a CPU. With 0.11.2 a whole
training run has been there, with DeepSpeed and vLLM (cluster/openrlhf/demo.py); none has on GPUs.

OpenRLHF has no registry of losses, and builds its loss in Ray workers. So the launcher starts Ray with a function that
every worker runs first (`patch`), tells the workers the objective in the environment variable DRPO_OBJECTIVE, and hands
the remaining arguments to OpenRLHF's own `train_ppo_ray`.
"""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import ray
from torch import Tensor, nn

from drpo.adapters.imports import when_imported
from drpo.adapters.record import LossRecord
from drpo.adapters.weighing import behavior_or_policy, objective_of, reweight, warn_untested
from drpo.errors import InputError
from drpo.objectives import Objective

VARIABLE = "DRPO_OBJECTIVE"
TRAINER = "openrlhf.trainer.ray.ppo_actor"
COMMAND = "openrlhf.cli.train_ppo_ray"
CORRECTION = "--algo.advantage.is_correction_"
# The defaults of OpenRLHF's own ray.init, which does not change a running Ray.
WORKERS_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "true",
    "NCCL_DEBUG": "WARN",
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
}
# Features of the framework's loss that must be off. The last two have other names since 0.11.2.
SWITCHED_OFF = {
    "clip_eps_low": 1.0,
    "clip_eps_high": float("inf"),
    "dual_clip": None,
    "is_correction_level": "off",
    "enable_vllm_is_correction": False,
}


class ReweightedLoss(nn.Module):
    """OpenRLHF's policy loss with an objective's gradient.

        framework(logp, old := mu, A := A w),  without its clip and its importance-sampling correction

    Args:
        framework: a `PolicyLoss` of OpenRLHF; its switches are set.
        objective: any token-wise one, or GSPO.

    Returns:
        On a call: the framework's return value. The loss has the objective's gradient, but not its value.

    Raises:
        InputError: a framework's loss that is not token-wise; on a call, no log-probabilities of the sampler.
    """

    def __init__(self, framework: nn.Module, objective: Objective) -> None:
        super().__init__()
        kind: Any = framework.policy_loss_type
        if kind != "ppo":
            raise InputError(
                f"--actor.policy_loss_type {kind}: must be ppo; GSPO is written as --drpo-objective 'gspo(...)'"
            )
        for name in SWITCHED_OFF.keys() & vars(framework).keys():
            setattr(framework, name, SWITCHED_OFF[name])
        self.framework = framework
        self.objective = objective
        self.record = LossRecord(objective)

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor,
        rollout_log_probs: Tensor | None = None,
        **normalizers: Any,
    ) -> Any:
        """Reweight the advantages, [B, T], and call the framework's loss; `old_log_probs` is not used."""
        if rollout_log_probs is None:
            raise InputError(
                "rollout_log_probs is missing, so the sampler's log-probabilities are unknown: set "
                f"{CORRECTION}level token (OpenRLHF 0.11.0 and 0.11.1: {CORRECTION}enable), and let an agent of your "
                "own return them"
            )
        columns = (log_probs, rollout_log_probs, advantages, action_mask)
        self.record.note(*columns)
        mu = behavior_or_policy(log_probs, rollout_log_probs, action_mask)
        weighed = reweight(self.objective, *columns)
        return self.framework(log_probs, mu, weighed, action_mask=action_mask, **normalizers)


def patch() -> None:
    """Set the objective of OpenRLHF's policy trainer in this process to the spec in DRPO_OBJECTIVE.

    Ray calls this function when a worker process starts. The trainer's module is patched when it is imported. Importing
    it here would make DeepSpeed probe the GPUs before Ray has assigned them, and load DeepSpeed into vLLM's processes.

    Raises:
        InputError: DRPO_OBJECTIVE is not set or invalid.
    """
    objective = objective_of(os.environ.get(VARIABLE), VARIABLE)
    when_imported(TRAINER, partial(equip, objective=objective))


def equip(trainer: ModuleType, objective: Objective) -> None:
    """Make `ActorPPOTrainer` of OpenRLHF's module build the reweighted loss and log its figures under "drpo/".

    The log averages over tokens, so `prob_diff_max` and `weight_min` are means of the micro-batches' extremes.
    """
    framework_loss, framework_step = trainer.PolicyLoss, trainer.ActorPPOTrainer.training_step

    def loss(*settings: Any, **named_settings: Any) -> ReweightedLoss:
        return ReweightedLoss(framework_loss(*settings, **named_settings), objective)

    def training_step(self: Any, *inputs: Any, **named_inputs: Any) -> Any:
        status = framework_step(self, *inputs, **named_inputs)
        ran = getattr(self.actor_loss_fn, "record", None) or LossRecord(objective)
        for name, value in ran.take("OpenRLHF's training step did not call the policy loss that drpo builds").items():
            status["metrics"][f"drpo/{name}"] = value
            status["weights"][f"drpo/{name}"] = "token"
        return status

    trainer.PolicyLoss = loss  # type: ignore[attr-defined]
    trainer.ActorPPOTrainer.training_step = training_step


def check(arguments: Sequence[str]) -> None:
    """Raise InputError, naming the flag, for arguments of `train_ppo_ray` that are incompatible with an objective.

    Example:
        >>> check(["--algo.advantage.is_correction_level", "token"])
        >>> check(["--algo.advantage.is_correction_level", "token", "--rollout.top_p", "0.9"])
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: --rollout.top_p 0.9: must be 1, since the sampler's probabilities of a truncated
        distribution are not the policy's
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(f"{CORRECTION}level", dest="level", default="off")
    parser.add_argument(f"{CORRECTION}enable", dest="enable", action="store_true")
    parser.add_argument("--rollout.top_p", dest="top_p", type=float, default=1.0)
    parser.add_argument("--actor.policy_loss_type", dest="kind", default="ppo")
    without_effect = {
        parser.add_argument(flag, nargs="*").dest: flag
        for flag in (
            "--actor.eps_clip",
            "--actor.eps_clip_low_high",
            "--actor.dual_clip",
            *(f"{CORRECTION}{part}" for part in ("mode", "gating", "threshold", "type")),
        )
    }
    given, _ = parser.parse_known_args(arguments)
    if given.level == "off" and not given.enable:
        raise InputError(
            f"{CORRECTION}level off: OpenRLHF does not ask the sampler for its log-probabilities; set it to token "
            f"(OpenRLHF 0.11.0 and 0.11.1: {CORRECTION}enable); the correction itself is switched off"
        )
    if given.kind != "ppo":
        raise InputError(
            f"--actor.policy_loss_type {given.kind}: must be ppo; GSPO is written as --drpo-objective 'gspo(...)'"
        )
    if given.top_p != 1:
        raise InputError(
            f"--rollout.top_p {given.top_p:g}: must be 1, since the sampler's probabilities of a truncated "
            "distribution are not the policy's"
        )
    for name, flag in without_effect.items():
        if getattr(given, name) is not None:
            raise InputError(
                f"{flag} has no effect beside --drpo-objective, which is the only trust region: leave it out"
            )


def runtime_environment(objective: str) -> dict[str, Any]:
    """Return the runtime environment of Ray's workers: their setup function and its environment variable."""
    environment = {name: os.environ.get(name, default) for name, default in WORKERS_ENVIRONMENT.items()}
    return {
        "worker_process_setup_hook": "drpo.adapters.openrlhf.patch",
        "env_vars": environment | {VARIABLE: objective},
    }


def main(arguments: Sequence[str]) -> int:
    """Check the arguments, start Ray with patched workers, and run OpenRLHF; return 2 for invalid arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--drpo-objective")
    ours, theirs = parser.parse_known_args(arguments)
    try:
        objective_of(ours.drpo_objective, "--drpo-objective")
        check(theirs)
    except InputError as error:
        print(f"drpo: {error}", file=sys.stderr)
        return 2
    warn_untested("openrlhf", "0.11.0", "0.11.2")
    ray.init(runtime_env=runtime_environment(ours.drpo_objective))
    sys.argv = [COMMAND, *theirs]
    runpy.run_module(COMMAND, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
