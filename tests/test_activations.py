"""Layers that are computed again: the same gradients, less memory, and when a run does so.

Not covered: CUDA, where the backward pass runs in a thread of its own; several processes (test_ranks.py).
"""

import gc
import logging
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import profile
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from drpo.doctor import machine
from drpo.errors import InputError
from drpo.model import activations
from drpo.model.activations import checkpoint_activations, count_activations, decoder_layers, is_checkpointed
from drpo.model.critic import Critic
from drpo.model.nf4 import hold_base_
from drpo.model.policy import Policy
from drpo.model.precision import FP32, Precision
from drpo.objectives import DRPO
from drpo.recipes.addition import smoke
from drpo.train import memory
from drpo.train.config import Run, configure
from drpo.train.memory import StepShape, estimate_step, largest_micro_batch
from drpo.train.optim import AdamW, AdamW8bit
from drpo.train.setup import build
from drpo.train.step import update_policy
from drpo.types import Batch
from support.architectures import FAMILIES, PLAIN, mixture, settings
from support.families import build as build_family
from support.tiny_world import REWARDS, STOPS, batched, grouped, how, sampled, tiny
from support.updates import equal, gradients
from support.worlds import sampling

BF16 = Precision(torch.bfloat16)
FP8 = Precision(torch.bfloat16, "e4m3", "e4m3")


def adamw(policy: Policy) -> torch.optim.Optimizer:
    return AdamW(1e-6).build(list(policy.trainable().values()), policy.embeddings())


def deep(n_layers: int, **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings(num_hidden_layers=n_layers, **more))).eval()


def made(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The same model at every call, as loaded: not in train mode."""
    torch.manual_seed(0)
    return make().eval()


def dropping() -> PreTrainedModel:
    """A model whose configuration has dropout."""
    sizes = dict(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))


CASES: dict[str, tuple[Callable[[], PreTrainedModel], Precision, int]] = {
    "shared prompts, fp32": (FAMILIES["qwen3"], FP32, 0),
    "bf16": (FAMILIES["gemma3, mixed windows"], BF16, 0),
    "fp8": (FAMILIES["qwen3"], FP8, 0),
    "adapters, bf16": (FAMILIES["qwen3"], BF16, 2),
    "padded rows": (PLAIN["gemma2, soft cap"], BF16, 0),
    "dropout in the configuration": (dropping, FP32, 0),
    "a mixture, fp8": (mixture, FP8, 0),
    "a mixture's adapters": (mixture, FP32, 2),
}


@pytest.fixture(scope="module")
def groups() -> list[object]:
    return grouped(sampled(*tiny(STOPS)), REWARDS)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_to_the_bit(case: str, groups: list[object]) -> None:
    make, precision, lora_rank = CASES[case]
    kept, again = (Policy(made(make), precision=precision, temperature=1.0, lora_rank=lora_rank) for _ in range(2))
    for p in (*kept.trainable().values(), *again.trainable().values()):
        p.data.add_(0.01)  # a new adapter's second factor is 0
    checkpoint_activations(again.model)
    passes = [0]
    layer = decoder_layers(again.model)[0]
    next(layer.children()).register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    (batch,) = batched(groups[::2], how(share_prompts=kept.shares_prompts))
    expected, stats = gradients(kept, batch)
    found, same = gradients(again, batch)
    assert passes[0] == 2 * len(batch.micro_batches)
    assert equal(found, expected) and any(g.any() for g in expected.values())
    assert same.loss == stats.loss and same.grad_norm == stats.grad_norm


def test_a_critic_learns_the_same(groups: list[object]) -> None:
    (batch,) = batched(groups, how())
    found = []
    for again in (False, True):
        critic = Critic(made(FAMILIES["qwen3"]), dtype=torch.bfloat16)
        torch.nn.init.ones_(critic.head.weight)
        if again:
            checkpoint_activations(critic.model)
        for micro in batch.micro_batches:
            critic(micro).square().sum().backward()
        found.append({name: p.grad for name, p in critic.trainable().items()})
    assert equal(*found) and any(g.any() for g in found[0].values())


def saved_bytes(policy: Policy, shape: StepShape) -> int:
    """What autograd holds after a forward pass, without the weights."""
    sizes: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in policy.model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        sizes.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor.detach()

    with saved_tensors_hooks(note, lambda tensor: tensor):
        logp, _ = policy(largest_micro_batch(shape, policy))
    del logp
    return sum(sizes.values())


def test_of_long_micro_batches_at_most_a_fifth_of_the_memory_is_kept() -> None:
    layers, shape = 12, StepShape(64, 128, prompts=8, samples=2, micro_batch_tokens=2048)
    policy = Policy(deep(layers), precision=FP32, temperature=1.0)
    everything = saved_bytes(policy, shape)
    checkpoint_activations(policy.model)
    assert saved_bytes(policy, shape) + everything / layers <= everything / 5  # one layer at a time comes back


def test_counting_tells_layers_apart_and_leaves_the_model_as_it_was(groups: list[object]) -> None:
    """The first two layers, extrapolated, keep what all of them are seen to keep."""
    policy = Policy(mixture(), precision=BF16, temperature=1.0)
    shape, few = StepShape(20, 30, prompts=2, samples=4), StepShape(4, 4, prompts=1, samples=2)
    micro, small = largest_micro_batch(shape, policy), largest_micro_batch(few, policy)
    before = count_activations(policy, micro, small)
    logp, _ = policy(micro)
    checkpoint_activations(policy.model)
    assert count_activations(policy, micro, small) == before
    assert is_checkpointed(policy.model) and torch.equal(policy(micro)[0], logp)
    assert before.inputs == 2 * len(micro.input_ids) * 32 * 4
    assert before.largest_layer * 2 == pytest.approx(before.layers, rel=0.2)


def test_counting_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs that it is counted on, and that nobody goes back through, go with it."""
    policy = Policy(deep(3), precision=FP32, temperature=1.0)
    hooks, kept = torch.autograd.graph.saved_tensors_hooks, []

    def watched(pack: Callable[[Tensor], Tensor], unpack: Callable[[Tensor], Tensor]) -> object:
        def packed(tensor: Tensor) -> Tensor:
            saved = pack(tensor)
            kept.extend([weakref.ref(saved)] if tensor.grad_fn is not None else [])
            return saved

        return hooks(packed, unpack)

    monkeypatch.setattr(activations, "saved_tensors_hooks", watched)
    few = largest_micro_batch(StepShape(4, 4, prompts=1, samples=2), policy)
    count_activations(policy, few, few)
    gc.collect()
    assert kept and all(reference() is None for reference in kept)


@pytest.mark.parametrize(
    ("shape", "positions"),
    [
        (StepShape(10, 20, prompts=1, samples=2), 50),
        (StepShape(10, 20, prompts=100, samples=4, micro_batch_tokens=200), 180),
        (StepShape(10, 20, prompts=100, samples=4, updates=100, micro_batch_tokens=200), 90),
        (StepShape(10, 500, prompts=3, samples=4, micro_batch_tokens=200), 510),
    ],
)
def test_the_largest_micro_batch_is_as_full_as_it_may_be(shape: StepShape, positions: int) -> None:
    """The last sampled token of each row predicts nothing and has no position."""
    policy = Policy(FAMILIES["qwen3"](), precision=FP32, temperature=1.0)
    micro = largest_micro_batch(shape, policy)
    rows = int(micro.row.max()) + 1
    assert len(micro.input_ids) == positions - rows


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that the CPU's allocator has given out at once during some work, beyond those of before."""
    with profile(profile_memory=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


ADAMW = (AdamW(1e-6), torch.float32)
PEAKS = {
    "fp32": (FP32, 0, "off", StepShape(40, 100, prompts=4, samples=4, micro_batch_tokens=900), *ADAMW),
    "bf16": (BF16, 0, "off", StepShape(24, 60, prompts=4, samples=4), *ADAMW),
    "adapters, long rows": (FP32, 4, "off", StepShape(24, 700, prompts=1, samples=2), *ADAMW),
    "nf4 under adapters": (BF16, 4, "off", StepShape(24, 300, prompts=1, samples=4), *ADAMW),
    "computed again": (FP32, 0, "on", StepShape(40, 300, prompts=2, samples=4), *ADAMW),
    "computed again, bf16": (BF16, 0, "on", StepShape(40, 60, prompts=4, samples=8), *ADAMW),
    "moments in 8 bits": (FP32, 0, "on", StepShape(40, 60, prompts=4, samples=4), AdamW8bit(1e-6), torch.float32),
    "bf16 weights": (BF16, 0, "on", StepShape(40, 60, prompts=4, samples=4), AdamW(1e-6), torch.bfloat16),
    "all in few bits": (BF16, 0, "on", StepShape(40, 60, prompts=4, samples=4), AdamW8bit(1e-6), torch.bfloat16),
    "bf16 base of adapters": (BF16, 4, "on", StepShape(40, 60, prompts=4, samples=4), AdamW(1e-6), torch.bfloat16),
}
"""Precision, rank of adapters, whether layers are computed again, the largest step, optimiser, dtype of weights."""


@pytest.mark.slow
@pytest.mark.parametrize("case", PEAKS)
def test_the_estimate_is_within_15_percent_of_the_peak(case: str) -> None:
    precision, lora_rank, setting, shape, spec, dtype = PEAKS[case]
    model = deep(8, hidden_size=64)
    hold_base_(model, "nf4" if case.startswith("nf4") else "fp32")
    policy = Policy(model, precision=precision, temperature=1.0, lora_rank=lora_rank, master_weights=dtype)
    optimizer = spec.build(list(policy.trainable().values()), policy.embeddings())
    need = estimate_step(policy, optimizer, shape, checkpointed=setting == "on")
    if setting == "on":
        checkpoint_activations(policy.model)
    micro = largest_micro_batch(shape, policy)
    batch = Batch((micro, micro), credits=(), n_episodes=0, n_tokens=0, n_skipped=0)

    def updates() -> None:
        for _ in range(2):  # the optimiser's moments are there in the second
            update_policy(policy, optimizer, batch, DRPO(0.2), 1e-6, 1.0)

    found = peak_bytes(updates)
    assert found == pytest.approx(need.total, rel=0.15), (case, found / need.total, need)


def a_run(**changes: object) -> Run:
    return configure(smoke(), sampling=sampling(max_new_tokens=16), eval_problems=0, **changes)


@pytest.mark.parametrize(("free", "again"), [(2**40, False), (300_000, True)])
def test_auto_computes_again_what_would_not_fit(free: int, again: bool, monkeypatch, caplog) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    with caplog.at_level(logging.INFO, logger="drpo"):
        components = build(a_run())
    assert is_checkpointed(components.policy.model) == again
    said = [r.getMessage() for r in caplog.records if "checkpoint_activations" in r.getMessage()]
    assert bool(said) == again and all("checkpoint_activations=on, since" in text for text in said)


def test_a_setting_holds_whatever_is_free(monkeypatch) -> None:
    for setting, free in (("off", 0), ("on", 2**40)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        components = build(a_run(checkpoint_activations=setting, critic=None))
        assert is_checkpointed(components.policy.model) == (setting == "on")


def test_what_fits_by_the_quick_bound_fits_by_the_estimate() -> None:
    """Nothing is measured where the bound is small enough."""
    recurrent = (partial(build_family, family) for family in ("mamba", "kimi_linear"))
    for make in (*FAMILIES.values(), mixture, *recurrent):
        policy = Policy(made(make), precision=BF16, temperature=1.0)
        for shape in (StepShape(8, 8, prompts=1, samples=2), StepShape(60, 60, prompts=2, samples=8)):
            need = estimate_step(policy, adamw(policy), shape, checkpointed=False)
            assert need.activations + need.head <= memory._most_activations(policy, shape)


def test_a_model_that_does_not_mark_its_layers_is_refused_in_one_line(monkeypatch) -> None:
    monkeypatch.setattr("drpo.model.activations.decoder_layers", lambda model: [])
    with pytest.raises(InputError, match=r"^checkpoint_activations=on: Llama.*--checkpoint-activations off$"):
        checkpoint_activations(deep(2))


def test_an_unknown_setting_is_one_line() -> None:
    with pytest.raises(InputError, match=r"checkpoint_activations='yes'; known: auto, on, off"):
        a_run(checkpoint_activations="yes")


def test_the_doctor_says_that_layers_are_computed_again() -> None:
    policy, shape = Policy(deep(4), precision=FP32, temperature=1.0), StepShape(10, 50, prompts=2, samples=4)
    kept = machine.memory(policy, adamw(policy), shape)
    checkpoint_activations(policy.model)
    again = machine.memory(policy, adamw(policy), shape)
    assert "layers computed again" in again.figure and "layers computed again" not in kept.figure
    assert again.values["need_bytes"] < kept.values["need_bytes"]
