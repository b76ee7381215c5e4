"""Trust-region policy optimisation for language models: DRPO and what it is compared with."""

__version__ = "0.1.0"
