"""The trainer: `loop.train` is the algorithm; the other modules are what it calls."""
