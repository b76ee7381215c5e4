"""Packed = prompts shared = padded = one by one: hidden states and gradients, for any layout and several architectures.

Not covered: GPUs, real weights (the benchmarks do those), positions beyond what a model's tables hold.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from drpo.model import packed_attention, packing
from drpo.model.packed_attention import enable_packed_attention, packed, padded
from drpo.model.packing import Packing
from drpo.types import Layout
from support.tiny_world import doubled, sees

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "mistral, window 4": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "gemma3, window 3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, sliding_window=3, sliding_window_pattern=2)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    ),
}
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma2 caps its scores": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL)),
    "gpt-oss has sinks": lambda: GptOssForCausalLM(
        GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2)
    ),
    "mamba has no attention": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, expand=2)
    ),
}

TOLERANCE = {"gemma3, window 3": 3e-6}
"""In float64, where not 1e-10: Gemma's norms round to float32 inside."""

SHARED = Layout(length=(5, 4, 1, 9, 1, 2, 2, 7, 3), prefix=(-1, 0, 0, 0, -1, 4, 4, -1, -1))


def make(family: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return family().eval()


def words(layout: Layout, seed: int = 0) -> Tensor:
    return torch.randint(97, (layout.n_positions,), generator=torch.Generator().manual_seed(seed))


def one_by_one(model: PreTrainedModel, ids: Tensor, layout: Layout) -> Tensor:
    """Each position's state from a row of its own, that ends there: no mask, no padding, no neighbours."""
    states = []
    for position in range(layout.n_positions):
        seen = sees(layout, position)
        assert layout.positions()[seen].tolist() == list(range(len(seen)))
        out = model.get_decoder()(input_ids=ids[seen][None], use_cache=False)
        states.append(out.last_hidden_state[0, -1])
    return torch.stack(states)


def state_and_gradients(run: Callable[..., Tensor], model: PreTrainedModel, layout: Layout) -> dict[str, Tensor]:
    ids = words(layout)
    model.zero_grad(set_to_none=True)
    hidden = run(model, ids, layout)
    (hidden * torch.linspace(-1, 2, hidden.numel(), dtype=hidden.dtype).view_as(hidden)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return {"hidden": hidden.detach(), **gradients}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """To the size of the largest of all: in a layout of one position the gradients of queries and keys are 0."""
    assert found.keys() == wanted.keys()
    scale = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        assert float((found[name] - value).abs().max()) <= tolerance * scale, name


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any number of prompts of any lengths, each with any number of continuations, in any order after it."""
    length: list[int] = []
    prefix: list[int] = []
    for _ in range(draw(st.integers(1, 4))):
        root = len(length)
        length.append(draw(st.integers(1, 9)))
        prefix.append(-1)
        for n in draw(st.lists(st.integers(1, 9), max_size=4)):
            length.append(n)
            prefix.append(root)
    return Layout(tuple(length), tuple(prefix))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_padded_and_one_by_one_are_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed by the kernel, by both, and written out."""
    plain, model = doubled(make(FAMILIES[family])), doubled(make(FAMILIES[family]))
    tolerance = TOLERANCE.get(family, 1e-10)
    assert enable_packed_attention(model)
    wanted = state_and_gradients(one_by_one, plain, SHARED)
    assert_same(state_and_gradients(padded, plain, SHARED), wanted, tolerance)
    for few in (0, 400, packed_attention.FEW_SCORES):
        monkeypatch.setattr(packed_attention, "FEW_SCORES", few)
        assert_same(state_and_gradients(packed, model, SHARED), wanted, tolerance)


@pytest.mark.parametrize("family", ["llama", "mistral, window 4"])
def test_in_float32_to_its_rounding(family: str) -> None:
    plain, model = make(FAMILIES[family]), make(FAMILIES[family])
    assert enable_packed_attention(model)
    assert_same(state_and_gradients(packed, model, SHARED), state_and_gradients(padded, plain, SHARED), 2e-5)


@pytest.fixture(scope="module")
def plain_llama() -> PreTrainedModel:
    return doubled(make(FAMILIES["llama"]))


@pytest.fixture(scope="module")
def packed_llama() -> PreTrainedModel:
    """Taken for packed whatever its own check says: here it is the tests that judge."""
    model = doubled(make(FAMILIES["llama"]))
    model.set_attn_implementation(packed_attention.PACKED)
    return model


@settings(max_examples=settings.default.max_examples // 2)
@given(layout=layouts())
@example(layout=Layout((1,), (-1,)))
def test_any_layout(plain_llama: PreTrainedModel, packed_llama: PreTrainedModel, layout: Layout) -> None:
    wanted = state_and_gradients(padded, plain_llama, layout)
    assert_same(state_and_gradients(packed, packed_llama, layout), wanted, 1e-10)
    ids = words(layout)
    with torch.no_grad():
        alone = one_by_one(plain_llama, ids, layout)
    torch.testing.assert_close(wanted["hidden"], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("position", [0, 4, 6, 9, 18, 24, 33])
def test_a_position_feels_what_it_sees_and_nothing_else(packed_llama: PreTrainedModel, position: int) -> None:
    """To the bit, in the state and in the gradient of every other position's embedding."""
    ids = words(SHARED)
    seen = torch.zeros(len(ids), dtype=torch.bool)
    seen[sees(SHARED, position)] = True
    hidden = packed(packed_llama, ids, SHARED)[position]
    other = packed(packed_llama, torch.where(seen, ids, (ids + 1) % 97), SHARED)[position]
    assert torch.equal(hidden, other)
    for mine in seen.nonzero()[:, 0].tolist():
        changed = ids.clone()
        changed[mine] = (ids[mine] + 1) % 97
        assert not torch.equal(hidden, packed(packed_llama, changed, SHARED)[position])


@given(layout=layouts())
def test_slots_hold_every_place_once_and_little_padding(layout: Layout) -> None:
    plan = Packing.of(layout, torch.device("cpu"))
    assert torch.equal(plan.position[plan.slot], torch.arange(layout.n_positions))
    assert sorted([*plan.slot.tolist(), *plan.padding.tolist()]) == list(range(len(plan.position)))
    assert len(plan.position) <= packing.SPREAD * layout.n_positions


def test_under_autocast_it_is_as_close_as_the_padded_path() -> None:
    plain, model = make(FAMILIES["llama"]), make(FAMILIES["llama"])
    assert enable_packed_attention(model)
    ids = words(SHARED)
    with torch.no_grad():
        truth = padded(plain, ids, SHARED)
        with torch.autocast("cpu", torch.bfloat16):
            usual = padded(plain, ids, SHARED)
            found = packed(model, ids, SHARED)
    assert (found - truth).norm() <= 1.3 * (usual - truth).norm()
    assert (usual - truth).norm() > 0


@pytest.mark.parametrize("family", OTHERS)
def test_models_with_other_attention_keep_it(family: str) -> None:
    model = make(OTHERS[family])
    before = model.config._attn_implementation
    assert not enable_packed_attention(model)
    assert model.config._attn_implementation == before
    ids = words(SHARED)
    wanted = one_by_one(model, ids, SHARED)
    torch.testing.assert_close(padded(model, ids, SHARED), wanted, rtol=1e-4, atol=1e-4)


def test_an_adopted_model_still_answers_plain_calls() -> None:
    """Padding on the left, as a generation would have it."""
    plain, model = make(FAMILIES["llama"]), make(FAMILIES["llama"])
    assert enable_packed_attention(model)
    ids = torch.arange(1, 13).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).logits[:, -1], plain(input_ids=ids, attention_mask=mask).logits[:, -1]
    )
