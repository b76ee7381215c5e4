"""The engines that run on any machine: in process, and two whose vLLM is a stand-in that draws from a real model."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from transformers import PreTrainedModel

from drpo.rollout import ServerEngine, VLLMEngine, vllm
from drpo.rollout.server import Patience
from support.fake_vllm import FakeServer, Sampler, fake_module
from support.rollouts import Prompted, transformers_engine
from support.tiny_world import STOPS, tiny

QUICK = Patience(request_s=1.0, attempts=3, pause_s=0.01)


@contextmanager
def stand_in(model: PreTrainedModel | None = None) -> Iterator[list[dict[str, Any]]]:
    """Put a stand-in in the place of the module `vllm`; yield the options of every engine that is made with it."""
    options: list[dict[str, Any]] = []
    module = fake_module(Sampler(model or tiny(STOPS)[0]), options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", module)
        patch.setitem(sys.modules, "vllm.distributed", module.distributed)
        patch.setitem(sys.modules, "vllm.compilation", module.compilation)
        for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL"):
            patch.setenv(name, os.environ.get(name, ""))
            patch.delenv(name)
        vllm._vllm.cache_clear()
        yield options
        vllm._vllm.cache_clear()


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """A server on loopback with the tiny model."""
    server = FakeServer(tiny(STOPS)[0])
    yield server
    server.stop()


@contextmanager
def asking(server: FakeServer) -> Iterator[Prompted]:
    """The engine that asks a server."""
    model, tokenizer = tiny(STOPS)
    engine = Prompted(ServerEngine(server.address, model, patience=QUICK, concurrency=4), model, tokenizer)
    yield engine
    engine.close()


@contextmanager
def _transformers() -> Iterator[Prompted]:
    yield transformers_engine(*tiny(STOPS))


@contextmanager
def _vllm() -> Iterator[Prompted]:
    with stand_in():
        model, tokenizer = tiny(STOPS)
        yield Prompted(VLLMEngine(model), model, tokenizer)


@contextmanager
def _server() -> Iterator[Prompted]:
    with fake_server() as server, asking(server) as engine:
        yield engine


ENGINES: Mapping[str, Callable[[], AbstractContextManager[Prompted]]] = {
    "transformers": _transformers,
    "vllm, stand-in": _vllm,
    "server, stand-in": _server,
}
"""Name -> an engine of the model `tiny(STOPS)`, with a driver before it."""
