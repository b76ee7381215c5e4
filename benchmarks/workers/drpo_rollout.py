"""Rollouts of this project's engine, every token with its log-probability."""

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.workers.measure import Meter
from benchmarks.workers.protocol import Record, Repetition, serve
from drpo.model import loading
from drpo.model.device import choose_device
from drpo.model.precision import resolve_precision
from drpo.rollout import EpisodeDriver, TransformersEngine
from drpo.types import Problem, Sampling


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Load the engine; a request has "prompts", "samples", "new_tokens", "round"."""
    device = choose_device()
    model, tokenizer = loading.load(setup["model"])
    engine = TransformersEngine(model.to(device), precision=resolve_precision(setup["precision"], device))
    driver = EpisodeDriver.of(engine, model, tokenizer)
    del model  # the engine has its own copy
    meter = Meter()

    def repetition(request: Mapping[str, Any]) -> Record:
        problems = [Problem.of_text(str(i), prompt, "") for i, prompt in enumerate(request["prompts"])]
        sampling = Sampling(samples=request["samples"], max_new_tokens=request["new_tokens"])
        meter.start()
        groups = driver.run(problems, sampling, (0, request["round"]))
        return {**meter.stop(), "tokens": sum(e.n_sampled for group in groups for e in group)}

    return {"settings": f"torch {torch.__version__.split('+')[0]}; log-probabilities of all tokens"}, repetition


if __name__ == "__main__":
    serve(prepare)
