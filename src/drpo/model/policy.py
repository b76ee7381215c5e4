"""The model in training: master weights, computation in a chosen precision, log-probabilities by the head."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drpo.errors import InputError
from drpo.lazily import lazily
from drpo.model.decoder import decoder_of, freeze_unread, outside
from drpo.model.head import measure_head
from drpo.model.loading import named_tensors, persistent_buffers
from drpo.model.master_weights import computing_in_float32, hold_in_bfloat16, widen_embeddings
from drpo.model.nf4 import NF4Linear, held_layers
from drpo.model.packed_attention import (
    enable_packed_attention,
    packed,
    padded,
    padded_rows,
    predictor_states,
    require_unseen_padding,
)
from drpo.model.positions import sequence_limit
from drpo.model.precision import Precision
from drpo.model.quantize import fake_quantize_, stacked_experts, unrounded
from drpo.model.routing_replay import RoutingReplay
from drpo.objectives import Objective
from drpo.ops import Head, PolicyLoss, SampledTokens, linear_divergence, linear_logprob, linear_policy_loss
from drpo.ranks import Ranks
from drpo.types import Layout, MicroBatch

peft = lazily("peft")


class Policy:
    """A transformers causal LM with log-probabilities from `linear_logprob`, at the sampling temperature.

    Args:
        model: in float32, with LoRA also with weights held in NF4; trained in place (with LoRA, adapters are added and
            the rest is frozen).
        precision: the precision of matrix products and activations.
        temperature: the sampling temperature.
        lora_rank: 0 trains every parameter; r > 0 trains rank-r adapters of all linear layers but the head.
        seed: the seed of the adapters' initial values.
        replays: a mixture whose micro-batches say which experts to use (`MicroBatch.routes`).
        master_weights: dtype of the matrices that are held: float32 or, where the precision is bfloat16, bfloat16. With
            LoRA those of the frozen model alone.

    Attributes:
        shares_prompts: True where a group's prompt runs once; False for models without packed attention, which run each
            completion in a padded row.
        precision: as passed.
        limit: the longest sequence that can be trained on.
        max_positions: the positions of a micro-batch that fit into memory, if known from a failure; else None.

    Raises:
        InputError: the model's logits are not those of a `drpo.ops.Head`; or the precision has a grid, and the model
            has no linear layers, or has experts that LoRA would adapt; or the choice of experts cannot be replayed; or
            the model cannot hold bfloat16 weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        precision: Precision,
        temperature: float,
        lora_rank: int = 0,
        seed: int = 0,
        replays: bool = False,
        master_weights: torch.dtype = torch.float32,
    ) -> None:
        if lora_rank and precision.weights is not None and any(stacked_experts(model)):
            raise InputError(
                f"lora_rank={lora_rank}: adapters of a mixture's experts cannot be trained while the experts are on a "
                "grid of 8 bits; set lora_rank 0, or precision bf16 or fp32"
            )
        self.model = model
        self.precision = precision
        self.dtype = precision.dtype
        self.limit = sequence_limit(model)
        self.temperature = temperature
        self.max_positions: int | None = None
        if master_weights == torch.bfloat16:
            self._require_bfloat16_products()
            hold_in_bfloat16(model)
        with computing_in_float32(model):  # the checks compare roundings
            self._head_shape = measure_head(model)
            self._own_attention = model.config._attn_implementation
            self.shares_prompts = enable_packed_attention(model)
            if not self.shares_prompts:
                require_unseen_padding(model)
            freeze_unread(model)
            fake_quantize_(model, precision)  # after the checks above; before adapters wrap it
            self.replay = RoutingReplay(model) if replays else None
            if lora_rank:
                _add_lora(model, lora_rank, seed)
            if self.replay is not None:
                self.replay.check(model)
        if master_weights == torch.bfloat16:
            widen_embeddings(model)
            self._require_two_kinds()

    def _require_bfloat16_products(self) -> None:
        """Raise for weights in bfloat16 with products in another dtype."""
        if self.precision != Precision(torch.bfloat16):
            raise InputError(
                "master_weights=bf16: the trainer's products are not in bf16, which precision auto selects where the "
                "hardware has it; set --precision bf16, or --master-weights fp32"
            )

    def _require_two_kinds(self) -> None:
        """Raise for a model that does not run with matrices in bfloat16 and the rest in float32."""
        ids = torch.arange(4, device=self.device)
        run = packed if self.shares_prompts else padded
        try:
            with torch.no_grad(), torch.autocast(self.device.type, self.dtype):
                run(self.model, ids, Layout((4,), (-1,)))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"master_weights=bf16: {type(self.model).__name__} does not run with weights of two kinds ({reason}); "
                "set --master-weights fp32"
            ) from None

    @property
    def head(self) -> Head:
        """The model's output layer, with its scale and soft cap."""
        layer = self.model.get_output_embeddings()
        return self._head_shape.of(layer.weight, getattr(layer, "bias", None))

    @property
    def equal_passes(self) -> bool:
        """True if all ranks must run the same number of forward and backward passes (collectives inside)."""
        return False

    @property
    def gathered_bytes(self) -> int:
        """The most bytes of other ranks' weights and gradients that this rank holds at once."""
        return 0

    @property
    def device(self) -> torch.device:
        """The weights' device."""
        device: torch.device = self.model.device
        return device

    def __call__(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return logp [T] and entropy [T] of a micro-batch's trained tokens, nats, float32, with gradients."""
        return linear_logprob(self._chosen(micro), self.head, micro.target, self.temperature)

    def divergence(self, micro: MicroBatch, kinds: Iterable[str]) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """Return logp [T], entropy [T] and, by kind, the divergences [T] from the micro-batch's sampler.

        Raises:
            InputError: the micro-batch has no top log-probabilities.
        """
        if micro.top_logprobs is None:
            raise InputError(
                "the sampler's most probable tokens are missing from the completions; sample with "
                "sampling.top_logprobs > 0"
            )
        chosen = self._chosen(micro)
        return linear_divergence(chosen, self.head, micro.target, micro.top_logprobs, kinds, self.temperature)

    def loss(self, micro: MicroBatch, objective: Objective) -> PolicyLoss:
        """Return the micro-batch's part of the loss, differentiable, with the columns of its T tokens."""
        tokens = SampledTokens(
            micro.target,
            micro.behavior_logp,
            micro.advantage,
            torch.ones_like(micro.target, dtype=torch.bool),
            micro.sequence,
            micro.weight,
            micro.top_logprobs,
            micro.place,
            micro.proximal_logp,
            micro.score,
            micro.reference_logp,
        )
        return linear_policy_loss(self._chosen(micro), self.head, tokens, objective, temperature=self.temperature)

    def _chosen(self, micro: MicroBatch) -> Tensor:
        """Return the hidden states [T, H] that predict the trained tokens."""
        routes = None if self.replay is None else micro.routes
        if self.replay is not None and routes is not None:
            self.replay.require(routes)
        return predictor_states(
            self.model, micro, self.dtype, shared=self.shares_prompts, limit=self.limit, routes=routes
        )

    @torch.no_grad()
    def routes(self, micro: MicroBatch) -> Tensor:
        """Return the experts that a model that replays itself chooses at a micro-batch's N positions, [N, L, k]."""
        assert self.replay is not None
        with self.replay.recording() as chosen:
            predictor_states(self.model, micro, self.dtype, shared=self.shares_prompts, limit=self.limit)
            return self._by_position(chosen(), micro)

    def routing_metrics(self, micro: MicroBatch) -> dict[str, Tensor]:
        """Return `routing_replaced` [T] of the last pass, over this micro-batch; empty for a model without replay."""
        if self.replay is None:
            return {}
        if micro.routes is None:
            return {"routing_replaced": torch.zeros_like(micro.behavior_logp)}
        return {"routing_replaced": self._by_position(self.replay.differs, micro)[micro.position].float()}

    def _by_position(self, x: Tensor, micro: MicroBatch) -> Tensor:
        """Return what the layers saw, in the order of the micro-batch's N positions."""
        return x if self.shares_prompts else x[padded_rows(micro.layout)[1].to(x.device)]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def embeddings(self) -> list[nn.Parameter]:
        """Return the weights of the embeddings and of the head, which do not map hidden states to hidden states."""
        tables = [m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)]
        return [*tables, self.model.get_output_embeddings().weight]

    def reduce_gradients(self, ranks: Ranks) -> None:
        """Sum the gradients over the ranks; afterwards every trainable parameter has a gradient, possibly zero."""
        ranks.all_reduce_gradients(self.trainable().values())

    def checkpointed(self) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, by name: the trained parameters and the persistent buffers."""
        return self.trainable() | persistent_buffers(self.model)

    def state(self) -> Mapping[str, Tensor]:
        """Return the parameters and the persistent buffers by the plain model's names, for an engine or a file.

        With LoRA a weight, base plus adapter, is computed when it is read, in new memory; the base never changes, so
        nothing drifts.
        """
        adapted = {_adapted_name(name, layer): layer for name, layer in _adapted_layers(self.model)}
        held = ((f"{name}.weight", layer) for name, layer in held_layers(self.model))
        buffers = persistent_buffers(self.model).items()
        tensors: Iterable[tuple[str, Tensor | NF4Linear]] = chain(self.model.named_parameters(), held, buffers)
        plain = {_plain(name): tensor for name, tensor in tensors if ".lora_" not in name}
        return _Computed({name: partial(self._merged, t, adapted.get(name)) for name, t in plain.items()})

    def plain(self) -> PreTrainedModel:
        """Return a separate transformers model with these weights, adapters merged.

        Raises:
            InputError: a model built from the configuration has other tensors than this one.
        """
        config = copy.deepcopy(self.model.config)
        config._attn_implementation = self._own_attention
        kind: Any = type(self.model)
        plain: PreTrainedModel = kind._from_config(config, dtype=torch.float32).eval()
        fill(plain, self.state())
        plain.generation_config = self.model.generation_config
        return plain

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Return the logits [N, V] of one text [N] on the CPU, computed as in training but in float32, unrounded."""
        run = packed if self.shares_prompts else padded
        with unrounded(), computing_in_float32(self.model):
            hidden = run(self.model, input_ids.to(self.device), Layout((len(input_ids),), (-1,)))
        return self.head.logits(hidden).cpu()

    @torch.no_grad()
    def _merged(self, base: Tensor | NF4Linear, adapter: Any) -> Tensor:
        """Return a weight's values, with what an adapter adds to it where there is one."""
        weight = base.held.dense(torch.float32) if isinstance(base, NF4Linear) else self._whole(base)
        return weight if adapter is None else weight + self._delta(adapter)

    def _whole(self, parameter: Tensor) -> Tensor:
        """Return a tensor's values, detached."""
        return parameter.detach()

    def _delta(self, layer: Any) -> Tensor:
        """Return what a layer of PEFT adds to the weight that it adapts."""
        delta: Tensor = layer.get_delta_weight("default")
        return delta


@dataclass(frozen=True)
class _Computed(Mapping[str, Tensor]):
    """Tensors by name, each computed when it is read."""

    compute: Mapping[str, Callable[[], Tensor]]

    def __getitem__(self, name: str) -> Tensor:
        return self.compute[name]()

    def __contains__(self, name: object) -> bool:
        return name in self.compute

    def __iter__(self) -> Iterator[str]:
        return iter(self.compute)

    def __len__(self) -> int:
        return len(self.compute)


@torch.no_grad()
def fill(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Copy a whole state into a model.

    Args:
        model: changed in place.
        state: every parameter, a tied one once, and every persistent buffer, by name.

    Raises:
        InputError: the model's tensors have other names or shapes.
    """
    tensors = named_tensors(model)
    if odd := sorted(tensors.keys() ^ state.keys()) or [n for n, t in tensors.items() if t.shape != state[n].shape]:
        raise InputError(
            f"model {type(model).__name__}: built from its configuration it has other tensors than the trained model "
            f"({odd[0]!r} is missing on one side, or of another shape), so its folder could not be read back"
        )
    for name, tensor in tensors.items():
        tensor.copy_(state[name])


def _plain(name: str) -> str:
    """Return the name of a module or parameter in the model without adapters."""
    return name.replace(".base_layer", "")


def _adapted_name(name: str, layer: Any) -> str:
    """Return the plain model's name of the weight that a layer of PEFT adapts.

    PEFT adapts a mixture's stacked experts and its router by wrappers that name the wrapped parameter.
    """
    return f"{_plain(name)}.{getattr(layer, 'parameter_name', 'weight')}"


def _add_lora(model: PreTrainedModel, rank: int, seed: int) -> None:
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", bias="none")
    try:
        config.exclude_modules = {*outside(model), *_unlike_layers(model), *_refused_by_peft(model, config)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if ".lora_" in name and parameter.dtype == torch.bfloat16:  # PEFT gives them the frozen weight's
                parameter.data = parameter.data.float()
        model.eval()
        with torch.no_grad():
            decoder_of(model)(input_ids=torch.arange(4, device=model.device)[None], use_cache=False)
        _share_adapters(model)
    except Exception as error:  # a router that is a linear layer with two outputs, a layer that PEFT does not know
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"lora_rank={rank}: adapters cannot be put on all linear layers of {type(model).__name__} ({reason}); set "
            "lora_rank 0"
        ) from None


def _unlike_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of linear layers that an adapter cannot be put beside.

    They return more than a tensor (a router's choices), or their weight is used without calling them.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    called = dict[nn.Module, object]()
    hooks = [m.register_forward_hook(lambda m, _, out: called.update({m: out})) for m in linear.values()]
    try:
        ids = torch.arange(4, device=model.device)[None]
        states = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    used = {id(m.weight) for m in called if isinstance(m, nn.Linear)}  # by the module itself, or one that shares it
    silent = {name: m.weight for name, m in linear.items() if id(m.weight) not in used and m.weight.requires_grad}
    odd = [name for name, m in linear.items() if not isinstance(called.get(m, states), Tensor)]
    if not silent or not states.requires_grad:
        return odd
    gradients = torch.autograd.grad(states.sum(), list(silent.values()), allow_unused=True)  # None: not used at all
    return odd + [name for name, gradient in zip(silent, gradients, strict=True) if gradient is not None]


def _refused_by_peft(model: PreTrainedModel, config: Any) -> list[str]:
    """Return the last names of layers that PEFT refuses to adapt: Mamba's kernels read their weights."""
    refused = []
    for name in {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}:
        try:
            peft.tuners.tuners_utils._check_lora_target_modules_mamba(config, model, name)
        except ValueError:
            refused.append(name)
    return refused


def _adapted_layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Yield PEFT's layers, by name; PEFT loads only where there are any."""
    if any(".lora_" in name for name, _ in model.named_parameters()):
        layer = peft.tuners.lora.LoraLayer
        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, layer))


def _share_adapters(model: PreTrainedModel) -> None:
    """Give the layers that share a weight (Zamba's repeated blocks) one adapter, which can be merged into that weight.

    Raises:
        InputError: an adapted weight belongs to a module without an adapter too.
    """
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    adapted: dict[int, list[tuple[str, Any]]] = {}
    for name, layer in _adapted_layers(model):
        weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
        adapted.setdefault(id(weight), []).append((name, layer))
    for weight, ((name, first), *others) in adapted.items():
        if holders[weight] > 1 + len(others):
            raise InputError(f"{_plain(name)} shares its weight with another module")
        for _, layer in others:
            layer.lora_A, layer.lora_B = first.lora_A, first.lora_B
