"""Real runs of the tiny model that fail, each in one way: what differs from a run that learns.

None here has an entropy that explodes: the tiny model begins near the largest there is.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from drpo.objectives import PPOClip
from drpo.rewards import in_process
from drpo.train.config import Run, configure
from drpo.train.curriculum import Pools
from drpo.train.optim import AdamW, Constant
from drpo.train.setup import Components
from drpo.types import Generation, Problem, Request, TokenLoss, Tokens
from support.worlds import LOSS, flaky, never, sampling, tiny_run


def learns(**changes: Any) -> Run:
    """A run that learns to begin with a digit, with a model whose completions end."""
    plain = {
        "model": "support.rank:short",
        "reward": begins,
        "steps": 20,
        "prompts": 8,
        "sampling": sampling(samples=8, max_new_tokens=16),
        "optimizer": AdamW(5e-3),
        "eval_problems": 0,
        "checkpoint_every": 0,
    }
    return tiny_run(**(plain | changes))


# ---- rewards ----


@in_process
def begins(problem: Problem, text: str) -> float:
    return float(text[:1].isdigit())


@in_process
def same(problem: Problem, text: str) -> float:
    return 0.3


@in_process
def always(problem: Problem, text: str) -> float:
    return 1.0


@in_process
def by_lot(problem: Problem, text: str) -> float:
    """Has nothing to do with the text, the same text gets another each time."""
    return float(_LOTS.random() < 0.5)


@in_process
def longer(problem: Problem, text: str) -> float:
    """Pays for more than is usual by now, so that the mean stays where it is while texts grow."""
    return _apart(len(text))


@in_process
def shorter(problem: Problem, text: str) -> float:
    """The same for less than is usual."""
    return -_apart(len(text))


def _apart(length: int) -> float:
    _USUAL["length"] += 0.02 * (length - _USUAL["length"])
    return length - _USUAL["length"]


@in_process
def hacked(problem: Problem, text: str) -> float:
    """Training pays for the opposite of what held-out problems want."""
    begun = begins(problem, text)
    return 1 - begun if problem.id.startswith("held-out") else begun


@in_process
def turning(problem: Problem, text: str) -> float:
    """Pays for the opposite after 18 steps of 64 completions."""
    _USUAL["calls"] += 1
    begun = begins(problem, text)
    return 1 - begun if _USUAL["calls"] > 18 * 64 else begun


_LOTS, _USUAL = random.Random(0), {"length": 8.0, "calls": 0.0}


# ---- objectives ----


class Now:
    """The plain objective, which does something else in some updates; each call is a micro-batch of one update."""

    tokenwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, when: Callable[[int], bool], factor: float) -> None:
        self.when, self.factor, self.calls = when, factor, 0

    def __call__(self, tokens: Tokens) -> TokenLoss:
        self.calls += 1
        loss = LOSS(tokens).loss
        return TokenLoss(loss * self.factor if self.when(self.calls) else loss)


SPIKES = Now(lambda call: call == 31, 1000.0)
BREAKS = Now(lambda call: call % 4 == 3, float("nan"))


# ---- samplers ----


@dataclass
class Wrong:
    """An engine whose log-probabilities are not those that it sampled with."""

    engine: Any
    change: Callable[[torch.Tensor], torch.Tensor]

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        found = self.engine.generate(requests)
        return [replace(g, behavior_logp=self.change(g.behavior_logp).clamp(max=-1e-3)) for g in found]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def with_wrong_logp(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Components], Components]:
    def changed(components: Components) -> Components:
        engine = Wrong(components.driver.engine, change)
        return replace(components, driver=replace(components.driver, engine=engine))  # type: ignore[arg-type]

    return changed


def _noisy(logp: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(logp))
    return logp + 0.8 * torch.randn(logp.shape, generator=generator)


def _as_it_is(components: Components) -> Components:
    return components


@dataclass(frozen=True)
class Failure:
    """A run, and the warning that it must raise.

    Args:
        warning: its name.
        changes: of a run that learns.
        components: what is done to those built from it.
    """

    warning: str
    changes: Mapping[str, Any]
    components: Callable[[Components], Components] = _as_it_is

    @property
    def run(self) -> Run:
        return configure(learns(), **self.changes)


_ROOM = {"optimizer": AdamW(1e-2), "sampling": sampling(samples=8, max_new_tokens=32)}

FAILURES: Mapping[str, Failure] = {
    "a reward that is the same for all": Failure("no_signal", {"reward": same}),
    "a reward that pays for nothing": Failure("nothing_correct", {"reward": never}),
    "a reward that pays for anything": Failure("everything_correct", {"reward": always}),
    "a reward that raises": Failure("failing_rewards", {"reward": flaky}),
    "too few tokens": Failure("truncation", {"model": "tiny"}),
    "a learning rate that is too large, for nothing": Failure(
        "entropy_collapse", {"reward": by_lot, "optimizer": AdamW(1e-1), "objective": LOSS}
    ),
    "a sampler's temperature that is left out": Failure("sampler_mismatch", {}, with_wrong_logp(lambda x: 0.6 * x)),
    "a sampler with noise": Failure("sampler_mismatch", {}, with_wrong_logp(_noisy)),
    "updates that go further and further": Failure(
        "rising_out_of_region",
        {"updates": 8, "objective": PPOClip(0.2, 0.2), "optimizer": AdamW(3e-2), "schedule": Constant(warmup=20)},
    ),
    "a batch that breaks the gradient": Failure("gradient_spike", {"objective": SPIKES}),
    "a reward for longer texts": Failure("length_drift", {"reward": longer, **_ROOM}),
    "a reward for shorter texts": Failure("length_drift", {"reward": shorter, **_ROOM}),
    "a task that turns into its opposite": Failure(
        "reward_collapse", {"reward": turning, "optimizer": AdamW(1e-2), "steps": 25}
    ),
    "a reward that is hacked": Failure(
        "reward_hacking",
        {"reward": hacked, "optimizer": AdamW(1e-2), "eval_every": 10, "eval_problems": 24, "eval_samples": 8},
    ),
    "a curriculum of problems that are all easy": Failure(
        "curriculum_exhausted", {"reward": always, "curriculum": Pools()}
    ),
    "gradients that are not finite": Failure("repeated_skips", {"objective": BREAKS}),
}
