"""A run's configuration -> the objects that the loop works with."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo import environments
from drpo.batch import BatchConfig
from drpo.credit import CreditRule, credit_rule
from drpo.credit.overlong import Overlong
from drpo.credit.reference_kl import without_reference_kl
from drpo.environments.contract import makes_environments
from drpo.errors import InputError
from drpo.model import loading
from drpo.model.activations import checkpoint_activations
from drpo.model.critic import Critic
from drpo.model.device import choose_device
from drpo.model.master_weights import hold_in_bfloat16
from drpo.model.names import TINY
from drpo.model.nf4 import hold_base_
from drpo.model.policy import Policy
from drpo.model.precision import DTYPES, resolve_precision
from drpo.model.saving import require_savable
from drpo.model.sharding import ShardedCritic, ShardedPolicy
from drpo.objectives import reads_batch, vanishes_at_zero_advantage
from drpo.ranks import SINGLE_PROCESS, Ranks
from drpo.rewards import Reward
from drpo.rollout import (
    Engine,
    Environments,
    EpisodeDriver,
    EpisodeLimits,
    NoEngine,
    PromptLimits,
    ServerEngine,
    encode_prompt,
    encode_prompts,
    fitting,
)
from drpo.rollout.template_settings import set_template
from drpo.rollout.turn_ends import eos_ids, stop_ids
from drpo.seeds import derive
from drpo.spec import import_named
from drpo.tasks import Known, Records, Task, is_finite, sample_unseen, training_pool
from drpo.train.auxiliary import AuxiliaryLosses
from drpo.train.config import ENGINES, ModelConfig, OptimizerConfig, Run, episode_tokens
from drpo.train.critic import CriticTrainer
from drpo.train.logp_pass import LogpPass
from drpo.train.memory import StepShape, fits_with_all_activations
from drpo.train.reference import ReferenceReward
from drpo.train.routing import FirstPass
from drpo.types import Batch, Credit, Problem, ScoredGroup

log = logging.getLogger("drpo")

OPENING_TOKENS = 512
"""A guess of what an episode begins with, where an environment says it."""


@dataclass(frozen=True, eq=False)
class Components:
    """The objects that a training run works with.

    Args:
        policy: the model in training.
        optimizer: over its trainable parameters.
        driver: samples episodes with an engine, which has its own copy of the weights.
        tokenizer: the model's.
        credit: the rule that returns an advantage for every sampled token.
        batch_config: how a rollout is split into batches.
        auxiliary: losses added to the objective's, or None.
        reward: scores completions.
        held_out: the problems to evaluate on.
        ranks: the processes that train together, and this one's number.
        critic: the critic in training, or None where a prompt's samples are compared.
        reference_reward: adds the KL to a reference model to the rewards of tokens, or None.
        overlong: punishes or masks long episodes, or None.
        fits: returns True for a problem whose prompt is short enough; None if a longer one is an error.
        held_out_environments: answer the model's turns in evaluations; None where those are single turns. Those of
            training are the driver's.
        first_pass: adds the policy's own choice of experts to a rollout, or None where that is not replayed.
        logp_passes: add log-probabilities that the objective reads to a rollout: of the proximal policy, of the
            reference model.
    """

    policy: Policy
    optimizer: torch.optim.Optimizer
    driver: EpisodeDriver
    tokenizer: PreTrainedTokenizerBase
    credit: CreditRule
    batch_config: BatchConfig
    auxiliary: AuxiliaryLosses | None
    reward: Reward
    held_out: list[Problem]
    ranks: Ranks = SINGLE_PROCESS
    critic: CriticTrainer | None = None
    reference_reward: ReferenceReward | None = None
    overlong: Callable[[Sequence[ScoredGroup]], list[ScoredGroup]] | None = None
    fits: Callable[[Problem], bool] | None = None
    held_out_environments: Environments | None = None
    first_pass: FirstPass | None = None
    logp_passes: tuple[LogpPass, ...] = ()

    def credits_by_rewards(self, groups: Sequence[ScoredGroup], batches: Sequence[Batch]) -> list[Credit]:
        """Return the credit of a step's trained sequences, without what a KL in the reward alone makes of it.

        Args:
            groups: of the step, as `credit` received them.
            batches: of the step.
        """
        if self.reference_reward is None or self.critic is not None:
            return [credit for batch in batches for credit in batch.credits]
        return self.credit(without_reference_kl(groups), None)


def build(run: Run, ranks: Ranks = SINGLE_PROCESS, engine: Engine | None = None) -> Components:
    """Load the model and build what the run needs.

    Args:
        run: the configuration.
        ranks: the processes that train together.
        engine: of the same configuration, to go on with, whatever weights it has; None makes one.

    Raises:
        InputError: something in the configuration is not available.
    """
    held_out = _problems(run)
    if ranks.is_main and isinstance(run.data.task, Records | Known):
        log.info("%s: %s", run.data.task.path or type(run.data.task).__name__, run.data.task.counts)
    model, tokenizer = model_in_place(run.model, run.rollout.stop, ranks)
    servers = run.rollout.engine.split(",") if run.rollout.engine.startswith("http") else []
    ranks = replace(ranks, engines=min(len(servers), ranks.size) or None)
    limits = PromptLimits.of(model)
    fits = fitting(tokenizer, limits, run.rollout.sampling) if run.data.drop_long_prompts else None
    held_out = only_fitting(held_out, fits)
    _require_room(run, limits, tokenizer, held_out)
    engine = engine or _engine(run, model, ranks, servers)
    try:
        driver = EpisodeDriver(
            engine,
            tokenizer,
            stop_ids(model, tokenizer, run.rollout.stop),
            limits,
            environments_of(run.data.task, run),
            episode_limits(run),
        )
        components = replace(
            _around(driver, run, model, tokenizer, held_out, ranks),
            fits=fits,
            held_out_environments=environments_of(run.evaluation.task or run.data.task, run),
        )
        _set_checkpointing(run, components)
        return components
    except BaseException:
        engine.close()  # while the processes are still together
        raise


def model_in_place(
    config: ModelConfig, stop: Sequence[str], ranks: Ranks
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model as it is trained, on its device, and its tokenizer.

    Args:
        config: of the model.
        stop: see `load_model`.
        ranks: the processes that train together.

    Raises:
        InputError: as `load_model`; or the device is not there, or the model could not be saved.
    """
    device = choose_device(config.device, ranks.size)
    model, tokenizer = load_model(config, stop)
    require_savable(model, tokenizer)
    hold_base_(model, config.base_precision)
    if config.master_weights == "bf16":
        hold_in_bfloat16(model)  # before the device has to hold it, and an engine copies it
    model.to(device)
    return model, tokenizer


def load_model(config: ModelConfig, stop: Sequence[str] = ()) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, which have the configured chat template and end turns where the run does.

    Both are saved with the trained model: the template as the tokenizer's, the tokens that end a turn as the EOS ids of
    its generation defaults.

    Args:
        config: of the model.
        stop: the tokens that end a turn, as `--stop` names them; none for those of model and template.

    Raises:
        InputError: there is no such model, or it does not go with the template or the stop tokens.
    """
    name = config.name
    model, tokenizer = loading.load(name)
    set_template(tokenizer, config.chat_template or None, config.chat_template_kwargs)
    ends, known = stop_ids(model, tokenizer, stop), eos_ids(model, tokenizer)
    if not tokenizer.chat_template and name != TINY:
        log.info(
            "model=%r has no chat template: it reads the messages' texts with blank lines between, and no roles; "
            "--chat-template FILE gives it one",
            name,
        )
    if ends != known and model.generation_config is not None:
        added = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(ends))
        log.info("model=%r: a turn ends with %s; the saved model's generation_config.json says so too", name, added)
        model.generation_config.eos_token_id = sorted(ends)
    return model, tokenizer


def environments_of(task: Task, run: Run) -> Environments | None:
    """Return what answers the model's turns on a task's problems: its own environments, or the run's, or None."""
    maker = _maker_of(task, run)
    return None if maker is None else environments.make(maker, run.seed, run.rollout.environment_pool)


def _maker_of(task: Task, run: Run) -> environments.EnvironmentMaker | None:
    return task if makes_environments(task) else run.data.environment


def _set_checkpointing(run: Run, components: Components) -> None:
    """Checkpoint the activations of the policy and its critic, if the run or the free memory says so."""
    policy, critic = components.policy, None if components.critic is None else components.critic.critic
    setting = run.trainer.checkpoint_activations
    if setting == "auto":
        fits = fits_with_all_activations(
            policy, components.optimizer, components.critic, _largest_step(run, components), components.ranks
        )
        setting = "off" if fits else "on"
    if setting == "on":
        for model in (policy, critic):
            if model is not None:
                checkpoint_activations(model.model)


def _largest_step(run: Run, components: Components) -> StepShape:
    """Return the shape of a run's largest step, as far as the prompts of its first rollout show."""
    maker = _maker_of(run.data.task, run)
    if maker is not None:
        return StepShape.of(run, OPENING_TOKENS, run.rollout.max_turns or maker.max_turns)
    first = sample_unseen(run.data.task, (), run.data.prompts, 0, run.seed, components.fits)
    return StepShape.of(run, max(len(encode_prompt(components.tokenizer, problem)) for problem in first))


def episode_limits(run: Run) -> EpisodeLimits:
    """Return when a run's episodes end, whatever their environments say."""
    return EpisodeLimits(run.rollout.max_turns or None, run.rollout.max_episode_tokens or None)


def only_fitting(problems: list[Problem], fits: Callable[[Problem], bool] | None) -> list[Problem]:
    """Return the problems to evaluate on whose prompts are short enough, and log how many are not.

    Raises:
        InputError: none of them is.
    """
    kept = problems if fits is None else [p for p in problems if fits(p)]
    if len(kept) < len(problems):
        log.info(
            "%d of %d held-out problems left out: too long for the model", len(problems) - len(kept), len(problems)
        )
    if problems and not kept:
        raise InputError(f"all {len(problems)} held-out problems are too long for the model")
    return kept


def _around(
    driver: EpisodeDriver,
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: list[Problem],
    ranks: Ranks,
) -> Components:
    """Build the other components around the driver; they train the model that the engine copied."""
    reference = _reference(run, model)
    auxiliary = _auxiliary(run, reference)
    policy = make_policy(run.model, model, run.rollout.sampling.temperature, run.seed, ranks, run.trainer.shard)
    optimizer = make_optimizer(run.optimizer, policy, run.seed)
    batch_config = BatchConfig(
        updates=run.trainer.updates,
        reduction=run.objective.reduction,
        micro_batch_tokens=run.trainer.micro_batch_tokens,
        # With auxiliary losses or a critic every token has a gradient.
        skip_zero_advantage=auxiliary is None
        and run.objective.critic is None
        and not reads_batch(run.objective.loss)  # whose statistics are of all tokens
        and vanishes_at_zero_advantage(run.objective.loss),
        # A model that repeats prompts in padded rows needs micro-batches that count them repeatedly.
        share_prompts=policy.shares_prompts,
        ranks=ranks.size,
        sequence="row" if run.objective.loss.tokenwise else run.objective.sequence,
    )
    reward = run.rewards.function or run.data.task.reward
    return Components(
        policy=policy,
        optimizer=optimizer,
        driver=driver,
        tokenizer=tokenizer,
        credit=credit_rule(
            run.objective.advantage,
            run.objective.critic,
            run.objective.discount,
            run.objective.whiten,
            drop_equal=run.rollout.dynamic_sampling > 0,
        ),
        batch_config=batch_config,
        auxiliary=auxiliary,
        reward=reward,
        held_out=held_out,
        ranks=ranks,
        critic=_critic(run, ranks),
        reference_reward=_reference_reward(run, reference, ranks),
        overlong=None if run.rewards.overlong is None else partial(_ruled, run.rewards.overlong, episode_tokens(run)),
        first_pass=FirstPass(policy, run.trainer.micro_batch_tokens, ranks)
        if run.model.routing_replay == "trainer"
        else None,
        logp_passes=_logp_passes(run, policy, reference, ranks),
    )


def _logp_passes(run: Run, policy: Policy, reference: Policy | None, ranks: Ranks) -> tuple[LogpPass, ...]:
    """Return the passes that the objective needs; say what they and statistics of the batch cost."""
    if reads_batch(run.objective.loss) and ranks.is_main:
        log.info("the objective reads the whole optimiser batch: one forward pass more for every update")
    passes = []
    for column, model, reads in (
        ("proximal_logp", policy, "is held to the proximal policy"),
        ("reference_logp", reference, "reads the initial model"),
    ):
        if column in run.objective.loss.needs and model is not None:
            passes.append(LogpPass(column, model, run.trainer.micro_batch_tokens, ranks))
            if ranks.is_main:
                log.info("the objective %s: one forward pass more for every rollout", reads)
    return tuple(passes)


def _ruled(overlong: Overlong, limit: int, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    return overlong(groups, limit)


def make_optimizer(config: OptimizerConfig, policy: Policy, seed: int) -> torch.optim.Optimizer:
    """Return the policy's optimiser, with the seed of its rounding where it rounds.

    Args:
        config: of the optimiser.
        policy: whose trainable parameters it updates.
        seed: the run's.
    """
    parameters = list(policy.trainable().values())
    rounds = any(p.dtype == torch.bfloat16 for p in parameters)
    seeded = {"seed": derive("rounding", seed)} if rounds else {}
    return config.policy.build(parameters, policy.embeddings(), **seeded)


def make_policy(
    config: ModelConfig, model: PreTrainedModel, temperature: float, seed: int, ranks: Ranks, shard: str
) -> Policy:
    """Return the policy: whole on every rank, or sharded.

    Args:
        config: of the model.
        model: on its device; becomes the policy's.
        temperature: divides the logits.
        seed: of adapters.
        ranks: the processes that train together.
        shard: none or fsdp.
    """
    divided = partial(ShardedPolicy, ranks=ranks, device=model.device)
    whole = partial(Policy, master_weights=DTYPES[config.master_weights])
    make = divided if _divides(shard, ranks) else whole
    return make(
        model,
        precision=resolve_precision(config.precision, model.device),
        temperature=temperature,
        lora_rank=config.lora_rank,
        seed=seed,
        replays=config.routing_replay != "off",
    )


def _divides(shard: str, ranks: Ranks) -> bool:
    return shard == "fsdp" and ranks.size > 1


def _critic(run: Run, ranks: Ranks) -> CriticTrainer | None:
    """Return a critic that starts from the initial model, loaded again: whole on every rank, or sharded."""
    if run.objective.critic is None:
        return None
    model, _ = loading.load(run.model.name)
    model.to(choose_device(run.model.device, ranks.size))
    dtype = resolve_precision(run.model.precision, model.device).dtype
    critic = (
        ShardedCritic(model, ranks, dtype=dtype) if _divides(run.trainer.shard, ranks) else Critic(model, dtype=dtype)
    )
    optimizer = run.optimizer.critic.build(list(critic.trainable().values()), critic.embeddings())
    return CriticTrainer(
        critic,
        optimizer,
        run.objective.critic,
        learning_rate=run.optimizer.critic.learning_rate,
        max_grad_norm=run.optimizer.max_grad_norm,
        micro_batch_tokens=run.trainer.micro_batch_tokens,
        ranks=ranks,
    )


def _engine(run: Run, model: PreTrainedModel, ranks: Ranks, servers: list[str]) -> Engine:
    """Return the rollout engine with its own weights; each server belongs to one rank."""
    routes = run.model.routing_replay == "sampler"
    if servers:
        return ServerEngine(servers[ranks.rank], model, routes=routes) if ranks.rank < len(servers) else NoEngine()
    module, _, name = ENGINES[run.rollout.engine].partition(":")
    reports = {"routes": True} if routes else {}
    engine: Engine = import_named(module, name, "engine")(model, precision=run.rollout.precision, **reports)
    return engine


def _problems(run: Run) -> list[Problem]:
    """Return the held-out problems; reads all data, so that errors in it are raised before a model loads."""
    n = run.evaluation.problems
    held_out = (run.evaluation.task or run.data.task).held_out(n) if n else []
    sample_unseen(run.data.task, held_out, run.data.prompts, step=0, seed=run.seed)
    if run.data.curriculum is not None and is_finite(run.data.task):
        training_pool(run.data.task, held_out, run.data.prompts)
    return held_out


def _require_room(
    run: Run, limits: PromptLimits, tokenizer: PreTrainedTokenizerBase, held_out: Sequence[Problem]
) -> None:
    """Raise before the first step if a prompt of any step leaves no room for the answer."""
    limits.require_any(run.rollout.sampling)
    if run.data.drop_long_prompts or not limits.fixed or _maker_of(run.data.task, run) is not None:
        return
    task, n, steps = run.data.task, run.data.prompts, range(run.trainer.steps)
    drawn: Iterable[Sequence[Problem]] = (sample_unseen(task, held_out, n, step, run.seed) for step in steps)
    if run.data.curriculum is not None and is_finite(task):
        drawn = [[*training_pool(task, held_out, n).values()]]
    for problems in chain([held_out], drawn):
        encode_prompts(tokenizer, limits, problems, run.rollout.sampling)


def _reference(run: Run, model: PreTrainedModel) -> Policy | None:
    """Return the initial model, loaded again and frozen; None if unused."""
    read = "reference_logp" in run.objective.loss.needs
    if not run.objective.reference_kl and not run.objective.kl_in_reward and not read:
        return None
    frozen, _ = loading.load(run.model.name)
    hold_base_(frozen, run.model.base_precision)
    if run.model.master_weights == "bf16":
        hold_in_bfloat16(frozen)
    return Policy(
        frozen.to(model.device).requires_grad_(False),
        precision=resolve_precision(run.model.precision, model.device),
        temperature=run.rollout.sampling.temperature,
        master_weights=DTYPES[run.model.master_weights],
    )


def _auxiliary(run: Run, reference: Policy | None) -> AuxiliaryLosses | None:
    if not run.objective.reference_kl and not run.objective.entropy_bonus:
        return None
    return AuxiliaryLosses(
        reference if run.objective.reference_kl else None, run.objective.reference_kl, run.objective.entropy_bonus
    )


def _reference_reward(run: Run, reference: Policy | None, ranks: Ranks) -> ReferenceReward | None:
    if reference is None or not run.objective.kl_in_reward:
        return None
    return ReferenceReward(reference, run.objective.kl_in_reward, run.trainer.micro_batch_tokens, ranks)
