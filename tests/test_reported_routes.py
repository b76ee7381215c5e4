"""The experts that vLLM's routers choose, as it reports them in process and over HTTP; a stand-in is asked.

That vLLM itself reports as the stand-in does is shown in test_vllm.py.
"""

import base64
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from drpo.errors import InputError
from drpo.rollout import Engine, ServerEngine, VLLMEngine
from drpo.rollout.server_answer import columns
from drpo.train.loop import train
from drpo.train.records import METRICS, read_records
from drpo.types import Generation, Request, Sampling
from drpo.types.routes import known
from support.engines import QUICK, stand_in
from support.fake_vllm import FakeServer
from support.mixtures import chosen, fresh
from support.tiny_world import STOPS, perturb, tiny
from support.worlds import sampling, tiny_run

DENSE_FIRST = "glm4, a dense layer and groups"
PROMPTS = [torch.tensor([5, 9, 77, 31]), torch.tensor([200, 8])]
REQUESTS = [Request(p, Sampling(max_new_tokens=5), STOPS, (0, i, j)) for i, p in enumerate(PROMPTS) for j in range(2)]


def model_with_a_dense_layer() -> PreTrainedModel:
    return perturb(fresh(DENSE_FIRST), 0.1)


@contextmanager
def in_process(model: PreTrainedModel) -> Iterator[Engine]:
    with stand_in(model) as started:
        yield VLLMEngine(model, routes=True)
        assert started[0]["enable_return_routed_experts"]


@contextmanager
def server(model: PreTrainedModel, faults: Sequence[str] = (), routes: bool = True) -> Iterator[Engine]:
    fake = FakeServer(model, routes)
    engine = ServerEngine(fake.address, model, patience=QUICK, concurrency=1, routes=True)
    fake.faults.extend(faults)
    try:
        yield engine
    finally:
        engine.close()
        fake.stop()


def assert_routes(model: PreTrainedModel, generations: Sequence[Generation]) -> None:
    for request, g in zip(REQUESTS, generations, strict=True):
        routes = torch.cat([g.routes.prompt, g.routes.tokens])
        expected = chosen(model, torch.cat([request.prompt_ids, g.token_ids]))
        assert torch.equal(routes[:-1], expected[:-1]) and not known(routes[-1:]).any()


@pytest.mark.parametrize("engine_of", [in_process, server])
def test_routes_are_those_of_the_layers_with_experts(engine_of) -> None:
    """A prompt's choices are one tensor for its samples, though vLLM reports them with each."""
    model = model_with_a_dense_layer()
    with engine_of(model) as engine:
        generations = engine.generate(REQUESTS)
    assert_routes(model, generations)
    assert generations[0].routes.prompt.shape[1] == model.config.num_hidden_layers - 1
    assert len({id(g.routes.prompt) for g in generations}) == len(PROMPTS)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("another model", r"vLLM sent experts 8 to 15 of a model that has 8"),
        ("another length", r"vLLM sent routed_experts of \[\d+, 2, 2\] uint8; it must have .* \d+ tokens that it read"),
        ("no numbers of experts", r"float32; it must have integers"),
    ],
)
def test_reports_of_something_else_end_in_one_line(fault: str, said: str) -> None:
    with (
        server(fresh("qwen3"), [fault]) as engine,
        pytest.raises(InputError, match=rf"{said}.*--routing-replay off") as error,
    ):
        engine.generate([Request(torch.arange(1, 40), Sampling(max_new_tokens=2), STOPS, (0,), name="problem 'p'")])
    assert "\n" not in str(error.value) and str(error.value).startswith("problem 'p': ")


def test_a_server_that_does_not_report_them_says_how_to_start_it() -> None:
    with (
        server(fresh("qwen3"), routes=False) as engine,
        pytest.raises(InputError, match="drpo serve-rollouts MODEL -- --enable-return-routed-experts"),
    ):
        engine.generate(REQUESTS[:1])


def test_a_vllm_that_does_not_report_them_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in(fresh("qwen3")):
        with pytest.raises(InputError, match=r"has no experts.*--routing-replay off"):
            VLLMEngine(tiny()[0], routes=True)
        monkeypatch.setattr(sys.modules["vllm"], "EngineArgs", object)
        with pytest.raises(InputError, match=r"vLLM 0\.32\.0 does not report which experts.*--engine transformers"):
            VLLMEngine(fresh("qwen3"), routes=True)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"not an array",
        npy(np.zeros((2, 2, 2), np.uint8))[:-1],
        npy(np.zeros((2, 2, 2), np.uint8)).replace(b"(2, 2, 2)", b"(2**9,2)"),
        npy(np.zeros((2, 2, 2), np.uint8)).replace(b"(2, 2, 2)", b"(9**99, )"),
        npy(np.zeros((2, 2, 2), np.uint8)).replace(b"(2, 2, 2)", b"(((((((("),
        npy(np.zeros((2, 2, 2), np.uint8)).replace(b"|u1", b"|O8"),
    ],
    ids=["nothing", "text", "cut", "expression", "huge", "unclosed", "objects"],
)
def test_what_is_no_array_is_not_read(sent: bytes) -> None:
    """Its header is what it says; nothing is evaluated, unpickled, or made as large as it asks."""
    choice = {"token_ids": [1], "finish_reason": "stop", "routed_experts": base64.b64encode(sent).decode()}
    with pytest.raises(ValueError, match="routed_experts"):
        columns(choice, routes=True)
    assert "chosen" not in columns(choice, routes=False)


@pytest.mark.slow
@pytest.mark.parametrize("engine_of", ["vllm", "server"])
def test_a_run_replays_what_vllm_reports(engine_of: str, tmp_path) -> None:
    model = perturb(fresh("qwen3"), 0.1)
    model.save_pretrained(tmp_path / "mixture")
    tiny()[1].save_pretrained(tmp_path / "mixture")
    fake = FakeServer(model, routes=True)
    run = tiny_run(
        model=str(tmp_path / "mixture"), engine=fake.address if engine_of == "server" else "vllm", steps=2, prompts=2,
        sampling=sampling(samples=4), precision="bf16", routing_replay="sampler",
    )  # fmt: skip
    try:
        with stand_in(model):
            train(run, tmp_path / "run")
    finally:
        fake.stop()
    metrics = [m for m in read_records(tmp_path / "run" / METRICS) if m["trained_tokens"]]
    assert metrics and all(m["routing_missing"] == 0 for m in metrics)
    assert any(m["routing_replaced"] > 0 for m in metrics)
