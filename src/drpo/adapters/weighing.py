"""Shared by all adapters: from padded rows to a reweighted advantage or a loss per token."""

import re
import warnings
from importlib import metadata

import torch
from packaging.version import Version
from torch import Tensor

from drpo import objectives
from drpo.checks import slack
from drpo.errors import BrokenLogpError, InputError
from drpo.objectives import (
    Objective,
    Tokens,
    gradient,
    gradient_weight,
    needed_divergence,
    out_of_region,
    reads_batch,
)
from drpo.objectives.contract import ask, masked_safe, require_objective, unchecked
from drpo.objectives.ratios import prob_diff
from drpo.spec import format_spec, parse_spec

MAX_EXPONENT = 80.0
"""Bound on log-ratios: float32 overflows soon after e^80; no sampled token reaches it."""

MOST_BROKEN = 1e-3
"""The share of broken log-probabilities among a call's kept tokens that stops the training; one token never does."""

UNREPORTED = -9900.0
"""No sampled token is as unlikely: vLLM's server sends -9999 where it has no log-probability, in bfloat16 -9984."""

LOSS_TOKENS = "loss_tokens/"
"""Prefix of the figure that tells with which objective a loss ran, and on how many tokens."""


def reweight(
    objective: Objective,
    logp: Tensor,
    behavior_logp: Tensor,
    advantage: Tensor,
    keep: Tensor,
    sequence: Tensor | None = None,
) -> Tensor:
    """Return the advantage with which the plain importance-sampled loss has an objective's gradient.

        A' = A w = -(dL / dlogp) / r,   so that   d(-r A') / dlogp = dL / dlogp,   r = pi / mu

    Call it at every forward pass, because w changes with the policy. The framework's loss then has the objective's
    gradient, but not its value. For an objective that is not weighted by the advantage, A' may be nonzero where A is 0.

    Args:
        objective: any that does not require a top-K divergence. A sequence-level one (GSPO) is exact if the framework
            weights all tokens of a sequence equally.
        logp: [B, T] or [T], nats, at the sampling temperature; the current policy.
        behavior_logp: the same shape, nats; the sampler's. NaN, infinite and positive values and vLLM's -9999 are
            replaced by the policy's.
        advantage: the same shape, or [B] or [B, 1] for rows; reward units.
        keep: the same shape as `logp`, bool or 0 and 1; True where a token is trained. Values elsewhere, NaN
            included, have no effect.
        sequence: the same shape, int; the index of the token's completion. Without it each row is a completion.

    Returns:
        The shape of `logp`, detached, float32 or wider; 0 where a token is not kept.

    Raises:
        InputError: shapes that do not fit, or an advantage that is not finite.
        BrokenLogpError: log-probabilities that are NaN, infinite or positive, at more than a thousandth of the kept
            tokens and at more than one.

    Example:
        >>> from drpo.objectives import DRPO
        >>> pi, mu = torch.tensor([[0.5, 0.3, 0.9]]), torch.tensor([[0.4, 0.3, 1.0]])
        >>> yes = torch.tensor([[1, 1, 0]])
        >>> reweight(DRPO(0.2), pi.log(), mu.log(), torch.tensor([2.0]), yes).round(decimals=3)
        tensor([[1., 2., 0.]])

    Source: DRPO, arXiv 2606.09821, Table 1 (the gradient weight w).
    """
    tokens = _tokens(objective, logp, behavior_logp, advantage, keep, sequence)
    safe = masked_safe(tokens)
    log_ratio = (safe.logp.detach() - safe.behavior_logp).clamp(-MAX_EXPONENT, MAX_EXPONENT)
    weighed = -gradient(objective, tokens) / torch.exp(log_ratio)
    return torch.where(tokens.keep, weighed, torch.zeros_like(weighed)).reshape(logp.shape)


def token_loss(
    objective: Objective,
    logp: Tensor,
    behavior_logp: Tensor,
    advantage: Tensor,
    keep: Tensor,
    sequence: Tensor | None = None,
) -> Tensor:
    """Return an objective's loss per token, for a framework that accepts a loss and reduces it.

    Args:
        objective: as of `reweight`.
        logp: [B, T] or [T]; the only input with a gradient.
        behavior_logp: as of `reweight`.
        advantage: as of `reweight`.
        keep: as of `reweight`.
        sequence: as of `reweight`.

    Returns:
        The shape of `logp`, float32 or wider, to be minimised; exactly 0, with gradient 0, where a token is not kept.

    Raises:
        InputError: shapes that do not fit, or an advantage that is not finite.
        BrokenLogpError: log-probabilities that are NaN, infinite or positive, at more than a thousandth of the kept
            tokens and at more than one.

    Example:
        >>> from drpo.objectives import DRPO
        >>> logp = torch.tensor([[-0.5, -0.7]]).requires_grad_()
        >>> token_loss(DRPO(0.2), logp, logp.detach(), torch.tensor([2.0]), torch.tensor([[1, 0]]))
        tensor([[-2., 0.]], grad_fn=<ViewBackward0>)
    """
    tokens = _tokens(objective, logp, behavior_logp, advantage, keep, sequence)
    loss = ask(objective, tokens).loss
    return torch.where(tokens.keep, loss, torch.zeros_like(loss)).reshape(logp.shape)


def behavior_or_policy(logp: Tensor, behavior_logp: Tensor, keep: Tensor) -> Tensor:
    """Return the sampler's log-probabilities, with the policy's where they are missing.

    They are missing where a token is not kept or was not scored (NaN, infinite, positive beyond rounding, or vLLM's
    -9999). The ratio there is 1, so a framework that multiplies by its mask meets no NaN.

    Args:
        logp: [B, T] or [T], nats.
        behavior_logp: the same shape, nats, possibly NaN.
        keep: the same shape, bool or 0 and 1.

    Returns:
        The same shape, detached.

    Example:
        >>> nan = float("nan")
        >>> policy, sampler = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-1.5, nan, -9999.0, 0.0])
        >>> behavior_or_policy(policy, sampler, keep=torch.tensor([1, 1, 1, 0]))
        tensor([-1.5000, -2.0000, -3.0000, -4.0000])
    """
    usable = keep.bool() & ~_unscored(behavior_logp)
    return torch.where(usable, behavior_logp, logp.detach().to(behavior_logp.dtype))


def figures(
    objective: Objective, logp: Tensor, behavior_logp: Tensor, advantage: Tensor, keep: Tensor
) -> dict[str, Tensor]:
    """Return figures of the trust region for a framework's log, over kept tokens.

    Args:
        objective: as of `reweight`.
        logp: as of `reweight`.
        behavior_logp: as of `reweight`.
        advantage: as of `reweight`.
        keep: as of `reweight`.

    Returns:
        Scalars, detached: `prob_diff_mean` and `prob_diff_max` of |pi - mu|; `out_of_region`, the share of tokens
        out of the region, where the objective has one; `weight_min`, the least gradient weight; `unscored`, the share
        whose mu the sampler did not report; `loss_tokens/<objective>`, the number of kept tokens, under the objective's
        name. Where no token is kept: 0, and 1 for `weight_min`.

    Example:
        >>> from drpo.objectives import DRPO
        >>> pi, mu = torch.tensor([[0.5, 0.3]]), torch.tensor([[0.1, 0.3]])
        >>> shown = figures(DRPO(0.2), pi.log(), mu.log(), torch.ones(1), torch.ones(1, 2))
        >>> {name: round(value.item(), 2) for name, value in shown.items()}
        {'prob_diff_mean': 0.2, 'prob_diff_max': 0.4, 'out_of_region': 0.5, 'weight_min': -1.0, 'unscored': 0.0,
        'loss_tokens/drpo_0.2': 2.0}
    """
    tokens = _tokens(objective, logp.detach(), behavior_logp, advantage, keep, None)
    safe = masked_safe(tokens)
    moved = prob_diff(safe).abs()
    n_kept = tokens.keep.sum().clamp(min=1)
    unscored = keep.bool() & _unscored(behavior_logp)
    left = out_of_region(objective, safe)
    return {
        "prob_diff_mean": moved.sum() / n_kept,
        "prob_diff_max": moved.max(),
        **({} if left is None else {"out_of_region": (left & tokens.keep).sum() / n_kept}),
        "weight_min": torch.where(tokens.keep, gradient_weight(objective, tokens), torch.inf)
        .min()
        .nan_to_num(posinf=1),
        "unscored": unscored.sum() / n_kept,
        loss_tokens_key(objective): tokens.keep.sum().to(moved.dtype),
    }


def loss_tokens_key(objective: Objective) -> str:
    """Return the name of the figure `loss_tokens/<objective>`, in letters that every logger takes.

    Example:
        >>> from drpo.objectives import PPOClip
        >>> loss_tokens_key(PPOClip(0.2, 0.28))
        'loss_tokens/ppo_0.2_0.28'
    """
    try:
        spec = format_spec(objective, objectives.REGISTRY)
    except InputError:  # an object that no spec names
        spec = type(objective).__name__
    return LOSS_TOKENS + re.sub(r"[^\w.-]+", "_", spec).strip("_")


def objective_of(text: str | None, field: str) -> Objective:
    """Build the objective of the spec in a framework's configuration.

    Args:
        text: its spec.
        field: the user's setting, for messages.

    Raises:
        InputError: no spec, an unknown objective, or an objective with a top-K divergence, statistics of the batch or
            a proximal policy, a reference model or the reward of each answer, which no framework hands to its loss.

    Example:
        >>> objective_of("drpo(0.2)", "objective")
        DRPO(delta=0.2, power=0.0, outside=None, advantage_weighted=True)
        >>> objective_of(None, "objective")
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: objective is not set: write the objective with its radius, such as objective='drpo(0.2)'
    """
    if not text:
        raise InputError(f"{field} is not set: write the objective with its radius, such as {field}='drpo(0.2)'")
    objective = parse_spec(text, objectives.REGISTRY)
    require_objective(objective)
    if reads_batch(objective):
        raise InputError(
            f"{field}={text!r} reads statistics of the whole optimiser batch, of which this framework hands its loss "
            "one micro-batch at a time; use an objective of tokens or sequences, such as 'cppo(0.2)' or 'vespo'"
        )
    if "proximal_logp" in objective.needs:
        raise InputError(
            f"{field}={text!r} reads the policy's log-probabilities of before the updates besides the sampler's; leave "
            "'*proximal' (in vespo: max_ratio) out: the ratio is to the sampler's own then"
        )
    if "score" in objective.needs:
        raise InputError(
            f"{field}={text!r} reads the reward of each answer, and this framework hands its loss advantages alone; "
            "use an objective of advantages, such as \"reinforce*weight('token', 1.0)\""
        )
    if "reference_logp" in objective.needs:
        raise InputError(
            f"{field}={text!r} reads the log-probabilities of a reference model, which this framework does not hand to "
            "its loss here; use its own KL to a reference model beside an objective such as 'drpo(0.2)'"
        )
    if needed_divergence(objective.needs) is not None:
        raise InputError(
            f"{field}={text!r} reads the sampler's top-K log-probabilities, which this framework does not hand to its "
            "loss; use the sampled token's divergence, such as 'dppo(0.15)'"
        )
    return objective


def warn_untested(package: str, first: str, last: str) -> None:
    """Warn, once, if the installed framework is older or newer than the tested versions.

    Args:
        package: its name in the package index.
        first: the oldest version tested.
        last: the newest version tested.

    Example:
        >>> warn_untested("torch", "2.0", "99")
    """
    installed = metadata.version(package)
    if not Version(first) <= Version(Version(installed).base_version) <= Version(last):
        warnings.warn(
            f"{package} {installed} is not between {first} and {last}, which drpo's adapter is tested with: compare a "
            "gradient before you trust it (docs/frameworks.md)",
            stacklevel=2,
        )


def _tokens(
    objective: Objective,
    logp: Tensor,
    behavior_logp: Tensor,
    advantage: Tensor,
    keep: Tensor,
    sequence: Tensor | None,
) -> Tokens:
    """Flatten the columns to one list of tokens."""
    for name, values in (("behavior_logp", behavior_logp), ("keep", keep), ("sequence", sequence)):
        if values is not None and values.shape != logp.shape:
            raise InputError(f"{name} {list(values.shape)}: must have the shape of logp, {list(logp.shape)}")
    if sequence is None:
        rows = torch.arange(len(logp), device=logp.device).unsqueeze(1) if logp.dim() == 2 else keep.new_zeros(())
        sequence = rows.expand(logp.shape)
    spread = _spread(advantage.detach(), logp)
    _require_numbers(logp, behavior_logp, spread, keep.bool())
    mu = behavior_or_policy(logp, behavior_logp.detach(), keep)
    columns = {"logp": logp, "behavior_logp": mu, "advantage": spread, "keep": keep.bool(), "sequence": sequence.long()}
    return unchecked(**{name: values.reshape(-1) for name, values in columns.items()}, divergence=None)


def _broken(logp: Tensor) -> Tensor:
    """Return where a value is not a log-probability: NaN, infinite, or positive beyond rounding."""
    return ~(logp.isfinite() & (logp <= slack(logp.dtype)))


def _unscored(behavior_logp: Tensor) -> Tensor:
    """Return where the sampler reported no log-probability."""
    return _broken(behavior_logp) | (behavior_logp <= UNREPORTED)


def _require_numbers(logp: Tensor, behavior_logp: Tensor, advantage: Tensor, keep: Tensor) -> None:
    """Raise if more than a thousandth of the kept tokens have no log-probability, or any has no advantage.

    Takes one device sync. A call may cover part of an update, so a single token never raises.
    """
    if torch.compiler.is_compiling():
        return
    wrong = (keep, keep & _broken(logp), keep & _unscored(behavior_logp), keep & ~advantage.isfinite())
    n_kept, *counts, n_advantage = torch.stack([mask.sum() for mask in wrong]).tolist()
    for name, n in zip(("logp (the policy's)", "behavior_logp (the sampler's)"), counts, strict=True):
        if n > max(1, MOST_BROKEN * n_kept):
            raise BrokenLogpError(
                f"{name}: NaN, infinite or positive (or vLLM's -9999) at {n} of {n_kept} kept tokens, more than a "
                "thousandth: they or the framework's mask are broken; look at the log-probabilities that the framework "
                "hands over"
            )
    if n_advantage:
        raise InputError(
            f"advantage: NaN or infinite at {n_advantage} of {n_kept} kept tokens; is a reward not a number?"
        )


def _spread(advantage: Tensor, logp: Tensor) -> Tensor:
    """Broadcast advantages to tokens, [B, T] or [T]."""
    column = advantage.unsqueeze(1) if logp.dim() == 2 and advantage.dim() == 1 else advantage
    if column.shape not in (logp.shape, (*logp.shape[:-1], 1)):
        raise InputError(
            f"advantage {list(advantage.shape)}: must have the shape of logp, {list(logp.shape)}, or one value a row"
        )
    return column.expand(logp.shape)
