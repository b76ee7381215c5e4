"""Problems -> requests to an engine -> episodes; the only module that knows both problems and tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.model.loading import stop_ids
from drpo.rollout.engine import Engine
from drpo.rollout.prompts import PromptLimits, encode_prompts
from drpo.types import Episode, Generation, Key, Problem, Request, Sampling, TokenSequence
from drpo.types.problem import message


@dataclass(frozen=True, eq=False)
class EpisodeDriver:
    """Runs episodes of problems with an engine.

    Args:
        engine: samples the tokens.
        tokenizer: encodes prompts, with the model's chat template, and decodes sampled tokens.
        stop: token ids that end a turn.
        limits: the limits of prompts that the model can read.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    stop: frozenset[int]
    limits: PromptLimits

    @staticmethod
    def of(engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "EpisodeDriver":
        """Return the driver of an engine that samples from a model.

        Raises:
            InputError: see `drpo.model.positions.sequence_limit`.
        """
        return EpisodeDriver(engine, tokenizer, stop_ids(model, tokenizer), PromptLimits.of(model))

    def run(self, problems: Sequence[Problem], sampling: Sampling, key: Key) -> list[tuple[Episode, ...]]:
        """Return the episodes of every problem: `sampling.samples` of each, in order.

        Args:
            problems: with unique ids.
            sampling: the distribution to sample from.
            key: seeds the random numbers, together with the problem's id and the sample's number.

        Raises:
            InputError: the model cannot read a prompt, or the engine's output is invalid.
        """
        prompts = encode_prompts(self.tokenizer, self.limits, problems, sampling)
        rows = [(p, i, ids) for p, ids in zip(problems, prompts, strict=True) for i in range(sampling.samples)]
        requests = [
            Request(ids, sampling, self.stop, (*key, p.id, i), f"completion {i} of problem {p.id!r}")
            for p, i, ids in rows
        ]
        generations = self.engine.generate(requests)
        texts = self.tokenizer.batch_decode([g.token_ids for g in generations], skip_special_tokens=True)
        shown = self.tokenizer.batch_decode(prompts)
        episodes = (
            _one_turn(problem, sample, shown[n // sampling.samples], prompt_ids, sampling, generation, text)
            for n, ((problem, sample, prompt_ids), generation, text) in enumerate(
                zip(rows, generations, texts, strict=True)
            )
        )
        return [tuple(islice(episodes, sampling.samples)) for _ in problems]


def _one_turn(
    problem: Problem, sample: int, prompt: str, prompt_ids: Tensor, sampling: Sampling, g: Generation, text: str
) -> Episode:
    return Episode(
        problem_id=problem.id,
        sample=sample,
        messages=(*problem.messages, message("assistant", text)),
        prompt=prompt,
        text=text,
        finish_reason=g.finish_reason,
        sampling=sampling,
        turns=(len(g.token_ids),),
        sequences=(TokenSequence.of(prompt_ids, g),),
    )
