"""drpo inside AReaL, played by stand-ins; marked `adapters`, its own loss and update around an empty engine."""

import inspect
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import stand_ins
from adapters.cases import EVERY, SEQUENCE, Rows, direct_gradient, rows
from adapters.parity import record as found
from adapters.pretend import imported_on
from drpo.adapters.record import LossRecord
from drpo.adapters.weighing import objective_of
from drpo.errors import InputError

# What this adapter relies on: areal 1.0.4, areal/utils/functional/functional.py (ppo_actor_loss_fn),
# trainer/ppo/actor.py (grpo_loss_fn calls it by keyword; PPOActor.ppo_update), trainer/rl_trainer.py
# (_create_train_engine imports FSDPPPOActor from areal.engine; controllers name the engine by its import path).
ACTOR = "areal.trainer.ppo.actor"
RELIED_ON = {
    "logprobs", "proximal_logprobs", "old_logprobs", "advantages", "eps_clip", "loss_mask", "eps_clip_higher", "c_clip",
    "rejection_sampling", "importance_sampling_level", "cu_seqlens",
}  # fmt: skip


def ppo_actor_loss_fn(
    logprobs: Tensor, proximal_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, eps_clip: float,
    loss_mask: Tensor, eps_clip_higher: float | None = None, c_clip: float | None = None,
    rejection_sampling: Any = None, importance_sampling_level: str = "token", cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The clipped surrogate, averaged over the tokens of the mask."""
    ratio = torch.where(loss_mask, (logprobs - proximal_logprobs).exp(), 0)
    clipped = ratio.clamp(1 - eps_clip, 1 + (eps_clip if eps_clip_higher is None else eps_clip_higher))
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    return torch.where(loss_mask, loss, 0).sum() / loss_mask.sum(), {"importance_weight": ratio.detach()}


@dataclass
class PPOActorConfig:
    """AReaL's defaults, as far as they are read."""

    backend: str = "fsdp:d8"
    temperature: float = 1.0
    eps_clip: float = 0.2
    use_decoupled_loss: bool = False
    recompute_logprob: bool = False
    use_sapo_loss: bool = False
    rejection_sampling: Any = None
    m2_threshold: float | None = None
    c_clip: float | None = None
    importance_sampling_level: str = "token"


class FSDPPPOActor:
    """An engine; its batch is rows, its model a leaf."""

    def __init__(self, config: PPOActorConfig) -> None:
        self.config = config

    def ppo_update(self, batch: Rows) -> None:
        self.slope = update(sys.modules[ACTOR], batch, self.config.eps_clip)


class PPOTrainer:
    def __init__(self, config: Any, train_dataset: Any = None) -> None:
        self.config = config
        self.actor = self._create_train_engine(
            config.actor, SimpleNamespace(backend=config.actor.backend.split(":")[0])
        )
        self.ref = self._create_train_engine(config.ref, SimpleNamespace(backend="fsdp"))

    def _create_train_engine(self, actor_config: Any, alloc: Any) -> FSDPPPOActor:
        return sys.modules["areal.engine"].FSDPPPOActor(actor_config)


LOGGED: list[dict[str, float]] = []
CONTENT = {
    ACTOR: {"ppo_actor_loss_fn": ppo_actor_loss_fn},
    "areal.engine": {"FSDPPPOActor": FSDPPPOActor},
    "areal.api.cli_args": {"PPOActorConfig": PPOActorConfig},
    "areal.trainer.rl_trainer": {"PPOTrainer": PPOTrainer},
    "areal.utils.stats_tracker": {"scalar": lambda **values: LOGGED.append(values)},
}


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.0.4")
    LOGGED.clear()
    with imported_on("drpo.adapters.areal", CONTENT) as module:
        yield module


def update(module: Any, batch: Rows, eps_clip: float = 0.2, packed: bool = False) -> Tensor:
    """d loss / d logp of one micro-batch: padded rows, or one line of packed completions."""
    leaf = batch.logp.clone().requires_grad_()
    advantages = batch.advantage.unsqueeze(1).expand(leaf.shape)
    columns = [leaf, batch.behavior_logp, advantages, batch.keep]
    ends = torch.arange(len(leaf) + 1, dtype=torch.int32) * leaf.shape[1]
    logp, mu, advantages, keep = (column.reshape(-1) for column in columns) if packed else columns
    loss, _ = module.ppo_actor_loss_fn(
        logprobs=logp,
        old_logprobs=mu,
        advantages=advantages,
        eps_clip=eps_clip,
        eps_clip_higher=None,
        loss_mask=keep,
        c_clip=None,
        proximal_logprobs=mu,
        rejection_sampling=None,
        importance_sampling_level="token",
        cu_seqlens=ends if packed else None,
    )
    (slope,) = torch.autograd.grad(loss, leaf)
    return slope


def wanted(spec: str, batch: Rows) -> Tensor:
    return direct_gradient(spec, batch, torch.full_like(batch.logp, 1 / batch.keep.sum().item()))


@pytest.fixture
def released() -> ModuleType:
    """The adapter on AReaL's own modules, with empty ones for what they import and a CPU does not have."""
    stand_ins.install(stand_ins.OF_AREAL)
    pytest.importorskip("areal", reason="AReaL is not installed; `make test-others` installs it in .adapters/others")
    from areal.infra import platforms

    from drpo.adapters import areal

    platforms.is_npu_available = False  # an empty function says that there is one
    return areal


@pytest.fixture(params=["stand-in", pytest.param("released", marks=pytest.mark.adapters)])
def both(request: pytest.FixtureRequest) -> tuple[ModuleType, ModuleType]:
    """The adapter, and the module whose loss it replaces."""
    if request.param == "released":
        own = request.getfixturevalue("released")
        return own, own.framework
    module = ModuleType(ACTOR)
    module.ppo_actor_loss_fn = ppo_actor_loss_fn  # type: ignore[attr-defined]
    return request.getfixturevalue("adapter"), module


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("spec", [*EVERY, SEQUENCE])
def test_areals_loss_has_the_objectives_gradient(both: tuple[ModuleType, ModuleType], spec: str, packed: bool):
    adapter, framework = both
    worst, made = 0.0, LossRecord(objective_of(spec, "objective"))
    for seed in range(3):
        batch = rows(seed)
        with adapter.weighed(made, framework):
            slope = update(framework, batch, packed=packed)
        direct = wanted(spec, batch)
        worst = max(worst, ((slope.double() - direct).abs().max() / max(1.0, direct.abs().max())).item())
    if framework.ppo_actor_loss_fn is not ppo_actor_loss_fn:
        found("AReaL, ppo_actor_loss_fn" + ", packed" * packed, "1.0.4", spec, worst)
    assert worst < 1e-6


def test_completions_of_a_packed_line_are_sequences(both: tuple[ModuleType, ModuleType]):
    """GSPO's mean is over each of them: the weight of a token is that of its own completion, as in padded rows."""
    adapter, framework = both
    made, batch = LossRecord(objective_of("gspo(0.1, 0.1)", "objective")), rows(1)
    with adapter.weighed(made, framework):
        slopes = [update(framework, batch, packed=packed) for packed in (False, True)]
    assert torch.allclose(*slopes, atol=1e-7) and slopes[0].abs().max() > 0


def test_the_surrogate_that_areal_computes_otherwise_is_another(both: tuple[ModuleType, ModuleType]):
    _, framework = both
    assert (update(framework, rows(1)).double() - wanted("drpo(0.2)", rows(1))).abs().max() > 1e-3


def configured(**changed: Any) -> SimpleNamespace:
    sampling = {name: changed.pop(name) for name in ("top_p", "top_k", "sampled_at") if name in changed}
    gconfig = {"top_p": 1.0, "top_k": 100_000_000, "temperature": sampling.pop("sampled_at", 1.0)}
    return SimpleNamespace(
        actor=PPOActorConfig(**changed), ref=PPOActorConfig(), gconfig=SimpleNamespace(**gconfig | sampling)
    )


def test_the_trainers_engine_trains_the_objective_and_logs_that_it_did(adapter: ModuleType):
    trainer, batch = adapter.DRPOTrainer(configured(), objective="drpo(0.2)"), rows(2)
    trainer.actor.ppo_update(batch)
    assert (trainer.actor.slope.double() - wanted("drpo(0.2)", batch)).abs().max() < 1e-6
    (logged,) = LOGGED
    assert logged["drpo/loss_tokens/drpo_0.2"] == batch.keep.sum() and math.isfinite(logged["drpo/weight_min"])
    assert type(trainer.ref) is FSDPPPOActor and sys.modules["areal.engine"].FSDPPPOActor is FSDPPPOActor
    assert sys.modules[ACTOR].ppo_actor_loss_fn is ppo_actor_loss_fn


def test_a_worker_builds_the_engine_by_its_import_path(adapter: ModuleType):
    """AReaL sends the engine's and the configuration's import paths, with the configuration's fields."""
    trainer = adapter.DRPOTrainer(configured(), objective="drpo(0.2)")
    for sent in (type(trainer.actor), type(trainer.config.actor)):
        assert getattr(sys.modules[sent.__module__], sent.__name__) is sent
    again = type(trainer.config.actor)(**vars(trainer.config.actor))
    assert again == trainer.config.actor and again.drpo_objective == "drpo(0.2)"


def test_an_update_that_bypasses_the_loss_stops(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """The planted bypass: an engine whose update has another loss than that of the actor's module."""
    other = SimpleNamespace(ppo_actor_loss_fn=ppo_actor_loss_fn)
    monkeypatch.setattr(FSDPPPOActor, "ppo_update", lambda self, batch: update(other, batch))
    trainer = adapter.DRPOTrainer(configured(), objective="drpo(0.2)")
    with pytest.raises(
        InputError,
        match=rf"^AReaL's ppo_update did not call ppo_actor_loss_fn of {ACTOR}: the loss of drpo_0\.2 did not run",
    ):
        trainer.actor.ppo_update(rows(0))


UNSOUND = {
    r"^actor\.use_decoupled_loss=true: it puts a second policy .*; set actor\.use_decoupled_loss=false$": {
        "use_decoupled_loss": True
    },
    r"^actor\.recompute_logprob=true: it overwrites .*; set actor\.recompute_logprob=false$": {
        "recompute_logprob": True
    },
    r"^actor\.use_sapo_loss=true: .*; set actor\.use_sapo_loss=false$": {"use_sapo_loss": True},
    r"^actor\.rejection_sampling=.*; set actor\.rejection_sampling=null$": {"rejection_sampling": SimpleNamespace()},
    r"^actor\.m2_threshold=0\.04: .*; set actor\.m2_threshold=null$": {"m2_threshold": 0.04},
    r"^actor\.c_clip=3\.0: .*; set actor\.c_clip=null$": {"c_clip": 3.0},
    r"^actor\.importance_sampling_level=sequence: it is GSPO's": {"importance_sampling_level": "sequence"},
    r"^gconfig\.top_p=0\.9: it makes .*; set gconfig\.top_p=1\.0$": {"top_p": 0.9},
    r"^gconfig\.top_k=20: it makes .*; set gconfig\.top_k=-1 or 0$": {"top_k": 20},
    r"^actor\.temperature=1\.0: tokens are sampled at 0\.8": {"sampled_at": 0.8},
    r"^actor\.backend=megatron: .*; set fsdp$": {"backend": "megatron:d8"},
}


@pytest.mark.parametrize("message", UNSOUND)
def test_refusals(adapter: ModuleType, message: str):
    with pytest.raises(InputError, match=message) as refused:
        adapter.DRPOTrainer(configured(**UNSOUND[message]), objective="drpo(0.2)")
    assert "\n" not in str(refused.value)


def test_an_objective_must_be_written(adapter: ModuleType):
    with pytest.raises(InputError, match=r"^objective is not set"):
        adapter.DRPOTrainer(configured())
    with pytest.raises(InputError, match=r"^actor\.drpo_objective is not set"):
        adapter.DRPOFSDPPPOActor(adapter.DRPOActorConfig()).ppo_update(rows(0))


def test_the_stand_in_has_what_is_relied_on():
    assert set(inspect.signature(ppo_actor_loss_fn).parameters) == RELIED_ON


@pytest.mark.adapters
def test_the_framework_has_what_is_relied_on(released: ModuleType):
    assert set(inspect.signature(released.framework.ppo_actor_loss_fn).parameters) == RELIED_ON
    creates = inspect.signature(released.PPOTrainer._create_train_engine)
    assert [*creates.parameters] == ["self", "actor_config", "alloc"]


def engine_of(adapter: ModuleType, batch: Rows, rest: float) -> Any:
    """AReaL's engine with the objective, without a model: a table of log-probabilities, whose slopes are kept.

    Args:
        adapter: on AReaL's own modules.
        batch: what is trained, a micro-batch.
        rest: what the gradient is divided by.
    """
    from areal.trainer.ppo.actor import PPOActor

    class Engine(adapter.DRPOFSDPPPOActor):
        def __init__(self, config: Any) -> None:
            self.config, self.actor = config, PPOActor(config, self)
            self.leaf = batch.logp.clone().requires_grad_()

        def train(self, mode: bool = True) -> Any:
            return self

        def get_version(self) -> int:
            return 0

        def train_batch(self, inputs: Any, loss_fn: Any, loss_weight_fn: Any) -> dict[str, float]:
            (loss_fn(self.leaf, torch.zeros_like(self.leaf), inputs) * loss_weight_fn(inputs) / rest).backward()
            return {}

    Engine.__abstractmethods__ = frozenset()
    named = {"experiment_name": "letters", "trial_name": "0", "ppo_n_minibatches": 1}
    return Engine(adapter.DRPOActorConfig(**named, drpo_objective="drpo(0.2)"))


def trajectories(batch: Rows) -> list[dict[str, Any]]:
    """What AReaL's `compute_advantages` returns, as its `ppo_update` reads it."""
    spread = batch.advantage.unsqueeze(1).expand(batch.logp.shape)
    columns = {
        "input_ids": torch.zeros(batch.logp.shape, dtype=torch.long), "attention_mask": torch.ones_like(batch.keep),
        "loss_mask": batch.keep.float(), "logprobs": batch.behavior_logp, "prox_logp": batch.behavior_logp,
        "advantages": spread, "kl_rewards": torch.zeros_like(spread), "tot_rewards": spread,
        "rewards": batch.advantage,
    }  # fmt: skip
    return [columns]


@pytest.mark.adapters
def test_areals_own_update_trains_the_objective(released: ModuleType, monkeypatch: pytest.MonkeyPatch):
    batch = rows(2)
    n_kept = batch.keep.sum().item()
    engine = engine_of(released, batch, n_kept)
    engine.ppo_update(trajectories(batch))
    assert (engine.leaf.grad.double() - wanted("drpo(0.2)", batch)).abs().max() < 1e-6
    logged = released.stats_tracker.export()
    assert logged["ppo_actor/update/drpo/loss_tokens/drpo_0.2"] == n_kept

    own = released.framework.grpo_loss_fn  # the planted bypass: another function, with AReaL's loss
    elsewhere = FunctionType(own.__code__, dict(own.__globals__), own.__name__, own.__defaults__)
    monkeypatch.setattr(released.framework, "grpo_loss_fn", elsewhere)
    with pytest.raises(InputError, match=r"the loss of drpo_0\.2 did not run"):
        engine_of(released, batch, n_kept).ppo_update(trajectories(batch))
