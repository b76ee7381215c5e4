"""Turns of episodes by this project's engine; what is heard between them are random tokens, as many for every row."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.workers.measure import Meter
from benchmarks.workers.protocol import Record, Repetition, serve
from drpo.model import loading
from drpo.model.device import choose_device
from drpo.model.precision import resolve_precision
from drpo.rollout import TransformersEngine, decode
from drpo.types import Generation, Request, Sampling


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Load the engines; a request has "prompts", "samples", "turns", "tokens", "prompt", "heard", "round".

    "kept" False has every turn read anew; "apart" True makes of each turn a rollout with prompts that a group shares.
    """
    device = choose_device()
    model, _ = loading.load(setup["model"])
    precision = resolve_precision(setup["precision"], device)
    engines = {
        kept: TransformersEngine(model.to(device), precision=precision, **({} if kept else {"kept_bytes": 0}))
        for kept in (True, False)
    }
    vocabulary = int(model.config.vocab_size)
    meter = Meter()

    def repetition(request: Mapping[str, Any]) -> Record:
        engine, generator = engines[request.get("kept", True)], torch.Generator().manual_seed(request["round"])
        play = _apart if request.get("apart") else _episodes
        with _limits_count_as_stops():
            meter.start()
            sampled, context = play(engine, request, lambda n: torch.randint(vocabulary, (n,), generator=generator))
            measured = meter.stop()
        return {**measured, "tokens": sampled, "context": context}

    return {"settings": f"torch {torch.__version__.split('+')[0]}; log-probabilities of all tokens"}, repetition


@contextmanager
def _limits_count_as_stops() -> Iterator[None]:
    """Let a turn that ends at its limit go on, which an episode does after a stop token; so all turns are as long."""
    lengths = decode._lengths
    decode._lengths = lambda tokens, stop: [(n, True) for n, _ in lengths(tokens, stop)]
    try:
        yield
    finally:
        decode._lengths = lengths


def _episodes(engine: TransformersEngine, request: Mapping[str, Any], hear: Any) -> tuple[int, int]:
    """Play episodes; return how many tokens were sampled, and how long a context is at the end."""
    contexts = [prompt for prompt in _prompts(request, hear, request["prompt"]) for _ in range(request["samples"])]
    said: list[Generation | None] = [None] * len(contexts)
    sampled = 0
    for turn in range(request["turns"]):
        if turn:
            contexts = [torch.cat([context, hear(request["heard"])]) for context in contexts]
        generations = engine.generate(_requests(request, turn, contexts, said))
        contexts = [torch.cat([c, g.token_ids]) for c, g in zip(contexts, generations, strict=True)]
        said = list(generations)
        sampled += sum(len(g.token_ids) for g in generations)
    engine.release()
    return sampled, len(contexts[0])


def _apart(engine: TransformersEngine, request: Mapping[str, Any], hear: Any) -> tuple[int, int]:
    """Sample a rollout of one turn for each turn of an episode, with prompts as long as its context then."""
    sampled = 0
    for turn in range(request["turns"]):
        length = request["prompt"] + turn * (request["tokens"] + request["heard"])
        contexts = [prompt for prompt in _prompts(request, hear, length) for _ in range(request["samples"])]
        generations = engine.generate(_requests({**request, "turns": 1}, 0, contexts, [None] * len(contexts)))
        sampled += sum(len(g.token_ids) for g in generations)
    return sampled, length + request["tokens"]


def _prompts(request: Mapping[str, Any], hear: Any, length: int) -> list[Tensor]:
    return [hear(length) for _ in range(request["prompts"])]


def _requests(
    request: Mapping[str, Any], turn: int, contexts: list[Tensor], said: list[Generation | None]
) -> list[Request]:
    sampling, goes_on = Sampling(max_new_tokens=request["tokens"]), turn + 1 < request["turns"]
    return [
        Request(context, sampling, frozenset(), (request["round"], row, turn), after=after, goes_on=goes_on)
        for row, (context, after) in enumerate(zip(contexts, said, strict=True))
    ]


if __name__ == "__main__":
    serve(prepare)
