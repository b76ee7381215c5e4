"""Updates of a policy that go nowhere: their gradients, compared, and a device without much room."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drpo.model.policy import Policy
from drpo.model.precision import Precision
from drpo.objectives import DRPO
from drpo.train.step import update_policy
from drpo.types import Batch, MicroBatch, StepStats


def policy_of(model: PreTrainedModel, *, dtype: torch.dtype = torch.float32, **options: object) -> Policy:
    options.setdefault("temperature", 1.0)
    return Policy(model, precision=Precision(dtype), **options)  # type: ignore[arg-type]


def gradients(policy: Policy, batch: Batch, objective: object = DRPO(0.2)) -> tuple[dict[str, Tensor], StepStats]:
    """The gradients that an update leaves behind; the step itself goes nowhere."""
    still = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    stats = update_policy(policy, still, batch, objective, 0.0, 1e30)  # type: ignore[arg-type]
    return {name: p.grad.clone() for name, p in policy.trainable().items()}, stats


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    scale = max(float(value.abs().max()) for value in other.values())
    assert scale > 0
    for name, value in one.items():
        assert float((value - other[name]).abs().max()) <= tolerance * scale, name


class Cramped:
    """A policy on a device that has room for so many positions."""

    def __init__(self, policy: Policy, room: int) -> None:
        self._loss, self._room, self.tried = policy.loss, room, []
        policy.loss = self  # type: ignore[method-assign, assignment]

    def __call__(self, micro: MicroBatch, objective: object) -> object:
        self.tried.append(len(micro.input_ids))
        if len(micro.input_ids) > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._loss(micro, objective)  # type: ignore[arg-type]
