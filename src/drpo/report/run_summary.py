"""What a run was, in words and figures: its header, its configuration against the defaults, its seconds."""

from collections.abc import Mapping, Sequence
from typing import Any

from drpo.recipes import RECIPES, find
from drpo.report.figures import Plot, brief, make_figure, step_axis
from drpo.report.palette import COLORS
from drpo.report.words import mean_score, no_gradient, paired_change
from drpo.train.config import Run, arithmetic, flat_json
from drpo.train.no_gradient import counted
from drpo.train.summary import PHASES, n_updates

Records = Sequence[Mapping[str, Any]]
MOST_BARS = 200
_HATCHES = ("", "/", "x", "-", "\\", ".", "+")


def run_summary(run: Run, environment: Mapping[str, Any], metrics: Records) -> list[tuple[str, str]]:
    """Return what ran, as pairs of a name and a value.

    Args:
        run: the configuration.
        environment: of environment.json; may be empty.
        metrics: of the steps done.
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
    ]
    return pairs + ([("machine", machine(environment))] if environment else [])


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


def held_out(evaluations: Records) -> list[tuple[str, str]]:
    """Return the held-out mean of the first evaluation and of the last, each once, with what is to be said of it."""
    known = [e for e in evaluations if e.get("reward_mean") is not None]
    return [_held_out(e) for e in (known if len(known) < 2 else [known[0], known[-1]])]


def _held_out(e: Mapping[str, Any]) -> tuple[str, str]:
    mean, interval = mean_score(e["reward_mean"], e["low"], e["high"])
    when = "before training" if e["step"] == 0 else f"after step {e['step']}"
    problems = f"{e['n_problems']:,} problems, avg@{e['n_samples']}"
    text = f"{when}: {mean} ({', '.join(filter(None, (interval, problems)))})"
    if e.get("difference") is None:
        return mean, text
    change, sure = paired_change(e["difference"], e["difference_low"], e["difference_high"], bool(interval))
    return mean, f"{text}; {change} from step 0{sure and f' ({sure})'}"


def configuration(run: Run) -> dict[str, Any]:
    """Return every field with its value, that of the recipe that the run is named after, and `Run`'s default.

    Returns:
        "base": what the run is compared with; "head": of the columns; "rows": (whether it differs, its texts) each.
    """
    recipe = run.name if run.name in RECIPES else None
    bases = {f"recipe {recipe}": find(recipe)} if recipe else {}
    columns = {name: texts(flat_json(r)) for name, r in {"this run": run, **bases, "default": Run()}.items()}
    base = list(columns)[1]
    rows = [
        (value != columns[base][field], [field, *(column[field] for column in columns.values())])
        for field, value in columns["this run"].items()
    ]
    return {"base": f"the {base}{'' if recipe else 's'}", "head": ["field", *columns], "rows": rows}


def texts(record: Mapping[str, Any]) -> dict[str, str]:
    """The values of a record as text; - where there is none."""
    return {name: "-" if value is None else str(value) for name, value in record.items()}


def timeline(timing: Records) -> tuple[list[int], dict[str, list[float]]]:
    """Return the steps, and the seconds of each phase at each of them.

    Evaluations and checkpoints count to the step that they follow; step 0 is before training.
    """
    steps = sorted({r["step"] for r in timing})
    names = dict.fromkeys([*PHASES, *(name for r in timing for name in r if name != "step")])
    at = {step: i for i, step in enumerate(steps)}
    phases = {name: [0.0] * len(steps) for name in names}
    for record in timing:
        for name, seconds in record.items():
            if name != "step":
                phases[name][at[record["step"]]] += seconds
    return steps, {name: values for name, values in phases.items() if any(values)}


def timeline_plot(steps: Sequence[int], phases: Mapping[str, Sequence[float]]) -> Plot | None:
    """Return the seconds of each phase over the run, a bar for each step, or for several where there are many.

    Args:
        steps: of the run.
        phases: name -> seconds at each step.
    """
    if not steps:
        return None
    size = -(-len(steps) // MOST_BARS)
    starts = range(0, len(steps), size)
    traces = [
        {
            "type": "bar",
            "x": [steps[i] for i in starts],
            "y": [sum(seconds[i : i + size]) / len(seconds[i : i + size]) for i in starts],
            "name": name,
            "hovertemplate": "%{y:.3~g} s",
            "marker": {
                "color": COLORS[i % len(COLORS)],
                "pattern": {"shape": _HATCHES[i % len(_HATCHES)], "size": 7, "solidity": 0.2},
            },
        }
        for i, (name, seconds) in enumerate(phases.items())
    ]
    axes = {"xaxis": step_axis(steps), "yaxis": {"title": {"text": "seconds"}}}
    figure = make_figure(traces, 340, barmode="stack", hovermode="x unified", legend={"traceorder": "normal"}, **axes)
    totals = ", ".join(f"{name} {brief(sum(seconds))} s" for name, seconds in phases.items())
    caption = f"A bar is the mean of {size} steps." if size > 1 else ""
    return Plot("timeline", "Seconds of each phase", figure, f"In all: {totals}.", caption, wide=True)


def shares(phases: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """Return a row for each phase: its name, its seconds in all, and its share of them."""
    totals = {name: sum(seconds) for name, seconds in phases.items()}
    return [[name, brief(total), f"{total / sum(totals.values()):.1%}"] for name, total in totals.items()]
