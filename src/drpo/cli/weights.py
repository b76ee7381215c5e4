"""The implementation of `drpo weights`."""

from drpo.cli.commands.weights import WeightsOptions
from drpo.errors import printable
from drpo.methods import parse_objective
from drpo.report.weights import draw_png, draw_text
from drpo.terminal import Terminal


def weights(options: WeightsOptions) -> int:
    """Draw the gradient weight of objectives, on the screen and, where asked, to a file."""
    drawn = [parse_objective(text) for text in options.objectives]
    width = min(100, Terminal().width)
    for mu in options.mu:
        print(draw_text(drawn, mu, 1.0, width))
    if options.out is not None:
        draw_png(drawn, options.mu, options.out)
        print(printable(f"drawn to {options.out} (there also for A < 0)"))
    return 0
