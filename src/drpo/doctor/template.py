"""The check of a chat template between turns: whether its own text can be put behind what was sampled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from drpo.doctor.finding import Finding, Verdict
from drpo.rollout.chat_template import render
from drpo.rollout.glue import glue
from drpo.rollout.turn_ends import turn_end
from drpo.types import Message
from drpo.types.environment import ToolSchema

_WORDS = "I said this"
_THOUGHT, _ANSWER = "I thought this", "I said that"


@dataclass(frozen=True)
class Exchange:
    """The first turns of a conversation, up to where the model speaks for the second time.

    Args:
        messages: that the model reads first.
        tools: schemas that the chat template is given.
        replies: of the environment to the first turn.
        calls: of tools, in that turn.
    """

    messages: Sequence[Message]
    tools: Sequence[ToolSchema] = ()
    replies: Sequence[Message] = ({"role": "user", "content": "and then?"},)
    calls: Sequence[Mapping[str, Any]] = ()

    def text(self, tokenizer: PreTrainedTokenizerBase, said: str) -> str:
        """Return it as the template writes it, where the model said something in its first turn.

        Raises:
            Whatever the template raises.
        """
        turn = {"role": "assistant", "content": said, **({"tool_calls": list(self.calls)} if self.calls else {})}
        return render(tokenizer, [*self.messages, turn, *self.replies], self.tools)


def template(
    tokenizer: PreTrainedTokenizerBase, exchange: Exchange, stop: frozenset[int], *, branches: int, turns: int
) -> Finding:
    """Whether turns go on in one sequence, and whether the model reads what the template would write.

    Args:
        tokenizer: with the model's chat template, or none.
        exchange: of one of the run's episodes.
        stop: ids of the tokens that end a turn.
        branches: of sampled episodes, which have
        turns: turns behind the first.
    """
    if not tokenizer.chat_template:
        return Finding("template", "ok", "no chat template: a blank line stands between messages", "no branch")
    end = turn_end(tokenizer)
    last = end if end in stop else min(stop)
    between = glue(tokenizer, exchange.replies, last=last, stop=stop, tools=exchange.tools, calls=exchange.calls)
    try:
        whole = exchange.text(tokenizer, _WORDS)
        thoughtful = exchange.text(tokenizer, f"<think>{_THOUGHT}</think>\n\n{_ANSWER}")
        refusal = ""
    except Exception as error:  # a template is a program, which may raise anything
        whole, thoughtful, refusal = "", "", " ".join(str(error).split()) or type(error).__name__
    drops = _ANSWER in thoughtful and _THOUGHT not in thoughtful
    exact = between is not None and whole.endswith(str(tokenizer.decode(between)))
    roles = " and ".join(sorted({str(m["role"]) for m in exchange.replies}))
    verdict, advice = _verdict(between is not None, refusal, roles, branches, drops)
    return Finding(
        "template",
        verdict,
        f"what stands between two turns is {'known' if between is not None else 'not known'}"
        f"{', to the letter' if exact else ''}; the template {'drops' if drops else 'keeps'} earlier thinking; "
        f"{branches} branches in {turns} further turns",
        "no branch",
        advice,
        {"glue": between is not None, "exact": exact, "drops_thinking": drops, "branches": branches, "turns": turns},
    )


def _verdict(known: bool, refusal: str, roles: str, branches: int, drops: bool) -> tuple[Verdict, str]:
    if refusal and not known:
        return "broken", f"the template refuses a reply of role {roles} ({refusal}); let the environment use another"
    if branches or not known:
        return "note", (
            "the history is rendered anew for a further turn, so that an episode is trained as several sequences, each "
            f"with its whole prompt; another template, or replies of another role than {roles}, may go on in one"
        )
    if drops:
        return "note", (
            "in training earlier turns keep their thinking, as it was sampled; a server that renders the "
            "conversation anew leaves it out"
        )
    return "ok", ""
