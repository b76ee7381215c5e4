"""How often a mixture of experts sends a token to other experts in the sampler than in the trainer."""

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
    """Where two copies of a mixture choose differently; order and weights of the chosen experts do not count.

    Args:
        share: of the (token, layer) pairs whose sets of experts differ, [0, 1]; the mean over layers.
        by_layer: the same for each layer that has experts, from the first.
        share_of_tokens: of the tokens for which at least one layer's sets differ, [0, 1].
        n_tokens: sampled tokens compared.
        gap_differing: mean |pi - mu| over the tokens of `share_of_tokens`; None where there are none or no `logp` came.
        gap_same: mean |pi - mu| over the others; None likewise.
    """

    share: float
    by_layer: tuple[float, ...]
    share_of_tokens: float
    n_tokens: int
    gap_differing: float | None = None
    gap_same: float | None = None

    @property
    def n_layers(self) -> int:
        """Layers that have experts."""
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
    """Run both models over the same sequences and compare which experts each token's prediction goes through.

    Both go through a plain forward pass, one sequence at a time: what is found is the models' difference, not that of
    a cache or of packing.

    Args:
        sampler: an engine's copy.
        trainer: a policy's model; its adapters are as they are.
        sequences: at least one; a sampled token is compared at the position that predicts it.
        trainer_dtype: what the trainer computes in, by autocast (`Policy.dtype`).
        logp: of each sequence, [M] float32, the policy's log-probabilities of its tokens, nats.

    Returns:
        What differs, or None for models without experts.

    Raises:
        InputError: what the model's router chose cannot be seen.
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
    """The modules that hold stacked experts, in order."""
    return list(dict.fromkeys(module for _, module, _ in stacked_experts(model)))


def _chosen(model: PreTrainedModel, c: TokenSequence, dtype: torch.dtype) -> Tensor:
    """[L, M, k] int64 on the CPU: the experts of each layer for each of a sequence's sampled tokens, ascending.

    transformers hands every mixture's experts the numbers that its router chose, [positions, k], and that is where they
    are read: after biases, groups and whatever else a router of that family considers.
    """
    seen: list[Tensor] = []

    def note(module: nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
        given = (x for x in (*arguments, *named.values()) if isinstance(x, Tensor) and x.ndim == 2)
        seen.extend([x for x in given if not x.is_floating_point()][:1])

    experts = _experts(model)
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in experts]
    ids = torch.cat([c.prompt_ids, c.token_ids]).to(model.device)
    try:
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            model.get_decoder()(input_ids=ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != len(experts) or any(len(x) != len(ids) for x in seen):
        raise InputError(
            f"model {type(model).__name__}: its experts are not handed their tokens in transformers' usual way, "
            "so what its router chose cannot be compared"
        )
    return torch.stack(seen)[:, len(c.prompt_ids) - 1 : -1][:, c.sampled].sort(-1).values.cpu()
