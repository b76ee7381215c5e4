"""The groups of a run's configuration: frozen records of plain values and objects, each with its own checks.

Messages name a field as its option is called, by `drpo.train.fields`: `eval_every` for `EvaluationConfig.every`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from drpo.credentials import AUTH, without_password
from drpo.credit import advantages
from drpo.credit.advantages import Advantage
from drpo.credit.gae import GAE
from drpo.credit.overlong import Overlong
from drpo.environments import EnvironmentConfig, EnvironmentMaker
from drpo.environments.contract import makes_environments
from drpo.model.device import DEVICES
from drpo.model.names import SMOLLM2
from drpo.model.precision import BASE_PRECISIONS, GRIDS
from drpo.model.precision import NAMES as PRECISIONS
from drpo.objectives import DRPO, Objective
from drpo.objectives.contract import require_objective
from drpo.reductions import Horizon, Reduction
from drpo.rewards import Reward, RewardConfig
from drpo.spec import Unimported
from drpo.tasks import Addition, Task, is_finite
from drpo.train.config.checks import at_least, at_most, name_of, one_of, require, require_parts, require_task
from drpo.train.curriculum import Pools
from drpo.train.optim import AdamW, Constant, Optimizer, Schedule
from drpo.types import Sampling

ENGINES = {"transformers": "drpo.rollout.transformers:make_engine", "vllm": "drpo.rollout.vllm:VLLMEngine"}
"""Name of an engine in process -> the `module:name` of what makes it, called as `make(model, precision=NAME)`."""
SERVER = "http://HOST:PORT"
MOST_COMPLETIONS = 2**20
"""Of a step, and of an evaluation: an upper bound that catches typos before memory runs out."""
MOST_RANK, MOST_PROCESSES, MOST_ATTEMPTS = 2**14, 2**10, 2**10
"""Of adapters, of processes that score, and of further attempts at a prompt: likewise."""
CRITIC_OPTIMIZER = AdamW(1e-5)


@dataclass(frozen=True)
class ModelConfig:
    """The policy's model, and how it is trained.

    Args:
        name: smollm2-135m, tiny, a folder, or a hub id, owner/name.
        lora_rank: 0 trains all weights; r trains rank-r adapters.
        base_precision: of the frozen weights beside adapters: fp32; or nf4 (QLoRA), 4.5 bits a weight of the decoder's
            linear layers. The trained model is saved whole either way, with the weights as held and the adapters added.
        precision: of the trainer's compute: auto (bf16 where the processor has it), bf16, fp32, or fp8, fp8_weights,
            int8 with straight-through gradients.
        master_weights: what the trainer holds and updates: fp32; or bf16, two bytes a weight instead of four, its
            gradient too, rounded stochastically so that small steps count on average. With lora_rank the frozen model
            alone is bf16. Norms and biases stay fp32, and so does the saved model.
        routing_replay: of a mixture of experts, whose choice of experts the updates use: off, each pass its own;
            sampler, what the sampler chose for each token; trainer, what the trainer itself chose before the first of
            a rollout's updates. Weights of the chosen experts, and gradients, are the trainer's own either way.
        device: auto (cuda, else Apple's mps, else cpu), cuda, mps, cpu.
        chat_template: a file with a Jinja template in place of the tokenizer's (in Python and in config.json its text,
            or "" for the tokenizer's own); it is saved with the model. --template.NAME VALUE sets an argument of the
            template, such as --template.enable-thinking false.
        chat_template_kwargs: arguments of the chat template by name, of JSON's types; the saved model's template has
            them as its defaults.
    """

    name: str = SMOLLM2
    lora_rank: int = 0
    base_precision: str = "fp32"
    precision: str = "auto"
    master_weights: str = "fp32"
    routing_replay: str = "off"
    device: str = "auto"
    chat_template: str = ""
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        at_least(0, lora_rank=self.lora_rank)
        at_most(MOST_RANK, lora_rank=self.lora_rank)
        one_of(PRECISIONS, precision=self.precision)
        self._require_held_base()
        one_of(("fp32", "bf16"), master_weights=self.master_weights)
        fits = self.master_weights == "fp32" or self.precision in ("auto", "bf16")
        rule = f"products of bf16 weights are bf16, not {self.precision}; set --precision bf16 or --master-weights fp32"
        require(fits, "master_weights", self.master_weights, rule)
        one_of(("off", "sampler", "trainer"), routing_replay=self.routing_replay)
        one_of(DEVICES, device=self.device)
        rule = "small gradients round to 0 in it; set --precision bf16 or fp32 (--rollout-precision fp16 is possible)"
        require(self.precision != "fp16", "precision", self.precision, rule)
        is_text = not self.chat_template or "{" in self.chat_template
        rule = "must be a Jinja template's text, which has { in it; a file goes after --chat-template"
        require(is_text, "chat_template", repr(self.chat_template), rule)

    def _require_held_base(self) -> None:
        """Raise for frozen weights in few bits where nothing is frozen, or where they are rounded once more."""
        base = self.base_precision
        one_of(BASE_PRECISIONS, base_precision=base)
        rule = "weights in 4 bits stay as they are, and adapters are trained beside them; set --lora-rank 16"
        require(base == "fp32" or self.lora_rank > 0, "base_precision", base, rule)
        rule = f"its weights would be rounded once more, to precision={self.precision}; set --precision bf16 or fp32"
        require(base == "fp32" or self.precision not in GRIDS, "base_precision", base, rule)


@dataclass(frozen=True)
class DataConfig:
    """The problems of a step.

    Args:
        task: where problems come from: addition(1, 50), reasoning_gym('chain_sum'), gsm8k, records('my.jsonl', ...);
            calculator, guess, walk, word_game, repair, lookup are solved in several turns.
        environment: what answers the model's turns where the task itself does not: tools('my_tools:search'), your own
            module:name; None is a single turn.
        prompts: problems per rollout.
        drop_long_prompts: leave out problems whose prompts are too long for the model; else one is an error.
        curriculum: pools, problems are chosen by their measured pass rate: from 0.95 on one retires, up to 0.05 it
            waits, and a tenth of a rollout are such ones that come back, pools(easy=0.95, hard=0.05, revisit=0.1);
            None draws all alike.
    """

    task: Task = field(default_factory=Addition)
    environment: EnvironmentMaker | None = None
    prompts: int = 8
    drop_long_prompts: bool = False
    curriculum: Pools | None = None

    def __post_init__(self) -> None:
        require_task(task=self.task)
        if self.environment is not None:
            require_parts("an object", ("max_turns", "open"), environment=self.environment)
            alone = isinstance(self.task, Unimported) or not makes_environments(self.task)
            require(alone, "environment", self.environment, "the task has environments of its own; leave it out")
        at_least(1, prompts=self.prompts)
        self._require_finite()

    def _require_finite(self) -> None:
        """Raise for a curriculum over problems that never come twice."""
        curriculum: object = self.curriculum
        fits = curriculum is None or isinstance(curriculum, Pools | Unimported)
        require(fits, "curriculum", curriculum, "must be None or Pools(...), --curriculum pools")
        name = type(self.task).__name__
        unknown = curriculum is None or isinstance(curriculum, Unimported) or isinstance(self.task, Unimported)
        finite = unknown or is_finite(self.task)
        rule = (
            f"the task {name} has no finite set of problems (no `training_problems`) whose pass rates could be "
            "measured; use --data or a task of records, or leave it out"
        )
        require(finite, "curriculum", "pools", rule)


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled, and with weights of which age.

    Args:
        engine: what samples: transformers (in process), vllm (in process), or a vLLM server's address, http://host:port;
            of several processes the first ask a server each, where several are named with commas between.
        sampling: how completions are drawn; its temperature scales mu and pi alike. Where the objective reads a top-K
            divergence and top_logprobs is 0, it becomes 20.
        stop: tokens that end a turn, each by its text or its id, in place of the model's EOS tokens and the token with
            which its chat template ends a turn.
        precision: of the sampler's own copy of the weights: auto, bf16, fp32, int8, fp8_weights, fp8.
        sync_every: steps between weight syncs, from the trainer to the sampler; 1 keeps it as fresh as it can be.
        async_steps: how many steps ahead of training a rollout is sampled; 0 samples each with the newest weights.
        overlap: sample the rollouts ahead while training; requires async_steps of at least 1.
        dynamic_sampling: sample a prompt whose completions all have the same reward again, at most so many times; what
            stays equal is left out of the update. 0 is off.
        max_turns: an episode ends after so many turns of the model; 0 leaves it to the environment.
        max_episode_tokens: an episode ends where one more turn could bring it above so many sampled tokens; 0 is no
            limit. sampling.max_new_tokens is the limit of a turn.
        environment_pool: in how many processes environments run, and their limits of time and memory.
    """

    engine: str = "transformers"
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    precision: str = "auto"
    sync_every: int = 1
    async_steps: int = 0
    overlap: bool = False
    dynamic_sampling: int = 0
    max_turns: int = 0
    max_episode_tokens: int = 0
    environment_pool: EnvironmentConfig = field(default_factory=EnvironmentConfig)

    def __post_init__(self) -> None:
        at_least(1, sync_every=self.sync_every)
        at_least(0, async_steps=self.async_steps, max_turns=self.max_turns, max_episode_tokens=self.max_episode_tokens)
        at_least(0, dynamic_sampling=self.dynamic_sampling)
        at_most(MOST_COMPLETIONS, async_steps=self.async_steps)
        at_most(MOST_ATTEMPTS, dynamic_sampling=self.dynamic_sampling)
        at_most(MOST_PROCESSES, **{"environment_pool.processes": self.environment_pool.processes})
        lengths = {f"sampling.{name}": getattr(self.sampling, name) for name in ("max_new_tokens", "top_logprobs")}
        at_most(MOST_COMPLETIONS, **lengths)
        ahead = self.async_steps > 0 or not self.overlap
        require(ahead, "overlap", self.overlap, "requires rollouts sampled ahead; set --async-steps 1")
        one_of(PRECISIONS, rollout_precision=self.precision)
        bare = without_password(self.engine)
        require(bare == self.engine, "engine", bare, f"its password would be recorded; set {AUTH}=user:password")
        _require_engine(self.engine)
        require("" not in self.stop, "stop", self.stop, "a token has a text; leave the empty one out")


@dataclass(frozen=True)
class RewardsConfig:
    """What scores completions, and in which processes.

    Args:
        function: exact_number, math_verify, judge(URL, RUBRIC), or your own module:function; or a weighted sum of
            several, 'math_verify + 0.2*format', each of which is a curve; None is the task's own.
        overlong: what becomes of long completions, before advantages: None; mask, those cut at the limit are not
            trained; shaped, the last tokens before the limit cost up to 1, shaped(C, penalty=1.0) the last C (DAPO's
            soft punishment, a fifth of the limit).
        pool: how many processes run it, its limits of time and memory, and what a failure of it costs.
    """

    function: Reward | None = None
    overlong: Overlong | None = None
    pool: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        function: object = self.function
        fits = function is None or callable(function) or isinstance(function, Unimported)
        require(fits, "reward", function, "must be a function of (problem, text)")
        overlong: object = self.overlong
        fits = overlong is None or callable(overlong) or isinstance(overlong, Unimported)
        require(fits, "overlong", overlong, "must be None, mask or Shaped(...), --overlong 'shaped(4096)'")
        at_most(MOST_PROCESSES, **{"reward_pool.processes": self.pool.processes})


@dataclass(frozen=True)
class ObjectiveConfig:
    """What training maximises: the objective, advantages, and the terms beside it.

    Args:
        loss: drpo(0.2), ppo(0.2, 0.28), dppo(0.15), spo(0.2), none, ... or your own module:name.
        advantage: mean, zscore, rloo, maxrl; reward, the reward itself; or gdpo, each reward of a sum normalised by
            itself; not asked where there is a critic.
        whiten: shift and scale the advantages of a whole rollout's tokens to mean 0 and standard deviation 1, as
            REINFORCE++ does; a critic has its own (gae(whiten=False)).
        reduction: token_mean, sequence_mean, horizon(H): what each token's loss counts.
        sequence: what an objective that reads whole sequences (gspo) takes as one: episode, or each turn of it; the
            reduction counts episodes either way.
        discount: of a reward for each turn that it lies ahead, (0, 1]; a critic has its own, per token (gamma).
        critic: gae(1.0, 0.95): a value model, trained beside the policy, gives every token its advantage (PPO with a
            critic), also to a prompt's only sample; None compares a prompt's samples.
        reference_kl: coefficient of KL(policy || initial model), k2 in the loss, of each token given its context (not
            of whole texts: a token's gradient does not see the KL of later ones); 0 is off.
        kl_in_reward: coefficient of KL(policy || initial model), k1 in the reward of each token, so that a token is
            credited with the KL of later ones too (verl's use_kl_in_reward); 0 is off.
        entropy_bonus: coefficient of the entropy bonus; 0 is off.
    """

    loss: Objective = field(default_factory=DRPO)
    advantage: Advantage = advantages.mean
    whiten: bool = False
    reduction: Reduction = field(default_factory=lambda: Horizon(256))
    sequence: str = "episode"
    discount: float = 1.0
    critic: GAE | None = None
    reference_kl: float = 0.0
    kl_in_reward: float = 0.0
    entropy_bonus: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Unimported):
            require_objective(self.loss)
        require_parts("a function", ("__call__",), advantage=self.advantage, reduction=self.reduction)
        critic: object = self.critic
        fits = critic is None or isinstance(critic, GAE | Unimported)
        require(fits, "critic", critic, "must be None or GAE(...), --critic 'gae(1.0, 0.95)'")
        read = critic is None or self.advantage is advantages.mean or isinstance(self.advantage, Unimported)
        require(
            read, "advantage", name_of(self.advantage), "with a critic advantages are GAE's; leave one of the two out"
        )
        rule = "a critic has its own; write it as --critic 'gae(whiten=True)'"
        require(critic is None or not self.whiten, "whiten", self.whiten, rule)
        self._require_whole_episodes()
        one_of(("episode", "turn"), sequence=self.sequence)
        reads = self.sequence == "episode" or not getattr(self.loss, "tokenwise", False)
        require(
            reads, "sequence", self.sequence, "the objective weighs each token by itself; leave it out, or use gspo"
        )
        require(0 < self.discount <= 1, "discount", self.discount, "must be in (0, 1]")
        fits = self.critic is None or self.discount == 1
        require(fits, "discount", self.discount, "a critic has its own; write it as --critic 'gae(gamma=...)'")
        positive = self.kl_in_reward == 0 or self.critic is not None or self.advantage is not advantages.maxrl
        require(positive, "kl_in_reward", self.kl_in_reward, "with it rewards may be negative, which maxrl refuses")
        for name in ("reference_kl", "kl_in_reward", "entropy_bonus"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "must be finite and >= 0")

    def _require_whole_episodes(self) -> None:
        """Raise for what gdpo has itself, or for rewards of single tokens, which it does not compare."""
        if self.advantage is not advantages.gdpo:
            return
        require(not self.whiten, "whiten", self.whiten, "gdpo normalises the rollout itself; leave it out")
        rule = "gdpo compares whole episodes; leave it out, or use --advantage zscore"
        require(self.kl_in_reward == 0, "kl_in_reward", self.kl_in_reward, rule)
        require(self.discount == 1, "discount", self.discount, rule)


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights take their steps.

    Args:
        policy: adamw(1e-6, betas=(0.9, 0.999), weight_decay=0.01), adamw8bit(1e-6) with moments in a quarter of the
            memory, muon(1e-6), or your own module:name(...); the first argument is the peak learning rate.
        schedule: of the learning rate: constant, linear, cosine, each with warmup=STEPS.
        max_grad_norm: gradients, a critic's too, are scaled down to this L2 norm, > 0; inf is off.
        critic: of the critic, as `optimizer`; its learning rate is constant.
    """

    policy: Optimizer = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Constant)
    max_grad_norm: float = 1.0
    critic: Optimizer = CRITIC_OPTIMIZER

    def __post_init__(self) -> None:
        parts = ("learning_rate", "build")
        require_parts("an optimiser", parts, optimizer=self.policy, critic_optimizer=self.critic)
        require_parts("a schedule", ("warmup", "__call__"), schedule=self.schedule)
        require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "must be above 0; inf turns clipping off")


@dataclass(frozen=True)
class TrainerConfig:
    """How long training lasts, and how its work is divided.

    Args:
        steps: rollouts.
        updates: optimiser updates per rollout; each trains on its share of the problems, so at most `prompts`.
        micro_batch_tokens: most tokens, padding included, that go through the model at once.
        shard: of several processes (torchrun): none, each holds the whole model; fsdp, weights, gradients and optimiser
            are divided among them, a critic's too.
        checkpoint_activations: on keeps only the inputs of the model's layers for the backward pass, which computes
            each layer again: far less memory, an update up to a third longer, the same gradients; off keeps everything;
            auto is on where the largest step would not fit into memory otherwise.
    """

    steps: int = 20
    updates: int = 1
    micro_batch_tokens: int = 4096
    shard: str = "none"
    checkpoint_activations: str = "auto"

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, updates=self.updates, micro_batch_tokens=self.micro_batch_tokens)
        one_of(("none", "fsdp"), shard=self.shard)
        one_of(("auto", "on", "off"), checkpoint_activations=self.checkpoint_activations)


@dataclass(frozen=True)
class EvaluationConfig:
    """When the policy is evaluated, and on what.

    Args:
        task: problems to evaluate on; None holds some of the task's own back.
        every: steps between evaluations; 0 evaluates before and after only.
        problems: held-out problems.
        samples: completions of each.
    """

    task: Task | None = None
    every: int = 0
    problems: int = 200
    samples: int = 1

    def __post_init__(self) -> None:
        if self.task is not None:
            require_task(eval_task=self.task)
        at_least(1, eval_samples=self.samples)
        at_least(0, eval_every=self.every, eval_problems=self.problems)
        rule = f"with eval_samples={self.samples} an evaluation has more than {MOST_COMPLETIONS:,} completions"
        require(self.problems * self.samples <= MOST_COMPLETIONS, "eval_problems", self.problems, rule)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept.

    Args:
        every: steps between checkpoints; 0 writes one at the end only.
        keep: how many of the last to keep; the best is kept besides.
    """

    every: int = 20
    keep: int = 2

    def __post_init__(self) -> None:
        at_least(1, keep_checkpoints=self.keep)
        at_least(0, checkpoint_every=self.every)


@dataclass(frozen=True)
class FaultConfig:
    """What a run bears before it ends; failures of the reward are in `RewardConfig`.

    Args:
        max_skipped: updates in a row that may be skipped because their gradient is not finite, before the run ends.
    """

    max_skipped: int = 2

    def __post_init__(self) -> None:
        at_least(0, max_skipped=self.max_skipped)


def _require_engine(engine: str) -> None:
    """The name of an engine, or addresses with commas between.

    Raises:
        InputError: it is neither.
    """
    if not engine.startswith(("http://", "https://")):
        one_of((*ENGINES, SERVER), engine=engine)
        return
    for address in engine.split(","):
        try:
            parts = urlsplit(address)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            why = "a host and a port are needed"
        except ValueError as error:  # brackets that do not close, a port that is none
            fine, why = False, str(error)
        fine = fine and address.isprintable() and " " not in address
        require(fine, "engine", repr(address), f"no address ({why}); write it as http://127.0.0.1:8000")
