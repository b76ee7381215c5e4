"""Rollouts in process with transformers: any causal LM, on any device, no server."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from drpo.errors import InputError
from drpo.models import stop_ids
from drpo.rollout.engine import Seed, encode_prompt
from drpo.rollout.sample import draw, uniforms
from drpo.types import Completion, Problem, Sampling


class TransformersEngine:
    """Samples with its own copy of a model's weights, in its own precision: any causal LM with a key-value cache.

    A prompt goes through the model once and its keys and values are shared by its samples; a row leaves the batch when
    it ends. The same seed draws the same completion whatever else is in the batch *as long as the logits are the same*:
    the random numbers depend on nothing else, but a matrix product may round differently with another number of rows,
    and a draw that falls within that rounding of a boundary (about 1e-6 in float32, 1e-2 in bf16) gives another token.

    Args:
        model: the model to copy; left as it is.
        tokenizer: its tokenizer.
        dtype: of the copy's parameters.
        device: of the copy.
        max_rows: completions decoded together; more are done in turns.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        max_rows: int = 256,
    ) -> None:
        self.model = copy.deepcopy(model).to(device or model.device).eval().requires_grad_(False)
        # Parameters only: rotary frequencies are buffers, and in bf16 they would point to other places.
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        # After a prompt the head gets a strided slice, for which torch copies the head's weight once per row.
        self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
        self.tokenizer = tokenizer
        self.version = 0
        self._stop = torch.tensor(sorted(stop_ids(model, tokenizer)), device=self.model.device)
        self._max_rows = max_rows

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], version: int) -> None:
        """Copy new weights in, by parameter name, rounding to the engine's precision, and stamp the version."""
        parameters = dict(self.model.named_parameters())
        for name in parameters:
            if name not in state:
                raise InputError(f"weights for the rollout engine lack {name!r}")
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
        self.version = version

    def generate(self, problems: Sequence[Problem], sampling: Sampling, seed: Seed) -> list[Completion]:
        """Return `sampling.samples` completions of every problem, problem by problem, in order."""
        per_turn = max(1, self._max_rows // sampling.samples)
        turns = [problems[i : i + per_turn] for i in range(0, len(problems), per_turn)]
        return [completion for turn in turns for completion in self._turn(turn, sampling, seed)]

    def _turn(self, problems: Sequence[Problem], sampling: Sampling, seed: Seed) -> list[Completion]:
        rows = [(p, i) for p in problems for i in range(sampling.samples)]
        prompts = [encode_prompt(self.tokenizer, p) for p in problems]
        u = torch.stack([uniforms((*seed, p.id, i), sampling.max_new_tokens) for p, i in rows])
        drawn = _decode(self.model, prompts, u, self._stop, sampling)
        texts = self.tokenizer.batch_decode([d.token_ids for d in drawn], skip_special_tokens=True)
        return [
            Completion(
                problem_id=problem.id,
                sample=sample,
                prompt_ids=prompts[row // sampling.samples],
                token_ids=drawn[row].token_ids.clone(),  # an ordinary tensor, and not a view of the whole turn's
                behavior_logp=drawn[row].logp.clone(),
                text=texts[row],
                finish="stop" if drawn[row].stopped else "length",
                sampling=sampling,
                version=self.version,
            )
            for row, (problem, sample) in enumerate(rows)
        ]


@dataclass(frozen=True, eq=False)
class _Drawn:
    """One row's tokens [N], their log-probabilities [N], and whether an EOS ended it."""

    token_ids: Tensor
    logp: Tensor
    stopped: bool


@torch.inference_mode()
def _decode(
    model: PreTrainedModel, prompts: Sequence[Tensor], u: Tensor, stop: Tensor, sampling: Sampling
) -> list[_Drawn]:
    """Sample every row of u [B, N] to its end; row b belongs to prompt b // samples."""
    device = model.device
    n_rows = len(u)
    tokens = torch.zeros(u.shape, dtype=torch.int64)
    logps = torch.zeros(u.shape, dtype=torch.float32)
    lengths = torch.full((n_rows,), u.shape[1])
    stopped = torch.zeros(n_rows, dtype=torch.bool)

    logits, cache, mask = _prefill(model, prompts, sampling.samples)
    active = torch.arange(n_rows)
    for t in range(u.shape[1]):
        token, logp = draw(logits, u[active, t].to(device), sampling)
        tokens[active, t], logps[active, t] = token.cpu(), logp.cpu()
        ended = torch.isin(token, stop)
        if ended.any():
            done = active[ended.cpu()]
            lengths[done], stopped[done] = t + 1, True
            going = (~ended).nonzero()[:, 0]
            active, token, mask = active[going.cpu()], token[going], mask[going]
            if len(active) and t + 1 < u.shape[1]:
                cache.batch_select_indices(going)
        if not len(active) or t + 1 == u.shape[1]:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = mask.sum(1, keepdim=True) - 1
        logits = model(
            input_ids=token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).logits[:, -1]
    return [_Drawn(tokens[b, :n], logps[b, :n], bool(stopped[b])) for b, n in enumerate(lengths.tolist())]


def _prefill(model: PreTrainedModel, prompts: Sequence[Tensor], samples: int) -> tuple[Tensor, DynamicCache, Tensor]:
    """Run each prompt once, left-padded, then repeat its logits, cache and mask for each of its samples."""
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(samples)
    return out.logits[:, -1].repeat_interleave(samples, 0), cache, mask.repeat_interleave(samples, 0)
