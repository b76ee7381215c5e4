"""Reading prompts: in forward passes of nearly equal lengths, and what all of them begin with once."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from drpo.rollout.cache import windows
from drpo.rollout.routes import ReadRoutes

PREFILL_TOKENS = 16_384
"""Upper bound of positions, padding included, in one forward pass over prompts; bounds its memory."""

PADDING = 1 / 8
"""Largest share of padding in a forward pass."""

PREFIX_TOKENS = 32
"""Fewest tokens that prompts have to begin with in common for these to be read once, instead of with each prompt."""


def as_argument(model: PreTrainedModel, cache: DynamicCache) -> dict[str, DynamicCache]:
    """Return the cache by the model's name for it."""
    kind: Any = type(model)
    return {_cache_name(kind): cache}


@lru_cache
def _cache_name(kind: type[PreTrainedModel]) -> str:
    """Return a model's argument for its cache; models of recurrent layers alone have a name of their own."""
    return "cache_params" if "cache_params" in inspect.signature(kind.forward).parameters else "past_key_values"


def last_logits(logits: Tensor) -> Tensor:
    """Return the logits [B, V] of the last of [B, Q, V] positions."""
    return logits[:, -1]


def common_prefix(model: PreTrainedModel, prompts: Sequence[Tensor]) -> int:
    """Return how many tokens all prompts begin with that are worth to be read once, each having more; 0 for none.

    None with sliding windows, which count the padding between those tokens and the rest of a prompt.
    """
    shortest = min(map(len, prompts)) - 1
    if len(prompts) == 1 or shortest < PREFIX_TOKENS or any(windows(model)):
        return 0
    equal = torch.stack([prompt[:shortest] == prompts[0][:shortest] for prompt in prompts]).all(0)
    n = int(equal.long().cumprod(0).sum())
    return n if n >= PREFIX_TOKENS else 0


def read_prompts(
    model: PreTrainedModel, prompts: Sequence[Tensor], cache: DynamicCache, before: int = 0
) -> tuple[Tensor, Tensor]:
    """Read prompts, left-padded, into a cache; return the next tokens' logits [N, V] and the mask [N, P].

    The cache holds `before` tokens that come before each prompt.
    """
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    out = model(
        input_ids=ids,
        attention_mask=torch.cat([mask.new_ones(len(mask), before), mask], dim=1) if before else mask,
        position_ids=(mask.cumsum(1) - 1 + before).clamp(min=before),
        use_cache=True,
        logits_to_keep=1,
        **as_argument(model, cache),
    )
    return last_logits(out.logits), mask


def read_in_parts(
    model: PreTrainedModel, prompts: Sequence[Tensor], prefix: int, routes: ReadRoutes
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Read prompts of any lengths, the tokens that all begin with once.

    Returns:
        Logits [N, V], the mask [N, P] and each layer's keys and values [N, K, P, .].
    """
    width = max(len(p) for p in prompts)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64, device=model.device)
    logits, layers = torch.empty(0), list[tuple[Tensor, Tensor]]()
    begun = DynamicCache()  # without the model's windows: the shared cache keeps all keys
    if prefix:
        read_prompts(model, [prompts[0][:prefix]], begun)
        routes.begin()
    for part in parts_of([len(p) - prefix for p in prompts]):
        read = copy.deepcopy(begun)
        if prefix:
            read.batch_repeat_interleave(len(part))
        next_logits, part_mask = read_prompts(model, [prompts[i][prefix:] for i in part], read, prefix)
        routes.read(part, [len(prompts[i]) - prefix for i in part])
        if not layers:
            logits = next_logits.new_empty(len(prompts), next_logits.shape[1])
            layers = [(_empty(x.keys, len(prompts), width), _empty(x.values, len(prompts), width)) for x in read.layers]
        start = width - part_mask.shape[1]
        logits[part], mask[part, start:] = next_logits, part_mask
        for (keys, values), new in zip(layers, read.layers, strict=True):
            keys[part, :, start:], values[part, :, start:] = new.keys[:, :, prefix:], new.values[:, :, prefix:]
    for i, prompt in enumerate(prompts if prefix else ()):  # right before the rest of the prompt
        at = slice(width - len(prompt), width - len(prompt) + prefix)
        mask[i, at] = 1
        for (keys, values), first in zip(layers, begun.layers, strict=True):
            keys[i, :, at], values[i, :, at] = first.keys[0], first.values[0]
    return logits, mask, layers


def parts_of(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Split prompts into forward passes by length, within `PREFILL_TOKENS` and `PADDING`."""
    part: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        positions = (len(part) + 1) * lengths[i]
        padding = positions - sum(lengths[j] for j in part) - lengths[i]
        if part and (positions > PREFILL_TOKENS or padding > PADDING * positions):
            yield part
            part = []
        part = [*part, i]
    yield part


def _empty(like: Tensor, n_prompts: int, width: int) -> Tensor:
    return like.new_zeros(n_prompts, like.shape[1], width, like.shape[3])
