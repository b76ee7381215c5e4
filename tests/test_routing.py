"""Which experts two copies of a mixture choose: equal models, a router moved by hand, other families.

Not covered: mixtures whose experts are not handed the numbers that the router chose (they are refused).
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import JetMoeConfig, JetMoeForCausalLM, PreTrainedModel

from drpo.errors import InputError
from drpo.model.policy import Policy
from drpo.model.precision import FP32, Precision
from drpo.model.quantize import quantize_
from drpo.model.routing import routing_mismatch
from drpo.objectives import DRPO
from drpo.rollout.trial import Way
from drpo.train.loop import train
from drpo.train.optim import AdamW
from drpo.train.setup import build
from drpo.types import Sampling
from support.architectures import mixture, settings
from support.mixtures import MIXTURES, fresh
from support.rollouts import transformers_engine
from support.tiny_world import PROBLEMS, completion, own_logp, perturb, tiny
from support.worlds import sampling, tiny_run

SEQUENCES = [
    e.sequence for e in [completion([5, 6, 7, 8, 9]), completion([200, 3], prompt_ids=(9, 8, 7, 6), problem="q")]
]


def router(model: PreTrainedModel, layer: int) -> Tensor:
    (weight,) = (p for n, p in model.named_parameters() if n.endswith(f"layers.{layer}.mlp.gate.weight"))
    return weight


@pytest.mark.parametrize("name", MIXTURES)
def test_equal_models_choose_alike_and_perturbed_routers_do_not(name: str) -> None:
    one, other = fresh(name), fresh(name)
    same = routing_mismatch(one, other, SEQUENCES)
    n_layers = 1 if "dense layer" in name else 2
    assert same is not None and (same.share, same.share_of_tokens, same.n_tokens, same.n_layers) == (0, 0, 7, n_layers)
    with torch.no_grad():
        for n, p in other.named_parameters():
            if ".gate.weight" in n or "router" in n:
                p += torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    moved = routing_mismatch(one, other, SEQUENCES)
    assert 0 < moved.share <= moved.share_of_tokens <= 1 and len(moved.by_layer) == n_layers
    assert moved.share == pytest.approx(sum(moved.by_layer) / n_layers)


def test_a_dense_model_has_nothing_to_choose() -> None:
    assert routing_mismatch(tiny()[0], tiny()[0], SEQUENCES) is None


def test_experts_that_are_told_in_another_way_are_refused() -> None:
    torch.manual_seed(0)
    model = JetMoeForCausalLM(JetMoeConfig(**settings(num_local_experts=4, num_experts_per_tok=2, kv_channels=8)))
    with pytest.raises(InputError, match="JetMoeForCausalLM: its experts are not handed") as error:
        routing_mismatch(model, model, SEQUENCES)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_by_hand() -> None:
    """The last layer's router of the trainer never chooses expert e: those tokens differ that chose it before."""
    sampler, trainer = mixture(), mixture()
    completions = [completion(range(60, 80)), completion(range(5, 20), prompt_ids=(9, 8, 7, 6), problem="q")]
    gate = sampler.model.layers[1].mlp.gate
    chosen: list[list[set[int]]] = []
    for c in completions:
        ids = torch.cat([c.sequence.prompt_ids, c.sequence.token_ids])
        seen = []
        hook = gate.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[2]))
        sampler(input_ids=ids[None])
        hook.remove()
        chosen.append([set(row) for row in seen[0].tolist()[len(c.sequence.prompt_ids) - 1 : -1]])
    flat = [s for row in chosen for s in row]
    expert = max(range(8), key=lambda e: (0 < sum(e in s for s in flat) < len(flat), sum(e in s for s in flat)))
    hit = [expert in s for s in flat]
    assert 0 < sum(hit) < len(hit) == 35

    def without(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ gate.weight.T
        logits[:, expert] = -1e9
        values, chosen = torch.softmax(logits, -1).topk(2)
        return logits, values / values.sum(-1, keepdim=True), chosen

    trainer.model.layers[1].mlp.gate.forward = without
    logp = [own_logp(sampler, c, 1.0) for c in completions]
    found = routing_mismatch(sampler, trainer, [c.sequence for c in completions], logp=logp)
    assert found.by_layer == pytest.approx((0, sum(hit) / 35)) and found.share == pytest.approx(sum(hit) / 70)
    assert found.share_of_tokens == pytest.approx(sum(hit) / 35)
    gap = torch.cat([(p.exp() - c.sequence.behavior_logp.exp()).abs() for p, c in zip(logp, completions, strict=True)])
    assert found.gap_differing == pytest.approx(float(gap[torch.tensor(hit)].mean()))
    assert found.gap_same == pytest.approx(float(gap[~torch.tensor(hit)].mean()))


def test_the_order_of_the_chosen_does_not_count() -> None:
    """Routers that turn the first choice into the second: the same two experts everywhere."""
    one, other = mixture(), mixture()
    for layer in other.model.layers:
        own = layer.mlp.gate.forward

        def turned(hidden: Tensor, own: Callable = own) -> tuple[Tensor, Tensor, Tensor]:
            logits, values, chosen = own(hidden)
            return logits, values.flip(-1), chosen.flip(-1)

        layer.mlp.gate.forward = turned
    assert routing_mismatch(one, other, SEQUENCES).share == 0


def test_an_eight_bit_copy_and_the_trainers_autocast_are_seen() -> None:
    """The sampler's own engine model and a policy's, as they are handed over in a run."""
    model, _tokenizer = perturb(mixture(), 0.1), tiny()[1]
    engine = transformers_engine(model, precision=Precision(torch.float32, "e4m3", "e4m3"))
    policy = Policy(model, precision=FP32, temperature=1.0)
    sampled = engine.generate(PROBLEMS, Sampling(samples=4, max_new_tokens=12), (0,))
    completions = [e.sequence for e in sampled]
    assert routing_mismatch(engine.model, policy.model, completions).share > 0
    assert routing_mismatch(policy.model, policy.model, completions, trainer_dtype=torch.bfloat16).share > 0
    assert routing_mismatch(policy.model, policy.model, completions).share == 0


# ---- the whole loop ----


@pytest.fixture
def folder(tmp_path) -> str:
    """The tiny mixture with the tiny tokenizer, as a model on disk."""
    path = tmp_path / "mixture"
    mixture().save_pretrained(path)
    tiny()[1].save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("precision", "rollout_precision", "rank"),
    [
        ("fp8", "fp8", 0),
        ("bf16", "int8", 2),
        *(pytest.param(p, p, rank, marks=pytest.mark.slow) for p, rank in (("bf16", 0), ("fp32", 0), ("fp32", 2))),
    ],
)
def test_a_mixture_trains(folder: str, tmp_path, precision: str, rollout_precision: str, rank: int) -> None:
    """Two steps of the whole loop: prompts are shared in the engine and in the update, all weights that can move do."""
    run = tiny_run(
        model=folder,
        precision=precision,
        rollout_precision=rollout_precision,
        lora_rank=rank,
        steps=2,
        prompts=4,
        sampling=sampling(samples=4),
        optimizer=AdamW(1e-3),
        objective=DRPO(0.2),
    )
    components = build(run)
    before = {n: p.detach().clone() for n, p in components.policy.state().items()}
    summary = train(run, tmp_path / "run", components=components)
    assert summary["finished"] and components.policy.shares_prompts and components.driver.engine.way is Way.GROUPED
    after = components.policy.state()
    assert {n for n in before if not torch.equal(before[n], after[n])} >= {
        f"model.layers.0.{n}" for n in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight")
    }


@pytest.mark.slow
def test_a_mixture_learns(folder: str, tmp_path) -> None:
    run = tiny_run(
        model=folder, steps=20, prompts=8, sampling=sampling(samples=8), optimizer=AdamW(1e-2), eval_problems=32
    )
    summary = train(run, tmp_path / "run")
    before, after = summary["evaluation_before"], summary["evaluation_after"]
    assert after["low"] > before["high"], (before, after)


def test_adapters_of_experts_on_a_grid_are_refused() -> None:
    with pytest.raises(InputError, match="lora_rank=2: adapters of a mixture's experts") as error:
        Policy(mixture(), precision=Precision(torch.float32, "e4m3"), temperature=1.0, lora_rank=2)
    assert "\n" not in str(error.value)


def test_a_mixtures_adapters_are_merged_under_the_plain_names() -> None:
    """Experts, routers and attention: the merged state gives the adapted model's logits."""
    policy = Policy(mixture(), precision=FP32, temperature=1.0, lora_rank=2)
    perturb(policy.model, 0.1)
    plain, state = mixture(), policy.state()
    assert state.keys() == dict(plain.named_parameters()).keys()
    assert not any(torch.equal(state[n], p) for n, p in plain.named_parameters() if "experts" in n or "gate" in n)
    loaders = quantize_(plain, FP32)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        for n, take in loaders.items():
            take(state[n])
        torch.testing.assert_close(plain(ids).logits, policy.model(ids).logits, rtol=0, atol=5e-5)
