"""The recipe for a user's own data: its settings come from the rows, the model, and a hundred sampled answers."""

import logging
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.errors import InputError, counted
from drpo.model import loading
from drpo.model.device import choose_device
from drpo.model.names import SMOLLM2
from drpo.model.precision import resolve_precision
from drpo.objectives import DRPO
from drpo.reductions import Horizon
from drpo.rollout import EpisodeDriver, TransformersEngine, encode_prompt
from drpo.rollout.template_settings import set_template
from drpo.tasks import Records
from drpo.tasks.columns import Guess, columns_of, guess_fields, guess_mark, guess_reward
from drpo.tasks.records import as_text
from drpo.tasks.rows import Row, reach, read_rows
from drpo.train.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    Run,
    TrainerConfig,
    configure,
)
from drpo.train.optim import AdamW, Linear
from drpo.types import Problem, Sampling

log = logging.getLogger("drpo")

FORMS = {"exact_match": "Reply with the answer alone.", "math_verify": "Put the final answer in \\boxed{}."}
"""Guessed reward -> the system message that asks for what it reads, where the user wrote neither one nor examples."""
MOST_HELD_OUT, FEW_HELD_OUT = 200, 50
SAMPLED = 100
"""Answers that are sampled to see how long they get."""
FIRST_CAP, CAP_CPU, CAP = 64, 128, 1024
"""Tokens at which sampled answers are cut: at first, at most on a CPU, at most elsewhere."""
MOST_READ = 10_000
"""Reference answers whose tokens are counted."""
MOSTLY = 0.9
"""Share of the sampled answers that max_new_tokens leaves whole."""
RATE, RATE_PARAMETERS, LEAST_RATE = 2e-5, 135e6, 1e-6
"""The learning rate at this size of a model; it falls with the size, to the least."""


@dataclass(frozen=True)
class OwnData:
    """What a user says about their data; None is guessed.

    Args:
        path: as `Records.path`.
        prompt_field, answer_field: fields of the question and of the answer.
        system: the system message.
        reward: the spec of a reward.
        shots: number of rows, the first ones, that are shown as examples before every question.
    """

    path: str
    prompt_field: str | None = None
    answer_field: str | None = None
    system: str | None = None
    reward: str | None = None
    shots: int = 0


@dataclass(frozen=True)
class Measured:
    """What a model and its sampled answers say.

    Args:
        parameters: of the model.
        longest: tokens of the longest reference answer.
        lengths: tokens of the sampled answers; those that were cut have `cap`.
        cap: tokens at which answers were cut at the latest.
    """

    parameters: int
    longest: int
    lengths: tuple[int, ...]
    cap: int

    @property
    def max_new_tokens(self) -> int:
        """Room for nine of ten sampled answers and for the longest reference answer, in eights.

        Example:
            >>> Measured(135_000_000, longest=3, lengths=(9,) * 95 + (128,) * 5, cap=128).max_new_tokens
            16
        """
        usual = sorted(self.lengths)[math.ceil(MOSTLY * len(self.lengths)) - 1]
        return 8 * math.ceil(max(usual, self.longest + self.longest // 2) / 8)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, which falls with the number of parameters.

        Example:
            >>> [Measured(n, 1, (1,), 64).learning_rate for n in (10**6, 494_000_000, 8 * 10**9)]
            [2e-05, 5.5e-06, 1e-06]
        """
        scaled = RATE * min(1.0, RATE_PARAMETERS / self.parameters)
        return max(LEAST_RATE, float(f"{scaled:.1e}"))

    def __str__(self) -> str:
        """Return one line for the log."""
        n, cut = len(self.lengths), sum(length >= self.cap for length in self.lengths)
        reference = f"the longest reference answer has {counted(self.longest, 'token')}"
        if cut > (1 - MOSTLY) * n:
            shorter = "a system message or --shots makes them shorter, --sampling.max-new-tokens sets another limit"
            return f"{reference}; {cut} of {n} sampled answers were cut at {self.cap}; {shorter}"
        return f"{reference}; {MOSTLY:.0%} of {n} sampled answers have at most so many"


def read_own(data: OwnData) -> Records:
    """Return a user's rows as a task, and log what was guessed.

    Raises:
        InputError: the data cannot be read or understood, or is too little.
    """
    rows = read_rows(data.path, "train")
    if not rows:
        raise InputError(f"{data.path}: there is no row in it")
    prompt, answer = guess_fields(columns_of(rows), data.prompt_field, data.answer_field, data.path)
    mark = guess_mark([reach(row, answer.value, data.path) for row in rows if answer.value.partition(".")[0] in row])
    shots = _shots(rows, prompt.value, answer.value, data)
    whole = Records(data.path, prompt.value, answer.value, answer_after=mark, holdout=0, shots=shots)
    held_out = n_held_out(whole.counts.train)
    if not held_out:
        raise InputError(f"{data.path}: too few different questions to train and to evaluate on ({whole.counts})")
    answers = [problem.answer for problem in whole.sample(whole.counts.train, 0, 0)]
    reward = guess_reward(answers) if data.reward is None else Guess(data.reward)
    form = FORMS.get(reward.value) if data.system is None and data.reward is None and not shots else None
    system = data.system if form is None else form
    task = replace(whole, system=system, holdout=held_out, reward_name=reward.value)
    for name, guess in (("question", prompt), ("answer", answer), ("reward", reward)):
        log.info("%s: %s: %s%s", data.path, name, guess.value, f" ({guess.reason})" if guess.reason else "")
    if form:
        log.info("%s: system: %s (the form that the reward reads; --system says it otherwise)", data.path, form)
    if mark:
        log.info("%s: the final answer is what follows %s", data.path, mark)
    return task


def n_held_out(questions: int) -> int:
    """Return how many questions are held out: a fifth, from 50 to 200, and at most half.

    Fewer than 50 leave an accuracy uncertain by more than 14 points either way.

    Example:
        >>> [n_held_out(n) for n in (1, 20, 100, 400, 5000)]
        [0, 10, 50, 80, 200]
    """
    return min(MOST_HELD_OUT, max(questions // 5, min(FEW_HELD_OUT, questions // 2)))


def neutral(task: Records, model: str = SMOLLM2) -> Run:
    """Return the run for a user's data, before anything is measured; `fitted` follows."""
    # Samples, updates and radius are the demo's. It has 16 prompts, of a few words; with a system message and examples
    # a step of as many takes up to 30 s on two cores without bf16.
    prompts = min(8, task.counts.train)
    return Run(
        name=re.sub(r"[^\w.-]+", "-", Path(task.path).name.split(".")[0]) or "own",
        model=ModelConfig(model),
        data=DataConfig(task, prompts=prompts),
        rollout=RolloutConfig(sampling=Sampling(samples=8, max_new_tokens=CAP_CPU)),
        objective=ObjectiveConfig(DRPO(0.2), reduction=Horizon(CAP_CPU)),
        optimizer=OptimizerConfig(AdamW(RATE), Linear()),
        trainer=TrainerConfig(steps=20, updates=min(4, prompts), micro_batch_tokens=2048),
        evaluation=EvaluationConfig(problems=MOST_HELD_OUT),
    )


def fitted(run: Run, given: Collection[str]) -> Run:
    """Return a run of own data with what `measured_changes` says."""
    return configure(run, **measured_changes(run, given))


def measured_changes(run: Run, given: Collection[str]) -> dict[str, Any]:
    """Return the settings that a run's model and a hundred sampled answers suggest, for `configure`, and log them.

    Args:
        run: of `neutral`, with the user's changes.
        given: options that the user set, which stay.
    """
    length_said = "sampling.max_new_tokens" in given
    rate_said = not {"learning_rate", "optimizer"}.isdisjoint(given)
    changes: dict[str, Any] = {}
    if not (length_said and rate_said):
        measured = measure(run, sampled=0 if length_said else SAMPLED)
        changes |= {} if rate_said else {"learning_rate": measured.learning_rate}
        changes |= {} if length_said else {"sampling.max_new_tokens": measured.max_new_tokens}
        if not length_said:
            log.info("max_new_tokens=%d: %s", measured.max_new_tokens, measured)
    length = changes.get("sampling.max_new_tokens", run.rollout.sampling.max_new_tokens)
    return changes if "reduction" in given else changes | {"reduction": Horizon(length)}


def measure(run: Run, sampled: int = SAMPLED) -> Measured:
    """Return what a run's model, its reference answers and sampled answers to its first questions say.

    Args:
        run: of `neutral`.
        sampled: number of answers to sample; 0 for none.
    """
    model, tokenizer = loading.load(run.model.name)
    set_template(tokenizer, run.model.chat_template or None, run.model.chat_template_kwargs)
    task = run.data.task
    n_questions = task.counts.train if isinstance(task, Records) else sampled
    problems = task.sample(min(n_questions, MOST_READ), 0, run.seed)
    answers: Any = tokenizer([problem.answer for problem in problems], add_special_tokens=False)
    longest = max(map(len, answers["input_ids"]))
    lengths = _lengths(run, model, tokenizer, problems[:sampled], 2 * longest) if sampled else {}
    n_parameters = sum(p.numel() for p in model.parameters())
    return Measured(n_parameters, longest, tuple(lengths.values()), cap=max(lengths.values(), default=0))


def _lengths(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], least: int
) -> dict[str, int]:
    """The tokens of a sampled answer to each problem; where too many are cut, those are sampled on, up to a cap."""
    device = choose_device(run.model.device)
    engine = TransformersEngine(model, precision=resolve_precision(run.rollout.precision, device), device=device)
    driver = EpisodeDriver.of(engine, model, tokenizer, run.rollout.stop)
    cap = max(CAP_CPU if device.type == "cpu" else CAP, least)
    if driver.limits.fixed and driver.limits.positions is not None:
        cap = max(1, min(cap, driver.limits.positions - max(len(encode_prompt(tokenizer, p)) for p in problems)))
    lengths: dict[str, int] = {}
    at, left = min(FIRST_CAP, cap), list(problems)
    while len(left) > (1 - MOSTLY) * len(problems):
        sampling = replace(run.rollout.sampling, samples=1, max_new_tokens=at, top_logprobs=0)
        answers = [group[0] for group in driver.run(left, sampling, ("lengths", run.seed))]
        lengths |= {answer.problem_id: answer.n_sampled for answer in answers}
        left = [p for p, answer in zip(left, answers, strict=True) if answer.finish_reason == "length"]
        if at == cap:
            break
        at = min(2 * at, cap)
    return lengths


def _shots(rows: Sequence[Row], prompt: str, answer: str, data: OwnData) -> tuple[tuple[str, str], ...]:
    """The first rows as examples."""
    if not 0 <= data.shots <= len(rows) // 2:
        raise InputError(f"--shots {data.shots}: from 0 to half of the {len(rows):,} rows of {data.path}")
    shots = []
    for number, row in enumerate(rows[: data.shots], 1):
        where = f"{data.path} row {number}"
        asked, said = (reach(row, name, where) for name in (prompt, answer))
        if isinstance(asked, list):
            raise InputError(f"--shots {data.shots}: {where}: the question is a list of messages, which has its own")
        shot = as_text(asked, prompt, where), as_text(said, answer, where)
        if not all(shot):
            raise InputError(f"--shots {data.shots}: {where}: has no question or no answer, and can be no example")
        shots.append(shot)
    return tuple(shots)
