"""The models that a command talks with: loaded as samplers, with what the model of a run reads before a question."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.cli.folder import open_run
from drpo.cli.trained import model_of, run_of, untrained
from drpo.errors import InputError
from drpo.model.device import choose_device
from drpo.rollout.tools import with_tools
from drpo.serving.dialogue import Dialogue
from drpo.serving.sampler import Sampler
from drpo.train.config import Run
from drpo.train.setup import environments_of
from drpo.types import Failure, Problem
from drpo.types.environment import Observation
from drpo.types.problem import message


@dataclass(frozen=True)
class SamplerOptions:
    """How a model is made to speak.

    Args:
        step: of a run: the checkpoint after so many steps; 0 for the newest weights.
        stop: tokens that end a turn; empty for the run's, or the model's own.
        precision: of the sampler, by name; None for that of the run's sampler, else auto.
        device: by name.
        trust_remote_code: import what a run's configuration names as module:name.
    """

    step: int = 0
    stop: tuple[str, ...] = ()
    precision: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False


def sampler_of(name: str, options: SamplerOptions, command: str) -> Sampler:
    """Return the sampler of a run's model, or of any other.

    Args:
        name: a run's folder or a model.
        options: how.
        command: for messages.
    """
    model, tokenizer = model_of(name, options.step, options.trust_remote_code, command)
    return _sampler(model, tokenizer, run_of(name, False), options)


def untrained_sampler(name: str, options: SamplerOptions) -> Sampler:
    """Return the sampler of the model that a run began with.

    Args:
        name: the run's folder.
        options: how.
    """
    model, tokenizer = untrained(Path(name), options.trust_remote_code)
    return _sampler(model, tokenizer, run_of(name, False), options)


def _sampler(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Run | None, options: SamplerOptions
) -> Sampler:
    stop = options.stop or (() if run is None else run.rollout.stop)
    precision = options.precision or ("auto" if run is None else run.rollout.precision)
    return Sampler.of(model, tokenizer, stop, precision, choose_device(options.device))


def first_question(name: str, trust_remote_code: bool) -> tuple[Problem, Observation] | None:
    """Return the first problem of a run of RL, and what the model reads of it first; None for anything else.

    Args:
        name: a run's folder or a model.
        trust_remote_code: import the task and the environment that the run's configuration names as module:name.

    Raises:
        InputError: they are such names and must not be imported; or there is no problem, because its file has gone,
            say; or the environment fails.
    """
    if run_of(name, False) is None:
        return None
    advice = "; --system TEXT says what the model reads first, in place of the run's"
    try:
        run = open_run(Path(name), trust_remote_code, needed=("task", "environment"))
        problem = run.data.task.sample(1, 0, run.seed)[0]
        environments = environments_of(run.data.task, run)
        if environments is None:
            return problem, Observation(problem.messages)
        with environments:
            opened = environments.open([problem])[0]
            environments.close()
    except InputError as error:
        raise InputError(f"{error}{advice}") from None
    if isinstance(opened, Failure):
        raise InputError(f"{name}: its environment failed: {opened.text}{advice}")
    return problem, opened


def opening(tokenizer: PreTrainedTokenizerBase, observation: Observation | None, system: str | None) -> Dialogue:
    """Return a conversation as it is before the first question: the system message, and tools.

    Args:
        tokenizer: the model's.
        observation: what a run's model reads of a problem first; None without a run.
        system: the system message in place of that; "" for none.
    """
    if system is not None:
        return Dialogue((message("system", system),) if system else ())
    if observation is None:
        return Dialogue()
    messages, tools = with_tools(tokenizer, observation)
    return Dialogue(tuple(m for m in messages[:1] if m["role"] == "system"), tools)
