"""The key-value cache of a rollout: each prompt's keys and values once, and every row's, written in place."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

# Tokens by which a row's cache grows. Attention reads the whole buffer, so it should be small; it is copied at growth.
BLOCK = 32

KeysValues = tuple[Tensor, Tensor]
"""A layer's keys [..., D] and values [..., E]."""


@dataclass(frozen=True, eq=False)
class KeptPrompt:
    """What was computed of a prompt of P tokens; the rows that continue it share this record.

    Args:
        layers: each layer's keys [K, P, D] and values [K, P, E].
    """

    layers: tuple[KeysValues, ...]

    @property
    def length(self) -> int:
        """P."""
        return int(self.layers[0][0].shape[1])


@dataclass(frozen=True, eq=False)
class KeptRow:
    """What was computed of a row: its prompt, and S tokens of its own.

    Args:
        prompt: the prompt's part.
        layers: each layer's keys [K, S, D] and values [K, S, E].
    """

    prompt: KeptPrompt
    layers: tuple[KeysValues, ...]

    @property
    def length(self) -> int:
        """S."""
        return int(self.layers[0][0].shape[1])


class GroupLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values.

    Args:
        prompt_keys: [N, K, P, D] of the N prompts, left-padded, K key-value heads.
        prompt_values: [N, K, P, E].
        window: positions visible to a query, itself included, or None.
        n_rows: B, the number of rows.

    `keys` [B, K, C, D] and `values` [B, K, C, E] are the rows' own; the first `length` of C are used, at first none.
    `whole` holds both next to each other, [B, K, P + C, .], where `resize` was told that each prompt has one row.
    `written` [B, Q] bool says which of the next Q tokens are real, where some are padding; None if all are.
    """

    is_sliding = False

    def __init__(self, prompt_keys: Tensor, prompt_values: Tensor, window: int | None, n_rows: int) -> None:
        super().__init__()
        self.prompt_keys, self.prompt_values, self.window = prompt_keys, prompt_values, window
        self.keys: Tensor = prompt_keys.new_zeros(n_rows, prompt_keys.shape[1], 0, prompt_keys.shape[3])
        self.values: Tensor = prompt_values.new_zeros(n_rows, prompt_values.shape[1], 0, prompt_values.shape[3])
        self.length = 0
        self.whole: KeysValues | None = None
        self.written: Tensor | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the prompts' shapes are known from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values [B, K, Q, .] of Q tokens, except of padding; return the buffers."""
        end = self.length + key_states.shape[2]
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            place = buffer[:, :, self.length : end]
            place.copy_(new if self.written is None else torch.where(self.written[:, None, :, None], new, place))
        self.length = end
        return self.keys, self.values

    def resize(self, rows: Tensor, capacity: int, together: bool) -> None:
        """Keep these rows' keys and values, with room for `capacity` tokens, `together` with those of their prompts."""
        self.keys = _stacked([self.keys[:, :, : self.length][rows]], self.length, capacity)
        self.values = _stacked([self.values[:, :, : self.length][rows]], self.length, capacity)
        self._unite(together)

    def join(self, other: "GroupLayer", prompt_length: int, length: int, capacity: int, together: bool) -> None:
        """Add the prompts and rows of another layer after these.

        Args:
            other: the other layer.
            prompt_length: columns of the prompts from now on, the last of each table.
            length: used columns of the rows from now on, likewise.
            capacity: room for so many tokens.
            together: as for `resize`.
        """
        own = [x[:, :, : self.length] for x in (self.keys, self.values)]
        new = [x[:, :, : other.length] for x in (other.keys, other.values)]
        self.keys, self.values = (_stacked(both, length, capacity) for both in zip(own, new, strict=True))
        self.length = length
        prompts = (self.prompt_keys, other.prompt_keys), (self.prompt_values, other.prompt_values)
        self.prompt_keys, self.prompt_values = (_stacked(both, prompt_length, prompt_length) for both in prompts)
        self._unite(together)

    def _unite(self, together: bool) -> None:
        """Hold the rows next to their prompts, or apart from them."""
        self.whole = None
        if together:
            prompt_length = self.prompt_keys.shape[2]
            keys = torch.cat([self.prompt_keys, self.keys], dim=2)
            values = torch.cat([self.prompt_values, self.values], dim=2)
            self.whole = keys, values
            self.prompt_keys, self.keys = keys[:, :, :prompt_length], keys[:, :, prompt_length:]
            self.prompt_values, self.values = values[:, :, :prompt_length], values[:, :, prompt_length:]

    def get_seq_length(self) -> int:
        """Return the cached positions, including the prompts' padding."""
        return int(self.prompt_keys.shape[2]) + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the mask's size and offset, for models that build a mask; `grouped_attention` uses `bias`."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1


def _stacked(tables: Sequence[Tensor], end: int, capacity: int) -> Tensor:
    """Return tables [B_i, K, C_i, D] under one another, [B, K, capacity, D]; their last columns come before `end`.

    The other columns hold zeros: their probability is 0, and 0 times uninitialised memory might be NaN.
    """
    _, heads, _, width = tables[0].shape
    stacked = tables[0].new_zeros(sum(map(len, tables)), heads, capacity, width)
    for rows, table in zip(stacked.split([len(t) for t in tables]), tables, strict=True):
        n = min(end, table.shape[2])
        rows[:, :, end - n : end] = table[:, :, table.shape[2] - n :]
    return stacked


class GroupCache(Cache):  # type: ignore[misc]
    """The cache of B rows, each a continuation of one of N prompts.

    Row b continues prompt `prompt[b]` and is number `sample[b]` of its at most `width` = G rows. Its own tokens are in
    adjacent columns of the buffer, from column `start[b]` on; all rows end in the same column.

    Args:
        prompts: each layer's keys and values [N, K, P, .] of the prompts, left-padded.
        mask: [N, P]; nonzero for a prompt's tokens, 0 for padding.
        prompt: [B] int64, ascending; the prompt of each row.
        windows: each layer's sliding window, or None.
    """

    def __init__(
        self, prompts: Sequence[KeysValues], mask: Tensor, prompt: Tensor, windows: Sequence[int | None]
    ) -> None:
        layers = [GroupLayer(*kv, window, len(prompt)) for kv, window in zip(prompts, windows, strict=True)]
        super().__init__(layers=layers)
        self.start = torch.zeros_like(prompt)
        self._n_read = torch.zeros_like(prompt)  # own tokens of each row before the first that it samples
        self._padding = mask == 0
        self._kept: list[KeptPrompt | None] = [None] * len(mask)
        self._biases: dict[int | None, Tensor] = {}
        self._number(prompt)

    @staticmethod
    def of_rows(rows: Sequence[KeptRow], new: Sequence[int], windows: Sequence[int | None]) -> "GroupCache":
        """Return the cache of kept rows and of their next tokens, whose columns are still empty.

        Args:
            rows: those of one prompt are adjacent.
            new: [B]; how many further tokens of each row are about to be read.
            windows: each layer's sliding window, or None.
        """
        prompts = list(dict.fromkeys(row.prompt for row in rows))
        number = {prompt: i for i, prompt in enumerate(prompts)}
        device = rows[0].layers[0][0].device
        longest = max(p.length for p in prompts)
        mask = torch.tensor([[c >= longest - p.length for c in range(longest)] for p in prompts], device=device)
        prompt = torch.tensor([number[row.prompt] for row in rows], device=device)
        cache = GroupCache(
            _aligned([p.layers for p in prompts], [longest] * len(prompts), longest), mask, prompt, windows
        )
        lengths = [row.length + n for row, n in zip(rows, new, strict=True)]
        end = max(lengths)
        cache.start = torch.tensor([end - n for n in lengths], device=device)
        cache._n_read, cache._kept = end - cache.start, list(prompts)
        own = _aligned([row.layers for row in rows], [end - n for n in new], _capacity(end))
        for layer, (keys, values) in zip(cache.layers, own, strict=True):
            layer.keys, layer.values, layer.length = keys, values, end
        return cache

    def room(self) -> None:
        """Make room for one more token in every row."""
        self._biases.clear()
        if self.full:
            self._resize(torch.arange(len(self.prompt), device=self.prompt.device))

    @property
    def full(self) -> bool:
        """True if the next token requires a larger buffer, and therefore a copy."""
        return bool(self.layers[0].length == self.layers[0].keys.shape[2])

    def keep(self, rows: Tensor) -> None:
        """Keep these rows (ascending) and their prompts."""
        kept, prompt = self.prompt[rows].unique_consecutive(return_inverse=True)
        if len(kept) < len(self._padding):
            self._padding = self._padding[kept]
            self._kept = [self._kept[i] for i in kept.tolist()]
            for layer in self.layers:
                layer.prompt_keys, layer.prompt_values = layer.prompt_keys[kept], layer.prompt_values[kept]
        self.start, self._n_read = self.start[rows], self._n_read[rows]
        self._number(prompt)
        self._resize(rows)

    def join(self, other: "GroupCache") -> None:
        """Add the rows of another cache, and their prompts, after these; what no row uses of the columns is cut off.

        From then on there are as many columns as the longest prompt has tokens, and as the longest row.
        """
        both = self, other
        prompts = torch.cat([(~x._padding).sum(1) for x in both])
        own = torch.cat([x.layers[0].length - x.start for x in both])
        prompt_length, length = int(prompts.max()), int(own.max())
        prompt = torch.cat([self.prompt, other.prompt + len(self._padding)])
        self._padding = torch.arange(prompt_length, device=prompts.device) < prompt_length - prompts[:, None]
        self._number(prompt)
        self.start, self._n_read = length - own, torch.cat([x._n_read for x in both])
        self._kept = self._kept + other._kept
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer.join(new, prompt_length, length, _capacity(length), self.width == 1)

    def n_joining(self, empty_bytes: int) -> int:
        """Return how many rows without tokens can join while unused columns of rows take at most so many bytes."""
        own = self.layers[0].length - self.start
        n_columns = empty_bytes // self.token_bytes + int(own.sum())
        return max(0, n_columns // max(1, int(own.max())) - len(own))

    def part(self, rows: Tensor) -> "GroupCache":
        """Return a copy of these rows (ascending)."""
        part = copy.copy(self)
        part.layers, part._biases = [copy.copy(layer) for layer in self.layers], {}
        part.keep(rows)
        return part

    def rewind(self, n: int) -> None:
        """Let the next token be written `n` columns earlier."""
        for layer in self.layers:
            layer.length -= n

    def expect(self, written: Tensor | None) -> None:
        """Say which of the next tokens are real; [B, Q] bool, or None if all are."""
        for layer in self.layers:
            layer.written = written

    def take(self, part: "GroupCache", rows: Tensor, n: int) -> None:
        """Copy the last `n` columns of a part into these rows."""
        for layer, other in zip(self.layers, part.layers, strict=True):
            columns = slice(layer.length - n, layer.length)
            layer.keys[rows, :, columns] = other.keys[:, :, columns]
            layer.values[rows, :, columns] = other.values[:, :, columns]

    @property
    def n_columns(self) -> int:
        """B (P + C): what the B rows attend to."""
        return len(self.prompt) * int(self._padding.shape[1] + self.layers[0].keys.shape[2])

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        tensors = [x for layer in self.layers for x in (layer.prompt_keys, layer.prompt_values)]
        return sum(x.shape[1] * x.shape[3] * x.element_size() for x in tensors)

    def kept_prompt(self, row: int) -> KeptPrompt:
        """Return the prompt of a row, the same record for all its rows."""
        i = int(self.prompt[row])
        kept = self._kept[i]
        if kept is None:
            begin = int(self._padding[i].sum())
            kept = KeptPrompt(
                tuple((x.prompt_keys[i, :, begin:].clone(), x.prompt_values[i, :, begin:].clone()) for x in self.layers)
            )
            self._kept[i] = kept
        return kept

    def n_own(self, row: int, n_sampled: int) -> int:
        """Return the cached tokens of a row behind its prompt when so many were sampled; the last was not read."""
        return int(self._n_read[row]) + n_sampled - 1

    def kept_row(self, row: int, n_sampled: int) -> KeptRow:
        """Return what was computed of a row up to its `n_sampled`-th token, which itself was not read."""
        begin = int(self.start[row])
        own = slice(begin, begin + self.n_own(row, n_sampled))
        layers = tuple((x.keys[row, :, own].clone(), x.values[row, :, own].clone()) for x in self.layers)
        return KeptRow(self.kept_prompt(row), layers)

    def _number(self, prompt: Tensor) -> None:
        """Number the rows of each prompt."""
        self.prompt = prompt
        self.sample = torch.arange(len(prompt), device=prompt.device) - torch.searchsorted(prompt, prompt)
        self.width = int(self.sample.max()) + 1
        self._ragged = len(prompt) < len(self._padding) * self.width

    def _resize(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.resize(rows, _capacity(layer.length), self.width == 1)

    def by_prompt(self, x: Tensor) -> Tensor:
        """Map [B, K, R, y] (R queries per key-value head) to [N, K, G * R, y], zeros for missing rows."""
        if self._ragged:
            table = x.new_zeros(len(self._padding), self.width, *x.shape[1:])
            table[self.prompt, self.sample] = x
        else:
            table = x.unflatten(0, (-1, self.width))
        return table.transpose(1, 2).flatten(2, 3)

    def by_row(self, x: Tensor) -> Tensor:
        """Map [N, K, G * R, y] to [B, K, R, y], the inverse of `by_prompt`."""
        table: Tensor = x.unflatten(2, (self.width, -1)).transpose(1, 2)
        return table[self.prompt, self.sample] if self._ragged else table.flatten(0, 1)

    def bias(self, layer: GroupLayer, n_queries: int) -> Tensor:
        """Return the mask [B, 1, Q, P + C] to add to scores: 0 where visible to the newest Q tokens, -inf elsewhere."""
        if layer.window not in self._biases:
            hidden = self._hidden(layer, n_queries)
            bias = torch.zeros(hidden.shape, dtype=layer.keys.dtype, device=hidden.device)
            self._biases[layer.window] = bias.masked_fill_(hidden, -torch.inf)[:, None]
        return self._biases[layer.window]

    def _hidden(self, layer: GroupLayer, n_queries: int) -> Tensor:
        """Return [B, Q, P + C]: True where a position is invisible to one of the newest Q tokens."""
        n_rows, prompt_length, device = len(self.prompt), self._padding.shape[1], self._padding.device
        query = torch.arange(layer.length - n_queries, layer.length, device=device)[:, None]
        own = torch.arange(layer.keys.shape[2], device=device)
        start = self.start[:, None, None]
        in_prompt = self._padding[self.prompt][:, None].expand(-1, n_queries, -1)
        in_row = (own > query) | (own < start)
        if layer.window is not None:  # left padding of prompts does not change distances; that of rows does
            to_prompt = prompt_length - torch.arange(prompt_length, device=device) + query - start
            in_prompt = in_prompt | (to_prompt >= layer.window)
            in_row = in_row | (query - own >= layer.window)
        return torch.cat([in_prompt, in_row.expand(n_rows, -1, -1)], dim=-1)


def _capacity(length: int) -> int:
    """Return the columns of a buffer in which so many are used, and at least one is free."""
    return (length // BLOCK + 1) * BLOCK


def _aligned(rows: Sequence[tuple[KeysValues, ...]], ends: Sequence[int], capacity: int) -> list[KeysValues]:
    """Return each layer's keys and values [B, K, capacity, .]; those of row b end before column `ends[b]`."""
    layers: list[KeysValues] = []
    for pieces in zip(*rows, strict=True):
        both = []
        for tensors in zip(*pieces, strict=True):
            table = tensors[0].new_zeros(len(rows), tensors[0].shape[0], capacity, tensors[0].shape[2])
            for row, (x, end) in enumerate(zip(tensors, ends, strict=True)):
                table[row, :, end - x.shape[1] : end] = x
            both.append(table)
        layers.append((both[0], both[1]))
    return layers


def is_recurrent(model: PreTrainedModel) -> bool:
    """Return whether a layer of the model has a recurrent state besides keys and values, or in place of them."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=model.config).layers)


def windows(model: PreTrainedModel) -> list[int | None]:
    """Return the sliding window of each of the model's cached layers, None without one.

    Raises:
        NotImplementedError: a layer has a recurrent state.
    """
    if is_recurrent(model):
        raise NotImplementedError("a recurrent state")
    layers = DynamicCache(config=model.config).layers
    return [layer.sliding_window if layer.is_sliding else None for layer in layers]
