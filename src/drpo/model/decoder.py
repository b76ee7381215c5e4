"""The parts of a model that a text runs through; encoders of images and sound beside them stay as loaded."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part that maps token ids to the last hidden states.

    In a checkpoint that reads images or sound too, this is its language model, without the head.

    Args:
        model: any causal LM, or one for images and texts.

    Example:
        >>> from drpo.model.loading import tiny
        >>> type(decoder_of(tiny()[0])).__name__
        'LlamaModel'
    """
    found = model
    while found is model or found.get_output_embeddings() is not None:  # Llama 4: a language model with its own head
        named: nn.Module = found.get_decoder()  # in ModernBERT its head has that name
        inner = [part for part in found.children() if isinstance(part, PreTrainedModel)]
        if isinstance(named, PreTrainedModel) and named is not found:
            inner = [named]
        if len(inner) != 1:
            break
        found = inner[0]
    return found


def freeze_unread(model: PreTrainedModel) -> None:
    """Freeze the parameters that a text does not run through: those of encoders of images and sound."""
    read = {id(p) for part in (decoder_of(model), model.get_output_embeddings()) for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in read:
            parameter.requires_grad_(False)


def outside(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names of the linear layers that a text does not run through, the head's among them."""
    inside = set(decoder_of(model).modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module not in inside:
            yield name
