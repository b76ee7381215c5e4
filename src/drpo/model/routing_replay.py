"""Routing replay: a mixture's routers choose the experts that they are told, and weigh them by their own scores.

A router ranks its E experts by scores, takes the k best (`topk`), and makes their weights of what it knows of those k.
Replay changes what `topk` returns, in that one call: the experts that are told, with their scores. All that follows is
the family's own code, so weights and gradients are the trainer's, whatever a family does with biases and softmax:

    told I = {i_1, ..., i_k}:    values = scores[I],    indices = I,    instead of    topk(scores, k)

Where a router first takes the best groups of experts, the groups of I are among those it takes.

Source: Ma et al. 2025, "Stabilizing MoE reinforcement learning by aligning training and inference routers" (rollout
routing replay, R3; arXiv:2510.11370); Zheng et al. 2025, "Group sequence policy optimization" (routing replay of the
trainer's own choices; arXiv:2507.18071).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from drpo.errors import InputError
from drpo.model.decoder import decoder_of
from drpo.model.routing import RouteRecorder, handed_choice
from drpo.types.routes import missing

TOPK = (torch.topk, torch.Tensor.topk)

PROBE = 8
"""Tokens of the self-check."""


@dataclass(frozen=True, eq=False)
class Router:
    """What chooses the experts of one layer.

    Args:
        module: in whose forward pass they are chosen.
        call: number, among the calls of `topk` in it, of the one that chooses them.
        groups: number of the call that chooses groups of experts before, or None.
        n_experts: E.
    """

    module: nn.Module
    call: int
    groups: int | None
    n_experts: int


class RoutingReplay:
    """Replays the choice of experts in a model's forward passes, one after the other.

    The decoder takes a further argument, `routes`, [n, L, k] for its n positions, in the order in which its layers read
    them. They hold until the next forward pass, so a layer that is computed once more in the backward pass, to save
    memory, is told the same.

    Args:
        model: changed in place: its routers listen; without `routes` they choose as before, bit for bit.

    Attributes:
        differs: [n] bool; of the last pass that was told, where a router would itself have chosen other experts in at
            least one layer; positions without a choice are False.

    Raises:
        InputError: the model has no experts, or its routers' choice cannot be replayed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._name = type(model).__name__
        self._routes: Tensor | None = None
        self._modes: list[Any] = []  # torch's modes are not typed
        self.differs = torch.empty(0, dtype=torch.bool)
        self._recorder = RouteRecorder(model)
        try:
            self._routers = _routers(model, self._recorder)
        except Exception as error:
            raise self._refused(_reason(error)) from None
        decoder_of(model).register_forward_pre_hook(self._begin, with_kwargs=True)
        for layer, router in enumerate(self._routers):
            router.module.register_forward_pre_hook(partial(self._enter, layer, router))
            router.module.register_forward_hook(self._leave, always_call=True)

    @property
    def shape(self) -> tuple[int, int]:
        """L and k."""
        return self._recorder.shape

    def require(self, routes: Tensor) -> None:
        """Raise unless routes are those of such a model.

        Raises:
            InputError: another number of layers, or of experts to a token.
        """
        if tuple(routes.shape[1:]) != self.shape:
            layers, k = self.shape
            raise InputError(
                f"routing_replay: the sampler reports {routes.shape[1]} layers with {routes.shape[2]} experts to a "
                f"token, the model in training has {layers} with {k}; set --routing-replay off"
            )

    @contextmanager
    def recording(self) -> Iterator[Callable[[], Tensor]]:
        """Note what the routers choose; yields a function that returns it for the last pass, [n, L, k]."""
        with self._recorder.listening():
            yield lambda: self._recorder.take(1)[0]

    @torch.no_grad()
    def check(self, model: PreTrainedModel) -> None:
        """Raise unless replay does what it says with a few tokens.

        Told its own choices, the model must return the same states, bit for bit. Told those of other tokens, its
        experts must be handed these, each with a weight that is not 0.

        Args:
            model: as it is trained, with its adapters.

        Raises:
            InputError: it does not.
        """
        ids = _probe(model)
        try:
            with self.recording() as chosen:
                states, own = _states(model, ids), chosen()
                same, again = _states(model, ids, own), chosen()
                other = own.roll(1, 0)
                with _weights(self._recorder.experts) as weights:
                    _states(model, ids, other)
                handed = chosen()
        except Exception as error:
            raise self._refused(_reason(error)) from None
        fine = torch.equal(states, same) and torch.equal(own, again) and torch.equal(other, handed)
        if not fine or not all(bool((w != 0).all() and w.isfinite().all()) for w in weights):
            raise self._refused("told which experts to use, its layers do not use them")

    def _refused(self, reason: str) -> InputError:
        return InputError(
            f"routing_replay: the choice of experts of {self._name} cannot be replayed ({reason}); set "
            "--routing-replay off"
        )

    def _begin(
        self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take the argument `routes` of the decoder, which knows of none."""
        self._routes = named.pop("routes", None)
        if self._routes is not None:
            self.differs = torch.zeros(len(self._routes), dtype=torch.bool, device=self._routes.device)
        return arguments, named

    def _enter(self, layer: int, router: Router, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._routes is not None:
            self._modes.append(_Told(router, self._routes[:, layer], self.differs))
            self._modes[-1].__enter__()

    def _leave(self, module: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
        if self._routes is not None:
            self._modes.pop().__exit__(None, None, None)


class _Told(TorchFunctionMode):
    """While it is entered, a router's `topk` returns the experts that it is told.

    Args:
        router: which of the calls chooses.
        routes: [n, k]; see `Routes`.
        differs: [n] bool; set where the router itself chose others.
    """

    def __init__(self, router: Router, routes: Tensor, differs: Tensor) -> None:
        super().__init__()
        self._router, self._differs, self._calls = router, differs, 0
        self._known = (routes != missing(routes.dtype)).all(1, keepdim=True)
        self._told = routes.long()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in TOPK:
            return result
        call, self._calls = self._calls, self._calls + 1
        if call not in (self._router.call, self._router.groups):
            return result
        scores, own = _scores(args, kwargs), result.indices
        if call == self._router.groups:
            indices = torch.where(self._known, self._groups(scores, own.shape[1]), own)
        else:
            indices = torch.where(self._known, self._told, own)
            self._differs |= (indices.sort(-1).values != own.sort(-1).values).any(-1)
        return torch.return_types.topk((scores.gather(-1, indices), indices))

    def _groups(self, scores: Tensor, n: int) -> Tensor:
        """Return the n best of a router's groups, first of all those of the experts that it is told."""
        size = self._router.n_experts // scores.shape[-1]
        of_told = torch.where(self._known, self._told, 0) // size
        return scores.scatter(-1, of_told, torch.inf).topk(n, -1).indices


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of `topk`: the module in whose forward pass it is made, what it was given, and what it returns.

    Args:
        before: the calls in the same forward pass of that module before it.
    """

    module: nn.Module
    scores: Tensor
    indices: Tensor
    before: tuple["_Call", ...]


class _Listen(TorchFunctionMode):
    """Notes the calls of `topk`; `inside` holds the modules whose forward pass is under way, with their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[tuple[nn.Module, list[_Call]]] = []
        self.calls: list[_Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in TOPK and self.inside:
            module, calls = self.inside[-1]
            self.calls.append(_Call(module, _scores(args, kwargs), result.indices, tuple(calls)))
            for _, of_module in self.inside:
                of_module.append(self.calls[-1])
        return result


def _scores(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Tensor:
    """Return what `topk` ranks."""
    scores: Tensor = args[0] if args else (kwargs or {})["input"]
    return scores


def _routers(model: PreTrainedModel, recorder: RouteRecorder) -> list[Router]:
    """Return the router of each layer with experts: where `topk` returns what the experts are handed."""
    listen, hooks = _Listen(), []
    for module in decoder_of(model).modules():
        hooks.append(module.register_forward_pre_hook(lambda m, _: listen.inside.append((m, []))))
        hooks.append(module.register_forward_hook(lambda *_: _drop_last(listen.inside), always_call=True))
    try:
        with recorder.listening(), listen:
            _states(model, _probe(model))
            chosen = recorder.take(1)[0].long()
    finally:
        for hook in hooks:
            hook.remove()
    calls = iter(listen.calls)  # in the order of the layers, so that two that choose alike are not confused
    routers = [_router(calls, chosen[:, layer]) for layer in range(chosen.shape[1])]
    found = [router for router in routers if router is not None]
    if len(found) < len(routers):
        raise InputError("its routers take their experts otherwise than by torch.topk")
    return found


def _drop_last(inside: list[Any]) -> None:
    inside.pop()


def _router(calls: Iterator[_Call], chosen: Tensor) -> Router | None:
    """Return the router that makes the next of the calls that returns what was chosen; None if there is none."""
    for call in calls:
        if torch.equal(call.indices, chosen):
            n = call.scores.shape[-1]
            groups = [i for i, b in enumerate(call.before) if b.scores.ndim == 2 and _divides(b.scores.shape[-1], n)]
            return Router(call.module, len(call.before), groups[-1] if groups else None, n)
    return None


def _divides(n_groups: int, n_experts: int) -> bool:
    return n_groups < n_experts and n_experts % n_groups == 0


def _probe(model: PreTrainedModel) -> Tensor:
    """Return the ids of a few tokens, [PROBE]."""
    ids = 1 + 7 * torch.arange(PROBE, device=model.device)
    return ids % int(model.config.get_text_config().vocab_size)


@torch.no_grad()
def _states(model: PreTrainedModel, ids: Tensor, routes: Tensor | None = None) -> Tensor:
    """Return the last hidden states of a text [n]."""
    told = {} if routes is None else {"routes": routes}
    states: Tensor = decoder_of(model)(input_ids=ids[None], use_cache=False, **told).last_hidden_state
    return states


@contextmanager
def _weights(experts: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Note the weights [n, k] that experts are handed beside their choice [n, k]."""
    seen: list[Tensor] = []

    def note(module: nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
        choice = handed_choice(arguments, named)
        tensors = [x for x in (*arguments, *named.values()) if isinstance(x, Tensor)]
        seen.extend(x for x in tensors if choice is not None and x.is_floating_point() and x.shape == choice.shape)

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in experts]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
