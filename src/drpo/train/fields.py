"""The options of a run on the command line, and the path of the field of each. Imports no torch.

A new field of a run is a field of one of the groups in `drpo.train.config.groups`, and a line here.
"""

from collections.abc import Mapping

from drpo.errors import InputError, nearest

FIELDS: Mapping[str, str] = {
    "name": "name",
    "seed": "seed",
    "warm_up": "warm_up",
    "model": "model.name",
    "lora_rank": "model.lora_rank",
    "base_precision": "model.base_precision",
    "precision": "model.precision",
    "master_weights": "model.master_weights",
    "routing_replay": "model.routing_replay",
    "device": "model.device",
    "chat_template": "model.chat_template",
    "template": "model.chat_template_kwargs",
    "task": "data.task",
    "environment": "data.environment",
    "prompts": "data.prompts",
    "drop_long_prompts": "data.drop_long_prompts",
    "curriculum": "data.curriculum",
    "engine": "rollout.engine",
    "stop": "rollout.stop",
    "rollout_precision": "rollout.precision",
    "sync_every": "rollout.sync_every",
    "async_steps": "rollout.async_steps",
    "overlap": "rollout.overlap",
    "dynamic_sampling": "rollout.dynamic_sampling",
    "max_turns": "rollout.max_turns",
    "max_episode_tokens": "rollout.max_episode_tokens",
    "environment_pool.processes": "rollout.environment_pool.processes",
    "environment_pool.seconds": "rollout.environment_pool.seconds",
    "environment_pool.memory_gb": "rollout.environment_pool.memory_gb",
    "sampling.samples": "rollout.sampling.samples",
    "sampling.max_new_tokens": "rollout.sampling.max_new_tokens",
    "sampling.temperature": "rollout.sampling.temperature",
    "sampling.top_p": "rollout.sampling.top_p",
    "sampling.top_k": "rollout.sampling.top_k",
    "sampling.top_logprobs": "rollout.sampling.top_logprobs",
    "reward": "rewards.function",
    "overlong": "rewards.overlong",
    "reward_pool.processes": "rewards.pool.processes",
    "reward_pool.seconds": "rewards.pool.seconds",
    "reward_pool.memory_gb": "rewards.pool.memory_gb",
    "reward_pool.on_failure": "rewards.pool.on_failure",
    "objective": "objective.loss",
    "advantage": "objective.advantage",
    "whiten": "objective.whiten",
    "discount": "objective.discount",
    "critic": "objective.critic",
    "reduction": "objective.reduction",
    "sequence": "objective.sequence",
    "reference_kl": "objective.reference_kl",
    "kl_in_reward": "objective.kl_in_reward",
    "entropy_bonus": "objective.entropy_bonus",
    "optimizer": "optimizer.policy",
    "learning_rate": "optimizer.policy.learning_rate",
    "critic_optimizer": "optimizer.critic",
    "schedule": "optimizer.schedule",
    "max_grad_norm": "optimizer.max_grad_norm",
    "steps": "trainer.steps",
    "updates": "trainer.updates",
    "micro_batch_tokens": "trainer.micro_batch_tokens",
    "shard": "trainer.shard",
    "checkpoint_activations": "trainer.checkpoint_activations",
    "eval_task": "evaluation.task",
    "eval_every": "evaluation.every",
    "eval_problems": "evaluation.problems",
    "eval_samples": "evaluation.samples",
    "checkpoint_every": "checkpoints.every",
    "keep_checkpoints": "checkpoints.keep",
    "max_skipped": "faults.max_skipped",
}
"""Name of the option -> the field, by its path within the run: --eval-every is `run.evaluation.every`.

`learning_rate` is within the optimiser's spec; it is an option because it is the number that is changed most often.
`template` is --template.NAME VALUE, for any name.
"""

RECORDS: Mapping[str, str] = {
    "sampling": "rollout.sampling",
    "environment_pool": "rollout.environment_pool",
    "reward_pool": "rewards.pool",
}
"""Records of several options, which Python may change as a whole."""

MOST_USED = (
    "model",
    "task",
    "reward",
    "objective",
    "steps",
    "prompts",
    "sampling.samples",
    "sampling.max_new_tokens",
    "updates",
    "learning_rate",
    "engine",
    "seed",
)
"""What --help shows first."""


def path_of(name: str) -> str:
    """Return where the field of an option, or a record of several, is within a run.

    Raises:
        InputError: no option of this name; the nearest one is named.

    Example:
        >>> path_of("eval_every"), path_of("sampling")
        ('evaluation.every', 'rollout.sampling')
    """
    known = {**FIELDS, **RECORDS}
    if name not in known:
        raise InputError(f"a run has no field {name!r}{nearest(name, known)}")
    return known[name]


def sections() -> dict[str, list[str]]:
    """Return the options by section, as --help shows them: the most used first, the others by their group.

    Example:
        >>> sections()["evaluation"]
        ['eval_task', 'eval_every', 'eval_problems', 'eval_samples']
    """
    by_section: dict[str, list[str]] = {"most_used": list(MOST_USED)}
    for name, path in FIELDS.items():
        if name not in MOST_USED:
            by_section.setdefault(path.partition(".")[0] if "." in path else "run", []).append(name)
    return by_section
