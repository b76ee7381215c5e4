"""The memory that the largest step of a run needs, and whether activations must be computed again for it to fit."""

import logging
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import psutil
import torch

from drpo.batch import pack
from drpo.errors import is_out_of_memory
from drpo.model.activations import count_activations, decoder_layers, is_checkpointed
from drpo.model.critic import Critic
from drpo.model.nf4 import held_layers
from drpo.model.policy import Policy
from drpo.ops.chunk_logits import CHUNK_BYTES
from drpo.ranks import Ranks
from drpo.train.compact_adamw import local_bytes
from drpo.train.config import Run
from drpo.train.critic import CriticTrainer
from drpo.train.optim import state_bytes
from drpo.types import Generation, MicroBatch, TokenSequence

log = logging.getLogger("drpo")

SHARE = 0.9
"""The share of the free memory that a step may take."""


@dataclass(frozen=True)
class StepShape:
    """The largest step that a run may take: every completion as long as allowed.

    Args:
        prompt_tokens: of the longest prompt.
        new_tokens: most tokens of a completion.
        prompts: problems of a rollout.
        samples: completions of each.
        updates: optimiser updates of a rollout.
        micro_batch_tokens: most positions of a micro-batch; a single completion may exceed it.
    """

    prompt_tokens: int
    new_tokens: int
    prompts: int
    samples: int
    updates: int = 1
    micro_batch_tokens: int = 4096

    @staticmethod
    def of(run: Run, prompt_tokens: int, turns: int = 1) -> "StepShape":
        """Return the shape of a run's largest step.

        Args:
            run: the run.
            prompt_tokens: of the longest prompt.
            turns: most turns of an episode; what is heard between them is not counted.
        """
        sampling, trainer = run.rollout.sampling, run.trainer
        new = turns * sampling.max_new_tokens
        return StepShape(
            prompt_tokens=prompt_tokens,
            new_tokens=min(new, run.rollout.max_episode_tokens or new),
            prompts=run.data.prompts,
            samples=sampling.samples,
            updates=trainer.updates,
            micro_batch_tokens=trainer.micro_batch_tokens,
        )

    @property
    def rows(self) -> int:
        """Completions of a rollout."""
        return self.prompts * self.samples

    @property
    def row_tokens(self) -> int:
        """The longest prompt and completion."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class StepMemory:
    """The bytes that a step needs beyond the weights, by purpose.

    Args:
        positions: of the largest micro-batch.
        gathered: weights and gradients of other ranks that this one holds for a while.
        dense: the largest frozen weight that is held in NF4, as numbers for a product.
        optimiser: the policy's gradient and the optimiser's moments.
        critic: the same of a critic.
        activations: of the largest micro-batch, with the gradients within a layer.
        head: the gradients of hidden states and of the head's weight; and logits, as far as they exceed the gradients
            within a layer, which come when they are gone.
        cache: keys and values of a rollout, which is over before the update.
    """

    positions: int
    gathered: int
    dense: int
    optimiser: int
    critic: int
    activations: int
    head: int
    cache: int

    @property
    def total(self) -> int:
        """The most that is needed at once."""
        return self.optimiser + self.critic + max(self.gathered + self.dense + self.activations + self.head, self.cache)


def estimate_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    shape: StepShape,
    critic: CriticTrainer | None = None,
    *,
    checkpointed: bool | None = None,
) -> StepMemory:
    """Return what the largest step needs; runs two layers of the policy on its largest micro-batch, forward.

    Args:
        policy: the model in training, before its first step.
        optimizer: of its trainable parameters.
        shape: of the step.
        critic: the critic with its optimiser, or None. It runs after the policy, and keeps no more than the policy.
        checkpointed: whether layers keep their inputs alone; None is as the policy is.
    """
    micro = largest_micro_batch(shape, policy)
    few = largest_micro_batch(StepShape(4, 4, prompts=1, samples=2), policy)
    again = is_checkpointed(policy.model) if checkpointed is None else checkpointed
    activations = count_activations(policy, micro, few)
    return StepMemory(
        positions=len(micro.input_ids),
        gathered=policy.gathered_bytes,
        dense=max((layer.dense_bytes(policy.dtype) for _, layer in held_layers(policy.model)), default=0),
        optimiser=_optimiser_bytes(policy, optimizer),
        critic=0 if critic is None else _optimiser_bytes(critic.critic, critic.optimizer),
        activations=activations.peak(again),
        head=_head_bytes(policy, micro, activations.gradients),
        cache=shape.rows * shape.row_tokens * cache_bytes(policy),
    )


def largest_micro_batch(shape: StepShape, model: Policy | Critic) -> MicroBatch:
    """Return the largest micro-batch of a step of this shape, of made-up tokens, on the model's device."""
    new = torch.zeros(shape.new_tokens, dtype=torch.int64)
    answer = Generation(new, new.float(), "length", version=0)
    rows: list[TokenSequence] = []
    positions = 0
    for number, sample in product(range(math.ceil(shape.prompts / shape.updates)), range(shape.samples)):
        repeated = sample > 0 and model.shares_prompts
        cost = shape.new_tokens + (0 if repeated else shape.prompt_tokens)
        if rows and positions + cost > shape.micro_batch_tokens:
            break
        rows.append(TokenSequence.of(torch.full((shape.prompt_tokens,), number % 2**7), answer))
        positions += cost
    (micro,) = pack(rows, max(positions, shape.micro_batch_tokens), model.shares_prompts).micro_batches
    return micro.to(model.device)


def fits_with_all_activations(
    policy: Policy, optimizer: torch.optim.Optimizer, critic: CriticTrainer | None, shape: StepShape, ranks: Ranks
) -> bool:
    """Return whether the largest step fits into the free memory of every rank if nothing is computed again; log it.

    Args:
        policy, optimizer, critic: in training, before their first step.
        shape: of the largest step.
        ranks: the processes that train together; all return the same.
    """
    if not decoder_layers(policy.model):
        return True  # nothing can be computed again
    most = float(_optimiser_bytes(policy, optimizer))
    most += 0 if critic is None else _optimiser_bytes(critic.critic, critic.optimizer)
    most += policy.gathered_bytes + _most_activations(policy, shape)
    if not ranks.all_reduce_max(most > SHARE * free_bytes(policy.device)):
        return True
    excess = [text for text in ranks.gather([_excess(policy, optimizer, critic, shape)]) if text]
    if excess:
        log.info("checkpoint_activations=on, since %s; updates take up to a third longer", excess[0])
    else:
        log.info("checkpoint_activations=off, since the largest step fits into the free memory")
    return not excess


def _excess(policy: Policy, optimizer: torch.optim.Optimizer, critic: CriticTrainer | None, shape: StepShape) -> str:
    """Return by what the largest step exceeds the free memory if all activations are kept; empty if it fits."""
    free = free_bytes(policy.device)
    try:
        need = estimate_step(policy, optimizer, shape, critic, checkpointed=False)
    except Exception as error:
        if policy.equal_passes or not is_out_of_memory(error):  # the other ranks wait in the pass
            raise
        return f"two layers of the largest step need more than the {free / 2**30:.1f} GiB that are free"
    if need.total <= SHARE * free:
        return ""
    needs, positions = need.total / 2**30, need.positions
    return f"a step that keeps all of {positions} positions needs {needs:.1f} GiB, and {free / 2**30:.1f} are free"


def _most_activations(policy: Policy, shape: StepShape) -> float:
    """Return an upper bound, without running anything: inputs and outputs of all products, and scores, four times.

    Recurrent layers keep states, which it does not count; models that are not packed have no bound.
    """
    if not policy.shares_prompts:
        return math.inf
    layers = decoder_layers(policy.model)
    widths = sum(sum(p.shape[-2:]) * p.shape[:-2].numel() for x in layers for p in x.parameters() if p.ndim > 1)
    heads = getattr(policy.model.config.get_text_config(), "num_attention_heads", 0)
    positions = max(shape.row_tokens, min(shape.micro_batch_tokens, shape.rows * shape.row_tokens))
    copies = 8 * sum(p.numel() for p in policy.model.parameters())
    return int(4 * 4 * positions * (widths + len(layers) * heads * shape.row_tokens) + copies)


def _optimiser_bytes(model: Policy | Critic, optimizer: torch.optim.Optimizer) -> int:
    """Return this rank's bytes of the gradient and the optimiser's moments."""
    return sum(map(local_bytes, model.trainable().values())) + state_bytes(optimizer)


def _head_bytes(policy: Policy, micro: MicroBatch, later: int) -> int:
    """Return the head's bytes beyond those that take the place of its logits later; see `StepMemory`."""
    weight = policy.model.get_output_embeddings().weight
    vocab_size, width = weight.shape
    tokens = len(micro.input_ids)
    chunk = min(CHUNK_BYTES.get(policy.device.type, 2**30), 4 * tokens * vocab_size)
    rounded = 0 if weight.dtype == policy.dtype else policy.dtype.itemsize  # a copy in the dtype of the product
    held = rounded + (4 if weight.requires_grad else 0)
    return int(max(0, chunk - later) + 8 * tokens * width + held * vocab_size * width)


def cache_bytes(policy: Policy) -> int:
    """Return the bytes of one token's keys and values in the sampler."""
    config = policy.model.config.get_text_config()
    queries = getattr(config, "num_attention_heads", 0)  # a recurrent model may have none
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, queries)
    return int(2 * config.num_hidden_layers * heads * width * 2)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    available = int(psutil.virtual_memory().available)
    limit = _cgroup_limit()
    return available if limit is None else min(available, limit - psutil.Process().memory_info().rss)


def _cgroup_limit() -> int | None:
    """Return the container's memory limit in bytes, or None."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
