"""What an environment exchanges with the model: observations, turns and results, without tensors and without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from drpo.types.calls import Call, MalformedCall, read_calls
from drpo.types.problem import FinishReason, Message

ToolSchema: TypeAlias = Mapping[str, Any]
"""A tool as chat templates read it: {"type": "function", "function": {"name", "description", "parameters"}}."""


@dataclass(frozen=True)
class Observation:
    """What the model reads before its first turn.

    Args:
        messages: the conversation so far: system, examples, user.
        tools: schemas of the tools that the model may call; the chat template renders them.
    """

    messages: tuple[Message, ...]
    tools: tuple[ToolSchema, ...] = ()


@dataclass(frozen=True)
class Turn:
    """What the model said.

    Args:
        text: the sampled tokens, decoded without special tokens.
        token_ids: the sampled tokens, with the stop token where there is one.
        finish_reason: "stop" where a stop token ended it, "length" where the limit of tokens did.
        native_calls: calls of tools in the chat template's own form.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    native_calls: tuple[Call | MalformedCall, ...] = ()

    @property
    def tool_calls(self) -> tuple[Call | MalformedCall, ...]:
        """The calls of tools that the turn holds: in the chat template's own form, else as JSON in <tool_call> tags."""
        return self.native_calls or tuple(read_calls(self.text))


@dataclass(frozen=True)
class StepResult:
    """What an environment answers to a turn.

    Args:
        messages: replies, of users and tools alone; at least one unless the episode is done.
        reward: of the turn, finite.
        done: the episode is over.
        calls: `tool_calls` that the environment read in the turn, for chat templates that require a call before a
            tool's reply.
        failed_calls: calls of the turn that could not be read or that failed.
    """

    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    done: bool = False
    calls: tuple[Mapping[str, Any], ...] = ()
    failed_calls: int = 0
