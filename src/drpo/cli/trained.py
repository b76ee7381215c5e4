"""The model of a run, as it was trained: at its end, or at a checkpoint; also of a run that has not finished."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.cli.folder import open_run
from drpo.errors import InputError, as_typed
from drpo.model import loading
from drpo.model.nf4 import hold_base_
from drpo.model.policy import Policy
from drpo.model.precision import FP32
from drpo.spec import runs_code
from drpo.train import checkpoint, stored
from drpo.train.config import ModelConfig, Run
from drpo.train.config.sft import load_sft
from drpo.train.records import CHECKPOINTS, CONFIG, MODEL, is_run, is_sft
from drpo.train.setup import load_model
from drpo.train.verify import holds_final_model
from drpo.train.warm_up import placed, started


@dataclass(frozen=True)
class TrainedModel:
    """What a run's configuration says of the model that it trains.

    Args:
        model: that its updates begin with: of the configuration, or the one that its warm-up fine-tuned.
        first: of the configuration; where another run's weights are it, in this run's folder.
        stop: tokens that end a turn, as named there; empty for the model's own.
        temperature: of the trained distribution.
        steps: that the run has in all.
        seed: of adapters' initial values.
    """

    model: ModelConfig
    first: ModelConfig
    stop: tuple[str, ...]
    temperature: float
    steps: int
    seed: int


def trained_model(run: Path, trust_remote_code: bool) -> TrainedModel:
    """Return what a run's configuration says of its model; nothing that the folder names is imported.

    Args:
        run: its folder.
        trust_remote_code: allow a model that the configuration names as module:name, which whoever loads it imports.

    Raises:
        InputError: the configuration names such a model, and that is not allowed; or it cannot be read; or the run's
            warm-up is not done.
    """
    if not is_sft(run):
        config = open_run(run, trust_remote_code, needed=("model",))
        return TrainedModel(
            started(config, run).model,
            placed(config, run).model,
            config.rollout.stop,
            config.rollout.sampling.temperature,
            config.trainer.steps,
            config.seed,
        )
    sft = load_sft(run, trust_remote_code)
    if runs_code(sft.model.name) and not trust_remote_code:
        raise InputError(
            f"{run / CONFIG}: model.name={sft.model.name!r} would run code that this folder names; where you trust it, "
            "add --trust-remote-code"
        )
    return TrainedModel(sft.model, sft.model, (), 1.0, sft.trainer.steps, sft.seed)


def trained(
    run: Path, step: int, trust_remote_code: bool, option: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a run, at its end or at a checkpoint.

    Args:
        run: its folder.
        step: the checkpoint after so many steps; 0 for the newest weights.
        trust_remote_code: import the model that the run's configuration names as module:name.
        option: what asked for it, for messages.

    Raises:
        InputError: there is no such checkpoint, or it is damaged.
    """
    chosen, _ = weights_of(run, step, option)
    if chosen.name == MODEL:
        return loading.load(str(chosen))
    policy, tokenizer = restored(run, chosen, trust_remote_code)
    return policy.plain(), tokenizer


def restored(run: Path, chosen: Path, trust_remote_code: bool) -> tuple[Policy, PreTrainedTokenizerBase]:
    """Return the policy of a run as a checkpoint has it, adapters apart, and its tokenizer.

    Args:
        run: its folder.
        chosen: the checkpoint.
        trust_remote_code: as for `trained`.

    Raises:
        InputError: the checkpoint is damaged.
    """
    config = trained_model(run, trust_remote_code)
    model, tokenizer = load_model(config.model, config.stop)
    hold_base_(model, config.model.base_precision)
    rank = config.model.lora_rank
    policy = Policy(model, precision=FP32, temperature=config.temperature, lora_rank=rank, seed=config.seed)
    stored.require_sound(chosen)
    checkpoint.restore(chosen, policy.checkpointed(), None)
    return policy, tokenizer


def untrained(
    run: Path, trust_remote_code: bool, warm: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model that a run began with, with the run's chat template.

    Args:
        run: its folder.
        trust_remote_code: as for `trained`.
        warm: of a run with a warm-up the model after it, which the run's adapters belong to.
    """
    config = trained_model(run, trust_remote_code)
    chosen = config.model if warm else config.first
    model, tokenizer = load_model(chosen, config.stop)
    if chosen.base_precision == "fp32":
        return model, tokenizer
    hold_base_(model, chosen.base_precision)
    policy = Policy(model, precision=FP32, temperature=config.temperature, lora_rank=chosen.lora_rank)
    return policy.plain(), tokenizer  # adapters add nothing before their first step


def weights_of(run: Path, step: int, option: str) -> tuple[Path, int]:
    """Return the folder of a run's weights, its model's or a checkpoint, and the steps that they had been trained.

    Args:
        run, step, option: as for `trained`.

    Raises:
        InputError: there is no such checkpoint.
    """
    there, steps = stored.steps(run / CHECKPOINTS), _steps(run)
    final = holds_final_model(run, steps)
    if final and step in (0, steps):
        return run / MODEL, steps
    if not there and not final:
        command = "drpo sft" if is_sft(run) else "drpo train"
        resume = f"{command} --resume {as_typed(run)}"
        raise InputError(f"{run}: there is no checkpoint yet; `{resume}` goes on with the run")
    if step and step not in there:
        known = ", ".join(map(str, sorted({*there, *([steps] if final else [])})))
        raise InputError(f"{option}: {run} has no weights of that step, only those after step {known}")
    return there[step or max(there)], step or max(there)


def _steps(run: Path) -> int:
    return load_sft(run, False).trainer.steps if is_sft(run) else open_run(run, False, needed=()).trainer.steps


def model_of(
    name: str, step: int, trust_remote_code: bool, command: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a run or of a name, and its tokenizer.

    Args:
        name: a run's folder, or a model as `drpo.model.loading.load` takes it.
        step: of a run: the checkpoint after so many steps; 0 for the newest weights.
        trust_remote_code: as for `trained`.
        command: for messages.

    Raises:
        InputError: there is no such model or checkpoint.
    """
    if is_run(name):
        return trained(Path(name), step, trust_remote_code, f"{command}: --step {step}")
    if step:
        raise InputError(f"{command}: --step {step}: {name} is not a run of drpo; name the step's own folder")
    return loading.load(name)


def run_of(name: str, trust_remote_code: bool) -> Run | None:
    """Return the configuration of a run of RL, read without running code; None for anything else.

    Args:
        name: a folder or a model's name.
        trust_remote_code: import the objects that it names as module:name.
    """
    of_rl = is_run(name) and not is_sft(Path(name))
    return open_run(Path(name), trust_remote_code, needed=()) if of_rl else None
