"""Tests of the adapters: `test_weighing.py` needs torch only, the others each a framework (`make test-adapters`)."""
