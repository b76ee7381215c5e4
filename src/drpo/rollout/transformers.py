"""Rollouts in process with transformers: any causal LM, on any device, no server."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.errors import InputError
from drpo.models import persistent_buffers, stop_ids
from drpo.positions import narrowed
from drpo.precision import FP32, Precision, lower, unrounded_inputs
from drpo.rollout.cache import windows
from drpo.rollout.decode import Decoder, GroupDecoder, PlainDecoder, can_group, draw_rows
from drpo.rollout.engine import PromptLimits, Seed, encode_prompts
from drpo.rollout.sample import uniforms
from drpo.types import Completion, Problem, Sampling


class TransformersEngine:
    """Samples with its own copy of a model's weights, in its own precision: any causal LM with a key-value cache.

    A prompt goes through the model once and its keys and values are shared by its samples; rows that have ended leave
    the batch. The same seed draws the same completion whatever else is in the batch *as long as the logits are the
    same*: the random numbers depend on nothing else, but a matrix product may round differently with another number of
    rows, and a draw that falls within that rounding of a boundary (about 1e-6 in float32, 1e-2 in bf16) gives another
    token.

    Args:
        model: the model to copy; left as it is.
        tokenizer: its tokenizer.
        precision: of the copy.
        device: of the copy.
        max_rows: completions decoded together; more are done in turns.

    Raises:
        InputError: a model that keeps something else than keys and values, or has nothing that the precision means.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        precision: Precision = FP32,
        device: torch.device | None = None,
        max_rows: int = 256,
    ) -> None:
        windows(model)  # refuses models without a key-value cache
        self.model = copy.deepcopy(model).to(device or model.device).eval().requires_grad_(False)
        self._takers = lower(self.model, precision)
        self._takers |= {name: buffer.copy_ for name, buffer in persistent_buffers(self.model).items()}
        # After a prompt the head gets a strided slice, for which torch copies the head's weight once per row.
        self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
        self.tokenizer = tokenizer
        self._limits = PromptLimits.of(model)
        self.version = 0
        self._stop = torch.tensor(sorted(stop_ids(model, tokenizer)), device=self.model.device)
        self._max_rows = max_rows
        self._grouped: bool | None = None  # whether samples can share their prompt's keys, once that was tried

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], version: int) -> None:
        """Copy new parameters and persistent buffers in, by name, in the engine's precision, and stamp the version."""
        for name in self._takers:
            if name not in state:
                raise InputError(f"weights for the rollout engine lack {name!r}")
        for name, take in self._takers.items():
            take(state[name])
        self.version = version

    def close(self) -> None:
        """Nothing is held."""

    def generate(self, problems: Sequence[Problem], sampling: Sampling, seed: Seed) -> list[Completion]:
        """Return `sampling.samples` completions of every problem, problem by problem, in order.

        Raises:
            InputError: the model cannot read a prompt, or has no room for its completion.
        """
        prompts = encode_prompts(self.tokenizer, self._limits, problems, sampling)
        order = sorted(range(len(problems)), key=lambda i: len(prompts[i]))  # turns of like lengths need little padding
        per_turn = max(1, self._max_rows // sampling.samples)
        groups: dict[int, list[Completion]] = {}
        for start in range(0, len(order), per_turn):
            turn = order[start : start + per_turn]
            drawn = self._turn([problems[i] for i in turn], [prompts[i] for i in turn], sampling, seed)
            for at, i in enumerate(turn):
                groups[i] = drawn[at * sampling.samples : (at + 1) * sampling.samples]
        return [completion for i in range(len(problems)) for completion in groups[i]]

    def _turn(
        self, problems: Sequence[Problem], prompts: Sequence[Tensor], sampling: Sampling, seed: Seed
    ) -> list[Completion]:
        rows = [(p, i) for p in problems for i in range(sampling.samples)]
        u = torch.stack([uniforms((*seed, p.id, i), sampling.max_new_tokens) for p, i in rows])
        drawn = draw_rows(self._decoder(prompts, sampling.samples), u, self._stop, sampling)
        texts = self.tokenizer.batch_decode([d.token_ids for d in drawn], skip_special_tokens=True)
        return [
            Completion(
                problem_id=problem.id,
                sample=sample,
                prompt_ids=prompts[row // sampling.samples],
                token_ids=drawn[row].token_ids,
                behavior_logp=drawn[row].logp,
                text=texts[row],
                finish="stop" if drawn[row].stopped else "length",
                sampling=sampling,
                version=self.version,
                top=drawn[row].top,
            )
            for row, (problem, sample) in enumerate(rows)
        ]

    @torch.inference_mode()
    def _decoder(self, prompts: Sequence[Tensor], samples: int) -> Decoder:
        """Read the prompts."""
        if self._grouped is None:
            with unrounded_inputs(self.model), narrowed(self.model):
                self._grouped = can_group(self.model, prompts[0])
        return (GroupDecoder if self._grouped else PlainDecoder)(self.model, prompts, samples)
