"""The present tree: how it is asked to run, and where its figures are. Changed with it; it began as a copy of `old.py`.

Settings, and the keys that `driver.Update` holds, stay in the recorded commit's words: what has another name by now is
translated here, in `flags` and in `_tokens`; keys of the files that a run writes are in `renamed.py`.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import driver
import torch
import world
from runs import Settings
from transformers import GenerationConfig

import drpo.cli.train as command
from drpo.cli import main
from drpo.model import loading
from drpo.rewards import in_process
from drpo.train.session import Session

ascii_share, flaky, stopping = (in_process(f) for f in (world.ascii_share, world.flaky, world.stopping))
ROLLOUT_PLACE = ("step", "problem", "sample")
"""Keys of a record of rollouts.jsonl that say which completion it is."""


RENAMED = {
    "lag": "async_steps",
    "refresh_every": "sync_every",
    "marking.on_failure": "reward_pool.on_failure",
    "marking.processes": "reward_pool.processes",
}
"""Settings whose options have another name by now."""


def short() -> Any:
    """The tiny model, which about every ninth token ends, so that completions differ in length."""
    model, tokenizer = loading.tiny()
    model.generation_config = GenerationConfig(eos_token_id=list(range(0, 257, 9)), pad_token_id=0)
    return model, tokenizer


def flags(settings: Settings) -> list[str]:
    """Settings as options of `drpo train`."""
    words = []
    for name, value in _specs(settings).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def _specs(settings: Settings) -> Settings:
    """The learning rate, betas and weight decay as the optimiser's spec, schedule and warm-up as the schedule's."""
    rest = {RENAMED.get(name, name): value for name, value in settings.items()}
    betas, decay = rest.pop("betas", (0.9, 0.999)), rest.pop("weight_decay", 0.01)
    if settings.keys() & {"betas", "weight_decay"}:
        rest["optimizer"] = f"adamw({rest.pop('learning_rate')}, {betas}, {decay})"
    if "schedule" in rest:
        rest["schedule"] = f"{rest['schedule']}(warmup={rest.pop('warmup', 0)})"
    critic, rate = str(rest.get("critic", "")), "learning_rate="
    if rate in critic:
        stated = critic.partition(rate)[2].split(",")[0].rstrip(")")
        rest["critic"] = critic.replace(f"{rate}{stated}, ", "").replace(f"{rate}{stated}", "")
        rest["critic_optimizer"] = f"adamw({stated}, {betas}, {decay})"
    return rest


def train(recipe: str, settings: Settings, folder: Path) -> int:
    return main(["train", recipe, "--out", str(folder), "--plain", "--no-doctor", *flags(settings)])


def resume(folder: Path) -> int:
    return main(["train", "--resume", str(folder), "--plain", "--no-doctor", "--trust-remote-code"])


def weights(folder: Path) -> dict[str, Path]:
    """The files of weights in a run's folder: of the final model, and of policy and critic in its checkpoints."""
    names = {"model": folder / "model" / "model.safetensors"}
    for step in sorted((folder / "checkpoints").glob("step-*")):
        names[f"policy after {step.name}"] = step / "weights.safetensors"
        names[f"critic after {step.name}"] = step / "critic_weights.safetensors"
    return {name: path for name, path in names.items() if path.exists()}


_place: dict[Any, tuple[str, int]] = {}
"""Which completion a sequence is of."""


def watch(saw: Callable[[int, list[driver.Update]], None]) -> None:
    """Have `saw` called at the end of every step with what its updates trained on."""
    finish_step = Session.finish_step

    def watched(session: Session, groups: Any, batches: Any, stats: Any, lessons: Any) -> None:
        _place.clear()
        _place.update({s: (e.problem_id, e.sample) for g in groups for e in g.episodes for s in e.sequences})
        saw(session.step + 1, [_update(b, s) for b, s in zip(batches, stats, strict=True)])
        finish_step(session, groups, batches, stats, lessons)

    Session.finish_step = watched  # type: ignore[method-assign]


def _update(batch: Any, stats: Any) -> driver.Update:
    figures = {"loss": stats.loss, "grad_norm": stats.grad_norm, "learning_rate": stats.learning_rate}
    counts = {"taken": stats.taken, "n_tokens": batch.n_tokens, "n_skipped": batch.n_skipped}
    completions = [_place[c.sequence] for c in batch.credits]
    means = [float(c.advantage.double().mean().float()) for c in batch.credits]
    advantages = {driver.who(*c): mean for c, mean in zip(completions, means, strict=True)}
    tokens = {driver.who(*completions[i]): columns for i, columns in _tokens(batch, stats)}
    return driver.Update({**figures, **counts}, advantages, tokens)


def _tokens(batch: Any, stats: Any) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """For each trained completion, by its number in the batch: a column of figures for each of its tokens."""
    micros = batch.micro_batches
    if not micros:
        return
    names = ("target", "behavior_logp", "advantage", "weight", "value", "returns")
    given = {n: torch.cat([getattr(m, n) for m in micros]) for n in names if getattr(micros[0], n) is not None}
    if all(m.top_logprobs is not None for m in micros):
        given |= {f"top_{n}": torch.cat([getattr(m.top_logprobs, n) for m in micros]) for n in ("ids", "logp")}
    trained = torch.cat([m.sequence for m in micros])
    seen = {"logp": stats.tokens.logp, "entropy": stats.entropy, "divergence": stats.tokens.divergence}
    for i in trained.unique().tolist():
        columns = {n: column[trained == i] for n, column in given.items()}
        columns |= {n: column[stats.tokens.sequence == i] for n, column in seen.items() if column is not None}
        yield i, {n: column.tolist() for n, column in columns.items()}


# What the pictures of a run show is not compared, and they take longer than a tiny run.
command.write_report = lambda *_: None  # type: ignore[assignment]

if __name__ == "__main__":
    driver.main(sys.modules[__name__])
