"""A paper's method = objective + advantage + reduction, with its citation."""

from dataclasses import dataclass

from drpo import reductions
from drpo.credit import advantages
from drpo.credit.advantages import Advantage
from drpo.objectives import DPPO, DRPO, GSPO, SPO, Objective, PPOClip
from drpo.reductions import Horizon, Reduction


@dataclass(frozen=True)
class Method:
    """A paper's objective, advantage and reduction.

    Args:
        objective: loss per token.
        advantage: rewards of a group -> advantages.
        reduction: weight per token.
        source: the paper.

    Example:
        >>> grpo().advantage is advantages.zscore, drpo(horizon=1024).reduction
        (True, Horizon(tokens=1024))
    """

    objective: Objective
    advantage: Advantage
    reduction: Reduction
    source: str


def grpo() -> Method:
    """Group Relative Policy Optimization: clip 0.2, z-scored rewards, mean over each completion."""
    return Method(PPOClip(0.2, 0.2), advantages.zscore, reductions.sequence_mean, "arXiv 2402.03300")


def dr_grpo(horizon: int = 3000) -> Method:
    """GRPO done right: no division by the standard deviation, none by the completion's own length."""
    return Method(PPOClip(0.2, 0.2), advantages.mean, Horizon(horizon), "arXiv 2503.20783")


def dapo() -> Method:
    """DAPO's loss: clip-higher and the mean over tokens, without its dynamic sampling."""
    return Method(PPOClip(0.2, 0.28), advantages.zscore, reductions.token_mean, "arXiv 2503.14476")


def gspo() -> Method:
    """Group Sequence Policy Optimization: one ratio per completion."""
    return Method(GSPO(3e-4, 4e-4), advantages.zscore, reductions.sequence_mean, "arXiv 2507.18071")


def spo(epsilon: float = 12.5, horizon: int = 8192) -> Method:
    """Simple Policy Optimization as the DRPO paper's baseline."""
    return Method(SPO(epsilon), advantages.mean, Horizon(horizon), "arXiv 2401.16025")


def dppo(delta: float = 0.15, horizon: int = 8192) -> Method:
    """Divergence PPO (Binary-TV) as the DRPO paper's baseline."""
    return Method(DPPO(delta), advantages.mean, Horizon(horizon), "arXiv 2602.04879")


def drpo(delta: float = 12.5, horizon: int = 8192) -> Method:
    """Divergence Regularized Policy Optimization, in the paper's setting."""
    return Method(DRPO(delta), advantages.mean, Horizon(horizon), "arXiv 2606.09821")
