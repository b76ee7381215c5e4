"""Sampling tokens for many rows together, step by step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from drpo.model.device import has_float64
from drpo.model.routing import RouteRecorder
from drpo.rollout import attention
from drpo.rollout.cache import GroupCache, KeptRow, windows
from drpo.rollout.engine import generation
from drpo.rollout.fused import Step
from drpo.rollout.prefill import as_argument, last_logits, parts_of, read_in_parts, read_prompts
from drpo.rollout.routes import ReadRoutes
from drpo.rollout.sample import draw, top_logprobs, uniforms
from drpo.rollout.turn_cache import TurnCache
from drpo.types import Generation, Request, Sampling, TopK

LOOK_EVERY = {"cpu": 1}
"""Tokens between two checks for finished rows; `LOOK_SELDOM` on devices where a check is a sync."""

LOOK_SELDOM = 8

IDLE_STEPS = 0.5
"""Wasted work on finished rows, in steps of the whole batch, after which they are dropped; estimates a drop's cost."""

SCORES = 2**26
"""Upper bound of attention scores held at once while further tokens of rows are read, unless one token has more."""


class Decoder(Protocol):
    """A model that has read the prompts of B rows and continues them.

    Args:
        logits: [B, V], of each row's first token.
        routes: the experts that its rows were read by; gathers nothing unless asked to.
        full: True if the next step copies the cache, so that dropping rows now is free.
    """

    logits: Tensor
    routes: ReadRoutes

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
    """Decodes with the model's layers and transformers' cache, recurrent states too; each row copies its prompt's."""

    full = False

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Tensor],
        samples: int,
        recorder: RouteRecorder | None = None,
    ) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.routes = ReadRoutes(recorder, len(prompts))
        logits, mask = read_prompts(model, prompts, self.cache)
        self.routes.read(range(len(prompts)), list(map(len, prompts)))
        self.routes.repeat(samples)
        self.attends = any(isinstance(layer, CacheLayerMixin) for layer in self.cache.layers)
        rows = torch.arange(len(mask), device=mask.device).repeat_interleave(samples)
        self.logits, self.mask = logits[rows], mask[rows]
        self.cache.reorder_cache(rows)

    def step(self, token: Tensor) -> Tensor:
        """Append token [B] and return the logits [B, V] of the next."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        out = self.model(
            input_ids=token[:, None],
            attention_mask=self.mask if self.attends else None,
            position_ids=self.mask.sum(1, keepdim=True) - 1,
            use_cache=True,
            **as_argument(self.model, self.cache),
        )
        return last_logits(out.logits)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (ascending) alone."""
        self.mask = self.mask[rows]
        self.cache.reorder_cache(rows)  # which, unlike `batch_select_indices`, recurrent states have too


class GroupDecoder:
    """Decodes with attention that reads a prompt's keys and values once for all samples, and a cache in place.

    Args:
        model: the model.
        cache: what was read of B rows.
        logits: [B, V], of each row's next token.
        position: [B] int64, of each row's next token.
        routes: the experts that the rows were read by.
        fused: a step of the same model that is taken instead of its own, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: GroupCache,
        logits: Tensor,
        position: Tensor,
        routes: ReadRoutes,
        fused: Step | None = None,
    ) -> None:
        self.model, self.cache, self.logits, self.position, self.routes = model, cache, logits, position, routes
        self.fused = fused

    @staticmethod
    def of_prompts(
        model: PreTrainedModel,
        prompts: Sequence[Tensor],
        samples: int,
        prefix: int = 0,
        recorder: RouteRecorder | None = None,
        fused: Step | None = None,
    ) -> "GroupDecoder":
        """Read prompts, each of which so many adjacent rows continue.

        Args:
            model: the model.
            prompts: each [P] int64.
            samples: rows of each.
            prefix: all prompts begin with the same so many tokens, and have more; those are read once.
            recorder: listens to the model; None where routes are not reported.
            fused: see above.
        """
        routes = ReadRoutes(recorder, len(prompts))
        logits, mask, layers = read_in_parts(model, prompts, prefix, routes)
        routes.repeat(samples)
        prompt = torch.arange(len(mask), device=mask.device).repeat_interleave(samples)
        cache = GroupCache(layers, mask, prompt, windows(model))
        position = mask.sum(1).repeat_interleave(samples)
        return GroupDecoder(model, cache, logits.repeat_interleave(samples, 0), position, routes, fused)

    @staticmethod
    def of_rows(
        model: PreTrainedModel,
        rows: Sequence[KeptRow],
        tokens: Sequence[Tensor],
        recorder: RouteRecorder | None = None,
        fused: Step | None = None,
    ) -> "GroupDecoder":
        """Go on with kept rows (those of one prompt adjacent), each of which is followed by further tokens [T >= 1]."""
        cache = GroupCache.of_rows(rows, [len(t) for t in tokens], windows(model))
        ends = [row.prompt.length + row.length + len(t) for row, t in zip(rows, tokens, strict=True)]
        position = torch.tensor(ends, device=model.device)
        routes = ReadRoutes(recorder, len(rows))
        logits = _read_further(model, cache, tokens, position, routes)
        return GroupDecoder(model, cache, logits, position, routes, fused)

    @property
    def full(self) -> bool:
        """True if the next step copies the cache."""
        return self.cache.full

    def step(self, token: Tensor) -> Tensor:
        """Append token [B] and return the logits [B, V] of the next."""
        if self.fused is None:
            logits = _read_grouped(self.model, self.cache, token[:, None], self.position[:, None])
        else:
            self.cache.room()
            logits = self.fused(self.cache, token, self.position)
        self.position = self.position + 1
        return logits

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (ascending) alone."""
        self.position = self.position[rows]
        self.cache.keep(rows)


def _read_grouped(model: PreTrainedModel, cache: GroupCache, ids: Tensor, position: Tensor) -> Tensor:
    """Append ids [B, Q] at positions [B, Q] to every row; return the logits [B, V] after the last of them."""
    cache.room()
    with _attention(model, attention.NAME):
        out = model(
            input_ids=ids,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            groups=cache,
            **({"logits_to_keep": 1} if ids.shape[1] > 1 else {}),
        )
    return last_logits(out.logits)


def _read_further(
    model: PreTrainedModel, cache: GroupCache, tokens: Sequence[Tensor], position: Tensor, routes: ReadRoutes
) -> Tensor:
    """Read the further tokens of B rows, for which the cache has empty columns; return the logits [B, V] after them.

    Args:
        model: the model.
        cache: of the rows.
        tokens: of each row, [T >= 1].
        position: [B] int64, after the last of them.
        routes: notes the experts that read them.
    """
    parts = [sorted(part) for part in parts_of([len(t) for t in tokens])]
    lengths = list(map(len, tokens))
    if len(parts) == 1:
        logits = _read_padded(model, cache, tokens, position)
        routes.read(range(len(tokens)), lengths)
        return logits
    logits = torch.empty(0)
    for part in parts:
        rows, of_part = torch.tensor(part, device=model.device), [tokens[i] for i in part]
        read = cache.part(rows)
        next_logits = _read_padded(model, read, of_part, position[rows])
        routes.read(part, [lengths[i] for i in part])
        cache.take(read, rows, max(map(len, of_part)))
        if not len(logits):
            logits = next_logits.new_empty(len(tokens), next_logits.shape[1])
        logits[rows] = next_logits
    return logits


def _read_padded(model: PreTrainedModel, cache: GroupCache, tokens: Sequence[Tensor], position: Tensor) -> Tensor:
    """Read further tokens as `_read_further` does, left-padded, in slices whose scores fit `SCORES`."""
    longest = max(map(len, tokens))
    ids = torch.zeros(len(tokens), longest, dtype=torch.int64)
    for row, t in enumerate(tokens):
        ids[row, longest - len(t) :] = t
    lengths = torch.tensor([len(t) for t in tokens])
    real = (torch.arange(longest) >= longest - lengths[:, None]).to(model.device)
    positions = (position[:, None] - longest + torch.arange(longest, device=model.device)).clamp(min=0)
    heads = model.config.get_text_config().num_attention_heads
    at_once = max(1, SCORES // (heads * cache.n_columns))
    cache.rewind(longest)
    logits = torch.empty(0)
    for begin in range(0, longest, at_once):
        at = slice(begin, begin + at_once)
        cache.expect(real[:, at])
        logits = _read_grouped(model, cache, ids[:, at].to(model.device), positions[:, at])
    cache.expect(None)
    return logits


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use another of transformers' registered attention functions; restore the model's afterwards."""
    original = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = original


Leave = Callable[[Tensor, Tensor, Sequence[tuple[int, bool]]], None]
"""Receives rows before they leave: their numbers in the decoder and in the batch, and what `_lengths` says of them."""


def draw_rows(
    decoder: Decoder, requests: Sequence[Request], version: int, turn_cache: TurnCache | None = None
) -> list[Generation]:
    """Sample every row to its end.

    Args:
        decoder: has read the prompts; row b belongs to request b.
        requests: all with the same `sampling` and `stop`.
        version: the version of the decoder's weights.
        turn_cache: receives the rows that go on, if the decoder can keep them.

    Raises:
        BrokenLogpError: a row's logits are not finite.
    """
    sampling = requests[0].sampling
    u = torch.stack([uniforms(r.key, sampling.max_new_tokens) for r in requests])
    stop = torch.tensor(sorted(requests[0].stop), dtype=torch.int64)
    kept = dict[int, KeptRow]()
    leave: Leave | None = None
    if turn_cache is not None and isinstance(decoder, GroupDecoder) and any(r.goes_on for r in requests):
        leave = partial(_leave, decoder.cache, requests, turn_cache, kept)
    tokens, logps, top = _draw_on(decoder, u, stop.to(decoder.logits.device), sampling, leave)
    ended = _lengths(tokens, stop)
    routes = decoder.routes.routes([r.prompt_ids for r in requests], [n for n, _ in ended])
    # Clones, because inference tensors and views of the whole batch must not leave this function.
    generations = [
        generation(
            requests[b],
            tokens[b, :n].clone(),
            logps[b, :n].clone(),
            "stop" if stopped else "length",
            version,
            None if top is None else TopK(top.ids[b, :n].clone(), top.logp[b, :n].clone()),
            routes[b],
        )
        for b, (n, stopped) in enumerate(ended)
    ]
    if turn_cache is not None:
        for b, row in kept.items():
            turn_cache.put(generations[b], requests[b], row)
    return generations


def _lengths(tokens: Tensor, stop: Tensor) -> list[tuple[int, bool]]:
    """Return how many tokens [B, N] each row has up to its first stop token, and whether there is one."""
    ends = torch.isin(tokens, stop)
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, tokens.shape[1])
    return list(zip(lengths.tolist(), ends.any(1).tolist(), strict=True))


def _leave(
    cache: GroupCache,
    requests: Sequence[Request],
    turn_cache: TurnCache,
    kept: dict[int, KeptRow],
    rows: Tensor,
    numbers: Tensor,
    lengths: Sequence[tuple[int, bool]],
) -> None:
    """Copy the rows that go on, before they leave the batch."""
    for row, b, (n, stopped) in zip(rows.tolist(), numbers.tolist(), lengths, strict=True):
        if stopped and requests[b].goes_on and (copy := turn_cache.copy_row(cache, row, n)) is not None:
            kept[b] = copy


@torch.inference_mode()
def _draw_on(
    decoder: Decoder, u: Tensor, stop: Tensor, sampling: Sampling, leave: Leave | None = None
) -> tuple[Tensor, Tensor, TopK | None]:
    """Return tokens and log-probabilities [B, N], and the most probable tokens [B, N, K] if requested.

    Tokens after a row's first stop token are arbitrary.

    Finished rows are dropped when the work on them has cost about as much as dropping them, or when the cache is copied
    anyway. Until then they continue, and their further tokens are discarded at the end.
    """
    device = decoder.logits.device
    u = u.to(device) if has_float64(device) else u
    tokens = torch.zeros(u.shape, dtype=torch.int64, device=device)
    logps = torch.zeros(u.shape, dtype=torch.float32, device=device)
    top = _room(tokens, sampling.top_logprobs) if sampling.top_logprobs else None
    active = torch.arange(len(u), device=device)
    alive = torch.ones(len(u), dtype=torch.bool, device=device)
    every = LOOK_EVERY.get(device.type, LOOK_SELDOM)
    idle = 0
    logits = decoder.logits
    for t in range(u.shape[1]):
        token, logp = draw(logits, u[active.to(u.device), t], sampling)
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
                if leave is not None:
                    gone = (~alive).nonzero()[:, 0]
                    leave(gone, active[gone], _lengths(tokens[active[gone]], stop))
                decoder.keep(going)
                active, token, alive, idle = active[going], token[going], alive[going], 0
        logits = decoder.step(token)
        decoder.routes.step(active)
    if leave is not None:
        leave(torch.arange(len(active)), active, _lengths(tokens[active], stop))
    return tokens.cpu(), logps.cpu(), None if top is None else top.to(torch.device("cpu"))


def _room(tokens: Tensor, k: int) -> TopK:
    """Return zeros for k tokens at each position of tokens [B, N]."""
    ids = tokens.new_zeros(*tokens.shape, k)
    return TopK(ids, torch.zeros_like(ids, dtype=torch.float32))
