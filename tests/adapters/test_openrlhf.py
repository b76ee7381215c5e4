"""drpo inside OpenRLHF: its own loss, training step, argument parser and Ray actors; DeepSpeed and vLLM are empty."""

import doctest
import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import parity, stand_ins
from adapters.cases import OF_2026, SEQUENCE, SPECS, Rows, direct_gradient, rows
from adapters.pages import run_page
from drpo import objectives
from drpo.errors import InputError
from drpo.spec import parse_spec

pytestmark = pytest.mark.adapters
pytest.importorskip("openrlhf")
pytest.importorskip("ray")
stand_ins.install(stand_ins.OF_OPENRLHF)

from importlib import metadata  # noqa: E402

import openrlhf.utils  # noqa: E402
import ray  # noqa: E402
from openrlhf.models.loss import PolicyLoss  # noqa: E402
from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.trainer.ray import ppo_actor  # noqa: E402

from drpo.adapters import openrlhf as adapter  # noqa: E402

VERSION = metadata.version("openrlhf")
SINCE_0_11_2 = "is_correction_level" in inspect.signature(PolicyLoss).parameters
CORRECTION = "--algo.advantage.is_correction_"
REQUEST = [f"{CORRECTION}level", "token"] if SINCE_0_11_2 else [f"{CORRECTION}enable"]
GOOD = ["--drpo-objective", "drpo(0.2)", *REQUEST]
SMALL = ["--actor.num_gpus_per_node", "1", "--reward.remote_url", "reward.py"]
# Everything that the framework's loss can add, switched on as far as the version has it.
SWITCHED_ON = {"clip_eps_low": 0.1, "clip_eps_high": 0.1, "dual_clip": 3.0} | (
    {"is_correction_level": "token", "is_correction_mode": "mask"}
    if SINCE_0_11_2
    else {"enable_vllm_is_correction": True, "vllm_is_truncated_threshold": [0.5, 5.0]}
)
NAN = float("nan")


def spread(batch: Rows) -> Tensor:
    return batch.advantage.unsqueeze(1).expand(batch.logp.shape)


def loss_of(spec: str, **settings: object) -> adapter.ReweightedLoss:
    return adapter.ReweightedLoss(PolicyLoss(**SWITCHED_ON, **settings), parse_spec(spec, objectives.REGISTRY))


def framework_gradient(loss: nn.Module, batch: Rows, **normalizers: float) -> Tensor:
    logp = batch.logp.clone().requires_grad_()
    unread = torch.full_like(logp, NAN)
    value, *_ = loss(
        logp, unread, spread(batch), action_mask=batch.keep, rollout_log_probs=batch.behavior_logp, **normalizers
    )
    (slope,) = torch.autograd.grad(value, logp)
    return slope


def token_weight(batch: Rows, by_token: bool, counted: bool) -> Tensor:
    """What a token counts in OpenRLHF's four sums, each over 3 data-parallel ranks where counts are given."""
    n_tokens = batch.keep.sum(1, keepdim=True)
    if by_token:
        one = 3 / 100 if counted else 1 / n_tokens.sum()
    else:
        one = (3 / 16 if counted else 1 / len(n_tokens)) / n_tokens
    return torch.as_tensor(one).expand(batch.logp.shape)


@pytest.mark.parametrize("spec", [*SPECS, *OF_2026, SEQUENCE])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_the_frameworks_loss_has_the_objectives_gradient(aggregation: str, spec: str):
    by_token, errors = aggregation == "token-mean", []
    for seed in range(3):
        batch = rows(seed)
        for counts in ({}, {"dp_size": 3, "batch_num_tokens": 100.0, "global_batch_size": 16.0}):
            found = framework_gradient(loss_of(spec, token_level_loss=by_token), batch, **counts)
            wanted = direct_gradient(spec, batch, token_weight(batch, by_token, bool(counts)))
            errors.append((found - wanted).abs().max().item())
    parity.record(f"OpenRLHF, {aggregation}", VERSION, spec, max(errors))
    assert max(errors) < 1e-6


def test_a_token_that_the_sampler_could_not_score_is_on_policy():
    batch = rows(1)
    batch.behavior_logp[0, 0] = NAN
    slope = framework_gradient(loss_of("drpo(0.2)"), batch)
    assert slope.isfinite().all() and slope[0, 0] == pytest.approx(-(batch.advantage[0] / batch.keep.sum()).item())


def trainer_of(loss: nn.Module, logp: Tensor) -> SimpleNamespace:
    """As much of an ActorPPOTrainer as its training_step reads, with log-probabilities for a model."""
    actor = nn.Module()
    actor.forward = lambda *_, **__: (logp, SimpleNamespace())
    strategy = SimpleNamespace(
        ring_attn_group=None,
        backward=lambda value, *_: value.backward(),
        optimizer_step=lambda *_, **__: None,
        get_grad_norm=lambda _: 1.0,
    )
    args = SimpleNamespace(
        actor=SimpleNamespace(entropy_coef=None),
        algo=SimpleNamespace(kl=SimpleNamespace(use_loss=False)),
        train=SimpleNamespace(dynamic_batch_enable=False),
    )
    return SimpleNamespace(
        actor=actor, strategy=strategy, args=args, actor_loss_fn=loss, aux_loss=False, ema_model=None, actor_optim=None,
        actor_scheduler=SimpleNamespace(get_last_lr=lambda: [0.1]),
    )  # fmt: skip


def test_the_frameworks_training_step_trains_the_objective_and_logs_its_figures():
    module = SimpleNamespace(PolicyLoss=PolicyLoss, ActorPPOTrainer=type("T", (ppo_actor.ActorPPOTrainer,), {}))
    adapter.equip(module, parse_spec("drpo(0.2)", objectives.REGISTRY))
    batch = rows(2)
    logp = batch.logp.clone().requires_grad_()
    trainer = trainer_of(module.PolicyLoss(**SWITCHED_ON), logp)
    experience = Experience(
        sequences=torch.zeros(4, 12),
        action_mask=batch.keep,
        action_log_probs=torch.full_like(logp, NAN),
        rollout_log_probs=batch.behavior_logp,
        advantages=spread(batch),
    )
    counts = {"dp_size": 1, "batch_num_tokens": 50.0}
    status = module.ActorPPOTrainer.training_step(trainer, experience, 0.0, 0, counts)
    wanted = direct_gradient("drpo(0.2)", batch, torch.full_like(batch.logp, 1 / 50))
    assert logp.grad is not None and (logp.grad - wanted).abs().max() < 1e-6
    ours = {name for name in status["metrics"] if name.startswith("drpo/")}
    assert ours == {
        f"drpo/{name}" for name in ("prob_diff_mean", "prob_diff_max", "out_of_region", "weight_min", "unscored")
    } | {"drpo/loss_tokens/drpo_0.2"}
    assert all(status["weights"][name] == "token" and status["metrics"][name].dim() == 0 for name in ours)
    moved = (batch.logp.exp() - batch.behavior_logp.exp()).abs()[batch.keep]
    assert status["metrics"]["drpo/prob_diff_mean"] == pytest.approx(moved.mean().item())
    assert status["metrics"]["ppo_clip_ratio"] == 0


@pytest.mark.parametrize("bypass", ["another loss", "a step without it"])
def test_a_step_that_bypasses_the_loss_is_noticed(bypass: str):
    def step(self: Any, *_: Any) -> dict[str, Any]:
        return {"metrics": {}, "weights": {}}

    module = SimpleNamespace(PolicyLoss=PolicyLoss, ActorPPOTrainer=type("T", (), {"training_step": step}))
    adapter.equip(module, parse_spec("drpo(0.2)", objectives.REGISTRY))
    loss = PolicyLoss(**SWITCHED_ON) if bypass == "another loss" else module.PolicyLoss(**SWITCHED_ON)
    with pytest.raises(
        InputError, match=r"did not call the policy loss .*: the loss of drpo_0.2 did not run in this step"
    ):
        module.ActorPPOTrainer.training_step(SimpleNamespace(actor_loss_fn=loss))


def test_refusals_of_the_loss():
    with pytest.raises(InputError, match=r"^--actor\.policy_loss_type gspo: must be ppo"):
        loss_of("drpo(0.2)", policy_loss_type="gspo")
    batch = rows(0)
    with pytest.raises(InputError, match=r"rollout_log_probs is missing.*--algo\.advantage\.is_correction_level token"):
        loss_of("drpo(0.2)")(batch.logp, batch.logp, spread(batch), action_mask=batch.keep, rollout_log_probs=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--drpo-objective is not set"),
        (["--drpo-objective", "dropo(0.2)", *REQUEST], "did you mean 'drpo'"),
        (["--drpo-objective", "dppo(0.15, divergence='topk_tv')", *REQUEST], "top-K"),
        (["--drpo-objective", "drpo(0.2)"], "--algo.advantage.is_correction_level off"),
        ([*GOOD, "--rollout.top_p", "0.9"], "--rollout.top_p 0.9: must be 1"),
        ([*GOOD, "--rollout.top_p=0.9"], "--rollout.top_p 0.9: must be 1"),
        ([*GOOD, "--actor.policy_loss_type", "gspo"], "--actor.policy_loss_type gspo"),
        ([*GOOD, "--actor.dual_clip", "3"], "--actor.dual_clip has no effect"),
        ([*GOOD, "--actor.eps_clip", "0.2"], "--actor.eps_clip has no effect"),
        ([*GOOD, "--actor.eps_clip_low_high", "0.2", "0.3"], "--actor.eps_clip_low_high has no effect"),
        ([*GOOD, f"{CORRECTION}threshold", "0.5", "5"], f"{CORRECTION}threshold has no effect"),
    ],
)  # fmt: skip
def test_the_launcher_refuses_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    assert adapter.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("drpo: ") and message in told and told.count("\n") == 1


def test_the_launcher_hands_over_to_the_frameworks_own_parser(monkeypatch: pytest.MonkeyPatch):
    class ParsedError(Exception):
        pass

    def stop(args: SimpleNamespace):
        raise ParsedError(args)

    started = []
    monkeypatch.setattr(ray, "init", lambda **settings: started.append(settings))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(openrlhf.utils, "get_strategy", stop)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    with pytest.raises(ParsedError) as parsed:
        adapter.main([*GOOD, *SMALL, "--rollout.temperature", "0.7"])
    args = parsed.value.args[0]
    assert args.rollout.temperature == 0.7 and args.actor.num_gpus_per_node == 1 and args.rollout.top_p == 1
    environment = started[0]["runtime_env"]["env_vars"]
    assert environment["DRPO_OBJECTIVE"] == "drpo(0.2)" and environment["NCCL_DEBUG"] == "INFO"


def test_the_flags_and_variables_that_the_launcher_reads_are_the_frameworks():
    source = Path(inspect.getfile(openrlhf), "..", "cli", "train_ppo_ray.py").resolve().read_text()
    for name, default in adapter.WORKERS_ENVIRONMENT.items():
        assert f'"{name}": os.environ.get("{name}", "{default}")' in source
    assert len(adapter.WORKERS_ENVIRONMENT) == source.count(": os.environ.get(")
    for flag in ("--rollout.top_p", "--actor.policy_loss_type", "--actor.eps_clip", "--actor.eps_clip_low_high",
                 "--actor.dual_clip", REQUEST[0]):  # fmt: skip
        assert f'"{flag}"' in source


IN_RAY = """
import inspect, json, os, sys
import ray
from drpo.adapters import openrlhf as launcher

def look(actor):
    names = inspect.unwrap(type(actor).init_model_from_pretrained).__globals__
    trainer = names["ActorPPOTrainer"]
    loss = trainer.__init__.__globals__["PolicyLoss"]()
    return [type(loss).__name__, repr(loss.objective), trainer.training_step.__module__, os.environ["NCCL_DEBUG"]]

def instead_of_training(module, run_name, alter_sys):
    from openrlhf.trainer.ray import ppo_actor
    actor = ppo_actor.PolicyModelActor.options(num_gpus=0).remote(1, 0, None, None)
    seen = ray.get(actor.__ray_call__.remote(look), timeout=600)
    bare = ray.get(ray.remote(lambda: "openrlhf.trainer.ray.ppo_actor" in sys.modules).remote())
    print(json.dumps({"module": module, "seen": seen, "bare": bare}))

launcher.runpy.run_module = instead_of_training
sys.exit(launcher.main(sys.argv[1:]))
"""


def test_the_frameworks_ray_actor_builds_our_loss_and_other_workers_stay_bare(tmp_path: Path):
    """A real Ray, and the framework's own actor class, as its driver would send it to a worker."""
    (tmp_path / "sitecustomize.py").write_text(
        "from adapters import stand_ins\nstand_ins.install(stand_ins.OF_OPENRLHF)\n"
    )
    (tmp_path / "run.py").write_text(IN_RAY)
    paths = [str(tmp_path), *(path for path in sys.path if path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "RAY_memory_monitor_refresh_ms": "0"}
    command = [sys.executable, str(tmp_path / "run.py"), *GOOD]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["module"] == "openrlhf.cli.train_ppo_ray" and told["bare"] is False
    expected = ["ReweightedLoss", repr(parse_spec("drpo(0.2)", objectives.REGISTRY)), "drpo.adapters.openrlhf", "WARN"]
    assert told["seen"] == expected


def test_patch_needs_an_objective(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DRPO_OBJECTIVE", raising=False)
    with pytest.raises(InputError, match="DRPO_OBJECTIVE is not set"):
        adapter.patch()


def test_examples():
    ran = doctest.testmod(adapter, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert ran.attempted > 0 and ran.failed == 0


def test_the_page():
    found = run_page("openrlhf")
    assert math.isfinite(found["loss"].item())
