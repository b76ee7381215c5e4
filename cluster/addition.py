"""What the whole runs of verl and OpenRLHF share: sums of two small numbers, a random model, an evaluation."""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from drpo.model import loading
from drpo.rewards import exact_number
from drpo.tasks import Addition
from drpo.types import Problem

LARGEST, PROMPTS, UPDATES, SAMPLES, LONGEST = 4, 16, 4, 8, 4
"""Summands are 0 to LARGEST; prompts and updates of a rollout, samples of a prompt, tokens of a sample."""
HELD_OUT, EVALUATED = 12, 16
"""Held-out sums, and completions of each in a framework's validations and in `drpo eval`."""


def score(completion: str, answer: str) -> float:
    """Return 1 if the last number of the completion is the answer, else 0."""
    return exact_number(Problem.of_text("addition", "", answer), completion) or 0.0


def problems(steps: int) -> tuple[list[Problem], list[Problem]]:
    """Return the training sums of every rollout, in their order, and the held-out ones."""
    task = Addition(0, LARGEST)
    return [p for step in range(steps) for p in task.sample(PROMPTS, step, seed=0)], task.held_out(HELD_OUT)


def write_model(folder: Path) -> None:
    """Write a random Llama of two layers over bytes and its tokenizer, whose chat template is the plain text."""
    _, tokenizer = loading.tiny()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}  # of 32, which vLLM's attention on a CPU knows
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes, **heads, **ends)
    )
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)


def evaluated(checkpoint: Path) -> dict[str, Any]:
    """Return the command of `drpo eval` for a framework's checkpoint on the held-out sums, and what it prints."""
    command = ["-m", "drpo", "eval", str(checkpoint), "--task", f"addition(0, {LARGEST})"]
    command += ["--problems", str(HELD_OUT), "--sampling.samples", str(EVALUATED)]
    command += ["--sampling.max-new-tokens", str(LONGEST)]
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True, cwd=checkpoint)
    return {"command": ["python", *command], "output": [line.strip() for line in done.stdout.splitlines()]}


def write_record(
    folder: Path,
    here: Path,
    command: Sequence[str],
    seconds: float,
    packages: Iterable[str],
    log: Sequence[Mapping[str, Any]],
    checkpoint: Path,
) -> None:
    """Write OUT/record.json: the command, versions and the framework's log; then the evaluation of its checkpoint too.

    Args:
        folder: OUT, which stands in the record in its place.
        here: the framework's folder in `cluster`, likewise by its name.
        command: of the framework, without Python.
        seconds: that it took.
        packages: whose versions are kept.
        log: a record for each step.
        checkpoint: that `drpo eval` reads.
    """
    versions = {name: importlib.metadata.version(name) for name in packages} | {"python": sys.version.split()[0]}
    ran = {"command": ["python", *command], "seconds": round(seconds), "versions": versions, "log": log}

    def write(written: Mapping[str, Any]) -> None:
        text = json.dumps(written, indent=1).replace(str(folder), "OUT").replace(str(here), f"cluster/{here.name}")
        (folder / "record.json").write_text(text + "\n")

    write(ran)  # kept, whatever becomes of the evaluation
    write(ran | {"eval": evaluated(checkpoint)})
