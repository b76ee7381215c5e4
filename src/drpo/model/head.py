"""A transformers model's head as a `drpo.ops.Head`, measured because model families name its parts differently."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drpo.errors import InputError
from drpo.model.decoder import decoder_of
from drpo.ops import Head

PROBE = (2.0**-10, 1.0, 1e30)
"""Logits that replace the output layer's: the small one shows the scale, the huge one the soft cap."""

MOST_CAP = 1e6
"""Nats; without a soft cap the model returns more than this for a logit of 1e30."""


@dataclass(frozen=True)
class HeadShape:
    """The scale and the soft cap that a model applies after its output layer.

    Args:
        scale: > 0; see `drpo.ops.Head`.
        soft_cap: nats, or None; see `drpo.ops.Head`.
    """

    scale: float
    soft_cap: float | None

    def of(self, weight: Tensor, bias: Tensor | None) -> Head:
        """Return the head with this weight [V, H] and bias [V]."""
        return Head(weight, bias, self.scale, self.soft_cap)


@torch.no_grad()
def measure_head(model: PreTrainedModel) -> HeadShape:
    """Return the scale and the soft cap of a model's logits, verified on a few tokens.

    Args:
        model: any causal LM; it runs twice over a few tokens.

    Raises:
        InputError: the logits are not a linear layer's, scaled and softly capped; or the model cannot read the tokens.

    Example:
        >>> from drpo.model import loading
        >>> measure_head(loading.tiny()[0])
        HeadShape(scale=1.0, soft_cap=None)
    """
    layer, decoder = model.get_output_embeddings(), decoder_of(model)
    if not isinstance(getattr(layer, "weight", None), Tensor) or not isinstance(decoder, PreTrainedModel):
        raise _refused(model)
    n = len(PROBE)
    probe = torch.arange(2 * n, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        inputs, logits = _with_probe(model, layer, probe)
        hidden = decoder(input_ids=probe, use_cache=False).last_hidden_state[0]
    except Exception as error:  # a model that requires more than text, or that transformers itself cannot run here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model {type(model).__name__}: it cannot read a text by itself ({reason})") from None
    small, one, huge = logits[n:, 0].float().tolist()
    if not small > 0 or inputs.shape != hidden.shape:
        raise _refused(model)
    before = _scale(inputs, hidden)  # MiniCPM 3 scales the states, not the logits
    scale = one if huge > MOST_CAP else round(huge * math.atanh(small / huge) / PROBE[0], 6)
    shape = HeadShape(scale * round(before, 6), None if huge > MOST_CAP else huge)
    expected = shape.of(layer.weight, getattr(layer, "bias", None)).logits(hidden[:n]).float()
    if not torch.allclose(expected, logits[:n], rtol=1e-3, atol=1e-3 * float(logits[:n].abs().max())):
        raise _refused(model)
    return shape


def _scale(scaled: Tensor, states: Tensor) -> float:
    """Return the factor between states and scaled states; 1 where all are 0."""
    size = float(states.square().sum())
    return float((scaled * states).sum()) / size if size else 1.0


def _with_probe(model: PreTrainedModel, layer: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output layer's inputs [2n, H], and the model's logits [2n, V] with `PROBE` at the last n tokens."""
    n = len(PROBE)
    states: list[Tensor] = []

    def replace_some(_: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        rows = logits.reshape(2 * n, -1)
        states.append(inputs[0].reshape(2 * n, -1))
        return torch.cat([rows[:n], rows.new_tensor(PROBE)[:, None].expand_as(rows[n:])]).reshape(logits.shape)

    hook = layer.register_forward_hook(replace_some)
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        hook.remove()
    return states[0], logits


def _refused(model: PreTrainedModel) -> InputError:
    return InputError(
        f"model {type(model).__name__}: its logits are not those of one linear layer, scaled and softly capped, which "
        "is what drpo trains, with any --engine"
    )
