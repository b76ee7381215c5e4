"""The implementation of `drpo train`: training from a recipe or from a checkpoint."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from drpo import doctor
from drpo.cli.commands.train import ResumeOptions, TrainOptions
from drpo.cli.doctor import print_finding
from drpo.cli.folder import at_server, open_run, resume_flag
from drpo.cli.methods import print_method
from drpo.cli.options import flag
from drpo.cli.output import attempt, refusing, writing_folder
from drpo.cli.restart import restart
from drpo.cli.runs import reading
from drpo.errors import EngineError, InputError, as_typed, counted, nearest
from drpo.files import remove
from drpo.live.console import RunConsole
from drpo.live.track import TRACKERS, Tracked
from drpo.ranks import Ranks, is_elastic, process_group, select_device
from drpo.report.run_page import write_report
from drpo.report.words import (
    evaluations_in_order,
    mean_score,
    measure,
    no_gradient,
    paired_change,
    warm_up_in_words,
    warnings_in_words,
)
from drpo.terminal import Terminal
from drpo.train import loop
from drpo.train.callbacks import CallbackList
from drpo.train.config import Run, configure, to_json
from drpo.train.no_gradient import learnt_nothing
from drpo.train.origin import ORIGIN, START
from drpo.train.records import CHECKPOINTS, CONFIG, EVALUATIONS, FILES, MODEL, TIMING, TRIALS, read_json
from drpo.train.setup import Components, build
from drpo.train.stored import CURRICULUM, latest, step_of
from drpo.train.summary import summarise
from drpo.train.verify import is_finished
from drpo.train.warm_up import build_started, started, warms_up
from drpo.train.warmed import WARM_UP
from drpo.train.watchdog import Watchdog

LONGEST_STALL_S = 10**8
"""Three years; an upper bound that timers can represent."""

_REPORTED = ("reward", "mutated", "environment", "group")
"""Checks of the doctor whose faults are only reported: a reward or an environment may be meant as it is."""


def begin(run: Run, options: TrainOptions, start: Callable[[Path], None] | None = None) -> int:
    """Train a run in a new folder; called in every process.

    Args:
        run: the configuration.
        options: the options.
        start: writes the model that the run begins with into its folder, as `START`; None for the configuration's.
    """
    select_device()
    with process_group() as ranks:
        if ranks.is_main:
            print_method(Terminal(), run, options.method)
        if run.trainer.shard != "none" and ranks.size == 1 and not is_elastic():
            raise InputError(
                f"--shard {run.trainer.shard}: this is one process, which divides nothing; start several with torchrun "
                "--nproc-per-node, or leave it out"
            )
        if is_elastic() and options.out is None:
            raise InputError(
                "--out: name the run's folder, where processes that --max-restarts starts again find the run"
            )
        with ranks.reraise_on_all():
            wanted = options.out or (new_folder(Path("runs") / run.name) if ranks.is_main else Path())
        folder = ranks.gather([wanted])[0]
        run = run if start is None else configure(run, model=str(folder / START))
        with made_folder("--out", folder, ranks):
            _require_free(folder, run)
            ranks.barrier()  # before rank 0 writes to it
            with _started(start, folder, ranks):
                return _run(run, folder, options, ranks)


@contextmanager
def _started(start: Callable[[Path], None] | None, folder: Path, ranks: Ranks) -> Iterator[None]:
    """Let rank 0 write the model that a run begins with; it is removed again if nothing has come of the run."""
    try:
        with ranks.reraise_on_all():
            if ranks.is_main and start is not None:
                start(folder)
        yield
    finally:
        if ranks.is_main and start is not None and not (folder / CONFIG).exists():
            for name in (START, ORIGIN):
                remove(folder / name)


def resume(folder: Path, options: ResumeOptions, changes: Mapping[str, Any]) -> int:
    """Go on with a run from its last checkpoint; called in every process.

    Args:
        folder: of the run.
        options: the options.
        changes: fields of the run that change, by option, for `configure`.
    """
    select_device()
    with process_group() as ranks:
        stored = at_server(open_run(folder, options.trust_remote_code), folder, options.engine)
        stored = stored if options.device is None else configure(stored, device=options.device)
        run = configure(stored, **changes)
        with reading(folder):
            summarise(folder, run)  # the summary at the end must be computable; check it first
            _require_steps(folder, run, changes)
        if changes and warms_up(stored, folder):
            changed = ", ".join(map(flag, changes))
            raise InputError(f"{folder}: {changed} cannot change in its warm-up; go on with it first, without them")
        with made_folder("--resume", folder, ranks):
            return _run(run, folder, options, ranks)


def _require_steps(folder: Path, run: Run, changes: Mapping[str, Any]) -> None:
    """Raise unless a run can go on, and the changes have a step to act on."""
    last = latest(folder / CHECKPOINTS)
    done, steps = 0 if last is None else step_of(last), run.trainer.steps
    if changes and folder.resolve().parent.name == TRIALS:
        raise InputError(f"{folder}: a comparison's trial keeps its settings; train its configuration by itself")
    if is_finished(folder) and not (folder / CHECKPOINTS).exists():
        begin = f"drpo train --from {as_typed(folder)}"
        instead = f"{begin} begins a new run with its weights" if (folder / MODEL).exists() else ""
        why = "done, without a checkpoint, as a comparison's trials are"
        raise InputError(f"{folder}: {why}; {instead or 'nothing to do'}")
    if "steps" in changes and steps < done:
        raise InputError(
            f"--steps {steps}: {counted(done, 'step')} are done; give more, or begin a new run with the weights of an "
            f"earlier checkpoint: drpo train --from {as_typed(folder / CHECKPOINTS)}/step-N"
        )
    if changes and "steps" not in changes and done >= steps:
        raise InputError(f"{folder}: all {counted(steps, 'step')} are done, so nothing would change; add --steps")


def _require_free(folder: Path, run: Run) -> None:
    """Raise unless a folder is free for a new run: empty, or left by a run of the same kind before its first step.

    A run that failed before its first step is started again by the same command; where it has not even evaluated the
    untrained model, by a command with other options too.

    Raises:
        InputError: a run, or a part of one, is there.
    """
    done = [name for name in (WARM_UP, CHECKPOINTS, *FILES) if (folder / name).exists() and _holds(folder / name)]
    try:
        stored = read_json(folder / CONFIG)
    except (FileNotFoundError, InputError):  # missing, or half written because of a power failure
        if done:
            raise InputError(
                f"--out {folder}: {done[0]} is there, of a run whose {CONFIG} is missing or cannot be read; put that "
                "back and resume, or name another folder"
            ) from None
        return
    same = stored == to_json(run)
    begun = set(done) - {WARM_UP, TIMING, EVALUATIONS} if same else done
    if begun and not (is_elastic() and same):
        raise InputError(f"--out {folder}: a run is there; `drpo train --resume {as_typed(folder)}` goes on with it")


def _holds(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0


@contextmanager
def made_folder(option: str, folder: Path, ranks: Ranks) -> Iterator[None]:
    """Let rank 0 create the run's folder; if it fails, all ranks raise.

    Args:
        option: that names the folder, for messages.
        folder: to create.
        ranks: the processes that train together.
    """
    with ExitStack() as stack:
        with ranks.reraise_on_all():
            if ranks.is_main:
                stack.enter_context(writing_folder(option, folder))
        yield


def _run(run: Run, folder: Path, options: TrainOptions, ranks: Ranks) -> int:
    require_stall(options.stall)
    if options.restarts < 0:
        raise InputError(f"--restarts {options.restarts}: must be 0 or more")
    unknown = next((name for name in options.track if name not in TRACKERS), None)
    if unknown is not None:
        raise InputError(f"--track {unknown!r}{nearest(unknown, TRACKERS)}")
    transformers_logging.disable_progress_bar()
    again = partial(restart, folder, options.restarts, _resume_flags(run, options))
    if warms_up(run, folder):
        with _restarting(folder, again):
            built = _build_after_warm_up(run, folder, options, ranks, again)
    else:
        built = build(started(run, folder), ranks)
    if not isinstance(built, Components):
        _conclude(Terminal(), folder, built, None, resume_flag(run))
        return 128 + int(built["stopped_by_signal"])
    with closing(built.driver.engine), _restarting(folder, again):
        return _train_with(built, run, folder, options, again)


@contextmanager
def _restarting(folder: Path, again: Callable[[str], None]) -> Iterator[None]:
    """Begin the run again where its engine fails, in place of this process, unless no restart is left."""
    try:
        yield
    except EngineError as error:
        again(str(error))
        resume = f"drpo train --resume {as_typed(folder)}"
        raise EngineError(f"{error}; `{resume}` goes on from the last checkpoint") from error


def _build_after_warm_up(
    run: Run, folder: Path, options: TrainOptions, ranks: Ranks, again: Callable[[str], None]
) -> Components | dict[str, Any]:
    """Warm the run's model up, shown as the run is; see `build_started`."""
    console = Terminal()
    with RunConsole(console, console.is_terminal and not options.plain) as screen, ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(folder, options.stall, then=partial(again, "stalled")))
        return build_started(run, folder, CallbackList(screen, watchdog), _accepts(options), ranks)


def _train_with(
    components: Components, run: Run, folder: Path, options: TrainOptions, again: Callable[[str], None]
) -> int:
    ranks, console = components.ranks, Terminal()
    live = console.is_terminal and not options.plain
    # A single process cannot examine sharded weights.
    examined = options.doctor and ranks.is_main and not components.policy.equal_passes
    if ranks.all_reduce_max(examined and not _sound(run, components, console)):
        return 1
    if not ranks.is_main:
        with Watchdog(folder, options.stall, ranks.rank) as watchdog:
            loop.train(run, folder, watchdog, components, accept_records=_accepts(options))
        return 0
    with RunConsole(console, live) as screen, ExitStack() as stack:
        trackers = [Tracked(name, TRACKERS[name], screen.note) for name in dict.fromkeys(options.track)]
        tracked = [stack.enter_context(tracker) for tracker in trackers]
        watchdog = stack.enter_context(Watchdog(folder, options.stall, then=partial(again, "stalled")))
        together = CallbackList(screen, *tracked, watchdog)
        summary = loop.train(run, folder, together, components, accept_records=_accepts(options))
    report = attempt("report", folder, lambda: write_report(folder, run))
    _conclude(console, folder, summary, report, resume_flag(run))
    if summary["stopped_by_signal"]:
        return 128 + int(summary["stopped_by_signal"])
    return 1 if learnt_nothing(summary) else 0


def _sound(run: Run, components: Components, console: Console) -> bool:
    """Run the doctor's short form, print its notes and faults, and return whether training may begin."""
    with console.status("checking that the numbers are sound; --no-doctor goes without"):
        findings = list(doctor.examine(run, components, doctor.QUICK))
    shown = [f for f in findings if f.verdict != "ok"]
    sound = sum(f.verdict == "ok" for f in findings)
    console.print(f"doctor: {sound} of {len(findings)} checks sound")
    for finding in shown:
        print_finding(console, finding)
    broken = [f.check for f in findings if f.verdict == "broken" and f.check not in _REPORTED]
    if broken:
        console.print(
            f"not trained, because of {', '.join(broken)}; `drpo doctor` says more, --no-doctor trains anyway",
            soft_wrap=True,
        )
    return not broken


def _conclude(console: Console, folder: Path, summary: Mapping[str, Any], report: Path | None, again: str) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for when, evaluation in evaluations_in_order(summary):
        mean, interval = mean_score(evaluation["reward_mean"], evaluation["low"], evaluation["high"])
        name = measure(evaluation["reward_mean"], evaluation["pass_at"]["1"], bool(interval))
        table.add_row(f"{name} {when}", mean, interval)
    if (change := summary["evaluation_difference"]) is not None:
        shares = summary["evaluation_after"]["low"] is not None
        table.add_row("difference", *paired_change(change["value"], change["low"], change["high"], shares))
    if "warm_up" in summary:
        table.add_row("warm-up", *warm_up_in_words(summary["warm_up"]))
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary["seconds"].items())
    table.add_row("training", f"{summary['training_seconds']:.1f} s", f"in all: {spent}")
    share = summary["trained_tokens"] / max(1, summary["sampled_tokens"])
    trained = f"sampled; {summary['trained_tokens']:,} trained on ({share:.0%})"
    table.add_row("tokens", f"{summary['sampled_tokens']:,}", trained)
    if summary["zero_grad_updates"] or summary["zero_grad_steps"]:
        table.add_row("no gradient", *no_gradient(summary))
    if "curriculum" in summary:
        pools = ", ".join(f"{summary['curriculum'][name]:.0%} {name}" for name in ("active", "easy", "hard"))
        table.add_row("curriculum", pools, f"of the problems; {CURRICULUM} has their pass rates")
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.1f} GiB", "")
    if summary["reward_failed"]:
        kinds = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in summary["reward_failures"].items() if n)
        table.add_row("reward failed", f"{summary['reward_failed']:,}", f"completions: {kinds}")
    console.print(table)
    if summary["warnings"]:
        console.print(f"warnings     {warnings_in_words(summary['warnings'])}", soft_wrap=True)
    if report is not None:
        console.print(f"report       {report}", soft_wrap=True)
    if summary["finished"]:
        console.print(f"model        {folder / MODEL}\neverything   {folder}", soft_wrap=True)
    else:
        console.print(f"stopped early; go on with: drpo train --resume {as_typed(folder)}{again}", soft_wrap=True)


def _resume_flags(run: Run, options: TrainOptions) -> list[str]:
    """Return the options for `drpo train --resume` that keep this command's settings, without the doctor."""
    trackers = ["--track", *options.track] if options.track else []
    plain = ["--plain"] if options.plain else []
    accepts = ["--accept-records"] if _accepts(options) else []
    return ["--no-doctor", "--stall", str(options.stall), *plain, *trackers, *accepts, *resume_flag(run).split()]


def _accepts(options: TrainOptions) -> bool:
    return isinstance(options, ResumeOptions) and options.accept_records


def require_stall(seconds: float) -> None:
    """Raise unless a limit of a phase's time can be kept.

    Args:
        seconds: of `--stall`.
    """
    if not 0 <= seconds <= LONGEST_STALL_S:
        raise InputError(f"--stall {seconds}: must be from 0, which waits for ever, to {LONGEST_STALL_S:,} seconds")


def new_folder(wanted: Path) -> Path:
    """Create a new folder of this name, with a number appended if it is taken.

    Raises:
        InputError: it cannot be created, or processes that are started again would not find it.
    """
    if is_elastic():
        raise InputError(
            "--out: name the run's folder, in which processes that --max-restarts starts again find the run"
        )
    with refusing(f"--out {wanted}", "name a folder that can be written to"):
        wanted.parent.mkdir(parents=True, exist_ok=True)
        for candidate in chain([wanted], (wanted.with_name(f"{wanted.name}-{i}") for i in count(2))):
            with suppress(FileExistsError):
                candidate.mkdir()
                return candidate
    raise AssertionError("unreachable")
