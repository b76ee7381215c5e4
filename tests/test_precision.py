"""Values on 8-bit grids, the products of such values, and models that compute with them.

The grids are checked against a list of all their values, made without torch's own cast. Not covered without a GPU: the
hardware's e4m3 product (`gpu`).
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from drpo import reductions
from drpo.batch import BatchConfig
from drpo.errors import InputError
from drpo.model import quantize
from drpo.model.policy import Policy
from drpo.model.precision import FP32, NAMES, Grid, Precision, has_fast_bf16, resolve_precision
from drpo.model.quantize import (
    LARGEST,
    SMALLEST_SCALE,
    QuantizedLinear,
    StraightThroughLinear,
    fake_quantize_,
    quantize_,
    to_grid,
    unrounded_inputs,
)
from drpo.rollout.trial import Way
from drpo.train.loop import train
from drpo.train.optim import AdamW
from drpo.types import Sampling
from support.architectures import FAMILIES, GROUPED, mixture, settings
from support.rollouts import transformers_engine
from support.tiny_world import PROBLEMS, STOPS, batched, distribution, grouped, perturb, tiny
from support.worlds import sampling, tiny_run

CPU = torch.device("cpu")
HOW = BatchConfig(
    updates=1,
    reduction=reductions.Horizon(24),
    micro_batch_tokens=4096,
    skip_zero_advantage=False,
    share_prompts=True,
)
F32, BF16 = torch.float32, torch.bfloat16
GRIDS: tuple[Grid, ...] = ("int8", "e4m3")
on_both = pytest.mark.parametrize("grid", GRIDS)

# A matrix of any rows: a seed, a size of its values, and how heavy their tails are.
matrices = st.builds(
    lambda seed, exponent, power: made(6, 24, seed, 10.0**exponent, power),
    st.integers(0, 2**31),
    st.integers(-30, 30),
    st.sampled_from([0.3, 1.0, 4.0]),
)


def made(rows: int, columns: int, seed: int, size: float = 1.0, power: float = 1.0) -> Tensor:
    normal = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return size * normal.sign() * normal.abs() ** power


def every_e4m3() -> Tensor:
    """The 127 values from 0 to 448, ascending, as the format's definition has them: the code is the index."""
    subnormal = [m / 8 * 2.0**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return torch.tensor((subnormal + normal)[:127], dtype=torch.float64)  # the last code is NaN


def every_int8() -> Tensor:
    return torch.arange(128, dtype=torch.float64)


VALUES = {"int8": every_int8(), "e4m3": every_e4m3()}


def looked_up(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Values and scales by comparing each number with every value there is; halfway, the even code."""
    scale = (x.abs().max(dim=1, keepdim=True).values / LARGEST[grid]).clamp(min=SMALLEST_SCALE)
    ratio = (x / scale).double()
    distance = (ratio.abs()[:, :, None] - VALUES[grid]).abs()
    nearest = distance.min(-1, keepdim=True).values
    odd = torch.arange(len(VALUES[grid])) % 2
    code = (distance + odd.where(distance == nearest, 2) * 1e-30).argmin(-1)
    tied = (distance == nearest).sum(-1) > 1
    even = ((distance == nearest) & (odd == 0)).int().argmax(-1)
    return VALUES[grid][even.where(tied, code)] * ratio.sign(), scale


# ---- the grids ----


def test_torchs_e4m3_is_the_formats() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(codes.double(), every_e4m3())


@on_both
@given(x=matrices)
def test_values_are_the_nearest_of_the_grid(grid: Grid, x: Tensor) -> None:
    values, scale = looked_up(x, grid)
    for dtype in (F32, BF16):
        q = to_grid(x, grid, dtype)
        assert torch.equal(q.values.double(), values) and torch.equal(q.scale, scale)
        assert q.values.dtype == dtype and q.scale.dtype == F32


@on_both
def test_halfway_goes_to_the_even_value(grid: Grid) -> None:
    v = VALUES[grid]
    halves = torch.cat([(v[1:] + v[:-1]) / 2, v[-1:]]).float()[None]  # the largest makes the scale 1
    even = torch.stack([v[:-1], v[1:]])[torch.arange(len(v) - 1) % 2, torch.arange(len(v) - 1)]
    q = to_grid(halves, grid)
    assert q.scale.item() == 1 and torch.equal(q.values[0, :-1].double(), even)


@on_both
@given(x=matrices)
def test_errors_are_bounded(grid: Grid, x: Tensor) -> None:
    """int8: half a step of amax / 127. e4m3: a sixteenth of the number, or half a smallest step, amax / 448 / 512."""
    largest = x.abs().amax(1, keepdim=True).double()
    error = (to_grid(x, grid).dense(torch.float64) - x.double()).abs()
    bound = largest / 254 if grid == "int8" else torch.maximum(x.double().abs() / 16, largest / 448 / 1024)
    assert (error <= bound * (1 + 1e-5)).all()


@on_both
@given(x=matrices)
def test_rounding_twice_is_rounding_once(grid: Grid, x: Tensor) -> None:
    once = to_grid(x, grid)
    twice = to_grid(once.dense(F32), grid)
    assert torch.equal(once.values, twice.values)
    assert torch.allclose(once.scale, twice.scale, rtol=2**-23, atol=0)


@on_both
@given(x=matrices, factor=st.integers(-20, 20))
def test_rows_do_not_know_of_each_other(grid: Grid, x: Tensor, factor: int) -> None:
    """Another row changes nothing, and a row times a power of two is the same row at another scale."""
    alone = to_grid(x[2:3], grid)
    x[3:] *= 2.0**factor
    x[0] = 0
    together = to_grid(x, grid)
    assert torch.equal(together.values[2:3], alone.values) and torch.equal(together.scale[2:3], alone.scale)
    scaled = to_grid(x[2:3] * 2.0**factor, grid)
    assert torch.equal(scaled.values, alone.values) and torch.equal(scaled.scale, alone.scale * 2.0**factor)


@on_both
def test_a_row_of_zeros_stays_one(grid: Grid) -> None:
    q = to_grid(torch.zeros(2, 5), grid)
    assert torch.equal(q.dense(F32), torch.zeros(2, 5)) and torch.isfinite(q.scale).all()


@on_both
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_broken_stays_visible(grid: Grid, broken: float) -> None:
    x = made(3, 8, 0)
    x[1, 4] = broken
    for dtype in (F32, BF16):
        dense = to_grid(x, grid, dtype).dense(dtype)
        assert dense[1, 4].isnan() and dense[1].isnan().any() and torch.isfinite(dense[[0, 2]]).all()
    layer = QuantizedLinear(linear(8, 4), "int8", grid if grid == "e4m3" else None, F32)
    assert not torch.isfinite(layer(x)[1]).any() and torch.isfinite(layer(x)[[0, 2]]).all()


def test_columns_where_those_are_the_output_channels() -> None:
    x = made(7, 5, 1)
    along, across = to_grid(x, "e4m3", dim=-2), to_grid(x.T.contiguous(), "e4m3")
    assert torch.equal(along.dense(F32), across.dense(F32).T) and along.scale.shape == (1, 5)


# ---- names ----


def test_names() -> None:
    auto = BF16 if has_fast_bf16(CPU) else F32
    expected = {
        "auto": Precision(auto),
        "fp32": Precision(F32),
        "bf16": Precision(BF16),
        "fp16": Precision(torch.float16),
        "int8": Precision(auto, "int8"),
        "fp8_weights": Precision(auto, "e4m3"),
        "fp8": Precision(auto, "e4m3", "e4m3"),
    }
    assert {name: resolve_precision(name, CPU) for name in NAMES} == expected
    with pytest.raises(InputError, match="precision='fp7'; did you mean 'fp"):
        resolve_precision("fp7", CPU)


# ---- layers ----


def linear(n_in: int, n_out: int, *, bias: bool = False, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(made(n_out, n_in, seed, power=2.0))
        if bias:
            layer.bias.copy_(made(1, n_out, seed + 1)[0])
    return layer


KINDS: tuple[tuple[Grid, Grid | None], ...] = (("int8", None), ("e4m3", None), ("e4m3", "e4m3"), ("int8", "int8"))
each_kind = pytest.mark.parametrize(("weights", "activations"), KINDS)


def exact_product(x: Tensor, layer: nn.Linear, weights: Grid, activations: Grid | None) -> Tensor:
    """In float64, from the numbers that are meant."""
    w = to_grid(layer.weight.detach(), weights).dense(torch.float64)
    q = x.double() if activations is None else to_grid(x, activations).dense(torch.float64)
    return q @ w.T + (0 if layer.bias is None else layer.bias.detach().double())


@each_kind
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-5), (BF16, 2 * 2**-8)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_the_rounded_operands(
    weights: Grid, activations: Grid | None, dtype: torch.dtype, tolerance: float, bias: bool
) -> None:
    """To what is summed and how the result is rounded; the rounding of the operands themselves is in both."""
    layer = linear(96, 40, bias=bias)
    x = made(2 * 9, 96, 5, power=2.0).view(2, 9, 96).to(dtype)
    wanted = exact_product(x, layer, weights, activations)
    bound = tolerance * wanted.abs().amax(-1, keepdim=True)
    sampler = QuantizedLinear(layer, weights, activations, dtype)
    if bias:
        sampler.bias = nn.Parameter(layer.bias.to(dtype))
    trainer = StraightThroughLinear(layer, weights, activations)
    for module in (sampler, trainer):
        y = module(x)
        assert y.dtype == dtype and y.shape == (2, 9, 40)
        assert ((y.double() - wanted).abs() <= bound).all()
    assert torch.equal(sampler(x), trainer(x))
    plain = x.double() @ layer.weight.detach().double().T + (0 if layer.bias is None else layer.bias.detach().double())
    assert ((wanted - plain).abs() > bound).any()  # the rounding of the operands is far more than the tolerance


@each_kind
def test_gradients_are_those_of_the_formula(weights: Grid, activations: Grid | None) -> None:
    """grad_x = g Q(w) and grad_w = g^T Q(x), in float64 from the rounded operands."""
    layer = linear(48, 20, bias=True)
    module = StraightThroughLinear(layer, weights, activations)
    x = made(2 * 7, 48, 3).view(2, 7, 48).requires_grad_()
    g = made(2 * 7, 20, 4).view(2, 7, 20)
    module(x).backward(g)
    w = to_grid(layer.weight.detach(), weights).dense(torch.float64)
    q = x.detach().double() if activations is None else to_grid(x.detach(), activations).dense(torch.float64)
    flat_g, flat_q = g.double().flatten(0, 1), q.flatten(0, 1)
    for found, wanted in (
        (x.grad, g.double() @ w),
        (layer.weight.grad, flat_g.T @ flat_q),
        (layer.bias.grad, flat_g.sum(0)),
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@each_kind
def test_under_autocast_weights_and_their_gradients_stay_in_float32(weights: Grid, activations: Grid | None) -> None:
    layer = linear(48, 20)
    module = StraightThroughLinear(layer, weights, activations)
    x = made(7, 48, 3).requires_grad_()
    with torch.autocast("cpu", BF16):
        y = module(x)
    assert y.dtype == BF16 and torch.equal(y, QuantizedLinear(layer, weights, activations, BF16)(x.detach().to(BF16)))
    y.sum().backward()
    assert x.grad.dtype == F32 and layer.weight.grad.dtype == F32
    w = to_grid(layer.weight.detach(), weights).dense(F32)
    torch.testing.assert_close(x.grad, w.sum(0).expand(7, -1), rtol=0.02, atol=0.02 * float(w.sum(0).abs().max()))


def test_frozen_weights_get_no_gradient_and_no_work() -> None:
    module = StraightThroughLinear(linear(48, 20).requires_grad_(False), "e4m3", "e4m3")
    x = made(7, 48, 3).requires_grad_()
    module(x).sum().backward()
    assert module.weight.grad is None and x.grad is not None


def test_taking_weights_is_being_made_of_them() -> None:
    for weights, activations in KINDS:
        layer, other = linear(32, 16), linear(32, 16, seed=9)
        module = QuantizedLinear(layer, weights, activations, BF16)
        module.load_weight(other.weight)
        x = made(5, 32, 2).to(BF16)
        assert torch.equal(module(x), QuantizedLinear(other, weights, activations, BF16)(x))
        assert {p.dtype for p in module.parameters()} == {BF16} and not any(
            p.requires_grad for p in module.parameters()
        )


def test_a_cpu_that_computes_in_float32_holds_int8_weights_in_int8() -> None:
    """A quarter of the memory, and the same product as of the same values in float32, bit for bit at this size."""
    layer, x = linear(32, 16, bias=True), made(9, 32, 2)
    module, q = QuantizedLinear(layer, "int8", None, F32), to_grid(layer.weight, "int8")
    assert module.weight.dtype == torch.int8 and module.weight.element_size() == 1
    assert torch.equal(module.weight.float(), q.values) and torch.equal(module.scale, q.scale)
    assert torch.equal(module(x), (x @ q.values.T) * q.scale.T + layer.bias)
    assert QuantizedLinear(layer, "int8", None, BF16).weight.dtype == BF16  # whose products need no conversion


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_weight_stays_visible_in_int8(broken: float) -> None:
    layer = linear(8, 4)
    module = QuantizedLinear(layer, "int8", None, F32)
    x = made(3, 8, 0)
    before = module(x)
    broken_weight = layer.weight.detach().clone()
    broken_weight[1, 4] = broken
    module.load_weight(broken_weight)
    after = module(x)
    assert after[:, 1].isnan().all() and torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])
    module.load_weight(layer.weight)
    assert torch.equal(module(x), before)


# ---- models ----


def rounded(model: PreTrainedModel, grid: Grid) -> PreTrainedModel:
    """The model with its decoder's matrices replaced by what they are rounded to, found by their names alone."""
    for name, p in model.named_parameters():
        if name.endswith(("proj.weight", "experts.gate_up_proj", "experts.down_proj")):
            p.data = to_grid(p.data, grid).dense(F32)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny()[0],
    "qwen2, biases": lambda: seeded(GROUPED["qwen2, biases"]),
    "qwen3, mixture": mixture,
}


def seeded(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return build().eval()


BY_DEFAULT = {("llama", "int8"), ("qwen2, biases", "e4m3"), ("qwen3, mixture", "int8")}


@pytest.mark.parametrize(
    ("build", "grid"),
    [
        pytest.param(build, grid, id=f"{name}-{grid}", marks=[] if (name, grid) in BY_DEFAULT else [pytest.mark.slow])
        for name, build in MODELS.items()
        for grid in GRIDS
    ],
)
def test_the_engines_distribution_is_that_of_the_rounded_weights(
    grid: Grid, build: Callable[[], PreTrainedModel]
) -> None:
    """Before and after new weights come; in float32, so that nothing else is rounded."""
    model, _tokenizer = build(), tiny()[1]
    engine = transformers_engine(model, precision=Precision(F32, grid))
    for seed in (0, 1):
        completions = engine.generate(PROBLEMS[::2], Sampling(samples=2, max_new_tokens=12), (seed,))
        twin = build()
        twin.load_state_dict(model.state_dict())
        reference, gaps = rounded(twin, grid), []
        for c in completions:
            wanted = distribution(reference, c, 1.0).gather(-1, c.sequence.token_ids[:, None])[:, 0]
            torch.testing.assert_close(c.sequence.behavior_logp, wanted, rtol=0, atol=5e-5)
            gaps.append(
                (wanted - distribution(model, c, 1.0).gather(-1, c.sequence.token_ids[:, None])[:, 0]).abs().max()
            )
        assert max(gaps) > 1e-3  # the plain model's distribution is another
        perturb(model, 0.05, seed=3)
        engine.load_weights(dict(model.named_parameters()), version=1)


@pytest.mark.parametrize("name", ["int8", "fp8_weights", "fp8"])
def test_decoding_with_rounded_layers_shares_prompts_and_gives_the_forward_passs_distribution(name: str) -> None:
    model, _ = tiny(STOPS)
    kind = resolve_precision(name, CPU)
    engine = transformers_engine(model, precision=Precision(F32, kind.weights, kind.activations))
    completions = engine.generate(PROBLEMS, Sampling(samples=3, max_new_tokens=12), (0,))
    assert engine.way is Way.GROUPED
    for c in completions:
        wanted = distribution(engine.model, c, 1.0).gather(-1, c.sequence.token_ids[:, None])[:, 0]
        # Of inputs that differ in the last bit a few round to the next value of e4m3, a sixteenth away.
        torch.testing.assert_close(
            c.sequence.behavior_logp, wanted, rtol=0, atol=5e-5 if kind.activations is None else 0.3
        )


def test_inputs_are_left_alone_for_comparisons_and_rounded_again() -> None:
    layer = linear(32, 16)
    module, x = QuantizedLinear(layer, "e4m3", "e4m3", F32), made(5, 32, 1)
    before = module(x)
    with pytest.raises(KeyError), unrounded_inputs(module):
        assert torch.equal(module(x), QuantizedLinear(layer, "e4m3", None, F32)(x)) and not torch.equal(
            module(x), before
        )
        raise KeyError
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("name", ["int8", "fp8_weights", "fp8"])
def test_head_embeddings_norms_and_routers_are_on_no_grid(name: str) -> None:
    model = mixture()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loaders = quantize_(model, resolve_precision(name, CPU))
    assert loaders.keys() == before.keys() == dict(model.named_parameters()).keys()
    dtype = resolve_precision(name, CPU).dtype
    for n, p in model.named_parameters():
        if "_proj" not in n:
            assert p.dtype == dtype and torch.equal(p, before[n].to(dtype)), n
    layers = [n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 2 * 4 and all("self_attn" in n for n in layers)


def test_gates_that_are_linear_layers_are_on_no_grid() -> None:
    model = seeded(lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings(num_experts=4, moe_intermediate_size=32))))
    quantize_(model, Precision(F32, "int8"))
    plain = {n.split(".")[-1] for n, m in model.named_modules() if type(m) is nn.Linear}
    assert plain == {"shared_expert_gate", "lm_head"}


def test_stacked_weights_that_are_stored_the_other_way_round_have_the_same_channels() -> None:
    model = seeded(lambda: GptOssForCausalLM(GptOssConfig(**settings(num_local_experts=4, sliding_window=8))))
    experts = model.model.layers[0].mlp.experts
    before = experts.down_proj.detach().clone()  # [E, in, out]
    quantize_(model, Precision(F32, "e4m3"))
    wanted = torch.stack([to_grid(one.T, "e4m3").dense(F32).T for one in before])
    assert experts.is_transposed and torch.equal(experts.down_proj, wanted)


def test_the_copy_is_no_larger_than_one_in_the_compute_dtype() -> None:
    def size(model: PreTrainedModel) -> int:
        return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])

    for build in MODELS.values():
        plain, low = build(), build()
        quantize_(plain, Precision(BF16))
        quantize_(low, Precision(BF16, "e4m3", "e4m3"))
        scales = sum(4 * m.out_features for m in build().get_decoder().modules() if isinstance(m, nn.Linear))
        assert size(low) <= size(plain) + scales


def test_a_model_without_linear_layers_is_refused() -> None:
    gpt2 = FAMILIES["gpt2, learned positions"]()
    for change in (quantize_, fake_quantize_):
        with pytest.raises(InputError, match="GPT2LMHeadModel: it has no linear layers") as error:
            change(gpt2, Precision(F32, "int8"))
        assert "\n" not in str(error.value)


# ---- training ----


@pytest.mark.parametrize(("name", "rank"), [*((n, 0) for n in MODELS), ("llama", 2), ("qwen2, biases", 2)])
def test_a_policy_keeps_its_names_and_its_weights(name: str, rank: int, tmp_path) -> None:
    build = MODELS[name]
    plain = dict(build().named_parameters())
    policy = Policy(build(), precision=Precision(F32, "e4m3", "e4m3"), temperature=1.0, lora_rank=rank)
    assert policy.shares_prompts
    state = policy.state()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[n], p) for n, p in plain.items())  # adapters begin at nothing
    assert set(policy.trainable()) == ({n for n in dict(policy.model.named_parameters()) if "lora" in n} or set(plain))
    policy.plain().save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", ["int8", "fp8_weights", "fp8"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_sampler_and_trainer_compute_the_same(name: str, build: Callable[[], PreTrainedModel]) -> None:
    """The same model twice, one lowered for sampling and one for training: equal logits, also of the next weights."""
    kind = resolve_precision(name, CPU)
    precision = Precision(F32, kind.weights, kind.activations)
    sampler, trainer = build().requires_grad_(False), build()
    loaders = quantize_(sampler, precision)
    fake_quantize_(trainer, precision)
    ids = torch.arange(1, 40)[None]
    one, other = sampler(ids, use_cache=False).logits, trainer(ids, use_cache=False).logits
    assert torch.equal(one, other)
    other.logsumexp(-1).sum().backward()
    for n, p in trainer.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, n
    perturb(trainer, 0.05)
    with torch.no_grad():
        for n, p in trainer.named_parameters():
            loaders[n](p)
        later = sampler(ids, use_cache=False).logits
        assert torch.equal(later, trainer(ids, use_cache=False).logits) and not torch.equal(later, one)


def test_experts_are_rounded_in_training_with_the_gradient_of_the_rounded_ones() -> None:
    """The gradient of a stacked weight is what a model gets that has the rounded ones for its own."""
    trainer, reference = mixture(), rounded(mixture(), "e4m3")
    fake_quantize_(trainer, Precision(F32, "e4m3"))
    ids = torch.arange(1, 40)[None]
    for model in (trainer, reference):
        model(ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    ours, theirs = dict(trainer.named_parameters()), dict(reference.named_parameters())
    scale = max(float(p.grad.abs().max()) for p in theirs.values())
    for name in theirs:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(
    "build",
    [pytest.param(build, id=name, marks=[pytest.mark.slow] * (name == "llama")) for name, build in MODELS.items()],
)
def test_a_policys_distribution_is_its_samplers(build: Callable[[], PreTrainedModel]) -> None:
    """With the sampler's precision the trainer is nearer to it than with full precision: by far with exact inputs."""
    for activations, share in ((None, 0.01), ("e4m3", 0.5)):
        precision = Precision(F32, "e4m3", activations)
        engine = transformers_engine(build(), precision=precision)
        completions = engine.generate(PROBLEMS, Sampling(samples=4, max_new_tokens=10), (0,))
        gaps = []
        for kind in (precision, FP32):
            policy = Policy(build(), precision=kind, temperature=1.0)
            (batch,) = batched(grouped(completions, [[1, 2, 3, 4.0]] * 4), HOW)
            pairs = [(policy(m)[0], m.behavior_logp) for m in batch.micro_batches]
            gaps.append(float(torch.cat([(pi.exp() - mu.exp()).abs() for pi, mu in pairs]).mean().detach()))
        assert gaps[0] < share * gaps[1], (activations, gaps)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_it_learns(tmp_path, rank: int) -> None:
    run = tiny_run(
        precision="fp8",
        rollout_precision="fp8",
        lora_rank=rank,
        steps=25,
        prompts=8,
        sampling=sampling(samples=8),
        optimizer=AdamW(1e-2),
        eval_problems=32,
    )
    summary = train(run, tmp_path)
    before, after = summary["evaluation_before"], summary["evaluation_after"]
    assert after["low"] > before["high"], (before, after)


# ---- hardware ----


def check_layers_in_e4m3(device: torch.device, rows: int) -> None:
    """A sampler's and a trainer's layer, with torch's product of e4m3 with e4m3, against float64."""
    layer = linear(64, 32, bias=True)
    layer.bias.data = layer.bias.data.to(BF16).float()
    x, g = made(rows, 64, 1).to(BF16), made(rows, 32, 2).to(BF16)
    wanted = exact_product(x, layer, "e4m3", "e4m3")
    grad = g.double() @ to_grid(layer.weight.detach(), "e4m3").dense(torch.float64)
    layer.to(device)
    sampler = QuantizedLinear(layer, "e4m3", "e4m3", BF16)
    sampler.bias = nn.Parameter(layer.bias.to(BF16))
    sampler.load_weight(linear(64, 32).weight)
    trainer = StraightThroughLinear(layer, "e4m3", "e4m3")
    assert sampler.weight.dtype == torch.float8_e4m3fn
    bound = 2**-6 * wanted.abs().amax(-1, keepdim=True)
    inputs = x.to(device).requires_grad_()
    for module in (sampler, trainer):
        y = module(inputs)
        assert y.dtype == BF16 and ((y.double().cpu() - wanted).abs() <= bound).all()
    y.backward(g.to(device))
    assert ((inputs.grad.double().cpu() - grad).abs() <= 2**-6 * grad.abs().amax()).all()
    with unrounded_inputs(sampler):
        plain = exact_product(x, layer.cpu(), "e4m3", None)
        assert ((sampler(x.to(device)).double().cpu() - plain).abs() <= bound).all()


@pytest.mark.parametrize("rows", [1, 7])
def test_layers_held_in_e4m3_itself(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of the hardware, on the product that PyTorch has for CPUs: the same calls, another kernel."""
    monkeypatch.setattr(quantize, "has_e4m3_product", lambda device: True)
    check_layers_in_e4m3(CPU, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_layers_held_in_e4m3_on_a_gpu(rows: int) -> None:
    device = torch.device("cuda")
    if not quantize.has_e4m3_product(device):
        pytest.skip("this GPU has no e4m3 product")
    check_layers_in_e4m3(device, rows)
