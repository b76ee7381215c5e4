"""Optional additive terms: the KL to a reference model and the entropy bonus."""

import torch
from torch import Tensor

from drpo.objectives._check import require, require_one_of
from drpo.objectives.ratios import MAX_LOG_RATIO


def reference_kl(logp: Tensor, reference_logp: Tensor, behavior_logp: Tensor, estimator: str = "k2") -> Tensor:
    """Return a loss per token whose gradient descends KL(pi || reference).

        k2: sg(r) (l - l_ref)^2 / 2          k3: sg(r) (e^(l_ref - l) - 1 - (l_ref - l))

    With sg(r) = pi / mu, the expected gradient of k2 under any mu equals the gradient of KL(pi || reference). The
    expected gradient of k3 is that of KL(reference || pi), which agrees only where pi is near the reference. Neither
    value is an unbiased estimate of the KL; use them for their gradients.

    This KL is of one token given its context, exact for each context that mu visits. It is not the KL of whole texts:
    a token's gradient ignores the KL of the later tokens that it leads to. For texts of two tokens the summed gradient
    differs from that of the texts' KL by a third of its L2 norm, and the first token's by 46 % (means over 200 pairs of
    policies, 5 tokens, unit-normal logits, on-policy: tests/test_terms.py). `drpo.credit.reference_kl` is exact for
    whole texts: it subtracts k1 from each token's reward.

    Args:
        logp: [T] log pi, nats, carries the gradient.
        reference_logp: [T] log-probability under the reference model, nats.
        behavior_logp: [T] log mu, nats.
        estimator: "k2" (exact gradient) or "k3" (biased, see above).

    Returns:
        [T], >= 0.

    Raises:
        InputError: an unknown estimator.

    Example:
        >>> reference_kl(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([-1.0]))
        tensor([0.5000])

    Source: J. Schulman, "Approximating KL divergence" (2020) for k1 to k3; the gradients are tested by enumeration.
    """
    require_one_of("estimator", estimator, ("k2", "k3"))
    weight = (logp - behavior_logp).detach().clamp(max=MAX_LOG_RATIO).exp()
    gap = torch.where(weight > 0, reference_logp - logp, 0)  # before it is squared: 0 * inf where pi = 0
    return weight * (gap.square() / 2 if estimator == "k2" else torch.expm1(gap) - gap)


def reference_kl_advantage(logp: Tensor, reference_logp: Tensor, coefficient: float) -> Tensor:
    """Return an addition to each token's advantage that descends coefficient * KL(pi || reference): k1 in the reward.

        -coefficient sg(l - l_ref)

    Args:
        logp: [T] log pi, nats.
        reference_logp: [T] nats.
        coefficient: >= 0.

    Returns:
        [T], detached. With the surrogate -r A its expected gradient is exact for each context, as that of k2 in the
        loss, but not for whole texts: see `reference_kl`.

    Raises:
        InputError: a negative coefficient.

    Example:
        >>> reference_kl_advantage(torch.tensor([-1.0]), torch.tensor([-2.0]), 0.1)
        tensor([-0.1000])
    """
    require("coefficient", coefficient, above=0, closed=True)
    return -coefficient * (logp - reference_logp).detach()


def entropy_bonus(entropy: Tensor, coefficient: float) -> Tensor:
    """Return the loss -coefficient * H(pi(. | context)) per token.

    `drpo.ops.linear_logprob` returns the entropy of the whole distribution, not a one-sample estimate, so the gradient
    is exact at every visited context.

    Args:
        entropy: [T] nats, carries the gradient.
        coefficient: >= 0.

    Returns:
        [T].

    Raises:
        InputError: a negative coefficient.

    Example:
        >>> entropy_bonus(torch.tensor([2.0]), 0.01)
        tensor([-0.0200])
    """
    require("coefficient", coefficient, above=0, closed=True)
    return -coefficient * entropy
