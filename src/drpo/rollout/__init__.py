"""Rollout engines: they draw completions and report the log-probability of every token under the law they drew from."""

from drpo.rollout.engine import Engine, NoEngine, PromptLimits, ScriptedEngine, encode_prompt, encode_prompts, fitting
from drpo.rollout.server import ServerEngine
from drpo.rollout.transformers import TransformersEngine
from drpo.rollout.vllm import VLLMEngine

__all__ = [
    "Engine",
    "NoEngine",
    "PromptLimits",
    "ScriptedEngine",
    "ServerEngine",
    "TransformersEngine",
    "VLLMEngine",
    "encode_prompt",
    "encode_prompts",
    "fitting",
]
