"""Checks of a batch's tokens that report problems as plain sentences, for custom training loops."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from drpo.checks import slack
from drpo.objectives.contract import require_tokens, unchecked
from drpo.objectives.ratios import MAX_LOG_RATIO, log_ratio, ratio
from drpo.types import Tokens

MOST_CAPPED = 1e-3
LEAST_TOKENS = 200
"""With fewer tokens the mean ratio is not checked."""
SIGMAS = 5.0
LEAST_GAP = 0.05
"""A mean ratio nearer to 1 is not reported."""
LARGEST_SHARE = 0.25
"""Largest share of one token in the squared deviations; above it the standard error is not meaningful."""


def diagnose(tokens: Tokens) -> list[str]:
    """Return the problems of the kept tokens, one sentence each; empty without problems.

    Checks for log-probabilities that are NaN, positive or -inf; ratios beyond the cap e^20; advantages that are not
    finite, all 0, or all equal; and the mean ratio. Over tokens sampled from mu, E[pi / mu] = 1 for every pi. A mean
    ratio off by 5 standard errors and by 0.05 is reported, unless there are fewer than 200 tokens, or one large ratio
    makes up a quarter of the spread. Synchronises with a GPU.

    Args:
        tokens: T tokens of a batch that the policy has not been trained on.

    Example:
        >>> logp = torch.full((400,), -1.0)
        >>> advantage = torch.arange(400.0)
        >>> same = (torch.ones(400).bool(), torch.arange(400))
        >>> diagnose(Tokens(logp, logp, advantage, *same))
        []
        >>> diagnose(Tokens(logp - 0.5 - 0.1 * advantage.sin(), logp, 0 * advantage, *same))[0]
        'every advantage is 0: nothing is trained; are all rewards of a group equal?'
    """
    require_tokens(tokens)
    kept = tokens.keep
    if not kept.any():
        return ["no token is kept: nothing is trained"]
    columns = {name: v[kept].detach() for name, v in vars(tokens).items() if v is not None}
    broken = [line for name in ("logp", "behavior_logp") for line in _of_logp(name, columns[name])]
    lines = [*broken, *_of_advantage(columns["advantage"])]
    if any("NaN" in line or "positive" in line for line in broken):
        return lines  # their ratios are meaningless
    kept_tokens = unchecked(**columns)
    return [*lines, *_of_ratio(ratio(kept_tokens).double(), log_ratio(kept_tokens))]


def _of_logp(name: str, values: Tensor) -> Iterator[str]:
    n = len(values)
    kinds = {
        "NaN": (values.isnan(), "the logits that it was computed from are broken"),
        "positive": (values > slack(values.dtype), "a log-probability is at most 0; are these probabilities?"),
        "-inf": (values == -torch.inf, "a token of probability 0 cannot have been sampled; is its support truncated?"),
    }
    for kind, (where, cause) in kinds.items():
        if where.any():
            yield f"{name} is {kind} at {int(where.sum())} of {n} tokens: {cause}"


def _of_advantage(values: Tensor) -> Iterator[str]:
    n_wrong = int((~values.isfinite()).sum())
    if n_wrong:
        yield f"advantage is not finite at {n_wrong} of {len(values)} tokens"
    elif not values.any():
        yield "every advantage is 0: nothing is trained; are all rewards of a group equal?"
    elif len(values) > 1 and bool((values == values[0]).all()):
        yield f"every advantage is {float(values[0]):g}: nothing is compared; is the mean of the group taken off?"


def _of_ratio(r: Tensor, log_r: Tensor) -> Iterator[str]:
    n, capped = len(r), float((log_r > MAX_LOG_RATIO).double().mean())
    if capped > MOST_CAPPED:
        yield f"{capped:.1%} of the ratios are beyond e^20: the log-probabilities are not of the same tokens"
    if n < LEAST_TOKENS:
        return
    mean, squares = float(r.mean()), (r - r.mean()).square()
    error = math.sqrt(float(squares.mean()) / n)
    steady = float(squares.max()) <= LARGEST_SHARE * float(squares.sum())
    if abs(mean - 1) > max(LEAST_GAP, SIGMAS * error) and (steady or mean > 1):
        yield (
            f"the mean of pi/mu is {mean:.2f} (standard error {error:.2g}), not 1, over tokens that mu drew: is the "
            "temperature the sampler's, is top-p or top-k off, are the log-probabilities those of these tokens?"
        )
