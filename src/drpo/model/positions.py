"""Limits of a model's positions: rotary embeddings that depend on the longest sequence of a pass, and windows."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from drpo.errors import InputError
from drpo.model.decoder import decoder_of

CROSSED_WINDOW = 4
"""The sliding window that `narrowed` sets, short enough to matter in a check on about ten tokens."""


@dataclass(frozen=True)
class Limit:
    """The longest sequence whose states do not depend on the other sequences of the pass.

    Args:
        tokens: prompt and completion together; None without a limit.
        kind: transformers' name of the rotary embedding that sets the limit.
    """

    tokens: int | None = None
    kind: str = ""

    @property
    def why(self) -> str:
        """The reason for the limit, to follow "N positions" in a message."""
        return f" for which its {self.kind} rotary embedding does not depend on what else is in the batch"

    def require(self, tokens: int, what: str = "a sequence") -> None:
        """Raise if a length exceeds the limit.

        Args:
            tokens: prompt and completion together.
            what: the sequence's name in the message.

        Raises:
            InputError: the length exceeds the limit.

        Example:
            >>> Limit(4096, "longrope").require(4096)
            >>> Limit().require(10**9)
        """
        if self.tokens is not None and tokens > self.tokens:
            raise InputError(
                f"{what} of {tokens} tokens (prompt and completion): beyond {self.tokens} the model's {self.kind} "
                "rotary embedding changes every log-probability of a batch with its longest sequence; shorten the "
                f"prompts or set sampling.max_new_tokens so that both fit in {self.tokens}"
            )


@torch.no_grad()
def sequence_limit(model: PreTrainedModel) -> Limit:
    """Return the limit set by a model's rotary embeddings.

    If the longest sequence of a pass exceeds the pre-training length, transformers computes `longrope` with other
    factors, and `dynamic` with another base, for all sequences of the pass; cached tokens keep their values. Up to that
    length both are ordinary.

    Args:
        model: any causal LM.

    Raises:
        InputError: the states depend on the longest position of a pass in some other way.

    Example:
        >>> from drpo.model.loading import tiny
        >>> sequence_limit(tiny()[0])
        Limit(tokens=None, kind='')
    """
    limits = [limit for module in model.modules() for limit in _limits(module)]
    if limits:
        return min(limits, key=lambda limit: limit.tokens or 0)
    if _depends_on_the_longest(model):
        raise InputError(
            f"model {type(model).__name__}: its states depend on the longest position of a batch in a way of its own, "
            "so log-probabilities would depend on what else is in the batch, which drpo does not train, with any "
            "--engine"
        )
    return Limit()


def _limits(module: nn.Module) -> Iterator[Limit]:
    """Yield the limits of one rotary embedding; some models have several, by layer type."""
    kinds = getattr(module, "rope_type", None)
    config: Any = getattr(module, "config", None)
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    for layer_type, kind in (kinds if isinstance(kinds, Mapping) else {None: kinds}).items():
        rope = parameters if layer_type is None else parameters.get(layer_type) or {}
        if kind == "longrope":
            yield Limit(int(rope["original_max_position_embeddings"]), kind)
        elif isinstance(kind, str) and "dynamic" in kind:
            yield Limit(int(config.max_position_embeddings), kind)


def _depends_on_the_longest(model: PreTrainedModel) -> bool:
    """Return whether a row's states change with another row's positions; False if positions cannot be passed."""
    last = _plain_value(model.config.get_text_config(), "max_position_embeddings")
    if last is None or last <= 8:
        return False
    ids = torch.arange(1, 5, device=model.device).repeat(2, 1)
    near = torch.arange(4, device=model.device).repeat(2, 1)
    far = near + torch.tensor([[0], [last - 5]], device=model.device)
    try:
        a, b = (
            decoder_of(model)(input_ids=ids, position_ids=p, use_cache=False).last_hidden_state[0] for p in (near, far)
        )
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError, AttributeError):
        return False
    scale = float(a.abs().max())  # not finite for broken weights, which the log-probabilities report
    return math.isfinite(scale) and not torch.allclose(a, b, rtol=1e-3, atol=1e-3 * scale)


@contextmanager
def narrowed(model: PreTrainedModel, window: int = CROSSED_WINDOW) -> Iterator[None]:
    """Shorten a model's sliding windows for a check on a few tokens; restore them afterwards.

    Args:
        model: its configuration and layers change meanwhile.
        window: the configuration's new window; a shorter one stays.
    """
    configs = [model.config, model.config.get_text_config()]
    wide = _plain_value(configs[1], "sliding_window")
    excess = max(0, (wide or 0) - window)
    holders: list[Any] = [*configs, *model.modules()] if excess else []
    before = [(holder, n) for holder in holders if (n := _plain_value(holder, "sliding_window")) and n > excess]
    try:
        for holder, n in before:
            holder.sliding_window = n - excess  # a layer's window may differ from the configuration's by one
        yield
    finally:
        for holder, n in before:
            holder.sliding_window = n


def _plain_value(holder: object, name: str) -> int | None:
    """Return an integer attribute from the object's own dict; some configurations raise for per-layer attributes."""
    value = vars(holder).get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
