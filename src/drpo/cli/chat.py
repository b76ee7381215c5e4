"""The implementation of `drpo chat`: a conversation on the terminal, or a question a line from a pipe."""

import readline  # noqa: F401 (with it `input` edits lines and remembers them)
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from transformers.utils import logging as transformers_logging

from drpo.cli.commands.chat import START, ChatOptions
from drpo.cli.samplers import SamplerOptions, first_question, opening, sampler_of, untrained_sampler
from drpo.cli.screen import Screen, screen_of
from drpo.cli.trained import trained_model
from drpo.errors import InputError, one_line
from drpo.serving.dialogue import Dialogue
from drpo.serving.sampler import Sampler
from drpo.serving.text import Piece
from drpo.train.records import is_run
from drpo.types import Problem, Sampling

HELP = """A line is a question; the conversation goes on until /reset.
  /reset   begin a new conversation
  /help    this
  //text   a question that begins with /
Ctrl-C ends an answer, Ctrl-D the program."""


@dataclass(frozen=True, eq=False)
class ChatModel:
    """A model that is talked to.

    Args:
        name: as the command line has it.
        sampler: answers.
        opening: the conversation before the first question.
    """

    name: str
    sampler: Sampler
    opening: Dialogue


@dataclass(frozen=True)
class ChatConfig:
    """How all models answer.

    Args:
        sampling: the distribution.
        seed: of the random numbers; the n-th question of a session has its own, whatever was reset before.
        interactive: somebody types: Ctrl-C ends an answer, and a question that cannot be answered ends nothing.
    """

    sampling: Sampling
    seed: int
    interactive: bool


def chat(name: str, options: ChatOptions) -> int:
    """Talk until the input ends."""
    transformers_logging.disable_progress_bar()
    temperature = options.temperature
    if temperature is None:
        temperature = trained_model(Path(name), options.trust_remote_code).temperature if is_run(name) else 1.0
    sampling = Sampling(samples=1, max_new_tokens=options.max_new_tokens, temperature=temperature)
    interactive, screen = sys.stdin.isatty(), screen_of(options.show_probabilities)
    with screen.waiting(f"loading {name}") if interactive else nullcontext():
        models, example = _models(name, options)
    if interactive:
        for line in _greeting(models[0].opening, sampling, example):
            screen.note(line)
    converse(models, _typed() if interactive else _piped(), screen, ChatConfig(sampling, options.seed, interactive))
    return 0


def _models(name: str, options: ChatOptions) -> tuple[list[ChatModel], Problem | None]:
    """Load the model, and the other one of --versus; return them with a problem of the run, if it is one."""
    how = SamplerOptions(options.step, options.stop, options.precision, options.device, options.trust_remote_code)
    first = None if options.system is not None else first_question(name, options.trust_remote_code)
    problem, observation = (None, None) if first is None else first
    samplers = [(name, sampler_of(name, how, "chat"))]
    if options.versus == START:
        samplers.append((START, untrained_sampler(name, how)))
    elif options.versus is not None:
        samplers.append((options.versus, sampler_of(options.versus, replace(how, step=0), "chat")))
    openings = [opening(sampler.tokenizer, observation, options.system) for _, sampler in samplers]
    return [ChatModel(n, sampler, begins) for (n, sampler), begins in zip(samplers, openings, strict=True)], problem


def _greeting(begins: Dialogue, sampling: Sampling, example: Problem | None) -> Iterator[str]:
    """Yield what the model reads first, and how it answers."""
    system = next((str(m["content"]) for m in begins.messages), None)
    yield "no system message" if system is None else f"system message: {one_line(system)[:200]}"
    if example is not None:
        yield f"the run's first question: {one_line(example.prompt)[:200]}"
    if begins.tools:
        yield "its tools are shown to it, and nothing answers a call here"
    yield f"temperature {sampling.temperature:g}, at most {sampling.max_new_tokens} tokens; /help"


def converse(models: Sequence[ChatModel], lines: Iterable[str], screen: Screen, config: ChatConfig) -> None:
    """Answer questions until there are no more.

    Args:
        models: each answers every question, in a conversation of its own.
        lines: questions and commands.
        screen: shows the answers.
        config: how they answer.

    Raises:
        InputError: a question cannot be answered, or a command is unknown, where nobody is there to type another.
        KeyboardInterrupt: likewise.
    """
    dialogues, number = [model.opening for model in models], 0
    for line in filter(str.strip, lines):
        if line.startswith("/") and not line.startswith("//"):
            command = line.strip()
            if command == "/reset":
                dialogues = [model.opening for model in models]
            elif command != "/help" and not config.interactive:
                raise InputError(f"chat: {_reply(command)}")
            screen.note(_reply(command))
            continue
        for i, model in enumerate(models):
            if len(models) > 1:
                screen.title(model.name)
            dialogues[i] = _answered(model.sampler, dialogues[i], line.removeprefix("/"), number, screen, config)
        number += 1


def _reply(command: str) -> str:
    if command == "/reset":
        return "a new conversation"
    if command == "/help":
        return HELP
    return f"no such command: {one_line(command)}; /help lists them, and //text is a question that begins with /"


def _answered(
    sampler: Sampler, dialogue: Dialogue, question: str, number: int, screen: Screen, config: ChatConfig
) -> Dialogue:
    """Show the answer to a question; return the conversation with both, or as it was where there is no answer."""
    pieces: list[Piece] = []
    asked = dialogue
    try:
        asked = dialogue.asked(sampler.tokenizer, question, sampler.stop)
        for piece in _pieces(sampler, asked, number, config):
            pieces.append(piece)
            screen.piece(piece)
    except KeyboardInterrupt:
        if not config.interactive:
            raise
    except InputError as error:
        if not config.interactive:
            raise
        screen.note(f"{error} (/reset begins a new conversation)")
        return dialogue
    screen.end(pieces, sampler.tokenizer)
    sampled = [token.id for piece in pieces for token in piece.sampled]
    return asked.answered(sampled, "".join(piece.text for piece in pieces)) if sampled else dialogue


def _pieces(sampler: Sampler, asked: Dialogue, number: int, config: ChatConfig) -> Iterator[Piece]:
    assert asked.ids is not None
    room, sampling = sampler.room(asked.ids), config.sampling
    if room is not None:
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    return sampler.stream(asked.ids, sampling, ("chat", config.seed, number))


def _typed() -> Iterator[str]:
    """Yield the lines that are typed, until Ctrl-D."""
    prompt = "> " if sys.stdout.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends the program)")


def _piped() -> Iterator[str]:
    """Yield the lines of the pipe.

    Raises:
        InputError: they are no text.
    """
    try:
        for line in sys.stdin:
            line.encode()  # bytes that are no text may have been read as halves of characters
            yield line.rstrip("\r\n")
    except UnicodeError:
        raise InputError(f"chat: the input is no {sys.stdin.encoding or 'UTF-8'} text; convert it to UTF-8") from None
