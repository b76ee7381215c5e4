"""Rollout engines: they draw completions and report the log-probability of every token under the law they drew from."""

from drpo.rollout.engine import Engine, ScriptedEngine, encode_prompt
from drpo.rollout.transformers import TransformersEngine

__all__ = ["Engine", "ScriptedEngine", "TransformersEngine", "encode_prompt"]
