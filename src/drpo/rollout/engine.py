"""The engine protocol, and a scripted engine that says what a test tells it to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drpo.errors import InputError
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

    Without a template the system message, where there is one, stands before the prompt, a blank line between.

    Raises:
        InputError: the prompt is empty.
    """
    if tokenizer.chat_template:
        system = [] if problem.system is None else [{"role": "system", "content": problem.system}]
        messages = [*system, {"role": "user", "content": problem.prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes the special tokens itself
    else:
        text = problem.prompt if problem.system is None else f"{problem.system}\n\n{problem.prompt}"
        ids = tokenizer(text)["input_ids"]
    if not ids:
        raise InputError(f"problem {problem.id!r}: its prompt {problem.prompt!r} has no tokens")
    return torch.tensor(ids, dtype=torch.int64)


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
