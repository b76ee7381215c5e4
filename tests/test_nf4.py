"""QLoRA: frozen weights in NF4 under adapters; trainer, sampler and saved model are one function."""

import ast
import copy
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import drpo
from drpo.errors import InputError
from drpo.model.nf4 import BLOCK, VALUES, NF4Linear, dense_, held_layers, hold_base_, to_nf4
from drpo.model.policy import Policy
from drpo.model.saving import probe, save_model
from drpo.model.tables import kept
from drpo.rollout.weight_sync import WeightSync
from drpo.train.config import Run, configure
from drpo.types import Sampling
from support.architectures import FAMILIES, mixture, settings
from support.rollouts import transformers_engine
from support.sources import parsed
from support.tiny_world import PROBLEMS, REWARDS, STOPS, batched, grouped, how, own_logp, perturb, sampled, tiny
from support.updates import close, gradients, policy_of


def held() -> PreTrainedModel:
    model, _ = tiny(STOPS)
    hold_base_(model, "nf4")
    return model


def plain_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model of ordinary layers with the numbers that another holds."""
    plain = copy.deepcopy(model)
    dense_(plain, torch.float32)
    return plain


def test_the_values_are_quantiles_of_a_normal_distribution() -> None:
    """Appendix E of the paper: equal shares on either side of 0, and 0 itself."""
    last = 0.9677083
    upper = torch.special.ndtri(torch.linspace(last, 0.5, 9, dtype=torch.float64)[:-1])
    lower = -torch.special.ndtri(torch.linspace(last, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([upper, lower, torch.zeros(1)]).sort().values / upper.max()
    torch.testing.assert_close(torch.tensor(VALUES, dtype=torch.float64), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (33, 5), (3, 64, 2), (1, 1)], ids=str)
def test_every_number_is_the_nearest_value_times_the_largest_of_its_block(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.rand(shape).exp()
    x.view(-1)[:BLOCK] *= 1e-30  # a block of its own size
    dense = to_nf4(x).dense(torch.float32)
    values = torch.tensor(VALUES)
    for part, got in zip(x.flatten().split(BLOCK), dense.flatten().split(BLOCK), strict=True):
        largest = part.abs().max()
        nearest = values[((part / largest)[:, None] - values).abs().argmin(1)]
        assert torch.equal(got, nearest * largest)
    assert dense.shape == x.shape


def test_what_a_mode_without_numbers_makes_is_not_kept() -> None:
    """`docs/what_fits.py` estimates QLoRA in such a mode, in a process that may go on."""
    table = kept(torch.ones)
    with FakeTensorMode():
        assert type(table(2)) is not Tensor
    assert type(table(2)) is Tensor
    assert table(2) is table(2)


def test_no_other_cache_holds_tensors() -> None:
    functions = [
        (path.name, node)
        for path in Path(drpo.__file__).parent.rglob("*.py")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef)
    ]
    cached = [(name, f) for name, f in functions if re.search("cache", " ".join(map(ast.unparse, f.decorator_list)))]
    assert len(cached) > 10
    assert [f"{name}: {f.name}" for name, f in cached if f.returns and "Tensor" in ast.unparse(f.returns)] == []


def test_zeros_stay_and_what_is_not_finite_shows() -> None:
    assert not to_nf4(torch.zeros(3, 64)).dense(torch.float32).any()
    for bad in (torch.nan, torch.inf):
        x = torch.ones(128)
        x[3] = bad
        dense = to_nf4(x).dense(torch.float32)
        assert not dense[:BLOCK].isfinite().all() and torch.equal(dense[BLOCK:], x[BLOCK:])


def test_a_weight_takes_4_5_bits() -> None:
    layer = NF4Linear(nn.Linear(256, 128))
    bits = 8 * sum(buffer.nbytes for buffer in layer.buffers())
    assert bits == 4.5 * 256 * 128 and [n for n, _ in layer.named_parameters()] == ["bias"]
    assert layer.weight.shape == (128, 256) and layer.weight.isnan().all() and not layer.state_dict().keys() - {"bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_have_the_gradient_of_autograd_on_the_held_numbers(dtype: torch.dtype) -> None:
    batch = batched(grouped(sampled(*tiny(STOPS)), REWARDS), how())[0]
    model = held()
    policies = [policy_of(m, dtype=dtype, lora_rank=4) for m in (plain_of(model), model)]
    for policy in policies:
        perturb(policy.model, 0.1)  # a new adapter's second factor is 0
    (plain, _), (ours, _) = (gradients(policy, batch) for policy in policies)
    assert ours.keys() == plain.keys() and len(ours) == 28
    close(ours, plain, 1e-6 if dtype == torch.float32 else 2e-2)
    unrounded, _ = gradients(perturb_policy(tiny(STOPS)[0], dtype), batch)
    with pytest.raises(AssertionError):
        close(unrounded, plain, 2e-2)


def perturb_policy(model: PreTrainedModel, dtype: torch.dtype) -> Policy:
    policy = policy_of(model, dtype=dtype, lora_rank=4)
    perturb(policy.model, 0.1)
    return policy


def test_the_sampler_and_the_saved_model_are_the_trained_function(tmp_path: Path) -> None:
    model, tokenizer = held(), tiny()[1]
    sync = WeightSync(model)  # what vLLM and a server get
    engine = transformers_engine(model, tokenizer)
    assert not list(held_layers(engine.model))
    policy = perturb_policy(model, torch.float32)
    names = dict(tiny(STOPS)[0].named_parameters()).keys()
    assert policy.state().keys() == names and "none" not in policy.state()
    sent = sync.checkpoint(policy.state())
    assert sent.keys() == names and all(value.isfinite().all() for value in sent.values())
    engine.load_weights(policy.state(), version=1)
    for completion in engine.generate(PROBLEMS, Sampling(samples=4, max_new_tokens=12), (0,)):
        mu = completion.sequence.behavior_logp
        torch.testing.assert_close(mu, own_logp(policy.model, completion, 1.0), rtol=0, atol=2e-5)
    ids = probe(model)
    logits = policy.logits(ids)
    save_model(policy.plain(), tokenizer, tmp_path / "model", logits)
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    torch.testing.assert_close(saved(input_ids=ids[None]).logits[0], logits, rtol=0, atol=2e-5)
    assert (tiny(STOPS)[0](input_ids=ids[None]).logits[0] - logits).abs().max() > 0.5


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    model = held()
    weights = {layer.held.shape for _, layer in held_layers(model)}
    kept: list[Tensor] = []
    policy = policy_of(model, lora_rank=4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        policy.model(input_ids=torch.arange(1, 9)[None])
    assert kept and not [t for t in kept if t.shape in weights or t.shape[::-1] in weights]


def unlike() -> PreTrainedModel:
    return FAMILIES["gpt2, learned positions"]().eval()


def sharing() -> PreTrainedModel:
    model = LlamaForCausalLM(LlamaConfig(**settings()))
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model.eval()


@pytest.mark.parametrize(
    ("make", "reason"),
    [(unlike, "no plain linear layers"), (mixture, "experts of a mixture"), (sharing, "shares its weight")],
)
def test_a_model_that_cannot_be_held_is_refused_in_one_line(make, reason: str) -> None:
    with pytest.raises(InputError, match=rf"^base_precision=nf4: .*{reason}.*leave --base-precision out$"):
        hold_base_(make(), "nf4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "base_precision=nf4: .*set --lora-rank 16"),
        ({"lora_rank": 4, "precision": "fp8"}, "base_precision=nf4: .*set --precision bf16 or fp32"),
        ({"lora_rank": 4, "shard": "fsdp"}, "base_precision=nf4: .*set --shard none"),
        ({"lora_rank": 4, "base_precision": "nf3"}, "base_precision='nf3'.*nf4"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        configure(Run(), **{"base_precision": "nf4", **changes})
