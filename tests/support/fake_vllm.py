"""A stand-in for vLLM, in process and as a server: it draws from a real model, caches prompts, and fails on demand."""

import base64
import copy
import io
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from drpo.model.quantize import stacked_experts
from drpo.model.routing import RouteRecorder, experts_by_layer


@dataclass(frozen=True)
class FakeRequestOutput:
    token_ids: list[int]
    rows: list[list[tuple[int, float]]]  # of each place: the sampled token, then the most probable
    finish: str
    cached: int  # tokens of the prompt
    chosen: np.ndarray | None = None  # [tokens read, layers, k]: a mixture's experts


BLOCK = 4
"""Tokens that are cached together, or not at all."""


class Sampler:
    """Draws as vLLM does, from a model of its own; keys of a text that it has seen are those of the weights then."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._initial = model
        self.restart()

    def restart(self) -> None:
        self.model = copy.deepcopy(self._initial)
        self.label = "default"
        self.forget()

    def forget(self) -> None:
        self._seen: dict[tuple[int, ...], PreTrainedModel] = {}
        self._known: dict[tuple[PreTrainedModel, tuple[int, ...]], Tensor] = {}

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        model, checkpoint = copy.deepcopy(self.model), dict(weights)
        if any(stacked_experts(model)):  # its experts are single in a checkpoint
            loaded = type(model).from_pretrained(None, config=model.config, state_dict=checkpoint)
            checkpoint = loaded.state_dict()
        missing, unexpected = model.load_state_dict(checkpoint, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        self.model = model

    @torch.no_grad()
    def draw(self, prompt: list[int], how: Mapping[str, Any], routes: bool = False) -> FakeRequestOutput:
        seen = max((text for text in self._seen if tuple(prompt[: len(text)]) == text), key=len, default=())
        model = self._seen.get(seen, self.model)
        cached = min(len(seen), len(prompt) - 1) // BLOCK * BLOCK
        generator = torch.Generator().manual_seed(how["seed"])
        ids: list[int] = []
        rows: list[list[tuple[int, float]]] = []
        while len(ids) < how["max_tokens"] and (not ids or ids[-1] not in how["stop_token_ids"]):
            logp = torch.log_softmax(self._logits(model, (*prompt, *ids)) / (how["temperature"] or 1.0), -1)
            token = int(torch.multinomial(logp.exp(), 1, generator=generator) if how["temperature"] else logp.argmax())
            top = logp.topk(how["logprobs"])
            ids.append(token)
            rows.append([(token, float(logp[token])), *zip(top.indices.tolist(), top.values.tolist(), strict=True)])
        self._seen |= {tuple(prompt): model, tuple(prompt + ids[:-1]): model}
        chosen = reported_routes(model, prompt + ids[:-1]) if routes else None
        return FakeRequestOutput(ids, rows, "stop" if ids[-1] in how["stop_token_ids"] else "length", cached, chosen)

    def _logits(self, model: PreTrainedModel, text: tuple[int, ...]) -> Tensor:
        """[V] after a text, which tests draw from again and again."""
        if (model, text) not in self._known:
            logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            self._known[model, text] = logits.float()
        return self._known[model, text]


def reported_routes(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """As vLLM reports them: a row for each layer, of zeros where there are no experts."""
    recorder = RouteRecorder(model)
    with recorder.listening():
        model(input_ids=torch.tensor([ids]), use_cache=False)
        chosen = recorder.take(1)[0].numpy()
    table = np.zeros((len(ids), model.config.num_hidden_layers, chosen.shape[-1]), np.uint8)
    table[:, list(experts_by_layer(model))] = chosen
    return table


class EngineArgs:
    """The defaults of vLLM's that are asked for."""

    enable_return_routed_experts = False


def fake_module(sampler: Sampler, started: list[dict[str, Any]], version: str = "0.32.0") -> Any:
    """What `import vllm` gives: enough of it for `VLLMEngine`; `started` receives the options of every engine."""

    class LLM:
        def __init__(self, **options: Any) -> None:
            started.append({**options, "place": (os.environ.get("RANK"), os.environ.get("LOCAL_RANK"))})
            engine_core = SimpleNamespace(shutdown=shutdown)
            self.llm_engine = SimpleNamespace(engine_core=engine_core, model_config=SimpleNamespace(max_model_len=128))
            self.asked: list[Mapping[str, Any]] = []
            started[-1].update(engine=self, asleep=False)

        def collective_rpc(self, method: str, args: tuple[Any, ...]) -> None:
            assert not started[-1]["asleep"]
            {"drpo_load": sampler.load, "drpo_own_classes": list}[method](args[0])

        def reset_prefix_cache(self) -> bool:
            sampler.forget()
            return True

        def sleep(self, level: int) -> None:
            started[-1]["asleep"] = True

        def wake_up(self) -> None:
            started[-1]["asleep"] = False

        def generate(self, prompts: list[Any], how: list[Any], use_tqdm: bool) -> list[Any]:
            assert not started[-1]["asleep"]
            self.asked = [vars(h) for h in how]
            return [self._output(p["prompt_token_ids"], vars(h)) for p, h in zip(prompts, how, strict=True)]

        def _output(self, prompt: list[int], how: Mapping[str, Any]) -> Any:
            drawn = sampler.draw(prompt, how, routes=started[-1].get("enable_return_routed_experts", False))
            ends = [sum(map(len, drawn.rows[: i + 1])) for i in range(len(drawn.rows))]
            flat = [pair for row in drawn.rows for pair in row]
            found = SimpleNamespace(
                start_indices=[0, *ends[:-1]],
                end_indices=ends,
                token_ids=[token for token, _ in flat],
                logprobs=[logp for _, logp in flat],
            )
            output = SimpleNamespace(
                token_ids=drawn.token_ids, logprobs=found, finish_reason=drawn.finish, routed_experts=drawn.chosen
            )
            return SimpleNamespace(outputs=[output], num_cached_tokens=drawn.cached)

    def destroy() -> None:
        """Destroys a group of vLLM's, and then torch's default one."""
        if dist.is_initialized():
            dist.destroy_process_group("vLLM's own")
            dist.destroy_process_group()

    def shutdown() -> None:
        started[-1].update(shut_down=True)
        cleanup()

    def cleanup() -> None:
        state.destroy_distributed_environment()

    state = SimpleNamespace(destroy_distributed_environment=destroy)
    distributed = SimpleNamespace(parallel_state=state, cleanup_dist_env_and_memory=cleanup)
    decorators = SimpleNamespace(_support_torch_compile=None)  # no class is changed
    return SimpleNamespace(
        LLM=LLM,
        SamplingParams=SimpleNamespace,
        EngineArgs=EngineArgs,
        __version__=version,
        distributed=distributed,
        compilation=SimpleNamespace(decorators=decorators),
    )


ANSWERS: Mapping[str, tuple[int, bytes]] = {
    "die": (0, b""),
    "busy": (503, b"busy"),
    "too many at once": (429, b"later"),
    "garbage": (200, b"<html>"),
    "elsewhere": (307, b"http://127.0.0.1:9/"),
    "endless": (200, b" " * 2**22),
    "deep": (200, b"[" * 100_000),
}
"""Fault -> status and body that know nothing of the request."""

SLEEPS = {"slow": 3.0, "asleep": 30.0}
"""Fault -> seconds before the answer."""


class FakeServer:
    """A server on loopback that answers as vLLM's does, while `faults` has nothing else for it to do.

    Args:
        model: what it samples from at first.
        routes: whether it was started with `--enable-return-routed-experts`.
    """

    def __init__(self, model: PreTrainedModel, routes: bool = False) -> None:
        self.sampler, self.routes = Sampler(model), routes
        self.faults: deque[str] = deque()  # one for each of the next answers to a drawing
        self.asked: list[dict[str, Any]] = []
        self.loads = 0
        self.headers: list[dict[str, str]] = []  # of every request
        self.token: str | None = None  # that it asks for, if any
        self._lock = threading.Lock()
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self, port: int = 0) -> None:
        """Come up, with the weights that it had at first."""
        self.sampler.restart()
        self._stopped = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._http.daemon_threads = False  # `stop` waits for them: Python must not end while one computes
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def restart(self) -> None:
        self.stop()
        self.start(self._port)

    def stop(self) -> None:
        """Go away, once what is computed is done."""
        self._stopped.set()
        self._http.shutdown()
        self._http.server_close()

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        routes: dict[str, Callable[[dict[str, Any]], Any]] = {
            "/collective_rpc": self._rpc,
            "/reset_prefix_cache?reset_running_requests=true": lambda _: self.sampler.forget() or {"success": True},
            "/update_weight_version": self._label,
            "/inference/v1/generate": self._generate,
        }
        if path not in routes:
            return 404, b'{"detail":"Not Found"}'
        said = routes[path](body)
        return said if isinstance(said, tuple) else (200, json.dumps(said).encode())

    def _rpc(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["method"] == "drpo_dtype":
            return {"results": [{"dtype": "float32"}]}
        assert body["method"] == "drpo_load_file"
        self.loads += 1
        self.sampler.load(load_file(body["args"][0]).items())
        return {"results": [None]}

    def _label(self, body: dict[str, Any]) -> dict[str, Any]:
        self.sampler.label = body["new_version"]
        return {"success": True}

    def _generate(self, body: dict[str, Any]) -> Any:
        with self._lock:
            self.asked.append(body)
            fault = self.faults.popleft() if self.faults else ""
            how = body["sampling_params"]
            drawn = self.sampler.draw(body["token_ids"], how, self.routes)
        if fault in ANSWERS:
            return ANSWERS[fault]
        if fault == "echo":
            return 403, json.dumps({n: self.headers[-1].get(n) for n in ("drpo-token", "authorization")}).encode()
        if fault in SLEEPS:
            self._stopped.wait(SLEEPS[fault])
        label = "another" if fault == "other weights" else self.sampler.label
        places = [self._place(row, how["logprobs"]) for row in drawn.rows]
        if fault == "broken":
            places[-1]["logprob"] = -9999.0
        if fault == "ragged":
            places[-1]["top_logprobs"].pop()
            places[-1]["top_logprobs"].pop()
        if fault == "huge number":
            places[-1]["logprob"] = 10**400
        if fault == "too many":
            drawn.token_ids.extend([1] * how["max_tokens"])
        if fault == "no token":
            drawn.token_ids[0] = 10**30
        choice = {
            "index": 0,
            "token_ids": drawn.token_ids,
            "finish_reason": "abort" if fault == "abort" else drawn.finish,
            "logprobs": None if fault == "no logprobs" else {"content": places},
            "weight_versions": [{"version": label, "start": 0, "end": len(drawn.token_ids)}],
            "routed_experts": None if drawn.chosen is None else _base64(self._altered(drawn.chosen, fault)),
        }
        return {"choices": [] if fault == "no choice" else [choice]}

    def _altered(self, chosen: np.ndarray, fault: str) -> np.ndarray:
        if fault == "another model":
            return chosen + 8
        if fault == "another length":
            return chosen[1:]
        return chosen.astype(np.float32) if fault == "no numbers of experts" else chosen

    def _place(self, row: list[tuple[int, float]], asked: int) -> dict[str, Any]:
        """As vLLM does: a dictionary, the sampled token first, cut after as many as were asked for."""
        listed = list(dict(row).items())[: max(1, asked)]
        top = [{"token_id": token, "logprob": logp} for token, logp in listed]
        return {"token_id": row[0][0], "logprob": row[0][1], "top_logprobs": top}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.headers.append({name.lower(): value for name, value in self.headers.items()})
                known = fake.token in (None, fake.headers[-1].get("drpo-token"))
                status, said = fake.reply(self.path, body) if known else (401, b'{"error": "set DRPO_SERVER_TOKEN"}')
                if not status:
                    threading.Thread(target=fake.stop, daemon=True).start()
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                if status == 307:
                    self.send_header("Location", said.decode())
                self.end_headers()
                with suppress(BrokenPipeError):  # who asked has given up
                    self.wfile.write(said)

            def log_message(self, *arguments: Any) -> None:
                pass

        return Handler


def _base64(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()
