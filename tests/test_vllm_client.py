"""What needs no vLLM: what it is asked, how its answers are read, and what is done when a server fails.

A stand-in (support/fake_vllm.py) draws from a real model. That vLLM itself does as it does is shown in test_vllm.py.
"""

import asyncio
import functools
import importlib.util
import itertools
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from drpo import cli
from drpo.cli.commands.serve_rollouts import ServeRolloutsOptions
from drpo.cli.serve_rollouts import command
from drpo.credentials import AUTH, TOKEN, without_secrets
from drpo.errors import EngineError, InputError
from drpo.model.loading import named_tensors
from drpo.rollout import ServerEngine, VLLMEngine, server, vllm
from drpo.rollout.gate import CALLS, METHODS, RPC, Gate
from drpo.rollout.server import Patience
from drpo.rollout.server_answer import columns
from drpo.rollout.vllm import precision_options, warn_untested
from drpo.rollout.vllm_patches import Changed, refresh_packed
from drpo.rollout.vllm_request import parameters
from drpo.rollout.weight_sync import WeightSync
from drpo.seeds import derive
from drpo.train import setup
from drpo.train.callbacks import NullCallback
from drpo.train.loop import train
from drpo.train.stored import latest
from drpo.types import Episode, Problem, Request, Sampling
from support.engines import QUICK, asking, fake_server, stand_in
from support.fake_vllm import FakeServer
from support.hostile import refused
from support.rollouts import Prompted
from support.tiny_world import PROBLEMS, STOPS, own_logp, perturb, tiny
from support.worlds import sampling as tiny_sampling
from support.worlds import tiny_run

SAMPLING = Sampling(samples=3, max_new_tokens=5)
FEW = PROBLEMS[:2]


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def engine(fake: FakeServer) -> Iterator[Prompted]:
    with asking(fake) as engine:
        yield engine


@pytest.fixture
def started() -> Iterator[list[dict[str, Any]]]:
    with stand_in() as options:
        yield options


@pytest.fixture
def destroyed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The groups that are destroyed, None for the default one, while this is the second of two processes."""
    groups: list[Any] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "destroy_process_group", lambda group=None: groups.append(group))
    return groups


def vllm_engine(stops: frozenset[int] = frozenset()) -> Prompted:
    model, tokenizer = tiny(stops)
    return Prompted(VLLMEngine(model), model, tokenizer)


def close_to_distribution(completions: list[Episode], model: Any, temperature: float = 1.0) -> None:
    for c in completions:
        assert torch.allclose(c.sequence.behavior_logp, own_logp(model, c, temperature), atol=1e-5), c.sample


# Requests


def test_what_is_sent_is_the_distribution_and_nothing_is_left_to_a_generation_config():
    asked = Sampling(temperature=0.6, top_p=0.9, top_k=7, max_new_tokens=3, top_logprobs=2)
    sent = parameters(Request(torch.tensor([1]), asked, frozenset({9, 0}), (5, "a", 1)))
    distribution = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 7,
        "max_tokens": 3,
        "logprobs": 2,
        "seed": derive(5, "a", 1),
    }
    distribution |= {"n": 1}
    none = {"min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_tokens": 0}
    assert {**distribution, **none, "stop_token_ids": [0, 9], "ignore_eos": True}.items() <= sent.items()
    assert [sent[n] for n in ("logit_bias", "allowed_token_ids", "bad_words", "stop", "structured_outputs")] == [
        None
    ] * 5


def test_a_models_generation_config_changes_nothing_but_the_stop_words(started: list[dict[str, Any]]):
    model, tokenizer = tiny()
    model.generation_config = GenerationConfig(eos_token_id=[0, 9], top_k=20, temperature=0.1, repetition_penalty=1.5)
    Prompted(VLLMEngine(model), model, tokenizer).generate(FEW, SAMPLING, (0,))
    (options,) = started
    assert options["generation_config"] == "vllm" and options["logprobs_mode"] == "processed_logprobs"
    for sent in options["engine"].asked:
        assert (sent["top_k"], sent["temperature"], sent["repetition_penalty"]) == (0, 1.0, 1.0)
        assert sent["stop_token_ids"] == [0, 9]


def test_every_completion_has_a_seed_of_its_own(engine: ServerEngine, fake: FakeServer):
    engine.generate(FEW, SAMPLING, (5, 7))
    seeds = {(tuple(a["token_ids"]), a["sampling_params"]["seed"]) for a in fake.asked}
    assert {seed for _, seed in seeds} == {derive(5, 7, p.id, i) for p in FEW for i in range(3)}
    assert len(seeds) == 6


# The engine in process


def test_vllm_missing_is_said_with_a_way_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    vllm._vllm.cache_clear()
    with pytest.raises(InputError, match=r"engine='vllm'.*install.*--engine transformers"):
        VLLMEngine(tiny()[0])


def test_an_engine_works_in_this_process_quietly_and_leaves_the_threads(started: list[dict[str, Any]]):
    threads, function = torch.get_num_threads(), torch.set_num_threads
    os.environ["VLLM_LOGGING_LEVEL"] = "DEBUG"  # the user's own word counts
    engine = VLLMEngine(tiny()[0], precision="fp32")
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1" and os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert torch.get_num_threads() == threads and torch.set_num_threads is function
    assert started[0]["dtype"] == "float32"
    assert not Path(started[0]["model"]).exists()  # what vLLM started from was temporary
    engine.close()
    engine.close()
    assert started[0]["shut_down"]


@pytest.mark.parametrize("temperature", [0.009, 2.1])
def test_a_temperature_that_vllm_does_not_have_is_refused_before_it_is_asked(
    started: list[dict[str, Any]], engine: ServerEngine, fake: FakeServer, temperature: float
):
    """It would sample at 0.01, or take down the engine."""
    for one in (vllm_engine(), engine):
        with pytest.raises(InputError, match=rf"^sampling.temperature={temperature}: vLLM samples at 0 and at 0.01 to"):
            one.generate(FEW, Sampling(temperature=temperature, max_new_tokens=2), (0,))
        for edge in (0.0, 0.01, 2.0):
            one.generate(FEW, Sampling(temperature=edge, max_new_tokens=2), (0,))


def test_a_prompt_that_leaves_no_room_is_named(started: list[dict[str, Any]]):
    with pytest.raises(InputError, match=r"problem 'long'.*128"):
        vllm_engine().generate([Problem.of_text("long", "x" * 128, "")], SAMPLING, (0,))


def test_it_sleeps_between_rollouts_where_the_trainer_shares_the_device(started: list[dict[str, Any]]):
    engine = vllm_engine(STOPS)
    engine.engine._sleeps = True  # as on a GPU; the stand-in refuses whatever is asked of it asleep
    for _ in range(2):
        engine.generate(FEW, SAMPLING, (0,))
        assert started[0]["asleep"]
    engine.load_weights(dict(tiny(STOPS)[0].named_parameters()), 1)
    engine.generate(FEW, SAMPLING, (0,))


def test_later_turns_find_their_prompts_beginning_in_the_prefix_cache(started: list[dict[str, Any]]):
    """It does not sleep between the turns of a rollout, which would empty the cache; new weights do empty it."""
    engine = VLLMEngine(tiny(STOPS)[0])
    engine._sleeps = True
    prompt, glue = torch.arange(1, 12), torch.tensor([3, 5])
    first = Request(prompt, SAMPLING, STOPS, (0, "a", 0), goes_on=True)
    (said,) = engine.generate([first])
    assert not started[0]["asleep"] and engine.later_tokens == 0
    later = torch.cat([prompt, said.token_ids, glue])
    engine.generate([Request(later, SAMPLING, STOPS, (0, "a", 0, 1), after=said)])
    assert started[0]["asleep"] and engine.later_tokens == len(later)
    cached = engine.cached_tokens
    assert len(prompt) + len(said.token_ids) - 4 <= cached < len(later)
    engine.release()
    engine.load_weights(dict(tiny(STOPS)[0].named_parameters()), 1)
    engine.generate([Request(later, SAMPLING, STOPS, (0, "a", 0, 1), after=said, goes_on=True)])
    assert engine.cached_tokens == cached and not started[0]["asleep"]
    engine.release()
    assert started[0]["asleep"]


def test_of_several_processes_each_has_an_engine_on_the_one_device_that_it_sees(
    started: list[dict[str, Any]], destroyed: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.delenv("RANK", raising=False)
    VLLMEngine(tiny()[0])
    assert started[0]["distributed_executor_backend"] == "external_launcher"
    assert started[0]["place"] == ("1", "0")
    assert os.environ["LOCAL_RANK"] == "5" and "RANK" not in os.environ


def test_alone_vllm_is_told_nothing_of_processes(started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    VLLMEngine(tiny()[0])
    assert "distributed_executor_backend" not in started[0] and started[0]["place"][1] == "5"


@pytest.mark.parametrize("how", ["closed", "collected"])
@pytest.mark.parametrize("size", [1, 2])
def test_the_trainers_world_outlives_the_engine(
    how: str, size: int, started: list[dict[str, Any]], destroyed: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dist, "get_world_size", lambda: size)
    engine = VLLMEngine(tiny()[0])
    if how == "closed":
        engine.close()
    else:
        engine._llm.llm_engine.engine_core.shutdown()  # as vLLM's own finaliser does
    assert "vLLM's own" in destroyed and (None in destroyed) == (size == 1)
    dist.destroy_process_group()
    assert destroyed[-1] is None


def test_an_engine_that_fails_in_process_ends_in_one_line_and_loses_no_finished_step(
    started: list[dict[str, Any]], tmp_path: Path
):
    small = tiny_sampling(samples=2, max_new_tokens=4)
    run = tiny_run(engine="vllm", steps=4, prompts=2, eval_problems=0, sampling=small)

    class Breaks(NullCallback):
        def phase(self, name: str) -> None:
            if name == "rollout" and len(done) == 2:
                started[0]["engine"].generate = fails

        def stepped(self, step: int, *others: Any) -> None:
            done.append(step)

    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("the kernel gave up\nand says so at length")

    done: list[int] = []
    with pytest.raises(EngineError, match=r"engine='vllm'.*\(RuntimeError: the kernel gave up\)") as caught:
        train(run, tmp_path, Breaks())
    assert "\n" not in str(caught.value) and started[0]["shut_down"]
    saved = latest(tmp_path / "checkpoints")
    assert done == [1, 2] and saved is not None and saved.name.endswith("2")
    assert train(run, tmp_path)["finished"]


def test_a_signal_that_comes_while_it_samples_for_an_evaluation_ends_the_run_as_asked(
    started: list[dict[str, Any]], tmp_path: Path
):
    """It is no failure of vLLM, which would begin the run again."""

    class Signalled(NullCallback):
        def phase(self, name: str) -> None:
            engine = started[0]["engine"]
            if name == "evaluation" and done:
                engine.generate = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)

        def stepped(self, step: int, *others: Any) -> None:
            done.append(step)

    done: list[int] = []
    run = tiny_run(engine="vllm", steps=4, prompts=2, eval_every=2, sampling=tiny_sampling(samples=2, max_new_tokens=4))
    summary = train(run, tmp_path, Signalled())
    assert (summary["stopped_by_signal"], summary["finished"], done) == (signal.SIGINT, False, [1, 2])
    assert started[0]["shut_down"] and train(run, tmp_path)["finished"]


def test_new_weights_for_an_engine_that_failed_say_why_it_failed(started: list[dict[str, Any]]):
    """A rollout that fails in the background is asked for only after the weights of the next step."""

    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("the kernel gave up")

    engine = vllm_engine()
    started[0]["engine"].generate = fails
    for _ in range(2):
        with pytest.raises(EngineError, match="the kernel gave up"):
            engine.generate(FEW, SAMPLING, (0,))
        with pytest.raises(EngineError, match="the kernel gave up"):
            engine.load_weights(dict(tiny()[0].named_parameters()), 1)


def test_an_engine_is_closed_where_what_it_was_made_for_is_refused(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    def refused(*arguments: Any) -> None:
        raise InputError("no such policy")

    monkeypatch.setattr(setup, "make_policy", refused)
    with pytest.raises(InputError, match="no such policy"):
        setup.build(tiny_run(engine="vllm"))
    assert started[0]["shut_down"]


@pytest.mark.parametrize("name", ["fp8", "int8", "bf17"])
def test_a_precision_that_is_not_there_is_refused_by_name(name: str):
    with pytest.raises(InputError, match=rf"rollout_precision='{name}'.*--engine transformers"):
        precision_options(name, torch.device("cpu"))


def test_another_version_is_warned_of(caplog: pytest.LogCaptureFixture):
    for version, warnings in (("0.32.4", 0), ("0.320.0", 1), ("0.33.0", 2)):
        warn_untested(version)
        assert len(caplog.records) == warnings


# The weights


def test_a_checkpoint_has_the_names_that_are_on_disk():
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        moe_intermediate_size=8, intermediate_size=8, num_experts=3, num_experts_per_tok=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    tensors = WeightSync(model).checkpoint(dict(model.named_parameters()))
    up = [tensors[f"model.layers.0.mlp.experts.{i}.up_proj.weight"] for i in range(3)]
    assert torch.equal(torch.stack(up), model.model.layers[0].mlp.experts.gate_up_proj[:, 8:])
    assert "lm_head.weight" not in tensors


def test_buffers_that_a_checkpoint_holds_go_along():
    model, _ = tiny()
    model.model.register_buffer("scale", torch.tensor([3.0]))
    model.model.register_buffer("made_again", torch.tensor([3.0]), persistent=False)
    with pytest.raises(InputError, match=r"lack 'model\.scale'"):
        WeightSync(model).checkpoint(dict(model.named_parameters()))
    tensors = WeightSync(model).checkpoint(dict(named_tensors(model)))
    assert tensors["model.scale"].item() == 3.0 and "model.made_again" not in tensors


class Packed(nn.Module):
    """A layer as vLLM has it on a CPU: it multiplies by a copy of its weight."""

    def __init__(self, weight: nn.Parameter, repacks: bool = True) -> None:
        super().__init__()
        self.weight, self.quant_method = weight, self
        self.repacks = repacks
        self.cpu_linear = weight.detach().clone()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if self.repacks:
            layer.cpu_linear = layer.weight.detach().clone()

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x @ layer.cpu_linear.T


def test_a_tied_head_is_packed_again():
    weight = nn.Parameter(torch.randn(5, 4), requires_grad=False)
    model = nn.ModuleDict({"embedding": Packed(weight), "head": Packed(weight)})
    weight.data.neg_()
    refresh_packed(model)
    assert torch.equal(model["head"].cpu_linear, weight)


def test_a_head_that_stays_stale_is_an_error():
    weight = nn.Parameter(torch.randn(5, 4), requires_grad=False)
    model = nn.ModuleDict({"head": Packed(weight, repacks=False)})
    refresh_packed(model)
    weight.data.neg_()
    with pytest.raises(RuntimeError, match="Packed: its packed weights"):
        refresh_packed(model)


# A server that fails


@pytest.mark.parametrize("fault", ["busy", "too many at once", "slow", pytest.param("garbage", marks=pytest.mark.slow)])
def test_what_passes_is_tried_again(engine: ServerEngine, fake: FakeServer, fault: str, caplog: Any):
    engine._server._limit = server.urllib3.Timeout(connect=1, read=0.5)
    expected = engine.generate(FEW, SAMPLING, (0,))
    asked = len(fake.asked)
    fake.faults.extend([fault, "", fault])
    with caplog.at_level(logging.WARNING):
        again = engine.generate(FEW, SAMPLING, (0,))
    assert [c.sequence.token_ids.tolist() for c in again] == [c.sequence.token_ids.tolist() for c in expected]
    assert len(fake.asked) == asked + len(expected) + 2  # only what had failed
    assert "2 of 6 requests failed" in caplog.text and "attempt 2 of 3" in caplog.text


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no logprobs", "behavior_logp is missing"),
        ("broken", r"behavior_logp\[.*finite"),
        ("abort", "ended it for 'abort'"),
        ("no choice", "not vLLM's"),
    ],
    ids=["missing", "broken", "aborted", "empty"],
)
def test_an_answer_that_cannot_be_used_ends_in_one_line(engine: ServerEngine, fake: FakeServer, fault: str, said: str):
    fake.faults.extend(["", fault])
    with pytest.raises(InputError, match=said):
        engine.generate(FEW, SAMPLING, (0,))


def test_a_dead_server_ends_in_one_line_after_so_many_attempts(engine: ServerEngine, fake: FakeServer, caplog: Any):
    engine.generate(FEW, SAMPLING, (0,))
    fake.stop()
    with caplog.at_level(logging.WARNING), pytest.raises(InputError) as error:
        engine.generate(FEW, SAMPLING, (1,))
    message, port = str(error.value), fake.address.rsplit(":", 1)[1]
    assert (
        fake.address in message
        and f"--port {port}`" in message
        and "drpo serve-rollouts" in message
        and "\n" not in message
    )
    assert len(caplog.records) == QUICK.attempts - 1
    fake.start(int(port))


def test_there_is_no_server(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "smoke", "--engine", "http://127.0.0.1:9"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("drpo: engine=http://127.0.0.1:9") and "drpo serve-rollouts" in error and "\n" not in error


def test_another_program_at_the_address(fake: FakeServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fake, "reply", lambda path, body: (404, b"nothing here"))
    with pytest.raises(InputError, match="status 404: nothing here; start one with `drpo serve-rollouts"):
        ServerEngine(fake.address, tiny(STOPS)[0], patience=QUICK)


def test_a_server_restarted_between_two_rollouts_gets_the_weights_again(engine: ServerEngine, fake: FakeServer):
    new = perturb(tiny(STOPS)[0], 0.2)
    engine.load_weights(dict(new.named_parameters()), version=2)
    engine.generate(FEW, SAMPLING, (0,))
    loads = fake.loads
    fake.restart()
    close_to_distribution(engine.generate(PROBLEMS, SAMPLING, (0,)), new)
    assert fake.loads == loads + 1


def test_answers_drawn_with_other_weights_are_never_used(engine: ServerEngine, fake: FakeServer):
    """Also when only some of a rollout are: the server was restarted in the middle of it."""
    new = perturb(tiny(STOPS)[0], 0.2)
    engine.load_weights(dict(new.named_parameters()), version=2)
    loads = fake.loads
    fake.faults.extend(["", "", "other weights"])
    close_to_distribution(engine.generate(PROBLEMS, SAMPLING, (0,)), new)
    assert fake.loads == loads + 1
    fake.faults.extend(["other weights"] * 100)
    with pytest.raises(InputError, match="another run"):
        engine.generate(FEW, SAMPLING, (0,))


def test_weights_that_could_not_be_sent_are_sent_before_the_next_rollout(engine: ServerEngine, fake: FakeServer):
    new, port = perturb(tiny(STOPS)[0], 0.2), int(fake.address.rsplit(":", 1)[1])
    fake.stop()
    engine.load_weights(dict(new.named_parameters()), version=2)
    fake.start(port)
    completions = engine.generate(FEW, SAMPLING, (0,))
    close_to_distribution(completions, new)
    assert {c.version for c in completions} == {2}


def test_close_removes_the_weights(fake: FakeServer, tmp_path: Path):
    engine = ServerEngine(fake.address, tiny(STOPS)[0], patience=QUICK, folder=tmp_path)
    assert list(tmp_path.rglob("*.safetensors"))
    engine.close()
    assert not list(tmp_path.iterdir())


def test_python_ends_without_waiting_for_requests_under_way(fake: FakeServer):
    """As it does where a run is interrupted at once."""
    fake.faults.append("asleep")
    script = f"""
import os, signal, threading, time, torch
from drpo.rollout import ServerEngine
from drpo.types import Request, Sampling
from support.tiny_world import tiny
engine = ServerEngine({fake.address!r}, tiny()[0], concurrency=1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
try:
    engine.generate([Request(torch.tensor([1]), Sampling(1, 2), frozenset(), key=(0, str(i))) for i in range(3)])
except KeyboardInterrupt:
    engine.close()
    print(time.time())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert time.time() - float(ended.stdout) < 10 and len(fake.asked) == 1


def test_a_list_of_the_most_probable_holds_what_could_not_be_sampled():
    """vLLM's server sends -9999 for minus infinity."""
    pairs = [{"token_id": 3, "logprob": -0.5}, {"token_id": 4, "logprob": -9999.0}]
    choice = {"token_ids": [3], "finish_reason": "stop", "logprobs": {"content": [{**pairs[0], "top_logprobs": pairs}]}}
    assert columns(choice, routes=False)["top"] == [[(3, -0.5), (4, -math.inf)]]


@pytest.mark.parametrize("phase", ["rollout", pytest.param("update", marks=pytest.mark.slow)])
def test_a_server_that_dies_loses_no_finished_step(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "Patience", functools.partial(Patience, *vars(QUICK).values()))
    fake = FakeServer(tiny()[0])
    small = tiny_sampling(samples=2, max_new_tokens=4)
    run = tiny_run(engine=fake.address, steps=4, prompts=2, eval_problems=0, sampling=small)
    made = functools.partial(train, run, tmp_path)

    class Dies:
        """Kills the server in the third step."""

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: None

        def phase(self, name: str) -> None:
            if name == phase and len(done) == 2:
                fake.faults.append("die") if phase == "rollout" else fake.stop()

        def stepped(self, step: int, *others: Any) -> None:
            done.append(step)

    done: list[int] = []
    with pytest.raises(InputError, match="drpo serve-rollouts"):
        made(Dies())
    finished = 2 if phase == "rollout" else 3
    assert done == list(range(1, finished + 1))
    saved = latest(tmp_path / "checkpoints")
    assert saved is not None and saved.name.endswith(str(finished))
    fake.start(int(fake.address.rsplit(":", 1)[1]))
    assert made()["finished"]
    fake.stop()


# drpo serve-rollouts


def test_serve_starts_vllm_with_what_the_trainer_needs(monkeypatch: pytest.MonkeyPatch):
    ran: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "execv", lambda program, line: ran.append(line))
    for name in ("VLLM_SERVER_DEV_MODE", "VLLM_NO_USAGE_STATS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    cli.main(["serve-rollouts", "some/model", "--port", "8123", "--precision", "fp32", "--", "--max-num-seqs", "4"])
    (line,) = ran
    pairs = set(itertools.pairwise(line))
    assert {
        ("--model", "some/model"),
        ("--port", "8123"),
        ("--host", "127.0.0.1"),
        ("--dtype", "float32"),
        ("--generation-config", "vllm"),
        ("--logprobs-mode", "processed_logprobs"),
        ("--max-logprobs", "-1"),
        ("--worker-extension-cls", "drpo.rollout.vllm_patches.WeightLoader"),
        ("--max-num-seqs", "4"),
    } <= pairs
    assert "--enable-scale-out" in line and os.environ["VLLM_SERVER_DEV_MODE"] == "1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a model"),
        (["--port", "1"], "name a model"),
        (["o/m", "--prot", "1"], "did you mean '--port'"),
        (["tiny"], "model='tiny'"),
        (["o/m", "--precision", "int8"], "rollout_precision='int8'"),
    ],
)
def test_serve_refuses_in_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "execv", lambda program, line: pytest.fail("it started"))
    for name in ("VLLM_SERVER_DEV_MODE", "VLLM_NO_USAGE_STATS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    assert cli.main(["serve-rollouts", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_serve_without_vllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["serve-rollouts", "o/m"]) == 2
    assert "docs/vllm.md" in capsys.readouterr().err


def test_further_options_win():
    line = command("m", ServeRolloutsOptions(), ["--max-logprobs", "5"])
    assert line[-8:-6] == ["--max-logprobs", "5"]


# Who may ask whom


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("endless", r"more than 1,0\d\d,\d\d\d bytes"),
        ("too many", r"sent \d+ tokens of at most 5"),
        ("no token", "as a token"),
        ("huge number", "not vLLM's"),
        ("ragged", "sent fewer top log-probabilities than the 2 of each token asked for"),
        ("elsewhere", "refused /inference/v1/generate with status 307"),
    ],
)
def test_an_answer_that_cannot_be_is_refused_in_a_line(fake: FakeServer, engine: ServerEngine, fault: str, said: str):
    fake.faults.append(fault)
    with pytest.raises(InputError, match=said) as caught:
        engine.generate(FEW, replace(SAMPLING, top_logprobs=2), (0,))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


HEAD = b"HTTP/1.1 200 OK\r\n"
DRIPS = {
    "a head without end": (HEAD, b"X-More: 1\r\n"),
    "a line without end": (HEAD + b"X-More: ", b"1"),
    "announcements of an answer": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "lines behind the body": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"X-More: 1\r\n"),
    "a body without end": (HEAD + b"Content-Length: 1000\r\n\r\n", b"1"),
}


@pytest.mark.parametrize("drip", DRIPS)
def test_an_answer_that_drips_ends_in_time(drip: str):
    first, more = DRIPS[drip]
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            line, _ = listening.accept()
            with line, suppress(OSError):  # until the other side has had enough
                line.recv(2**16)
                line.sendall(first)
                for _ in range(150):
                    time.sleep(0.02)
                    line.sendall(more)

        thread = threading.Thread(target=answer)
        thread.start()
        began = time.monotonic()
        with pytest.raises(server.UnreachableError, match="within the time limit"):
            server.Server(f"http://127.0.0.1:{listening.getsockname()[1]}", 0.2, 1, "m").dtype()
        assert time.monotonic() - began < 2.0
        thread.join()


def test_an_answer_nested_too_deeply_is_asked_for_again(fake: FakeServer, engine: ServerEngine):
    fake.faults.append("deep")
    assert len(engine.generate(FEW, SAMPLING, (0,))) == 6


def test_a_server_is_sent_the_token_and_the_password_of_the_environment(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    fake.token = "secret"
    with pytest.raises(InputError, match=r"401.*DRPO_SERVER_TOKEN"):
        ServerEngine(fake.address, tiny(STOPS)[0], patience=QUICK)
    monkeypatch.setenv(TOKEN, "secret")
    monkeypatch.setenv(AUTH, "me:pa ss")
    engine = ServerEngine(fake.address, tiny(STOPS)[0], patience=QUICK)
    engine.close()
    assert fake.headers[-1]["authorization"] == "Basic bWU6cGEgc3M="
    monkeypatch.setenv(TOKEN, "two\nlines")
    with pytest.raises(InputError, match=TOKEN):
        ServerEngine(fake.address, tiny(STOPS)[0], patience=QUICK)


def test_what_a_server_echoes_of_a_request_is_quoted_without_its_secrets(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(TOKEN, "to ken")
    monkeypatch.setenv(AUTH, "me:pa ss")
    engine = Prompted(ServerEngine(fake.address, tiny(STOPS)[0], patience=QUICK), *tiny(STOPS))
    fake.faults.append("echo")
    with pytest.raises(InputError, match=r'403: .*"authorization": "Basic \*\*\*"') as caught:
        engine.generate(FEW, SAMPLING, (0,))
    assert "to ken" not in str(caught.value) and "bWU6cGEgc3M=" not in str(caught.value)
    assert without_secrets("of me:pa ss, whose pa ss") == "of ***, whose ***"
    engine.close()


def asked(path: str, token: str | None, body: Any = None, kind: str = "http") -> tuple[int, list[str]]:
    """What the gate answers (200 where it lets pass), and the bodies that came through."""
    passed: list[str] = []
    sent: list[Any] = []
    pieces = iter([json.dumps(body).encode()] if body is not None else [])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append((await receive())["body"].decode() if kind == "http" else "")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": next(pieces, b""), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if token is None else [(b"drpo-token", token.encode())]
    asyncio.run(Gate(app)({"type": kind, "path": path, "headers": headers}, receive, send))
    return (sent[0].get("status", 0) if sent else 200), passed


@pytest.mark.parametrize(
    ("path", "token", "body", "status"),
    [
        ("/collective_rpc", "right", {"method": "drpo_dtype", "args": []}, 200),
        ("/collective_rpc", "right", {"method": "drpo_load_file", "args": ["x"]}, 200),
        ("/collective_rpc", "right", {"method": "save_sharded_state", "args": ["/root"]}, 403),
        ("/collective_rpc", "right", {"method": ["drpo_dtype"]}, 403),
        ("/collective_rpc", "right", ["drpo_dtype"], 403),
        ("/collective_rpc", "right", {"method": "drpo_dtype", "args": ["x" * 2**17]}, 403),
        ("/collective_rpc", None, {"method": "drpo_dtype"}, 401),
        ("/collective_rpc", "wrong", {"method": "drpo_dtype"}, 401),
        ("/collective_rpc/", "right", {"method": "save_sharded_state"}, 403),
        ("/inference/v1/generate", "right", {}, 200),
        ("/inference/v1/generate", None, {}, 401),
        ("/update_weight_version", "righ", {}, 401),
        ("/server_info", "right", {}, 403),
        ("/v1/completions", None, {}, 401),
        ("/health", None, {}, 200),
    ],
)
def test_the_gate_lets_in_who_knows_the_token_to_what_drpo_calls(
    path: str, token: str | None, body: Any, status: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(TOKEN, "right")
    found, passed = asked(path, token, body)
    assert found == status and passed == ([json.dumps(body)] if status == 200 else [])


def test_the_gate_has_no_door_for_websockets_and_none_without_a_token(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(TOKEN, "right")
    assert asked("/v1/realtime", None, kind="websocket")[1] == asked("/v1/realtime", "right", kind="websocket")[1] == []
    for nothing in ("", None):
        monkeypatch.delenv(TOKEN, raising=False) if nothing is None else monkeypatch.setenv(TOKEN, nothing)
        with pytest.raises(KeyError, match=TOKEN):
            asked("/health", None)


def test_everything_that_the_client_calls_is_let_through(fake: FakeServer, monkeypatch: pytest.MonkeyPatch):
    called: list[tuple[str, Any]] = []
    reply = fake.reply
    monkeypatch.setattr(fake, "reply", lambda path, body: called.append((path, body)) or reply(path, body))
    engine = Prompted(ServerEngine(fake.address, tiny(STOPS)[0], patience=QUICK), *tiny(STOPS))
    engine.generate(FEW, SAMPLING, (0,))
    engine.close()
    assert {path.partition("?")[0] for path, _ in called} == CALLS
    assert {body["method"] for path, body in called if path == RPC} == METHODS


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_a_server_listens_on_this_machine_alone(host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it would have begun"))
    line = refused(["serve-rollouts", "smollm2-135m", "--host", host])
    assert f"--host {host}" in line and "ssh -N -L 8000" in line


def server_line(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, token: str = "") -> list[str]:
    """The command line of vLLM's server that `drpo serve-rollouts` starts."""
    lines: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "execv", lambda path, line: lines.append(line))
    for name in (TOKEN, "VLLM_SERVER_DEV_MODE", "VLLM_NO_USAGE_STATS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, token if name == TOKEN else "")
    cli.main(["serve-rollouts", "org/model", *arguments])
    return lines[0]


@pytest.mark.parametrize("port", ["70000", "65536", "0", "-1"])
def test_a_port_that_is_none_is_refused(port: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it would have begun"))
    assert "must be from 1 to 65535" in refused(["serve-rollouts", "smollm2-135m", f"--port={port}"])


def test_the_address_of_a_server_has_brackets_where_it_is_of_ipv6(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    line = server_line(["--host", "::1", "--port", "8001"], monkeypatch)
    assert line[line.index("--host") + 1] == "::1"
    assert "--engine 'http://[::1]:8001'" in capsys.readouterr().out


def test_a_token_is_kept_as_it_is_sent(monkeypatch: pytest.MonkeyPatch):
    """Without the blanks around it, which no header keeps."""
    assert server_line([], monkeypatch, " spaced ") and os.environ[TOKEN] == "spaced"


def test_a_server_has_a_token_that_no_list_of_processes_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    line = server_line(["--", "--host", "0.0.0.0", "--middleware", "mine.Own"], monkeypatch)
    token = os.environ[TOKEN]
    assert len(token) >= 32 and capsys.readouterr().out.count(token) == 1
    assert token not in " ".join(line)
    assert line[-6:] == ["--host", "127.0.0.1", "--port", "8000", "--middleware", "drpo.rollout.gate.Gate"]
    cli.main(["serve-rollouts", "org/model"])
    assert os.environ[TOKEN] == token and token not in capsys.readouterr().out  # one that is given is not printed


def test_a_class_that_vllm_changes_is_restored_and_its_twin_stays_changed():
    class Base:
        def __init__(self) -> None:
            self.made = "plain"

    class Decoder(Base):
        word = "plain"

        def __call__(self) -> str:
            return f"{self.word}, {self.made}"

    class Compiled:
        pass

    before, changed = Decoder(), Changed.to_be(Decoder)
    Decoder.__bases__ += (Compiled,)
    Decoder.__call__, Decoder.word, Decoder.added = lambda self: "compiled", "changed", 1  # type: ignore[attr-defined]
    instance, twin = Decoder(), changed.twin()
    instance.__class__ = twin
    changed.undo()
    assert (before(), Decoder()(), Decoder.__bases__) == ("plain, plain", "plain, plain", (Base,))
    assert not hasattr(Decoder, "added") and not changed.given()
    assert instance() == "compiled" and isinstance(instance, (Decoder, Compiled)) and instance.word == "changed"
