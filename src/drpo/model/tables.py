"""Small tensors that are computed once for each device."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def kept(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Return a function that makes the tensor of some arguments once.

    What a mode without numbers makes, such as FakeTensorMode, is not kept: whoever asks afterwards would get it.

    Args:
        make: of hashable arguments; not called in inference mode.

    Example:
        >>> ones = kept(torch.ones)
        >>> ones(2) is ones(2)
        True
    """
    tables: dict[tuple[object, ...], Tensor] = {}

    @wraps(make)
    def table(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        key = (*args, *sorted(kwargs.items()))
        if key not in tables:
            with torch.inference_mode(False):
                made = make(*args, **kwargs)
            if type(made) is not Tensor:
                return made
            tables[key] = made
        return tables[key]

    return table
