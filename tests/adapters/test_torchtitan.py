"""drpo inside torchtitan's RL, played by stand-ins; marked `adapters`, its own loss code, recipe and command line."""

import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from adapters import stand_ins
from adapters.cases import SPECS, TOKENS_2026, Rows, direct_gradient, rows
from adapters.pages import run_page
from adapters.parity import record
from adapters.pretend import imported_on
from drpo.adapters import require_ran
from drpo.errors import InputError
from drpo.objectives import DRPO

# What this adapter relies on: torchtitan 0.3.0, torchtitan/components/loss.py (BaseLoss, ChunkedLossWrapper,
# compute_logprobs), experiments/rl/actors/trainer.py (PolicyTrainer.forward_backward calls the loss, sums its metrics
# over ranks and takes the largest of those that end in "/max"), experiments/rl/controller_metrics.py (the same over
# micro-batches) and experiments/rl/controller.py (a step ends with metrics_processor.log).
LOSS = "torchtitan.components.loss"
CONTROLLER = "torchtitan.experiments.rl.controller"
CALL = ["self", "logits", "labels", "global_valid_tokens", "generator_logprobs", "advantages", "loss_mask"]
VOCABULARY, N_TOKENS = 7, 40


def compute_logprobs(logits: Tensor, labels: Tensor, *, return_entropy: bool = False) -> Any:
    every = logits.float().log_softmax(-1)
    chosen = every.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (chosen, -(every.exp() * every).detach().sum(-1)) if return_entropy else chosen


class Configurable:
    @dataclass(kw_only=True, slots=True)
    class Config:
        owner: ClassVar[Any] = None

        def build(self, **named: Any) -> Any:
            return type(self).owner(self, **named)

    def __init_subclass__(cls) -> None:
        if "Config" in vars(cls):
            cls.Config.owner = cls  # type: ignore[misc]


class BaseLoss(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass


class GRPOLoss(BaseLoss):
    """The clipped surrogate, without a metric of ours."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        clip_eps: float = 0.2

    def __init__(self, config: Any) -> None:
        self.clip_eps = config.clip_eps

    def __call__(
        self, logits: Tensor, labels: Tensor, global_valid_tokens: float | None = None, *, generator_logprobs: Tensor,
        advantages: Tensor, loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        ratio = (compute_logprobs(logits, labels) - generator_logprobs).exp()
        clipped = ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps)
        loss = (-torch.min(ratio * advantages, clipped * advantages) * loss_mask).sum() / global_valid_tokens
        return loss, {"loss/mean": loss.detach()}


class ChunkedLossWrapper(BaseLoss):
    """Chunks of the sequence; metrics are reduced by the ends of their names, as in torchtitan."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        loss_fn: Any
        num_chunks: int = 2

    def __init__(self, config: Any) -> None:
        self.num_chunks, self.loss_fn = config.num_chunks, config.loss_fn.build()

    def __call__(
        self, logits: Tensor, labels: Tensor, global_valid_tokens: float, **columns: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total, seen = torch.zeros(()), {}
        for i in range(self.num_chunks):
            parts = [x.chunk(self.num_chunks, 1)[i] for x in (logits, labels, *columns.values())]
            loss, metrics = self.loss_fn(*parts[:2], global_valid_tokens, **dict(zip(columns, parts[2:], strict=True)))
            total = total + loss
            seen = combined([seen, metrics]) if seen else metrics
        return total, seen


def combined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    made = dict(parts[0])
    for name, value in [item for part in parts[1:] for item in part.items()]:
        if name.endswith("/max"):
            made[name] = max(made[name], value)
        elif name.endswith(("/mean", "_mean", "/frac", "_frac")):
            made[name] = made[name] + value
        else:
            raise ValueError(f"Do not know how to reduce metric '{name}'")
    return made


@dataclass
class Trainer:
    loss: Any


class Controller(Configurable):
    """Steps whose metrics are a loss's."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        trainer: Any
        generator: Any = field(default_factory=lambda: generator())

    def __init__(self, config: Any) -> None:
        self.config, self.logged = config, []
        self.metrics_processor = SimpleNamespace(log=lambda step, metrics, is_validation=False: self.keep(metrics))

    def keep(self, metrics: Any) -> None:
        self.logged.append({metric.key: metric.value for metric in metrics})

    def step(self, batch: Rows) -> None:
        loss = self.config.trainer.loss.build()
        _, seen = called(loss, batch)
        self.metrics_processor.log(step=1, metrics=[SimpleNamespace(key=k, value=v) for k, v in seen.items()])


CONTENT = {
    LOSS: {
        "BaseLoss": BaseLoss, "ChunkedLossWrapper": ChunkedLossWrapper, "GRPOLoss": GRPOLoss,
        "compute_logprobs": compute_logprobs,
    },
    CONTROLLER: {"Controller": Controller},
}  # fmt: skip


def generator(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(sampling=SimpleNamespace(**{"temperature": 1.0, "top_p": 1.0} | changed))


def released_modules() -> Iterator[ModuleType]:
    """torchtitan's own modules, with empty ones for Monarch, TorchStore, vLLM and loggers."""
    pytest.importorskip("torchtitan")
    stand_ins.install(stand_ins.OF_TORCHTITAN)
    sys.modules.setdefault("torch.utils.tensorboard", stand_ins.Empty("torch.utils.tensorboard"))
    from drpo.adapters import torchtitan

    yield torchtitan


@pytest.fixture(params=["stand-in", pytest.param("released", marks=pytest.mark.adapters)])
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    if request.param == "released":
        yield from released_modules()
        return
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.3.0")
    with imported_on("drpo.adapters.torchtitan", CONTENT) as module:
        yield module


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.3.0")
    with imported_on("drpo.adapters.torchtitan", CONTENT) as module:
        yield module


@pytest.fixture
def released() -> Iterator[ModuleType]:
    yield from released_modules()


def as_logits(logp: Tensor) -> Tensor:
    """Logits of which token 0 has this log-probability, and the others the same."""
    rest = torch.log1p(-logp.exp()) - torch.tensor(float(VOCABULARY - 1)).log()
    return torch.cat([logp.unsqueeze(-1), rest.unsqueeze(-1).expand(*logp.shape, VOCABULARY - 1)], -1)


def called(loss: Callable[..., Any], batch: Rows, n_tokens: int = N_TOKENS) -> tuple[Tensor, dict[str, Tensor]]:
    """d loss / d logp of the sampled token by the chain rule through the logits, and the metrics."""
    logits = as_logits(batch.logp).requires_grad_()
    value, metrics = loss(
        logits, torch.zeros(batch.logp.shape, dtype=torch.long), n_tokens, generator_logprobs=batch.behavior_logp,
        advantages=batch.advantage.unsqueeze(1) * batch.keep, loss_mask=batch.keep,
    )  # fmt: skip
    (slope,) = torch.autograd.grad(value, logits)
    return slope[..., 0] / (1 - batch.logp.exp()), metrics


def wanted(spec: str, batch: Rows) -> Tensor:
    return direct_gradient(spec, batch, torch.full_like(batch.logp, 1 / N_TOKENS))


def even(seed: int) -> Rows:
    """Rows that two chunks divide; probabilities near 1 would divide the slope of a logit by almost 0."""
    batch = rows(seed, length=12)
    return Rows(batch.logp.clamp(max=-0.05), batch.behavior_logp, batch.advantage, batch.keep)


@pytest.mark.parametrize("spec", [*SPECS, *TOKENS_2026])
def test_the_loss_has_the_objectives_gradient(adapter: ModuleType, spec: str):
    loss, worst = adapter.DRPOLoss.Config(objective=spec).build(), 0.0
    for seed in range(3):
        batch = even(seed)
        slope, _ = called(loss, batch)
        worst = max(worst, (slope.double() - wanted(spec, batch)).abs().max().item())
    if adapter.BaseLoss is not BaseLoss:
        record("torchtitan, its logits and log-probabilities", metadata.version("torchtitan"), spec, worst)
    assert worst < 1e-6


def test_its_own_loss_is_another():
    slope, _ = called(GRPOLoss(GRPOLoss.Config()), even(1))
    assert (slope.double() - wanted("drpo(0.2)", even(1))).abs().max() > 1e-3


def test_metrics_of_chunks_add_up_to_the_steps(pretended: ModuleType):
    """As torchtitan reduces them: sums of chunks, ranks and micro-batches, and the largest of what ends in /max."""
    batch, inner = even(2), pretended.DRPOLoss.Config(objective="drpo(0.2)")
    n = int(batch.keep.sum())
    slope, whole = called(inner.build(), batch, n)
    chunked_slope, chunks = called(ChunkedLossWrapper.Config(loss_fn=inner).build(), batch, n)
    assert torch.allclose(slope, chunked_slope) and whole.keys() == chunks.keys()
    assert all(torch.allclose(whole[name], value, atol=1e-6) for name, value in chunks.items())
    moved = (batch.logp.exp() - batch.behavior_logp.exp()).abs()[batch.keep]
    assert chunks["drpo/prob_diff_mean"] == pytest.approx(moved.mean().item(), rel=1e-5)
    assert chunks["drpo/prob_diff/max"] == pytest.approx(moved.max().item(), rel=1e-5)
    assert chunks["drpo/loss_tokens/drpo_0.2/frac"] == pytest.approx(1.0)  # of the step's tokens
    require_ran(chunks, DRPO(0.2))
    with pytest.raises(InputError, match=r"^the step trained with drpo_0.2, not with drpo_0.25$"):
        require_ran(chunks, DRPO(0.25))


def test_a_token_that_the_generator_did_not_score_is_left_out(adapter: ModuleType):
    """As in torchtitan's losses, whose number of valid tokens does not count it."""
    batch = even(3)
    batch.behavior_logp[0, 0] = float("nan")
    slope, metrics = called(adapter.DRPOLoss.Config(objective="drpo(0.2)").build(), batch)
    without = Rows(batch.logp, batch.behavior_logp.nan_to_num(), batch.advantage, batch.keep.clone())
    without.keep[0, 0] = False
    assert (slope.double() - wanted("drpo(0.2)", without)).abs().max() < 1e-6 and slope[0, 0] == 0
    assert metrics["drpo/unscored_frac"] == pytest.approx(1 / N_TOKENS)
    assert metrics["loss/mean"].isfinite()


def test_a_micro_batch_of_padding_alone(adapter: ModuleType):
    batch = even(0)
    slope, metrics = called(
        adapter.DRPOLoss.Config(objective="drpo(0.2)").build(),
        Rows(batch.logp, batch.behavior_logp, batch.advantage, torch.zeros_like(batch.keep)),
    )
    assert (slope == 0).all() and all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("chunked", [False, True])
def test_a_configuration_with_the_objective_trains_it(pretended: ModuleType, chunked: bool):
    theirs = GRPOLoss.Config()
    config = Controller.Config(trainer=Trainer(ChunkedLossWrapper.Config(loss_fn=theirs) if chunked else theirs))
    made = pretended.with_objective(config, "drpo(0.2)")
    assert isinstance(made.trainer.loss, ChunkedLossWrapper.Config) == chunked
    controller = made.build()
    controller.step(even(0))
    assert controller.logged[0]["drpo/loss_tokens/drpo_0.2/frac"] > 0
    controller.metrics_processor.log(step=1, metrics=[], is_validation=True)  # a validation has no loss


def test_a_step_with_another_loss_ends_the_run(pretended: ModuleType):
    """The planted bypass: trainers that build a loss other than the configured one."""
    controller = pretended.with_objective(Controller.Config(trainer=Trainer(GRPOLoss.Config())), "drpo(0.2)").build()
    controller.config = Controller.Config(trainer=Trainer(GRPOLoss.Config()))
    with pytest.raises(
        InputError, match=r"^the step's metrics have no drpo/loss_tokens/drpo_0\.2: the framework trained"
    ):
        controller.step(even(0))
    assert not controller.logged


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"temperature": 0.8},
            r"^--generator\.sampling\.temperature 0\.8: .*; set --generator\.sampling\.temperature 1\.0$",
        ),
        ({"top_p": 0.95}, r"^--generator\.sampling\.top_p 0\.95: .*; set --generator\.sampling\.top_p 1\.0$"),
    ],
)
def test_refused_sampling(pretended: ModuleType, changed: dict[str, float], message: str):
    """When the controller is built, so after the command line."""
    made = pretended.with_objective(Controller.Config(trainer=Trainer(GRPOLoss.Config())), "drpo(0.2)")
    made.generator = generator(**changed)
    with pytest.raises(InputError, match=message) as refused:
        made.build()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("objective", ["gspo(0.1, 0.1)", "cppo(0.2)", "vespo", "gmpo", "ppo(0.2, 0.2)*opsm(0.05)"])
def test_objectives_of_sequences_are_refused(pretended: ModuleType, objective: str):
    with pytest.raises(
        InputError, match=r"^trainer\.loss\.objective=.* needs whole completions, which torchtitan packs"
    ):
        pretended.DRPOLoss.Config(objective=objective).build()


def test_other_refusals(pretended: ModuleType):
    with pytest.raises(InputError, match=r"^trainer\.loss\.objective is not set"):
        pretended.DRPOLoss.Config().build()
    made = pretended.with_objective(Controller.Config(trainer=Trainer(GRPOLoss.Config())), "drpo(0.2)")
    made.trainer = Trainer(ChunkedLossWrapper.Config(loss_fn=GRPOLoss.Config()))
    with pytest.raises(InputError, match=r"^trainer\.loss=GRPOLoss\.Config: it is another loss"):
        made.build()
    with pytest.raises(InputError, match=r"^with_objective takes torchtitan's Controller\.Config, not "):
        pretended.with_objective(made, "drpo(0.2)")


def test_the_stand_in_has_what_is_relied_on(pretended: ModuleType):
    for loss in (GRPOLoss, pretended.DRPOLoss):
        assert list(inspect.signature(loss.__call__).parameters) == CALL


@pytest.mark.adapters
def test_the_framework_has_what_is_relied_on(released: ModuleType):
    from torchtitan.experiments.rl import controller, controller_metrics
    from torchtitan.experiments.rl.actors import trainer
    from torchtitan.experiments.rl.losses import DAPOLoss

    assert list(inspect.signature(DAPOLoss.__call__).parameters) == CALL
    step = inspect.getsource(trainer.PolicyTrainer.forward_backward)
    assert "generator_logprobs=generator_logprobs" in step and 'key.endswith("/max")' in step
    loop = inspect.getsource(controller.Controller._trainer_loop)
    assert loop.index("self.metrics_processor.log(") < loop.index("self.trainer.save_checkpoint")
    assert 'fwd_bwd_metrics["loss/mean"]' in loop
    _, seen = called(released.DRPOLoss.Config(objective="drpo(0.2)").build(), even(0))
    values = {name: value.item() for name, value in seen.items()}
    twice = controller_metrics.combine_microbatch_metrics([values, values])
    assert twice == combined([values, values])
    wrapper = released.ChunkedLossWrapper
    assert wrapper._combine_chunk_metrics(dict(values), {"drpo/loss_tokens/drpo_0.2/frac": 0.5})


@pytest.mark.adapters
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--generator.sampling.temperature", "1", "--generator.sampling.top-p", "1"], None),
        (["--generator.sampling.temperature", "1"], r"^--generator\.sampling\.top_p 0\.95: "),
        (["--generator.sampling.top-p", "1"], r"^--generator\.sampling\.temperature 0\.8: "),
        (["--trainer.loss.loss-fn.objective", "vespo"], r"--generator\.sampling\.temperature 0\.8: "),
    ],
)
def test_its_own_command_line(
    released: ModuleType, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str | None
):
    from torchtitan.config import ConfigManager
    from torchtitan.experiments.rl.examples.alphabet_sort.config_registry import rl_grpo_qwen3_0_6b_varlen

    mine = ModuleType("mine")
    mine.recipe = lambda: released.with_objective(rl_grpo_qwen3_0_6b_varlen(), "drpo(0.2)")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", mine)
    config = ConfigManager().parse_args(["--module", "mine", "--config", "recipe", *more])
    assert type(config) is released.DRPOController.Config and config._owner is released.DRPOController
    assert pickle.loads(pickle.dumps(config.trainer.loss)).loss_fn.objective in ("drpo(0.2)", "vespo")
    if message is None:
        assert released.check(config) == DRPO(0.2)
    else:
        with pytest.raises(InputError, match=message):
            released.DRPOController(config)


@pytest.mark.adapters
def test_the_page(released: ModuleType):
    config = run_page("torchtitan")["alphabet_sort"]()
    assert released.check(config) == DRPO(0.2) and type(config) is released.DRPOController.Config
