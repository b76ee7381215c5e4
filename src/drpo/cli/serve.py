"""The implementation of `drpo serve`: an HTTP server that speaks OpenAI's API."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from drpo.cli.commands.serve import ServeOptions
from drpo.cli.listening import make_token, require_loopback, require_port, url
from drpo.cli.samplers import SamplerOptions, sampler_of
from drpo.credentials import TOKEN
from drpo.errors import InputError
from drpo.serving.http import Server, Service
from drpo.serving.sampler import Sampler
from drpo.terminal import Terminal
from drpo.types import Sampling


def serve(name: str, options: ServeOptions) -> int:
    """Answer requests until the process is ended."""
    server, is_closed = made_server(name, options), False
    try:
        server.serve_forever()
    finally:
        with suppress(KeyboardInterrupt):  # a second one
            is_closed = server.close()
        if not is_closed:
            print("drpo: interrupted", file=sys.stderr, flush=True)
            os._exit(130)
    return 0


def served_name(name: str) -> str:
    """Return what a run or a model is called in requests: the last part of a folder's path.

    Example:
        >>> served_name("src/drpo"), served_name("Qwen/Qwen3-0.6B")
        ('drpo', 'Qwen/Qwen3-0.6B')
    """
    return Path(name).resolve().name if Path(name).is_dir() else name


def made_server(name: str, options: ServeOptions) -> Server:
    """Take the address, load the model, and return the server, which listens.

    Args:
        name: a run's folder or a model.
        options: the options.

    Raises:
        InputError: an address of other machines, or one that is taken; or the model cannot be used.
    """
    require_loopback("serve", options.host, options.port, "what it says travels unencrypted")
    require_port("serve", options.port, 0)
    longest = Sampling(samples=1, max_new_tokens=options.max_new_tokens)
    is_new = make_token()
    with _port_named(options):
        server = Server((options.host, options.port))
    try:
        service = Service(
            _loaded(name, options), options.name or served_name(name), os.environ[TOKEN], longest.max_new_tokens
        )
        with _port_named(options):
            server.open(service)
    except BaseException:
        server.server_close()
        raise
    address = f"{url(options.host, server.server_address[1])}/v1"
    key = os.environ[TOKEN] if is_new else f"${TOKEN}"
    print(f"serving {service.name}; export OPENAI_BASE_URL={address} OPENAI_API_KEY={key}", flush=True)
    return server


@contextmanager
def _port_named(options: ServeOptions) -> Iterator[None]:
    """Name the option in an error of the address."""
    try:
        yield
    except OSError as error:
        raise InputError(f"serve: --port {options.port}: {error.strerror}; name another, or 0 for any") from None


def _loaded(name: str, options: ServeOptions) -> Sampler:
    """Return the sampler of a model that has sampled a token: what cannot be sampled fails here."""
    transformers_logging.disable_progress_bar()
    how = SamplerOptions(options.step, options.stop, options.precision, options.device, options.trust_remote_code)
    with Terminal(stderr=True).status(f"loading {name}"):
        sampler = sampler_of(name, how, "serve")
        first = torch.tensor([min(sampler.stop, default=0)])
        list(sampler.stream(first, Sampling(samples=1, max_new_tokens=1), ("serve",)))
    return sampler
