"""The key-value cache of a rollout: each prompt's keys and values once, and every row's, written in place."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from drpo.errors import InputError

# Tokens by which a row's cache grows. Attention reads the whole buffer, so it should be small; it is copied at growth.
BLOCK = 32


class GroupLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values.

    Args:
        prompt_keys: [N, K, P, D] of the N prompts, left-padded, K key-value heads.
        prompt_values: [N, K, P, E].
        window: positions visible to a query, itself included, or None.

    After `resize`, `keys` [B, K, C, D] and `values` [B, K, C, E] are the B rows' own; the first `length` of C are used.
    """

    is_sliding = False

    def __init__(self, prompt_keys: Tensor, prompt_values: Tensor, window: int | None) -> None:
        super().__init__()
        self.prompt_keys, self.prompt_values, self.window = prompt_keys, prompt_values, window
        self.keys: Tensor = prompt_keys.new_zeros(0, prompt_keys.shape[1], 0, prompt_keys.shape[3])
        self.values: Tensor = prompt_values.new_zeros(0, prompt_values.shape[1], 0, prompt_values.shape[3])
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the prompts' shapes are known from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append one token's keys and values [B, K, 1, .]; return the buffers."""
        self.keys[:, :, self.length] = key_states[:, :, 0]
        self.values[:, :, self.length] = value_states[:, :, 0]
        self.length += 1
        return self.keys, self.values

    def resize(self, rows: Tensor, capacity: int) -> None:
        """Keep these rows' keys and values, with room for `capacity` tokens."""
        self.keys = _resized(self.keys, rows, self.length, capacity)
        self.values = _resized(self.values, rows, self.length, capacity)

    def get_seq_length(self) -> int:
        """Return the cached positions, including the prompts' padding."""
        return int(self.prompt_keys.shape[2]) + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the mask's size and offset, for models that build a mask; `grouped_attention` uses `bias`."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1


def _resized(old: Tensor, rows: Tensor, length: int, capacity: int) -> Tensor:
    # Unused positions hold zeros: their probability is 0, and 0 times uninitialised memory might be NaN.
    new = old.new_zeros(len(rows), old.shape[1], capacity, old.shape[3])
    if length:
        new[:, :, :length] = old[:, :, :length][rows]
    return new


class GroupCache(Cache):  # type: ignore[misc]
    """The cache of B rows, each a continuation of one of N prompts.

    Row b continues prompt `prompt[b]` and is number `sample[b]` of its at most `width` = G rows.

    Args:
        prompts: each layer's keys and values [N, K, P, .] of the prompts, left-padded.
        mask: [N, P]; 1 for a prompt's tokens, 0 for padding.
        samples: rows per prompt at the start; a prompt's rows are adjacent.
        windows: each layer's sliding window, or None.
    """

    def __init__(
        self, prompts: Sequence[tuple[Tensor, Tensor]], mask: Tensor, samples: int, windows: Sequence[int | None]
    ) -> None:
        super().__init__(layers=[GroupLayer(*kv, window) for kv, window in zip(prompts, windows, strict=True)])
        row = torch.arange(len(mask) * samples, device=mask.device)
        self.prompt, self.sample, self.width = row // samples, row % samples, samples
        self._ragged = False
        self._padding = mask == 0
        self._biases: dict[int | None, Tensor] = {}

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
        kept, self.prompt = self.prompt[rows].unique_consecutive(return_inverse=True)
        if len(kept) < len(self._padding):
            self._padding = self._padding[kept]
            for layer in self.layers:
                layer.prompt_keys, layer.prompt_values = layer.prompt_keys[kept], layer.prompt_values[kept]
        self.sample = torch.arange(len(rows), device=rows.device) - torch.searchsorted(self.prompt, self.prompt)
        self.width = int(self.sample.max()) + 1
        self._ragged = len(rows) < len(kept) * self.width
        self._resize(rows)

    def _resize(self, rows: Tensor) -> None:
        capacity = (self.layers[0].length // BLOCK + 1) * BLOCK
        for layer in self.layers:
            layer.resize(rows, capacity)

    def by_prompt(self, x: Tensor) -> Tensor:
        """Map [B, K, R, y] (R query heads per key-value head) to [N, K, G * R, y], zeros for missing rows."""
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

    def bias(self, layer: GroupLayer) -> Tensor:
        """Return the mask [B, 1, 1, P + C] to add to scores: 0 where visible to the newest tokens, -inf elsewhere."""
        if layer.window not in self._biases:
            prompt_length, end = self._padding.shape[1], layer.get_seq_length()
            hidden = self._padding.new_zeros(len(self.prompt), prompt_length + layer.keys.shape[2])
            hidden[:, :prompt_length] = self._padding[self.prompt]
            hidden[:, end:] = True
            if layer.window is not None:  # left padding does not change distances
                hidden[:, : max(0, end - layer.window)] = True
            bias = torch.zeros(hidden.shape, dtype=layer.keys.dtype, device=hidden.device)
            self._biases[layer.window] = bias.masked_fill_(hidden, -torch.inf)[:, None, None]
        return self._biases[layer.window]


def windows(model: PreTrainedModel) -> list[int | None]:
    """Return the sliding window of each of the model's cached layers, None without one.

    Raises:
        InputError: a layer caches something else than keys and values, or transformers has no cache for the model.
    """
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception as error:  # encoder-decoders, and configurations without layer types
        raise InputError(
            f"{type(model).__name__}: transformers has no key-value cache for it ({type(error).__name__}: {error}); "
            "the rollout engine samples from decoders whose layers all keep keys and values"
        ) from None
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise InputError(
            f"{type(model).__name__} keeps a recurrent state besides keys and values, or in place of them; "
            "the rollout engine samples from models whose layers all keep keys and values"
        )
    return [layer.sliding_window if layer.is_sliding else None for layer in layers]
