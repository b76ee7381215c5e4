"""The work of `drpo serve`: a vLLM server that `drpo train --engine http://...` can sample from and send weights to."""

import importlib.util
import ipaddress
import os
import secrets
import sys
from typing import Any

import torch

from drpo.cli.commands.serve import ServeOptions
from drpo.credentials import TOKEN, headers
from drpo.errors import InputError
from drpo.model import smollm2
from drpo.model.names import SMOLLM2, TINY
from drpo.rollout.gate import Gate
from drpo.rollout.vllm import device_options, precision_options
from drpo.rollout.vllm_worker import EXTENSION

GATE = f"{Gate.__module__}.{Gate.__qualname__}"
"""What vLLM is told to put before its own handlers."""


def serve(model: str, options: ServeOptions, further: list[str]) -> None:
    """Start a vLLM server in this process's place; does not return."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError("serve: vLLM is not installed here; docs/vllm.md says how to install it beside drpo")
    _require_loopback(options)
    line = command(model, options, further)
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # opens the calls that replace weights, behind the gate
    _give_token(options)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Trainer and server take turns on the same cores; bound ones would leave out those kept free for the other.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.execv(line[0], line)


def _require_loopback(options: ServeOptions) -> None:
    """Refuse an address that others reach: tokens and weights would cross the network in the clear."""
    try:
        loopback = options.host == "localhost" or ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise InputError(
            f"serve: --host {options.host}: the server can be told to replace its model, so it listens on this machine "
            f"alone; from another, come through `ssh -N -L {options.port}:127.0.0.1:{options.port} HOST`"
        )


def _give_token(options: ServeOptions) -> None:
    """Leave a token in the environment, which other users cannot read; say it where it is new."""
    if os.environ.get(TOKEN):
        headers()  # raises where no request could carry it
        return
    os.environ[TOKEN] = token = secrets.token_urlsafe(24)
    print(f"token: {TOKEN}={token} drpo train ... --engine http://{options.host}:{options.port}", flush=True)


def command(model: str, options: ServeOptions, further: list[str]) -> list[str]:
    """Return the command line of the server; what is further given wins, but for where it listens and to whom.

    Args:
        model: smollm2-135m, a folder or a hub id.
        options: where it listens.
        further: options of `vllm serve`.

    Raises:
        InputError: a precision that vLLM does not have here, or a model that no other program can load.
    """
    if model == TINY:
        raise InputError(f"serve: model={TINY!r} is made in memory, not on a disk; give a folder or a hub id")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = {**precision_options(options.precision, device), **device_options(device)}
    return [
        # Not `vllm serve`: in vllm-cpu that asks for the version of a distribution named vllm, and ends without one.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(smollm2.smollm2()) if model == SMOLLM2 else model),
        *(word for name, value in machine.items() for word in _option(name, value)),
        *("--generation-config", "vllm"),  # the model's own must not change the distribution
        *("--logprobs-mode", "processed_logprobs"),  # of the distribution that is drawn from
        *("--max-logprobs", "-1"),
        *("--max-model-len", "-1"),  # the model's own, or what the cache has room for
        "--enable-scale-out",  # the endpoint that takes and gives token ids
        "--enable-prefix-caching",
        *("--worker-extension-cls", EXTENSION),
        *("--uvicorn-log-level", "warning"),
        *further,
        *("--host", options.host, "--port", str(options.port), "--middleware", GATE),
    ]


def _option(name: str, value: Any) -> list[str]:
    """An option of vLLM's constructor as one of its command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]
