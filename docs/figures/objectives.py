"""Draws the figure of every page in docs/objectives: `python docs/figures/objectives.py`."""

from pathlib import Path

from PIL import Image

from drpo import objectives
from drpo.report.weights import draw_png
from drpo.spec import parse_spec

FIGURES = {
    "drpo": ("drpo(0.2)", "drpo(0.2, power=0.5)", "drpo(0.2, outside=0.15)", "drpo(12.5)"),
    "dppo": ("dppo(0.15)", "dppo(0.05, divergence='kl')", "drpo(0.15)"),
    "spo": ("spo(0.2)", "spo(12.5)", "drpo(0.2)"),
    "ppo": ("ppo(0.2, 0.28)", "ppo(0.2, 0.2, dual=3)", "dppo(0.15)"),
    "gspo": ("gspo(3e-4, 4e-4)", "ppo(0.2, 0.28)"),
    "cispo": ("cispo(0.2, 0.28)", "ppo(0.2, 0.28)"),
    "sapo": ("sapo(1.0, 1.05)", "ppo(0.2, 0.28)"),
    "masks": ("mask(0.15)", "ipo(0.3)", "icepop(0.5, 5.0)", "kpop(0.1)", "dppo(0.15)"),
    "penalties": ("penalty('tv', 0.5)", "penalty('k1', 0.5)", "penalty('k3', 0.5)", "drpo(0.2)"),
    "importance_sampling": ("none", "tis(2)", "drpo(0.2)"),
    "rejection": (
        "ppo(0.2, 0.28)*band(0.5, 2.0)",
        "drpo(0.2)*reject('seq_mean_k3', 0.05)",
        "none*opsm(0.3)",
        "reinforce*weight('token', 2.0)",
        "ppo(0.2, 0.28)*proximal*weight('token', 5.0)",
        "none*binary_kl(0.1)",
        "none*second_moment(0.04)",
    ),
    "likelihood": ("reinforce", "reinforce + 0.5*k2", "mask(0.2) + 0.1*k2", "k2"),
    "distillation": ("ref_kl(0.2)", "ref_kl(0.2) + 0.2*k2", "k2"),
    "cppo": ("cppo(0.2)", "dppo(0.2)", "drpo(0.2)"),
    "vespo": ("vespo", "gspo(3e-4, 4e-4)", "sapo(1.0, 1.05)"),
    "gmpo": ("gmpo(0.4, 0.4)", "gspo(3e-4, 4e-4)", "ppo(0.2, 0.28)"),
    "m2po": ("m2po(0.04)", "m2po_areal(0.04)", "ppo(0.2, 0.28)"),
    "topr": ("topr", "topr(0.5, 1.0)", "reinforce"),
    "drpo_eff": (
        "drpo_eff(0.2)",
        "drpo_eff(0.2, 'tanh_bound', 'fisher')",
        "drpo_eff(0.2, 'clip', low=0.5)",
        "drpo(0.2)",
    ),
    "entropy_covariance": ("clip_cov(0.2, 0.2)", "kl_cov(0.1, 0.5)", "ppo(0.2, 0.2)"),
}
"""Page -> what is drawn on it."""
MUS = (0.02, 0.3, 0.7)
FOLDER = Path(__file__).parent / "objectives"


def main() -> None:
    """Draw them all, in 128 colours, so that they stay small."""
    for name, spec in FIGURES.items():
        path = FOLDER / f"{name}.png"
        draw_png([parse_spec(text, objectives.REGISTRY) for text in spec], MUS, path)
        with Image.open(path) as drawn:
            small = drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        small.save(path, optimize=True)


if __name__ == "__main__":
    main()
