"""How far a sampler's probabilities are from the trainer's, with the same weights in both."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.workers.drpo_step import configuration
from benchmarks.workers.measure import Meter
from benchmarks.workers.protocol import Record, Repetition, serve
from drpo.doctor.probe_batch import trainer_logp
from drpo.tasks import sample_unseen
from drpo.train.config import configure
from drpo.train.setup import Components, build
from drpo.types import Episode

FAR = 0.15
"""A gap of probabilities that counts as far: the objectives' usual threshold."""


@torch.no_grad()
def both(components: Components, completions: list[Episode]) -> tuple[Tensor, Tensor]:
    """Return log pi and log mu [T] of every sampled token, pi by the forward pass of training.

    Args:
        components: of a run.
        completions: what its engine drew.
    """
    behavior_logp = torch.cat([c.sequence.behavior_logp for c in completions])
    return torch.cat(trainer_logp(components.policy, completions)), behavior_logp


def figures(logp: Tensor, behavior_logp: Tensor) -> Record:
    """Return what the table shows of log pi and log mu [T], by name.

    Example:
        >>> half = torch.tensor([0.5]).log()
        >>> figures(half, half)["k3"], figures(half, torch.tensor([0.25]).log())["far"]
        (0.0, 1.0)
    """
    ratio, gap = (logp - behavior_logp).exp(), (logp.exp() - behavior_logp.exp()).abs()
    return {
        "k3": float((ratio - 1 - ratio.log()).mean()),
        "mean_ratio": float(ratio.mean()),
        "mean_gap": float(gap.mean()),
        "p99_gap": float(gap.quantile(0.99)),
        "far": float((gap > FAR).float().mean()),
    }


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Assemble the run of `configuration`, with "engine" and "rollout_precision"; a request has "round"."""
    run = configure(
        configuration(setup), engine=setup["engine"], rollout_precision=setup["rollout_precision"], eval_problems=1
    )
    components = build(run)
    meter = Meter()

    def repetition(request: Mapping[str, Any]) -> Record:
        problems = sample_unseen(run.data.task, components.held_out, run.data.prompts, request["round"], run.seed)
        meter.start()
        groups = components.driver.run(problems, run.rollout.sampling, (run.seed, request["round"]))
        record = meter.stop()
        completions = [e for group in groups for e in group]
        tokens = sum(c.n_sampled for c in completions)
        return {**record, "tokens": tokens, **figures(*both(components, completions))}

    return {"settings": f"{type(components.driver.engine).__name__}, learning rate 0"}, repetition


if __name__ == "__main__":
    serve(prepare)
