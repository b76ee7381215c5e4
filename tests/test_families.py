"""The families of docs/models.md: one function in the trainer, transformers, the sampler and the saved folder; layers
computed again, runs that go on, and adapters change nothing of it. What vLLM makes of them: test_vllm_families.py.
"""

import copy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from drpo.model.loading import load
from drpo.model.policy import Policy
from drpo.model.precision import FP32
from drpo.model.saving import save_model
from drpo.objectives import DRPO
from drpo.train.loop import train
from drpo.train.optim import AdamW
from drpo.train.setup import build as components_of
from support.families import FAMILIES, build, widest
from support.family_table import DOCUMENT, checkpointing, documented, one_function, resume, trains
from support.rollouts import transformers_engine
from support.tiny_world import tiny
from support.worlds import sampling, tiny_run

HANDFUL = ("deepseek_v3", "phi3, longrope", "bert")
"""Buffers that are no parameters; a rotary embedding with a limit; one refused."""

TRAINED = (
    "bamba", "falcon_h1", "gemma3", "gemma4", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "llama4", "mamba",
    "mamba2", "mistral3", "nemotron_h", "qwen3_5", "qwen3_5_moe", "qwen3_next", "recurrent_gemma", "zamba", "zamba2",
)  # fmt: skip
"""Recurrent states of every kind, models for images, and blocks that are run at several depths."""

POPULAR = (
    "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "gemma4", "gemma4_text", "cohere", "cohere2", "granite",
    "granitemoe", "granitemoehybrid", "phi", "phi3", "phi3, longrope", "gptj", "qwen3_next", "qwen3_5", "qwen3_5_text",
    "qwen3_5_moe", "qwen3_5_moe_text", "lfm2", "lfm2_moe", "falcon_h1", "nemotron_h", "mamba", "mamba2", "llama4",
    "llama4_text", "gpt_oss", "minicpm3", "kimi_linear",
)  # fmt: skip
"""Those that people ask for by name."""


def _require(found: dict[str, str], family: str) -> None:
    row = documented()[family]
    said = f"PYTHONPATH=tests python -m support.family_table '{family}' writes its row in {DOCUMENT} anew"
    assert found == {column: row[column] for column in found}, said


def _folder(family: str, folder: Path) -> Path:
    build(family).save_pretrained(folder)
    tiny()[1].save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", HANDFUL)
def test_a_handful_are_as_documented(family: str):
    _require(one_function(family), family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in HANDFUL])
def test_every_family_is_as_documented(family: str):
    _require(one_function(family), family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_computed_again_and_runs_that_go_on_are_as_documented(family: str, tmp_path: Path):
    if trains(documented()[family]):
        _require({"checkpointing": checkpointing(family), "resume": resume(family, tmp_path)}, family)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("family", TRAINED)
def test_after_three_steps_of_training_it_is_still_one_function(family: str, rank: int, tmp_path: Path):
    run = tiny_run(
        model=str(_folder(family, tmp_path / "model")),
        lora_rank=rank,
        steps=3,
        prompts=4,
        sampling=sampling(samples=4),
        optimizer=AdamW(1e-3),
        objective=DRPO(0.2),
    )
    components = components_of(run)
    before = {name: p.detach().clone() for name, p in components.policy.state().items()}
    assert train(run, tmp_path / "run", components=components)["finished"]
    after = components.policy.state()
    assert any(not after[name].equal(before[name]) for name in before)
    saved, tokenizer = load(str(tmp_path / "run"))
    assert type(saved) is type(components.policy.model)
    gap = widest(components.policy, transformers_engine(saved, tokenizer), tokenizer)
    assert gap < 1e-4 or gap < 3 * _rounding(saved)  # Zamba's, with adapters


def _rounding(model: PreTrainedModel) -> float:
    """The largest difference of a model's log-probabilities in float32 from those in float64."""
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        single, double = (m(input_ids=ids, use_cache=False).logits for m in (model, copy.deepcopy(model).double()))
    return float((single.log_softmax(-1) - double.log_softmax(-1)).abs().max())


def test_the_table_names_every_family_and_trains_a_hundred():
    rows = documented()
    assert tuple(rows) == FAMILIES
    assert sum(trains(row) for row in rows.values()) >= 100
    assert all(trains(rows[family]) for family in POPULAR)
    for row in filter(trains, rows.values()):
        assert row["resume"] == "yes" and row["checkpointing"] in ("equal", "no") and row["vLLM"], row
    assert all("--engine" in row["trainer"] for row in rows.values() if not trains(row))


def test_only_the_language_model_of_a_model_for_images_is_trained(tmp_path: Path):
    source = _folder("gemma3", tmp_path / "model")
    (source / "preprocessor_config.json").write_text('{"crop": 1}')
    model, tokenizer = load(str(source))
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    policy = Policy(model, precision=FP32, temperature=1.0)
    trained = set(policy.trainable())
    assert trained and all(name.startswith("model.language_model.") for name in trained)
    assert len(trained) < len(policy.state())
    adapted = Policy(load(str(source))[0], precision=FP32, temperature=1.0, lora_rank=2)
    assert all(name.startswith("model.language_model.") for name in adapted.trainable())
    save_model(policy.plain(), tokenizer, tmp_path / "saved")
    assert (tmp_path / "saved" / "preprocessor_config.json").read_text() == '{"crop": 1}'
