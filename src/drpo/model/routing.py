"""Routing mismatch: how often sampler and trainer route a token of a mixture to different experts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drpo.errors import InputError
from drpo.model.quantize import stacked_experts
from drpo.types import TokenSequence


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


def _experts(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules with stacked experts, in order."""
    return list(dict.fromkeys(module for _, module, _ in stacked_experts(model)))


def _chosen(model: PreTrainedModel, c: TokenSequence, dtype: torch.dtype) -> Tensor:
    """Return the experts of each layer for a sequence's sampled tokens, ascending, [L, M, k] int64 on the CPU.

    transformers passes the router's choice, [positions, k], to every mixture's experts. It is read there, after the
    biases, groups and other rules of the model family's router.
    """
    choices: list[Tensor] = []

    def note(module: nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
        tensors = (x for x in (*arguments, *named.values()) if isinstance(x, Tensor) and x.ndim == 2)
        choices.extend([x for x in tensors if not x.is_floating_point()][:1])

    experts = _experts(model)
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in experts]
    ids = torch.cat([c.prompt_ids, c.token_ids]).to(model.device)
    try:
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            model.get_decoder()(input_ids=ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(choices) != len(experts) or any(len(x) != len(ids) for x in choices):
        raise InputError(
            f"model {type(model).__name__}: its experts are not handed their tokens in transformers' usual way, "
            "so what its router chose cannot be compared"
        )
    return torch.stack(choices)[:, len(c.prompt_ids) - 1 : -1][:, c.sampled].sort(-1).values.cpu()
