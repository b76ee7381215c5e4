"""Sampling tokens for many rows together, step by step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from drpo.types import Generation, Request, TopK

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
        self.routes.keep(rows)
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
        self.routes.keep(rows)
        self.cache.keep(rows)

    def join(self, other: "GroupDecoder") -> None:
        """Go on with the rows of another decoder as well, after these; they have sampled nothing yet."""
        self.position = torch.cat([self.position, other.position])
        self.routes.join(other.routes)
        self.cache.join(other.cache)


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


More = Callable[[GroupCache], tuple[Decoder, Mapping[int, Request]] | None]
"""Reads rows that waited and now join those of a cache: another `GroupDecoder`, and requests by number; or None."""


@torch.inference_mode()
def draw_rows(
    decoder: Decoder,
    requests: Mapping[int, Request],
    version: int,
    turn_cache: TurnCache | None = None,
    more: More | None = None,
) -> dict[int, Generation]:
    """Sample every row to its end, and those that join them.

    Finished rows are dropped when the work on them has cost about as much as dropping them, or when the cache is copied
    anyway. Until then they continue, and their further tokens are discarded.

    Args:
        decoder: has read the prompts; row b belongs to the b-th request.
        requests: by number; all with the same `sampling` and `stop`, as are those that join.
        version: the version of the decoder's weights.
        turn_cache: receives the rows that go on, if the decoder can keep them.
        more: asked for further rows once finished ones were looked for, if the decoder is a `GroupDecoder`.

    Returns:
        The generations, by number.

    Raises:
        BrokenLogpError: a row's logits are not finite.
    """
    generations: dict[int, Generation] = {}
    rows, logits = _Rows.of(requests, decoder.logits), decoder.logits
    every = LOOK_EVERY.get(logits.device.type, LOOK_SELDOM)
    steps, look, idle = 0, 1, 0
    while True:
        token = rows.draw(logits)
        steps += 1
        if steps == look:
            going = rows.going.nonzero()[:, 0]
            idle += steps * (len(rows) - len(going))
            worth = decoder.full or rows.left == 0 or idle > IDLE_STEPS * len(rows)
            if not len(going) or (len(going) < len(rows) and worth):
                generations |= _ended(decoder, rows, version, turn_cache)
                if not len(going):
                    return generations
                decoder.keep(going)
                rows, token, idle = rows.at(going), token[going], 0
            steps, look = 0, min(every, rows.left)
        logits = decoder.step(token)
        decoder.routes.step()
        if steps or more is None or not isinstance(decoder, GroupDecoder):
            continue
        if (joining := more(decoder.cache)) is not None:
            other, requests = joining
            assert isinstance(other, GroupDecoder)
            decoder.join(other)
            rows, logits = rows.join(_Rows.of(requests, other.logits)), torch.cat([logits, other.logits])
            look = 1


@torch.inference_mode(mode=False)
def _ended(decoder: Decoder, rows: "_Rows", version: int, turn_cache: TurnCache | None) -> dict[int, Generation]:
    """Return the generations of the rows that have ended; copy those that go on, before they leave the decoder."""
    ended = (~rows.going).nonzero()[:, 0]
    tokens, logps = rows.tokens[ended].cpu(), rows.logps[ended].cpu()
    top = None if rows.top is None else rows.top.at(ended).to(tokens.device)
    numbers = list(rows.requests)
    generations: dict[int, Generation] = {}
    for b, (row, (n, stopped)) in enumerate(zip(ended.tolist(), _lengths(tokens, rows.stop.cpu()), strict=True)):
        request = rows.requests[numbers[row]]
        # Clones, because views of all rows must not leave this function.
        generations[numbers[row]] = ended_row = generation(
            request,
            tokens[b, :n].clone(),
            logps[b, :n].clone(),
            "stop" if stopped else "length",
            version,
            None if top is None else TopK(top.ids[b, :n].clone(), top.logp[b, :n].clone()),
            decoder.routes.routes(row, request.prompt_ids, n),
        )
        if turn_cache is not None and stopped and request.goes_on and isinstance(decoder, GroupDecoder):
            turn_cache.put(ended_row, request, decoder.cache, row)
    return generations


def _lengths(tokens: Tensor, stop: Tensor) -> list[tuple[int, bool]]:
    """Return how many tokens [B, N] each row has up to its first stop token, and whether there is one."""
    ends = torch.isin(tokens, stop)
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, tokens.shape[1])
    return list(zip(lengths.tolist(), ends.any(1).tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class _Rows:
    """B rows that are sampled together, in the decoder's order.

    Args:
        requests: by number; all with the same sampling and stop tokens.
        stop: these tokens.
        u: [B, N]; the random numbers.
        n: [B] int64; how many tokens each row has.
        going: [B] bool; False from a row's last token on. It may have further tokens then, which are arbitrary.
        tokens, logps: [B, N]; 0 from the n-th on.
        top: [B, N, K], the most probable tokens, or None unless requested.
    """

    requests: dict[int, Request]
    stop: Tensor
    u: Tensor
    n: Tensor
    going: Tensor
    tokens: Tensor
    logps: Tensor
    top: TopK | None

    @staticmethod
    def of(requests: Mapping[int, Request], logits: Tensor) -> "_Rows":
        """Return rows that have no tokens yet, on the device of their first logits."""
        first, device = next(iter(requests.values())), logits.device
        sampling = first.sampling
        u = torch.stack([uniforms(r.key, sampling.max_new_tokens) for r in requests.values()])
        tokens = torch.zeros(u.shape, dtype=torch.int64, device=device)
        ids = tokens.new_zeros(*tokens.shape, sampling.top_logprobs)
        return _Rows(
            dict(requests),
            torch.tensor(sorted(first.stop), dtype=torch.int64, device=device),
            u.to(device) if has_float64(device) else u,
            tokens.new_zeros(len(u)),
            torch.ones(len(u), dtype=torch.bool, device=device),
            tokens,
            torch.zeros_like(tokens, dtype=torch.float32),
            TopK(ids, torch.zeros_like(ids, dtype=torch.float32)) if sampling.top_logprobs else None,
        )

    def __len__(self) -> int:
        """Return B."""
        return len(self.requests)

    @property
    def left(self) -> int:
        """How many more tokens every row may have; waits for the device."""
        return self.tokens.shape[1] - int(self.n.max())

    def draw(self, logits: Tensor) -> Tensor:
        """Sample the next token [B] of every row."""
        sampling, at = next(iter(self.requests.values())).sampling, self.n[:, None]
        token, logp = draw(logits, self.u.gather(1, at.to(self.u.device))[:, 0], sampling)
        self.tokens.scatter_(1, at, token[:, None])
        self.logps.scatter_(1, at, logp[:, None])
        if self.top is not None:
            top, at = top_logprobs(logits, sampling), at[:, :, None].expand(-1, -1, sampling.top_logprobs)
            self.top.ids.scatter_(1, at, top.ids[:, None])
            self.top.logp.scatter_(1, at, top.logp[:, None])
        self.n.add_(1)
        self.going.logical_and_(~torch.isin(token, self.stop) & (self.n < self.tokens.shape[1]))
        return token

    def at(self, rows: Tensor) -> "_Rows":
        """Return these rows."""
        numbers = list(self.requests)
        return _Rows(
            {numbers[row]: self.requests[numbers[row]] for row in rows.tolist()},
            self.stop,
            self.u[rows.to(self.u.device)],
            self.n[rows],
            self.going[rows],
            self.tokens[rows],
            self.logps[rows],
            None if self.top is None else self.top.at(rows),
        )

    def join(self, other: "_Rows") -> "_Rows":
        """Return these rows and then the other ones, which have other numbers."""
        return _Rows(
            self.requests | other.requests,
            self.stop,
            torch.cat([self.u, other.u]),
            torch.cat([self.n, other.n]),
            torch.cat([self.going, other.going]),
            torch.cat([self.tokens, other.tokens]),
            torch.cat([self.logps, other.logps]),
            None if self.top is None or other.top is None else TopK.cat([self.top, other.top]),
        )
