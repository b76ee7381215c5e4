"""GRPO-style training in TRL with any objective, on drpo's tasks and rewards.

    python cluster/trl/train.py --config cluster/trl/demo.yaml --objective 'drpo(0.2)'
    accelerate launch --config_file cluster/trl/fsdp2.yaml cluster/trl/train.py --config cluster/trl/qwen3_4b.yaml

Every field of `DRPOConfig`, and so of TRL's GRPOConfig, is an option, and a line of the YAML file.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import TrlParser

from drpo.adapters.trl import DRPOConfig, DRPOTrainer
from drpo.errors import InputError
from drpo.model import loading, smollm2
from drpo.model.names import SMOLLM2
from drpo.model.precision import resolve_precision
from drpo.rewards import RewardPool
from drpo.rollout import EpisodeDriver, TransformersEngine
from drpo.spec import parse_spec
from drpo.tasks import REGISTRY as TASKS
from drpo.tasks import Task
from drpo.train import evaluate
from drpo.train.records import Evaluation
from drpo.types import Problem, Sampling


@dataclass
class Script:
    """What is trained on what; TRL's own fields say how."""

    model: str = field(metadata={"help": "smollm2-135m, a folder, or a hub id."})
    task: str = field(metadata={"help": "Problems and their reward, as specs of drpo: addition(1, 20), dapo_math."})
    sampler: str = field(
        default="trl",
        metadata={"help": "'trl' samples as use_vllm says; 'engine' with drpo's own, in one process, on a CPU too."},
    )
    eval_problems: int = field(
        default=0,
        metadata={"help": "Held-out problems, scored before and after training; with sampler=engine only."},
    )


class EngineSampler:
    """drpo's engine as TRL's `rollout_func`: the trainer's weights, rounded as a sampler's are, and their own mu."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: DRPOConfig) -> None:
        engine = TransformersEngine(model, precision=resolve_precision("auto", model.device))
        self.driver = EpisodeDriver.of(engine, model, tokenizer)
        self.sampling = Sampling(args.num_generations, args.max_completion_length, args.temperature)
        self.seed, self.rollouts = args.seed, 0

    def load(self, trainer: DRPOTrainer) -> None:
        """Take the trainer's weights."""
        self.driver.engine.load_weights(trainer.accelerator.unwrap_model(trainer.model).state_dict(), self.rollouts)

    def __call__(self, prompts: list[Any], trainer: DRPOTrainer) -> dict[str, list[list[Any]]]:
        """One completion for each of `prompts`, in which every prompt stands `num_generations` times in a row."""
        self.load(trainer)
        asked = prompts[:: self.sampling.samples]
        if prompts != [prompt for prompt in asked for _ in range(self.sampling.samples)]:
            raise InputError(
                "sampler=engine: TRL gave prompts that are not in groups of num_generations; use one process"
            )
        problems = [Problem(str(i), tuple(prompt), "") for i, prompt in enumerate(asked)]
        groups = self.driver.run(problems, self.sampling, ("trl", self.seed, self.rollouts))
        drawn = [sequence for group in groups for episode in group for sequence in episode.sequences]
        self.rollouts += 1
        return {
            "prompt_ids": [c.prompt_ids.tolist() for c in drawn],
            "completion_ids": [c.token_ids.tolist() for c in drawn],
            "logprobs": [c.behavior_logp.tolist() for c in drawn],
        }

    def examine(self, held_out: list[Problem], pool: RewardPool) -> Evaluation:
        """Accuracy of the weights that were taken last, one completion a problem."""
        sampling = Sampling(1, self.sampling.max_new_tokens, self.sampling.temperature)
        groups = evaluate.examine(self.driver, held_out, sampling, pool, seed=self.seed)
        return evaluate.summed_up(groups, sampling.samples, step=self.rollouts)


def problems_of(task: Task, args: DRPOConfig) -> list[Problem]:
    """The problems of every rollout, in the order in which drpo's own trainer would meet them."""
    if args.max_steps < 1:
        raise InputError(f"max_steps={args.max_steps}: say how many updates to make")
    prompts = args.generation_batch_size // args.num_generations
    updates = args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps
    rollouts = -(-args.max_steps // max(updates, 1))
    return [problem for step in range(rollouts) for problem in task.sample(prompts, step, args.seed)]


def messages(problem: Problem) -> list[dict[str, str]]:
    """A problem as TRL wants its prompt."""
    return [dict(message) for message in problem.messages]


class PoolReward:
    """A drpo reward as TRL's, in processes that may hang or die; what could not be scored counts nowhere."""

    __name__ = "reward"

    def __init__(self, pool: RewardPool, problems: list[Problem]) -> None:
        self.pool, self.problems = pool, problems

    def __call__(self, completions: list[Any], number: list[int], **_: Any) -> list[float | None]:
        """One score a completion; `number` says to which problem each belongs."""
        texts = [completion[0]["content"] for completion in completions]
        asked = [(self.problems[i], text) for i, text in zip(number, texts, strict=True)]
        return [scored.score for scored in self.pool.score(asked)]


@contextmanager
def examined(sampler: EngineSampler | None, task: Task, script: Script, pool: RewardPool) -> Iterator[list[Evaluation]]:
    """Evaluate before and after, where the script asks for it; the list holds what was found."""
    found: list[Evaluation] = []
    held_out = task.held_out(script.eval_problems) if script.eval_problems else []
    if held_out and sampler:
        found.append(sampler.examine(held_out, pool))
    yield found
    if held_out and sampler:
        found.append(sampler.examine(held_out, pool))


def given(script: Script, args: DRPOConfig) -> tuple[Any, PreTrainedTokenizerBase | None, EngineSampler | None]:
    """The model, its tokenizer and its sampler; only their name where TRL is to load and sample itself."""
    if script.sampler == "engine":
        model, tokenizer = loading.load(script.model)
        return model, tokenizer, EngineSampler(model, tokenizer, args)
    return str(smollm2.smollm2()) if script.model == SMOLLM2 else script.model, None, None


def run(script: Script, args: DRPOConfig) -> None:
    """Train, save the model and its figures under `output_dir`."""
    if script.sampler not in ("trl", "engine"):
        raise InputError(f"sampler={script.sampler!r}: must be 'trl' or 'engine'")
    if script.eval_problems and script.sampler != "engine":
        raise InputError(
            f"eval_problems={script.eval_problems}: needs sampler=engine; set it to 0 and evaluate what is saved with "
            "`drpo eval`"
        )
    task: Task = parse_spec(script.task, TASKS)
    problems, out = problems_of(task, args), Path(args.output_dir)
    data = Dataset.from_list([{"prompt": messages(p), "number": i} for i, p in enumerate(problems)])
    model, tokenizer, sampler = given(script, args)
    with RewardPool(task.reward) as pool:
        reward = PoolReward(pool, problems)
        trainer = DRPOTrainer(
            model, reward, args=args, train_dataset=data, processing_class=tokenizer, rollout_func=sampler
        )
        with examined(sampler, task, script, pool) as evaluations:
            trainer.train()
            if sampler:
                sampler.load(trainer)
    trainer.save_model(str(out / "model"))
    if trainer.accelerator.is_main_process:
        figures = {"objective": args.objective, "seed": args.seed, "evaluations": [asdict(e) for e in evaluations]}
        (out / "figures.json").write_text(json.dumps(figures | {"log": trainer.state.log_history}, indent=1) + "\n")
        for evaluation in evaluations:
            print(
                f"after {evaluation.step} rollouts: {evaluation.reward_mean:.1%} of {evaluation.n_problems} "
                f"(95 % interval {evaluation.low:.1%} to {evaluation.high:.1%})"
            )


def main() -> int:
    """Parse, train; what the user gave wrong is one line and status 2."""
    try:
        script, args = TrlParser((Script, DRPOConfig)).parse_args_and_config()
        run(script, args)
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
