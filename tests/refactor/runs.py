"""The runs that are compared: plain data, in the words of the recorded commit's command line.

A setting is a field of the recorded commit's `Run`, by its dotted name. `{side}` stands for the side's module, `old` or
`new`, whose functions are the model and the rewards. `new.py` translates settings that have another name by now.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        name: unique.
        group: tiny (all in one process), ranks (two processes of torchrun), smollm2.
        recipe: of `drpo train`.
        settings: that are not the recipe's.
        tolerance: largest |before - after| / max(1, |before|) that is no difference; 0 compares bit for bit.
        resumed: the run is stopped by a signal and resumed.
        unfinished: the recorded commit does not finish it (it cannot write a model with tied weights that was divided
            among processes): how the command ends, and what it leaves only where it finishes, is not compared.
    """

    name: str
    group: str
    recipe: str
    settings: Settings = field(default_factory=dict)
    tolerance: float = 0.0
    resumed: bool = False
    unfinished: bool = False


TINY: Settings = {
    "model": "{side}:short",
    "reward": "{side}:ascii_share",
    "precision": "fp32",
    "rollout_precision": "fp32",
    "steps": 3,
    "learning_rate": 1e-2,  # large, so that tokens leave every region within three steps
    "micro_batch_tokens": 70,  # several micro-batches an update, some with a shared prompt
}

OBJECTIVES = {
    "none": "none",
    "tis": "tis(1.1)",
    "ppo": "ppo(0.2, 0.28)",
    "ppo-dual": "ppo(0.1, 0.1, dual=1.2)",
    "spo": "spo(0.2)",
    "dppo": "dppo(0.01)",
    "dppo-kl": "dppo(0.01, 0.02, 'kl')",
    "dppo-topk-tv": "dppo(0.05, divergence='topk_tv')",
    "dppo-topk-kl": "dppo(0.05, divergence='topk_kl')",
    "drpo": "drpo(0.01)",
    "drpo-wide": "drpo(12.5)",
    "drpo-power": "drpo(0.1, power=0.5)",
    "drpo-mask": "drpo(0.01, outside=0.005)",
    "drpo-unweighted": "drpo(0.1, advantage_weighted=False)",
    "cispo": "cispo(0.2, 0.28)",
    "gspo": "gspo(0.003, 0.004)",
    "sapo": "sapo(1.0, 1.05)",
    "mask": "mask(0.01)",
    "mask-kl": "mask(0.01, 'kl')",
    "penalty-tv": "penalty('tv', 0.1)",
    "penalty-k1": "penalty('k1', 0.1)",
    "penalty-k3": "penalty('k3', 0.1)",
}

VARIANTS: Mapping[str, Settings] = {
    **{f"advantage-{name}": {"advantage": name} for name in ("zscore", "rloo", "maxrl")},
    **{f"reduction-{name}": {"reduction": name} for name in ("token_mean", "sequence_mean")},
    "reference-kl": {"reference_kl": 0.1},
    "entropy-bonus": {"entropy_bonus": 0.02},
    "terms-gspo": {"objective": "gspo(0.003, 0.004)", "reference_kl": 0.1, "entropy_bonus": 0.02},
    "terms-topk": {"objective": "dppo(0.05, divergence='topk_kl')", "reference_kl": 0.1, "entropy_bonus": 0.02},
    "lora": {"lora_rank": 4},
    "lora-terms": {"lora_rank": 4, "reference_kl": 0.1},
    "lag": {"lag": 1, "steps": 5},
    "lag-sync": {"lag": 2, "refresh_every": 3, "steps": 6},
    "lag-topk": {"lag": 1, "refresh_every": 2, "steps": 5, "objective": "dppo(0.05, divergence='topk_tv')"},
    "sync": {"refresh_every": 2, "steps": 4},
    "overlap": {"lag": 1, "overlap": True, "steps": 5},
    "overlap-sync": {"lag": 2, "refresh_every": 2, "overlap": True, "steps": 6},
    "top-logprobs": {"sampling.top_logprobs": 5},
    "eval": {"eval_every": 1, "eval_samples": 3, "eval_problems": 5, "steps": 4},
    "eval-task": {"eval_task": "addition(10, 20)", "eval_samples": 2},
    "no-eval": {"eval_problems": 0},
    "temperature": {"sampling.temperature": 0.7, "sampling.max_new_tokens": 12},
    "linear": {"schedule": "linear", "warmup": 1, "steps": 4},
    "cosine": {"schedule": "cosine", "steps": 4},
    "clip": {"max_grad_norm": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)},
    "no-clip": {"max_grad_norm": "inf", "weight_decay": 0.0},
    "uneven": {"prompts": 5, "updates": 3, "sampling.samples": 3},
    "one-by-one": {"micro_batch_tokens": 1, "updates": 4},
    "all-at-once": {"micro_batch_tokens": 4096, "updates": 1},
    "seed": {"seed": 7},
    "failures-dropped": {"reward": "{side}:flaky"},
    "failures-zero": {"reward": "{side}:flaky", "marking.on_failure": "zero"},
    "nothing-to-learn": {"reward": "exact_number"},  # every reward is 0
    "reward-processes": {"reward": "world:ascii_share", "marking.processes": 2},
    "bf16": {"precision": "bf16", "rollout_precision": "bf16"},
    "fp8": {"precision": "fp8", "rollout_precision": "fp8"},
    "fp8-weights": {"precision": "fp8_weights", "rollout_precision": "fp8_weights"},
    "int8": {"precision": "int8", "rollout_precision": "int8"},
    "int8-rollouts": {"rollout_precision": "int8", "objective": "tis(1.1)"},
}

CRITICS: Mapping[str, Settings] = {
    "critic": {"critic": "gae(learning_rate=1e-3)", "objective": "ppo(0.2, 0.28)"},
    "critic-plain": {"critic": "gae(0.99, 0.9, learning_rate=1e-3, clip=None, updates=2, whiten=False)"},
    "critic-warmup": {"critic": "gae(learning_rate=1e-3, warmup=1)", "sampling.samples": 1, "reduction": "token_mean"},
    "critic-terms": {"critic": "gae(learning_rate=1e-3)", "reference_kl": 0.1, "lag": 1, "steps": 4},
    "critic-failures": {"critic": "gae(learning_rate=1e-3)", "reward": "{side}:flaky"},
}

RESUMED: Mapping[str, Settings] = {
    "resumed": {},
    "resumed-lag": {"lag": 2, "refresh_every": 2, "objective": "dppo(0.05, divergence='topk_tv')"},
}

RANKS: Mapping[str, Settings] = {
    "ranks": {"prompts": 6},
    "ranks-lag": {"lag": 1, "refresh_every": 2, "steps": 5, "reference_kl": 0.1, "entropy_bonus": 0.02},
}

DIVIDED: Mapping[str, Settings] = {
    "ranks-fsdp": {"prompts": 6},
    "ranks-fsdp-topk": {"objective": "dppo(0.05, divergence='topk_tv')", "eval_every": 1},
}

CRITIC = 1e-6


def _tiny(name: str, group: str, settings: Settings, **more: Any) -> Run:
    return Run(name, group, "smoke", {**TINY, **settings}, **more)


def all_runs() -> list[Run]:
    """All of them, in the order in which they are run."""
    stopped = {"reward": "{side}:stopping", "steps": 4}
    slow = {"learning_rate": 5e-5}  # AdamW makes whole steps of a gradient that is but rounding
    divided = {"shard": "fsdp", "checkpoint_every": 1}
    return [
        *(_tiny(name, "tiny", {"objective": text}) for name, text in OBJECTIVES.items()),
        *(_tiny(name, "tiny", {"objective": "drpo(0.01)", **s}) for name, s in VARIANTS.items()),
        *(_tiny(name, "tiny", {**slow, **s}, tolerance=CRITIC) for name, s in CRITICS.items()),
        *(_tiny(name, "tiny", {**stopped, **s}, resumed=True) for name, s in RESUMED.items()),
        _tiny("resumed-critic", "tiny", {**slow, **stopped, **CRITICS["critic"]}, tolerance=CRITIC, resumed=True),
        *(_tiny(name, "ranks", s) for name, s in RANKS.items()),
        _tiny("ranks-critic", "ranks", {**slow, **CRITICS["critic"]}, tolerance=CRITIC),
        *(_tiny(name, "ranks", {**divided, **s}, unfinished=True) for name, s in DIVIDED.items()),
        _tiny(
            "ranks-fsdp-critic", "ranks", {**slow, **CRITICS["critic"], **divided}, tolerance=CRITIC, unfinished=True
        ),
        Run("smollm2", "smollm2", "demo", {"steps": 3, "learning_rate": 2e-5, "eval_problems": 16}),
    ]
