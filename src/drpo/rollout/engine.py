"""The engine protocol, and a scripted engine that says what a test tells it to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.errors import InputError
from drpo.positions import sequence_limit
from drpo.types import Completion, Problem, Sampling, TopK

Seed = tuple[int | str, ...]


class Engine(Protocol):
    """Draws completions with its own copy of the weights."""

    def generate(self, problems: Sequence[Problem], sampling: Sampling, seed: Seed) -> list[Completion]:
        """Return `sampling.samples` completions of every problem, problem by problem, in order.

        The random numbers behind a completion are a function of (seed, problem id, sample number) alone. Each carries
        `top` where `sampling.top_logprobs` asks for it.
        """
        ...

    def load(self, state: Mapping[str, Tensor], version: int) -> None:
        """Take new weights, by parameter name; later completions carry `version`."""
        ...

    def close(self) -> None:
        """Give back what the engine holds besides memory; it is not used afterwards."""
        ...


class NoEngine:
    """In place of an engine, on a rank that leaves sampling to others."""

    def generate(self, problems: Sequence[Problem], sampling: Sampling, seed: Seed) -> list[Completion]:
        """Nothing is asked of it."""
        return []

    def load(self, state: Mapping[str, Tensor], version: int) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> Tensor:
    """Return the [P] int64 ids of a problem's prompt, through the model's chat template where it has one.

    Without a template the system message, where there is one, stands before the prompt, a blank line between; what the
    tokenizer appends to a text, an EOS as a rule, is left out, because the answer has yet to come.

    Raises:
        InputError: the prompt is empty, the template refuses it or ends it with an EOS, or it is no Unicode.
    """
    text = _templated(tokenizer, problem)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"problem {problem.id!r}: its prompt holds half a character, {text[error.start]!a} at place {error.start}; "
            "repair the data"
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
        return problem.prompt if problem.system is None else f"{problem.system}\n\n{problem.prompt}"
    system = [] if problem.system is None else [{"role": "system", "content": problem.system}]
    messages = [*system, {"role": "user", "content": problem.prompt}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program, which may raise anything
        hint = "; without a system message it may do: leave out the task's system" if system else ""
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
        """Those of a model; see `drpo.positions.sequence_limit` for the rotary embeddings that fix them.

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


@dataclass
class ScriptedEngine:
    """An engine for tests: it "samples" the texts that a script gives, every token at the same log-probability.

    All other words share what the scripted one leaves, so that `top` is a law too.

    Args:
        tokenizer: makes ids of prompts and of scripted texts.
        script: (problem, sample number) -> text.
        logp: log-probability reported for every token, nats.
        loaded: versions that `load` was given, in order.
    """

    tokenizer: PreTrainedTokenizerBase
    script: Callable[[Problem, int], str]
    logp: float = -0.5
    version: int = 0
    loaded: list[int] = field(default_factory=list)

    def generate(self, problems: Sequence[Problem], sampling: Sampling, seed: Seed) -> list[Completion]:
        """Return what the script says, cut at `max_new_tokens`, with an EOS where it fits."""
        return [self._completion(p, i, sampling) for p in problems for i in range(sampling.samples)]

    def _completion(self, problem: Problem, sample: int, sampling: Sampling) -> Completion:
        text = self.script(problem, sample)
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        token_ids = torch.tensor(ids[: sampling.max_new_tokens], dtype=torch.int64)
        return Completion(
            problem_id=problem.id,
            sample=sample,
            prompt_ids=encode_prompt(self.tokenizer, problem),
            token_ids=token_ids,
            behavior_logp=torch.full(token_ids.shape, self.logp),
            text=text,
            finish="stop" if len(ids) <= sampling.max_new_tokens else "length",
            sampling=sampling,
            version=self.version,
            top=self._top(token_ids, sampling.top_logprobs) if sampling.top_logprobs else None,
        )

    def _top(self, token_ids: Tensor, k: int) -> TopK:
        """The scripted word, then the first k - 1 others."""
        others = torch.arange(k - 1).expand(len(token_ids), -1)
        ids = torch.cat([token_ids[:, None], others + (others >= token_ids[:, None])], 1)
        left = -torch.tensor(self.logp).expm1()
        logp = (left / (len(self.tokenizer) - 1)).log().repeat(ids.shape)
        logp[:, 0] = self.logp
        return TopK(ids, logp)

    def load(self, state: Mapping[str, Tensor], version: int) -> None:
        """Note the version; there are no weights to take."""
        self.version = version
        self.loaded.append(version)

    def close(self) -> None:
        """Nothing is held."""
