"""`drpo weights`: its options."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from drpo.cli.options import parse
from drpo.cli.output import PICTURES, require_file
from drpo.errors import InputError
from drpo.spec import import_named

SHOWN = ("drpo(0.2)", "dppo(0.2)", "ppo(0.2,0.28)", "spo(0.2)", "drpo(12.5)")


@dataclass(frozen=True)
class WeightsOptions:
    """Draw the gradient weight w of objectives over pi, where d loss / d logp = -A r w, on the screen.

      drpo weights 'drpo(0.2)' 'ppo(0.2,0.28)' --mu 0.3 --out weights.svg

    Args:
        objectives: specs: 'drpo(0.2)' 'ppo(0.2,0.28)' ...
        mu: the sampler's probability of the token, one panel each.
        out: also draw a picture, there also for A < 0: a PNG, SVG or PDF by its ending.
    """

    objectives: tyro.conf.Positional[tuple[str, ...]] = SHOWN
    mu: tuple[float, ...] = (0.02, 0.3, 0.7)
    out: Path | None = None


def weights(arguments: list[str]) -> int:
    """`drpo weights OBJECTIVE ...`."""
    options = parse(WeightsOptions, arguments, "drpo weights")
    for mu in options.mu:
        if not 0 < mu <= 1:
            raise InputError(f"--mu {mu}: a probability in (0, 1]")
    if options.out is not None:
        require_file("--out", options.out, PICTURES)
    return int(import_named("drpo.cli.weights", "weights", "command")(options))
