"""Moments in 8 bits, bfloat16 weights: what an update does, that a run goes on to the bit, and what is refused.

Not covered: CUDA; several processes (test_ranks.py); the peak of an update (test_activations.py).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from drpo.doctor import machine
from drpo.errors import InputError
from drpo.model.loading import load, tiny
from drpo.model.master_weights import matrices
from drpo.model.policy import Policy
from drpo.model.precision import FP32, Precision
from drpo.rollout.transformers import TransformersEngine
from drpo.spec import parse_spec
from drpo.train import stored, tensor_files
from drpo.train.compact_adamw import BLOCK, CompactAdamW, _dequantize, _levels, _quantize_into, round_stochastically
from drpo.train.config import Run, configure
from drpo.train.loop import train
from drpo.train.memory import StepShape
from drpo.train.optim import OPTIMIZERS, AdamW, AdamW8bit, Muon, state_bytes
from drpo.train.records import CHECKPOINTS
from drpo.train.setup import build
from support.architectures import FAMILIES, mixture
from support.runs import StopsAfter, assert_same_run
from support.tiny_world import REWARDS, STOPS, batched, grouped, how, sampled
from support.tiny_world import tiny as with_stops
from support.updates import gradients
from support.worlds import few_run

BF16 = Precision(torch.bfloat16)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compact(parameters: Sequence[nn.Parameter], **settings: object) -> CompactAdamW:
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eight_bits": True, **settings}
    return CompactAdamW([{"params": list(parameters), "weight_decay": 0.1}], **options)  # type: ignore[arg-type]


def stepped(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for number, p in enumerate(parameters):
            p.grad = noise(*p.shape, seed=10 * step + number).to(p.dtype)
        optimizer.step()


def some_weights() -> list[nn.Parameter]:
    """A matrix whose rows are no multiple of a block, a stack of matrices, and a vector."""
    return [nn.Parameter(noise(*shape, seed=n)) for n, shape in enumerate([(5, 700), (2, 3, 40), (30,)])]


def test_with_float32_moments_it_is_adamw() -> None:
    ours, theirs = some_weights(), some_weights()
    stepped(compact(ours, eight_bits=False), ours, 4)
    stepped(torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.1, foreach=False), theirs, 4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_levels_are_those_of_the_paper() -> None:
    for signed in (True, False):
        levels = _levels(signed, torch.device("cpu"))
        assert len(levels) == 256 and bool((levels.diff() > 0).all()) and 0 in levels and levels.max() == 1
        assert sum(levels > 0.1) == (65 if signed else 129)  # the last decade and 1 itself
        assert levels[levels > 0].min() == pytest.approx(5.5e-7 if signed else 3.25e-7)
    assert int((_levels(True, torch.device("cpu")) < 0).sum()) == 127


@pytest.mark.parametrize("columns", [16, 256, 700])
def test_a_moment_comes_back_as_the_nearest_level_but_for_near_ties(columns: int) -> None:
    x = noise(6, columns) * 10.0 ** torch.arange(-4, 2)[:, None]
    x[2] = 0
    codes, scale = torch.empty(6, columns, dtype=torch.uint8), torch.empty(6, -(-columns // BLOCK))
    for signed, values in ((True, x), (False, x.abs())):
        _quantize_into(codes, scale, values, signed=signed)
        again = _dequantize(codes, scale, signed=signed)
        levels = _levels(signed, x.device)
        for row, back, scales in zip(values, again, scale, strict=True):
            for start in range(0, columns, BLOCK):
                block, found = row[start : start + BLOCK], back[start : start + BLOCK]
                largest = scales[start // BLOCK]
                assert largest == block.abs().max()
                nearest = (block[:, None] - largest * levels).abs().min(1).values
                rounding = 2**-7 * block.abs() + 1e-6 * largest  # of the ratio to bfloat16
                assert bool(((block - found).abs() <= nearest + rounding).all())


def test_in_8_bits_the_steps_are_nearly_those_of_adamw() -> None:
    """Over 30 steps towards a target, the weights move as far, to a few percent."""
    target = noise(8, 600, seed=3)
    moved = []
    for make in (lambda p: compact(p, lr=1e-2), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)):
        weight = nn.Parameter(noise(8, 600))
        optimizer = make([weight])
        for step in range(30):
            weight.grad = weight.detach() - target + 0.3 * noise(8, 600, seed=step)
            optimizer.step()
        moved.append(weight.detach() - noise(8, 600))
    apart = (moved[0] - moved[1]).norm() / moved[1].norm()
    assert 0 < apart < 0.03


def test_a_small_moment_beside_a_large_one_makes_no_large_step() -> None:
    """A second moment, a square, would round to 0 where the first does not; its root does not."""
    weight = nn.Parameter(torch.zeros(1, 256))
    optimizer = compact([weight], lr=1.0)
    weight.grad = torch.full((1, 256), 1e-5)
    weight.grad[0, 0] = 1.0
    optimizer.step()
    weight.grad = torch.zeros(1, 256)  # as of the row of a token that a batch does not have
    optimizer.step()
    assert float(weight.detach().abs().max()) < 3  # 400 where the denominator is 1e-8


def test_rows_are_updated_by_themselves() -> None:
    """So that they can be divided over any number of processes, which take the steps of one."""
    whole = [nn.Parameter(noise(6, 300))]
    parts = [nn.Parameter(rows) for rows in noise(6, 300).split((1, 5))]
    optimizers = compact(whole), compact(parts)
    for step in range(3):
        gradient = noise(6, 300, seed=step)
        whole[0].grad = gradient
        for part, rows in zip(parts, gradient.split((1, 5)), strict=True):
            part.grad = rows
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(whole[0], torch.cat(list(parts)))


def test_rounding_keeps_the_mean_and_what_bfloat16_has() -> None:
    x = torch.tensor([1 + 2**-9, -(1 + 2**-9), 3e-5, 0.0, -2.0])
    rounded = round_stochastically(x.expand(20_000, 5).contiguous(), torch.Generator().manual_seed(0)).double()
    exact = x.to(torch.bfloat16).double()
    assert torch.equal(rounded[:, 3:], exact[3:].expand(20_000, 2))
    for column, value in zip(rounded.T[:3], x[:3].double(), strict=True):
        below, above = sorted(set(column.tolist()))
        assert below < value < above and above - below < 2**-7 * abs(value) * 1.01
        sigma = (above - below) / 2 / 20_000**0.5
        assert abs(float(column.mean() - value)) < 5 * sigma


def test_steps_too_small_for_bfloat16_are_taken_on_average() -> None:
    """At 1e-6 no weight near 1 would ever move if rounding were to the nearest."""
    weight = nn.Parameter(torch.ones(100, 1000, dtype=torch.bfloat16))
    optimizer = compact([weight], lr=1e-6)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    moved = 1 - weight.detach().double()
    assert float(moved.mean()) == pytest.approx(20e-6, rel=0.2)
    assert 0 < float((moved != 0).double().mean()) < 0.02


def test_rounding_depends_on_seed_place_and_step_alone() -> None:
    def run(seed: int, steps: int = 3) -> list[Tensor]:
        weights = [nn.Parameter(noise(4, 300).to(torch.bfloat16)) for _ in range(2)]
        optimizer = compact(weights, seed=seed)
        for step in range(steps):
            torch.manual_seed(step + seed)  # the global generator is not asked
            for p in weights:
                p.grad = noise(4, 300, seed=step).to(torch.bfloat16)
            optimizer.step()
        return [p.detach() for p in weights]

    first, again, other = run(0), run(0), run(1)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        *((spec, torch.float32) for spec in (AdamW(1e-3), AdamW8bit(1e-3), Muon(1e-3))),
        *((spec, torch.bfloat16) for spec in (AdamW(1e-3), AdamW8bit(1e-3))),
    ],
)
def test_the_bytes_of_the_state_are_known_before_it_is_there(spec: object, dtype: torch.dtype) -> None:
    weights = [nn.Parameter(noise(*shape).to(dtype)) for shape in [(30, 700), (40, 16)]] + [nn.Parameter(noise(9))]
    optimizer = spec.build(weights, [])  # type: ignore[attr-defined]
    expected = state_bytes(optimizer)
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = (t for state in optimizer.state.values() for name, t in state.items() if name != "step")
    assert sum(t.nbytes for t in held) == expected


LOW = {"precision": "bf16", "master_weights": "bf16"}
"""What both formats together take: emulated on most CPUs, so on a tiny model."""

RUNS: dict[str, dict[str, object]] = {
    "8 bits": {"optimizer": AdamW8bit(1e-2)},
    "bf16 weights": {"optimizer": AdamW(1e-3), **LOW},
    "both": {"optimizer": AdamW8bit(1e-3), **LOW},
    "adapters on a bf16 model": {"optimizer": AdamW(1e-2), "lora_rank": 2, **LOW},
    "adapters on a model in 4 bits": {"optimizer": AdamW(1e-2), "lora_rank": 2, "base_precision": "nf4", **LOW},
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "both" else pytest.mark.slow) for case in RUNS]
)
def test_a_run_is_resumed_to_the_bit(case: str, tmp_path: Path) -> None:
    run = few_run(steps=3, checkpoint_every=1, **RUNS[case])
    train(run, tmp_path / "whole")
    train(run, tmp_path / "cut", StopsAfter(2))
    assert stored.latest(tmp_path / "cut" / CHECKPOINTS).name == "step-000002"
    train(run, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    last = stored.latest(tmp_path / "cut" / CHECKPOINTS)
    weights, moments = (load_file(last / name) for name in (stored.WEIGHTS, stored.OPTIMIZER))
    in_codes = {name.partition(":")[0] for name, t in moments.items() if t.dtype == torch.uint8} - {"rng"}
    assert in_codes == ({"exp_avg", "exp_avg_sq_root"} if "8bit" in type(run.optimizer.policy).__name__ else set())
    halves = {t.dtype for t in weights.values() if t.ndim == 2}
    assert halves == {
        torch.bfloat16 if "master_weights" in RUNS[case] and "lora_rank" not in RUNS[case] else torch.float32
    }


def require_saved_float32(folder: Path) -> None:
    """The saved model has the weights of the last checkpoint, in float32."""
    saved, _ = load(str(folder / "model"))
    held = load_file(stored.latest(folder / CHECKPOINTS) / stored.WEIGHTS)
    assert {t.dtype for t in load_file(folder / "model" / "model.safetensors").values()} == {torch.float32}
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, held[name].float()), name


def test_another_seed_rounds_otherwise() -> None:
    seeds = [build(few_run(seed=seed, **RUNS["both"])).optimizer.seed for seed in (0, 1)]
    assert seeds[0] != seeds[1]


def rounded(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make().eval()
    for weight in matrices(model):
        weight.data = weight.data.to(torch.bfloat16).float()
    return model


@pytest.mark.parametrize(
    ("make", "exact"),
    [
        (FAMILIES["qwen3"], True),
        # Its embeddings are scaled, in their own dtype.
        pytest.param(FAMILIES["gemma3, mixed windows"], False, marks=pytest.mark.slow),
        pytest.param(mixture, False, marks=pytest.mark.slow),  # its experts compute in the dtype of their weights
    ],
)
def test_bf16_weights_compute_what_float32_weights_do(make: Callable[[], PreTrainedModel], exact: bool) -> None:
    """Log-probabilities to the bit; gradients to their rounding."""
    groups = grouped(sampled(*with_stops(STOPS)), REWARDS)
    wide = Policy(rounded(make), precision=BF16, temperature=1.0)
    low = Policy(rounded(make), precision=BF16, temperature=1.0, master_weights=torch.bfloat16)
    assert {p.dtype for p in matrices(low.model)} == {torch.bfloat16}
    assert {p.dtype for p in low.model.parameters() if p.ndim == 1} == {torch.float32}
    (batch,) = batched(groups, how(share_prompts=wide.shares_prompts))
    for micro in batch.micro_batches:
        with torch.no_grad():
            a, b = wide(micro)[0], low(micro)[0]
        assert torch.equal(a, b) or not exact
        torch.testing.assert_close(a, b, rtol=0, atol=0.5)  # an expert near a tie changes
    expected, found = gradients(wide, batch)[0], gradients(low, batch)[0]
    for name, gradient in found.items():
        apart = float((gradient.float() - expected[name]).norm() / expected[name].norm().clamp(min=1e-9))
        assert apart < (0.02 if exact else 0.2), (name, apart)


def test_logits_of_bf16_weights_are_computed_in_float32_and_leave_no_trace() -> None:
    wide = Policy(rounded(FAMILIES["qwen3"]), precision=BF16, temperature=1.0)
    low = Policy(rounded(FAMILIES["qwen3"]), precision=BF16, temperature=1.0, master_weights=torch.bfloat16)
    ids = torch.arange(1, 9)
    assert torch.equal(wide.logits(ids), low.logits(ids))
    assert {p.dtype for p in matrices(low.model)} == {torch.bfloat16}
    assert not any("forward" in vars(m) for m in low.model.modules())


def test_adapters_on_a_bf16_model_are_float32() -> None:
    policy = Policy(
        rounded(FAMILIES["qwen3"]), precision=BF16, temperature=1.0, lora_rank=2, master_weights=torch.bfloat16
    )
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    frozen = {p.dtype for n, p in policy.model.named_parameters() if ".lora_" not in n and p.ndim == 2}
    assert frozen == {torch.bfloat16}
    assert {t.dtype for n, t in policy.state().items() if n.endswith("q_proj.weight")} == {torch.float32}  # their sum


def test_a_tied_embedding_is_held_once_everywhere(tmp_path: Path) -> None:
    """In the policy, the sampler's copy, gradient and optimiser, the checkpoint, and what is sent to an engine."""
    table = 257 * 32
    components = build(few_run())
    policy, optimizer = components.policy, components.optimizer
    assert policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight
    assert isinstance(components.driver.engine, TransformersEngine)
    for model in (policy.model, components.driver.engine.model, policy.plain()):
        storages = {p.untyped_storage().data_ptr(): p.numel() for p in model.parameters()}
        assert sum(storages.values()) == policy.model.num_parameters()
        assert list(storages.values()).count(table) == 1
    for p in policy.trainable().values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = [t.numel() for state in optimizer.state.values() for t in state.values()]
    assert moments.count(table) == 2
    tensor_files.write(tmp_path, policy.checkpointed(), optimizer)
    stored_sizes = [t.numel() for t in load_file(tmp_path / stored.WEIGHTS).values()]
    assert stored_sizes.count(table) == 1
    assert [t.numel() for t in policy.state().values()].count(table) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"master_weights": "bf16", "optimizer": Muon()},
            r"^optimizer=muon: it would lose small steps of bf16",
        ),
        ({"master_weights": "bf16", "precision": "fp32"}, r"^master_weights=bf16: .* set --precision bf16"),
        ({"master_weights": "bf16", "precision": "fp8"}, r"^master_weights=bf16: .*not fp8; set --precision bf16"),
        ({"master_weights": "bf16", "shard": "fsdp"}, r"^master_weights=bf16: .*set --shard none$"),
        ({"master_weights": "bf61"}, r"^master_weights='bf61'; did you mean 'bf16'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        configure(Run(), **changes)


def test_muon_trains_adapters_of_a_bf16_model() -> None:
    run = configure(Run(), master_weights="bf16", optimizer=Muon(), lora_rank=4)
    assert run.model.master_weights == "bf16"


def test_auto_precision_that_is_float32_is_refused_where_the_model_is_built() -> None:
    with pytest.raises(InputError, match=r"^master_weights=bf16: the trainer's products are not in bf16.*fp32$"):
        Policy(tiny()[0], precision=FP32, temperature=1.0, master_weights=torch.bfloat16)


@pytest.mark.parametrize("text", ["adamw8bit(-1)", "adamw8bit(1e-5, betas=(0.9, 1.0))", "adamw8bit(weight_decay=-1)"])
def test_a_value_out_of_range_is_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match=r"adamw8bit (learning_rate|betas|weight_decay)="):
        parse_spec(text, OPTIMIZERS)


def test_the_doctor_counts_what_the_optimiser_holds() -> None:
    shape = StepShape(4, 4, prompts=1, samples=2)
    policy = Policy(FAMILIES["qwen3"](), precision=FP32, temperature=1.0)
    trained = list(policy.trainable().values())
    whole, low = (
        machine.memory(policy, s.build(trained, []), shape).values["need_bytes"] for s in (AdamW(), AdamW8bit())
    )
    matrices_held = sum(p.numel() for p in trained if p.ndim == 2)
    assert 0.9 * 6 * matrices_held < whole - low < 6 * matrices_held
