"""The `drpo` command: its usage, and the module of each subcommand, imported on demand."""

import errno
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from drpo import __version__
from drpo.cli.streams import OutputLostError, fewer_warnings, telling
from drpo.credentials import keep_password, shown, without_password
from drpo.errors import EngineError, InputError, is_out_of_memory, message_of, nearest
from drpo.extras import missing
from drpo.spec import SAFE_PATH, import_named
from drpo.terminal import LogLines, PrintableRecord


class Command(NamedTuple):
    """A subcommand that is imported on demand.

    Args:
        module: its function of the command's name, with _ for -, receives the arguments and returns the exit status.
        usage: form -> one line of description, for `drpo --help`.
    """

    module: str
    usage: Mapping[str, str]


COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "drpo.cli.commands.train",
        {
            "train RECIPE [--FIELD VALUE ...]": "train; drpo train RECIPE --help shows every field with its default",
            "train --data FILE": "train on your own questions and answers: JSON lines, CSV, parquet",
            "train --resume RUN [--steps N]": "go on with a run from its last checkpoint, also with more steps",
            "train --from RUN": "start a new run from the weights of another",
        },
    ),
    "sft": Command(
        "drpo.cli.commands.sft",
        {"sft DATA [--model MODEL]": "supervised fine-tuning on conversations, before RL; sft --resume RUN"},
    ),
    "init": Command(
        "drpo.cli.commands.init",
        {"init [FILE]": "write a recipe for your own data, and show what the model will read"},
    ),
    "watch": Command(
        "drpo.cli.commands.watch",
        {"watch RUN": "follow a run of another process: progress, curves, the last sample"},
    ),
    "eval": Command(
        "drpo.cli.commands.eval",
        {"eval MODEL|RUN [--task TASK ...]": "accuracy or mean reward on held-out problems, with a 95 % interval"},
    ),
    "chat": Command(
        "drpo.cli.commands.chat",
        {"chat RUN|MODEL": "talk with what was trained: --show-probabilities, --versus start"},
    ),
    "serve": Command(
        "drpo.cli.commands.serve",
        {"serve RUN|MODEL": "the same for programs: an HTTP server that speaks OpenAI's API"},
    ),
    "export": Command(
        "drpo.cli.commands.export",
        {"export RUN|MODEL FOLDER": "write the weights as a folder that any transformers program reads"},
    ),
    "verify": Command(
        "drpo.cli.commands.verify",
        {"verify RUN": "check that the files of a run are intact: a line per part"},
    ),
    "report": Command(
        "drpo.cli.commands.report",
        {
            "report RUN|COMPARISON [--open]": "write one HTML file: curves, trust region, every token; or a "
            "comparison's results"
        },
    ),
    "doctor": Command(
        "drpo.cli.commands.doctor",
        {"doctor [RECIPE]": "check that a run's numbers are sound on this machine, in a minute"},
    ),
    "serve-rollouts": Command(
        "drpo.cli.commands.serve_rollouts",
        {"serve-rollouts MODEL": "start a vLLM server for drpo train ... --engine http://127.0.0.1:8000"},
    ),
    "compare": Command(
        "drpo.cli.commands.compare",
        {"compare RECIPE --objectives ...": "train with several objectives, over seeds and regimes"},
    ),
    "recipes": Command("drpo.cli.commands.train", {"recipes": "list the recipes"}),
    "weights": Command(
        "drpo.cli.commands.weights",
        {"weights OBJECTIVE ...": "draw the gradient weight of objectives, on the screen; --out FILE: to a file too"},
    ),
    "replay": Command(
        "drpo.cli.commands.replay",
        {"replay RUN [--objectives ...]": "show what other objectives would have done with a run's batch"},
    ),
    "autopsy": Command(
        "drpo.cli.commands.autopsy",
        {"autopsy FILE ...": "say why a run of verl, TRL, prime-rl, SkyRL or open-instruct collapsed"},
    ),
    "explain": Command(
        "drpo.cli.commands.explain",
        {"explain [NAME]": "what a metric or a warning means, what is normal, and what to do"},
    ),
    "env": Command("drpo.cli.commands.env", {"env": "print versions, hardware and settings, for a bug report"}),
    "completion": Command(
        "drpo.cli.commands.completion",
        {"completion bash|zsh|fish": "print what makes the shell complete commands, recipes and options"},
    ),
}

_FORMS = {form: about for command in COMMANDS.values() for form, about in command.usage.items()}
_LINES = "\n".join(f"  drpo {form:<34} {about}" for form, about in _FORMS.items())
USAGE = f"""drpo {__version__}: trust-region policy optimisation for language models

{_LINES}

Try:
  drpo train demo                         SmolLM2-135M learns to add on a CPU, in minutes
  drpo train demo --objective 'dppo(0.15)' --seed 1 --out runs/dppo
  drpo train demo --method grpo           as a paper trains: grpo, dapo, ppo, rloo, cispo, ...
  drpo train --data my.jsonl              the same for your own questions and answers
  drpo weights 'drpo(0.2)' 'dppo(0.2)' 'ppo(0.2,0.28)' 'spo(0.2)'

Objectives, tasks and rewards are written as calls, in quotes: drpo(0.2), addition(1, 50), records('my.jsonl').
Your own are module:name. See also `drpo COMMAND --help`."""

LASTING = ("train", "sft", "compare", "serve", "serve-rollouts")
"""Commands that continue when their output can no longer be written."""
LESS = "free some, lift `ulimit -v`, or make steps smaller: --micro-batch-tokens, --prompts, --sampling.max-new-tokens"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 success, 1 failure, 2 invalid input, 128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        os.environ["PYTHONSAFEPATH"] = os.environ.get("PYTHONSAFEPATH") or SAFE_PATH  # an empty value counts as unset
        sys.argv[1:] = map(without_password, arguments)  # which trackers record
    # Set before torch loads: waiting threads sleep soon. With one other busy process, a rollout of the demo took 17 s,
    # and 20 s with libgomp's default; alone 7 s either way (8.5 s if threads sleep at once).
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    goes_on = bool(arguments) and arguments[0] in LASTING and not {"-h", "--help"} & set(arguments)
    with telling(goes_on), fewer_warnings():
        _show_log()
        return _status(arguments)


def _status(arguments: list[str]) -> int:
    try:
        status = _dispatch(keep_password(arguments))
        sys.stdout.flush()  # here, so that a failure is still reported
        return status
    except InputError as error:
        return _fail(str(error), 2)
    except FloatingPointError as error:
        return _fail(str(error), 1)
    except EngineError as error:
        return _fail(str(error), 75)  # EX_TEMPFAIL: try again
    except OutputLostError as error:
        return 141 if error.closed else _fail(f"standard output: {error}", 1)
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if is_out_of_memory(error):
            return _fail(f"{message_of(error)}; {LESS}", 1)
        if isinstance(error, ImportError) and (told := missing(error)):
            return _fail(told, 2)
        if not isinstance(error, OSError):
            raise
        return _fail(message_of(error), 2 if error.errno == errno.ENAMETOOLONG else 1)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}{nearest(name, COMMANDS)}")
    status: int = import_named(COMMANDS[name].module, name.replace("-", "_"), "command")(rest)
    return status


def _fail(message: str, status: int) -> int:
    print(f"drpo: {shown(message)}", file=sys.stderr)
    return status


def _show_log() -> None:
    """Show drpo's log messages; of libraries, only errors."""
    logging.setLogRecordFactory(PrintableRecord)
    log = logging.getLogger("drpo")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(LogLines())
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # the hub's library reads it on import
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
