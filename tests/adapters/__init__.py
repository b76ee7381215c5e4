"""Tests of the adapters: those of the shared piece, NeMo-RL and slime need torch only, the others each a framework.

`make test-adapters` runs the latter.
"""
