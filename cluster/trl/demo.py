"""SmolLM2-135M learns to add in TRL, on a CPU: what `drpo train demo` does, with TRL's trainer around the objective.

    python cluster/trl/demo.py --objective 'drpo(0.2)' --out runs/trl-demo

Same model, task, sampler, batch, learning rate and held-out problems. drpo's own engine samples, through TRL's
`rollout_func`, because transformers' generate reports no log-probabilities and vLLM wants a GPU. About half an hour on
two cores.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo import models
from drpo.adapters.trl import DRPOConfig, DRPOTrainer
from drpo.precision import resolve_precision
from drpo.recipes import find
from drpo.rewards import RewardPool, exact_number
from drpo.rollout import TransformersEngine
from drpo.train.config import Run
from drpo.train.evaluate import evaluate
from drpo.types import Problem


class Sampler:
    """drpo's engine as TRL's `rollout_func`: the trainer's weights, rounded as a sampler's are, and their own mu."""

    def __init__(self, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.run = run
        self.engine = TransformersEngine(model, tokenizer, precision=resolve_precision("auto", model.device))
        self.rollouts = 0

    def __call__(self, prompts: list[Any], trainer: DRPOTrainer) -> dict[str, list[list[Any]]]:
        """One completion for each of `prompts`, in which every prompt stands `num_generations` times in a row."""
        self.engine.load(trainer.accelerator.unwrap_model(trainer.model).state_dict(), self.rollouts)
        questions = [prompt[-1]["content"] for prompt in prompts[:: self.run.sampling.samples]]
        problems = [Problem(str(i), question, "") for i, question in enumerate(questions)]
        drawn = self.engine.generate(problems, self.run.sampling, seed=("trl", self.run.seed, self.rollouts))
        self.rollouts += 1
        return {
            "prompt_ids": [c.prompt_ids.tolist() for c in drawn],
            "completion_ids": [c.token_ids.tolist() for c in drawn],
            "logprobs": [c.behavior_logp.tolist() for c in drawn],
        }


def problems_of(run: Run) -> Dataset:
    """Every problem of the run, in the order in which drpo's own trainer would meet them."""
    met = [problem for step in range(run.steps) for problem in run.task.sample(run.prompts, step, run.seed)]
    rows = [{"prompt": [{"role": "user", "content": p.prompt}], "answer": p.answer} for p in met]
    return Dataset.from_list(rows)


def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number of the text is the sum."""
    texts = [completion[0]["content"] for completion in completions]
    return [exact_number(Problem("", "", a), text) for text, a in zip(texts, answer, strict=True)]


def config_of(run: Run, objective: str, out: Path) -> DRPOConfig:
    """TRL's words for the run: `steps` rollouts of prompts * samples completions, `updates` updates on each."""
    rows = 8
    per_update = run.prompts * run.sampling.samples // run.updates // rows
    return DRPOConfig(
        output_dir=str(out),
        objective=objective,
        loss_type="dr_grpo",  # a sum over max_completion_length, as the recipe's Horizon(32)
        scale_rewards="none",
        num_generations=run.sampling.samples,
        max_completion_length=run.sampling.max_new_tokens,
        temperature=run.sampling.temperature,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=per_update,
        steps_per_generation=per_update * run.updates,
        max_steps=run.steps * run.updates,
        shuffle_dataset=False,
        learning_rate=run.learning_rate,
        lr_scheduler_type="linear",
        adam_beta1=run.betas[0],
        adam_beta2=run.betas[1],
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
        seed=run.seed,
        use_cpu=True,
        bf16=True,
        gradient_checkpointing=False,
        beta=0.0,
        logging_steps=run.updates,
        save_strategy="no",
        report_to="none",
    )


def main() -> None:
    """Evaluate, train, evaluate again on the same problems, save the model and the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--objective", default="drpo(0.2)", help="its spelling (default: %(default)s)")
    options.add_argument("--steps", type=int, default=find("demo").steps, help="rollouts (default: %(default)s)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=Path("runs/trl-demo"))
    chosen = options.parse_args()
    run = replace(find("demo"), steps=chosen.steps, seed=chosen.seed)
    model, tokenizer = models.load(run.model)
    sampler = Sampler(run, model, tokenizer)
    trainer = DRPOTrainer(
        model,
        reward,
        args=config_of(run, chosen.objective, chosen.out),
        train_dataset=problems_of(run),
        processing_class=tokenizer,
        rollout_func=sampler,
    )
    held_out, law = run.task.held_out(run.eval_problems), replace(run.sampling, samples=1)
    results = []
    with RewardPool(exact_number) as pool:
        results.append(evaluate(sampler.engine, held_out, law, pool, seed=run.seed, step=0)[0])
        trainer.train()
        sampler.engine.load(trainer.accelerator.unwrap_model(trainer.model).state_dict(), run.steps)
        results.append(evaluate(sampler.engine, held_out, law, pool, seed=run.seed, step=run.steps)[0])
    trainer.save_model(str(chosen.out / "model"))
    figures = {"objective": chosen.objective, "seed": run.seed, "evaluations": [asdict(r) for r in results]}
    (chosen.out / "figures.json").write_text(json.dumps(figures | {"log": trainer.state.log_history}, indent=1) + "\n")
    for result in results:
        print(f"after {result.step} rollouts: {result}")


if __name__ == "__main__":
    main()
