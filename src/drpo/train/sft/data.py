"""Conversations -> the groups that updates are made of: as token ids, without those that are too long."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from drpo.errors import InputError, counted
from drpo.progress import Progress
from drpo.rollout.chat_template import render
from drpo.rollout.least_tokens import least_tokens
from drpo.rollout.trained_turns import trained_sequences
from drpo.rollout.turn_ends import turn_end
from drpo.seeds import derive
from drpo.tasks.conversations import Conversation, read_conversations
from drpo.train.config.sft import ConversationConfig
from drpo.types import Episode, Message, Problem, RewardResult, Sampling, ScoredGroup


@dataclass(frozen=True)
class Examples:
    """The conversations of a run.

    Args:
        train: those that are trained on, each a group of one episode, whose sampled tokens are the trained ones.
        held_out: those that the held-out loss is of.
        too_long: how many were left out.
        several: how many are in several sequences, because the template rewrites what was said earlier.
        repeated: how many were dropped from those to train on, because they are held out too.
    """

    train: tuple[ScoredGroup, ...]
    held_out: tuple[ScoredGroup, ...]
    too_long: int
    several: int
    repeated: int = 0

    def __str__(self) -> str:
        """Return one line for the log."""
        tokens = sum(group.episodes[0].n_sampled for group in self.train)
        text = f"{counted(len(self.train), 'conversation')} to train on ({tokens:,} trained tokens in an epoch)"
        text += f", {len(self.held_out):,} held out, {self.too_long:,} left out as too long"
        text += f"; dropped: {self.repeated:,} repeated in the held-out ones" if self.repeated else ""
        rewritten = "in several sequences, since the chat template rewrites earlier turns"
        return text + (f"; {self.several:,} {rewritten}" if self.several else "")


def read_examples(config: ConversationConfig, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Examples:
    """Read the data of a run, and encode it.

    Args:
        config: of the data.
        tokenizer: the model's.
        limit: the most tokens that the model can read, or None; a longer conversation is left out too.

    Raises:
        InputError: a row is no conversation, the chat template refuses one, or nothing is left to train on.
    """
    read, end = read_conversations(config.path), turn_end(tokenizer)
    tested = read_conversations(config.test, "test") if config.test else []
    if not tested:
        order = _order(len(read), "held out", 0)
        n = min(config.holdout, len(read) // 10)
        read, tested = [read[i] for i in sorted(order[n:])], [read[i] for i in sorted(order[:n])]
    tested = tested[: config.holdout] if config.test else tested
    known = set(map(_key, tested))
    n, read = len(read), [c for c in read if _key(c) not in known]
    if not read:
        raise InputError(f"{config.path}: nothing to train on: all {n:,} conversations are held out too; set --test")
    most = config.max_tokens if limit is None else min(config.max_tokens, limit)
    every = config.train_on == "all"
    progress = Progress(f"{config.path}: conversations tokenised", len(read) + len(tested))
    lengths: list[tuple[int, str]] = []
    kept: tuple[list[ScoredGroup], list[ScoredGroup]] = [], []
    for some, fitting in zip((read, tested), kept, strict=True):
        for i, conversation in enumerate(some):
            if least := _least(conversation, tokenizer, most):
                lengths.append((least, f"{least:,} or more"))
            else:
                group = example(conversation, i, tokenizer, end, every)
                lengths.append((_length(group), f"{_length(group):,}"))
                fitting += [group] if _length(group) <= most else []
            progress.add()
    if not kept[0]:
        raise InputError(
            f"{config.path}: nothing to train on: each of {len(read):,} conversations is longer than "
            f"max_tokens={most} (the shortest has {min(lengths[: len(read)])[1]}); set --max-tokens"
        )
    several = sum(len(group.sequences) > 1 for some in kept for group in some)
    left_out = len(lengths) - len(kept[0]) - len(kept[1])
    return Examples(tuple(kept[0]), tuple(kept[1]), left_out, several, n - len(read))


def _least(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, most: int) -> int:
    """How many tokens a conversation has at least that has surely more than `most`; else 0."""
    turns = [i for i, said in enumerate(conversation.messages) if said["role"] == "assistant"]
    try:
        text = render(tokenizer, conversation.messages[: turns[-1] + 1], conversation.tools, goes_on=False)
    except Exception:  # a template is a program, which may raise anything; `trained_sequences` says what
        return 0
    return least_tokens(tokenizer, text.rstrip(), most)


def example(
    conversation: Conversation, number: int, tokenizer: PreTrainedTokenizerBase, end: int | None, every_token: bool
) -> ScoredGroup:
    """Return a conversation as a group of one episode with reward 1, that somebody else has played.

    Args:
        conversation: it.
        number: among the others.
        tokenizer, end, every_token: see `trained_sequences`.

    Raises:
        InputError: as `trained_sequences`; or a turn of the assistant has nothing to train on, or calls tools that the
            chat template does not write.
    """
    where, messages = conversation.where, conversation.messages
    _require_said(conversation, tokenizer)
    sequences = trained_sequences(tokenizer, where, messages, conversation.tools, end=end, every_token=every_token)
    n = sum(s.n_sampled for s in sequences)
    problem = Problem(str(number), messages, "")
    episode = Episode(problem.id, 0, messages, "", "", "stop", Sampling(samples=1), (n,), sequences)
    return ScoredGroup(problem, (episode,), (RewardResult(1.0),))


def _require_said(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise unless what the assistant says in each turn, calls of tools too, is in the text that is trained on."""
    for i, said in enumerate(conversation.messages):
        empty, calls = not said["content"].strip(), bool(said.get("tool_calls"))
        if said["role"] != "assistant" or not (empty or calls):
            continue
        shown = _shown(conversation, i, said, tokenizer)
        if shown is None:
            continue  # the template refuses it, which `trained_sequences` says
        turn = f"{conversation.where}: message {i + 1}, the assistant's,"
        uncalled = {name: value for name, value in said.items() if name != "tool_calls"}
        if calls and shown == _shown(conversation, i, uncalled, tokenizer):
            raise InputError(
                f"{turn} has tool_calls, which the model's chat template does not write, so they would not be trained "
                "on; give a template that does with --chat-template FILE, or leave the row out"
            )
        if empty and shown == _shown(conversation, i, {"role": "assistant", "content": ""}, tokenizer):
            raise InputError(f"{turn} is empty, so there is nothing to train on; fill it in, or leave the row out")


def _shown(conversation: Conversation, i: int, said: Message, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the chat template makes of a conversation with `said` as its message `i` and last; None where it refuses."""
    try:
        return render(tokenizer, [*conversation.messages[:i], said], conversation.tools, goes_on=False)
    except Exception:  # a template is a program, which may raise anything
        return None


def updates_of_epoch(conversations: int, batch: int) -> int:
    """Return how many updates an epoch has.

    Args:
        conversations: of an epoch, at least one.
        batch: most conversations of an update.

    Example:
        >>> updates_of_epoch(17, 8)
        3
    """
    return -(-conversations // batch)


def at_step(groups: Sequence[ScoredGroup], batch: int, step: int, seed: int) -> list[ScoredGroup]:
    """Return the conversations of an update, all different: a part of an epoch, whose order is its own.

    The parts of an epoch are equal, but for one conversation where they cannot be.

    Args:
        groups: all.
        batch: most conversations of an update.
        step: counted from 0.
        seed: of the orders.
    """
    parts = updates_of_epoch(len(groups), batch)
    epoch, part = divmod(step, parts)
    first, behind = (len(groups) * i // parts for i in (part, part + 1))
    return [groups[i] for i in _order(len(groups), seed, epoch)[first:behind]]


def _key(conversation: Conversation) -> str:
    """What two conversations that are the same share."""
    return json.dumps([conversation.messages, conversation.tools], sort_keys=True, default=str)


def _length(group: ScoredGroup) -> int:
    """The tokens of the longest sequence."""
    return max(len(s.prompt_ids) + len(s.token_ids) for s in group.sequences)


@lru_cache(maxsize=8)
def _order(size: int, seed: int | str, epoch: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(derive("conversations", seed, epoch)).shuffle(order)
    return tuple(order)
