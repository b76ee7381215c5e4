"""Writes the recipe for a user's own data as Python with comments, which the user edits."""

from typing import Any

from drpo.errors import as_typed, one_line
from drpo.train.config import Run

_TEXT = '''"""What `drpo init` wrote for {path}. Change what you like, then: drpo train {file}

`drpo train {file} --help` lists every field that a run has; each can be set here, or on the command line.
"""

from drpo.objectives import DRPO
from drpo.reductions import Horizon
from drpo.tasks import Records
from drpo.train.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    Run,
    TrainerConfig,
)
from drpo.train.optim import AdamW, Linear
from drpo.types import Sampling

MAX_NEW_TOKENS = {max_new_tokens}
"""Tokens after which an answer is cut: nine of ten that the model sampled for `drpo init` were shorter, unless it said
otherwise. A higher limit costs time only where answers use it."""


def recipe() -> Run:
    """Train on the questions and answers of {path}."""
    task = Records(
        path={source!r},
        prompt={prompt!r},  # the column of the question
        answer={answer!r},  # the column of the answer
        answer_after={answer_after!r},  # the answer is what follows this mark in its column; None: all of it
        system={system!r},  # the system message; None: the chat template's own, if it has one
        shots={shots},  # examples before every question: pairs of a question and its reply
        holdout={holdout},  # questions that are only evaluated on
        reward_name={reward!r},  # exact_number, exact_match, math_verify, or your own "module:function"
    )
    return Run(
        name={name!r},  # the run goes to runs/NAME
        model=ModelConfig({model!r}),  # smollm2-135m, a folder, or a hub id, owner/name
        data=DataConfig(task, prompts={prompts}),  # questions a step; of more, each step is surer and slower
        rollout=RolloutConfig(sampling=Sampling(samples={samples}, max_new_tokens=MAX_NEW_TOKENS)),  # answers of each
        # DRPO, as in the demo; others: drpo train {file} --objective 'ppo(0.2, 0.28)'
        objective=ObjectiveConfig(DRPO({delta}), reduction=Horizon(MAX_NEW_TOKENS)),
        optimizer=OptimizerConfig(AdamW({rate!r}), Linear()),  # the learning rate: lower for larger models
        trainer=TrainerConfig(steps={steps}, updates={updates}, micro_batch_tokens={micro_batch_tokens}),
        evaluation=EvaluationConfig(problems={problems}),  # held-out questions, before and after
    )
'''


def recipe_text(run: Run, file: str) -> str:
    """Return the text of a file whose `recipe()` returns this run.

    Args:
        run: of `drpo.recipes.own_data.neutral` and `fitted`.
        file: its name, for the comments.
    """
    task: Any = run.data.task
    loss: Any = run.objective.loss
    shots = "".join(f"\n            {shot!r}," for shot in task.shots)
    path, shown = (one_line(name).replace("\\", "/").replace('"', "'") for name in (task.path, file))
    return _TEXT.format(
        path=path,
        file=as_typed(shown),
        source=task.path,
        prompt=task.prompt,
        answer=task.answer,
        answer_after=task.answer_after,
        system=task.system,
        shots=f"({shots}\n        )" if shots else "()",
        holdout=task.holdout,
        reward=task.reward_name,
        name=run.name,
        model=run.model.name,
        prompts=run.data.prompts,
        samples=run.rollout.sampling.samples,
        max_new_tokens=run.rollout.sampling.max_new_tokens,
        delta=loss.delta,
        rate=run.optimizer.policy.learning_rate,
        steps=run.trainer.steps,
        updates=run.trainer.updates,
        micro_batch_tokens=run.trainer.micro_batch_tokens,
        problems=run.evaluation.problems,
    )
