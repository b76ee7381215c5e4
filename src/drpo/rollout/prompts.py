"""Prompts as token ids: the chat template, and the limits of prompts that a model can read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.errors import InputError
from drpo.model.positions import sequence_limit
from drpo.progress import Progress
from drpo.rollout.chat_template import BLANK_LINE, encode_messages, render
from drpo.rollout.least_tokens import least_tokens
from drpo.types import Problem, Sampling
from drpo.types.environment import ToolSchema


def encode_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, tools: Sequence[ToolSchema] = ()) -> Tensor:
    """Return the [P] int64 ids of a problem's prompt, through the model's chat template where it has one.

    Without a template the messages' texts are joined by blank lines. Special tokens that the tokenizer appends, usually
    an EOS, are removed, because the answer follows.

    Raises:
        InputError: the prompt is empty, the template raises or ends with an EOS, or the text is not valid Unicode.
    """
    for content in (str(m.get("content")) for m in problem.messages):
        _require_unicode(problem, content)
    if tokenizer.chat_template:
        ids = _templated(tokenizer, problem, tools)
        if ids and ids[-1] == tokenizer.eos_token_id:
            raise InputError(
                f"problem {problem.id!r}: the model's chat template ends the prompt with {tokenizer.eos_token!r}, "
                "after which there is no answer; give the tokenizer a template that adds a generation prompt"
            )
    else:
        ids = _unended(tokenizer, BLANK_LINE.join(str(m["content"]) for m in problem.messages))
    if not ids:
        raise InputError(f"problem {problem.id!r}: its prompt {problem.prompt!r} has no tokens")
    return torch.tensor(ids, dtype=torch.int64)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return the [P] int64 ids of a text that the model is to go on with, without a chat template.

    Special tokens that the tokenizer puts in front stay, those that it appends go; a text may spell special tokens.

    Raises:
        InputError: it has no tokens, or holds half a character.

    Example:
        >>> from drpo.model.loading import tiny
        >>> encode_text(tiny()[1], "3<eos>").tolist()
        [19, 0]
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"it holds half a character, {text[error.start]!a} at character {error.start}") from None
    if not (ids := _begun(tokenizer, text)):
        raise InputError("it has no tokens")
    return torch.tensor(ids, dtype=torch.int64)


def _require_unicode(problem: Problem, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"problem {problem.id!r}: its prompt holds half a character, {text[error.start]!a} at character "
            f"{error.start}; repair the data"
        ) from None


def _templated(tokenizer: PreTrainedTokenizerBase, problem: Problem, tools: Sequence[ToolSchema]) -> list[int]:
    try:
        return encode_messages(tokenizer, problem.messages, tools)
    except Exception as error:  # a template is a program, which may raise anything
        has_system = problem.messages[0]["role"] == "system"
        hint = "; it may do without the system message" if has_system else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"problem {problem.id!r}: the model's chat template refuses it: {reason}{hint}") from None


def _unended(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a text's ids with the tokenizer's leading special tokens, and without any EOS at its end."""
    ids = _begun(tokenizer, text)
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _begun(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a text's ids with the special tokens that the tokenizer puts in front, and without those it appends."""
    ids: list[int] = tokenizer(text)["input_ids"]
    plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not plain:
        return ids
    starts = (i for i in range(len(ids) - len(plain) + 1) if ids[i : i + len(plain)] == plain)
    start = next(starts, max(0, len(ids) - len(plain)))
    has_two = start > 0 and ids[start - 1] == plain[0] == tokenizer.bos_token_id  # the text has BOS too
    return [*ids[: start - has_two], *ids[start : start + len(plain)]]


@dataclass(frozen=True)
class PromptLimits:
    """The prompts that a model can read.

    Args:
        embeddings: the number of embeddings; token ids are below it.
        positions: the number of positions; None without a limit.
        fixed: True if prompt and answer together must fit; False for computed positions, where an answer may exceed
            those of pre-training.
        why: the reason for a fixed limit, or "".
    """

    embeddings: int
    positions: int | None
    fixed: bool
    why: str = ""

    @staticmethod
    def of(model: PreTrainedModel) -> "PromptLimits":
        """Return a model's limits; some rotary embeddings fix them, see `drpo.model.positions.sequence_limit`.

        Raises:
            InputError: as `sequence_limit`.
        """
        embeddings = len(model.get_input_embeddings().weight)
        rotary_limit = sequence_limit(model)
        if rotary_limit.tokens is not None:
            return PromptLimits(embeddings, rotary_limit.tokens, True, rotary_limit.why)
        config: Any = model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        rotary = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
        factors = [rope.get("factor") or 1 for rope in rotary if isinstance(rope, Mapping)]
        computed = any(hasattr(config, n) for n in ("rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base"))
        stretched = int(positions * max([1, *factors])) if positions and positions > 0 else None
        return PromptLimits(embeddings, stretched, not computed)

    def too_long(self, prompt_ids: Tensor, sampling: Sampling) -> bool:
        """Return whether a prompt, with its answer if the limit is fixed, exceeds the positions."""
        most = self._longest_prompt(sampling)
        return most is not None and len(prompt_ids) > most

    def _longest_prompt(self, sampling: Sampling) -> int | None:
        answer = sampling.max_new_tokens if self.fixed else 1
        return None if self.positions is None else self.positions - answer

    def least_too_long(self, tokenizer: PreTrainedTokenizerBase, prompt: Problem | str, sampling: Sampling) -> int:
        """Return how many tokens a prompt has at least that is surely too long; else 0. Nothing is tokenised.

        Args:
            tokenizer: the model's.
            prompt: a problem, which the chat template renders, or a text as it is.
            sampling: of the answer.
        """
        most = self._longest_prompt(sampling)
        if most is None:
            return 0
        try:
            text = prompt if isinstance(prompt, str) else render(tokenizer, prompt.messages)
            return least_tokens(tokenizer, text, max(0, most))
        except Exception:  # a template is a program, which may raise anything; `encode_prompt` says what
            return 0

    def require(self, problem: Problem, prompt_ids: Tensor, sampling: Sampling) -> None:
        """Raise for a prompt that the model cannot read.

        Raises:
            InputError: the prompt is too long, or has an id without an embedding.
        """
        highest = int(prompt_ids.max())
        if highest >= self.embeddings:
            raise InputError(
                f"problem {problem.id!r}: its prompt has the token id {highest}, and the model embeddings for ids "
                f"below {self.embeddings}; model and tokenizer do not belong together"
            )
        if self.too_long(prompt_ids, sampling):
            raise self.refusal(problem, f"{len(prompt_ids)} tokens", sampling)

    def refusal(self, problem: Problem, length: str, sampling: Sampling) -> InputError:
        """Return the error of a prompt that is too long.

        Args:
            problem: its problem.
            length: of the prompt, in words.
            sampling: of the answer.
        """
        answer = f" and sampling.max_new_tokens={sampling.max_new_tokens}" if self.fixed else ""
        return InputError(
            f"problem {problem.id!r}: its prompt has {length}{answer}, and the model {self.positions} positions"
            f"{self.why}: {problem.prompt[:40]!r}...; --drop-long-prompts leaves such problems out"
        )

    def require_any(self, sampling: Sampling) -> None:
        """Raise if `max_new_tokens` leaves no room for a prompt of one token.

        Raises:
            InputError: there is no room.
        """
        if self.fixed and self.positions is not None and sampling.max_new_tokens >= self.positions:
            raise InputError(
                f"sampling.max_new_tokens={sampling.max_new_tokens}: the model has {self.positions} positions"
                f"{self.why}, prompt included; set --sampling.max-new-tokens below that"
            )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, limits: PromptLimits, problems: Sequence[Problem], sampling: Sampling
) -> list[Tensor]:
    """Return the [P] int64 ids of each problem's prompt.

    Raises:
        InputError: the model cannot read a prompt; names the problem.
    """
    prompts, progress = [], Progress("prompts tokenised", len(problems))
    for problem in problems:
        if least := limits.least_too_long(tokenizer, problem, sampling):
            raise limits.refusal(problem, f"{least:,} tokens or more", sampling)
        prompts.append(encode_prompt(tokenizer, problem))
        limits.require(problem, prompts[-1], sampling)
        progress.add()
    return prompts


def fitting(tokenizer: PreTrainedTokenizerBase, limits: PromptLimits, sampling: Sampling) -> Callable[[Problem], bool]:
    """Return a predicate of problems: whether the prompt is short enough for the model."""
    progress = Progress("prompts measured")

    def fits(problem: Problem) -> bool:
        progress.add()
        if limits.least_too_long(tokenizer, problem, sampling):
            return False
        return not limits.too_long(encode_prompt(tokenizer, problem), sampling)

    return fits
