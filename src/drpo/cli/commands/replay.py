"""`drpo replay`: its options."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from drpo.cli.options import parse
from drpo.cli.output import PICTURES, require_file
from drpo.cli.runs import require_run
from drpo.errors import InputError
from drpo.spec import import_named
from drpo.train.records import ROLLOUTS

PICTURE = "replay.png"


@dataclass(frozen=True)
class ReplayOptions:
    """Show what other objectives would have done with a batch that a run trained on.

    A run's rollouts.jsonl records every token with both log-probabilities and its advantage: all inputs of an
    objective. The replay computes how each objective weights the same tokens: the share of silenced and pulled-back
    tokens, the gradient by mu, the tokens at which two objectives differ most, and the cosine between their gradients.
    Objectives differ at the later updates of a step; on fresh samples nearly all agree. Nothing is trained.

      drpo replay runs/demo --objectives 'drpo(0.2)' 'ppo(0.2,0.28)' 'dppo(0.15)' --step 8 --json replay.json

    Args:
        run: folder of a run that has trained.
        objectives: specs: 'drpo(0.2)' 'ppo(0.2,0.28)' ...; the first is compared with each of the others.
        step: counted from 1; default: the last that trained anything.
        json: also write all figures to this file.
        out: the picture, a PNG, SVG or PDF by its ending; default replay.png in the run's folder.
    """

    run: tyro.conf.Positional[Path]
    objectives: tuple[str, ...] = ("drpo(0.2)", "dppo(0.15)", "ppo(0.2,0.28)", "spo(0.2)", "none")
    step: int | None = None
    json: Path | None = None
    out: Path | None = None


def replay(arguments: list[str]) -> int:
    """`drpo replay RUN [--objectives ...]`."""
    if not arguments:
        raise InputError("replay: name the folder of a run first")
    options = parse(ReplayOptions, arguments, "drpo replay")
    if options.out is not None:
        require_file("--out", options.out, PICTURES)
    if options.json is not None:
        require_file("--json", options.json)
    if not (options.run / ROLLOUTS).exists():  # the only file that a replay reads
        require_run(options.run)
    out = options.out or options.run / PICTURE
    if options.out is None:
        require_file("--out", out)
    return int(import_named("drpo.cli.replay", "replay", "command")(options, out))
