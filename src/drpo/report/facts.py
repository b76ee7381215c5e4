"""What a run was, in words and figures: its header, its configuration against the defaults, its seconds."""

from collections.abc import Mapping, Sequence
from typing import Any

from drpo.objectives import spell
from drpo.recipes import RECIPES, find
from drpo.report.step_table import no_gradient
from drpo.train.config import Run, arithmetic, to_json
from drpo.train.no_gradient import counted
from drpo.train.summary import PHASES, n_updates

Records = Sequence[Mapping[str, Any]]


def header_facts(run: Run, environment: Mapping[str, Any], metrics: Records) -> list[tuple[str, str]]:
    """Return what ran, as pairs of a name and a value.

    Args:
        run: the configuration.
        environment: of environment.json; may be empty.
        metrics: of the steps done.
    """
    facts = [
        ("model", run.model),
        ("task", to_json(run)["task"]),
        ("objective", spell(run.objective)),
        ("each step", arithmetic(run)),
        ("steps done", f"{len(metrics)} of {run.steps}"),
        ("optimizer", f"{to_json(run)['optimizer']}, {to_json(run)['schedule']}"),
        ("seed", str(run.seed)),
        ("tokens", _tokens(metrics)),
        *_no_gradient(metrics),
    ]
    return facts + ([("machine", machine(environment))] if environment else [])


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


def accuracies(evaluations: Records) -> list[dict[str, Any]]:
    """Return the first evaluation and the last, each once."""
    known = [e for e in evaluations if e.get("accuracy") is not None]
    wanted = ("step", "accuracy", "low", "high", "n_problems", "n_samples")
    later = ("difference", "difference_low", "difference_high")  # which records of earlier versions do not have
    ends = known if len(known) < 2 else [known[0], known[-1]]
    return [{name: e[name] for name in wanted} | {name: e.get(name) for name in later} for e in ends]


def configuration(run: Run) -> dict[str, Any]:
    """Return every field with its value, `Run`'s default, and that of the recipe that the run is named after.

    Returns:
        "recipe", its name or None, and "rows": [field, value, recipe's value or None, default], each as text.
    """
    recipe = run.name if run.name in RECIPES else None
    columns = [flat(to_json(r)) for r in (run, find(recipe) if recipe else Run(), Run())]
    rows = [[name, value, columns[1][name] if recipe else None, columns[2][name]] for name, value in columns[0].items()]
    return {"recipe": recipe, "rows": rows}


def flat(record: Mapping[str, Any]) -> dict[str, str]:
    """Nested fields by dotted names, as the command line has them."""
    found: dict[str, str] = {}
    for name, value in record.items():
        inner = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
        found |= {k: "-" if v is None else str(v) for k, v in inner.items()}
    return found


def timeline(timing: Records) -> dict[str, Any]:
    """Return the seconds of each phase at each step: {"step": [S], "phases": {name: [S]}}.

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
    return {"step": steps, "phases": {name: values for name, values in phases.items() if any(values)}}
