"""Any objective in NeMo-RL's GRPO: `loss_fn = reweighted(loss_fn, "drpo(0.2)")` between its `setup` and its training.

Experimental. NeMo-RL is not in the package index, and its training needs GPUs: the tests run with a stand-in for its
`ClippedPGLossFn`, written from its documented formula, and a list of the names that this file relies on.

NeMo-RL is not imported. Its loss is called unchanged, on a batch in which the sampler is the previous policy and the
advantages are reweighted. The importance-sampling correction, if on, is then exactly 1.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from drpo.adapters.weighing import behavior_or_policy, figures, loss_tokens_key, objective_of, reweight
from drpo.errors import InputError
from drpo.objectives import Objective

# Metrics that add up over micro-batches and ranks: NeMo-RL sums every metric that it does not know.
ADDITIVE = ("prob_diff_mean", "out_of_region", "unscored")
MUST_BE = {
    "force_on_policy_ratio": (False, "the ratio to the sampler is what the objective is about"),
    "disable_ppo_ratio": (False, "the ratio to the sampler is what the objective is about"),
    "sequence_level_importance_ratios": (False, "GSPO is written as the objective 'gspo(...)'"),
    "use_cispo": (False, "CISPO is written as the objective 'cispo(...)'"),
    "ratio_clip_c": (None, "the objective is the only trust region"),
    "truncated_importance_sampling_type": (None, "there is no ratio of the previous policy to the sampler to truncate"),
    "truncated_importance_sampling_ratio": (
        None,
        "there is no ratio of the previous policy to the sampler to truncate",
    ),
}


class ReweightedLoss:
    """NeMo-RL's clipped policy-gradient loss with an objective's gradient; made by `reweighted`.

        framework(logp, prev := mu, A := A w),  its clip at (0, inf)

    All other attributes are those of the framework's loss.

    Args:
        framework: a `ClippedPGLossFn` with its clip off.
        objective: a token-wise objective, or GSPO.
    """

    def __init__(self, framework: Any, objective: Objective) -> None:
        self._framework = framework
        self._objective = objective

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # during unpickling the framework's loss is missing
            raise AttributeError(name)
        return getattr(self._framework, name)

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the framework's loss and metrics, with shares and a count "drpo/..." that add up over micro-batches.

        Args:
            next_token_logprobs: [B, S - 1], nats, of the tokens 1 .. S - 1.
            data: `token_mask`, `advantages` and `generation_logprobs`, [B, S], and `sample_mask`, [B], are read here.
            global_valid_seqs: a scalar, the framework's divisor.
            global_valid_toks: the same for tokens.
        """
        keep = data["token_mask"][:, 1:].bool() & data["sample_mask"].bool().unsqueeze(1)
        unfiltered = data.get("curr_logprobs_keep_mask")
        if unfiltered is not None:
            keep = keep & unfiltered.bool()
        generated = data["generation_logprobs"]
        columns = (self._objective, next_token_logprobs, generated[:, 1:], data["advantages"][:, 1:], keep)
        sampler = _after_first(generated, behavior_or_policy(next_token_logprobs, generated[:, 1:], keep))
        reweighted_data = dict(data) | {
            "advantages": _after_first(data["advantages"], reweight(*columns)),
            "generation_logprobs": sampler,
            "prev_logprobs": sampler,
        }
        loss, metrics = self._framework(next_token_logprobs, reweighted_data, global_valid_seqs, global_valid_toks)
        region, share = figures(*columns), keep.sum() / global_valid_toks
        shares = {f"drpo/{name}": (region[name] * share).item() for name in ADDITIVE if name in region}
        ran = loss_tokens_key(self._objective)
        return loss, metrics | shares | {f"drpo/{ran}": region[ran].item()}


def reweighted(framework: Any, objective: str | None) -> ReweightedLoss:
    """Return NeMo-RL's loss with an objective's gradient; train with it in place of the original.

    Args:
        framework: the `ClippedPGLossFn` that NeMo-RL's `setup` returns; not changed.
        objective: its spec, such as "drpo(0.2)".

    Returns:
        A loss with the objective's gradient; its value is not the objective's.

    Raises:
        InputError: no objective, or an incompatible setting of `loss_fn`.

    Example:
        >>> from types import SimpleNamespace
        >>> loss_fn = SimpleNamespace(input_type=SimpleNamespace(value="logprob"), ratio_clip_c=3.0)
        >>> reweighted(loss_fn, "drpo(0.2)")
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: loss_fn.ratio_clip_c=3.0: must be null, since the objective is the only trust region
    """
    parsed = objective_of(objective, "loss_fn.drpo_objective")
    if getattr(getattr(framework, "input_type", None), "value", None) != "logprob":
        raise InputError(
            f"loss_fn {type(framework).__name__}: must take log-probabilities, as ClippedPGLossFn does in NeMo-RL's "
            "nemo_rl/algorithms/loss/loss_functions.py; older ones take logits"
        )
    for name, (wanted, why) in MUST_BE.items():
        value = getattr(framework, name, wanted)
        if value != wanted:
            raise InputError(f"loss_fn.{name}={value}: must be {'null' if wanted is None else 'false'}, since {why}")
    unclipped = copy.copy(framework)
    unclipped.ratio_clip_min, unclipped.ratio_clip_max = 1.0, float("inf")
    normalizers = getattr(framework, "metric_normalizations", None)
    if normalizers is not None:
        by_tokens = normalizers["probs_ratio"]
        unclipped.metric_normalizations = normalizers | {f"drpo/{name}": by_tokens for name in ADDITIVE}
    return ReweightedLoss(unclipped, parsed)


def _after_first(whole: Tensor, rest: Tensor) -> Tensor:
    """Return [B, S] from [B, S] and [B, S - 1]: the first column of one, then the other; token 0 has no prediction."""
    changed = whole.clone()
    changed[:, 1:] = rest
    return changed
