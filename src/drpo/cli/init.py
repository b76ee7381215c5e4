"""The implementation of `drpo init`: asks, writes a recipe, shows prompts, and runs the doctor's short form."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.text import Text
from transformers.utils import logging as transformers_logging

from drpo.cli.commands.doctor import DoctorOptions
from drpo.cli.commands.init import InitOptions
from drpo.cli.commands.train import require_data
from drpo.cli.doctor import doctor
from drpo.cli.output import refusing, require_file
from drpo.errors import InputError, as_typed, nearest, printable
from drpo.files import write_text
from drpo.model import loading
from drpo.model.names import require_there
from drpo.recipes import DATA, find
from drpo.recipes.own_data import OwnData, fitted, neutral, read_own
from drpo.recipes.written import recipe_text
from drpo.rewards import REGISTRY
from drpo.rollout import encode_prompt
from drpo.spec import parse_spec
from drpo.tasks.columns import columns_of, guess_fields
from drpo.tasks.rows import read_rows
from drpo.terminal import Terminal
from drpo.train.config import Run

SHOWN = 3
"""Prompts that are shown."""


def init(data: str | None, options: InitOptions) -> int:
    """Write a recipe for a user's data; return 1 if the doctor finds something broken.

    Args:
        data: the file, folder or hub id; None asks for it.
        options: what is not asked.
    """
    transformers_logging.disable_progress_bar()
    require_file("--out", options.out)  # before a hundred answers are sampled
    asks = not options.yes and sys.stdin.isatty()
    own, model = _asked(data, options) if asks else (_unasked(data, options), options.model)
    require_there(model)
    task = read_own(own)
    if asks and options.reward is None:
        about = "reward: exact_number, exact_match, math_verify, or your own module:function"
        reward = _ask(about, task.reward_name, lambda text: parse_spec(text, REGISTRY) and None)
        task = task if reward == task.reward_name else read_own(replace(own, reward=reward))
    console = Terminal()
    run = fitted(neutral(task, model), given=())
    text = recipe_text(run, str(options.out))
    advice = "name a file in a folder that is there"
    with refusing(f"--out {options.out}", advice):
        write_text(options.out, text)
    written = find(str(options.out))
    _show_prompts(console, written)
    console.print(f"wrote {options.out}", soft_wrap=True)
    if options.doctor:  # which says how many problems train
        status = doctor(str(options.out), written, DoctorOptions(quick=True))
    else:
        status = 0
        console.print(f"{own.path}: {task.counts}", soft_wrap=True)
    console.print(f"next: drpo train {as_typed(options.out)}", soft_wrap=True)
    return status


def _unasked(data: str | None, options: InitOptions) -> OwnData:
    path = data or _only_file()
    if path is None:
        raise InputError("init: name the data: drpo init my.jsonl")
    return OwnData(path, options.prompt_field, options.answer_field, options.system, options.reward, options.shots)


def _only_file() -> str | None:
    """The only file of data in the working folder."""
    files = [path.name for path in Path().iterdir() if path.suffix in DATA]
    return files[0] if len(files) == 1 else None


def _asked(data: str | None, options: InitOptions) -> tuple[OwnData, str]:
    """Ask for what the options do not say; each question has a default."""
    path = data or _ask("data: a .jsonl, .json, .csv or .parquet file", _only_file() or "", require_data)
    default = InitOptions()
    same = options.model == default.model
    model = _ask("model: smollm2-135m, a folder or a hub id", options.model, require_there) if same else options.model
    columns = columns_of(read_rows(path, "train"))
    try:
        guesses = [guess.value for guess in guess_fields(columns, options.prompt_field, options.answer_field, path)]
    except InputError:  # which is what asking is for
        guesses = ["", ""]

    def require_column(name: str) -> None:
        if name.partition(".")[0] not in columns:
            raise InputError(f"no column {name!r}{nearest(name, columns)}")

    listed = printable(", ".join(columns))
    prompt = options.prompt_field or _ask(f"column of the question ({listed})", guesses[0], require_column)
    answer = options.answer_field or _ask(f"column of the answer ({listed})", guesses[1], require_column)
    system = options.system if options.system is not None else _ask("system message", "") or None
    shots = options.shots or int(_ask("rows to show as examples before every question", "0", _require_number))
    return OwnData(path, prompt, answer, system, options.reward, shots), model


def _ask(question: str, default: str, check: Callable[[str], None] = lambda text: None) -> str:
    """Return the answer to a question, asked until it passes the check; the default where it is empty."""
    while True:
        try:
            answer = input(f"{question} [{printable(default) or 'none'}]: ").strip() or default
        except EOFError:
            print()
            check(default)
            return default
        try:
            check(answer)
            return answer
        except InputError as error:
            print(f"  {printable(str(error))}")


def _require_number(text: str) -> None:
    if not text.isdecimal():
        raise InputError(f"{text!r}: must be a whole number, 0 or more")


def _show_prompts(console: Terminal, run: Run) -> None:
    """Show the first prompts as the model reads them: by its chat template, with special tokens."""
    _, tokenizer = loading.load(run.model.name)
    for number, problem in enumerate(run.data.task.sample(SHOWN, 0, run.seed), 1):
        ids = encode_prompt(tokenizer, problem)
        title = f"prompt {number}, as the model reads it: {len(ids)} tokens; the answer is {problem.answer!r}"
        console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(Text(tokenizer.decode(ids)), soft_wrap=True)
