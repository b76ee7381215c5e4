"""Tools in the prompt: by the chat template where it knows of them, else in words."""

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from drpo.rollout.chat_template import render
from drpo.rollout.native_calls import reads_its_calls
from drpo.types import Message
from drpo.types.environment import Observation, ToolSchema
from drpo.types.problem import message

_ABOUT = (
    "You can call these tools, each described by a line of JSON:\n{tools}\n"
    'To call one, write <tool_call>{{"name": ..., "arguments": {{...}}}}</tool_call> and end your turn; the result is '
    "sent to you. When you know the answer, say it without a call."
)


def with_tools(
    tokenizer: PreTrainedTokenizerBase, observation: Observation
) -> tuple[tuple[Message, ...], tuple[ToolSchema, ...]]:
    """Return the messages that the model reads first, and the tools that its chat template is given.

    Args:
        tokenizer: with or without a chat template.
        observation: of the environment.

    Returns:
        The observation's own where the template renders tools, and calls in its form can be read; else no tools, and
        messages whose first is a system message that describes them and another form of calls.
    """
    messages, tools = observation.messages, observation.tools
    if not tools or (_renders(tokenizer, messages, tools) and reads_its_calls(tokenizer)):
        return messages, tools
    about = _ABOUT.format(tools="\n".join(json.dumps(tool["function"]) for tool in tools))
    if messages[0]["role"] == "system":
        return (message("system", f"{messages[0]['content']}\n\n{about}"), *messages[1:]), ()
    return (message("system", about), *messages), ()


def _renders(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> bool:
    try:
        return bool(tokenizer.chat_template) and render(tokenizer, messages, tools) != render(tokenizer, messages)
    except Exception:  # a template is a program, which may raise anything; who encodes the prompt will say so
        return False
