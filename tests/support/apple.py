"""A stand-in for Apple's GPU on any machine: tensors that say they are on mps, compute on the CPU, and refuse float64.

A tensor counts as on the device if it was moved or made there, is a parameter, or comes of one that is there. What runs
on other threads, or in C++ alone (most of a backward pass), is not watched.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MPS, CPU = torch.device("mps"), torch.device("cpu")
REFUSED = (torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
_DEVICE: Any = Tensor.device
_OFF: tuple[Any, ...] = (Tensor.numpy, Tensor.tolist, Tensor.item)


def is_on(tensor: Tensor) -> bool:
    """Whether a tensor counts as on the device."""
    return isinstance(tensor, nn.Parameter) or "on_apple" in vars(tensor)


class Apple(TorchFunctionMode):
    """While it is entered, `mps` is a device.

    Args:
        monkeypatch: makes autocast of the device that of the CPU.

    Attributes:
        n_calls: functions of torch that received a tensor of the device.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.n_calls = 0
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
            monkeypatch.setattr(torch, name, partial(_on_cpu, getattr(torch, name)))

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function on the CPU, and say where its result is."""
        kwargs = kwargs or {}
        inputs = list(_tensors([*args, *kwargs.values()]))
        on = any(map(is_on, inputs))
        self.n_calls += on
        if func == _DEVICE.__get__:
            return MPS if on else func(*args)
        target = CPU if func is Tensor.cpu else next(_devices([*args[1:], *kwargs.values()]), None)
        args = [CPU if isinstance(a, torch.device | str) and str(a) == "mps" else a for a in args]
        kwargs = {k: CPU if str(v) == "mps" else v for k, v in kwargs.items()}
        result = func(*args, **kwargs)
        if func in (Tensor.copy_, *_OFF) or func.__name__ == "__set__":
            return result
        if target is not None:
            on = target.type == "mps"
            # What is moved is another tensor; a parameter keeps its identity.
            if func in (Tensor.to, Tensor.cpu) and result is inputs[0] and is_on(result) != on:
                result = result.clone()
        for tensor in _tensors([result]):
            if on and tensor.dtype in REFUSED:
                raise TypeError(f"Cannot convert a MPS Tensor to {tensor.dtype}: {func.__name__}")
            if on:
                vars(tensor)["on_apple"] = True
            else:
                vars(tensor).pop("on_apple", None)
        return result


def _on_cpu(function: Callable[..., Any], kind: str, *args: Any, **kwargs: Any) -> Any:
    return function("cpu" if kind == "mps" else kind, *args, **kwargs)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _devices(values: Any) -> Iterator[torch.device]:
    for value in values:
        if isinstance(value, torch.device):
            yield value
        elif value in ("cpu", "mps") if isinstance(value, str) else False:
            yield torch.device(value)
