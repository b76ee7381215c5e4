"""The whole configuration of a run: one frozen record, its checks, and how it is written down and read back."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

import msgspec

from drpo import objectives, reductions, rewards, tasks
from drpo.credentials import AUTH, without_password
from drpo.credit import advantages, gae
from drpo.credit.advantages import Advantage
from drpo.credit.gae import GAE
from drpo.errors import InputError, nearest
from drpo.model.names import SMOLLM2
from drpo.model.precision import NAMES as PRECISIONS
from drpo.objectives import DEFAULT_K, DRPO, Objective, needed_divergence
from drpo.reductions import Horizon, Reduction
from drpo.rewards import Reward, RewardConfig
from drpo.spec import Registry, Unimported, format_spec, names_code, parse_spec
from drpo.tasks import Addition, Task
from drpo.train import optim
from drpo.train.optim import AdamW, Constant, Muon, Optimizer, Schedule
from drpo.train.records import CONFIG, read_config
from drpo.types import Sampling

ENGINES = ("transformers", "vllm", "http://HOST:PORT")
MOST_COMPLETIONS = 2**20
"""Of a step, and of an evaluation: more is a slip of the keyboard, and would fill the memory before it is noticed."""
MOST_RANK, MOST_PROCESSES = 2**14, 2**10
"""Of adapters, and of processes that score: likewise."""
OFF = "inf"
"""In place of an infinite max_grad_norm, which JSON has no number for."""
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Run:
    """Everything that determines a run. Objects are written as specs, as on the command line: drpo(0.2), mean.

    One step is one rollout: `prompts` problems, `sampling.samples` completions of each, `updates` optimiser updates.

    Args:
        name: the run's folder is runs/NAME unless --out says otherwise.
        model: smollm2-135m, tiny, a folder, or a hub id.
        task: where problems come from: addition(1, 50), reasoning_gym('chain_sum'), gsm8k, records('my.jsonl', ...).
        reward: exact_number, math_verify, or your own module:function; None is the task's own.
        eval_task: problems to evaluate on; None holds some of the task's own back.
        objective: drpo(0.2), ppo(0.2, 0.28), dppo(0.15), spo(0.2), none, ... or your own module:name.
        advantage: mean, zscore, rloo, maxrl; not asked where there is a critic.
        discount: of a reward for each turn that it lies ahead, (0, 1]; a critic has its own, per token (gamma).
        critic: gae(1.0, 0.95): a value model, trained beside the policy, gives every token its advantage (PPO with a
            critic), also to a prompt's only sample; None compares a prompt's samples.
        critic_optimizer: of the critic, as `optimizer`; its learning rate is constant.
        reduction: token_mean, sequence_mean, horizon(H): what each token's loss counts.
        sampling: how completions are drawn; its temperature scales mu and pi alike. Where the objective reads a top-K
            divergence and top_logprobs is 0, it becomes 20.
        drop_long_prompts: leave out problems whose prompts are too long for the model; else one is an error.
        reward_pool: how many processes run the reward, its limits of time and memory, and what a failure of it costs.
        steps: rollouts.
        prompts: problems per rollout.
        updates: optimiser updates per rollout; each trains on its share of the problems, so at most `prompts`.
        optimizer: adamw(1e-6, betas=(0.9, 0.999), weight_decay=0.01), muon(1e-6), or your own module:name(...); the
            first argument is the peak learning rate.
        schedule: of the learning rate: constant, linear, cosine, each with warmup=STEPS.
        max_grad_norm: gradients, a critic's too, are scaled down to this L2 norm, > 0; inf is off.
        max_skipped: updates in a row that may be skipped because their gradient is not finite, before the run ends.
        reference_kl: coefficient of KL(policy || initial model), k2 in the loss, of each token given its context (not
            of whole texts: a token's gradient does not see the KL of later ones); 0 is off.
        kl_in_reward: coefficient of KL(policy || initial model), k1 in the reward of each token, so that a token is
            credited with the KL of later ones too (verl's use_kl_in_reward); 0 is off.
        entropy_bonus: coefficient of the entropy bonus; 0 is off.
        lora_rank: 0 trains all weights; r trains rank-r adapters.
        precision: of the trainer's compute: auto (bf16 where the processor has it), bf16, fp32, or fp8, fp8_weights,
            int8 with straight-through gradients; weights stay fp32.
        shard: of several processes (torchrun): none, each holds the whole model; fsdp, weights, gradients and optimiser
            are divided among them, a critic's too.
        engine: what samples: transformers (in process), vllm (in process), or a vLLM server's address, http://host:port;
            of several processes the first ask a server each, where several are named with commas between.
        rollout_precision: of the sampler's own copy of the weights: auto, bf16, fp32, int8, fp8_weights, fp8.
        sync_every: steps between weight syncs, from the trainer to the sampler; 1 keeps it as fresh as it can be.
        async_steps: how many steps ahead of training a rollout is sampled; 0 samples each with the newest weights.
        overlap: sample the rollouts ahead while training; requires async_steps of at least 1.
        micro_batch_tokens: most tokens, padding included, that go through the model at once.
        eval_every: steps between evaluations; 0 evaluates before and after only.
        eval_problems: held-out problems.
        eval_samples: completions of each.
        checkpoint_every: steps between checkpoints; 0 writes one at the end only.
        keep_checkpoints: how many of the last to keep; the best is kept besides.
        seed: of everything random.

    Raises:
        InputError: a value out of its range; the message names the field.
    """

    name: str = "run"
    model: str = SMOLLM2
    task: Task = field(default_factory=Addition)
    reward: Reward | None = None
    eval_task: Task | None = None
    objective: Objective = field(default_factory=DRPO)
    advantage: Advantage = advantages.mean
    discount: float = 1.0
    critic: GAE | None = None
    critic_optimizer: Optimizer = field(default_factory=lambda: AdamW(1e-5))
    reduction: Reduction = field(default_factory=lambda: Horizon(256))
    sampling: Sampling = field(default_factory=Sampling)
    drop_long_prompts: bool = False
    reward_pool: RewardConfig = field(default_factory=RewardConfig)
    steps: int = 20
    prompts: int = 8
    updates: int = 1
    optimizer: Optimizer = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Constant)
    max_grad_norm: float = 1.0
    max_skipped: int = 2
    reference_kl: float = 0.0
    kl_in_reward: float = 0.0
    entropy_bonus: float = 0.0
    lora_rank: int = 0
    precision: str = "auto"
    shard: str = "none"
    engine: str = "transformers"
    rollout_precision: str = "auto"
    sync_every: int = 1
    async_steps: int = 0
    overlap: bool = False
    micro_batch_tokens: int = 4096
    eval_every: int = 0
    eval_problems: int = 200
    eval_samples: int = 1
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        self.sampling.require_trainable(least=2 if self.critic is None else 1)
        if needed_divergence(self.objective.needs) is not None and self.sampling.top_logprobs == 0:
            object.__setattr__(self, "sampling", replace(self.sampling, top_logprobs=DEFAULT_K))
        for name in (
            "steps",
            "prompts",
            "updates",
            "sync_every",
            "micro_batch_tokens",
            "eval_samples",
            "keep_checkpoints",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("lora_rank", "async_steps", "max_skipped", "eval_every", "eval_problems", "checkpoint_every"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 or more")
        for name in ("reference_kl", "kl_in_reward", "entropy_bonus"):
            _require(0 <= getattr(self, name) < float("inf"), name, getattr(self, name), "must be finite and >= 0")
        _require(0 < self.discount <= 1, "discount", self.discount, "must be in (0, 1]")
        own = self.critic is None or self.discount == 1
        _require(own, "discount", self.discount, "a critic has its own; write it as --critic 'gae(gamma=...)'")
        positive = self.kl_in_reward == 0 or self.critic is not None or self.advantage is not advantages.maxrl
        _require(positive, "kl_in_reward", self.kl_in_reward, "with it rewards may be negative, which maxrl refuses")
        _require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "must be above 0; inf turns clipping off")
        _require(
            self.prompts * self.sampling.samples <= MOST_COMPLETIONS,
            "prompts",
            self.prompts,
            f"with sampling.samples={self.sampling.samples} a step has more than {MOST_COMPLETIONS:,} completions",
        )
        _require(
            self.eval_problems * self.eval_samples <= MOST_COMPLETIONS,
            "eval_problems",
            self.eval_problems,
            f"with eval_samples={self.eval_samples} an evaluation has more than {MOST_COMPLETIONS:,} completions",
        )
        _require(self.async_steps <= MOST_COMPLETIONS, "async_steps", self.async_steps, f"at most {MOST_COMPLETIONS:,}")
        _require(self.updates <= self.prompts, "updates", self.updates, f"at most prompts={self.prompts}")
        ahead = self.async_steps > 0 or not self.overlap
        _require(ahead, "overlap", self.overlap, "requires rollouts sampled ahead; set --async-steps 1")
        bare = without_password(self.engine)
        _require(bare == self.engine, "engine", bare, f"its password would be recorded; set {AUTH}=user:password")
        _require_engine(self.engine)
        for name, value, most in (
            ("lora_rank", self.lora_rank, MOST_RANK),
            ("sampling.max_new_tokens", self.sampling.max_new_tokens, MOST_COMPLETIONS),
            ("sampling.top_logprobs", self.sampling.top_logprobs, MOST_COMPLETIONS),
            ("reward_pool.processes", self.reward_pool.processes, MOST_PROCESSES),
        ):
            _require(value <= most, name, value, f"at most {most:,}")
        _one_of("shard", self.shard, ("none", "fsdp"))
        whole = self.shard == "none" or not self.lora_rank
        _require(whole, "lora_rank", self.lora_rank, "adapters are trained with the model whole; set --shard none")
        for name in ("optimizer", "critic_optimizer"):
            matrices_whole = self.shard == "none" or not isinstance(getattr(self, name), Muon)
            _require(matrices_whole, name, "muon", "it orthogonalises whole matrices; set --shard none, or use adamw")
        for name in ("precision", "rollout_precision"):
            _one_of(name, getattr(self, name), PRECISIONS)
        rule = "small gradients round to 0 in it; set --precision bf16 or fp32 (--rollout-precision fp16 is possible)"
        _require(self.precision != "fp16", "precision", self.precision, rule)


def _require_engine(engine: str) -> None:
    """The name of an engine, or addresses with commas between.

    Raises:
        InputError: it is neither.
    """
    if not engine.startswith(("http://", "https://")):
        _one_of("engine", engine, ENGINES)
        return
    for address in engine.split(","):
        try:
            parts = urlsplit(address)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            why = "a host and a port are needed"
        except ValueError as error:  # brackets that do not close, a port that is none
            fine, why = False, str(error)
        fine = fine and address.isprintable() and " " not in address
        _require(fine, "engine", repr(address), f"no address ({why}); write it as http://127.0.0.1:8000")


def _require(fine: bool, name: str, value: object, rule: str) -> None:
    if not fine:
        raise InputError(f"{name}={value}: {rule}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name}={value!r}{nearest(value, known)}")


def learning_rate(run: Run, step: int, update: int) -> float:
    """Return the learning rate of a step's update, both counted from 0; 0 while only the critic learns."""
    if run.critic is not None and step < run.critic.warmup:
        return 0.0
    at, total = step * run.updates + update, run.steps * run.updates
    return run.schedule(run.optimizer.learning_rate, update=at, total=total, per_step=run.updates)


def with_learning_rate(run: Run, learning_rate: float) -> Run:
    """Return the run with another peak learning rate, and its optimiser as it is for the rest.

    Raises:
        InputError: a rate that the optimiser refuses, or an optimiser without a field of this name.

    Example:
        >>> with_learning_rate(Run(optimizer=Muon(1e-5, momentum=0.9)), 2e-5).optimizer
        Muon(learning_rate=2e-05, momentum=0.9, weight_decay=0.01, betas=(0.9, 0.999))
    """
    optimizer: Any = run.optimizer
    try:
        return replace(run, optimizer=replace(optimizer, learning_rate=learning_rate))
    except TypeError:
        spec = format_spec(optimizer, optim.OPTIMIZERS)
        raise InputError(f"learning_rate={learning_rate}: optimizer {spec} has no field of this name") from None


def trains_little(run: Run) -> str | None:
    """Say in a line that a run's learning rates leave the policy as it is, or never reach their peak; None if neither.

    Example:
        >>> trains_little(Run(optimizer=AdamW(0.0)))
        'learning_rate=0: the policy will not change; its critic and its gradients are as they would be'
        >>> trains_little(Run(schedule=Constant(warmup=40)))
        'warmup=40 is longer than steps=20: the learning rate ends at 50% of its peak'
    """
    if run.optimizer.learning_rate == 0:
        return "learning_rate=0: the policy will not change; its critic and its gradients are as they would be"
    if run.critic is not None and run.critic.warmup >= run.steps:
        return f"critic warmup={run.critic.warmup} lasts for all steps={run.steps}: only the critic will learn"
    warmup = run.schedule.warmup
    if warmup > run.steps:
        end = f"the learning rate ends at {run.steps / warmup:.0%} of its peak"
        return f"warmup={warmup} is longer than steps={run.steps}: {end}"
    return None


def arithmetic(run: Run) -> str:
    """Say what a step consists of, in one line.

    Example:
        >>> arithmetic(Run(prompts=8, updates=2))
        '8 prompts x 8 samples = 64 completions a step, 2 updates of 32 completions each, 20 steps'
    """
    n = run.prompts * run.sampling.samples
    updates = "1 update" if run.updates == 1 else f"{run.updates} updates of {n // run.updates} completions each"
    return (
        f"{run.prompts} prompts x {run.sampling.samples} samples = {n} completions a step, {updates}, {run.steps} steps"
    )


REGISTRIES: Mapping[str, Registry[Any]] = {
    "task": tasks.REGISTRY,
    "eval_task": tasks.REGISTRY,
    "reward": rewards.REGISTRY,
    "objective": objectives.REGISTRY,
    "advantage": advantages.REGISTRY,
    "critic": gae.REGISTRY,
    "reduction": reductions.REGISTRY,
    "optimizer": optim.OPTIMIZERS,
    "critic_optimizer": optim.OPTIMIZERS,
    "schedule": optim.SCHEDULES,
}
"""Fields that hold objects, which are written as specs."""

# Fields that are records of their own, with plain values.
NESTED: Mapping[str, type[Any]] = {"sampling": Sampling, "reward_pool": RewardConfig}


def to_json(run: Run) -> dict[str, Any]:
    """Return a run's configuration as plain JSON values; `from_json` gives an equal run back."""
    record: dict[str, Any] = {}
    for f in fields(run):
        value = getattr(run, f.name)
        if value is not None and f.name in REGISTRIES:
            value = format_spec(value, REGISTRIES[f.name])
        elif f.name in NESTED:
            value = vars(value).copy()
        elif value == math.inf:
            value = OFF
        record[f.name] = value
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain


def from_json(record: Mapping[str, Any], trust_remote_code: bool = True) -> Run:
    """Build a run from what `to_json` wrote.

    Args:
        record: by name of field; those that are left out have their defaults.
        trust_remote_code: import the fields whose spec is `module:name`; False puts an `Unimported` in their place,
            which keeps the spec and can do nothing.

    Raises:
        InputError: an unknown field, or a value that a field refuses.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"the configuration is {_shown(record)}; it must be an object with the fields of a run")
    kinds = {f.name: f.type for f in fields(Run)}
    values: dict[str, Any] = {}
    for name, value in record.items():
        if name not in kinds:
            raise InputError(f"unknown field {name!r} in the configuration{nearest(name, kinds)}")
        if name in REGISTRIES:
            values[name] = _from_spec(name, value, NoneType in get_args(kinds[name]), trust_remote_code)
        elif name in NESTED:
            values[name] = _nested(name, value, NESTED[name])
        elif name == "engine":
            values[name] = without_password(_typed(name, value, kinds[name]))  # an earlier version recorded it
        elif name == "max_grad_norm" and value in (OFF, math.inf):
            values[name] = math.inf
        else:
            values[name] = _typed(name, value, kinds[name])
    return replace(Run(), **values)


def load_run(folder: Path, trust_remote_code: bool = True) -> Run:
    """Return the configuration of the run in `folder`.

    Args:
        folder: of the run.
        trust_remote_code: import the fields whose spec is `module:name`; see `from_json`.

    Raises:
        InputError: there is no run, or its configuration cannot be read.
    """
    record = read_config(folder)
    try:
        return from_json(record, trust_remote_code)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None


def _from_spec(name: str, value: Any, optional: bool, trust_remote_code: bool) -> Any:
    if value is None and optional:
        return None
    _require(isinstance(value, str), name, _shown(value), "must be text, as on the command line")
    if not trust_remote_code and names_code(value):
        return Unimported(value)
    try:
        return parse_spec(value, REGISTRIES[name])
    except InputError as error:
        raise (error if name in str(error) else InputError(f"{name}: {error}")) from None


def _nested(name: str, value: Any, kind: Any) -> Any:
    _require(isinstance(value, Mapping), name, _shown(value), "must be an object with the fields that --help shows")
    kinds = {f.name: f.type for f in fields(kind)}
    for inner in value:
        if inner not in kinds:
            raise InputError(f"unknown field '{name}.{inner}' in the configuration{nearest(inner, kinds)}")
    return kind(**{inner: _typed(f"{name}.{inner}", v, kinds[inner]) for inner, v in value.items()})


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value of a field as its annotation has it; numbers are finite, and fit 64 bits."""
    try:
        typed = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        known = f"; known: {', '.join(get_args(kind))}" if get_origin(kind) is Literal else ""
        raise InputError(f"{name}={_shown(value)}: {error}{known}".replace("`", "")) from None
    for number in typed if isinstance(typed, tuple) else (typed,):
        fine = not isinstance(number, int | float) or (abs(number) <= _LARGEST and math.isfinite(number))
        _require(fine, name, _shown(value), "is too large, or no number")
    return typed


def _shown(value: Any) -> str:
    """A value for a message: one line, not too long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits; nested too deeply
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
