"""What runs inside vLLM's worker, in this process or in a server: new weights into the live model.

vLLM mixes `WeightLoader` into its worker (the option `worker_extension_cls`), so its methods can be called by name.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

EXTENSION = f"{__name__}.WeightLoader"
"""What vLLM is told to mix in."""


class Worker(Protocol):
    """The part of vLLM's worker that is used here."""

    def reload_weights(self, weights_iterator: Iterable[tuple[str, Tensor]]) -> None:
        """Load a checkpoint's tensors into the model, in place."""
        ...

    def get_model(self) -> nn.Module:
        """Return the model."""
        ...


class WeightLoader:
    """Methods that vLLM's worker gains; the prefix keeps them apart from its own."""

    def drpo_load(self: Worker, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load a checkpoint's tensors, by name.

        Raises:
            RuntimeError: an output head that would still answer with other weights.
        """
        with torch.no_grad():
            self.reload_weights(weights_iterator=iter(weights))
            refresh_packed(self.get_model())

    def drpo_load_file(self: Any, path: str) -> None:
        """Load a safetensors file."""
        self.drpo_load(_tensors(path))

    def drpo_dtype(self: Worker) -> dict[str, str]:
        """The floating-point type that the model's parameters are kept in (the most frequent one)."""
        dtypes = [str(p.dtype).removeprefix("torch.") for p in self.get_model().parameters()]
        return {"dtype": max(set(dtypes), key=dtypes.count)}


def _tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    """One tensor at a time, so that a file larger than the memory that is left can be read."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            yield name, file.get_tensor(name)


def refresh_packed(model: nn.Module) -> None:
    """Pack again what vLLM's reloading leaves stale, and see that every packed head is its weight's.

    On a CPU vLLM multiplies by a packed copy of each weight (`layer.cpu_linear`). `reload_weights` packs a layer again
    when it has loaded a tensor *for that layer*; a tied head has no tensor of its own, so its packed copy stays that of
    the old weights while the weight that it shares with the embedding is new. (vllm/model_executor/model_loader/reload/
    layerwise.py, `finalize_layerwise_processing`, in 0.32.) On a GPU nothing is packed and this does nothing.

    Args:
        model: vLLM's, after `reload_weights`.

    Raises:
        RuntimeError: a packed copy is not that of its weight.
    """
    for layer in _packed_beside_weight(model):
        layer.quant_method.process_weights_after_loading(layer)
        _check_packed(layer)


def _packed_beside_weight(model: nn.Module) -> list[Any]:
    """The layers that keep their weight as well as a packed copy: embeddings and heads."""
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "cpu_linear")]
    return [layer for layer in layers if layer.weight.dim() == 2 and layer.weight.numel() > 0]


def _check_packed(layer: Any) -> None:
    weight = layer.weight
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, weight.shape[1], generator=generator).to(weight)
    found, wanted = layer.quant_method.apply(layer, probe).float(), (probe.float() @ weight.float().T)
    if not torch.allclose(found, wanted, rtol=0, atol=0.02 * float(wanted.abs().max())):
        raise RuntimeError(f"{type(layer).__name__}: its packed weights are not those that were loaded")
