"""The model in training: float32 master weights, compute in the precision that suits the machine, one head operator."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drpo.errors import InputError
from drpo.lazily import lazily
from drpo.model.head import measure_head
from drpo.model.loading import named_tensors, persistent_buffers
from drpo.model.packed_attention import enable_packed_attention, packed, padded, predictor_states
from drpo.model.positions import sequence_limit
from drpo.model.precision import Precision
from drpo.model.quantize import fake_quantize_, stacked_experts, unrounded
from drpo.objectives import Objective
from drpo.ops import Head, PolicyLoss, SampledTokens, linear_divergence, linear_logprob, linear_policy_loss
from drpo.ranks import Ranks
from drpo.types import Layout, MicroBatch

peft = lazily("peft")


class Policy:
    """A transformers causal LM whose log-probabilities come from `linear_logprob`, at the sampling temperature.

    Args:
        model: in float32; it is trained in place (with LoRA, its adapters are added to it and it is frozen).
        precision: of matrix products and activations; the weights, their gradients and the optimiser stay float32.
        temperature: the one at which completions are sampled.
        lora_rank: 0 trains every parameter; r > 0 trains rank-r adapters of all linear layers but the head.
        seed: of the adapters' initial values.

    Attributes:
        shares_prompts: whether a group's prompt goes through the model once; False for models whose own attention is
            needed, which run each completion in a padded row.
        precision: as given.
        limit: the longest sequence that it trains on.
        max_positions: of a micro-batch that memory has room for, where that was found out; else None.

    Raises:
        InputError: the model's logits are not those of a `drpo.ops.Head`; or the precision has a grid, and the model no
            layers for it, or experts that LoRA would adapt.
    """

    def __init__(
        self, model: PreTrainedModel, *, precision: Precision, temperature: float, lora_rank: int = 0, seed: int = 0
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
        self._head_shape = measure_head(model)
        self._own_attention = model.config._attn_implementation
        self.shares_prompts = enable_packed_attention(model)
        fake_quantize_(model, precision)  # behind the checks above, which compare roundings; before adapters wrap it
        if lora_rank:
            _add_lora(model, lora_rank, seed)

    @property
    def head(self) -> Head:
        """The model's output layer, with its scale and soft cap."""
        layer = self.model.get_output_embeddings()
        return self._head_shape.of(layer.weight, getattr(layer, "bias", None))

    @property
    def equal_passes(self) -> bool:
        """True where all ranks must make as many forward and backward passes, because they meet in them."""
        return False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    def __call__(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return logp [T] and entropy [T] of a micro-batch's trained tokens, nats, float32, with gradients."""
        return linear_logprob(self._chosen(micro), self.head, micro.target, self.temperature)

    def divergence(self, micro: MicroBatch, kinds: Iterable[str]) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """Return what a call returns, and [T] of each kind: how far the policy is from the micro-batch's sampler.

        Raises:
            InputError: the sampler did not report its most probable tokens.
        """
        if micro.top_logprobs is None:
            raise InputError(
                "the sampler's most probable tokens are missing from the completions; sample with "
                "sampling.top_logprobs > 0"
            )
        chosen = self._chosen(micro)
        return linear_divergence(chosen, self.head, micro.target, micro.top_logprobs, kinds, self.temperature)

    def loss(self, micro: MicroBatch, objective: Objective) -> PolicyLoss:
        """Return the micro-batch's share of the loss, differentiable, and what was computed of its T tokens."""
        tokens = SampledTokens(
            micro.target,
            micro.behavior_logp,
            micro.advantage,
            torch.ones_like(micro.target, dtype=torch.bool),
            micro.sequence,
            micro.weight,
            micro.top_logprobs,
        )
        return linear_policy_loss(self._chosen(micro), self.head, tokens, objective, temperature=self.temperature)

    def _chosen(self, micro: MicroBatch) -> Tensor:
        """[T, H] the states that predict the trained tokens."""
        return predictor_states(self.model, micro, self.dtype, shared=self.shares_prompts, limit=self.limit)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def embeddings(self) -> list[nn.Parameter]:
        """The weights of embeddings and of the head, which are no maps between hidden states."""
        tables = [m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)]
        return [*tables, self.model.get_output_embeddings().weight]

    def reduce_gradients(self, ranks: Ranks) -> None:
        """Add up what the ranks have found; afterwards every trainable parameter has a gradient, if only of zero."""
        ranks.all_reduce_gradients(self.trainable().values())

    def checkpointed(self) -> dict[str, Tensor]:
        """What a checkpoint holds: what training changes, and the persistent buffers, by name."""
        return self.trainable() | persistent_buffers(self.model)

    def state(self) -> Mapping[str, Tensor]:
        """The parameters, float32, and persistent buffers by the plain model's names, for an engine or a file.

        With LoRA these are new tensors, base plus adapter; the base is never changed, so nothing can drift.
        """
        return dict(self._merged())

    def plain(self) -> PreTrainedModel:
        """Return a model of its own with these weights, adapters merged, that knows nothing of drpo.

        Raises:
            InputError: a model built from the configuration holds other tensors than this one.
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
        """Return the logits [N, V] of one text [N], computed as in training but in float32, on no grid; on the CPU."""
        run = packed if self.shares_prompts else padded
        with unrounded():
            hidden = run(self.model, input_ids.to(self.device), Layout((len(input_ids),), (-1,)))
        return self.head.logits(hidden).cpu()

    @torch.no_grad()
    def _merged(self) -> Iterator[tuple[str, Tensor]]:
        layers = ((_plain(n), m) for n, m in _adapted_layers(self.model))
        # A mixture's stacked experts and its router are adapted too, by wrappers that name the parameter they wrap.
        adapted: dict[str, Any] = {f"{n}.{getattr(m, 'parameter_name', 'weight')}": m for n, m in layers}
        for name, parameter in self.model.named_parameters():
            if ".lora_" in name:
                continue
            plain = _plain(name)
            if plain in adapted:
                yield plain, parameter + adapted[plain].get_delta_weight("default")
            else:
                yield plain, parameter.detach()
        for name, buffer in persistent_buffers(self.model).items():
            yield _plain(name), buffer


@torch.no_grad()
def fill(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Copy a whole state into a model.

    Args:
        model: its tensors are changed in place.
        state: every parameter, a tied one once, and every persistent buffer, by name.

    Raises:
        InputError: the model's tensors are others, or of other shapes.
    """
    own = named_tensors(model)
    if odd := sorted(own.keys() ^ state.keys()) or [n for n, t in own.items() if t.shape != state[n].shape]:
        raise InputError(
            f"model {type(model).__name__}: built from its configuration it has other tensors than the trained model "
            f"({odd[0]!r} is missing on one side, or of another shape), so its folder could not be read back"
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])


def _plain(name: str) -> str:
    """The name that a module or parameter has in the model without adapters."""
    return name.replace(".base_layer", "")


def _add_lora(model: PreTrainedModel, rank: int, seed: int) -> None:
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", bias="none")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, model)
        model.eval()
        with torch.no_grad():
            model.get_decoder()(input_ids=torch.arange(4, device=model.device)[None], use_cache=False)
        _require_weights_of_their_own(model)
    except Exception as error:  # a router that is a linear layer with two outputs, a layer that PEFT does not know
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"lora_rank={rank}: adapters cannot be put on all linear layers of {type(model).__name__} ({reason}); set "
            "lora_rank 0"
        ) from None


def _adapted_layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """PEFT's layers, by name; the library loads only where there are some."""
    if any(".lora_" in name for name, _ in model.named_parameters()):
        layer = peft.tuners.lora.LoraLayer
        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, layer))


def _require_weights_of_their_own(model: PreTrainedModel) -> None:
    """Raise where an adapted weight is another module's too: two adapters of it merge into no one weight."""
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for name, layer in _adapted_layers(model):
        if holders[id(getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight")))] > 1:
            raise InputError(f"{_plain(name)} shares its weight with another module")
