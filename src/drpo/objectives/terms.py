"""Additive terms: KL to a reference model and the entropy bonus. Off unless asked for."""

import torch
from torch import Tensor

from drpo.objectives._check import require, require_one_of
from drpo.objectives.contract import MAX_LOG_RATIO


def reference_kl(logp: Tensor, reference_logp: Tensor, behavior_logp: Tensor, estimator: str = "k2") -> Tensor:
    """Return an estimate per token whose gradient descends KL(pi || reference).

        k2: sg(r) (l - l_ref)^2 / 2          k3: sg(r) (e^(l_ref - l) - 1 - (l_ref - l))

    With sg(r) = pi / mu, the expectation over mu of k2's gradient *is* the gradient of KL(pi || reference), for any mu.
    k3's is not: it is the gradient of KL(reference || pi), and agrees only where pi is near the reference. Neither
    value is an unbiased estimate of the KL; they are here for their gradients.

    That KL is of one token given its context, exact for each context that mu visits. It is not the KL of whole texts:
    a token's gradient does not see the KL of the tokens after it, to which it leads. Of texts of two tokens the summed
    gradient is off that of the texts' KL by a third of its L2 norm, that of the first token by 46 % (means over 200
    pairs of policies, 5 tokens, unit-normal logits, on-policy: tests/test_terms.py). Exact for the text is k1 of
    each token in the reward, summed over the later tokens: `drpo.credit.reference_kl`.

    Args:
        logp: [T] log pi, nats, carries the gradient.
        reference_logp: [T] log-probability under the reference model, nats.
        behavior_logp: [T] log mu, nats.
        estimator: "k2" (exact gradient) or "k3" (biased, as said).

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
    """Return what to add to each token's advantage to descend coefficient * KL(pi || reference): k1 in the reward.

        -coefficient sg(l - l_ref)

    Args:
        logp: [T] log pi, nats.
        reference_logp: [T] nats.
        coefficient: >= 0.

    Returns:
        [T], detached. With the surrogate -r A its expected gradient is exact for each context, as k2's is in the loss,
        and as little for the whole text: see `reference_kl`.

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

    The entropy is the whole distribution's, from `drpo.ops.linear_logprob`, not a one-sample estimate, so its gradient
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
