"""`drpo serve`: its options."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from drpo.cli.options import leading, parse
from drpo.errors import InputError, as_typed
from drpo.model.names import require_there
from drpo.spec import import_named
from drpo.train.records import is_run


@dataclass(frozen=True)
class ServeOptions:
    """Answer programs that speak OpenAI's API, with the model of a run, finished or not, or with any other model.

      drpo serve runs/demo --port 8001

    It prints the address and the API key. One row is sampled at a time, so that an answer depends on its request
    alone: for trying out, evaluating and comparing. `drpo export` and vLLM serve many users.

    Args:
        host: the address to listen on; only loopback addresses. From another machine use a tunnel:
            ssh -N -L 8000:127.0.0.1:8000 HOST.
        port: the port to listen on; 0 for any that is free.
        name: of the model, in requests and answers; default: the last part of its path.
        max_new_tokens: the longest answer of a chat where the request does not say.
        stop: tokens that end a turn, each by its text or its id.
        step: of a run: the checkpoint after this many rollouts; 0 for the newest weights.
        precision: of the sampler: auto, fp32, bf16, fp16, int8, fp8_weights, fp8; default: the run's sampler's.
        device: auto (cuda, else Apple's mps, else cpu), cuda, mps, cpu.
        trust_remote_code: import the model that a run's configuration names as module:name; only for folders that you
            trust.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    max_new_tokens: int = 512
    stop: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: where its turns end)")] = ()
    step: int = 0
    precision: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False


def serve(arguments: list[str]) -> int:
    """`drpo serve RUN|MODEL [options]`."""
    name, rest = leading(arguments, "RUN|MODEL", "serve: name a run's folder or a model first")
    if "--" in rest:
        raise InputError(
            "serve: options of vLLM after -- are for `drpo serve-rollouts`, the server that `drpo train --engine` "
            "samples from; `drpo serve` speaks OpenAI's API"
        )
    options = parse(ServeOptions, rest, f"drpo serve {as_typed(name)}")
    if not is_run(name):
        require_there(name)
    return int(import_named("drpo.cli.serve", "serve", "command")(name, options))
