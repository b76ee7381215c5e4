"""The implementation of `drpo serve-rollouts`: a vLLM server for `drpo train --engine http://...`."""

import importlib.util
import os
import sys
from typing import Any

import torch

from drpo.cli.commands.serve_rollouts import ServeRolloutsOptions
from drpo.cli.listening import make_token, require_loopback, require_port, url
from drpo.credentials import TOKEN
from drpo.errors import InputError, as_typed
from drpo.model import smollm2
from drpo.model.names import SMOLLM2, TINY
from drpo.rollout.gate import Gate
from drpo.rollout.vllm import device_options, precision_options
from drpo.rollout.vllm_patches import EXTENSION

GATE = f"{Gate.__module__}.{Gate.__qualname__}"
"""The middleware that checks the token before vLLM's handlers."""


def serve_rollouts(model: str, options: ServeRolloutsOptions, further: list[str]) -> None:
    """Replace this process with a vLLM server; does not return."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError("serve-rollouts: vLLM is not installed here; docs/vllm.md says how to install it beside drpo")
    why = "the server can be told to replace its model"
    require_loopback("serve-rollouts", options.host, options.port, why)
    require_port("serve-rollouts", options.port, 1)
    line = command(model, options, further)
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # enables the calls that replace weights, which require the token
    if make_token():
        address = as_typed(url(options.host, options.port))  # brackets are patterns in a shell
        print(f"token: {TOKEN}={os.environ[TOKEN]} drpo train ... --engine {address}", flush=True)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Trainer and server alternate on the same cores; binding threads would leave cores idle.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.execv(line[0], line)


def command(model: str, options: ServeRolloutsOptions, further: list[str]) -> list[str]:
    """Return the server's command line; `further` wins over drpo's options, except for address, port and middleware.

    Args:
        model: smollm2-135m, a folder or a hub id.
        options: address, port and precision.
        further: options of `vllm serve`.

    Raises:
        InputError: a precision that vLLM does not support, or a model that only drpo can load.
    """
    if model == TINY:
        raise InputError(f"serve-rollouts: model={TINY!r} is made in memory, not on a disk; give a folder or a hub id")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = {**precision_options(options.precision, device), **device_options(device)}
    return [
        # Not `vllm serve`: in vllm-cpu it fails because no distribution is named vllm.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(smollm2.smollm2()) if model == SMOLLM2 else model),
        *(word for name, value in machine.items() for word in _option(name, value)),
        *("--generation-config", "vllm"),  # the model's generation config must not change the distribution
        *("--logprobs-mode", "processed_logprobs"),  # of the sampling distribution
        *("--max-logprobs", "-1"),
        *("--max-model-len", "-1"),  # the model's length, or as much as the cache can hold
        "--enable-scale-out",  # the endpoint with token ids in and out
        "--enable-prefix-caching",
        *("--worker-extension-cls", EXTENSION),
        *("--uvicorn-log-level", "warning"),
        *further,
        *("--host", options.host, "--port", str(options.port), "--middleware", GATE),
    ]


def _option(name: str, value: Any) -> list[str]:
    """Return an argument of vLLM's constructor as command-line options."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]
