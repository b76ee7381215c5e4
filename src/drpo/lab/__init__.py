"""Comparing methods over seeds, and what may be claimed of them."""
