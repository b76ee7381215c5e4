"""Problems -> requests to an engine -> records of training; the one place that knows both problems and tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.models import stop_ids
from drpo.rollout.engine import Engine
from drpo.rollout.prompts import PromptLimits, encode_prompts
from drpo.types import Completion, Key, Problem, Request, Sampling


@dataclass(frozen=True, eq=False)
class EpisodeDriver:
    """Has problems answered by an engine.

    Args:
        engine: samples.
        tokenizer: encodes prompts, with the model's chat template, and decodes what was sampled.
        stop: ids of the tokens that end an answer.
        limits: of the prompts that the model can read.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    stop: frozenset[int]
    limits: PromptLimits

    @staticmethod
    def of(engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "EpisodeDriver":
        """The driver of an engine that samples from a model.

        Raises:
            InputError: the model depends on the longest position of a batch in a way of its own.
        """
        return EpisodeDriver(engine, tokenizer, stop_ids(model, tokenizer), PromptLimits.of(model))

    def run(self, problems: Sequence[Problem], sampling: Sampling, key: Key) -> list[Completion]:
        """Return `sampling.samples` completions of every problem, problem by problem, in order.

        Args:
            problems: with unique ids.
            sampling: the distribution to sample from.
            key: of the random numbers; those of a completion depend on it, the problem's id and the sample's number.

        Raises:
            InputError: the model cannot read a prompt, or the engine's answer cannot be used.
        """
        prompts = encode_prompts(self.tokenizer, self.limits, problems, sampling)
        rows = [(p, i, ids) for p, ids in zip(problems, prompts, strict=True) for i in range(sampling.samples)]
        requests = [
            Request(ids, sampling, self.stop, (*key, p.id, i), f"completion {i} of problem {p.id!r}")
            for p, i, ids in rows
        ]
        generations = self.engine.generate(requests)
        texts = self.tokenizer.batch_decode([g.token_ids for g in generations], skip_special_tokens=True)
        return [
            Completion(
                problem_id=problem.id,
                sample=sample,
                prompt_ids=prompt_ids,
                token_ids=g.token_ids,
                behavior_logp=g.behavior_logp,
                text=text,
                finish=g.finish_reason,
                sampling=sampling,
                version=g.version,
                top=g.top_logprobs,
            )
            for (problem, sample, prompt_ids), g, text in zip(rows, generations, texts, strict=True)
        ]
