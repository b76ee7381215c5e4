"""The `drpo` command."""

import difflib
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from transformers.utils import logging as transformers_logging

from drpo import __version__, models, objectives
from drpo.errors import InputError, nearest
from drpo.recipes import RECIPES, find
from drpo.report.console import LiveConsole, PlainConsole
from drpo.report.curves import draw_run
from drpo.report.weights import draw_png, draw_text
from drpo.rewards import RewardPool
from drpo.rollout import TransformersEngine, resolve_dtype
from drpo.spelling import parse_any
from drpo.tasks import TABLE as TASKS
from drpo.tasks import Task
from drpo.train.config import SPELLED, Run, from_json, to_json
from drpo.train.evaluate import evaluate
from drpo.train.loop import train
from drpo.train.session import MODEL, load_run
from drpo.train.setup import default_device
from drpo.types import Sampling

USAGE = f"""drpo {__version__}: trust-region policy optimisation for language models

  drpo train RECIPE [--FIELD VALUE ...]   train; drpo train RECIPE --help shows every field with its default
  drpo train --resume RUN                 go on with a run from its last checkpoint
  drpo eval MODEL|RUN [--task TASK ...]   accuracy on held-out problems, with a 95 % interval
  drpo recipes                            what there is to train
  drpo weights OBJECTIVE ...              draw the gradient weight of objectives, on the screen and to a PNG

Try:
  drpo train demo                         SmolLM2-135M learns to add on a CPU, in minutes
  drpo train demo --objective 'dppo(0.15)' --seed 1 --out runs/dppo
  drpo weights 'drpo(0.2)' 'dppo(0.2)' 'ppo(0.2,0.28)' 'spo(0.2)'

Objectives, tasks and rewards are written as calls, in quotes: drpo(0.2), addition(1, 50), records('my.jsonl').
Your own are module:name. `drpo COMMAND --help` says more."""

Options = TypeVar("Options")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 1 failed, 2 bad input, 128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.path.insert(0, str(Path.cwd()))  # so that one's own module:name can be imported
    _show_log()
    try:
        return _dispatch(arguments)
    except InputError as error:
        return _fail(str(error), 2)
    except FloatingPointError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        return 141


def _dispatch(arguments: list[str]) -> int:
    commands: Mapping[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "recipes": _recipes,
        "weights": _weights,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, *rest = arguments
    if name not in commands:
        raise InputError(f"unknown command {name!r}{nearest(name, commands)}")
    return commands[name](rest)


def _fail(message: str, status: int) -> int:
    print(f"drpo: {' '.join(message.split())}", file=sys.stderr)
    return status


def _show_log() -> None:
    """Show what drpo says of its progress; libraries only where something fails."""
    log = logging.getLogger("drpo")
    log.setLevel(logging.INFO)
    if not log.handlers:
        console = Console(stderr=True)
        log.addHandler(RichHandler(console=console, show_time=False, show_level=False, show_path=False))
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()


# ---- train ----


@dataclass(frozen=True)
class TrainOptions:
    """Where a run goes and how it is shown.

    Args:
        out: folder of the run; default runs/NAME, with a number behind it where that is taken.
        plain: plain lines in place of the live table.
    """

    out: Path | None = None
    plain: bool = False


def _train(arguments: list[str]) -> int:
    """`drpo train RECIPE [overrides]` or `drpo train --resume RUN`."""
    if arguments and arguments[0] == "--resume":
        if len(arguments) < 2:
            raise InputError("train --resume: name the run's folder")
        folder = Path(arguments[1])
        options = _parse(TrainOptions, arguments[2:], f"drpo train --resume {folder}")
        return _run(load_run(folder), folder, options)
    if not arguments or arguments[0].startswith("-"):
        if "--help" in arguments or "-h" in arguments:
            print("drpo train RECIPE [--FIELD VALUE ...]\ndrpo train --resume RUN\n\nrecipes:")
            return _recipes([])
        raise InputError(f"train: name a recipe first; known: {', '.join(RECIPES)}")
    run, options = _overridden(find(arguments[0]), arguments[1:], f"drpo train {arguments[0]}")
    folder = options.out or _free_folder(Path("runs") / run.name)
    if (folder / "config.json").exists():
        raise InputError(f"--out {folder}: a run is there; `drpo train --resume {folder}` goes on with it")
    return _run(run, folder, options)


def _run(run: Run, folder: Path, options: TrainOptions) -> int:
    console = Console()
    live = console.is_terminal and not options.plain
    with LiveConsole(console) if live else PlainConsole(console) as watch:
        summary = train(run, folder, watch)
    picture = draw_run(folder, run)
    _conclude(console, folder, summary, picture)
    return 128 + summary["stopped_by_signal"] if summary["stopped_by_signal"] else 0


def _conclude(console: Console, folder: Path, summary: Mapping[str, Any], picture: Path) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for when in ("before", "after"):
        found = summary[f"accuracy_{when}"]
        if found:
            interval = f"95 % interval {found['low']:.1%} to {found['high']:.1%}" if found["low"] is not None else ""
            table.add_row(f"accuracy {when}", f"{found['accuracy']:.1%}", interval)
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary["seconds"].items())
    table.add_row("training", f"{summary['training_seconds']:.1f} s", f"in all: {spent}")
    table.add_row("tokens", f"{summary['sampled_tokens']:,}", f"sampled; {summary['trained_tokens']:,} trained on")
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.1f} GiB", "")
    console.print(table)
    console.print(f"curves       {picture}", soft_wrap=True, highlight=False)
    if summary["finished"]:
        console.print(f"model        {folder / MODEL}\neverything   {folder}", soft_wrap=True, highlight=False)
    else:
        console.print(f"stopped early; go on with: drpo train --resume {folder}", soft_wrap=True, highlight=False)


def _free_folder(wanted: Path) -> Path:
    candidates = [wanted, *(wanted.with_name(f"{wanted.name}-{i}") for i in range(2, 10000))]
    return next(c for c in candidates if not c.exists())


# ---- eval ----


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate on, and how to draw the completions.

    Args:
        task: held-out problems of addition(1, 50), gsm8k, records('my.jsonl', ...), ...; default: the run's own.
        reward: exact_number, math_verify, module:function; default: the task's own.
        problems: how many.
        sampling: how completions are drawn; samples is k of avg@k. Greedy and truncated laws are fine here.
        precision: auto, fp32, bf16.
        seed: of the sampling.
        json: print the result as JSON.
    """

    task: str | None = None
    reward: str | None = None
    problems: int = 200
    sampling: Sampling = field(default_factory=lambda: Sampling(samples=1))
    precision: str = "auto"
    seed: int = 0
    json: bool = False


def _eval(arguments: list[str]) -> int:
    """`drpo eval MODEL|RUN [options]`."""
    if not arguments or arguments[0].startswith("-"):
        if "--help" not in arguments and "-h" not in arguments:
            raise InputError("eval: name a model or a run's folder first")
        arguments = ["MODEL|RUN", *arguments]
    name, *rest = arguments
    run = load_run(Path(name)) if (Path(name) / "config.json").exists() and (Path(name) / MODEL).exists() else None
    default = EvalOptions()
    if run is not None:
        default = replace(default, sampling=replace(run.sampling, samples=run.eval_samples), problems=run.eval_problems)
    options = _parse(EvalOptions, rest, f"drpo eval {name}", default)
    task, reward = _examination(run, options)
    held_out = task.held_out(options.problems)
    model, tokenizer = models.load(str(Path(name) / MODEL) if run is not None else name)
    device = default_device()
    engine = TransformersEngine(model, tokenizer, dtype=resolve_dtype(options.precision, device), device=device)
    with RewardPool(reward) as pool:
        result, _ = evaluate(engine, held_out, options.sampling, pool, seed=options.seed, step=0)
    if options.json:
        print(json.dumps(asdict(result)))
    else:
        _print_evaluation(name, asdict(result))
    return 0


def _examination(run: Run | None, options: EvalOptions) -> tuple[Task, Any]:
    if options.task is None and run is None:
        raise InputError(f"eval: --task is needed for a model that is not a run; known: {', '.join(TASKS)}")
    own = run and (run.eval_task or run.task)
    task: Task = own if options.task is None and own else parse_any(str(options.task), TASKS, "task")
    if options.reward is not None:
        return task, SPELLED["reward"][0](options.reward)
    return task, (run.reward if run and run.reward and options.task is None else task.reward)


def _print_evaluation(name: str, result: Mapping[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row(f"avg@{result['n_samples']}", f"{result['accuracy']:.1%}")
    table.add_row("95 % interval", f"{result['low']:.1%} to {result['high']:.1%}")
    for k, value in result["pass_at"].items():
        table.add_row(f"pass@{k}", f"{value:.1%}")
    table.add_row("problems", str(result["n_problems"]))
    table.add_row("mean length", f"{result['mean_length']:.1f} tokens, {result['truncated']:.0%} truncated")
    if result["failed"]:
        table.add_row("not marked", f"{result['failed']} completions, which count nowhere")
    console = Console()
    console.print(f"[bold]{name}[/bold]")
    console.print(table)


# ---- recipes, weights ----

SHOWN = ("drpo(0.2)", "dppo(0.2)", "ppo(0.2,0.28)", "spo(0.2)", "drpo(12.5)")


def _recipes(arguments: list[str]) -> int:
    """`drpo recipes`."""
    if arguments and arguments[0] not in ("-h", "--help"):
        raise InputError(f"recipes takes no arguments, not {arguments[0]!r}; try `drpo train RECIPE --help`")
    width = max(map(len, RECIPES))
    for name, make in RECIPES.items():
        print(f"  {name:<{width}}  {(make.__doc__ or '').splitlines()[0]}")
    return 0


@dataclass(frozen=True)
class WeightsOptions:
    """Draw w, where d loss / d logp = -A r w, over pi.

    Args:
        objectives: as spelled: 'drpo(0.2)' 'ppo(0.2,0.28)' ...
        mu: the sampler's probability of the token, one panel each.
        out: the PNG.
    """

    objectives: tyro.conf.Positional[tuple[str, ...]] = SHOWN
    mu: tuple[float, ...] = (0.02, 0.3, 0.7)
    out: Path = Path("weights.png")


def _weights(arguments: list[str]) -> int:
    """`drpo weights OBJECTIVE ...`."""
    options = _parse(WeightsOptions, arguments, "drpo weights")
    drawn = [objectives.parse(text) for text in options.objectives]
    for mu in options.mu:
        if not 0 < mu <= 1:
            raise InputError(f"--mu {mu}: a probability in (0, 1]")
    draw_png(drawn, options.mu, options.out)
    width = min(100, Console().width)
    for mu in options.mu:
        print(draw_text(drawn, mu, 1.0, width))
    print(f"drawn to {options.out} (there also for A < 0)")
    return 0


# ---- options: tyro reads primitives; what is spelled as a call is read by from_json, with its own messages ----


def _overridden(run: Run, arguments: list[str], prog: str) -> tuple[Run, TrainOptions]:
    """Apply `--field value` overrides to a recipe's run."""
    defaults = to_json(run)
    described = _described(Run)
    columns: list[Any] = []
    for f in fields(Run):
        value = getattr(run, f.name)
        kind: Any = str if f.name in SPELLED and value is not None else str | None if f.name in SPELLED else f.type
        shown = value if f.name not in SPELLED else defaults[f.name]
        columns.append((f.name, Annotated[kind, tyro.conf.arg(help=described[f.name])], field(default=shown)))
    for f in fields(TrainOptions):
        help_text = _described(TrainOptions)[f.name]
        columns.append((f.name, Annotated[f.type, tyro.conf.arg(help=help_text)], field(default=f.default)))
    flat = make_dataclass("Fields", columns, frozen=True)
    given: Any = _parse(flat, arguments, prog, description=(Run.__doc__ or "").split("Args:")[0])
    record = {f.name: getattr(given, f.name) for f in fields(Run)}
    record["sampling"] = vars(record["sampling"])
    options = TrainOptions(**{f.name: getattr(given, f.name) for f in fields(TrainOptions)})
    return from_json(record), options


def _described(kind: type) -> dict[str, str]:
    """The Args section of a docstring: name -> text."""
    section = (kind.__doc__ or "").split("Args:")[1].split("Raises:")[0]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _parse(
    kind: type[Options], arguments: list[str], prog: str, default: Options | None = None, description: str | None = None
) -> Options:
    """Parse with tyro; what it would print in a box over many lines becomes one line of an InputError."""
    if "-h" in arguments or "--help" in arguments:
        tyro.cli(kind, prog=prog, args=["--help"], description=description, **_default(default))
    said = io.StringIO()
    parsed: Options
    try:
        with redirect_stderr(said), redirect_stdout(said):
            parsed, unknown = tyro.cli(kind, prog=prog, args=arguments, return_unknown_args=True, **_default(default))
    except SystemExit:
        raise InputError(f"{_one_line(said.getvalue())}; see {prog} --help") from None
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], _flags(kind), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"see {prog} --help"
        raise InputError(f"unknown option {unknown[0]!r}; {hint}")
    return parsed


def _one_line(box: str) -> str:
    """The sentence inside one of tyro's boxes."""
    text = " ".join(re.sub(r"[│╭╮╰╯─+|]|-{3,}", " ", box).split())
    text = re.split(r"Argument helptext|For full helptext", text)[0]
    return re.sub(r"^(Parsing|Value) error ", "", text).strip()


def _default(default: object | None) -> dict[str, Any]:
    return {} if default is None else {"default": default}


def _flags(kind: Any) -> list[str]:
    """The long options that tyro makes of a dataclass."""
    flags: list[str] = []
    for f in fields(kind):
        name = f.name.replace("_", "-")
        nested = f.default if f.default is not MISSING else f.default_factory() if callable(f.default_factory) else None
        if isinstance(nested, Sampling):
            flags += [f"--{name}.{inner.name.replace('_', '-')}" for inner in fields(nested)]
        else:
            flags.append(f"--{name}")
    return flags


if __name__ == "__main__":
    sys.exit(main())
