"""The decoding step written out returns what transformers' modules return, with the weights of the moment.

Not covered: GPUs, where it is not used, and speed (`python -m benchmarks --only rollout`).
"""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from drpo.model.precision import FP32, Precision, resolve_precision
from drpo.model.quantize import QuantizedLinear, quantize_
from drpo.rollout import TransformersEngine, cache, fused
from drpo.rollout.decode import GroupDecoder
from drpo.rollout.fused import fused_step, merge_
from drpo.rollout.trial import can_fuse
from drpo.types import Request, Sampling
from support.architectures import GROUPED, PLAIN, settings
from support.tiny_world import tiny

KNOWN: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: GROUPED[name] for name in GROUPED if name.split(",")[0] in fused.FAMILIES},
    "llama, biases": lambda: LlamaForCausalLM(LlamaConfig(**settings(attention_bias=True, mlp_bias=True))),
    "llama, scaled positions": lambda: LlamaForCausalLM(
        LlamaConfig(**settings(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}))
    ),
    "qwen3, biases": lambda: Qwen3ForCausalLM(Qwen3Config(**settings(head_dim=8, attention_bias=True))),
}
UNKNOWN = [name for name in (*GROUPED, *PLAIN) if name not in KNOWN]
BF16, INT8 = Precision(torch.bfloat16), Precision(torch.float32, "int8")
ROUNDING = {FP32: 1e-5, INT8: 1e-5, BF16: 0.1, Precision(torch.bfloat16, "int8"): 0.1}
"""Of logits whose size is about 1 to 10."""


def made(build: Callable[[], PreTrainedModel], precision: Precision = FP32) -> PreTrainedModel:
    """A model whose norms and biases are not those it begins with."""
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn(parameter.shape)
    quantize_(model, precision)
    return model


def ids(*lengths: int) -> list[Tensor]:
    return [torch.randint(1, 257, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


def request(n_tokens: int = 6) -> Request:
    return Request(ids(12)[0], Sampling(max_new_tokens=n_tokens), frozenset(), (3,))


@pytest.mark.parametrize(
    ("family", "precision"),
    [(f, p) for f in KNOWN for p in ROUNDING if p.weights is None or f in ("llama, biases", "qwen3")],
    ids=str,
)
@torch.inference_mode()
def test_a_fused_step_returns_the_models_logits(
    family: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through drops that leave groups of unequal sizes, then one row of each, and through a growing cache."""
    monkeypatch.setattr(cache, "BLOCK", 8)
    model = made(KNOWN[family], precision)
    own, step = copy.deepcopy(model), fused_step(model)
    assert step is not None
    for lengths, samples, drops in (
        ((19, 3, 26, 20), 3, {3: [0, 1, 2, 3, 5, 6, 9, 10, 11], 6: [0, 1, 2, 4, 6, 8], 10: [0, 4]}),
        ((7, 12), 1, {4: [1]}),
    ):
        decoders = [
            GroupDecoder.of_prompts(own, ids(*lengths), samples),
            GroupDecoder.of_prompts(model, ids(*lengths), samples, fused=step),
        ]
        rows = len(lengths) * samples
        for t in range(12):
            if t in drops:
                rows = len(drops[t])
                for decoder in decoders:
                    decoder.keep(torch.tensor(drops[t]))
            token = torch.randint(1, 257, (rows,), generator=torch.Generator().manual_seed(t))
            expected, logits = (decoder.step(token) for decoder in decoders)
            assert logits.dtype == expected.dtype and float(expected.std()) > 0.3
            torch.testing.assert_close(logits, expected, rtol=0, atol=ROUNDING[precision])


@torch.inference_mode()
def test_kept_rows_go_on_with_a_fused_step() -> None:
    model = made(KNOWN["llama"])
    step = fused_step(model)
    begun = GroupDecoder.of_prompts(model, ids(9, 5), 2, fused=step)
    for _ in range(3):
        begun.step(torch.arange(4))
    rows = [begun.cache.kept_row(row, 3) for row in (0, 3)]
    decoders = [GroupDecoder.of_rows(model, rows, ids(4, 2), fused=which) for which in (None, step)]
    for _ in range(3):
        own, fused_ = (decoder.step(torch.tensor([5, 6])) for decoder in decoders)
        torch.testing.assert_close(fused_, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", UNKNOWN)
def test_other_families_keep_their_own_step(family: str) -> None:
    assert fused_step(made({**GROUPED, **PLAIN}[family])) is None


def _hear(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def _replace(model: PreTrainedModel) -> None:
    layer = model.model.layers[0].self_attn
    layer.forward = layer.forward


def _more(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.extra = nn.Identity()


def _other(model: PreTrainedModel) -> None:
    class Other(nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj.__class__ = Other


def _one_bias(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.k_proj.bias = nn.Parameter(torch.zeros(16))


def _gelu(model: PreTrainedModel) -> None:
    model.config.hidden_act = "gelu"


def _one_in_int8(model: PreTrainedModel) -> None:
    mlp = model.model.layers[0].mlp
    mlp.up_proj = QuantizedLinear(mlp.up_proj, "int8", None, torch.float32)


def _inputs_in_8_bits(model: PreTrainedModel) -> None:
    quantize_(model, Precision(torch.float32, "int8", "int8"))


@pytest.mark.parametrize("change", [_hear, _replace, _more, _other, _one_bias, _gelu, _one_in_int8, _inputs_in_8_bits])
def test_a_model_with_anything_else_keeps_its_own_step(change: Callable[[PreTrainedModel], None]) -> None:
    model = made(KNOWN["llama"])
    assert fused_step(model) is not None
    change(model)
    assert fused_step(model) is None


@pytest.mark.parametrize(
    ("precision", "used"), [("fp32", "fused"), ("bf16", "fused"), ("int8", "fused"), ("fp8_weights", "model")]
)
def test_the_engine_takes_it_where_the_layers_are_plain_or_in_int8(precision: str, used: str) -> None:
    engine = TransformersEngine(made(KNOWN["qwen3"]), precision=resolve_precision(precision, torch.device("cpu")))
    assert engine.decoding_step == used
    engine.generate([request()])


# ---- weights ----


def memory(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("precision", [FP32, INT8], ids=str)
def test_merged_weights_are_the_layers_own(precision: Precision) -> None:
    model = made(KNOWN["qwen2, biases"], precision)
    before, held = copy.deepcopy(model.state_dict()), memory(model)
    assert fused_step(model) is not None
    assert memory(model) == held
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    attention = model.model.layers[1].self_attn
    for kind in ("weight", "bias", *(["scale"] if precision.weights else [])):
        parts = [getattr(layer, kind) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    places = [t.data_ptr() for t in [*model.parameters(), *model.buffers()]]
    fused_step(model)
    assert [t.data_ptr() for t in [*model.parameters(), *model.buffers()]] == places  # merged once


def test_layers_in_one_storage_but_not_adjacent_are_merged() -> None:
    weight = torch.arange(12.0).view(6, 2)
    layers = [nn.Linear(2, 2, bias=False) for _ in range(2)]
    layers[0].weight.data, layers[1].weight.data = weight[4:], weight[:2]
    merged, bias = merge_(*layers)
    assert merged.tolist() == [*weight[4:].tolist(), *weight[:2].tolist()] and bias is None


@pytest.mark.parametrize("precision", [FP32, BF16, INT8], ids=str)
def test_new_weights_are_sampled_with(precision: Precision) -> None:
    """Those that are loaded, those of a stream under way, and those that someone puts in their place."""
    old, new = made(KNOWN["qwen2, biases"]), made(KNOWN["qwen2, biases"])
    for parameter in new.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    engine, expected = (TransformersEngine(model, precision=precision) for model in (old, new))
    said = engine.generate([request()])[0].behavior_logp
    wanted = expected.generate([request()])[0]
    engine.load_weights(dict(new.named_parameters()), version=1)
    found = engine.generate([request()])[0]
    assert engine.decoding_step == "fused"
    assert torch.equal(found.token_ids, wanted.token_ids) and torch.equal(found.behavior_logp, wanted.behavior_logp)
    assert not torch.equal(found.behavior_logp, said)
    quantize_(old, precision)
    for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
        theirs = dict(tensors(old))
        for name, tensor in tensors(engine.model):
            tensor.data = theirs[name].detach().clone()
    assert torch.equal(engine.generate([request()])[0].behavior_logp, said)


def test_a_stream_under_way_goes_on_with_loaded_weights() -> None:
    """As the model's own step does: none of them is a copy."""
    found = []
    for uses in (True, False):
        engine = TransformersEngine(made(KNOWN["llama"]))
        engine._fuses = uses
        stream = engine.stream(request())
        begun = [next(stream).logp]
        changed = {name: 0.9 * value for name, value in engine.model.named_parameters()}
        engine.load_weights(changed, version=1)
        found.append([*begun, *(token.logp for token in stream)])
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=0, atol=1e-5)


# ---- the check before the first use ----


def _wrong(model: PreTrainedModel) -> fused.Step | None:
    right = fused_step(model)
    return right and (lambda *given: 1.01 * right(*given))


def _broken(model: PreTrainedModel) -> fused.Step:
    def step(*_: object) -> Tensor:
        raise RuntimeError("no kernel\nfor this")

    return step


@pytest.mark.parametrize(("step", "said"), [(_wrong, "differ by"), (_broken, "does not run (no kernel)")])
def test_a_step_that_differs_is_not_used_and_the_log_says_so(
    step: Callable[[PreTrainedModel], fused.Step | None],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = TransformersEngine(tiny()[0])
    monkeypatch.setattr("drpo.rollout.trial.fused_step", step)
    with caplog.at_level(logging.WARNING, "drpo"):
        engine.generate([request()])
    (line,) = [record.getMessage() for record in caplog.records]
    assert said in line and "LlamaForCausalLM" in line and "\n" not in line
    assert engine.decoding_step == "model"


def test_nothing_is_said_where_it_is_used_or_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "drpo"):
        assert can_fuse(tiny()[0])
        assert not can_fuse(made(GROUPED["mixtral, experts"]))
    assert not caplog.records
