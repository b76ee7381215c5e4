"""Reads the rollout dumps of other frameworks and says of them what the doctor and the warnings would have said."""
