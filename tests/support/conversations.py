"""Conversations that hypothesis makes up, by any chat template: what is trained is what was sampled, each token once.

The model says tokens at random, special ones among them; users and tools reply with text that tries to look like the
template's own. No weights are needed: the engine keeps what it was asked and what it said.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drpo.environments.local import LocalEnvironments
from drpo.model import loading
from drpo.rollout import EpisodeDriver
from drpo.rollout.chat_template import render
from drpo.rollout.engine import generation
from drpo.rollout.prompts import PromptLimits
from drpo.types import Episode, Generation, Problem, Request, Sampling
from drpo.types.environment import Observation, StepResult, ToolSchema, Turn
from drpo.types.problem import message

TURNS, LONGEST = 4, 9
TOOL: ToolSchema = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look something up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "It."}},
            "required": ["word"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"word": "x"}}}
_SPECIAL = re.compile(r"<\W?[\w/\u2581 ]+\W?>|</?[a-z_]+>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class Script:
    """What happens in an episode.

    Args:
        said: ids of each turn of the model, without the token that ends it.
        cut: the turn that the limit of tokens ends, if any.
        replies: role and text of what follows each turn, and whether a call of a tool was read in it.
        tools: whether the model was told of a tool.
        system: the system message, or none.
    """

    said: tuple[tuple[int, ...], ...]
    cut: int | None
    replies: tuple[tuple[tuple[str, str], ...], ...]
    tools: bool
    system: str | None

    max_turns = TURNS

    def open(self, problem: Problem, seed: int) -> "Played":
        return Played(self, problem)


class Played:
    """The environment of a script."""

    def __init__(self, script: Script, problem: Problem) -> None:
        self._script, self._problem, self._turns = script, problem, 0

    def reset(self) -> Observation:
        before = [message("system", self._script.system)] if self._script.system is not None else []
        return Observation((*before, *self._problem.messages), (TOOL,) if self._script.tools else ())

    def step(self, turn: Turn) -> StepResult:
        replies = self._script.replies[self._turns]
        self._turns += 1
        told = tuple({**message(role, text), **({"name": "look"} if role == "tool" else {})} for role, text in replies)
        calls = (CALL,) if any(role == "tool" for role, _ in replies) else ()
        return StepResult(told, reward=float(self._turns), done=self._turns == TURNS, calls=calls)

    def close(self) -> None:
        pass


class Saying:
    """An engine that says what the script says, and keeps what it was asked."""

    version = 0

    def __init__(self, script: Script, end: int) -> None:
        self._script, self._end = script, end
        self.asked: list[Tensor] = []
        self.said: list[Tensor] = []

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        return [self._say(request) for request in requests]

    def _say(self, request: Request) -> Generation:
        turn = len(self.said)
        cut = turn == self._script.cut
        ids = torch.tensor([*self._script.said[turn], *([] if cut else [self._end])], dtype=torch.int64)
        self.asked.append(request.prompt_ids)
        self.said.append(ids)
        logp = -1.0 - torch.arange(len(ids)) - 100.0 * turn  # a number of its own for every sampled token
        return generation(request, ids, logp, "length" if cut else "stop", 0, None)

    def release(self) -> None:
        pass


def tokenizer_of(template: str) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with a chat template, to which what looks like a special token in it is one."""
    _, made = loading.tiny()
    made.add_special_tokens({"additional_special_tokens": sorted(set(_SPECIAL.findall(template)))[:60]})
    made.bos_token = made.eos_token
    made.chat_template = template
    return made


def takes_texts(made: PreTrainedTokenizerBase) -> bool:
    """Whether the template renders a conversation whose contents are texts."""
    try:
        return "Q4ZW" in render(made, [message("user", "u"), message("assistant", "Q4ZW"), message("user", "v")])
    except Exception:  # a template is a program, which may raise anything
        return False


def end_of_turn(made: PreTrainedTokenizerBase) -> int:
    """The special token that the template puts behind what the model said; the EOS where it puts none."""
    shown = render(made, [message("user", "u"), message("assistant", "Q4ZW"), message("user", "v")], goes_on=False)
    special = set(made.all_special_ids)
    behind = made(shown.partition("Q4ZW")[2], add_special_tokens=False)["input_ids"]
    return next((int(i) for i in behind if i in special), int(made.eos_token_id))


def scripts(made: PreTrainedTokenizerBase) -> st.SearchStrategy[Script]:
    """Made-up episodes for a tokenizer."""
    end = end_of_turn(made)
    ids = st.integers(1, len(made) - 1).filter(lambda i: i != end)
    said = st.lists(ids, min_size=1, max_size=LONGEST - 1).map(tuple)
    words = [*made.all_special_tokens, "a", " b", "\n", "é", "Sentinel0Q4ZW", "{{ x }}"]
    text = st.lists(st.sampled_from(words), max_size=5)
    reply = st.tuples(st.sampled_from(["user", "tool"]), text.map("".join).map(lambda t: t or "?"))
    return st.builds(
        Script,
        said=st.tuples(*[said] * TURNS),
        cut=st.none() | st.integers(0, TURNS - 1),
        replies=st.tuples(*[st.lists(reply, min_size=1, max_size=2).map(tuple)] * TURNS),
        tools=st.booleans(),
        system=st.none() | st.just("Be brief."),
    )


def play(made: PreTrainedTokenizerBase, script: Script) -> tuple[Episode, Saying]:
    """Run a script's episode; return it, and the engine."""
    end = end_of_turn(made)
    engine: Any = Saying(script, end)
    limits = PromptLimits(embeddings=len(made), positions=None, fixed=False)
    driver = EpisodeDriver(engine, made, frozenset({end}), limits, environments=LocalEnvironments(script))
    problem = Problem.of_text("0", "What?", "")
    ((episode,),) = driver.run([problem], Sampling(samples=1, max_new_tokens=LONGEST), (0,))
    return episode, engine


def check(made: PreTrainedTokenizerBase, script: Script) -> int | None:
    """Hold an episode to what was asked and said; return its number of branches, None where its template refused it."""
    episode, engine = play(made, script)
    sequences = episode.sequences
    trained = [s.token_ids[s.sampled] for s in sequences]
    logp = [s.behavior_logp for s in sequences]
    if not engine.said:
        assert episode.played is not None and episode.played.failure is not None and not sequences
        assert "chat template refuses" in episode.played.failure.text
        return None
    assert torch.equal(torch.cat(trained), torch.cat(engine.said)), "each sampled token once, in order, none else"
    wanted = [-1.0 - torch.arange(len(ids)) - 100.0 * turn for turn, ids in enumerate(engine.said)]
    assert torch.equal(torch.cat(logp), torch.cat(wanted)), "with the log-probability that it was sampled with"
    assert episode.turns == tuple(map(len, engine.said))
    branches = 0
    for (before, said), after in pairwise([*zip(engine.asked, engine.said, strict=True), (None, None)]):
        if after[0] is not None:
            whole = torch.cat([before, said])
            branches += not (len(after[0]) > len(whole) and torch.equal(after[0][: len(whole)], whole))
    assert len(sequences) == 1 + branches, "a prompt that does not go on from the last is a branch, and nothing else is"
    contexts = iter(engine.asked)
    for sequence in sequences:
        ids = torch.cat([sequence.prompt_ids, sequence.token_ids])
        mask = torch.cat([torch.zeros(len(sequence.prompt_ids), dtype=torch.bool), sequence.sampled])
        starts = (mask & ~torch.cat([torch.zeros(1, dtype=torch.bool), mask[:-1]])).nonzero()[:, 0]
        for start in starts.tolist():
            assert torch.equal(next(contexts), ids[:start]), "a turn is trained behind what the model read"
    return branches


_TURN = "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n"
_NEXT = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"


def _chatml(turn: str, before: str = "") -> str:
    return f"{before}{{% for m in messages %}}{turn}{{% endfor %}}{_NEXT}"


NASTY = {
    "plain": _chatml(_TURN),
    "tools in front": _chatml(_TURN, "{{ tools | tojson if tools }}"),
    "trims": _chatml("<|start|>{{ m.role }}|{{ m.content | trim }}<|end|>"),
    "no end of a turn": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{# <|user|> #}",
    "drops what tools say": _chatml("{% if m.role != 'tool' %}" + _TURN + "{% endif %}"),
    "refuses tools": _chatml("{{ raise_exception('no tools') if m.role == 'tool' }}" + _TURN),
    "refuses the system": _chatml("{{ raise_exception('no system') if m.role == 'system' }}" + _TURN),
    "refuses two of a role": _chatml(
        "{{ raise_exception('alternate') if loop.previtem and loop.previtem.role == m.role }}" + _TURN
    ),
    "needs a call before a tool": _chatml(
        "{{ raise_exception('no call') if m.role == 'tool' and loop.previtem.role == 'assistant'"
        " and not loop.previtem.tool_calls }}" + _TURN
    ),
    "says all twice": _chatml("<|start|>{{ m.role }}{{ m.content }}{{ m.content }}<|end|>"),
    "says the first user again": _chatml(_TURN + "{{ messages[0].content if loop.last }}"),
    "numbers turns": _chatml("<|start|>{{ loop.index }}{{ m.role }}{{ m.content }}<|end|>"),
    "drops earlier thinking": _chatml("<|start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|end|>"),
    "marks the last turn": _chatml(
        "<|start|>{% if m.role == 'assistant' and loop.last %}<|think|>{% endif %}{{ m.content }}<|end|>"
    ),
    "writes calls": _chatml(
        "<|start|>{{ m.role }}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}"
        "</tool_call>{% endfor %}<|end|>"
    ),
    "no template": "",
}
"""Chat templates, each with a habit that some model's template has."""
