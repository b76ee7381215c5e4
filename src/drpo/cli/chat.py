"""The implementation of `drpo chat`: a conversation on the terminal, or a question a line from a pipe."""

import readline  # noqa: F401 (with it `input` edits lines and remembers them)
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from transformers.utils import logging as transformers_logging

from drpo.cli.commands.chat import START, ChatOptions
from drpo.cli.partners import SpeakerOptions, first_question, opening, speaker_of, untrained_speaker
from drpo.cli.screen import Screen, screen_of
from drpo.cli.trained import trained_model
from drpo.errors import InputError, one_line
from drpo.serving.dialogue import Dialogue
from drpo.serving.speaker import Speaker
from drpo.serving.text import Piece
from drpo.train.records import is_run
from drpo.types import Problem, Sampling

HELP = """A line is a question; the conversation goes on until /reset.
  /reset   begin a new conversation
  /help    this
  //text   a question that begins with /
Ctrl-C ends an answer, Ctrl-D the program."""


@dataclass(frozen=True, eq=False)
class Partner:
    """A model that is talked to.

    Args:
        name: as the command line has it.
        speaker: answers.
        opening: the conversation before the first question.
    """

    name: str
    speaker: Speaker
    opening: Dialogue


@dataclass(frozen=True)
class Manner:
    """How all partners answer.

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
        partners, example = _partners(name, options)
    if interactive:
        for line in _greeting(partners[0].opening, sampling, example):
            screen.note(line)
    converse(partners, _typed() if interactive else _piped(), screen, Manner(sampling, options.seed, interactive))
    return 0


def _partners(name: str, options: ChatOptions) -> tuple[list[Partner], Problem | None]:
    """Load the model, and the other one of --versus; return them with a problem of the run, if it is one."""
    how = SpeakerOptions(options.step, options.stop, options.precision, options.device, options.trust_remote_code)
    first = None if options.system is not None else first_question(name, options.trust_remote_code)
    problem, observation = (None, None) if first is None else first
    speakers = [(name, speaker_of(name, how, "chat"))]
    if options.versus == START:
        speakers.append((START, untrained_speaker(name, how)))
    elif options.versus is not None:
        speakers.append((options.versus, speaker_of(options.versus, replace(how, step=0), "chat")))
    openings = [opening(speaker.tokenizer, observation, options.system) for _, speaker in speakers]
    return [Partner(n, speaker, begins) for (n, speaker), begins in zip(speakers, openings, strict=True)], problem


def _greeting(begins: Dialogue, sampling: Sampling, example: Problem | None) -> Iterator[str]:
    """Yield what the model reads first, and how it answers."""
    system = next((str(m["content"]) for m in begins.messages), None)
    yield "no system message" if system is None else f"system message: {one_line(system)[:200]}"
    if example is not None:
        yield f"the run's first question: {one_line(example.prompt)[:200]}"
    if begins.tools:
        yield "its tools are shown to it, and nothing answers a call here"
    yield f"temperature {sampling.temperature:g}, at most {sampling.max_new_tokens} tokens; /help"


def converse(partners: Sequence[Partner], lines: Iterable[str], screen: Screen, manner: Manner) -> None:
    """Answer questions until there are no more.

    Args:
        partners: each answers every question, in a conversation of its own.
        lines: questions and commands.
        screen: shows the answers.
        manner: how they answer.

    Raises:
        InputError: a question cannot be answered, where nobody is there to ask another.
        KeyboardInterrupt: likewise.
    """
    dialogues, number = [partner.opening for partner in partners], 0
    for line in filter(str.strip, lines):
        if line.startswith("/") and not line.startswith("//"):
            command = line.strip()
            if command == "/reset":
                dialogues = [partner.opening for partner in partners]
            screen.note(_reply(command))
            continue
        for i, partner in enumerate(partners):
            if len(partners) > 1:
                screen.title(partner.name)
            dialogues[i] = _answered(partner.speaker, dialogues[i], line.removeprefix("/"), number, screen, manner)
        number += 1


def _reply(command: str) -> str:
    if command == "/reset":
        return "a new conversation"
    return HELP if command == "/help" else f"no such command: {one_line(command)}; /help lists them"


def _answered(
    speaker: Speaker, dialogue: Dialogue, question: str, number: int, screen: Screen, manner: Manner
) -> Dialogue:
    """Show the answer to a question; return the conversation with both, or as it was where there is no answer."""
    pieces: list[Piece] = []
    asked = dialogue
    try:
        asked = dialogue.asked(speaker.tokenizer, question, speaker.stop)
        for piece in _pieces(speaker, asked, number, manner):
            pieces.append(piece)
            screen.piece(piece)
    except KeyboardInterrupt:
        if not manner.interactive:
            raise
    except InputError as error:
        if not manner.interactive:
            raise
        screen.note(f"{error} (/reset begins a new conversation)")
        return dialogue
    screen.end(pieces, speaker.tokenizer)
    sampled = [token.id for piece in pieces for token in piece.sampled]
    return asked.answered(sampled, "".join(piece.text for piece in pieces)) if sampled else dialogue


def _pieces(speaker: Speaker, asked: Dialogue, number: int, manner: Manner) -> Iterator[Piece]:
    assert asked.ids is not None
    room, sampling = speaker.room(asked.ids), manner.sampling
    if room is not None:
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    return speaker.say(asked.ids, sampling, ("chat", manner.seed, number))


def _typed() -> Iterator[str]:
    """Yield the lines that are typed, until Ctrl-D."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends the program)")


def _piped() -> Iterator[str]:
    for line in sys.stdin:
        yield line.rstrip("\r\n")
