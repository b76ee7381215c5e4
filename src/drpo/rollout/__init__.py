"""Rollouts: engines sample token ids with log-probabilities; the episode driver sends them requests."""

from drpo.rollout.engine import Engine, NoEngine, ScriptedEngine
from drpo.rollout.episodes import Environments, EpisodeDriver, EpisodeLimits
from drpo.rollout.prompts import PromptLimits, encode_prompt, encode_prompts, fitting
from drpo.rollout.server import ServerEngine
from drpo.rollout.transformers import TransformersEngine
from drpo.rollout.vllm import VLLMEngine

__all__ = [
    "Engine",
    "Environments",
    "EpisodeDriver",
    "EpisodeLimits",
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
