"""drpo inside open-instruct, whose loss code is played by a stand-in; marked `adapters`, the real module is."""

import dataclasses
import inspect
import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.cases import SPECS, TOKENS_2026, Rows, direct_gradient, rows
from adapters.parity import record as found
from adapters.pretend import imported_on
from drpo.adapters.weighing import objective_of
from drpo.errors import InputError

# What this adapter relies on: allenai/open-instruct as of commit e6c3044aa6201c8b, open_instruct/grpo_utils.py, and
# that grpo_fast.py and olmo_core_train_modules.py call these three as its attributes, in this order, for every sample.
UTILS, LOADER = "open_instruct.grpo_utils", "open_instruct.data_loader"
RELIED_ON = {
    "compute_rho_correction": ["old_logprob", "vllm_logprobs", "response_mask", "advantages", "config"],
    "compute_grpo_loss": ["new_logprobs", "ratio", "advantages", "ref_logprobs", "config", "rho_weights"],
    "populate_sample_loss_stats": [],  # the first two by position: the samples' figures by name, and which sample
}
INVALID_LOGPROB = 1.0
DENOMINATOR = 40.0


class GRPOLossType(StrEnum):
    dapo = "dapo"
    cispo = "cispo"


@dataclasses.dataclass
class GRPOExperimentConfig:
    use_vllm_logprobs: bool = False
    use_rho_correction: bool = True
    loss_fn: GRPOLossType = GRPOLossType.dapo
    beta: float = 0.05
    load_ref_policy: bool = True
    clip_lower: float = 0.2
    clip_higher: float = 0.272
    kl_estimator: int = 2

    def __post_init__(self) -> None:
        if self.use_vllm_logprobs and self.use_rho_correction:
            raise ValueError("Cannot use both")


@dataclasses.dataclass
class StreamingDataLoaderConfig:
    mask_tool_use: bool = True
    temperature: float = 1.0


@dataclasses.dataclass
class VLLMConfig:
    vllm_top_p: float = 1.0


def mask_logprobs(logprobs: Tensor, response_mask: Tensor) -> Tensor:
    return logprobs.masked_fill(~response_mask, INVALID_LOGPROB).nan_to_num(nan=INVALID_LOGPROB)


def compute_rho_correction(
    old_logprob: Tensor, vllm_logprobs: Tensor, response_mask: Tensor, advantages: Tensor, config: Any
) -> SimpleNamespace:
    return SimpleNamespace(weights=torch.ones_like(old_logprob), metrics={})


def compute_grpo_loss(
    new_logprobs: Tensor, ratio: Tensor, advantages: Tensor, ref_logprobs: Tensor | None, config: Any,
    rho_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The clipped surrogate, and k3 to the reference."""
    clipped = ratio.clamp(1 - config.clip_lower, 1 + config.clip_higher)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped) * rho_weights
    if ref_logprobs is None:
        return loss, (ratio != clipped).float(), torch.zeros_like(loss)
    off = new_logprobs - ref_logprobs
    return loss, (ratio != clipped).float(), (-off).exp() - 1 + off


def populate_sample_loss_stats(
    stats: dict[str, Tensor], sample_idx: int, pg_loss: Tensor, clipfrac: Tensor, loss: Tensor, mask: Tensor
) -> None:
    stats["loss/total_avg"][sample_idx] = loss.detach()
    stats["policy/clipfrac_avg"][sample_idx] = (clipfrac * mask).sum() / mask.sum()


CONTENT = {
    UTILS: {
        f.__name__: f
        for f in (
            GRPOExperimentConfig,
            compute_rho_correction,
            compute_grpo_loss,
            populate_sample_loss_stats,
            mask_logprobs,
        )
    },
    LOADER: {"StreamingDataLoaderConfig": StreamingDataLoaderConfig, "VLLMConfig": VLLMConfig},
}


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The adapter on stand-ins, whose configurations are as they were afterwards."""
    for kind in (GRPOExperimentConfig, StreamingDataLoaderConfig, VLLMConfig):
        monkeypatch.setattr(kind, "__init__", kind.__init__)
    monkeypatch.setenv("DRPO_OBJECTIVE", "drpo(0.2)")
    with imported_on("drpo.adapters.open_instruct", {"ray": {"init": lambda **named: named}, **CONTENT}) as module:
        yield module


def stand_in() -> ModuleType:
    module = ModuleType(UTILS)
    vars(module).update(CONTENT[UTILS])
    return module


def good(**changed: Any) -> GRPOExperimentConfig:
    usual = {"use_vllm_logprobs": True, "use_rho_correction": False, "beta": 0.0, "load_ref_policy": False}
    return GRPOExperimentConfig(**usual | changed)


def step(utils: Any, batch: Rows, config: Any, stats: dict[str, Tensor], reference: Tensor | None = None) -> Tensor:
    """One sample as both trainers train on it: a row of packed completions, here all rows at once. Returns d/dlogp."""
    leaf = batch.logp.clone().requires_grad_()
    advantages = batch.advantage.unsqueeze(1).expand(leaf.shape)
    new, mu = mask_logprobs(leaf, batch.keep), mask_logprobs(batch.behavior_logp, batch.keep)
    rho = utils.compute_rho_correction(mu, mu, batch.keep, advantages, config)
    pg_loss, clipfrac, kl = utils.compute_grpo_loss(
        new_logprobs=new,
        ratio=(new - mu).exp(),
        advantages=advantages,
        ref_logprobs=reference,
        config=config,
        rho_weights=rho.weights,
    )
    loss = ((pg_loss + config.beta * kl) * batch.keep).sum() / DENOMINATOR
    (slope,) = torch.autograd.grad(loss, leaf)
    utils.populate_sample_loss_stats(stats, 0, pg_loss.detach(), clipfrac, loss, batch.keep)
    return slope


def empty() -> dict[str, Tensor]:
    return {name: torch.zeros(2) for name in ("loss/total_avg", "policy/clipfrac_avg")}


@pytest.mark.parametrize("spec", [*SPECS, *TOKENS_2026])
def test_the_trainers_step_has_the_objectives_gradient(adapter: ModuleType, spec: str):
    utils = stand_in()
    adapter.equip(utils, objective_of(spec, "objective"))
    for seed in range(3):
        batch = rows(seed)
        found_slope = step(utils, batch, good(), empty())
        wanted = direct_gradient(spec, batch, torch.full_like(batch.logp, 1 / DENOMINATOR))
        assert (found_slope.double() - wanted).abs().max() < 1e-6


def test_the_comparison_would_see_the_frameworks_own_loss():
    batch = rows(1)
    wanted = direct_gradient("drpo(0.2)", batch, torch.full_like(batch.logp, 1 / DENOMINATOR))
    assert (step(stand_in(), batch, good(), empty()).double() - wanted).abs().max() > 1e-3


def test_the_step_says_that_the_loss_ran_and_logs_its_figures(adapter: ModuleType):
    utils, batch, stats = stand_in(), rows(2), empty()
    adapter.equip(utils, objective_of("drpo(0.2)", "objective"))
    step(utils, batch, good(), stats)
    moved = (batch.logp.exp() - batch.behavior_logp.exp()).abs()[batch.keep]
    assert stats["drpo/loss_tokens/drpo_0.2"].tolist() == [batch.keep.sum(), 0]
    assert stats["drpo/prob_diff_mean"][0] == pytest.approx(moved.mean().item(), rel=1e-5)
    share = (moved > 0.2).float().mean().item()
    assert stats["policy/clipfrac_avg"][0] == pytest.approx(share)  # what the framework calls clipped
    assert stats["drpo/out_of_region"][0] == pytest.approx(share)


def test_a_trainer_that_calls_another_loss_stops_at_its_first_sample(adapter: ModuleType):
    """The planted bypass: a trainer that imported the function by its name before the patch."""
    utils = stand_in()
    adapter.equip(utils, objective_of("drpo(0.2)", "objective"))
    bypassed = SimpleNamespace(**vars(utils) | {"compute_grpo_loss": compute_grpo_loss})
    with pytest.raises(
        InputError,
        match=r"did not call open_instruct\.grpo_utils\.compute_grpo_loss: the loss of drpo_0\.2 did not run",
    ):
        step(bypassed, rows(0), good(), empty())


def test_a_loss_without_the_samplers_log_probabilities_is_refused(adapter: ModuleType):
    utils = stand_in()
    adapter.equip(utils, objective_of("drpo(0.2)", "objective"))
    unasked = SimpleNamespace(**vars(utils) | {"compute_rho_correction": compute_rho_correction})
    with pytest.raises(InputError, match="compute_rho_correction was not called before the loss"):
        step(unasked, rows(0), good(), empty())


def test_tokens_that_were_not_scored_are_on_policy_and_counted(adapter: ModuleType):
    """NaN of either kind becomes open-instruct's 1.0 before the loss sees it."""
    utils, batch, stats = stand_in(), rows(0), empty()
    adapter.equip(utils, objective_of("drpo(0.2)", "objective"))
    mu = batch.behavior_logp.clone()
    mu[0, 0] = torch.nan
    slope = step(utils, dataclasses.replace(batch, behavior_logp=mu), good(), stats)
    assert slope[0, 0] == pytest.approx(-batch.advantage[0].item() / DENOMINATOR)
    assert stats["drpo/unscored"][0] == pytest.approx(1 / batch.keep.sum().item())
    with pytest.raises(InputError, match=r"behavior_logp \(the sampler's\): NaN, infinite or positive .*at"):
        step(utils, dataclasses.replace(batch, behavior_logp=torch.full_like(mu, torch.nan)), good(), stats)
    with pytest.raises(InputError, match=r"logp \(the policy's\): NaN, infinite or positive .*at"):
        step(utils, dataclasses.replace(batch, logp=torch.full_like(mu, torch.nan)), good(), stats)


def test_the_penalty_to_the_reference_stays_the_frameworks(adapter: ModuleType):
    utils, batch = stand_in(), rows(0)
    adapter.equip(utils, objective_of("drpo(0.2)", "objective"))
    reference = batch.logp - 0.2
    with_it = step(utils, batch, good(beta=0.5), empty(), reference)
    added = 0.5 * (1 - torch.exp(torch.tensor(-0.2))) * batch.keep / DENOMINATOR
    assert torch.allclose(with_it - step(utils, batch, good(), empty()), added, atol=1e-6)


@pytest.mark.parametrize("spec", ["gspo(0.2, 0.3)", "cppo(0.2)"])
def test_objectives_of_whole_completions_are_refused(adapter: ModuleType, spec: str):
    with pytest.raises(InputError, match="needs whole completions, which open-instruct packs into rows"):
        adapter.equip(stand_in(), objective_of(spec, "objective"))


def test_a_version_without_the_functions_is_refused(adapter: ModuleType):
    with pytest.raises(InputError, match=r"^open_instruct\.grpo_utils has no compute_rho_correction: "):
        adapter.equip(ModuleType(UTILS), objective_of("drpo(0.2)", "objective"))


UNSOUND = {
    r"^--use_vllm_logprobs false: the ratio would be to the trainer's .*; set --use_vllm_logprobs true$": {
        "use_vllm_logprobs": False
    },
    r"^--use_rho_correction true: it multiplies .*; set --use_rho_correction false$": {
        "use_rho_correction": True,
        "use_vllm_logprobs": True,
    },
    r"^--loss_fn cispo: .*write CISPO as --drpo-objective .*; set --loss_fn dapo$": {"loss_fn": GRPOLossType.cispo},
    r"^--mask_tool_use false: tokens that a tool wrote .*; set --mask_tool_use true$": {"mask_tool_use": False},
    r"^--vllm_top_p 0\.9: mu would not be .*; set --vllm_top_p 1\.0$": {"vllm_top_p": 0.9},
    r"^--temperature 0: samples nothing; set --temperature 1$": {"temperature": 0},
}


@pytest.mark.parametrize("message", UNSOUND)
def test_refusals(adapter: ModuleType, message: str):
    adapter.check(good())
    with pytest.raises(InputError, match=message) as refused:
        adapter.check(SimpleNamespace(**vars(good()) | UNSOUND[message]))
    assert "\n" not in str(refused.value)


def test_the_loss_refuses_what_the_launcher_did_not_see(adapter: ModuleType):
    utils = stand_in()
    adapter.equip(utils, objective_of("drpo(0.2)", "objective"))
    with pytest.raises(InputError, match=r"^--use_vllm_logprobs false"):
        step(utils, rows(0), good(use_vllm_logprobs=False), empty())


def launched(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, list[Any]]:
    """The launcher up to the trainer, which builds its configurations and starts Ray."""
    seen: list[Any] = []

    def trainer(module: str, run_name: str, alter_sys: bool) -> None:
        words = dict(word.split("=") for word in sys.argv[1:])
        sys.modules[LOADER].VLLMConfig(vllm_top_p=float(words.pop("top_p", 1)))
        sys.modules[UTILS].GRPOExperimentConfig(**{name: value == "true" for name, value in words.items()}, beta=0.0)
        seen.extend([module, sys.modules["ray"].init(runtime_env={"env_vars": {"A": "1"}})])

    monkeypatch.setattr(adapter.runpy, "run_module", trainer)
    monkeypatch.setattr(sys, "argv", ["drpo"])
    return adapter.main(arguments), seen


GOOD = ("--drpo-objective", "drpo(0.2)", "use_vllm_logprobs=true", "use_rho_correction=false")


def test_the_launcher_patches_and_hands_over(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch):
    status, seen = launched(adapter, monkeypatch, *GOOD, "--drpo-trainer", "grpo")
    assert status == 0 and seen[0] == "open_instruct.grpo" and os.environ["DRPO_OBJECTIVE"] == "drpo(0.2)"
    assert seen[1]["runtime_env"] == {
        "env_vars": {"A": "1", "DRPO_OBJECTIVE": "drpo(0.2)"},
        "worker_process_setup_hook": "drpo.adapters.open_instruct.patch",
    }
    assert sys.modules[UTILS].compute_grpo_loss is not compute_grpo_loss  # in this process too


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("use_vllm_logprobs=true",), "--drpo-objective is not set"),
        (("--drpo-objective", "dropo(0.2)"), "did you mean 'drpo'"),
        (("--drpo-objective", "gspo(0.2, 0.3)"), "needs whole completions"),
        (GOOD[:2], "--use_vllm_logprobs false"),
        ((*GOOD, "top_p=0.9"), "--vllm_top_p 0.9"),
    ],
)
def test_the_launcher_refuses_in_one_line(
    adapter: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
):
    status, seen = launched(adapter, monkeypatch, *arguments)
    told = capsys.readouterr().err
    assert status == 2 and not seen and told.startswith("drpo: ") and message in told and told.count("\n") == 1


def test_the_launcher_says_what_the_default_beta_adds(adapter: ModuleType):
    adapter.guard(sys.modules[UTILS])
    with pytest.warns(UserWarning, match=r"^--beta 0\.05 .* --beta 0 --load_ref_policy false"):
        sys.modules[UTILS].GRPOExperimentConfig(use_vllm_logprobs=True, use_rho_correction=False)


def test_a_second_set_up_function_is_refused(adapter: ModuleType):
    init = adapter.hooked(lambda **named: named, "drpo(0.2)")
    with pytest.raises(InputError, match=r"^ray\.init has a worker_process_setup_hook already"):
        init(runtime_env={"worker_process_setup_hook": "theirs"})


def test_a_worker_is_patched_when_it_imports_the_framework(
    adapter: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In a package on disk, after Ray's set-up function; and a worker that does not import it stays bare."""
    (tmp_path / "open_instruct").mkdir()
    (tmp_path / "open_instruct" / "__init__.py").write_text("")
    lines = [f"def {name}(*a, **k): pass\n" for name in RELIED_ON]
    (tmp_path / "open_instruct" / "grpo_utils.py").write_text("".join(lines))
    for name in (UTILS, LOADER, "open_instruct"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    adapter.patch()
    assert UTILS not in sys.modules
    import open_instruct.grpo_utils as utils

    assert utils.compute_grpo_loss.__module__ == utils.compute_grpo_loss.__wrapped__.__module__ == UTILS
    assert sys.meta_path == before
    for name in (UTILS, "open_instruct"):
        monkeypatch.delitem(sys.modules, name)


def test_the_stand_in_has_what_is_relied_on():
    for name, arguments in RELIED_ON.items():
        assert list(inspect.signature(CONTENT[UTILS][name]).parameters)[: len(arguments)] == arguments


@pytest.mark.adapters
@pytest.mark.parametrize("spec", [*SPECS, *TOKENS_2026])
def test_the_frameworks_own_functions_have_the_objectives_gradient(spec: str):
    pytest.importorskip("ray")
    utils = pytest.importorskip(UTILS, reason="open-instruct is not installed; it is not in the package index")
    from drpo.adapters import open_instruct as adapter

    real = ModuleType(UTILS)
    vars(real).update(vars(utils))
    for name, arguments in RELIED_ON.items():
        assert list(inspect.signature(getattr(utils, name)).parameters)[: len(arguments)] == arguments
    adapter.equip(real, objective_of(spec, "objective"))
    config = SimpleNamespace(**vars(good()), rho_mask_sequence_level=False, rho_mask_tv_divergence=False)
    worst = 0.0
    for seed in range(3):
        batch = rows(seed)
        real.populate_sample_loss_stats = lambda *_: None  # it reads the whole configuration
        slope = step(real, batch, config, empty())
        wanted = direct_gradient(spec, batch, torch.full_like(batch.logp, 1 / DENOMINATOR))
        worst = max(worst, ((slope.double() - wanted).abs().max() / max(1.0, wanted.abs().max())).item())
    found("open-instruct, compute_grpo_loss", "git e6c3044", spec, worst)
    assert worst < 1e-6
