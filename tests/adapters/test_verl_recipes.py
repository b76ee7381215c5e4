# ruff: noqa: E402
"""The recipes of cluster/verl: every setting with every method, composed and validated by verl as far as a CPU goes."""

import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.adapters
cpu = pytest.importorskip("adapters.verl_on_cpu")  # before verl, whose platform it chooses

import torch
import verl.trainer.config
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from transformers import Qwen3Config, Qwen3MoeConfig
from verl.tools.function_tool import load_function_tools_from_path
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.flops_counter import FlopsCounter
from verl.utils.import_utils import load_extern_object, load_module

from adapters.verl_recipe import CLUSTER, recipe
from drpo import objectives
from drpo.adapters.verl import DRPOPolicyLossConfig, check
from drpo.methods import Method, dppo, drpo, spo
from drpo.reductions import Horizon
from drpo.spec import parse_spec
from drpo.types import Problem

SETTINGS = sorted(
    path.stem for path in (CLUSTER / "config").glob("*.yaml") if path.stem not in ("paper", "dense", "moe")
)
METHODS = sorted(path.stem for path in (CLUSTER / "config" / "objective").glob("*.yaml"))
PAPER: dict[str, Method] = {"drpo": drpo(), "spo": spo(), "dppo": dppo()}


RELEASED = Path(verl.trainer.config.__file__).parent
OURS = {"here", "data_dir", "dppo_threshold", "model_engine"}  # the last is the name of verl's own group
FREE = (  # verl hands these on unread, or reads them as the fields of drpo's own class
    "data.apply_chat_template_kwargs",
    "actor_rollout_ref.actor.policy_loss",
    "actor_rollout_ref.actor.megatron.override_transformer_config",
    "actor_rollout_ref.actor.optim.override_optimizer_config",
    "ray_kwargs.ray_init.runtime_env",
)


def test_there_are_the_settings_and_the_papers_methods():
    ours = {"qwen3-4b-authors", "qwen3-4b-tools", "qwen3-30b-a3b-r3"}
    assert len(SETTINGS) == 9 and ours <= set(SETTINGS) and set(METHODS) >= {"drpo", "none", "grpo", "spo", "dppo"}


def names(config: DictConfig, under: str = "") -> set[str]:
    """Every name in a configuration, from its root."""
    found = set()
    for key in config:
        node, path = config._get_node(key), f"{under}{key}"
        found |= {path} | (names(node, f"{path}.") if isinstance(node, DictConfig) and not node._is_none() else set())
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_name_of_a_setting_is_verls(setting: str):
    """hydra adds a misspelt name of a file without a word."""
    config = recipe(setting, "objective=drpo")
    engine = "_megatron" if config.actor_rollout_ref.actor.strategy == "megatron" else ""
    verls = names(OmegaConf.load(RELEASED / f"_generated_ppo{engine}_trainer.yaml"))
    added = {name for name in names(config) - verls - OURS if not name.startswith(FREE)}
    assert not added


def test_the_authors_setting_is_their_released_recipe():
    config, plain = (recipe(name, "objective=drpo") for name in ("qwen3-4b-authors", "qwen3-4b"))
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    assert (trainer.total_training_steps, trainer.test_freq, trainer.nnodes * trainer.n_gpus_per_node) == (800, 10, 32)
    assert config.data.apply_chat_template_kwargs == {"enable_thinking": True}
    assert (rollout.name, rollout.top_p, rollout.top_k, rollout.temperature) == ("sglang", 1.0, -1, 1.0)
    assert config.algorithm.rollout_correction.bypass_mode and config.actor_rollout_ref.model.lora_rank == 0
    assert config.actor_rollout_ref.actor == plain.actor_rollout_ref.actor


def test_the_tools_setting_loads_a_tool_that_verl_describes_and_calls():
    config = recipe("qwen3-4b-tools", "objective=drpo")
    rollout = config.actor_rollout_ref.rollout
    assert config.data.function_tool_path == rollout.multi_turn.function_tool_path
    (tool,) = load_function_tools_from_path(rollout.multi_turn.function_tool_path)
    described = tool.tool_schema.model_dump(exclude_none=True)["function"]
    assert described["name"] == "calculator" and described["parameters"]["required"] == ["expression"]
    assert tool.fn("12 * (3 + 4)") == "84" and tool.fn("__import__('os')").startswith("Error: ")
    assert (rollout.agent.default_agent_loop, rollout.multi_turn.enable) == ("tool_agent", True)
    named = config.reward.custom_reward_function
    score = load_extern_object(named.path, named.name)
    assert [score("aime24", text, "84")["score"] for text in ("84", r"So \boxed{84}.")] == [0.0, 1.0]


def test_the_replay_setting_replays_the_samplers_routes():
    config = recipe("qwen3-30b-a3b-r3", "objective=drpo")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (actor.megatron.router_replay.mode, rollout.enable_rollout_routing_replay) == ("R3", True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_verl_accepts_every_setting_with_every_method(setting: str, method: str, capfd: pytest.CaptureFixture[str]):
    config = recipe(setting, f"objective={method}")
    check(config)
    assert not need_critic(config) and not need_reference_policy(config)
    validate_config(config, use_reference_policy=False, use_critic=False)
    assert "All configuration checks passed" in capfd.readouterr().out
    # Everything else that verl builds of it; the model's files are all that is missing here.
    OmegaConf.resolve(config)
    assert not OmegaConf.missing_keys(config.actor_rollout_ref)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    omega_conf_to_dataclass(config.algorithm)
    assert isinstance(actor.policy_loss, DRPOPolicyLossConfig)
    assert actor.strategy == ("fsdp2" if setting.startswith(("qwen3-4b", "r1-distill")) else "megatron")
    fp8 = actor.strategy == "megatron" and "fp8" in actor.megatron.override_transformer_config
    assert (rollout.quantization == "fp8", fp8) == ("fp8" in setting, setting.endswith("fp8"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_the_papers(setting: str):
    config = recipe(setting, "objective=drpo")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (config.data.train_batch_size, rollout.n, actor.ppo_mini_batch_size, actor.ppo_epochs) == (64, 8, 16, 1)
    optim = actor.optim
    assert (optim.lr, optim.weight_decay, optim.clip_grad, list(optim.betas)) == (1e-6, 0.01, 1.0, [0.9, 0.999])
    assert (optim.get("lr_scheduler_type"), optim.get("lr_decay_style")).count("constant") >= 1
    assert (rollout.val_kwargs.n, rollout.val_kwargs.temperature, config.trainer.test_freq) == (16, 1.0, 10)
    assert not actor.use_kl_loss and actor.entropy_coeff == 0 and not config.algorithm.use_kl_in_reward


@pytest.mark.parametrize("method", PAPER)
def test_a_method_is_the_one_that_drpo_calls_so(method: str):
    config = recipe("qwen3-4b", f"objective={method}")
    actor = config.actor_rollout_ref.actor
    assert parse_spec(actor.policy_loss.objective, objectives.REGISTRY) == PAPER[method].objective
    keep = torch.tensor([[True, True, False], [True, False, False]])
    loss = torch.rand(2, 3)
    aggregated = core_algos.agg_loss(loss, keep, actor.loss_agg_mode, loss_scale_factor=actor.loss_scale_factor)
    sequence = torch.tensor([0, 0, 0, 1, 1, 1])
    assert PAPER[method].reduction == Horizon(actor.loss_scale_factor)
    weight = PAPER[method].reduction(keep.reshape(-1), sequence)
    assert aggregated.item() == pytest.approx((weight * loss.reshape(-1)).sum().item(), rel=1e-5)


def test_the_advantage_is_the_difference_from_the_groups_mean():
    config = recipe("qwen3-4b", "objective=drpo")
    reward = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    estimator = core_algos.get_adv_estimator_fn(config.algorithm.adv_estimator)
    scaled = config.algorithm.norm_adv_by_std_in_grpo
    group = torch.zeros(4, dtype=torch.long).numpy()
    advantage, _ = estimator(reward, torch.ones(4, 2), index=group, norm_adv_by_std_in_grpo=scaled)
    assert advantage[:, 0].tolist() == pytest.approx([0.25, -0.75, 0.25, 0.25])


def test_dppos_threshold_under_fp8_end_to_end():
    spelt = {s: recipe(s, "objective=dppo").actor_rollout_ref.actor.policy_loss.objective for s in SETTINGS}
    assert {s for s, text in spelt.items() if text == "dppo(0.6)"} == {"qwen3-30b-a3b-fp8"}
    assert set(spelt.values()) == {"dppo(0.15)", "dppo(0.6)"}


def test_a_method_has_to_be_chosen():
    with pytest.raises(ConfigCompositionException, match="objective"):
        recipe("qwen3-4b")


def test_run_sh_refuses_and_hands_over(tmp_path: Path):
    run = [str(CLUSTER / "run.sh")]
    usage = subprocess.run(run, capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    for names, label in ((SETTINGS, "SETTING"), (METHODS, "METHOD")):
        (listed,) = re.findall(rf"^  {label}: +(.*)$", usage.stderr, flags=re.M)
        assert sorted(listed.split()) == names
    greedy = [*run, "qwen3-4b", "drpo", "actor_rollout_ref.rollout.temperature=0"]
    told = cpu.with_this_python()
    refused = subprocess.run(greedy, capture_output=True, text=True, check=False, env=told, cwd=tmp_path)
    assert refused.returncode == 2 and "drpo: actor_rollout_ref.rollout.temperature=0 samples nothing" in refused.stderr


def test_verl_finds_the_reward_function():
    named = recipe("qwen3-4b", "objective=drpo").reward.custom_reward_function
    compute_score = load_extern_object(named.path, named.name)
    right, wrong = (
        compute_score(data_source="aime24", solution_str=text, ground_truth="204", extra_info={})
        for text in (r"So it is \boxed{204}.", "I do not know.")
    )
    assert right == {"score": 1.0, "acc": 1.0, "failed": 0.0} and wrong == {"score": 0.0, "acc": 0.0, "failed": 0.0}


@pytest.mark.parametrize("name", ["QWEN3_4B", "QWEN3_30B_A3B", "R1_DISTILL_1_5B"])
def test_the_costs_operations_are_verls(name: str):
    cost = load_module(str(CLUSTER / "cost.py"))
    shape = getattr(cost, name)
    sizes = {"vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers}
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
    experts = {
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.active,
        "moe_intermediate_size": shape.mlp,
    }
    kind = Qwen3MoeConfig if shape.experts else Qwen3Config
    config = kind(**sizes, **heads, **(experts if shape.experts else {"intermediate_size": shape.mlp}))
    length = cost.PROMPT_TOKENS + cost.NEW_TOKENS
    verls = FlopsCounter(config).estimate_flops([length], delta_time=1.0)[0] * 1e12
    looked_up = 6 * shape.vocabulary * shape.hidden * length  # verl counts the embedding as a product
    assert cost.training_flops(shape, recompute=False) == pytest.approx(verls - looked_up, rel=1e-3)


class Tokenizer:
    """A word a token."""

    def apply_chat_template(self, messages: list[dict], **_: object) -> list[int]:
        return [0] * sum(len(message["content"].split()) for message in messages)


def test_verls_dataset_reads_what_is_prepared(tmp_path: Path):
    prepare = load_module(str(CLUSTER / "prepare_data.py"))
    problems = [Problem.of_text("0", "1 + 1?", "2"), Problem.of_text("1", "How many? " + "a " * 3000, "3000")]
    prepare.write(tmp_path / "aime24.parquet", problems, "test")
    here = [f"+data.cache_dir={tmp_path}", "data.filter_overlong_prompts_workers=null"]
    config = recipe("qwen3-4b", "objective=drpo", *here).data
    (read,) = RLHFDataset(str(tmp_path / "aime24.parquet"), Tokenizer(), config)  # the longer one is left out
    assert read["raw_prompt"] == [{"role": "user", "content": "1 + 1?"}]
    assert (read["data_source"], read["reward_model"]["ground_truth"]) == ("aime24", "2")
