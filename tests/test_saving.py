"""What leaves the trainer is what was trained: state, checkpoint, folder, export; what cannot be saved is refused."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from drpo.errors import InputError
from drpo.model import loading, saving
from drpo.model.loading import named_tensors, persistent_buffers
from drpo.model.policy import Policy, fill
from drpo.model.precision import FP32, Precision
from drpo.model.saving import cast, probe, require_savable, save_model
from drpo.rollout.turn_ends import stop_ids
from drpo.rollout.weight_sync import WeightSync
from drpo.train import checkpoint, stored
from drpo.train.optim import AdamW
from support.families import build, stir_adapters, stirred
from support.rollouts import transformers_engine

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def routed() -> PreTrainedModel:
    """A tiny DeepSeek-V3, whose router has a bias that is no parameter."""
    return build("deepseek_v3")


def policy_of(model: PreTrainedModel, precision: Precision = FP32, **options: Any) -> Policy:
    return Policy(model, precision=precision, temperature=1.0, **options)


def copied(model: PreTrainedModel) -> PreTrainedModel:
    own = type(model)(model.config).eval()
    own.load_state_dict(model.state_dict())
    return own


@pytest.mark.parametrize("rank", [0, 2])
def test_the_state_and_the_plain_model_hold_persistent_buffers(routed: PreTrainedModel, rank: int):
    policy = policy_of(copied(routed), lora_rank=rank)
    assert torch.equal(policy.state()[BIAS], routed.state_dict()[BIAS]) and routed.state_dict()[BIAS].abs().min() > 0
    assert torch.equal(policy.plain().state_dict()[BIAS], routed.state_dict()[BIAS])


def test_engines_take_buffers_as_they_are_now(routed: PreTrainedModel):
    model = copied(routed)
    engine, sync = transformers_engine(model), WeightSync(model)
    state = {name: tensor + 1 for name, tensor in named_tensors(model).items()}
    engine.load_weights(state, version=1)
    assert torch.equal(persistent_buffers(engine.model)[BIAS], state[BIAS])
    assert torch.equal(sync.checkpoint(state)[BIAS], state[BIAS])
    with pytest.raises(InputError, match="e_score_correction_bias"):
        engine.load_weights({name: t for name, t in state.items() if name != BIAS}, version=2)


def test_a_checkpoint_holds_buffers_and_an_older_one_leaves_them(routed: PreTrainedModel, tmp_path: Path):
    policy, other = policy_of(copied(routed), lora_rank=2), policy_of(stirred(copied(routed), 1.0), lora_rank=2)
    optimizer = AdamW(0.1, (0.9, 0.99), 0.0).build(list(policy.trainable().values()), [])
    new = checkpoint.save(tmp_path, stored.Progress(1), policy.checkpointed(), optimizer)
    old = checkpoint.save(tmp_path, stored.Progress(2), policy.trainable(), optimizer)
    before = other.state()[BIAS].clone()
    checkpoint.restore(old, other.checkpointed(), None)
    assert torch.equal(other.state()[BIAS], before)
    checkpoint.restore(new, other.checkpointed(), None)
    assert torch.equal(other.state()[BIAS], policy.state()[BIAS])


@pytest.mark.parametrize(
    ("precision", "rank"),
    [(FP32, 0), (Precision(torch.float32, "int8"), 0), (Precision(torch.bfloat16, "e4m3", "e4m3"), 2)],
)
def test_a_sound_folder_appears_with_ordinary_modes(precision: Precision, rank: int, tmp_path: Path):
    model, tokenizer = loading.tiny()
    policy = policy_of(model, precision, lora_rank=rank)
    stir_adapters(policy)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale").touch()
    save_model(policy.plain(), tokenizer, tmp_path / "model", policy.logits(probe(model)))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    modes = {path.name: oct(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert len(set(modes.values())) == 1 and "stale" not in modes, modes
    assert modes["model.safetensors"] == oct(0o100666 & ~_umask())


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def _zero_norm(model: PreTrainedModel) -> None:
    model.model.norm.weight.data.zero_()


def _other_eps(model: PreTrainedModel) -> None:
    model.config.rms_norm_eps = 1.0


@pytest.mark.parametrize(
    ("spoil", "said"), [(_zero_norm, r"1 of 20 tensors differ, 'model\.norm"), (_other_eps, "logits")]
)
def test_a_folder_that_is_not_the_trained_model_is_kept_aside(
    spoil: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, tokenizer = loading.tiny()
    policy = policy_of(model)
    right = PreTrainedModel.save_pretrained

    def wrong(self: PreTrainedModel, folder: Path) -> None:
        other = copied(self)
        spoil(other)
        right(other, folder)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", wrong)
    with pytest.raises(InputError, match=f"model.unsound.*{said}"):
        save_model(policy.plain(), tokenizer, tmp_path / "model", policy.logits(probe(model)))
    assert [path.name for path in tmp_path.iterdir()] == ["model.unsound"]


def test_a_disk_that_is_full_while_the_model_is_written_is_no_fault_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, tokenizer = loading.tiny()

    def full(folder: Path, **_: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    for save in (lambda: save_model(model, tokenizer, tmp_path / "model"), lambda: require_savable(model, tokenizer)):
        with pytest.raises(OSError) as caught:
            save()
        assert caught.value.errno == errno.ENOSPC and "model" in caught.value.filename
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_its_adapters_on_a_grid_is_kept_aside(tmp_path: Path):
    model, tokenizer = loading.tiny()
    policy = policy_of(model, Precision(torch.float32, "int8"), lora_rank=2)
    base = policy.plain()
    stir_adapters(policy)
    with pytest.raises(InputError, match="its logits differ"):
        save_model(base, tokenizer, tmp_path / "model", policy.logits(probe(model)))


def test_a_head_of_zeros_is_saved(tmp_path: Path):
    model, tokenizer = loading.tiny()
    model.model.norm.weight.data.zero_()
    policy = policy_of(model)
    save_model(policy.plain(), tokenizer, tmp_path / "model", policy.logits(probe(model)))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bfloat16_spares_what_the_family_keeps_in_float32(routed: PreTrainedModel, tmp_path: Path):
    save_model(cast(copied(routed), torch.bfloat16), loading.tiny()[1], tmp_path / "model")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(read.state_dict()[BIAS], routed.state_dict()[BIAS])
    assert read.get_parameter("model.norm.weight").dtype == torch.bfloat16


class Scaled(LlamaForCausalLM):
    """A user's own, with buffers whose dtypes it names."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.float16))
        self.register_buffer("scale", torch.ones(2, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_keep_the_dtype_that_a_class_names(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(saving, "_reader", type)
    model, tokenizer = loading.tiny()
    model = cast(Scaled(model.config), dtype)
    assert (model.steps.dtype, model.scale.dtype, model.lm_head.weight.dtype) == (torch.float16, torch.float32, dtype)
    save_model(model, tokenizer, tmp_path / "model")


def test_a_folder_without_given_logits_is_compared_with_the_model_itself(tmp_path: Path):
    model, tokenizer = loading.tiny()
    with pytest.raises(InputError, match="its logits differ"):
        save_model(Doubled(model.config), tokenizer, tmp_path / "model")


def test_layers_that_share_a_weight_share_its_adapter():
    policy = policy_of(_sharing(*loading.tiny()), lora_rank=2)
    stir_adapters(policy)
    assert len(policy.trainable()) == 2 * (2 * 7 - 1)
    merged, ids = _sharing(*loading.tiny()), torch.arange(9)
    fill(merged, policy.state())
    torch.testing.assert_close(policy.logits(ids), merged(ids[None]).logits[0], rtol=1e-5, atol=1e-5)


def test_an_adapter_of_a_weight_that_an_embedding_uses_too_is_refused():
    model, _ = loading.tiny()
    layer = model.model.layers[0]
    layer.table = torch.nn.Embedding(*layer.mlp.up_proj.weight.shape)
    layer.table.weight = layer.mlp.up_proj.weight
    with pytest.raises(InputError, match=r"lora_rank=2.*up_proj shares its weight"):
        policy_of(model, lora_rank=2)


def test_generation_defaults_that_cannot_be_written_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model, tokenizer = loading.tiny()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": [0, 7]}')
    loaded, tokenizer = loading.load(str(tmp_path))
    assert "temperature" in caplog.text and stop_ids(loaded, tokenizer) == {0, 7}
    require_savable(loaded, tokenizer)
    save_model(policy_of(loaded).plain(), tokenizer, tmp_path / "again")


class Halved(LlamaForCausalLM):
    """What a user may have made: Llama's tensors, another function."""


class Doubled(LlamaForCausalLM):
    """Likewise, in a way that only its figures show."""

    def forward(self, *args: Any, **options: Any) -> Any:
        out = super().forward(*args, **options)
        out.logits = 2 * out.logits
        return out


def _of_another_class(model: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    return Halved(model.config)


def _with_more(model: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    model.register_buffer("more", torch.ones(2))
    return model


def _unwritable(model: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    model.config.own = object()
    return model


def _sharing(model: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    return model


def _misplaced(model: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    tokenizer.init_kwargs["own"] = object()
    return model


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_of_another_class, "read its folder as LlamaForCausalLM"),
        (_with_more, "'more' is missing"),
        (_unwritable, "could not be written"),
        (_sharing, "shared tensors"),
        (_misplaced, "could not be written"),
    ],
)
def test_a_model_that_could_not_be_saved_is_refused_in_one_line(spoil: Any, said: str):
    model, tokenizer = loading.tiny()
    with pytest.raises(InputError, match=said) as refused:
        require_savable(spoil(model, tokenizer), tokenizer)
    assert "\n" not in str(refused.value)
