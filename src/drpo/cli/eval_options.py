"""The options of `drpo eval`; their defaults are those of the evaluated run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from drpo.cli.folder import open_run
from drpo.cli.options import flag, parse
from drpo.cli.template_options import split_template
from drpo.errors import InputError, as_typed
from drpo.model.precision import DTYPES
from drpo.rewards import RewardConfig
from drpo.train.config import MOST_COMPLETIONS, Run
from drpo.train.records import is_run, is_sft
from drpo.train.verify import holds_final_model
from drpo.types import Sampling

_WITH_ANY = frozenset({"problems", "precision", "device", "seed", "json", "trust_remote_code"})
HARNESSES: Mapping[str, frozenset[str]] = {
    "lm_eval": frozenset({"lm_eval_chat", "lm_eval_folder"}),
    "inspect": frozenset({"inspect_logs", "sampling"}),
}
"""The option that names tasks of another harness, and those that go with it besides the ones that go with any."""
TITLES = {"lm_eval": "lm-eval", "inspect": "inspect"}
OF_HARNESS = frozenset({*HARNESSES, "lm_eval_chat", "lm_eval_folder", "inspect_logs"})
"""The options that drpo's own tasks have not."""


@dataclass(frozen=True)
class EvalOptions:
    """Score a model, or a finished run, on held-out problems: mean reward with a 95 % interval.

    The mean is called accuracy if every reward is 0 or 1.

      drpo eval smollm2-135m --task 'addition(1, 50)' --problems 100

    Args:
        task: held-out problems of addition(1, 50), gsm8k, records('my.jsonl', ...), ...; default: the run's own.
        reward: exact_number, math_verify, module:function, or a sum of several; default: the task's own.
        problems: number of problems.
        sampling: sampling settings; samples is k of avg@k. Greedy and truncated sampling are allowed here.
        stop: tokens that end a turn, each by its text or its id; default: the run's, or the model's EOS tokens and the
            token with which its chat template ends a turn.
        chat_template: a file with a Jinja template in place of the tokenizer's. --template.NAME VALUE sets an argument
            of the template, such as --template.enable-thinking false.
        template: those arguments.
        drop_long_prompts: skip problems whose prompts are too long for the model; otherwise they are an error.
        reward_pool: processes and limits of the reward, and the handling of its failures; default: the run's own.
        precision: auto, fp32, bf16, fp16, int8, fp8_weights, fp8.
        device: auto (cuda, else Apple's mps, else cpu), cuda, mps, cpu.
        seed: of the sampling.
        json: print the result as JSON.
        lm_eval: tasks of lm-eval, if it is installed, in place of a task of drpo: arc_easy, gsm8k, ...; the first
            --problems of each.
        lm_eval_chat: put their prompts through the model's chat template.
        lm_eval_folder: a folder with tasks of lm-eval of your own, as YAML.
        inspect: tasks of inspect, if inspect-ai is installed, in place of a task of drpo: my_task.py, my_task.py@name,
            inspect_evals/gsm8k; the first --problems of each.
        inspect_logs: a folder for inspect's logs, which `inspect view` shows; without it they are not kept.
        trust_remote_code: import the task and reward that a run's configuration names as module:name, and ask the
            address that its reward names; only for folders that you trust.
    """

    task: str | None = None
    reward: str | None = None
    problems: int = 200
    sampling: Sampling = field(default_factory=lambda: Sampling(samples=1))
    stop: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: where its turns end)")] = ()
    chat_template: Path | None = None
    template: Annotated[Mapping[str, Any] | None, tyro.conf.Suppress] = None
    drop_long_prompts: bool = False
    reward_pool: RewardConfig = field(default_factory=RewardConfig)
    precision: str = "auto"
    device: str = "auto"
    seed: int = 0
    json: bool = False
    lm_eval: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = ()
    lm_eval_chat: bool = False
    lm_eval_folder: Path | None = None
    inspect: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = ()
    inspect_logs: Path | None = None
    trust_remote_code: bool = False


def read_options(name: str, arguments: list[str]) -> tuple[Run | None, EvalOptions, bool]:
    """Parse the options and open the run.

    Args:
        name: a model, or a run's folder.
        arguments: of the command line.

    Returns:
        The folder's run, or None for a model; the options; whether sampling is as in the run's evaluations.

    Raises:
        InputError: the run has not finished, an option is invalid, or the folder's configuration names code.
    """
    of_rl = is_run(name) and not is_sft(Path(name))
    run = open_run(Path(name), trust_remote_code=False, needed=()) if of_rl else None
    if run is not None and not holds_final_model(Path(name), run.trainer.steps):
        raise InputError(
            f"{name}: the run has not finished; `drpo train --resume {as_typed(name)}` goes on with it, and `drpo "
            "export` makes a model of its last checkpoint"
        )
    default = EvalOptions() if run is None else _of_the_run(run)
    template, arguments = split_template(arguments)
    options = replace(parse(EvalOptions, arguments, f"drpo eval {as_typed(name)}", default), template=template or None)
    if not 1 <= options.problems <= MOST_COMPLETIONS:
        raise InputError(f"--problems {options.problems}: must be from 1 to {MOST_COMPLETIONS:,}")
    if any(getattr(options, name) != getattr(default, name) for name in OF_HARNESS):
        require_harness_options(options, default)
        return run, options, False
    if run is not None:
        needed_fields = ("eval_task" if run.evaluation.task else "task", *(() if options.reward else ("reward",)))
        run = open_run(Path(name), options.trust_remote_code, needed=() if options.task else needed_fields)
    settings = ("sampling", "stop", "chat_template", "template")
    as_trained = all(getattr(options, setting) == getattr(default, setting) for setting in settings)
    return run, options, as_trained


def require_harness_options(options: EvalOptions, default: EvalOptions) -> None:
    """Raise for options that do not go with the tasks of another harness.

    Args:
        options: of the command line.
        default: what they are where they are not given.

    Raises:
        InputError: tasks of two harnesses, or of none; an option that such a task has itself; a precision that is no
            dtype; sampling that the harness cannot do.
    """
    given = [f.name for f in fields(options) if getattr(options, f.name) != getattr(default, f.name)]
    harnesses = [name for name in HARNESSES if name in given]
    if len(harnesses) > 1:
        raise InputError("--lm-eval and --inspect are two harnesses; evaluate with one of them at a time")
    if not harnesses:
        harness = next(h for h in HARNESSES if HARNESSES[h] & set(given))
        raise InputError(f"{flag(harness)} is missing: name the tasks, such as --lm-eval arc_easy or --inspect task.py")
    (harness,) = harnesses
    for name in given:
        if name not in _WITH_ANY | HARNESSES[harness] | {harness}:
            raise InputError(f"{flag(name)}: tasks of {TITLES[harness]} have this themselves; leave it out")
    if options.precision not in ("auto", *DTYPES):
        raise InputError(f"--precision {options.precision}: {TITLES[harness]} computes in auto, {', '.join(DTYPES)}")


def _of_the_run(run: Run) -> EvalOptions:
    return EvalOptions(
        sampling=replace(run.rollout.sampling, samples=run.evaluation.samples),
        problems=run.evaluation.problems,
        stop=run.rollout.stop,
        reward_pool=run.rewards.pool,
        drop_long_prompts=run.data.drop_long_prompts,
    )
