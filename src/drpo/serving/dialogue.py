"""A conversation with a model: its messages, and the token ids that the model read and sampled."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drpo.rollout.glue import glue
from drpo.rollout.prompts import encode_prompt
from drpo.types import Message, Problem
from drpo.types.environment import ToolSchema
from drpo.types.problem import message


@dataclass(frozen=True, eq=False)
class Dialogue:
    """A conversation, continued as in training: sampled tokens are never encoded again.

    Args:
        messages: so far.
        tools: schemas of the tools that the first prompt shows.
        ids: [P] int64; all tokens so far, up to the last question or the last answer; None before the first question.

    Example:
        >>> from drpo.model.loading import tiny
        >>> _, tokenizer = tiny()
        >>> asked = Dialogue().asked(tokenizer, "3 + 4?", frozenset({0}))
        >>> further = asked.answered([23, 0], "7").asked(tokenizer, "And 5?", frozenset({0}))
        >>> tokenizer.decode(further.ids)
        '3 + 4?7<eos>\\n\\nAnd 5?'
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[ToolSchema, ...] = ()
    ids: Tensor | None = None

    def asked(self, tokenizer: PreTrainedTokenizerBase, text: str, stop: frozenset[int]) -> "Dialogue":
        """Return the conversation with a further question.

        The chat template's ids are inserted between an answer and the question (`drpo.rollout.glue`). Where it rewrites
        earlier messages, the whole conversation is rendered anew, as in a rollout.

        Args:
            tokenizer: with the model's chat template.
            text: the question.
            stop: ids of the tokens that end a turn.

        Raises:
            InputError: the chat template refuses it.
        """
        messages = (*self.messages, message("user", text))
        between = None
        if self.ids is not None:
            between = glue(tokenizer, messages[-1:], last=int(self.ids[-1]), stop=stop, tools=self.tools)
        if self.ids is None or between is None:
            ids = encode_prompt(tokenizer, Problem("chat", messages, ""), self.tools)
        else:
            ids = torch.cat([self.ids, between])
        return Dialogue(messages, self.tools, ids)

    def answered(self, token_ids: Sequence[int], text: str) -> "Dialogue":
        """Return the conversation with the model's answer.

        Args:
            token_ids: sampled by the model, at least one.
            text: the same, decoded.
        """
        assert self.ids is not None
        ids = torch.cat([self.ids, torch.tensor(token_ids, dtype=torch.int64)])
        return replace(self, messages=(*self.messages, message("assistant", text)), ids=ids)
