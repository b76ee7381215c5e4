"""Reads the rollout dumps of other frameworks, and reports what the doctor and the warnings would have reported."""
