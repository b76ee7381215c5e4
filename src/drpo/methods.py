"""A paper's method: objective, credit, reduction and rule about length together, with its citation.

`METHODS` has them by name, for `drpo train RECIPE --method NAME`; in Python `drpo.methods.dapo()`.
"""

import inspect
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from drpo import objectives, reductions
from drpo.credit import advantages, gae, overlong
from drpo.credit.advantages import Advantage
from drpo.credit.gae import GAE
from drpo.credit.overlong import Overlong, Shaped
from drpo.errors import InputError, nearest
from drpo.objectives import CISPO, DPPO, DRPO, GMPO, GSPO, M2PO, SAPO, SPO, ImportanceSampling, Objective, PPOClip
from drpo.reductions import Horizon, Reduction
from drpo.spec import Registry, format_spec, parse_spec


@dataclass(frozen=True)
class Method:
    """What a paper sets together.

    Args:
        objective: loss per token.
        advantage: rewards of a group -> advantages; `advantages.mean`, unused, with a critic.
        reduction: weight per token.
        source: the paper.
        critic: gives every token its advantage, or None.
        whiten: whiten the advantages of the whole rollout.
        overlong: the rule about long completions, or None.
        dynamic_sampling: how often a group of equal rewards is sampled again, at most.
        without: what the paper has besides and this does not set, and the option that does, with its value; empty
            where nothing.

    Example:
        >>> grpo().advantage is advantages.zscore, drpo(horizon=1024).reduction
        (True, Horizon(tokens=1024))
    """

    objective: Objective
    advantage: Advantage
    reduction: Reduction
    source: str
    critic: GAE | None = None
    whiten: bool = False
    overlong: Overlong | None = None
    dynamic_sampling: int = 0
    without: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """The options of `drpo train` that it sets, each with its value; `drpo.train.config.configure` takes them."""
        return {name: getattr(self, name) for name in OPTIONS}


OPTIONS: Mapping[str, Registry[Any] | None] = {
    "objective": objectives.REGISTRY,
    "advantage": advantages.REGISTRY,
    "critic": gae.REGISTRY,
    "whiten": None,
    "reduction": reductions.REGISTRY,
    "overlong": overlong.REGISTRY,
    "dynamic_sampling": None,
}
"""What a method sets: the name of the option, and the registry of its spec."""


ATTEMPTS = 3
"""Further attempts at a prompt whose rewards are all equal. DAPO draws other prompts, until its batch is full."""


def grpo() -> Method:
    """Group Relative Policy Optimization: clip 0.2, z-scored rewards, mean over each completion."""
    return Method(
        PPOClip(0.2, 0.2),
        advantages.zscore,
        reductions.sequence_mean,
        "arXiv 2402.03300",
        without="its KL to the initial model, 0.04: --reference-kl 0.04",
    )


def dr_grpo(horizon: int = 3000) -> Method:
    """GRPO done right: no division by the standard deviation, none by the completion's own length."""
    return Method(PPOClip(0.2, 0.2), advantages.mean, Horizon(horizon), "arXiv 2503.20783")


def dapo() -> Method:
    """DAPO: clip-higher, mean over tokens, dynamic sampling, a soft punishment of the last fifth before the limit."""
    return Method(
        PPOClip(0.2, 0.28),
        advantages.zscore,
        reductions.token_mean,
        "arXiv 2503.14476",
        overlong=Shaped(),
        dynamic_sampling=ATTEMPTS,
    )


def gdpo() -> Method:
    """GDPO: GRPO with each reward of a sum normalised within the group by itself, then over the rollout.

    Without a KL to the initial model, as the authors' script for verl trains.
    """
    return Method(
        PPOClip(0.2, 0.2),
        advantages.gdpo,
        reductions.sequence_mean,
        "arXiv 2601.05242",
    )


def gspo() -> Method:
    """Group Sequence Policy Optimization: one ratio per completion."""
    return Method(GSPO(3e-4, 4e-4), advantages.zscore, reductions.sequence_mean, "arXiv 2507.18071")


def luspo() -> Method:
    """Length-Unbiased Sequence Policy Optimization: GSPO whose sequences count as often as they are long.

    The factor n_i of the paper cancels the 1/n_i within a sequence's ratio: every token weighs the same, 1/S.
    """
    return Method(GSPO(3e-4, 4e-4), advantages.zscore, Horizon(1), "arXiv 2602.05261")


def gmpo() -> Method:
    """Geometric-Mean Policy Optimization: one geometric mean per completion of ratios that are clipped one by one."""
    return Method(GMPO(0.4, 0.4), advantages.zscore, reductions.sequence_mean, "arXiv 2507.20673")


def m2po() -> Method:
    """Second-Moment Trust Policy Optimization: a clip whose bounds the batch sets, mean over tokens."""
    return Method(M2PO(0.04), advantages.zscore, reductions.token_mean, "arXiv 2510.01161")


def cispo() -> Method:
    """CISPO of MiniMax-M1: the weight clipped from above alone, mean over tokens, DAPO's sampling and length rule.

    The paper does not state its upper bound; 5 is that of ScaleRL (arXiv 2510.13786).
    """
    return Method(
        CISPO(1.0, 4.0),
        advantages.zscore,
        reductions.token_mean,
        "arXiv 2506.13585",
        overlong=Shaped(),
        dynamic_sampling=ATTEMPTS,
    )


def sapo() -> Method:
    """Soft Adaptive Policy Optimization: a soft gate on the ratio."""
    return Method(SAPO(1.0, 1.05), advantages.zscore, reductions.sequence_mean, "arXiv 2511.20347")


def ppo() -> Method:
    """PPO with a critic, as InstructGPT uses it: GAE(1, 0.95), whitened; clip 0.2; the mean over tokens."""
    return Method(
        PPOClip(0.2, 0.2),
        advantages.mean,
        reductions.token_mean,
        "arXiv 1707.06347, 2203.02155",
        critic=GAE(1.0, 0.95),
        without="InstructGPT's KL in the reward, 0.02: --kl-in-reward 0.02",
    )


def rloo() -> Method:
    """REINFORCE with a leave-one-out baseline: the log-probability of a whole completion, summed over its tokens."""
    return Method(
        ImportanceSampling(),
        advantages.rloo,
        Horizon(1),
        "arXiv 2402.14740",
        without="its KL in the reward, 0.03 to 0.1: --kl-in-reward 0.03",
    )


def reinforce_plus_plus() -> Method:
    """REINFORCE++: rewards whitened over the whole rollout, no baseline within a group; clip 0.2, mean over tokens."""
    kl = "its KL in the reward, 1e-4 in OpenRLHF's script: --kl-in-reward 1e-4"
    return _reinforce_plus_plus(advantages.reward, without=kl)


def reinforce_plus_plus_baseline() -> Method:
    """REINFORCE++ with baseline: a group's mean is subtracted, then the whole rollout is whitened."""
    kl = "its KL to the initial model, 1e-5 in OpenRLHF's script: --reference-kl 1e-5"
    return _reinforce_plus_plus(advantages.mean, without=kl)


def _reinforce_plus_plus(advantage: Advantage, without: str) -> Method:
    objective = PPOClip(0.2, 0.2)
    return Method(objective, advantage, reductions.token_mean, "arXiv 2501.03262", whiten=True, without=without)


def spo(epsilon: float = 12.5, horizon: int = 8192) -> Method:
    """Simple Policy Optimization as the DRPO paper's baseline."""
    return Method(SPO(epsilon), advantages.mean, Horizon(horizon), "arXiv 2401.16025")


def dppo(delta: float = 0.15, horizon: int = 8192) -> Method:
    """Divergence PPO (Binary-TV) as the DRPO paper's baseline."""
    return Method(DPPO(delta), advantages.mean, Horizon(horizon), "arXiv 2602.04879")


def drpo(delta: float = 12.5, horizon: int = 8192) -> Method:
    """Divergence Regularized Policy Optimization, in the paper's setting."""
    return Method(DRPO(delta), advantages.mean, Horizon(horizon), "arXiv 2606.09821")


METHODS: Mapping[str, Callable[..., Method]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gdpo": gdpo,
    "gspo": gspo,
    "luspo": luspo,
    "gmpo": gmpo,
    "m2po": m2po,
    "cispo": cispo,
    "sapo": sapo,
    "ppo": ppo,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "reinforce++_baseline": reinforce_plus_plus_baseline,
    "spo": spo,
    "dppo": dppo,
    "drpo": drpo,
}
"""Methods by name."""


def find(name: str, horizon: int) -> Method:
    """Return the method of a name.

    Args:
        name: one of `METHODS`; case does not matter, nor do blanks, points and hyphens: "Dr. GRPO".
        horizon: tokens, for papers that divide by a constant, their budget of tokens.

    Raises:
        InputError: no method of this name; the nearest is named.

    Example:
        >>> find("Dr. GRPO", 32).reduction, find("GRPO", 32).objective
        (Horizon(tokens=32), PPOClip(low=0.2, high=0.2, dual=None, max_ratio=None))
    """
    if (known := canonical(name)) not in METHODS:
        spec = f"; --objective {name!r} sets the objective alone" if "(" in name else ""
        raise InputError(f"unknown method {name!r}{nearest(known, METHODS)}{spec}")
    make = METHODS[known]
    return make(horizon=horizon) if "horizon" in inspect.signature(make).parameters else make()


def described(method: Method) -> str:
    """Return the options that a method sets, as they are written on the command line.

    Example:
        >>> described(grpo())
        "--objective 'ppo(low=0.2, high=0.2)' --advantage zscore --reduction sequence_mean"
        >>> described(ppo())
        "--objective 'ppo(low=0.2, high=0.2)' --critic 'gae(gamma=1.0, lam=0.95, clip=0.2)' --reduction token_mean"
    """
    values = {name: value for name, value in method.options.items() if value}
    if method.critic is not None:
        del values["advantage"]
    return " ".join(option(name, value) for name, value in values.items())


def option(name: str, value: Any) -> str:
    """Return one of `OPTIONS` with a value, as it is written on the command line; defaults of a spec by their names.

    Example:
        >>> option("whiten", True), option("reduction", Horizon(32)), option("critic", None)
        ('--whiten', "--reduction 'horizon(32)'", '--critic None')
    """
    registry = OPTIONS[name]
    if registry is None:
        flag = name.replace("_", "-")
        return f"--{flag} {value}" if type(value) is int else f"--{flag}" if value else f"--no-{flag}"
    spec = "None" if value is None else format_spec(value, registry)
    if "(" not in spec and is_dataclass(value):
        numbers = {f.name: getattr(value, f.name) for f in fields(value)}
        spec += f"({', '.join(f'{n}={x}' for n, x in numbers.items() if isinstance(x, float))})"
    return f"--{name} {shlex.quote(spec.removesuffix('()'))}"


def require_no_method(text: str) -> None:
    """Raise for an objective that is the name of a method and of no objective: `grpo`.

    Raises:
        InputError: it is one; the message says which options the method is.

    Example:
        >>> require_no_method("GRPO")
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: objective='GRPO': it is a method: --objective 'ppo(low=0.2, high=0.2)' --advantage \
zscore --reduction sequence_mean; `drpo train RECIPE --method grpo` sets them
    """
    name = canonical(text.partition("(")[0])
    if name in METHODS and name not in objectives.REGISTRY.entries:
        makes = described(find(name, horizon=256)).replace("horizon(256)", "horizon(TOKENS)")
        rule = f"it is a method: {makes}; `drpo train RECIPE --method {name}` sets them"
        raise InputError(f"objective={text!r}: {rule}")


def parse_objective(text: str) -> Objective:
    """Return the objective of a spec.

    Raises:
        InputError: as `parse_spec`, and as `require_no_method`.
    """
    require_no_method(text)
    return parse_spec(text, objectives.REGISTRY)


def canonical(name: str) -> str:
    """Return a name as `METHODS` writes it."""
    return re.sub(r"[^a-z0-9+]+", "_", name.lower()).strip("_")
