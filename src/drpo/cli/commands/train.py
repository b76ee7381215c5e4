"""`drpo train` and `drpo recipes`: their options."""

from dataclasses import dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Annotated

import tyro

from drpo.cli.options import asks_for_help, flag, given, leading, option_value, parse, require_options
from drpo.errors import InputError, as_typed, nearest_path
from drpo.recipes import DATA, RECIPES, require_recipe
from drpo.spec import import_named
from drpo.train.best_of import require_spec
from drpo.train.chapters import MAY_CHANGE, require_may_change
from drpo.train.origin import checkpoint_named
from drpo.train.records import read_config

USAGE = """usage: drpo train RECIPE | --data FILE | --resume RUN | --from RUN [--FIELD VALUE ...]

Train a model by a recipe, or on your own questions and answers, with the given fields overridden.

  drpo train demo --objective 'dppo(0.15)' --steps 8 --out runs/dppo

RECIPE is a name of the list below, or a file of yours, my_recipe.py: Python with a function `recipe()` that returns a
Run, as `drpo init` writes it.

--data my.jsonl takes JSON lines, JSON, CSV or parquet, a folder of them or a hub dataset. What the columns mean, the
reward and the length of answers are guessed, and said; these options say them instead:

  --prompt-field NAME   the column of the question
  --answer-field NAME   the column of the answer
  --system TEXT         the system message
  --shots N             the first N rows become examples before every question
  --reward REWARD       exact_number, exact_match, math_verify, judge('http://host/v1') and others, a weighted sum of
                        them, 'math_verify + 0.2*format', or your own module:function

--warm-up 'best_of(8)' fine-tunes the model on its own right answers first, of 8 to each problem: for a model that
hardly ever gets a reward.

--resume goes on with a run from its last checkpoint, also with more steps or other settings: `--resume runs/dppo
--steps 16`. --from starts a new run from the weights of another: `--from runs/dppo --task 'addition(1, 99)'`.

--method grpo sets what GRPO is: objective, advantage and reduction together. `drpo train RECIPE --help` shows the
methods and every field with its default, `drpo train --resume --help` the options for resuming, such as
--trust-remote-code if the configuration names your own code, module:name.
"""

CHANGES = (
    "The fields of the run that may be given besides: {}. `drpo train --resume RUN --help` shows what they mean, and "
    "the run's values. A run keeps all others; `drpo train --from RUN` starts a new one from its weights."
)


@dataclass(frozen=True)
class TrainOptions:
    """Train a model by a recipe, with the given fields overridden.

      drpo train demo --objective 'dppo(0.15)' --steps 8 --out runs/dppo

    --method grpo sets what GRPO is: objective, advantage and reduction together. `drpo train --resume RUN` resumes a
    run from its last checkpoint.

    Args:
        method: set objective, advantage or critic, reduction and rule about length together, as a paper does: grpo,
            dr_grpo, dapo, gdpo, gspo, luspo, gmpo, m2po, cispo, sapo, ppo, rloo, reinforce++, reinforce++_baseline,
            spo, dppo, drpo.
            Options given besides win; the first lines say what was set.
        out: folder of the run; default runs/NAME, with a number appended if that is taken.
        plain: plain lines in place of the live table.
        doctor: check first that the numbers are sound on this machine (`drpo doctor`, in short); else do not train.
        track: send the figures to trackers besides: trackio, tensorboard, wandb (offline unless WANDB_MODE or
            WANDB_API_KEY is set); one that fails costs a line, not the run.
        stall: seconds that a phase of a step may take. After that the stacks are written to stalled.txt, and the run
            restarts, or the process ends with status 75. 0 waits for ever.
        restarts: how often the run may restart from its last checkpoint, after a phase that stalled or an engine that
            died. With torchrun, use --max-restarts.
    """

    method: str | None = None
    out: Path | None = None
    plain: bool = False
    doctor: bool = True
    track: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = ()
    stall: float = 7200.0
    restarts: int = 3


@dataclass(frozen=True)
class DataOptions(TrainOptions):
    """Train a model on your own questions and answers; what the options do not say is guessed, and said.

      drpo train --data my.jsonl --system 'Reply with a number.'

    `drpo init my.jsonl` writes the same as a recipe that you can edit.

    Args:
        data: a .jsonl, .json, .csv or .parquet file; a folder with such files named by split; or a hub id, owner/name.
        prompt_field: the column of the question; default: the one with a usual name.
        answer_field: the column of the answer; default: the one with a usual name.
        system: the system message; default: none, or one that asks for the form that the guessed reward reads.
        shots: the first rows become examples before every question; they are not trained on.
        method: grpo, dapo, ppo, ...: what a paper does, as `drpo train RECIPE --help` says.
        out: folder of the run; default runs/NAME, with a number appended if that is taken.
        plain: plain lines in place of the live table.
        doctor: check first that the numbers are sound, as `drpo train RECIPE --help` says.
        track: send the figures to trackers besides: trackio, tensorboard, wandb.
        stall: seconds that a phase of a step may take, as `drpo train RECIPE --help` says.
        restarts: how often the run may restart, as `drpo train RECIPE --help` says.
    """

    data: str = ""
    prompt_field: str | None = None
    answer_field: str | None = None
    system: str | None = None
    shots: int = 0


@dataclass(frozen=True)
class ResumeOptions(TrainOptions):
    """Go on with a run from its last checkpoint: an interrupted one, or one that is to have more steps.

      drpo train --resume runs/demo --steps 400

    Fields of the run that are given here change from the next step on, and are recorded as a new chapter of the run.

    Args:
        method: not possible here; name the fields that change.
        out: not used: the run stays where it is.
        plain: plain lines in place of the live table.
        doctor: check first that the numbers are sound on this machine (`drpo doctor`, in short); else do not train.
        track: send the figures to trackers besides, as `drpo train --help` says.
        stall: seconds that a phase may take, as `drpo train --help` says.
        restarts: how often the run may restart, as `drpo train --help` says.
        trust_remote_code: import the code that the run's configuration names as module:name; only for folders that
            you trust.
        engine: address of the rollout server, if the run uses one; it may differ from the recorded one.
        device: cuda, mps or cpu, in place of the recorded one; numbers then round otherwise.
        accept_records: resume although records were deleted, cut or changed since the checkpoint (`drpo verify RUN`
            lists them); missing records stay missing.
    """

    trust_remote_code: bool = False
    engine: str | None = None
    device: str | None = None
    accept_records: bool = False


@dataclass(frozen=True)
class FromOptions(TrainOptions):
    """Start a new run from the weights of another, with its configuration, in a folder of its own.

      drpo train --from runs/demo --task 'addition(1, 99)' --out runs/larger

    RUN is a run's folder, for the newest weights, or one of its checkpoints, runs/demo/checkpoints/step-000020.

    Args:
        method: set objective, advantage and reduction together, as `drpo train --help` says.
        out: folder of the new run; default runs/NAME, with a number appended if that is taken.
        plain: plain lines in place of the live table.
        doctor: check first that the numbers are sound on this machine (`drpo doctor`, in short); else do not train.
        track: send the figures to trackers besides, as `drpo train --help` says.
        stall: seconds that a phase may take, as `drpo train --help` says.
        restarts: how often the run may restart, as `drpo train --help` says.
        trust_remote_code: import the code that the other run's configuration names as module:name; only for folders
            that you trust.
        engine: address of the rollout server, if the other run used one; or what samples in its place.
    """

    trust_remote_code: bool = False
    engine: str | None = None


def train(arguments: list[str]) -> int:
    """`drpo train` with a recipe, `--data FILE`, `--resume RUN` or `--from RUN`, each with overrides."""
    if arguments and arguments[0] == "--resume":
        return _resume(arguments[1:])
    if arguments and arguments[0] == "--from":
        return _from(arguments[1:])
    if "from" in given(arguments):
        raise InputError(
            "--from: comes first, in place of a recipe: drpo train --from RUN --FIELD VALUE takes the run's "
            "configuration; with that of a recipe: drpo train RECIPE --model RUN"
        )
    _require_warm_up_spec(arguments)
    if "data" in given(arguments):
        return _on_data(arguments)
    known = f"known: {', '.join(RECIPES)}; on your own data: drpo train --data my.jsonl"
    name, rest = leading(arguments, "RECIPE", f"train: name a recipe first, or the file of one; {known}")
    if arguments[0].startswith("-"):  # --help alone
        print(f"{USAGE}\nRecipes:")
        return recipes([])
    require_recipe(name)
    prog = f"drpo train {as_typed(name)}"
    require_options(rest, TrainOptions, prog)
    run, options = import_named("drpo.cli.overrides", "recipe_run", "command")(name, rest, prog, TrainOptions)
    return int(import_named("drpo.cli.train", "begin", "command")(run, options))


def _require_warm_up_spec(arguments: list[str]) -> None:
    """Raise for a warm-up that is written in other words, before the command line is parsed.

    Raises:
        InputError: the message has the spec.
    """
    text = option_value(arguments, "warm_up")
    if text is None:
        return
    behind = arguments[arguments.index(text) + 1 :][:1] if text in arguments else []
    require_spec(" ".join([text, *(word for word in behind if word.isdecimal())]))


def _on_data(arguments: list[str]) -> int:
    if not arguments[0].startswith("-"):
        raise InputError(f"train {arguments[0]}: --data has a recipe of its own; leave {arguments[0]} out")
    if "task" in given(arguments):
        raise InputError("--task: --data is the task; leave one of the two out")
    prog = "drpo train --data"
    require_options(arguments, DataOptions, prog)
    require_data(str(option_value(arguments, "data")), "--data ")
    run, options = import_named("drpo.cli.own_data", "own_run", "command")(arguments, prog)
    return int(import_named("drpo.cli.train", "begin", "command")(run, options))


def require_data(source: str, option: str = "") -> None:
    """Raise if a path to data leads nowhere, before anything is imported.

    Args:
        source: as `drpo.tasks.Records.path`.
        option: what names it, for the message.

    Raises:
        InputError: no such file or folder; the message suggests the nearest.
    """
    path = Path(source).expanduser()
    is_path = source.endswith(DATA) or source.startswith((".", "/", "~")) or "/" not in source
    if not source or (is_path and not path.exists()):
        raise InputError(f"{option}{source}: no such file or folder{nearest_path(path)}")


def _resume(arguments: list[str]) -> int:
    name, rest = leading(arguments, "RUN", "train --resume: name the run's folder")
    folder, prog = Path(name), f"drpo train --resume {as_typed(name)}"
    if asks_for_help(rest) and not folder.is_dir():
        parse(ResumeOptions, rest, prog, more=CHANGES.format(", ".join(map(flag, MAY_CHANGE))))
    require_options(rest, ResumeOptions, prog)
    if "method" in given(rest):
        raise InputError(
            "--method: a resumed run changes by single fields, as --objective and --advantage; start a new run from "
            f"its weights: drpo train --from {as_typed(folder)} --method NAME"
        )
    require_may_change(given(rest) - {f.name for f in fields_of(ResumeOptions)}, folder)
    read_config(folder)
    changes, options = import_named("drpo.cli.overrides", "changes_of_run", "command")(
        folder, rest, prog, ResumeOptions
    )
    return int(import_named("drpo.cli.train", "resume", "command")(folder, options, changes))


def _from(arguments: list[str]) -> int:
    name, rest = leading(arguments, "RUN", "train --from: name the run's folder, or one of its checkpoints")
    prog, (folder, step) = f"drpo train --from {as_typed(name)}", checkpoint_named(Path(name))
    _require_warm_up_spec(rest)
    if asks_for_help(rest) and not folder.is_dir():
        more = (
            "The other options are the fields of a run; `drpo train --from RUN --help` shows them, with RUN's values."
        )
        parse(FromOptions, rest, prog, more=more)
    require_options(rest, FromOptions, prog)
    if "model" in given(rest):
        raise InputError(f"--model: the weights are those of {name}; leave it out")
    read_config(folder)
    return int(import_named("drpo.cli.start", "begin_from", "command")(folder, step, rest, prog))


def recipes(arguments: list[str]) -> int:
    """`drpo recipes`."""
    if arguments and not asks_for_help(arguments):
        raise InputError(f"recipes takes no arguments, not {arguments[0]!r}; try `drpo train RECIPE --help`")
    if arguments:
        print("usage: drpo recipes\n\nList what `drpo train RECIPE` can train.\n\n  drpo train smoke\n\nRecipes:")
    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        print(f"  {name:<{width}}  {recipe.about}")
    print("\nEach trains with DRPO; --method grpo, dapo, ppo, ... trains as another paper does (drpo train --help).")
    return 0
