"""Empty modules for what a framework imports and a CPU does not have, so that its own code can be imported."""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

OF_AREAL = (
    "aiofiles", "aiohttp", "flask", "httpx", "hydra", "lark", "numba", "omegaconf", "orjson", "peft", "pybase64",
    "swanlab", "tenacity", "tensorboardX", "trackio", "transformers", "uvloop", "wandb", "werkzeug",
)  # fmt: skip
OF_OPENRLHF = ("aiohttp", "deepspeed", "flash_attn", "peft", "pylatexenc", "torchdata", "transformers", "vllm")
OF_TORCHTITAN = ("monarch", "renderers", "tensorboard", "torch_checkpointing", "torchstore", "vllm", "wandb")


class Kind(type):
    """Of empty classes; what is read from one is a decorator that changes nothing."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return decorator


def decorator(*positional: Any, **named: Any) -> Any:
    """Return the function that is decorated, with or without arguments before."""
    return positional[0] if len(positional) == 1 and callable(positional[0]) else lambda function: function


class Nothing(metaclass=Kind):
    """An empty class, which may be a decorator too."""

    def __new__(cls, *positional: Any, **named: Any) -> Any:
        return positional[0] if len(positional) == 1 and callable(positional[0]) else super().__new__(cls)

    def __call__(self, function: Any) -> Any:
        return function


class Empty(ModuleType):
    """A module in which every name is an empty class."""

    __path__: tuple = ()
    __version__ = "99.0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Kind(name, (Nothing,), {})


class Finder(MetaPathFinder, Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install(names: Sequence[str]) -> None:
    """Let them be found, in this process, after everything that is really there."""
    if not any(isinstance(finder, Finder) and finder.names == names for finder in sys.meta_path):
        sys.meta_path.append(Finder(names))
