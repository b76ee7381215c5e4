"""Keys and values while completions are drawn: each prompt's once, and every row's own, written in place."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from drpo.errors import InputError

# Tokens by which a row's own cache grows: attention goes over the whole buffer, so it is hardly larger than what is in
# it, and it is copied once in so many steps.
BLOCK = 32


class GroupLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values.

    Args:
        prompt_keys: [N, K, P, D] of the N prompts, left-padded, K key-value heads.
        prompt_values: [N, K, P, E].
        window: how far back the layer looks, itself included, or None.

    After `resize`, `keys` [B, K, C, D] and `values` [B, K, C, E] hold what the B rows drew, of which `length` are used.
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
        """There is nothing left to do: the prompts' shapes say all."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values [B, K, 1, .] behind the others; return the buffers."""
        self.keys[:, :, self.length] = key_states[:, :, 0]
        self.values[:, :, self.length] = value_states[:, :, 0]
        self.length += 1
        return self.keys, self.values

    def resize(self, rows: Tensor, capacity: int) -> None:
        """Keep these rows' own keys and values, with room for `capacity` tokens."""
        self.keys = _resized(self.keys, rows, self.length, capacity)
        self.values = _resized(self.values, rows, self.length, capacity)

    def get_seq_length(self) -> int:
        """Places behind which the next token stands, the prompts' padding among them."""
        return int(self.prompt_keys.shape[2]) + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """For models that build a mask of their own; `bias` is what attention uses."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """None is set."""
        return -1


def _resized(old: Tensor, rows: Tensor, length: int, capacity: int) -> Tensor:
    # Unused places hold zeros: their probability is 0, and 0 times whatever memory held might be NaN.
    new = old.new_zeros(len(rows), old.shape[1], capacity, old.shape[3])
    if length:
        new[:, :, :length] = old[:, :, :length][rows]
    return new


class GroupCache(Cache):  # type: ignore[misc]
    """The cache of B rows, each of which continues one of N prompts.

    Row b continues prompt `prompt[b]` and is the `place[b]`-th of the at most `width` = G that do.

    Args:
        prompts: each layer's keys and values [N, K, P, .] of the prompts, left-padded.
        mask: [N, P]; 1 where a prompt's token stands.
        samples: rows of every prompt at the start, one after the other.
        windows: each layer's sliding window, or None.
    """

    def __init__(
        self, prompts: Sequence[tuple[Tensor, Tensor]], mask: Tensor, samples: int, windows: Sequence[int | None]
    ) -> None:
        super().__init__(layers=[GroupLayer(*kv, window) for kv, window in zip(prompts, windows, strict=True)])
        row = torch.arange(len(mask) * samples, device=mask.device)
        self.prompt, self.place, self.width = row // samples, row % samples, samples
        self._ragged = False
        self._padding = mask == 0
        self._biases: dict[int | None, Tensor] = {}

    def room(self) -> None:
        """Make room for one token more, of every row."""
        self._biases.clear()
        if self.full:
            self._resize(torch.arange(len(self.prompt), device=self.prompt.device))

    @property
    def full(self) -> bool:
        """True where one token more takes a larger buffer, and so a copy of all."""
        return bool(self.layers[0].length == self.layers[0].keys.shape[2])

    def keep(self, rows: Tensor) -> None:
        """Keep these rows (ascending), and the prompts that they continue."""
        kept, self.prompt = self.prompt[rows].unique_consecutive(return_inverse=True)
        if len(kept) < len(self._padding):
            self._padding = self._padding[kept]
            for layer in self.layers:
                layer.prompt_keys, layer.prompt_values = layer.prompt_keys[kept], layer.prompt_values[kept]
        self.place = torch.arange(len(rows), device=rows.device) - torch.searchsorted(self.prompt, self.prompt)
        self.width = int(self.place.max()) + 1
        self._ragged = len(rows) < len(kept) * self.width
        self._resize(rows)

    def _resize(self, rows: Tensor) -> None:
        capacity = (self.layers[0].length // BLOCK + 1) * BLOCK
        for layer in self.layers:
            layer.resize(rows, capacity)

    def by_prompt(self, x: Tensor) -> Tensor:
        """[B, K, R, y], R query heads a key-value head -> [N, K, G * R, y]; zeros where a prompt has fewer rows."""
        if self._ragged:
            table = x.new_zeros(len(self._padding), self.width, *x.shape[1:])
            table[self.prompt, self.place] = x
        else:
            table = x.unflatten(0, (-1, self.width))
        return table.transpose(1, 2).flatten(2, 3)

    def by_row(self, x: Tensor) -> Tensor:
        """The way back: [N, K, G * R, y] -> [B, K, R, y]."""
        table: Tensor = x.unflatten(2, (self.width, -1)).transpose(1, 2)
        return table[self.prompt, self.place] if self._ragged else table.flatten(0, 1)

    def bias(self, layer: GroupLayer) -> Tensor:
        """Return [B, 1, 1, P + C] to be added to scores: 0 where the layer's newest tokens look, -inf elsewhere."""
        if layer.window not in self._biases:
            prompt_length, end = self._padding.shape[1], layer.get_seq_length()
            hidden = self._padding.new_zeros(len(self.prompt), prompt_length + layer.keys.shape[2])
            hidden[:, :prompt_length] = self._padding[self.prompt]
            hidden[:, end:] = True
            if layer.window is not None:  # padding stands on the left, so places are as far apart as positions
                hidden[:, : max(0, end - layer.window)] = True
            bias = torch.zeros(hidden.shape, dtype=layer.keys.dtype, device=hidden.device)
            self._biases[layer.window] = bias.masked_fill_(hidden, -torch.inf)[:, None, None]
        return self._biases[layer.window]


def windows(model: PreTrainedModel) -> list[int | None]:
    """Return how far back each of the model's cached layers looks; None is all the way.

    Raises:
        InputError: a layer keeps something else than keys and values, or transformers has no cache for the model.
    """
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception as error:  # encoders with decoders, and configurations that do not say what a layer is
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
