"""The whole configuration of a run: one frozen record of groups, and what follows from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from drpo.credit import advantages
from drpo.credit.overlong import Shaped
from drpo.environments.contract import makes_environments
from drpo.errors import InputError, counted
from drpo.objectives import DEFAULT_K, needed_divergence
from drpo.spec import Unimported
from drpo.train.best_of import BestOf
from drpo.train.config.checks import require
from drpo.train.config.groups import (
    CRITIC_OPTIMIZER,
    MOST_COMPLETIONS,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    FaultConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RewardsConfig,
    RolloutConfig,
    TrainerConfig,
)
from drpo.train.fields import path_of

Record = TypeVar("Record")


@dataclass(frozen=True)
class Run:
    """Everything that determines a run. Every field has a default; `configure` changes some.

    One step is one rollout: `data.prompts` problems, `rollout.sampling.samples` completions of each,
    `trainer.updates` optimiser updates.

    Args:
        name: the run's folder is runs/NAME unless --out says otherwise.
        model: what is trained.
        data: the problems.
        rollout: how completions are sampled.
        rewards: what scores them.
        objective: what training maximises.
        optimizer: how weights take their steps.
        trainer: how long, and how the work is divided.
        evaluation: when, and on what.
        checkpoints: when, and which are kept.
        faults: what a run bears.
        seed: of everything random.
        warm_up: before RL, fine-tune on the model's own right answers: best_of(8), of 8 to each training problem; with
            right=1.0 the least reward of one, problems=0 how many (all), answers=4 of each at most, epochs=2.0,
            batch=16, learning_rate=2e-5; None begins with RL.

    Raises:
        InputError: values of several groups that do not go together; the message names the fields.

    Example:
        >>> run = Run(trainer=TrainerConfig(steps=4), evaluation=EvaluationConfig(every=2))
        >>> run.trainer.steps, run.evaluation.every, run.data.prompts
        (4, 2, 8)
    """

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    seed: int = 0
    warm_up: BestOf | None = None

    def __post_init__(self) -> None:
        is_folder = self.name not in ("", ".", "..") and "/" not in self.name
        require(
            is_folder, "name", repr(self.name), "names a folder in runs/, so it has no /; --out names another place"
        )
        sampling, trainer, prompts = self.rollout.sampling, self.trainer, self.data.prompts
        sampling.require_trainable(least=2 if self.objective.critic is None else 1)
        if needed_divergence(self.objective.loss.needs) is not None and sampling.top_logprobs == 0:
            rollout = replace(self.rollout, sampling=replace(sampling, top_logprobs=DEFAULT_K))
            object.__setattr__(self, "rollout", rollout)
        fits = self.warm_up is None or isinstance(self.warm_up, BestOf | Unimported)
        require(fits, "warm_up", self.warm_up, "must be None or BestOf(...), --warm-up 'best_of(8)'")
        self._require_turns()
        self._require_overlong()
        self._require_replay()
        self._require_comparison()
        rule = f"with sampling.samples={sampling.samples} a step has more than {MOST_COMPLETIONS:,} completions"
        require(prompts * sampling.samples <= MOST_COMPLETIONS, "prompts", prompts, rule)
        require(trainer.updates <= prompts, "updates", trainer.updates, f"at most prompts={prompts}")
        optimizer = self.optimizer.critic
        read = self.objective.critic is not None or optimizer == CRITIC_OPTIMIZER or isinstance(optimizer, Unimported)
        require(
            read, "critic_optimizer", optimizer, "there is no critic; set --critic 'gae(1.0, 0.95)' or leave it out"
        )
        whole, base = trainer.shard == "none", self.model.base_precision
        rule = "weights in 4 bits are not divided; set --shard none, or leave --base-precision out"
        require(whole or base == "fp32", "base_precision", base, rule)
        rule = "it requires whole matrices; set --shard none, or use adamw"
        for name, optimizer in (("optimizer", self.optimizer.policy), ("critic_optimizer", self.optimizer.critic)):
            divisible = not getattr(optimizer, "whole_matrices", False)
            require(whole or divisible, name, type(optimizer).__name__.lower(), rule)
        self._require_rounding()

    def _require_comparison(self) -> None:
        """Raise where groups of equal rewards would be sampled again though training learns from them."""
        again, objective = self.rollout.dynamic_sampling, self.objective
        source = "--advantage reward" if objective.advantage is advantages.reward else ""
        source = source if objective.critic is None else "a critic"
        rule = f"{source} learns from equal rewards too; leave one of the two out"
        require(not (again and source), "dynamic_sampling", again, rule)

    def _require_rounding(self) -> None:
        """Raise for bfloat16 weights that cannot be divided, or whose optimiser would lose small steps."""
        if self.model.master_weights == "fp32":
            return
        whole, rule = self.trainer.shard == "none", "weights of two kinds are not divided; set --shard none"
        require(whole, "master_weights", self.model.master_weights, rule)
        optimizer: object = self.optimizer.policy
        rounds = getattr(optimizer, "rounds_stochastically", isinstance(optimizer, Unimported))
        rounds = rounds or self.model.lora_rank > 0  # adapters are float32
        rule = "it would lose small steps of bf16 weights; use adamw or adamw8bit, or set --master-weights fp32"
        require(rounds, "optimizer", type(optimizer).__name__.lower(), rule)

    def _require_replay(self) -> None:
        """Raise for a replay of experts that would change nothing."""
        replay = self.model.routing_replay
        rule = "with updates=1 each pass is the first; set --updates 2 or more, --routing-replay sampler, or off"
        require(replay != "trainer" or self.trainer.updates > 1, "routing_replay", replay, rule)

    def _require_overlong(self) -> None:
        """Raise for a punishment of length that cannot be measured, or that the advantage refuses."""
        overlong = self.rewards.overlong
        if not isinstance(overlong, Shaped):
            return
        known = not any(isinstance(part, Unimported) for part in (self.data.task, self.data.environment))
        cache, most = overlong.cache or 0, episode_tokens(self)
        rule = f"a completion has at most {most} tokens; --overlong shaped takes the last fifth of them"
        require(cache <= most or not known, "overlong", f"shaped({cache})", rule)
        fits = self.objective.critic is not None or self.objective.advantage is not advantages.maxrl
        require(fits, "overlong", "shaped", "with it rewards may be negative, which maxrl refuses")

    def _require_turns(self) -> None:
        """Raise for limits of turns where nothing answers a turn."""
        tasks = [task for task in (self.data.task, self.evaluation.task) if task is not None]
        answered = self.data.environment is not None or any(
            isinstance(task, Unimported) or makes_environments(task) for task in tasks
        )
        for name in ("max_turns", "max_episode_tokens"):
            value = getattr(self.rollout, name)
            rule = "an episode of this task is a single turn; leave it out, or set --environment"
            require(answered or not value, name, value, rule)


def episode_tokens(run: Run) -> int:
    """Return the most tokens that the model can sample in an episode of a run's task.

    Example:
        >>> from drpo.recipes.agents import calculator
        >>> episode_tokens(configure(Run(), **{"sampling.max_new_tokens": 32})), episode_tokens(calculator())
        (32, 72)
    """
    rollout, task = run.rollout, run.data.task
    maker = task if makes_environments(task) else run.data.environment
    turns = 1 if maker is None else rollout.max_turns or getattr(maker, "max_turns", 1)
    tokens = turns * rollout.sampling.max_new_tokens
    return min(tokens, rollout.max_episode_tokens or tokens)


def configure(run: Run, **changes: Any) -> Run:
    """Return a run with some of its fields changed, each by the name of its option on the command line.

    Args:
        run: stays as it is.
        changes: `eval_every=2` is --eval-every 2. The records `sampling` and `reward_pool` may be given whole, a field
            of them as `**{"sampling.samples": 4}`; `learning_rate` replaces that of the optimiser.

    Raises:
        InputError: no field of this name (the nearest one is named), or a value that it refuses.

    Example:
        >>> from drpo.train.optim import Muon
        >>> run = configure(Run(), steps=4, eval_every=2, optimizer=Muon(momentum=0.9), learning_rate=2e-5)
        >>> run.trainer.steps, run.evaluation.every
        (4, 2)
        >>> run.optimizer.policy
        Muon(learning_rate=2e-05, momentum=0.9, weight_decay=0.01, betas=(0.9, 0.999))
        >>> configure(run, step=4)
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: a run has no field 'step'; did you mean 'steps'?
    """
    for name, value in changes.items():
        if isinstance(value, str) and not isinstance(value_of(run, name), str):
            built = f"drpo.train.config.read_value({name!r}, {value!r})"
            raise InputError(f"{name}={value!r} is text: build what it means with {built}")
    return _changed(run, {path_of(name): value for name, value in changes.items()})


def value_of(run: Run, name: str) -> Any:
    """Return the value of an option's field; None where the run has no such field."""
    value: Any = run
    for part in path_of(name).split("."):
        value = getattr(value, part, None)
    return value


def _changed(record: Record, changes: Mapping[str, Any]) -> Record:
    """The record with other values at some paths."""
    values = {path: value for path, value in changes.items() if "." not in path}
    inner: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if rest:
            inner.setdefault(name, {})[rest] = value
    for name, of_it in inner.items():
        values[name] = _changed(values.get(name, getattr(record, name)), of_it)
    anything: Any = record
    try:
        changed: Record = replace(anything, **values)
    except (TypeError, AttributeError) as error:  # a check's, which expects the field's own type
        given = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise InputError(f"{given}: {type(record).__name__} does not take it ({error})") from None
    return changed


def learning_rate(run: Run, step: int, update: int) -> float:
    """Return the learning rate of a step's update, both counted from 0; 0 while only the critic learns."""
    critic, updates = run.objective.critic, run.trainer.updates
    if critic is not None and step < critic.warmup:
        return 0.0
    at, total = step * updates + update, run.trainer.steps * updates
    return run.optimizer.schedule(run.optimizer.policy.learning_rate, update=at, total=total, per_step=updates)


def trains_little(run: Run) -> str | None:
    """Say in a line that a run's learning rates leave the policy as it is, or never reach their peak; None if neither.

    Example:
        >>> trains_little(configure(Run(), learning_rate=0.0))
        'learning_rate=0: the policy will not change; its critic and its gradients are as they would be'
        >>> from drpo.train.optim import Linear
        >>> trains_little(configure(Run(), schedule=Linear(warmup=40)))
        'warmup=40 is longer than steps=20: the learning rate ends at 50% of its peak'
    """
    steps, critic, warmup = run.trainer.steps, run.objective.critic, run.optimizer.schedule.warmup
    if run.optimizer.policy.learning_rate == 0:
        return "learning_rate=0: the policy will not change; its critic and its gradients are as they would be"
    if critic is not None and critic.warmup >= steps:
        return f"critic warmup={critic.warmup} lasts for all steps={steps}: only the critic will learn"
    if warmup > steps:
        end = f"the learning rate ends at {100 * steps / warmup:.3g}% of its peak"
        return f"warmup={warmup} is longer than steps={steps}: {end}"
    return None


def arithmetic(run: Run) -> str:
    """Say what a step consists of, in one line.

    Example:
        >>> arithmetic(configure(Run(), prompts=8, updates=2))
        '8 prompts x 8 samples = 64 completions a step, 2 updates of 32 completions each, 20 steps'
    """
    prompts, samples, updates = run.data.prompts, run.rollout.sampling.samples, run.trainer.updates
    n = prompts * samples
    each = "1 update" if updates == 1 else f"{updates} updates of {counted(n // updates, 'completion')} each"
    product = f"{counted(prompts, 'prompt')} x {counted(samples, 'sample')} = {counted(n, 'completion')}"
    return f"{product} a step, {each}, {counted(run.trainer.steps, 'step')}"
