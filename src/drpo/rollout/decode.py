"""Drawing tokens for many rows together, one step at a time."""

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
"""Most positions, padding included, that prompts fill in one forward pass: what bounds its memory."""

PADDING = 1 / 8
"""Most of a forward pass that may be padding."""

LOOK_EVERY = {"cpu": 1}
"""Tokens between two looks at which rows have ended; `LOOK_SELDOM` on devices that must wait for each look."""

LOOK_SELDOM = 8

IDLE_STEPS = 0.5
"""Work for rows that have ended, in steps of the whole batch, after which they are dropped; an estimate of the cost."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""How far the grouped attention's logits may be from the model's own, on average, in their standard deviations."""


REFUSED = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.3}
"""How far a cache may take logits from those without one; in 16 bits a mixture may send a token to another expert."""


class Decoder(Protocol):
    """A model in the middle of B rows; made by reading the prompts.

    Args:
        logits: [B, V] of each row's first token.
        full: True where the next step copies all that is cached, so that dropping rows now costs nothing more.
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
    """transformers' own attention and growing cache; each row has a copy of its prompt's keys and values."""

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
    """Attention that reads each prompt's keys and values once for all its samples, and a cache written in place."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Tensor], samples: int) -> None:
        self.model = model
        logits, mask, layers = _read_in_parts(model, prompts)
        self.logits, self.position = logits.repeat_interleave(samples, 0), mask.sum(1).repeat_interleave(samples)
        self.cache = GroupCache(layers, mask, samples, windows(model))

    @property
    def full(self) -> bool:
        """True where the next step copies the cache."""
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
    """Split prompts among forward passes, by length, so that little padding is read and no pass is too large."""
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
    """Let the model use another of transformers' registered attention functions."""
    own = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = own


def draw_rows(decoder: Decoder, requests: Sequence[Request], version: int) -> list[Generation]:
    """Draw every row to its end.

    Args:
        decoder: has read the prompts; its row b is that of request b.
        requests: of one `sampling` and one `stop`.
        version: of the decoder's weights.

    Raises:
        BrokenLogpError: a row's logits are not finite.
    """
    sampling = requests[0].sampling
    u = torch.stack([uniforms(r.key, sampling.max_new_tokens) for r in requests])
    stop = torch.tensor(sorted(requests[0].stop), dtype=torch.int64)
    tokens, logps, top = _draw_on(decoder, u, stop.to(decoder.logits.device), sampling)
    ends = torch.isin(tokens, stop)
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, tokens.shape[1]).tolist()
    # Copies: ordinary tensors, not inference ones, and not views of the whole batch's.
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
    """Return tokens and log-probabilities [B, N], and the most probable tokens [B, N, K] where they are asked for.

    Each row goes on behind its first stop word, with anything.

    Rows that have ended are dropped once the work done for them has cost about as much as dropping them, or where the
    cache is copied anyhow; until then they go on, and what they draw is cut off at the end.
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
            here = top_logprobs(logits, sampling)
            top.ids[active, t], top.logp[active, t] = here.ids, here.logp
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
    """For k words at each of tokens [B, N]."""
    ids = tokens.new_zeros(*tokens.shape, k)
    return TopK(ids, torch.zeros_like(ids, dtype=torch.float32))


@torch.inference_mode()
def can_group(model: PreTrainedModel, prompt: Tensor) -> bool:
    """True where `GroupDecoder` gives what `PlainDecoder` gives, tried on the end of this prompt.

    Raises:
        InputError: `PlainDecoder` itself does not give what the model gives without a cache, text by text.
    """
    prompts = [prompt[-1:], prompt[-8:]]
    try:
        wanted = _uncached(model, prompts)
        plain = _trial(PlainDecoder(model, prompts, 2))
    except Exception as error:  # whatever a model requires besides tokens
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{type(model).__name__} cannot be sampled from, token by token: {reason}") from None
    if (gap := _gap(plain, wanted)) >= REFUSED[plain.dtype]:
        raise InputError(
            f"{type(model).__name__}: with a key-value cache and prompts padded on the left its logits differ from its "
            f"own by {gap:.1e} of their spread, so what it samples would not be what is trained"
        )
    try:
        grouped = _trial(GroupDecoder(model, prompts, 2))
    except Exception as error:  # whatever a model does that the grouped attention was not made for
        log.debug("%s keeps its own attention: %s", type(model).__name__, error)
        return False
    gap = _gap(grouped, plain)
    log.debug("%s: grouped attention differs from its own by %.1e", type(model).__name__, gap)
    return gap < TOLERANCE[grouped.dtype]


def _gap(a: Tensor, b: Tensor) -> float:
    """Mean difference, in standard deviations of `b`."""
    return float((a - b).abs().mean() / b.std())


def _trial(decoder: Decoder) -> Tensor:
    """Logits of a few steps, with a row dropped in between."""
    seen = [decoder.logits]
    for _ in range(2):
        token = torch.arange(len(seen[-1]), device=seen[-1].device)
        seen.append(decoder.step(token))
    decoder.keep(torch.tensor([0, 2, 3], device=seen[-1].device))
    seen.append(decoder.step(token[:3]))
    return torch.cat(seen)


def _uncached(model: PreTrainedModel, prompts: Sequence[Tensor]) -> Tensor:
    """What `_trial` should return: the logits of the same texts, whole, padded where nothing before can see it."""
    rows = [torch.cat([prompts[b // 2], torch.tensor([b, b, last])]) for b, last in enumerate((0, 0, 1, 2))]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    end = [len(row) - 4 for row in rows]  # the prompt's last token
    kept = [*((b, t) for t in range(3) for b in range(4)), *((b, 3) for b in (0, 2, 3))]
    return torch.stack([logits[b, end[b] + t] for b, t in kept])
