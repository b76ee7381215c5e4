"""Side-by-side measurements of drpo and of what it is compared with; `python -m benchmarks --help` says how."""
