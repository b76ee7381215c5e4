"""Optimisers and learning rate schedules, by spec: adamw(2e-5), adamw8bit(2e-5), muon(2e-5), linear(warmup=5)."""

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from drpo.errors import InputError
from drpo.spec import Registry, names_code, parse_spec, split_call
from drpo.train.compact_adamw import CompactAdamW, local_bytes


class Optimizer(Protocol):
    """The settings of an optimiser, from which `build` makes it.

    An optimiser that requires whole matrices has `whole_matrices = True`; `--shard fsdp` refuses it. One that rounds
    bfloat16 weights stochastically has `rounds_stochastically = True`; `--master-weights bf16` refuses others.
    """

    @property
    def learning_rate(self) -> float:
        """The peak."""

    def build(
        self, parameters: Sequence[nn.Parameter], embeddings: Collection[nn.Parameter], seed: int = 0
    ) -> torch.optim.Optimizer:
        """Return the optimiser of these parameters; every group has the step's learning rate as `lr`.

        Args:
            parameters: the trained ones.
            embeddings: weights of the embeddings and the head, which Muon leaves to AdamW.
            seed: of stochastic rounding; passed only where some of the parameters are bfloat16.
        """


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay: on matrices only, not on norms and biases.

    Args:
        learning_rate: peak, >= 0.
        betas: decay of the two moments, [0, 1).
        weight_decay: >= 0.

    Raises:
        InputError: a value out of its range; the message names it.

    Example:
        >>> from drpo.spec import format_spec
        >>> parse_spec("adamw(2e-5, weight_decay=0.1)", OPTIMIZERS)
        AdamW(learning_rate=2e-05, betas=(0.9, 0.999), weight_decay=0.1)
        >>> format_spec(AdamW(2e-5), OPTIMIZERS)
        'adamw(2e-05)'

    Source: arXiv 1711.05101.
    """

    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    rounds_stochastically: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_rates("adamw", self.learning_rate, self.betas, self.weight_decay)

    def build(
        self, parameters: Sequence[nn.Parameter], embeddings: Collection[nn.Parameter], seed: int = 0
    ) -> torch.optim.Optimizer:
        """Return AdamW over the parameters, with float32 moments; see `Optimizer.build`."""
        groups, lr, betas = _decayed(parameters, self.weight_decay), self.learning_rate, self.betas
        if any(p.dtype == torch.bfloat16 for p in parameters):
            return CompactAdamW(groups, lr=lr, betas=betas, eight_bits=False, seed=seed)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


@dataclass(frozen=True)
class AdamW8bit:
    """AdamW whose two moments take a byte each where AdamW's take four; of norms and biases they stay as they are.

    Codes of 8 bits with a scale for 256 neighbours of a row, in all 2.03 bytes a weight; checkpoints shrink likewise.
    The code is drpo's own (`drpo.train.compact_adamw`), for every device, and divides over processes (`--shard fsdp`).

    Args:
        learning_rate, betas, weight_decay: as for `AdamW`.

    Raises:
        InputError: a value out of its range; the message names it.

    Example:
        >>> parse_spec("adamw8bit(2e-5)", OPTIMIZERS)
        AdamW8bit(learning_rate=2e-05, betas=(0.9, 0.999), weight_decay=0.01)

    Source: arXiv 2110.02861.
    """

    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    rounds_stochastically: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_rates("adamw8bit", self.learning_rate, self.betas, self.weight_decay)

    def build(
        self, parameters: Sequence[nn.Parameter], embeddings: Collection[nn.Parameter], seed: int = 0
    ) -> torch.optim.Optimizer:
        """Return AdamW over the parameters, with moments in 8 bits; see `Optimizer.build`."""
        groups = _decayed(parameters, self.weight_decay)
        return CompactAdamW(groups, lr=self.learning_rate, betas=self.betas, eight_bits=True, seed=seed)


def _decayed(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of matrices, whose weights decay, and of vectors, whose weights do not; none is empty."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class Muon:
    """Momentum whose matrices are orthogonalised (torch.optim.Muon); embeddings, head, norms and biases get AdamW.

    Updates are scaled to the size of AdamW's (`match_rms_adamw`), so one learning rate and weight decay serve both.

    Args:
        learning_rate: peak, >= 0; of both.
        momentum: [0, 1).
        weight_decay: >= 0; on matrices and embeddings.
        betas: of AdamW, [0, 1).

    Raises:
        InputError: a value out of its range; the message names it.

    Example:
        >>> parse_spec("muon(2e-5)", OPTIMIZERS)
        Muon(learning_rate=2e-05, momentum=0.95, weight_decay=0.01, betas=(0.9, 0.999))

    Source: Muon is Scalable for LLM Training, arXiv 2502.16982.
    """

    learning_rate: float = 1e-6
    momentum: float = 0.95
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    whole_matrices: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_rates("muon", self.learning_rate, self.betas, self.weight_decay)
        if not _in_unit(self.momentum):
            raise InputError(f"muon momentum={self.momentum!r}: must be in [0, 1)")

    def build(
        self, parameters: Sequence[nn.Parameter], embeddings: Collection[nn.Parameter], seed: int = 0
    ) -> torch.optim.Optimizer:
        """Return Muon over the hidden matrices and AdamW over the rest; see `Optimizer.build`.

        Raises:
            InputError: this torch has no Muon, or no parameter is a matrix between hidden states.
        """
        if not hasattr(torch.optim, "Muon"):
            raise InputError(f"optimizer muon: torch {torch.__version__} has none; install torch 2.9 or later")
        not_hidden = {id(p) for p in embeddings}
        hidden = [p for p in parameters if p.ndim == 2 and id(p) not in not_hidden]
        if not hidden:
            raise InputError("optimizer muon: the model has no matrices between hidden states; use adamw")
        matrices = {id(p) for p in hidden}
        rest = [p for p in parameters if id(p) not in matrices]
        muon = torch.optim.Muon(
            hidden,
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        adamw = AdamW(self.learning_rate, self.betas, self.weight_decay)
        return Combined([muon, adamw.build(rest, embeddings)] if rest else [muon])


class Combined(torch.optim.Optimizer):
    """Several optimisers, each of its own parameters, as one: they share the state and step together.

    Args:
        optimizers: at least one.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__([p for group in groups for p in group["params"]], {})
        self.optimizers = optimizers
        self.param_groups = groups
        self.state: defaultdict[Any, Any] = defaultdict(dict)
        for optimizer in optimizers:
            optimizer.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every optimiser."""
        for optimizer in self.optimizers:
            optimizer.step(closure)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of this rank's moments from the first step on; those of an unknown optimiser as of AdamW's.

    Example:
        >>> weight = nn.Parameter(torch.zeros(256, 256))
        >>> [state_bytes(spec.build([weight], [])) // 2**10 for spec in (AdamW(), AdamW8bit(), Muon())]
        [512, 130, 256]
    """
    if isinstance(optimizer, CompactAdamW):
        return optimizer.state_bytes()
    if isinstance(optimizer, Combined):
        return sum(map(state_bytes, optimizer.optimizers))
    copies = 1 if type(optimizer).__name__ == "Muon" else 2
    return copies * sum(local_bytes(p) for group in optimizer.param_groups for p in group["params"])


class Schedule(Protocol):
    """The learning rate of every update of a run."""

    @property
    def warmup(self) -> int:
        """Steps over which the rate rises."""

    def __call__(self, peak: float, *, update: int, total: int, per_step: int) -> float:
        """Return the learning rate of an update.

        Args:
            peak: highest learning rate.
            update: in [0, total).
            total: updates of the whole run.
            per_step: updates of a step.
        """


@dataclass(frozen=True)
class Constant:
    """The learning rate rises linearly over the first steps, then stays.

    Args:
        warmup: steps over which it rises, >= 0.

    Example:
        >>> rates(parse_spec("constant(warmup=2)", SCHEDULES), steps=4)
        [0.5, 1.0, 1.0, 1.0]
    """

    warmup: int = 0

    def __post_init__(self) -> None:
        if type(self.warmup) is not int or self.warmup < 0:
            raise InputError(f"schedule warmup={self.warmup!r}: must be a whole number, 0 or more")

    def __call__(self, peak: float, *, update: int, total: int, per_step: int) -> float:
        """Return the learning rate of an update; see `Schedule`."""
        warmup = self.warmup * per_step
        if update < warmup:
            return peak * (update + 1) / warmup
        return peak * self._share(1 - (update - warmup) / max(1, total - warmup))

    def _share(self, left: float) -> float:
        """Return the share of the peak rate at which this share of the run is left."""
        return 1.0


@dataclass(frozen=True)
class Linear(Constant):
    """After the warm-up the learning rate falls along a line, to 0 one update after the last.

    Args:
        warmup: steps over which it rises, >= 0.

    Example:
        >>> rates(parse_spec("linear(warmup=2)", SCHEDULES), steps=6)
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    def _share(self, left: float) -> float:
        return left


@dataclass(frozen=True)
class Cosine(Constant):
    """After the warm-up the learning rate falls along half a cosine, to 0 one update after the last.

    Args:
        warmup: steps over which it rises, >= 0.

    Example:
        >>> [round(rate, 3) for rate in rates(parse_spec("cosine", SCHEDULES), steps=3)]
        [1.0, 0.75, 0.25]
    """

    def _share(self, left: float) -> float:
        return (1 - math.cos(math.pi * left)) / 2


def rates(schedule: Schedule, steps: int, updates: int = 1, peak: float = 1.0) -> list[float]:
    """Return the learning rate of every update of a run."""
    total = steps * updates
    return [schedule(peak, update=i, total=total, per_step=updates) for i in range(total)]


OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", {"adamw": AdamW, "adamw8bit": AdamW8bit, "muon": Muon})
SCHEDULES: Registry[Schedule] = Registry("schedule", {"constant": Constant, "linear": Linear, "cosine": Cosine})


@cache
def stated_learning_rate(text: str) -> float:
    """Return the learning rate in an optimiser's spec, without importing what the spec names.

    Raises:
        InputError: an optimiser of the user's own whose spec states none.

    Example:
        >>> stated_learning_rate("muon(2e-5)"), stated_learning_rate("adamw"), stated_learning_rate("my:sgd(0.1)")
        (2e-05, 1e-06, 0.1)
    """
    if not names_code(text):
        return parse_spec(text, OPTIMIZERS).learning_rate
    _, args, named = split_call(text.partition(":")[2])
    stated = named.get("learning_rate", args[0] if args else None)
    if stated is None or not _is_number(stated):
        raise InputError(f"optimizer {text}: state its learning rate, as its first argument or as learning_rate=")
    return float(stated)


def _require_rates(name: str, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> None:
    for field, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not _is_number(value) or not 0 <= value < float("inf"):
            raise InputError(f"{name} {field}={value!r}: must be a finite number >= 0")
    if not isinstance(betas, tuple) or len(betas) != 2 or not all(map(_in_unit, betas)):
        raise InputError(f"{name} betas={betas!r}: must be two numbers in [0, 1), as (0.9, 0.999)")


def _in_unit(value: object) -> bool:
    return _is_number(value) and 0 <= value < 1  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
