"""Which experts a mixture's routers choose, and how often those of sampler and trainer differ."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drpo.errors import InputError
from drpo.model.decoder import decoder_of
from drpo.model.quantize import stacked_experts
from drpo.types import TokenSequence
from drpo.types.routes import compact


@dataclass(frozen=True)
class RoutingMismatch:
    """Differences between the expert choices of two copies of a mixture; order and weights of experts are ignored.

    Args:
        share: share of (token, layer) pairs with different sets of experts, [0, 1]; the mean over layers.
        by_layer: this share per layer with experts, from the first.
        share_of_tokens: share of tokens with a difference in at least one layer, [0, 1].
        n_tokens: sampled tokens compared.
        gap_differing: mean |pi - mu| over tokens with a difference; None without such tokens or without `logp`.
        gap_same: mean |pi - mu| over the other tokens; None likewise.
    """

    share: float
    by_layer: tuple[float, ...]
    share_of_tokens: float
    n_tokens: int
    gap_differing: float | None = None
    gap_same: float | None = None

    @property
    def n_layers(self) -> int:
        """The number of layers with experts."""
        return len(self.by_layer)


@torch.no_grad()
def routing_mismatch(
    sampler: PreTrainedModel,
    trainer: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    *,
    trainer_dtype: torch.dtype = torch.float32,
    logp: Sequence[Tensor] | None = None,
) -> RoutingMismatch | None:
    """Run both models over the same sequences and compare the experts of each token's prediction.

    Both run a plain forward pass, one sequence at a time, so neither a cache nor packing contributes a difference.

    Args:
        sampler: an engine's model.
        trainer: a policy's model, with its adapters.
        sequences: at least one; a sampled token is compared at the position that predicts it.
        trainer_dtype: the trainer's autocast dtype (`Policy.dtype`).
        logp: for each sequence, the policy's log-probabilities of its tokens, [M] float32, nats.

    Returns:
        The mismatch, or None for models without experts.

    Raises:
        InputError: the router's choices cannot be observed.
    """
    if not _experts(trainer):
        return None
    differ = torch.cat(
        [(_chosen(sampler, c, torch.float32) != _chosen(trainer, c, trainer_dtype)).any(-1) for c in sequences], dim=1
    )
    anywhere = differ.any(0)
    by_layer = differ.float().mean(1).tolist()
    gaps: tuple[float | None, float | None] = (None, None)
    if logp is not None:
        mu = torch.cat([s.behavior_logp for s in sequences]).exp()
        gap = (torch.cat([x.cpu() for x in logp]).exp() - mu).abs()
        gaps = (_mean(gap[anywhere]), _mean(gap[~anywhere]))
    return RoutingMismatch(
        float(differ.float().mean()), tuple(by_layer), float(anywhere.float().mean()), differ.shape[1], *gaps
    )


def _mean(x: Tensor) -> float | None:
    return float(x.mean()) if len(x) else None


class RouteRecorder:
    """Notes which experts a model's routers choose.

    transformers passes the router's choice, [positions, k], to every mixture's experts. It is read there, after the
    biases, groups and other rules of the model family's router.

    Args:
        model: with stacked experts; adapters may be put on it later.

    Attributes:
        experts: the modules with stacked experts, in order.
        shape: L layers with experts, and k experts to a token; known after a forward pass.

    Raises:
        InputError: the model has no experts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._name = type(model).__name__
        self.experts = _experts(model)
        if not self.experts:
            raise _without_experts(model)
        largest = max(len(p) for m in self.experts for p in m.parameters(recurse=False) if p.ndim == 3)
        self._dtype = compact(largest)
        self.shape = (len(self.experts), 0)
        self._seen: list[list[Tensor]] = [[] for _ in self.experts]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the choices of every forward pass within."""
        hooks = [
            module.register_forward_pre_hook(partial(self._note, layer), with_kwargs=True)
            for layer, module in enumerate(self.experts)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.drop()

    def _note(self, layer: int, module: nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
        if (choice := handed_choice(arguments, named)) is not None:
            self._seen[layer].append(choice.to(self._dtype))

    def drop(self) -> None:
        """Forget what was noted."""
        self._seen = [[] for _ in self.experts]

    def take(self, n_rows: int) -> Tensor:
        """Return what was chosen since the last call, in passes over the same rows: [n_rows, Q, L, k], see `Routes`.

        Raises:
            InputError: the experts of a layer were not handed what its router chose.
        """
        seen, self._seen = self._seen, [[] for _ in self.experts]
        layers = [[x.view(n_rows, -1, x.shape[-1]) for x in of_layer] for of_layer in seen if of_layer]
        tables = [torch.cat(of_layer, dim=1) for of_layer in layers]
        if len(tables) != len(self.experts) or len({t.shape for t in tables}) != 1:
            raise InputError(
                f"model {self._name}: its experts are not handed their tokens in transformers' usual way, "
                "so what its router chose cannot be read"
            )
        self.shape = (len(tables), tables[0].shape[-1])
        return torch.stack(tables, dim=2)


def handed_choice(arguments: tuple[object, ...], named: dict[str, object]) -> Tensor | None:
    """Return the choice [n, k] among the arguments of a mixture's experts; None if there is none."""
    tensors = [x for x in (*arguments, *named.values()) if isinstance(x, Tensor) and x.ndim == 2]
    return next((x for x in tensors if not x.is_floating_point()), None)


def experts_by_layer(model: PreTrainedModel) -> dict[int, int]:
    """Return E of each of a model's decoder layers that has experts, by the layer's number, ascending.

    Raises:
        InputError: the model has no experts.
    """
    found: dict[int, int] = {}
    for name, module, field in stacked_experts(model):
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if numbers:
            found[numbers[0]] = max(found.get(numbers[0], 0), len(getattr(module, field)))
    if not found:
        raise _without_experts(model)
    return found


def _without_experts(model: PreTrainedModel) -> InputError:
    return InputError(
        f"routing_replay: {type(model).__name__} has no experts, whose choice could be replayed; set --routing-replay "
        "off"
    )


def _experts(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules with stacked experts, in order."""
    return list(dict.fromkeys(module for _, module, _ in stacked_experts(model)))


def _chosen(model: PreTrainedModel, c: TokenSequence, dtype: torch.dtype) -> Tensor:
    """Return the experts of each layer for a sequence's sampled tokens, ascending, [L, M, k] on the CPU.

    Raises:
        InputError: the router's choices cannot be observed.
    """
    recorder = RouteRecorder(model)
    ids = torch.cat([c.prompt_ids, c.token_ids]).to(model.device)
    with recorder.listening(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        decoder_of(model)(input_ids=ids[None], use_cache=False)
        chosen = recorder.take(1)[0].transpose(0, 1)
    return chosen[:, len(c.prompt_ids) - 1 : -1][:, c.sampled].sort(-1).values.cpu()
