"""Prompts as a model reads them: the chat template, and the limits of what the model can read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.errors import InputError
from drpo.model.positions import sequence_limit
from drpo.types import Problem, Sampling


def encode_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> Tensor:
    """Return the [P] int64 ids of a problem's prompt, through the model's chat template where it has one.

    Without a template the texts of its messages follow one another, a blank line between; what the tokenizer appends to
    a text, an EOS as a rule, is left out, because the answer has yet to come.

    Raises:
        InputError: the prompt is empty, the template refuses it or ends it with an EOS, or it is no Unicode.
    """
    text = _templated(tokenizer, problem)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"problem {problem.id!r}: its prompt holds half a character, {text[error.start]!a} at character "
            f"{error.start}; repair the data"
        ) from None
    if tokenizer.chat_template:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes the special tokens itself
        if ids and ids[-1] == tokenizer.eos_token_id:
            raise InputError(
                f"problem {problem.id!r}: the model's chat template ends the prompt with {tokenizer.eos_token!r}, "
                "after which there is no answer; give the tokenizer a template that adds a generation prompt"
            )
    else:
        ids = _unended(tokenizer, text)
    if not ids:
        raise InputError(f"problem {problem.id!r}: its prompt {problem.prompt!r} has no tokens")
    return torch.tensor(ids, dtype=torch.int64)


def _templated(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> str:
    if not tokenizer.chat_template:
        return "\n\n".join(str(m["content"]) for m in problem.messages)
    try:
        return str(tokenizer.apply_chat_template(list(problem.messages), tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program, which may raise anything
        has_system = problem.messages[0]["role"] == "system"
        hint = "; without a system message it may do: leave out the task's system" if has_system else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"problem {problem.id!r}: the model's chat template refuses it: {reason}{hint}") from None


def _unended(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text with what the tokenizer puts before it, but with nothing after it and no EOS at its end."""
    ids: list[int] = tokenizer(text)["input_ids"]
    plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not plain:
        return ids
    starts = (i for i in range(len(ids) - len(plain) + 1) if ids[i : i + len(plain)] == plain)
    ids = ids[: next(starts, len(ids) - len(plain)) + len(plain)]
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


@dataclass(frozen=True)
class PromptLimits:
    """What prompts a model can read.

    Args:
        embeddings: ids are below it.
        positions: tokens that it has positions for; None where any number does.
        fixed: whether there are no others, so that the answer has to fit too; else positions are computed, and an
            answer may run past those that the model was trained on.
        why: there are no others, where that is not plain.
    """

    embeddings: int
    positions: int | None
    fixed: bool
    why: str = ""

    @staticmethod
    def of(model: PreTrainedModel) -> "PromptLimits":
        """Those of a model; see `drpo.model.positions.sequence_limit` for the rotary embeddings that fix them.

        Raises:
            InputError: the model depends on the longest position of a batch in a way of its own.
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
        """Whether a prompt, and where it matters its answer, has more tokens than there are positions."""
        wanted = len(prompt_ids) + (sampling.max_new_tokens if self.fixed else 1)
        return self.positions is not None and wanted > self.positions

    def require(self, problem: Problem, prompt_ids: Tensor, sampling: Sampling) -> None:
        """Refuse a prompt that the model cannot read.

        Raises:
            InputError: it is too long, or has an id without an embedding.
        """
        highest = int(prompt_ids.max())
        if highest >= self.embeddings:
            raise InputError(
                f"problem {problem.id!r}: its prompt has the token id {highest}, and the model embeddings for ids "
                f"below {self.embeddings}; model and tokenizer do not belong together"
            )
        if self.too_long(prompt_ids, sampling):
            answer = f" and sampling.max_new_tokens={sampling.max_new_tokens}" if self.fixed else ""
            raise InputError(
                f"problem {problem.id!r}: its prompt has {len(prompt_ids)} tokens{answer}, and the model "
                f"{self.positions} positions{self.why}: {problem.prompt[:40]!r}...; --drop-long-prompts leaves such "
                "problems out"
            )

    def require_any(self, sampling: Sampling) -> None:
        """Refuse answers so long that not even a prompt of one token fits.

        Raises:
            InputError: they are.
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
        InputError: the model cannot read one of them; says which.
    """
    prompts = [encode_prompt(tokenizer, problem) for problem in problems]
    for problem, ids in zip(problems, prompts, strict=True):
        limits.require(problem, ids, sampling)
    return prompts


def fitting(tokenizer: PreTrainedTokenizerBase, limits: PromptLimits, sampling: Sampling) -> Callable[[Problem], bool]:
    """Return what says of a problem whether its prompt is short enough for a model."""
    return lambda problem: not limits.too_long(encode_prompt(tokenizer, problem), sampling)
