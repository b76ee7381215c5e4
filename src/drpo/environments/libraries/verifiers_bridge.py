"""Plays episodes of verifiers with turns that come from elsewhere. Imported only where verifiers is installed.

verifiers runs an episode as a program: its environment drives a harness, which asks a model over and over. Here the
model is a `Conversation`: what the harness asks is handed to whoever waits for it, and the answer is waited for. So
verifiers never sees a token, and none is encoded again; its tools, stops, users and scores run unchanged.
"""

import asyncio
import json
import queue
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import verifiers.v1 as vf
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
from verifiers.v1.interception import server
from verifiers.v1.utils.loaders import load_environment, resolve_env_config

HARNESS = "drpo"
_CONVERSATIONS: dict[str, "Conversation"] = {}
"""By the id of the trace that verifiers keeps of each."""


@dataclass(frozen=True)
class Asked:
    """The model's turn: the whole conversation and the tools it may call."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Over:
    """The episode's end: its reward, or why it failed."""

    reward: float
    error: str | None


@dataclass(frozen=True)
class Answer:
    """What the model said, and the calls in it as verifiers reads them: (name, arguments)."""

    text: str
    calls: Sequence[tuple[str, Mapping[str, Any]]]
    truncated: bool


class Conversation:
    """An episode in progress, between verifiers' event loop and the thread that waits for its next turn."""

    def __init__(self) -> None:
        self.asked: queue.Queue[Asked | Over] = queue.Queue()
        self.answers: asyncio.Queue[Answer] = asyncio.Queue()
        self.traces: list[str] = []

    def join(self, trace: Any) -> None:
        """Note a trace of the episode: its model calls belong here."""
        self.traces.append(trace.id)
        _CONVERSATIONS[trace.id] = self

    async def ask(self, asked: Asked) -> Answer:
        """Hand the model's turn over and wait for what it says."""
        self.asked.put(asked)
        return await self.answers.get()

    def end(self, over: Over) -> None:
        """Hand the end over."""
        for trace in self.traces:
            _CONVERSATIONS.pop(trace, None)
        self.asked.put(over)


class TurnClient(vf.Client):  # type: ignore[misc]
    """The model of all conversations."""

    async def get_response(
        self, dialect: Any, body: Any, sampling: Any, session_id: Any = None, turn: Any = None, headers: Any = None
    ) -> vf.Response:
        """Answer a model call with the next turn of its conversation."""
        answer = await _CONVERSATIONS[session_id].ask(Asked(body["messages"], body.get("tools") or ()))
        wire = [
            {"id": f"call_{len(body['messages'])}_{i}", "type": "function", "function": _function(name, arguments)}
            for i, (name, arguments) in enumerate(answer.calls)
        ]
        message = {"role": "assistant", "content": answer.text, **({"tool_calls": wire} if wire else {})}
        calls = [vf.ToolCall(id=c["id"], **c["function"]) for c in wire]  # type: ignore[arg-type]
        said = vf.AssistantMessage(content=answer.text, tool_calls=calls or None)
        finish = "length" if answer.truncated else "tool_calls" if calls else "stop"
        raw = {
            "id": f"turn-{len(body['messages'])}",
            "object": "chat.completion",
            "created": 0,
            "model": "drpo",
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": None,
        }
        return vf.Response(id=raw["id"], created=0, model="drpo", message=said, finish_reason=finish, raw=raw)


def _function(name: str, arguments: Mapping[str, Any]) -> dict[str, str]:
    return {"name": name, "arguments": json.dumps(dict(arguments))}


class TurnHarnessConfig(vf.HarnessConfig):  # type: ignore[misc]
    """No more than verifiers' own fields."""


class TurnHarness(vf.Harness[TurnHarnessConfig]):  # type: ignore[misc]
    """The loop of verifiers' `null` harness, in this process: ask, call the tools, ask again until there is no call."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Mapping[str, str], data: Any
    ) -> vf.ProgramResult:
        """Run one segment of the conversation; see `Harness.launch`."""
        system, prompt = self.resolve_prompt(data)
        messages: list[Any] = [] if system is None else [{"role": "system", "content": system}]
        messages += (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else map(message_to_wire, prompt or ())
        )
        config = {"mcpServers": {n: {"url": u, "timeout": self.config.tool_timeout} for n, u in mcp_urls.items()}}
        async with AsyncExitStack() as stack, httpx.AsyncClient(timeout=None) as http:
            tools, dispatch, servers = await connect_mcp(config, stack)
            while True:
                asked = {"model": ctx.model, "messages": messages, **({"tools": tools} if tools else {})}
                secrets = {"Authorization": f"Bearer {secret}"}
                reply = await http.post(f"{endpoint}/chat/completions", headers=secrets, json=asked)
                if reply.status_code != httpx.codes.OK:  # a stop of the task's, or an error that verifiers has noted
                    return vf.ProgramResult(exit_code=1, stdout="", stderr=reply.text)
                said = reply.json()["choices"][0]["message"]
                messages.append(said)
                if not said.get("tool_calls"):
                    return vf.ProgramResult(exit_code=0, stdout="", stderr="")
                for call in said["tool_calls"]:
                    name = call["function"]["name"]
                    text = f"Error: there is no tool {name!r}"
                    if name in dispatch:
                        text = await call_mcp(servers, dispatch, name, json.loads(call["function"]["arguments"]))
                    messages.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": text})


def _resolve_client(config: Any) -> vf.Client:
    return TurnClient() if config.base_url == _CONFIG.base_url else _their_resolve_client(config)


_CONFIG = vf.EvalClientConfig(base_url="http://drpo.invalid/v1", api_key_var="DRPO_NO_KEY")
_their_resolve_client = server.resolve_client
server.resolve_client = _resolve_client
sys.modules[f"verifiers.v1.harnesses.{HARNESS}"] = sys.modules[__name__]  # where verifiers looks for harnesses
__all__ = ["Asked", "Answer", "Conversation", "Over", "Taskset", "TurnHarness"]  # noqa: RUF022


class Taskset:
    """A taskset of verifiers with its environment, ready to play episodes.

    Args:
        id: of the taskset, a module.
        config: of the taskset.
        env: id of the environment; empty is the taskset's own.
        turns: of an episode at most.
    """

    def __init__(self, id: str, config: Mapping[str, Any], env: str, turns: int) -> None:
        read = resolve_env_config({"id": env, "taskset": {"id": id, **config}})
        local = vf.SubprocessConfig()
        seats = {
            name: seat.model_copy(
                update={"harness": TurnHarnessConfig(id=HARNESS), "max_turns": turns, "runtime": local}
            )
            for name, seat in agent_config_fields(read).items()
        }
        self.environment = load_environment(read.model_copy(update=seats))
        self.tasks = self.environment.taskset
        self._serving = AsyncExitStack()

    @property
    def endless(self) -> bool:
        """Whether the taskset yields tasks for ever."""
        return not self.tasks.bounded

    async def start(self) -> None:
        """Serve model calls and shared tools."""
        await self._serving.enter_async_context(self.environment.serving())

    async def stop(self) -> None:
        """Serve no more."""
        await self._serving.aclose()

    async def play(self, task: Any, conversation: Conversation) -> None:
        """Play an episode of a task, its turns from the conversation."""
        context = vf.ModelContext(model="drpo", client=_CONFIG)
        try:
            episode = await self.environment.run_episode(task, context, on_trace=conversation.join)
        except asyncio.CancelledError:
            conversation.end(Over(0.0, "the episode was closed"))
            raise
        except Exception as error:  # of a taskset, which may raise anything
            conversation.end(Over(0.0, f"{type(error).__name__}: {error}"))
            return
        errors = [e for e in (episode.last_error, *(t.last_error for t in episode.traces)) if e is not None]
        failed = None if episode.ok else f"{errors[0].type}: {errors[0].message}" if errors else "the episode failed"
        conversation.end(Over(sum(t.reward for t in episode.traces), failed))
