"""`drpo chat`: its options."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from drpo.cli.options import leading, parse
from drpo.errors import InputError, as_typed
from drpo.model.names import require_there
from drpo.spec import import_named
from drpo.train.records import is_run

START = "start"
"""The value of --versus that is the model that the run began with."""


@dataclass(frozen=True)
class ChatOptions:
    """Talk with the model of a run, finished or not, or with any other model.

      drpo chat runs/demo --show-probabilities --versus start

    A question a line, also from a pipe. What a run trains is what answers: its chat template, its system message, its
    temperature, its sampler. Ctrl-C ends an answer, Ctrl-D the conversation; /help lists what else there is.

    Args:
        show_probabilities: of each token: a colour on a terminal, a number a line elsewhere.
        versus: let another model answer too: start, the model that the run began with; or a run or a model.
        system: the system message, in place of the run's; "" for none.
        temperature: divides the logits; 0 takes the most probable token; default: the run's, else 1.
        max_new_tokens: the longest answer.
        seed: of the sampling: the same seed and questions, the same answers.
        stop: tokens that end a turn, each by its text or its id.
        step: of a run: the checkpoint after this many rollouts; 0 for the newest weights.
        precision: of the sampler: auto, fp32, bf16, fp16, int8, fp8_weights, fp8; default: the run's sampler's.
        device: auto (cuda, else Apple's mps, else cpu), cuda, mps, cpu.
        trust_remote_code: import the model, the task and the environment that a run's configuration names as
            module:name; only for folders that you trust.
    """

    show_probabilities: bool = False
    versus: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_new_tokens: int = 512
    seed: int = 0
    stop: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: where its turns end)")] = ()
    step: int = 0
    precision: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False


def chat(arguments: list[str]) -> int:
    """`drpo chat RUN|MODEL [options]`."""
    name, rest = leading(arguments, "RUN|MODEL", "chat: name a run's folder or a model first")
    options = parse(ChatOptions, rest, f"drpo chat {as_typed(name)}")
    for model in (name, options.versus):
        if model not in (None, START) and not is_run(model):
            require_there(model)
    if options.versus == START and not is_run(name):
        raise InputError(f"--versus start: {name} is not a run, so it began with no other model; name the model")
    return int(import_named("drpo.cli.chat", "chat", "command")(name, options))
