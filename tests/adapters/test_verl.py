# ruff: noqa: E402
"""verl: drpo's policy loss in verl's registry, in its whole `ppo_loss`, and in its own worker on a CPU."""

import doctest
import importlib.metadata
import inspect
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.adapters
cpu = pytest.importorskip("adapters.verl_on_cpu")  # before verl, whose platform it chooses

import verl
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from verl import __version__ as version
from verl.trainer.ppo import core_algos
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tokenizer.continuous_token import ContinuousTokenBuilder
from verl.workers.config import ActorConfig, FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

import drpo.adapters.verl
from adapters.cases import OF_2026, SEQUENCE, SPECS, Rows, direct_gradient, rows
from adapters.episodes import Padded, require_masks
from adapters.pages import run_page
from adapters.parity import record
from adapters.verl_batches import directly, full, sampled
from drpo.adapters.verl import LOSS, TARGET, DRPOPolicyLossConfig, check, policy_loss
from drpo.errors import InputError
from drpo.reductions import Horizon, sequence_mean, token_mean

ROOT = Path(__file__).resolve().parents[2]
BYPASS = {"bypass_mode": True}
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
HORIZON = 64
NAMED = "actor_rollout_ref.actor.policy_loss"
TYPED = (f"{NAMED}._target_={TARGET}", f"{NAMED}.loss_mode={LOSS}")
CHOSEN = (f'+{NAMED}.objective="drpo(0.2)"',)
SEEN = (f"+{NAMED}.rollout_correction=${{algorithm.rollout_correction}}",)
BYPASSED = ("algorithm.rollout_correction.bypass_mode=true",)
SOUND = (*TYPED, *CHOSEN, *SEEN, *BYPASSED)


def actor(spec: str = "drpo(0.2)", **more: Any) -> ActorConfig:
    chosen = DRPOPolicyLossConfig(objective=spec, rollout_correction=BYPASS)
    return FSDPActorConfig(strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=2, policy_loss=chosen, **more)


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("verl.trainer.config", version_base=None):
        always = ("actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.actor.use_dynamic_bsz=true")
        return compose("ppo_trainer", overrides=[*always, *overrides])


# ---- through verl's whole ppo_loss ------------------------------------------------------------------------------


def lengths(batch: Rows) -> list[int]:
    return [int(n) for n in (batch.behavior_logp != 0).sum(1)]


def as_verl(batch: Rows, logp: Tensor, **plain: Any) -> tuple[Any, dict[str, Tensor]]:
    """The rows as `ppo_loss` gets them, behind prompts of one token, and the model's output."""
    ends = lengths(batch)
    spread = batch.advantage.unsqueeze(1).expand(logp.shape)
    columns = {"old_log_probs": batch.behavior_logp, "advantages": spread, "response_mask": batch.keep}
    data = cpu.batch_of(
        [torch.ones(1, dtype=torch.long)] * len(ends),
        [torch.ones(n, dtype=torch.long) for n in ends],
        {name: [row[:n] for row, n in zip(values, ends, strict=True)] for name, values in columns.items()},
        **plain,
    )
    last = torch.zeros(1, dtype=logp.dtype)  # the model also scores what would follow the last token
    output = cpu.nested([torch.cat([row[:n], last]) for row, n in zip(logp, ends, strict=True)])
    return data, {"log_probs": output}


def weights(mode: str, keep: Tensor, dp_size: int, n_tokens: int, n_rows: int) -> Tensor:
    """What each token counts in verl's aggregation, written from its documentation."""
    by_row = torch.ones(len(keep), 1, dtype=torch.float64) / n_rows
    weight = {
        "token-mean": torch.ones_like(by_row) / n_tokens,
        "token-sum": torch.ones_like(by_row),
        "seq-mean-token-sum": by_row,
        "seq-mean-token-mean": by_row / keep.sum(1, keepdim=True),
        "seq-mean-token-sum-norm": by_row / HORIZON,
    }[mode]
    return (weight * dp_size).expand(keep.shape)


def gradient_in_verl(batch: Rows, spec: str, mode: str, sizes: dict[str, int]) -> Tensor:
    logp = batch.logp.clone().requires_grad_()
    data, output = as_verl(batch, logp, **sizes)
    loss, _ = ppo_loss(actor(spec, loss_agg_mode=mode, loss_scale_factor=HORIZON), output, data)
    (slope,) = torch.autograd.grad(loss, logp)
    return slope


@pytest.mark.parametrize("spec", [*SPECS, *OF_2026, SEQUENCE])
def test_ppo_loss_has_the_objectives_gradient(spec: str):
    worst = 0.0
    for seed in range(3):
        batch = rows(seed)
        # As on one of two ranks, with half of the tokens and rows.
        sizes = {"dp_size": 2, "batch_num_tokens": 2 * int(batch.keep.sum()), "global_batch_size": 2 * len(batch.keep)}
        for mode in MODES:
            weight = weights(mode, batch.keep, 2, sizes["batch_num_tokens"], sizes["global_batch_size"])
            wanted = direct_gradient(spec, batch, weight)
            found = gradient_in_verl(batch, spec, mode, sizes)
            assert (found[~batch.keep] == 0).all()
            # For a weight of 1 a token, since token-mean would hide it behind 1/N, and of a gradient of 1 or more.
            unit = weight.max() * (wanted.abs().max() / weight.max()).clamp(min=1)
            worst = max(worst, ((found - wanted).abs().max() / unit).item())
    record("verl, ppo_loss", version, spec, worst)
    assert worst < 1e-6


def test_loss_and_figures_are_the_direct_ones():
    batch = rows(0)
    sizes = {"dp_size": 1, "batch_num_tokens": int(batch.keep.sum()), "global_batch_size": len(batch.keep)}
    data, output = as_verl(batch, batch.logp, **sizes)
    loss, metrics = ppo_loss(actor(loss_agg_mode="token-mean"), output, data)
    pi, mu = batch.logp.double().exp(), batch.behavior_logp.double().exp()
    ratio, a = pi / mu, batch.advantage.double().unsqueeze(1)
    wanted = (-ratio * a + a.abs() * mu * (ratio - 1) ** 2 / 0.4)[batch.keep].mean()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    seen = {name: metric.aggregate() for name, metric in metrics.items() if name.startswith("drpo/")}
    moved = (pi - mu).abs()[batch.keep]
    assert seen["drpo/prob_diff_mean"] == pytest.approx(moved.mean().item(), abs=1e-6)
    assert seen["drpo/prob_diff_max"] == pytest.approx(moved.max().item(), abs=1e-6)
    assert set(seen) == {
        f"drpo/{name}" for name in ("prob_diff_mean", "prob_diff_max", "out_of_region", "weight_min", "unscored")
    } | {"drpo/loss_tokens/drpo_0.2"}
    assert all(type(value) is not Tensor and math.isfinite(value) for value in seen.values())


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 5.0])
def test_what_the_sampler_left_at_masked_tokens_has_no_effect(junk: float):
    batch = rows(4)
    sizes = {"dp_size": 1, "batch_num_tokens": int(batch.keep.sum()), "global_batch_size": len(batch.keep)}
    inside = ~batch.keep & (batch.behavior_logp != 0)  # such as a tool's answer
    assert inside.any()
    dirty = Rows(batch.logp, torch.where(inside, junk, batch.behavior_logp), batch.advantage, batch.keep)
    for mode in MODES:
        found = gradient_in_verl(dirty, "drpo(0.2)", mode, sizes)
        assert torch.equal(found, gradient_in_verl(batch, "drpo(0.2)", mode, sizes)), mode


def test_a_trained_token_without_a_score_is_on_policy_and_counted():
    batch = rows(1)
    mu = batch.behavior_logp.clone()
    mu[0, 0] = math.nan
    arguments = (mu, batch.logp, batch.advantage.unsqueeze(1).expand(mu.shape), batch.keep)
    loss, seen = policy_loss(*arguments, config=actor())
    assert loss.isfinite() and seen["drpo/unscored"] == pytest.approx(1 / batch.keep.sum().item())


AVERAGES = {"token-mean": token_mean, "seq-mean-token-mean": sequence_mean, "seq-mean-token-sum-norm": Horizon(HORIZON)}
"""verl's `loss_agg_mode` -> our reduction that averages in the same way."""


def in_verl(spec: str, batch: Padded, mode: str) -> tuple[Tensor, dict[str, float]]:
    """verl's whole ppo_loss of episodes of its agent loop, which writes mask and log-probability 0 for what tools say.

    Read in verl/utils/tokenizer/continuous_token.py (`align_response_metadata`) of verl 0.9.1. Its engine counts
    `batch_num_tokens` over the same mask (`loss_mask`, which is `response_mask` there).
    """
    logp, ends = batch.logp, batch.inside.sum(1).tolist()
    columns = {"old_log_probs": batch.behavior_logp, "advantages": batch.advantage, "response_mask": batch.keep}
    data = cpu.batch_of(
        [torch.ones(1, dtype=torch.long)] * len(ends),
        [row[:n] for row, n in zip(batch.target, ends, strict=True)],
        {name: [row[:n] for row, n in zip(values, ends, strict=True)] for name, values in columns.items()},
        dp_size=1,
        batch_num_tokens=int(batch.keep.sum()),
        global_batch_size=len(ends),
    )
    last = torch.zeros(1, dtype=logp.dtype)
    output = {"log_probs": cpu.nested([torch.cat([row[:n], last]) for row, n in zip(logp, ends, strict=True)])}
    loss, metrics = ppo_loss(actor(spec, loss_agg_mode=mode, loss_scale_factor=HORIZON), output, data)
    return loss, {name: metric.aggregate() for name, metric in metrics.items() if name.startswith("drpo/")}


@pytest.mark.parametrize("spec", [*SPECS, *OF_2026, SEQUENCE])
def test_tokens_of_tools_have_no_part_in_verls_loss(spec: str):
    each = [require_masks(partial(in_verl, mode=how), spec, reduction=ours) for how, ours in AVERAGES.items()]
    record("verl, turns of its agent loop, ppo_loss", version, spec, max(each))


def test_a_micro_batch_of_padding_alone():
    batch = rows(0)
    logp = batch.logp.clone().requires_grad_()
    empty = Rows(batch.logp, batch.behavior_logp, batch.advantage, torch.zeros_like(batch.keep))
    for mode in MODES:
        data, output = as_verl(empty, logp, dp_size=2, batch_num_tokens=100, global_batch_size=8)
        loss, metrics = ppo_loss(actor(loss_agg_mode=mode), output, data)
        (slope,) = torch.autograd.grad(loss, logp)
        assert loss == 0 and (slope == 0).all(), mode
        assert all(math.isfinite(metric.aggregate()) for metric in metrics.values())


# ---- through verl's own worker ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    cpu.tiny_model(str(path))
    return path


@pytest.mark.parametrize("spec", [*SPECS, "drpo(0.02)", "dppo(0.01)"])
def test_verls_own_worker_takes_steps_with_the_objective(tiny: Path, tmp_path: Path, spec: str):
    rate = 1e-2
    made = cpu.worker(str(tiny), str(tmp_path / "store"), rate)
    config = actor(spec, loss_agg_mode="token-mean")
    made.set_loss_fn(partial(ppo_loss, config))
    model = cpu.Qwen2ForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    batch = sampled(0)
    losses, grads, theirs = [], [], list(made.engine.module.parameters())
    stepping = made.engine.optimizer_step
    made.engine.optimizer_step = lambda: grads.append([full(p.grad).clone() for p in theirs]) or stepping()
    for _ in range(4):
        wanted = directly(model, batch, spec)
        optimizer.zero_grad()
        wanted.backward()
        optimizer.step()
        data = cpu.batch_of(*batch, temperature=1.0, global_batch_size=4)
        metrics = tu.get(made.train_batch(data), "metrics")
        losses.append(metrics["loss"])
        assert metrics["loss"] == pytest.approx(wanted.item(), rel=1e-6, abs=1e-6)
        assert "drpo/prob_diff_mean" in metrics
        if len(losses) == 1:
            worst = max((t - p.grad).abs().max().item() for t, p in zip(grads[0], model.parameters(), strict=True))
    if spec in SPECS:
        record("verl, its FSDP2 worker, parameters", version, spec, worst)
    assert worst < 1e-6
    assert abs(losses[-1] - losses[0]) > 0.05
    # Adam divides by the gradient, so rounding moves a parameter by a part of the learning rate.
    moved = [(full(t) - p).abs().max().item() for t, p in zip(theirs, model.parameters(), strict=True)]
    assert max(moved) < 0.02 * rate


# ---- how the loss gets into a worker ----------------------------------------------------------------------------


def fresh(code: str, path: Path | None = None, **environment: str) -> str:
    """The last line that a new process prints, which knows drpo only where `code` or the environment names it."""
    told = {name: value for name, value in os.environ.items() if name != "VERL_USE_EXTERNAL_MODULES"}
    paths = [str(ROOT / "src"), *([str(path)] if path else [])]
    told |= {"PYTHONPATH": os.pathsep.join(paths), "VERL_PLATFORM": "", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=told, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


KNOWN = "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as known; print('drpo' in known)"


def test_a_worker_that_builds_its_configuration_has_the_loss(tmp_path: Path):
    config = composed(*SOUND)
    OmegaConf.resolve(config)  # as verl's driver does before it sends them
    OmegaConf.save(config.actor_rollout_ref.actor, tmp_path / "actor.yaml")
    built = fresh(
        "import sys, json; from omegaconf import OmegaConf; from verl.utils.config import omega_conf_to_dataclass\n"
        "assert 'drpo.adapters.verl' not in sys.modules\n"
        f"loss = omega_conf_to_dataclass(OmegaConf.load({str(tmp_path / 'actor.yaml')!r})).policy_loss\n"
        "from verl.trainer.ppo.core_algos import get_policy_loss_fn\n"
        "found = get_policy_loss_fn(loss.loss_mode)\n"
        "bypassed = loss.rollout_correction['bypass_mode']\n"
        "print(json.dumps([type(loss).__name__, loss.objective, found.__module__, bypassed]))",
        VERL_USE_EXTERNAL_PLUGINS="none",
    )
    assert json.loads(built) == ["DRPOPolicyLossConfig", "drpo(0.2)", "drpo.adapters.verl", True]


def test_the_entry_point_of_the_package_registers_the_loss(tmp_path: Path):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    installed = tmp_path / "drpo_as_installed-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: drpo-as-installed\nVersion: 1\n")
    lines = [f"{name} = {module}" for name, module in declared.items()]
    (installed / "entry_points.txt").write_text("\n".join(["[verl.plugins]", *lines, ""]))
    assert fresh(f"import verl; {KNOWN}", path=tmp_path) == "True"
    assert fresh(f"import verl; {KNOWN}", path=tmp_path, VERL_USE_EXTERNAL_PLUGINS="none") == "False"


def test_the_environment_variable_registers_the_loss():
    assert fresh(f"import verl; {KNOWN}", VERL_USE_EXTERNAL_MODULES="drpo.adapters.verl") == "True"


def test_the_models_external_lib_registers_the_loss(tiny: Path):
    made = f"HFModelConfig(path={str(tiny)!r}, load_tokenizer=False, external_lib='drpo.adapters.verl')"
    assert fresh(f"from verl.workers.config import HFModelConfig; {made}; {KNOWN}") == "True"


# ---- what is refused --------------------------------------------------------------------------------------------


def test_a_sound_configuration_is_accepted_and_built_by_verl():
    config = composed(*SOUND)
    check(config)
    assert omega_conf_to_dataclass(config.actor_rollout_ref.actor).policy_loss.objective == "drpo(0.2)"


UNSOUND = {
    f"{NAMED}.loss_mode=vanilla is another loss": f"{NAMED}.loss_mode=vanilla",
    "trainer.use_v1=false is the legacy trainer.*set trainer.use_v1=true": "trainer.use_v1=false",
    "calculate_log_probs=false.*set actor": "actor_rollout_ref.rollout.calculate_log_probs=false",
    "logprobs_mode=raw_logprobs.*=processed_logprobs": "actor_rollout_ref.rollout.logprobs_mode=raw_logprobs",
    "do_sample=false": "actor_rollout_ref.rollout.do_sample=false",
    "top_p=0.9 .*renormalised.*top_p=1": "actor_rollout_ref.rollout.top_p=0.9",
    "top_k=20 .*renormalised.*top_k=-1": "actor_rollout_ref.rollout.top_k=20",
    "temperature=0 samples nothing": "actor_rollout_ref.rollout.temperature=0",
    "set algorithm.rollout_correction.bypass_mode=true": "algorithm.rollout_correction.bypass_mode=false",
    "rollout_is=token .*rollout_is=null": "algorithm.rollout_correction.rollout_is=token",
    "rollout_rs=token_k1 .*rollout_rs=null": "algorithm.rollout_correction.rollout_rs=token_k1",
    "did you mean 'drpo'": f'{NAMED}.objective="dropo(0.2)"',
    "top-K log-probabilities": f"{NAMED}.objective=\"dppo(0.15, divergence='topk_tv')\"",
}


@pytest.mark.parametrize("message", UNSOUND)
def test_an_anchor_that_is_not_the_samplers_is_refused(message: str):
    with pytest.raises(InputError, match=message) as refused:
        check(composed(*SOUND, UNSOUND[message]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (TYPED[:1], f"set {NAMED}._target_={TARGET}"),
        (CHOSEN, f"{NAMED}.objective is not set"),
        (SEEN, f"'\\+{NAMED}.rollout_correction="),
        (BYPASSED, "bypass_mode is not true"),
    ],
)
def test_what_is_left_out_is_named(missing: tuple[str, ...], message: str):
    left = [override for override in SOUND if override not in missing]
    if missing == TYPED[:1]:  # without the type, verl itself has no such field
        left = [override for override in left if override not in CHOSEN]
    with pytest.raises(InputError, match=message):
        check(composed(*left))


def test_verls_own_trainer_meets_the_same_refusal():
    config = composed(*(override for override in SOUND if override not in BYPASSED))
    with pytest.raises(Exception, match=r"set algorithm\.rollout_correction\.bypass_mode=true"):
        omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def test_a_worker_that_would_compute_another_loss_is_refused(monkeypatch: pytest.MonkeyPatch):
    """verl's own command has no check of ours; its registry takes a second loss of the same name without a word."""
    with pytest.raises(
        InputError, match=rf"{NAMED}\.loss_mode=vanilla is another loss, .* set {NAMED}\.loss_mode=drpo"
    ):
        DRPOPolicyLossConfig(loss_mode="vanilla", objective="drpo(0.2)", rollout_correction={"bypass_mode": True})
    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, LOSS, core_algos.compute_policy_loss_vanilla)
    with pytest.raises(
        InputError, match=r"registry has verl.*compute_policy_loss_vanilla under 'drpo', which would bypass"
    ):
        DRPOPolicyLossConfig(objective="drpo(0.2)", rollout_correction={"bypass_mode": True})


def test_the_loss_refuses_what_only_it_can_see():
    batch = rows(0)
    arguments = (batch.behavior_logp, batch.logp, batch.advantage.unsqueeze(1).expand_as(batch.logp), batch.keep)
    with pytest.raises(InputError, match=r"set algorithm\.rollout_correction\.rollout_is=null"):
        policy_loss(*arguments, config=actor(), rollout_is_weights=torch.ones_like(batch.logp))
    plain = FSDPActorConfig(
        strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=2, policy_loss=PolicyLossConfig(loss_mode=LOSS)
    )
    for config in (plain, None):
        with pytest.raises(InputError, match=f"set it to {TARGET}"):
            policy_loss(*arguments, config=config)


def launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "drpo.adapters.verl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_the_launcher_refuses_in_one_line_and_else_hands_over_to_verl(tmp_path: Path):
    always = ("actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.actor.use_dynamic_bsz=true")
    refused = launch(*always, *SOUND, "actor_rollout_ref.rollout.top_p=0.9", cwd=tmp_path)
    said = [line for line in refused.stderr.splitlines() if not line.startswith(("WARNING", "INFO"))]
    assert (
        refused.returncode == 2 and len(said) == 1 and said[0].startswith("drpo: actor_rollout_ref.rollout.top_p=0.9")
    )
    # verl's own validation runs after ours, and is the first to miss a model.
    handed = launch(*always, *SOUND, "algorithm.adv_estimator=grpo", f"{NAMED[:-12]}.loss_agg_mode=no", cwd=tmp_path)
    assert handed.returncode == 1 and "Invalid loss_agg_mode: no" in handed.stderr


# ---- what of verl this rests on ---------------------------------------------------------------------------------


def test_canary():
    assert importlib.metadata.version("verl") == version
    wanted = {
        "old_log_prob",
        "log_prob",
        "advantages",
        "response_mask",
        "loss_agg_mode",
        "config",
        "rollout_is_weights",
    }
    assert wanted == set(inspect.signature(policy_loss).parameters)
    called = inspect.getsource(ppo_loss)
    assert all(f"{name}={name}," in called for name in wanted), "ppo_loss calls a loss by these keywords"
    assert 'config.policy_loss.get("loss_mode"' in called
    given = {"dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor"}
    assert given < set(inspect.signature(core_algos.agg_loss).parameters)
    assert "rollout_correction" in PolicyLossConfig.__dataclass_fields__
    assert core_algos.POLICY_LOSS_REGISTRY[LOSS] is policy_loss
    # Not run here: training samples with exactly these parameters.
    agent = (Path(verl.__file__).parent / "experimental" / "agent_loop" / "agent_loop.py").read_text()
    sampling = ("temperature=config.temperature", "top_p=config.top_p", "top_k=config.top_k", "repetition_penalty=1.0")
    assert re.search(r",\s+".join(map(re.escape, (*sampling, "logprobs=config.calculate_log_probs"))), agent)
    merging = inspect.getsource(ContinuousTokenBuilder.align_response_metadata)
    assert "aligned_mask += [0] * merge_result.appended_token_count" in merging, "a tool's tokens have mask 0"


def test_untested_versions_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.8.0")
    with pytest.warns(UserWarning, match=r"verl 0\.8\.0 is not between 0\.9\.1 and 0\.9\.1"):
        actor()


def test_the_examples_run():
    done = doctest.testmod(drpo.adapters.verl, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert done.attempted >= 6 and done.failed == 0


def test_the_page_runs():
    assert run_page("verl")["loss"].isfinite()
