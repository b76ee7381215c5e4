# ruff: noqa: E402
"""verl's own worker on two ranks, each with half of a mini-batch, does what one process does with the whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.adapters
cpu = pytest.importorskip("adapters.verl_on_cpu")  # before verl, whose platform it chooses

import torch

from adapters.verl_batches import directly, sampled

SPEC = "drpo(0.02)"


def test_two_ranks_make_the_update_of_one(tmp_path: Path):
    cpu.tiny_model(str(tmp_path / "model"))
    command = [sys.executable, str(Path(__file__).with_name("verl_rank.py"))]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path), SPEC], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said

    model = cpu.Qwen2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    batch = sampled(0)
    counts = [int(mask.sum()) for mask in batch[2]["response_mask"]]
    assert sum(counts[:2]) != sum(counts[2:])  # else each rank's own mean would do
    losses = []
    for _ in range(2):
        loss = directly(model, batch, SPEC)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(losses, abs=1e-6)
    theirs = torch.load(tmp_path / "parameters.pt")
    moved = [(t - p).abs().max().item() for t, p in zip(theirs, model.parameters(), strict=True)]
    assert max(moved) < 0.02 * 1e-2
