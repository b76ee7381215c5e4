"""vLLM itself, on this machine: the distribution, the weights, the seeds, and a server. Run by `make test-vllm`.

Not covered: GPUs (sleeping, fp8, several of them, an engine in each of several processes), models beside Llama's
family and a mixture of experts.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from drpo import doctor
from drpo.errors import InputError
from drpo.model import loading
from drpo.model.names import SMOLLM2
from drpo.model.policy import Policy
from drpo.model.precision import FP32
from drpo.recipes.addition import smoke
from drpo.rollout import EpisodeDriver, ServerEngine, VLLMEngine, encode_prompt
from drpo.rollout.server import Patience
from drpo.rollout.vllm_request import parameters
from drpo.tasks import Addition
from drpo.train.config import Run, configure
from drpo.train.loop import train
from drpo.train.records import METRICS, ROLLOUTS, read_records
from drpo.train.setup import Components, build
from drpo.types import Episode, Generation, Problem, Request, Sampling
from support.families import build as build_family
from support.mixtures import chosen, for_vllm
from support.processes import assert_nearly_same_run, launch
from support.rank import run_of
from support.rollouts import Prompted
from support.tiny_world import STOPS, distribution, own_logp, perturb, small

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it in .venv-vllm")
HAS_TRITON = pytest.importorskip("vllm.triton_utils", reason="as above").HAS_TRITON
pytestmark = pytest.mark.vllm

SAMPLING = Sampling(samples=4, max_new_tokens=24)
# Longer than a block of vLLM's cache on a CPU (128 tokens), so that the cache holds the first of them.
LONG = tuple(Problem.of_text(f"p{i}", "What is 7 + 5? " * 10 + "1" * i, "") for i in range(4))
SERVER_UP_S = 300


def distance(completions: Sequence[Episode], model: PreTrainedModel, temperature: float = 1.0) -> torch.Tensor:
    """|log mu - log pi| of every token, pi by a plain forward pass in float32."""
    return torch.cat([(c.sequence.behavior_logp - own_logp(model, c, temperature)).abs() for c in completions])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def either_head(request: pytest.FixtureRequest) -> Iterator[tuple[VLLMEngine, bool]]:
    engine = Prompted(VLLMEngine(small(request.param)[0], precision="fp32"), *small(request.param))
    yield engine, request.param
    engine.close()


@pytest.fixture
def engine(either_head: tuple[VLLMEngine, bool]) -> VLLMEngine:
    """With the weights that it had at first."""
    engine, tied = either_head
    engine.load_weights(dict(small(tied)[0].named_parameters()), version=0)
    return engine


@pytest.fixture
def model(either_head: tuple[VLLMEngine, bool]) -> PreTrainedModel:
    return small(either_head[1])[0]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_log_probabilities_are_those_of_the_distribution(
    engine: VLLMEngine, model: PreTrainedModel, temperature: float
):
    """All tokens may be drawn, whatever the generation config says, and a plain forward pass gives the same."""
    completions = engine.generate(LONG, Sampling(samples=8, max_new_tokens=24, temperature=temperature), (0, 1))
    assert distance(completions, model, temperature).max() < 2e-4
    ranks = torch.cat(
        [(distribution(model, c, temperature) > c.sequence.behavior_logp[:, None]).sum(-1) for c in completions]
    )
    assert temperature < 1 or ranks.max() > 20


def test_all_that_decides_what_is_drawn_is_sent():
    """A parameter that a new version of vLLM adds must be looked at."""
    harmless = {
        "flat_logprobs", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
        "output_kind", "stream_interval", "skip_clone", "output_text_buffer_length", "extra_args", "watermarking",
        "prompt_logprob_token_ids", "prompt_logprob_start", "logprob_token_ids", "skip_reading_prefix_cache",
        "thinking_token_budget", "repetition_detection", "routed_experts_prompt_start", "trace_decode_token_ids",
    }  # fmt: skip
    known = {name for name in vllm.SamplingParams.__annotations__ if not name.startswith("_")}
    assert known - harmless == set(parameters(Request(torch.tensor([1]), SAMPLING, frozenset({0}), (0,))))


def test_the_first_stop_token_ends_and_is_kept(engine: VLLMEngine):
    completions = engine.generate(LONG, Sampling(samples=16, max_new_tokens=12), (0,))
    for c in completions:
        ended = [int(t) in STOPS for t in c.sequence.token_ids]
        assert not any(ended[:-1]) and c.finish_reason == ("stop" if ended[-1] else "length")
        assert ended[-1] or len(c.sequence.token_ids) == 12
    assert {c.finish_reason for c in completions} == {"stop", "length"}


def test_the_same_seed_draws_the_same(engine: VLLMEngine):
    first, again, other = (engine.generate(LONG, SAMPLING, seed) for seed in [(0, 1), (0, 1), (0, 2)])
    assert [c.sequence.token_ids.tolist() for c in first] == [c.sequence.token_ids.tolist() for c in again]
    assert [c.sequence.token_ids.tolist() for c in first] != [c.sequence.token_ids.tolist() for c in other]
    assert len({tuple(c.sequence.token_ids.tolist()) for c in first}) == len(first)


@pytest.mark.parametrize("k", [1, 5, 257])
def test_the_most_probable_tokens_are_those_of_the_distribution(engine: VLLMEngine, model: PreTrainedModel, k: int):
    for c in engine.generate(LONG, Sampling(samples=2, max_new_tokens=6, temperature=1.5, top_logprobs=k), (0,)):
        full = distribution(model, c, 1.5)
        assert c.sequence.top_logprobs is not None and c.sequence.top_logprobs.ids.shape == (
            len(c.sequence.token_ids),
            k,
        )
        assert torch.allclose(c.sequence.top_logprobs.logp, full.gather(-1, c.sequence.top_logprobs.ids), atol=2e-4)
        assert torch.allclose(c.sequence.top_logprobs.logp, full.topk(k).values, atol=2e-4)


def test_greedy_takes_the_most_probable(engine: VLLMEngine, model: PreTrainedModel):
    for c in engine.generate(LONG, Sampling(samples=1, max_new_tokens=8, temperature=0), (0,)):
        assert torch.equal(distribution(model, c, 1.0).argmax(-1), c.sequence.token_ids)


def test_a_truncated_distribution_is_renormalised(engine: VLLMEngine, model: PreTrainedModel):
    completions = engine.generate(LONG, Sampling(samples=4, max_new_tokens=8, top_k=5), (0,))
    for c in completions:
        kept = distribution(model, c, 1.0).topk(5)
        assert (kept.indices == c.sequence.token_ids[:, None]).any(-1).all()
        assert torch.allclose(c.sequence.behavior_logp, own_logp(model, c, 1.0) - kept.values.logsumexp(-1), atol=2e-4)


def test_many_long_prompts_at_once(engine: VLLMEngine, model: PreTrainedModel):
    """More tokens than go through vLLM at a time, none of them cached: a seeded prompt must not be read in parts."""
    problems = [Problem.of_text(str(i), f"{i:03d} " * 40, "") for i in range(64)]
    completions = engine.generate(problems, Sampling(samples=1, max_new_tokens=2), (0,))
    assert distance(completions, model).max() < 2e-4


def test_sync_canary(engine: VLLMEngine, model: PreTrainedModel):
    """Large changes with a warm cache and shared prompts, twice: the new weights sample, the head's too."""
    for version, seed in ((1, 3), (2, 4)):
        engine.generate(LONG, SAMPLING, (0,))
        old = {n: p.clone() for n, p in model.named_parameters()}
        engine.load_weights(dict(perturb(model, 0.2, seed).named_parameters()), version)
        completions = engine.generate(LONG, SAMPLING, (version,))
        assert distance(completions, model).max() < 2e-4
        assert {c.version for c in completions} == {version}
        with torch.no_grad():
            new = {n: p.clone() for n, p in model.named_parameters()}
            for n, p in model.named_parameters():
                p.copy_(old[n])
            assert distance(completions, model).mean() > 0.1
            for n, p in model.named_parameters():
                p.copy_(new[n])


def test_the_cache_is_warm_where_the_canary_sings(engine: VLLMEngine):
    """What the canary rests on: without a new load the prompts come from the cache."""
    engine.generate(LONG, SAMPLING, (0,))
    prompt = encode_prompt(small()[1], LONG[0]).tolist()
    how = vllm.SamplingParams(max_tokens=1)
    (output,) = engine._llm.generate([{"prompt_token_ids": prompt}], how, use_tqdm=False)
    assert output.num_cached_tokens >= 128


class SkipsPacking(VLLMEngine):
    """Weights are loaded, and what vLLM leaves stale stays stale."""

    def load_weights(self, state: Mapping[str, torch.Tensor], version: int) -> None:
        weights = list(self._weight_sync.checkpoint(state).items())
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._llm.reset_prefix_cache()
        self.version = version


class KeepsCache(VLLMEngine):
    """The prefix cache is not reset."""

    def load_weights(self, state: Mapping[str, torch.Tensor], version: int) -> None:
        self._llm.collective_rpc("drpo_load", args=(list(self._weight_sync.checkpoint(state).items()),))
        self.version = version


class Inherits(VLLMEngine):
    """What is not said is taken from the model's generation config, which says top-k 20."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        return super().generate(
            [replace(r, sampling=replace(r.sampling, top_k=r.sampling.top_k or 20)) for r in requests]
        )


class Nucleus(VLLMEngine):
    """Top-p 0.9."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        return super().generate([replace(r, sampling=replace(r.sampling, top_p=0.9)) for r in requests])


FAULTS = {
    VLLMEngine: (None, ""),
    SkipsPacking: ("sync", "a part of them is stale"),
    KeepsCache: ("sync", "reset its prefix cache"),
    Inherits: ("support", "top-k 20"),
    Nucleus: ("support", "as by top-p 0."),
}


@pytest.fixture(scope="module")
def examined() -> Iterator[tuple[Run, Components, VLLMEngine]]:
    """A run of the small model, whose prompts are long enough for the cache to have blocks of them."""
    run = configure(smoke(), sampling=Sampling(samples=8, max_new_tokens=24), precision="fp32")
    model, tokenizer = small()
    components = build(run)
    policy = Policy(model, precision=FP32, temperature=1.0)
    engine = VLLMEngine(model, precision="fp32")
    driver = EpisodeDriver.of(engine, model, tokenizer)
    yield run, replace(components, policy=policy, tokenizer=tokenizer, driver=driver), engine
    engine.close()


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_the_doctor_finds_what_vllm_can_do_wrong(kind: type[VLLMEngine], examined: tuple[Run, Components, VLLMEngine]):
    run, components, engine = examined
    engine.__class__ = kind
    many = replace(doctor.QUICK, samples=16)  # most end early
    found = doctor.examine(run, components, many)
    broken = {f.check: f.advice for f in found if f.verdict == "broken"}
    check, said = FAULTS[kind]
    if check is None:
        assert broken == {}
    else:
        assert said in broken[check], broken


@pytest.mark.parametrize("routes", [False, True])
def test_a_mixture_samples_right_and_reports_its_experts(routes: bool):
    """Before and after new weights, read and from the cache; a row of the dense first layer is left out."""
    model = for_vllm()
    if routes and not HAS_TRITON:
        with pytest.raises(InputError, match=r"cannot run the model and report its experts here \(.*Model Runner V2"):
            VLLMEngine(model, precision="fp32", routes=True)
        pytest.skip("vLLM reports experts with Triton alone; its CPU backend is not installed here")
    engine = Prompted(VLLMEngine(model, precision="fp32", routes=routes), model)
    for version in range(2):
        if version:
            engine.load_weights(dict(perturb(model, 0.1).named_parameters()), version)
        for _ in range(2):
            completions = engine.generate(LONG, SAMPLING, (version,))
            assert distance(completions, model).max() < 2e-4
            for c in completions:
                found = c.sequence.routes
                assert (found is not None) == routes
                if found is not None:
                    expected = chosen(model, torch.cat([c.sequence.prompt_ids, c.sequence.token_ids]))
                    reported = torch.cat([found.prompt, found.tokens])
                    assert torch.equal(reported[:-1].sort(-1).values, expected[:-1].sort(-1).values)
    engine.close()


@pytest.mark.parametrize("family", ["arcee", "falcon_h1"])
def test_a_model_stays_transformers_own_beside_vllms(family: str):
    """arcee: vLLM runs it by transformers' modules, whose class it changes; falcon_h1: with recurrent states."""

    def parts(cls: type) -> tuple[object, ...]:
        return cls.__bases__, vars(cls).get("__init__"), vars(cls).get("__call__")

    model = build_family(family, wider=True)
    kinds = {type(m): parts(type(m)) for m in model.modules()}
    for _ in range(2):  # a second engine finds the classes as the first did
        engine = Prompted(VLLMEngine(model, precision="fp32"), model)
        completions = engine.generate(LONG, SAMPLING, (0,))
        assert distance(completions, model).max() < 2e-4
        assert {kind: parts(kind) for kind in kinds} == kinds
        engine.close()


def test_a_model_that_vllm_cannot_run_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"engine='vllm': vLLM cannot run LlamaForCausalLM here \(.*head_dim=8"):
        VLLMEngine(loading.tiny()[0])


@pytest.fixture(scope="module")
def smollm() -> Iterator[tuple[VLLMEngine, PreTrainedModel]]:
    model, tokenizer = loading.load(SMOLLM2)
    engine = Prompted(VLLMEngine(model), model, tokenizer)
    yield engine, model
    engine.close()


@pytest.mark.slow
def test_smollm2_in_its_own_precision_stays_near_the_plain_model(smollm: tuple[VLLMEngine, PreTrainedModel]):
    """In bf16 (where the processor has it): no bias in the ratio, little divergence, also after a large change."""
    engine, model = smollm
    problems = Addition(1, 50).sample(8, step=0, seed=0)
    for version in (0, 1):
        if version:
            engine.load_weights(dict(perturb(model, 0.01).named_parameters()), version)
        completions = engine.generate(problems, Sampling(samples=8, max_new_tokens=32), (0, version))
        mu = torch.cat([c.sequence.behavior_logp for c in completions])
        pi = torch.cat([own_logp(model, c, 1.0) for c in completions])
        ratio = (pi - mu).exp()
        assert abs(ratio.mean() - 1) < 0.01
        assert (ratio - 1 - (pi - mu)).mean() < 0.005  # k3
        assert (pi.exp() - mu.exp()).abs().quantile(0.99) < 0.05


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(run_of("vllm"), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "stop"), [("none", 0), ("fsdp", 4)])
def test_two_processes_with_an_engine_each_are_one_run(shard: str, stop: int, alone: Path, tmp_path: Path):
    """In float32, where no rounding changed a draw: tokens, metrics, evaluations and weights, also after a resume."""
    folder = tmp_path / "run"
    if stop:
        launch(2, folder, "vllm", shard, stop)
        assert len(read_records(folder / METRICS)) == stop
    launch(2, folder, "vllm", shard)
    assert_nearly_same_run(alone, folder)
    # Each step's sampler has the weights that the step begins with.
    assert all(r["version"] == r["step"] - 1 for r in read_records(folder / ROLLOUTS))
    shifts = [
        r["updates"][0].get("prob_diff_p99") for r in read_records(folder / METRICS)
    ]  # None where nothing is trained
    assert len([s for s in shifts if s is not None]) >= 5 and max(s or 0.0 for s in shifts) < 1e-5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, "Serve"]]:
    folder = tmp_path_factory.mktemp("served")
    model, tokenizer = small()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        serve = Serve(folder, free.getsockname()[1])
    serve.start()
    yield serve.address, serve
    serve.stop()


class Serve:
    """`drpo serve-rollouts` in a process of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self._folder, self._port = folder, port
        os.environ["DRPO_SERVER_TOKEN"] = "of-the-tests"  # for both sides

    def start(self) -> None:
        command = [sys.executable, "-m", "drpo", "serve-rollouts", str(self._folder), "--port", str(self._port)]
        with (self._folder / "log.txt").open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--precision", "fp32"], stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + SERVER_UP_S
        while not self._healthy():
            said = (self._folder / "log.txt").read_text()[-3000:]
            assert self._process.poll() is None and time.monotonic() < deadline, said
            time.sleep(1)

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.mark.slow
def test_a_server_does_as_the_engine_in_process(server: tuple[str, Serve]):
    """Distribution, seeds, top tokens, new weights; then it is killed and comes back with its first weights."""
    address, process = server
    model, tokenizer = small()
    engine = Prompted(ServerEngine(address, model, patience=Patience(60, 3, 0.1)), model, tokenizer)
    completions = engine.generate(LONG, SAMPLING, (0, 1))
    assert distance(completions, model).max() < 2e-4
    again = engine.generate(LONG, SAMPLING, (0, 1))
    assert [c.sequence.token_ids.tolist() for c in completions] == [c.sequence.token_ids.tolist() for c in again]
    for k in (3, 257):
        for c in engine.generate(LONG[:1], Sampling(samples=2, max_new_tokens=6, top_logprobs=k), (0,)):
            assert c.sequence.top_logprobs is not None and torch.allclose(
                c.sequence.top_logprobs.logp, distribution(model, c, 1.0).topk(k).values, atol=2e-4
            )
    old, _ = small()
    engine.load_weights(dict(perturb(model, 0.2).named_parameters()), version=1)
    for seed in range(2):
        completions = engine.generate(LONG, SAMPLING, (0, seed))
        assert distance(completions, model).max() < 2e-4 and distance(completions, old).mean() > 0.1
        if not seed:
            process.stop()
            with pytest.raises(InputError, match="drpo serve-rollouts"):
                engine.generate(LONG, SAMPLING, (0, 0))
            process.start()
    engine.close()
