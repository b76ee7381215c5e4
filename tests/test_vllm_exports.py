"""vLLM reads what `drpo export` writes, a plain folder and an adapter beside its base. Run by `make test-vllm`.

Not covered: GPUs, other families than Llama's (tests/test_vllm_families.py), exports in bf16.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from drpo.cli import main
from drpo.model import loading
from drpo.model.saving import save_model
from support.families import PROBLEMS
from support.family_vllm import FOUND, TOLERANCE, largest_difference
from support.forks import fork
from support.tiny_world import completion, own_logp, small

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it in .venv-vllm")
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters, from a folder, and what it exports: `whole` and `adapter`."""
    folder = tmp_path_factory.mktemp("lora")
    model, tokenizer = small()
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    (folder / "base").mkdir()
    save_model(model, tokenizer, folder / "base")
    data = folder / "my.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} + 1?", "completion": str(i + 1)}) + "\n" for i in range(16)))
    options = ["--lora-rank", "2", "--steps", "3", "--learning-rate", "0.03", "--checkpoint-every", "1"]
    assert main(["sft", str(data), "--model", str(folder / "base"), *options, "--out", str(folder / "run")]) == 0
    for name, more in (("whole", []), ("adapter", ["--adapter"])):
        assert main(["export", str(folder / "run"), str(folder / name), *more]) == 0
    return folder


def differs(folder: Path, adapter: Path | None, trained: Path) -> None:
    """Print how far vLLM is from the trained model, in a process of its own, which takes vLLM's with it."""
    model, tokenizer = loading.load(str(trained))
    print(f"\n{FOUND}{largest_difference(folder, model, tokenizer, adapter)}", flush=True)


@pytest.mark.parametrize(("served", "adapter"), [("whole", None), ("base", "adapter")])
def test_vllm_gives_the_log_probabilities_of_an_export(run: Path, served: str, adapter: str | None, tmp_path: Path):
    beside = None if adapter is None else run / adapter
    _, said = fork(tmp_path / "out", differs, run / served, beside, run / "run" / "model").end()
    gaps = [float(line.removeprefix(FOUND)) for line in said.splitlines() if line.startswith(FOUND)]
    assert len(gaps) == 1, said[-2000:]
    assert gaps[0] < TOLERANCE


def test_training_has_moved_the_model_by_more_than_the_tolerance(run: Path):
    (base, tokenizer), (trained, _) = loading.load(str(run / "base")), loading.load(str(run / "run" / "model"))
    episode = completion([1, 2, 3, 4], prompt_ids=tokenizer(PROBLEMS[0].prompt)["input_ids"])
    moved = own_logp(base, episode, 1.0) - own_logp(trained, episode, 1.0)
    assert torch.isfinite(moved).all() and moved.abs().max() > 10 * TOLERANCE
