"""One training step of TRL's GRPOTrainer, driven step by step from a callback."""

import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.workers.marks import hashed, last_number
from benchmarks.workers.measure import Meter
from benchmarks.workers.protocol import Channel, one_line


class Phases:
    """Seconds per phase and tokens of the step that is running, taken by wrapping methods of the trainer."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def timed(self, phase: str, method: Callable[..., Any], seen: Callable[[Any], None]) -> Callable[..., Any]:
        """Return the method with its seconds added to a phase and its result shown to `seen`."""

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = method(*args, **kwargs)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begun
            seen(result)
            return result

        return wrapped

    def generated(self, result: Any) -> None:
        """Count what `_generate` returned: prompts first, completions second."""
        prompts, completions = result[0], result[1]
        self.counts = {
            "tokens": sum(map(len, completions)),
            "prompt_tokens": sum(map(len, prompts)),
            "rows": len(completions),
        }


class StepByStep(TrainerCallback):  # type: ignore[misc]
    """Holds the trainer before every step until the harness asks for it, and answers after it."""

    def __init__(self, channel: Channel, phases: Phases) -> None:
        self._channel, self._phases, self._meter = channel, phases, Meter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for a request."""
        if self._channel.receive() is None:
            raise SystemExit(0)
        self._phases.seconds, self._phases.counts = {}, {}
        self._meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer; what is neither generation nor reward is the update, TRL's own passes for log-probabilities too."""
        record: dict[str, Any] = {**self._meter.stop(), **self._phases.counts, "skipped": 0}
        record["phases"] = {**self._phases.seconds, "update": record["seconds"] - sum(self._phases.seconds.values())}
        self._channel.answer(record)


def _texts(completions: list[Any]) -> list[str]:
    return [c if isinstance(c, str) else c[0]["content"] for c in completions]


def hash_reward(completions: list[Any], **columns: Any) -> list[float]:
    """Mark by a hash of the text."""
    return [hashed(text) for text in _texts(completions)]


def exact_reward(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """Mark by whether the last number is the answer."""
    return [last_number(text, a) for text, a in zip(_texts(completions), answer, strict=True)]


REWARDS = {"hash": hash_reward, "exact": exact_reward}


def settings(setup: Mapping[str, Any], folder: str) -> GRPOConfig:
    """Return what a user on this machine would choose; what is not named here is TRL's default (beta 0 among them).

    Args:
        setup: precision, prompts, samples, new_tokens, learning_rate, steps, and batch: the completions that go
            through the model at once in the update.
        folder: for what the trainer insists on writing.

    Returns:
        One generation and one optimiser update per rollout.
    """
    return GRPOConfig(
        output_dir=folder,
        model_init_kwargs={"dtype": "float32"},
        bf16=setup["precision"] == "bf16",
        use_cpu=not torch.cuda.is_available(),  # else it refuses bf16
        gradient_checkpointing=False,
        per_device_train_batch_size=setup["batch"],
        gradient_accumulation_steps=setup["prompts"] * setup["samples"] // setup["batch"],
        num_generations=setup["samples"],
        max_completion_length=setup["new_tokens"],
        max_steps=setup["steps"],
        learning_rate=setup["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def make_trainer(setup: Mapping[str, Any], folder: str, callback: TrainerCallback, phases: Phases) -> GRPOTrainer:
    """Return the trainer with its phases timed.

    Args:
        setup: as for `settings`, with model (a folder), reward and problems ([prompt, answer], in order of use).
        folder: for what the trainer insists on writing.
        callback: holds it before every step.
        phases: takes the seconds.

    Returns:
        A trainer that has not begun.
    """
    tokenizer = AutoTokenizer.from_pretrained(setup["model"])
    rows = [
        {"prompt": [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt, "answer": answer}
        for prompt, answer in setup["problems"]
    ]
    trainer = GRPOTrainer(
        model=setup["model"],
        reward_funcs=REWARDS[setup["reward"]],
        args=settings(setup, folder),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer._generate = phases.timed("rollout", trainer._generate, phases.generated)
    trainer._calculate_rewards = phases.timed("reward", trainer._calculate_rewards, lambda result: None)
    return trainer


def main() -> None:
    """Prepare, say so, train until the harness has what it wants."""
    channel = Channel()
    setup = channel.receive()
    if setup is None:
        return
    phases = Phases()
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.manual_seed(0)
            trainer = make_trainer(setup, folder, StepByStep(channel, phases), phases)
        except Exception as error:
            channel.answer({"failure": one_line(error)})
            raise
        about = (
            f"TRL {trl.__version__}, transformers {transformers.__version__}; loss {trainer.args.loss_type}, "
            f"beta {trainer.args.beta:g}, {trainer.args.optim.value}, per-device batch "
            f"{trainer.args.per_device_train_batch_size} x {trainer.args.gradient_accumulation_steps}, "
            "no gradient checkpointing, no vLLM"
        )
        channel.answer({"about": {"settings": about}})
        try:
            trainer.train()
        except Exception as error:
            channel.answer({"failure": one_line(error)})
            raise


if __name__ == "__main__":
    main()
