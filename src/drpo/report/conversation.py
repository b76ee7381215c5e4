"""An episode in an environment as a conversation: who said what, which turns the model sampled, how it ended."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from drpo.errors import counted


@dataclass(frozen=True)
class Utterance:
    """A message of an episode.

    Args:
        role: "system", "user", "assistant" or "tool".
        text: what it says.
        name: of the tool whose result it is; may be empty.
        calls: of tools, that were read in it: each its name and its arguments as JSON.
        turn: number of the model's turn, from 0; None where the model did not sample it.
        reward: of the turn; None where turns have none.
        branch: whether the history was rendered anew before the turn, which begins a further sequence.
        failed: whether it tells the model that a call of the turn before failed.
    """

    role: str
    text: str
    name: str
    calls: tuple[str, ...]
    turn: int | None
    reward: float | None
    branch: bool
    failed: bool


def utterances(record: Mapping[str, Any], lengths: Sequence[int]) -> list[Utterance]:
    """Return the messages of an episode's record, in order; none where it was in no environment.

    Args:
        record: of rollouts.jsonl.
        lengths: sampled tokens of each of its sequences; see `sampled_lengths`.

    Example:
        >>> said = [("user", "5?"), ("assistant", "7"), ("user", "lower"), ("assistant", "6")]
        >>> messages = [{"role": role, "content": text} for role, text in said]
        >>> found = utterances({"messages": messages, "turns": [2], "reward_turns": [1]}, [2])
        >>> [(u.text, u.turn, u.reward) for u in found]
        [('5?', None, None), ('7', None, None), ('lower', None, None), ('6', 0, 1.0)]
    """
    messages, turns = record.get("messages", ()), record.get("turns", ())
    at = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
    turn_of = {i: turn for turn, i in enumerate(at[len(at) - len(turns) :])}
    rewards, branches = turn_rewards(record), branch_turns(turns, lengths)
    failed_calls = dict(enumerate((record.get("played") or {}).get("failed_calls", ())))
    found, last = [], -1
    for i, m in enumerate(messages):
        turn = turn_of.get(i)
        last = last if turn is None else turn
        text = _text(m.get("content"))
        found.append(
            Utterance(
                role=m.get("role", ""),
                text=text,
                name=m.get("name") or "",
                calls=tuple(map(_call, m.get("tool_calls") or ())),
                turn=turn,
                reward=rewards[turn] if rewards and turn is not None else None,
                branch=turn in branches,
                failed=turn is None and bool(failed_calls.get(last)) and text.startswith("Error"),
            )
        )
    return found


def question(said: Sequence[Utterance]) -> int:
    """Return where the last message stands that the model read before its first turn; those before are instructions.

    Example:
        >>> messages = [{"role": role, "content": "..."} for role in ("system", "user", "assistant", "user")]
        >>> question(utterances({"messages": messages, "turns": [3]}, [3]))
        1
    """
    first = next((i for i, u in enumerate(said) if u.turn is not None), len(said))
    return max(0, first - 1)


def _text(content: Any) -> str:
    """A message's content: a text, or a list of parts that chat templates read."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part.get("text") if isinstance(part, dict) else None for part in content]
    return "\n".join(t if isinstance(t, str) else json.dumps(p) for t, p in zip(texts, content, strict=True))


def _call(call: Mapping[str, Any]) -> str:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return json.dumps(call, ensure_ascii=False)
    return f"{function['name']}({json.dumps(function.get('arguments', {}), ensure_ascii=False)})"


def turn_rewards(record: Mapping[str, Any]) -> list[float]:
    """Return the reward of each turn: the reward function's and the environment's; none where all are 0.

    Example:
        >>> turn_rewards({"reward_turns": [0.5, [0.0, 0.25]]}), turn_rewards({"played": {"rewards": [0.0]}})
        ([0.5, 0.25], [])
    """
    given = record.get("reward_turns") or (record.get("played") or {}).get("rewards", ())
    rewards = [float(sum(r)) if isinstance(r, list) else float(r) for r in given]
    return rewards if any(rewards) else []


def branch_turns(turns: Sequence[int], lengths: Sequence[int]) -> frozenset[int]:
    """Return the turns before which an episode's history was rendered anew, counted from 0.

    Args:
        turns: sampled tokens of each turn.
        lengths: sampled tokens of each sequence.

    Example:
        >>> branch_turns([2, 1, 3], [3, 3])
        frozenset({2})
    """
    starts = set(accumulate(lengths[:-1]))
    return frozenset(turn for turn, n in enumerate(accumulate(turns), 1) if n in starts)


def ending(record: Mapping[str, Any]) -> str:
    """Say why an episode in an environment ended.

    Example:
        >>> ending({"played": {"done": True}, "finish_reason": "stop"})
        'ended by the environment'
    """
    played = record.get("played") or {}
    if played.get("failure"):
        return "the environment failed"
    if played.get("done"):
        return "ended by the environment"
    return "cut at max_new_tokens" if record.get("finish_reason") == "length" else "ended by a limit of turns or tokens"


def remarks(record: Mapping[str, Any], lengths: Sequence[int]) -> list[tuple[str, bool]]:
    """Return what is to be said of an episode in an environment besides its reward: turns, end, calls, branches.

    Args:
        record: of rollouts.jsonl.
        lengths: sampled tokens of each of its sequences.

    Returns:
        Pairs of a text, and whether it is a warning.

    Example:
        >>> remarks({"turns": [2, 1], "played": {"done": True, "calls": [1, 0]}}, [2, 1])
        [('2 turns', False), ('ended by the environment', False), ('1 call', False), ('1 branch', True)]
    """
    played, n = record.get("played") or {}, len(lengths) - 1
    said = [(counted(len(record.get("turns", ())), "turn"), False), (ending(record), bool(played.get("failure")))]
    numbers = {"call": sum(played.get("calls", ())), "failed call": sum(played.get("failed_calls", ()))}
    said += [(counted(count, what), what != "call") for what, count in numbers.items() if count]
    return said + ([("1 branch" if n == 1 else f"{n} branches", True)] if n > 0 else [])
