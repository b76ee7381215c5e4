"""What vLLM is asked, and how its answer becomes a completion: the same in process and over a server."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.errors import InputError
from drpo.models import stop_ids
from drpo.rollout.engine import PromptLimits, Seed, encode_prompts
from drpo.seeds import derive
from drpo.types import Completion, Problem, Sampling, TopK


@dataclass(frozen=True, eq=False)
class Request:
    """One completion to be drawn.

    Args:
        problem: its question.
        sample: which of the group's samples.
        prompt_ids: [P] int64.
        parameters: of vLLM's SamplingParams, all that decide what is drawn, plain JSON values.
    """

    problem: Problem
    sample: int
    prompt_ids: Tensor
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What vLLM drew for one request.

    Args:
        token_ids: N of them, with the one that ended it.
        logp: N log-probabilities, nats; None where they are missing.
        finish: vLLM's reason to end: "stop", "length", or something that went wrong.
        top: for each of the N places the (id, log-probability) pairs of the likeliest tokens, in any order.
    """

    token_ids: Sequence[int]
    logp: Sequence[float] | None
    finish: str | None
    top: Sequence[Sequence[tuple[int, float]]] = ()


class Asker:
    """Makes the requests of a rollout and reads the answers.

    Args:
        model: the transformers model that vLLM has a copy of.
        tokenizer: its tokenizer.

    Attributes:
        vocabulary: how many tokens there are.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._stop, self._limits = sorted(stop_ids(model, tokenizer)), PromptLimits.of(model)
        self.vocabulary = int(model.config.get_text_config().vocab_size)

    def requests(self, problems: Sequence[Problem], sampling: Sampling, seed: Seed) -> list[Request]:
        """Return a request for every completion, problem by problem, in order.

        Raises:
            InputError: more likeliest tokens are asked for than there are, or a prompt cannot be read.
        """
        if sampling.top_logprobs > self.vocabulary:
            raise InputError(
                f"sampling.top_logprobs={sampling.top_logprobs}: the model has {self.vocabulary} tokens; ask for fewer"
            )
        prompts = encode_prompts(self.tokenizer, self._limits, problems, sampling)
        return [
            Request(p, i, ids, parameters(sampling, derive(*seed, p.id, i), self._stop))
            for p, ids in zip(problems, prompts, strict=True)
            for i in range(sampling.samples)
        ]

    def completion(self, request: Request, answer: Answer, sampling: Sampling, version: int) -> Completion:
        """Return the completion.

        Raises:
            InputError: vLLM gave up on it, or its log-probabilities are missing or broken.
        """
        if answer.finish not in ("stop", "length"):
            raise InputError(
                f"completion {request.sample} of problem {request.problem.id!r}: vLLM ended it for "
                f"{str(answer.finish)[:40]!r}, not at a stop token or at the length limit"
            )
        self._require_possible(request, answer)
        return Completion(
            problem_id=request.problem.id,
            sample=request.sample,
            prompt_ids=request.prompt_ids,
            token_ids=torch.tensor(answer.token_ids, dtype=torch.int64),
            behavior_logp=None if answer.logp is None else torch.tensor(answer.logp),  # type: ignore[arg-type]
            text=self.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True),
            finish="stop" if answer.finish == "stop" else "length",
            sampling=sampling,
            version=version,
            top=_top(answer.top, sampling.top_logprobs) if sampling.top_logprobs else None,
        )

    def _require_possible(self, request: Request, answer: Answer) -> None:
        """Refuse tokens that were not asked for, or that the model does not have.

        Raises:
            InputError: there are too many, or one is no token.
        """
        ids, most = list(answer.token_ids), request.parameters["max_tokens"]
        listed = [token for row in answer.top for token, _ in row]
        odd = next((i for i in (*ids, *listed) if type(i) is not int or not 0 <= i < self.vocabulary), None)
        if len(ids) > most or odd is not None:
            what = f"{len(ids)} tokens of at most {most}" if len(ids) > most else f"{str(odd)[:40]!r} as a token"
            raise InputError(f"completion {request.sample} of problem {request.problem.id!r}: vLLM sent {what}")


def parameters(sampling: Sampling, seed: int, stop: Sequence[int]) -> dict[str, Any]:
    """Return every parameter of vLLM's SamplingParams that decides what is drawn or when it ends.

    All are sent, also those at vLLM's own defaults: what is not sent a server takes from the model's
    generation_config.json. `ignore_eos` leaves the stop tokens to `stop_token_ids`, so there is one list of them.

    Args:
        sampling: the law.
        seed: of this completion alone, 63 bits.
        stop: ids that end it.

    Example:
        >>> sent = parameters(Sampling(temperature=0.6), seed=7, stop=[2])
        >>> sent["temperature"], sent["top_k"], sent["seed"], sent["n"]
        (0.6, 0, 7, 1)
    """
    return {
        "n": 1,
        "seed": seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": None,
        "structured_outputs": None,
        "stop": None,
        "stop_token_ids": list(stop),
        "ignore_eos": True,
        "min_tokens": 0,
        "max_tokens": sampling.max_new_tokens,
        "logprobs": sampling.top_logprobs,
        "prompt_logprobs": None,
        "detokenize": False,
    }


def _top(places: Sequence[Sequence[tuple[int, float]]], k: int) -> TopK:
    """The k likeliest of each place; vLLM gives the sampled token besides, first, where it is not among them."""
    chosen = [sorted(place, key=lambda pair: -pair[1])[:k] for place in places]
    ids = torch.tensor([[token for token, _ in place] for place in chosen], dtype=torch.int64)
    return TopK(ids, torch.tensor([[logp for _, logp in place] for place in chosen]))
