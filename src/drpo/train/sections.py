"""The fields of a run by section, as `--help` shows them: known without importing torch."""

from collections.abc import Mapping

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "most_used": (
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
    ),
    "model": ("lora_rank", "precision"),
    "data": ("drop_long_prompts",),
    "rollout": (
        "sampling.temperature",
        "sampling.top_p",
        "sampling.top_k",
        "sampling.top_logprobs",
        "rollout_precision",
        "sync_every",
        "async_steps",
        "overlap",
    ),
    "rewards": ("reward_pool.processes", "reward_pool.seconds", "reward_pool.memory_gb"),
    "objective": (
        "advantage",
        "discount",
        "critic",
        "critic_optimizer",
        "reduction",
        "reference_kl",
        "kl_in_reward",
        "entropy_bonus",
    ),
    "optimiser": ("optimizer", "schedule", "max_grad_norm"),
    "trainer": ("name", "micro_batch_tokens", "shard"),
    "evaluation": ("eval_task", "eval_every", "eval_problems", "eval_samples"),
    "checkpoints": ("checkpoint_every", "keep_checkpoints"),
    "faults": ("reward_pool.on_failure", "max_skipped"),
}
"""Section -> its fields, a field of a record within the run as `record.field`. Every field is in one section.

`learning_rate` is no field: it replaces that of the optimiser, since it is the number that is changed most often.
"""
