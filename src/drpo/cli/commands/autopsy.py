"""`drpo autopsy`: its options."""

from dataclasses import dataclass
from pathlib import Path

from drpo.cli.options import parse
from drpo.cli.output import require_file
from drpo.errors import InputError
from drpo.spec import import_named


@dataclass(frozen=True)
class AutopsyOptions:
    """Say why a run collapsed, from the rollouts that its framework has written.

      drpo autopsy rollouts/ --held-out validation/ --out report.html

    Files are recognised that verl, TRL, prime-rl, SkyRL and open-instruct write, and JSON lines or parquet of our own
    description (docs/autopsy.md); folders are looked through. The first lines say what went wrong and at which step it
    began: the warnings that `drpo train` would have raised. Then come what `drpo doctor` would have said of the first
    step, what the dump cannot say and how the framework can be made to write it, and, where both log-probabilities are
    there, what other objectives would have done with a step.

    Args:
        held_out: files or folders with rollouts of its evaluations, in any of these formats.
        objective: what the run was trained with: its region is judged; default: what the framework does by default.
        objectives: specs that are replayed on a step; the first is compared with each of the others.
        step: the step to replay; default: where the first warning began.
        json: print everything as JSON.
        out: also write the report, one HTML file.
    """

    held_out: tuple[Path, ...] | None = None
    objective: str | None = None
    objectives: tuple[str, ...] = ("drpo(0.2)", "dppo(0.15)", "ppo(0.2,0.28)", "spo(0.2)", "none")
    step: int | None = None
    json: bool = False
    out: Path | None = None


def autopsy(arguments: list[str]) -> int:
    """`drpo autopsy FILE ... [--held-out FILE ...]`."""
    first = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    files = tuple(map(Path, arguments[:first]))
    options = parse(AutopsyOptions, arguments[first:], "drpo autopsy FILE ...")
    if not files:
        raise InputError("autopsy: name the files first that a framework has written, or their folder")
    if options.out is not None:
        require_file("--out", options.out)
    for path in (*files, *(options.held_out or ())):
        if not path.exists():
            raise InputError(f"{path}: no file there")
    return int(import_named("drpo.cli.autopsy", "autopsy", "command")(files, options))
