"""What a run was, in words and figures: its header, its configuration against the defaults, its seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from drpo.recipes import RECIPES, find
from drpo.report.figures import COLORS, Plot, brief, make_figure, step_axis
from drpo.report.words import mean_score, no_gradient, paired_change, where_it_held
from drpo.terminal import Sheet
from drpo.train.config import Run, arithmetic, flat_json
from drpo.train.ending import recorded_reason
from drpo.train.no_gradient import counted
from drpo.train.summary import PHASES, n_updates
from drpo.train.warned import raised

Records = Sequence[Mapping[str, Any]]
MOST_BARS = 200
_HATCHES = ("", "/", "x", "-", "\\", ".", "+")


def run_summary(
    run: Run, environment: Mapping[str, Any], metrics: Records, evaluations: Records = ()
) -> list[tuple[str, str]]:
    """Return what ran, as pairs of a name and a value.

    Args:
        run: the configuration.
        environment: of environment.json; may be empty.
        metrics: of the steps done.
        evaluations: so far.
    """
    specs = flat_json(run)
    pairs = [
        ("model", run.model.name),
        ("task", specs["task"]),
        ("objective", specs["objective"]),
        ("each step", arithmetic(run)),
        ("steps done", f"{len(metrics)} of {run.trainer.steps}"),
        ("optimizer", f"{specs['optimizer']}, {specs['schedule']}"),
        ("seed", str(run.seed)),
        ("tokens", _tokens(metrics)),
        *_no_gradient(metrics),
        *((f"warning {w['name']}", f"{where_it_held(w)}: {w['text']}") for w in raised(metrics, evaluations)),
    ]
    return pairs + ([("machine", machine(environment))] if environment else [])


def ended_early(folder: Path) -> list[tuple[str, str]]:
    """Return why a run ended early, as a pair; none where it did not, or goes on."""
    reason = recorded_reason(folder)
    return [] if reason is None else [("ended early", reason)]


def _tokens(metrics: Records) -> str:
    sampled, trained = (sum(m.get(f"{name}_tokens", 0) for m in metrics) for name in ("sampled", "trained"))
    return f"{sampled:,} sampled, {trained:,} trained on"


def _no_gradient(metrics: Records) -> list[tuple[str, str]]:
    counts = counted(metrics)
    steps, updates = no_gradient(counts | {"steps": len(metrics), "updates": n_updates(metrics)})
    idle = counts["zero_grad_updates"] or counts["zero_grad_steps"]
    warned = [] if counts["warning"] is None else [("warning", counts["warning"])]
    return ([("no gradient", f"{steps}; {updates}")] if idle else []) + warned


def machine(environment: Mapping[str, Any]) -> str:
    """Say on what a run ran, in a line.

    Example:
        >>> machine({"processor": "EPYC", "cores": 2, "accelerator": None, "versions": {"torch": "2.13", "drpo": None}})
        'EPYC, 2 cores; torch 2.13'
    """
    versions = environment.get("versions", {})
    shown = ", ".join(f"{name} {versions[name]}" for name in ("drpo", "torch", "transformers") if versions.get(name))
    parts = [environment.get("accelerator"), environment.get("processor"), f"{environment.get('cores')} cores"]
    return "; ".join(text for text in (", ".join(str(p) for p in parts if p), shown) if text)


def held_out(evaluations: Records, cold: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """Return the held-out mean of the first evaluation and of the last, each once, with what is to be said of it.

    Args:
        evaluations: of the run.
        cold: that before its warm-up, which comes first; None without one.
    """
    known = [e for e in evaluations if e.get("reward_mean") is not None]
    first = "before training" if cold is None else "after the warm-up"
    before = [] if cold is None else [_held_out(cold, "before the warm-up")]
    return [*before, *(_held_out(e, first) for e in (known if len(known) < 2 else [known[0], known[-1]]))]


def _held_out(e: Mapping[str, Any], first: str) -> tuple[str, str]:
    """What is said of an evaluation; `first` is when that of step 0 was."""
    mean, interval = mean_score(e["reward_mean"], e["low"], e["high"])
    when = first if e["step"] == 0 else f"after step {e['step']}"
    problems = f"{e['n_problems']:,} problems, avg@{e['n_samples']}"
    text = f"{when}: {mean} ({', '.join(filter(None, (interval, problems)))})"
    if e.get("difference") is None:
        return mean, text
    change, sure = paired_change(e["difference"], e["difference_low"], e["difference_high"], bool(interval))
    return mean, f"{text}; {change} from step 0{sure and f' ({sure})'}"


def configuration(run: Run) -> tuple[str, Sheet, Sheet]:
    """Return what a run is compared with, the fields that differ from it, and every field.

    A column each for this run, the recipe that it is named after, and `Run`'s defaults.
    """
    recipe = run.name if run.name in RECIPES else None
    bases = {f"recipe {recipe}": find(recipe)} if recipe else {}
    columns = {name: texts(flat_json(r)) for name, r in {"this run": run, **bases, "default": Run()}.items()}
    base = list(columns)[1]
    rows = tuple((field, *(column[field] for column in columns.values())) for field in columns["this run"])
    head = ("field", *columns)
    differing = Sheet("", head, tuple(row for row in rows if row[1] != row[2]))
    return f"the {base}{'' if recipe else 's'}", differing, Sheet("Every field", head, rows)


def texts(record: Mapping[str, Any]) -> dict[str, str]:
    """The values of a record as text; - where there is none."""
    return {name: "-" if value is None else str(value) for name, value in record.items()}


def phase_seconds(timing: Records) -> dict[str, dict[int, float]]:
    """Return the seconds of each phase at each step.

    Evaluations and checkpoints count to the step that they follow; step 0 is before training.
    """
    steps = sorted({r["step"] for r in timing})
    names = dict.fromkeys([*PHASES, *(name for r in timing for name in r if name != "step")])
    phases = {name: dict.fromkeys(steps, 0.0) for name in names}
    for record in timing:
        for name, seconds in record.items():
            if name != "step":
                phases[name][record["step"]] += seconds
    return {name: at for name, at in phases.items() if any(at.values())}


def timeline_plot(phases: Mapping[str, Mapping[int, float]]) -> Plot:
    """Return the seconds of each phase over the run, a bar for each step, or for several where there are many.

    Args:
        phases: name -> step -> seconds; at least one.
    """
    steps = list(next(iter(phases.values())))
    size = -(-len(steps) // MOST_BARS)
    starts = range(0, len(steps), size)
    traces = []
    for i, (name, at) in enumerate(phases.items()):
        seconds, hatch = list(at.values()), {"shape": _HATCHES[i % len(_HATCHES)], "size": 7, "solidity": 0.2}
        bars = {"x": [steps[k] for k in starts], "y": [fmean(seconds[k : k + size]) for k in starts]}
        form = {"marker": {"color": COLORS[i % len(COLORS)], "pattern": hatch}, "hovertemplate": "%{y:.3~g} s"}
        traces.append({"type": "bar", "name": name, **bars, **form})
    axes = {"xaxis": step_axis(steps), "yaxis": {"title": {"text": "seconds"}}}
    figure = make_figure(traces, 340, barmode="stack", hovermode="x unified", legend={"traceorder": "normal"}, **axes)
    caption = f"A bar is the mean of {size} steps." if size > 1 else ""
    return Plot("timeline", "Seconds of each phase", figure, caption, wide=True)


def shares(phases: Mapping[str, Mapping[int, float]]) -> Sheet:
    """Return a row for each phase: its name, its seconds in all, and its share of them."""
    totals = {name: sum(at.values()) for name, at in phases.items()}
    rows = tuple((name, brief(t), f"{t / sum(totals.values()):.1%}") for name, t in totals.items())
    return Sheet("The whole run", ("phase", "seconds", "share"), rows)
