"""Sampling tokens for many rows together, step by step."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from drpo.errors import InputError
from drpo.rollout import attention
from drpo.rollout.cache import GroupCache, windows
from drpo.rollout.engine import generation
from drpo.rollout.sample import draw, top_logprobs, uniforms
from drpo.types import Generation, Request, Sampling, TopK

log = logging.getLogger("drpo")

PREFILL_TOKENS = 16_384
"""Upper bound of positions, padding included, in one forward pass over prompts; bounds its memory."""

PADDING = 1 / 8
"""Largest share of padding in a forward pass."""

LOOK_EVERY = {"cpu": 1}
"""Tokens between two checks for finished rows; `LOOK_SELDOM` on devices where a check is a sync."""

LOOK_SELDOM = 8

IDLE_STEPS = 0.5
"""Wasted work on finished rows, in steps of the whole batch, after which they are dropped; estimates a drop's cost."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest mean difference of the grouped attention's logits from the model's, in standard deviations."""


REFUSED = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.3}
"""Largest mean difference of logits with and without a cache; in 16 bits a mixture may choose another expert."""


class Decoder(Protocol):
    """A model that has read the prompts of B rows and continues them.

    Args:
        logits: [B, V], of each row's first token.
        full: True if the next step copies the cache, so that dropping rows now is free.
    """

    logits: Tensor

    @property
    def full(self) -> bool:
        """See above."""
        ...

    def step(self, token: Tensor) -> Tensor:
        """Append token [B] and return the logits [B, V] of the next."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (ascending) alone."""
        ...


class PlainDecoder:
    """Decodes with the model's attention and transformers' cache; each row copies its prompt's keys and values."""

    full = False

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Tensor], samples: int) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        logits, mask = _read(model, prompts, self.cache)
        self.cache.batch_repeat_interleave(samples)
        self.logits, self.mask = logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)

    def step(self, token: Tensor) -> Tensor:
        """Append token [B] and return the logits [B, V] of the next."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        out = self.model(
            input_ids=token[:, None],
            attention_mask=self.mask,
            position_ids=self.mask.sum(1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        return _last(out.logits)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (ascending) alone."""
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)


class GroupDecoder:
    """Decodes with attention that reads a prompt's keys and values once for all samples, and a cache in place."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Tensor], samples: int) -> None:
        self.model = model
        logits, mask, layers = _read_in_parts(model, prompts)
        self.logits, self.position = logits.repeat_interleave(samples, 0), mask.sum(1).repeat_interleave(samples)
        self.cache = GroupCache(layers, mask, samples, windows(model))

    @property
    def full(self) -> bool:
        """True if the next step copies the cache."""
        return self.cache.full

    def step(self, token: Tensor) -> Tensor:
        """Append token [B] and return the logits [B, V] of the next."""
        self.cache.room()
        with _attention(self.model, attention.NAME):
            out = self.model(
                input_ids=token[:, None],
                position_ids=self.position[:, None],
                past_key_values=self.cache,
                use_cache=True,
                groups=self.cache,
            )
        self.position = self.position + 1
        return _last(out.logits)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (ascending) alone."""
        self.position = self.position[rows]
        self.cache.keep(rows)


def _last(logits: Tensor) -> Tensor:
    return logits[:, -1]


def _read(model: PreTrainedModel, prompts: Sequence[Tensor], cache: DynamicCache) -> tuple[Tensor, Tensor]:
    """Read prompts, left-padded, into an empty cache; return the next tokens' logits [N, V] and the mask [N, P]."""
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return _last(out.logits), mask


def _read_in_parts(
    model: PreTrainedModel, prompts: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Read prompts of any lengths; return logits [N, V], mask [N, P] and each layer's keys and values [N, K, P, .]."""
    width = max(len(p) for p in prompts)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64, device=model.device)
    logits, layers = torch.empty(0), list[tuple[Tensor, Tensor]]()
    for part in _parts([len(p) for p in prompts]):
        read = DynamicCache()  # without the model's windows: the shared cache keeps all keys
        next_logits, part_mask = _read(model, [prompts[i] for i in part], read)
        if not layers:
            logits = next_logits.new_empty(len(prompts), next_logits.shape[1])
            layers = [(_empty(x.keys, len(prompts), width), _empty(x.values, len(prompts), width)) for x in read.layers]
        start = width - part_mask.shape[1]
        logits[part], mask[part, start:] = next_logits, part_mask
        for (keys, values), new in zip(layers, read.layers, strict=True):
            keys[part, :, start:], values[part, :, start:] = new.keys, new.values
    return logits, mask, layers


def _parts(lengths: Sequence[int]) -> Iterator[list[int]]:
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


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use another of transformers' registered attention functions; restore the model's afterwards."""
    original = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = original


def draw_rows(decoder: Decoder, requests: Sequence[Request], version: int) -> list[Generation]:
    """Sample every row to its end.

    Args:
        decoder: has read the prompts; row b belongs to request b.
        requests: all with the same `sampling` and `stop`.
        version: the version of the decoder's weights.

    Raises:
        BrokenLogpError: a row's logits are not finite.
    """
    sampling = requests[0].sampling
    u = torch.stack([uniforms(r.key, sampling.max_new_tokens) for r in requests])
    stop = torch.tensor(sorted(requests[0].stop), dtype=torch.int64)
    tokens, logps, top = _draw_on(decoder, u, stop.to(decoder.logits.device), sampling)
    ends = torch.isin(tokens, stop)
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, tokens.shape[1]).tolist()
    # Clones, because inference tensors and views of the whole batch must not leave this function.
    return [
        generation(
            requests[b],
            tokens[b, :n].clone(),
            logps[b, :n].clone(),
            "stop" if ends[b, n - 1] else "length",
            version,
            None if top is None else TopK(top.ids[b, :n].clone(), top.logp[b, :n].clone()),
        )
        for b, n in enumerate(lengths)
    ]


@torch.inference_mode()
def _draw_on(decoder: Decoder, u: Tensor, stop: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, TopK | None]:
    """Return tokens and log-probabilities [B, N], and the most probable tokens [B, N, K] if requested.

    Tokens after a row's first stop token are arbitrary.

    Finished rows are dropped when the work on them has cost about as much as dropping them, or when the cache is copied
    anyway. Until then they continue, and their further tokens are discarded at the end.
    """
    device = decoder.logits.device
    u = u.to(device)
    tokens = torch.zeros(u.shape, dtype=torch.int64, device=device)
    logps = torch.zeros(u.shape, dtype=torch.float32, device=device)
    top = _room(tokens, sampling.top_logprobs) if sampling.top_logprobs else None
    active = torch.arange(len(u), device=device)
    alive = torch.ones(len(u), dtype=torch.bool, device=device)
    every = LOOK_EVERY.get(device.type, LOOK_SELDOM)
    idle = 0
    logits = decoder.logits
    for t in range(u.shape[1]):
        token, logp = draw(logits, u[active, t], sampling)
        tokens[active, t], logps[active, t] = token, logp
        if top is not None:
            at_step = top_logprobs(logits, sampling)
            top.ids[active, t], top.logp[active, t] = at_step.ids, at_step.logp
        if t + 1 == u.shape[1]:
            break
        alive &= ~torch.isin(token, stop)
        if t % every == 0:
            going = alive.nonzero()[:, 0]
            if not len(going):
                break
            idle += every * (len(active) - len(going))
            if len(going) < len(active) and (decoder.full or idle > IDLE_STEPS * len(active)):
                decoder.keep(going)
                active, token, alive, idle = active[going], token[going], alive[going], 0
        logits = decoder.step(token)
    return tokens.cpu(), logps.cpu(), None if top is None else top.to(torch.device("cpu"))


def _room(tokens: Tensor, k: int) -> TopK:
    """Return zeros for k tokens at each position of tokens [B, N]."""
    ids = tokens.new_zeros(*tokens.shape, k)
    return TopK(ids, torch.zeros_like(ids, dtype=torch.float32))


@torch.inference_mode()
def can_group(model: PreTrainedModel, prompt: Tensor) -> bool:
    """Return whether `GroupDecoder` returns the logits of `PlainDecoder`, compared on the end of this prompt.

    Raises:
        InputError: `PlainDecoder` does not return the model's logits without a cache.
    """
    prompts = [prompt[-1:], prompt[-8:]]
    try:
        expected = _uncached(model, prompts)
        plain = _trial(PlainDecoder(model, prompts, 2))
    except Exception as error:  # for example a model that requires other inputs than tokens
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{type(model).__name__} cannot be sampled from, token by token: {reason}") from None
    if (gap := _gap(plain, expected)) >= REFUSED[plain.dtype]:
        raise InputError(
            f"{type(model).__name__}: with a key-value cache and prompts padded on the left its logits differ from its "
            f"own by {gap:.1e} of their spread, so what it samples would not be what is trained"
        )
    try:
        grouped = _trial(GroupDecoder(model, prompts, 2))
    except Exception as error:  # a model that the grouped attention does not support
        log.debug("%s keeps its own attention: %s", type(model).__name__, error)
        return False
    gap = _gap(grouped, plain)
    log.debug("%s: grouped attention differs from its own by %.1e", type(model).__name__, gap)
    return gap < TOLERANCE[grouped.dtype]


def _gap(a: Tensor, b: Tensor) -> float:
    """Return the mean difference, in standard deviations of `b`."""
    return float((a - b).abs().mean() / b.std())


def _trial(decoder: Decoder) -> Tensor:
    """Return the logits of a few steps, with a row dropped in between."""
    steps = [decoder.logits]
    for _ in range(2):
        token = torch.arange(len(steps[-1]), device=steps[-1].device)
        steps.append(decoder.step(token))
    decoder.keep(torch.tensor([0, 2, 3], device=steps[-1].device))
    steps.append(decoder.step(token[:3]))
    return torch.cat(steps)


def _uncached(model: PreTrainedModel, prompts: Sequence[Tensor]) -> Tensor:
    """Return the logits expected from `_trial`, computed without a cache on whole, right-padded texts."""
    rows = [torch.cat([prompts[b // 2], torch.tensor([b, b, last])]) for b, last in enumerate((0, 0, 1, 2))]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    end = [len(row) - 4 for row in rows]  # the prompt's last token
    kept = [*((b, t) for t in range(3) for b in range(4)), *((b, 3) for b in (0, 2, 3))]
    return torch.stack([logits[b, end[b] + t] for b, t in kept])
