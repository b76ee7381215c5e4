"""`drpo serve`: a vLLM server that `drpo train --engine http://...` can sample from and send weights to."""

import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch

from drpo import models
from drpo.cli.options import leading, parse
from drpo.errors import InputError
from drpo.rollout.vllm import device_options, precision_options
from drpo.rollout.vllm_worker import EXTENSION


@dataclass(frozen=True)
class ServeOptions:
    """Start a vLLM server that `drpo train ... --engine http://127.0.0.1:8000` samples from and sends weights to.

      drpo serve smollm2-135m --port 8001 -- --max-num-seqs 64

    What stands behind -- are options of `vllm serve`, passed on as they are; they win over what drpo sets.

    Args:
        host: the address to listen on. Whoever reaches it can replace the model: keep it off open networks.
        port: the port to listen on.
        precision: of the weights and the compute: auto (bf16 where the processor has it), bf16, fp16, fp32, fp8.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    precision: str = "auto"


def serve(arguments: list[str]) -> int:
    """`drpo serve MODEL [--port N] [--host ADDRESS] [--precision P] [-- options of vllm serve]`; does not return."""
    model, rest = leading(arguments, "MODEL", "serve: name a model first: smollm2-135m, a folder or a hub id")
    own, further = (rest[: rest.index("--")], rest[rest.index("--") + 1 :]) if "--" in rest else (rest, [])
    options = parse(ServeOptions, own, f"drpo serve {model}")
    models.require_there(model)
    if importlib.util.find_spec("vllm") is None:
        raise InputError("serve: vLLM is not installed here; docs/vllm.md says how to install it beside drpo")
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # opens the calls that replace weights
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Trainer and server take turns on the same cores; bound ones would leave out those kept free for the other.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    line = command(model, options, further)
    os.execv(line[0], line)


def command(model: str, options: ServeOptions, further: list[str]) -> list[str]:
    """Return the command line of the server; what is further given comes last, and so wins.

    Args:
        model: smollm2-135m, a folder or a hub id.
        options: where it listens.
        further: options of `vllm serve`.

    Raises:
        InputError: a precision that vLLM does not have here, or a model that no other program can load.
    """
    if model == models.TINY:
        raise InputError(f"serve: model={models.TINY!r} is made in memory, not on a disk; give a folder or a hub id")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = {**precision_options(options.precision, device), **device_options(device)}
    return [
        # Not `vllm serve`: in vllm-cpu that asks for the version of a distribution named vllm, and ends without one.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(models.smollm2()) if model == models.SMOLLM2 else model),
        *("--host", options.host, "--port", str(options.port)),
        *(word for name, value in machine.items() for word in _option(name, value)),
        *("--generation-config", "vllm"),  # the model's own must not change the law
        *("--logprobs-mode", "processed_logprobs"),  # of the law that is drawn from
        *("--max-logprobs", "-1"),
        *("--max-model-len", "-1"),  # the model's own, or what the cache has room for
        "--enable-scale-out",  # the endpoint that takes and gives token ids
        "--enable-prefix-caching",
        *("--worker-extension-cls", EXTENSION),
        *("--uvicorn-log-level", "warning"),
        *further,
    ]


def _option(name: str, value: Any) -> list[str]:
    """An option of vLLM's constructor as one of its command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]
