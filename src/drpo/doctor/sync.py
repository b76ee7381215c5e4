"""The canary: checks that after a large change the engine samples with the new weights only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from drpo.doctor.finding import Finding, judge
from drpo.doctor.probe_batch import trainer_logp
from drpo.model.policy import Policy
from drpo.rollout import EpisodeDriver, fitting
from drpo.types import Episode, Problem, Sampling

PROMPT_CHARACTERS = 800
"""Length of the prompts: several whole blocks of a prefix cache with blocks of up to 128 tokens."""
FEWEST_CHARACTERS = 50
"""The least that they are shortened to for a model of few positions."""

CHANGE, HEAD_CHANGE = 0.1, 0.5
"""Size of the change, relative to each tensor's; larger for the head, so a stale head shows too."""


def canary(
    policy: Policy, driver: EpisodeDriver, problems: Sequence[Problem], sampling: Sampling, usual_gap: float
) -> Finding:
    """Change all weights, sync them, and compare log-probabilities on a cached prompt and on a new one.

    The weights of policy and engine are restored afterwards.

    Args:
        policy: the model in training.
        driver: its engine must have the policy's weights.
        problems: their text makes the prompts.
        sampling: a few tokens.
        usual_gap: mean |log mu - log pi| at equal weights.
    """
    fits, size = fitting(driver.tokenizer, driver.limits, sampling), PROMPT_CHARACTERS
    while size > FEWEST_CHARACTERS and not all(map(fits, _prompts(problems, size))):
        size //= 2
    warm, cold = _prompts(problems, size)
    driver.run([warm], sampling, ("canary", 0))
    with changed(policy):
        driver.engine.load_weights(policy.state(), version=1)
        after = [e for group in driver.run([warm, cold], sampling, ("canary", 1)) for e in group]
        new = _by_problem(after, _gaps(policy, after))
    old = _by_problem(after, _gaps(policy, after))
    driver.engine.load_weights(policy.state(), version=0)
    (again,) = driver.run([warm], sampling, ("canary", 0))
    back = _by_problem(again, _gaps(policy, again))[warm.id]
    limit = 3 * usual_gap + 0.1
    stamped = all(c.version == 1 for c in after) and all(c.version == 0 for c in again)
    advice = _advice(new[warm.id], new[cold.id], old[cold.id], back, limit) or (
        "" if stamped else "completions do not carry the version of the weights that drew them"
    )
    verdict, advice = judge(not advice, advice)
    return Finding(
        "sync",
        verdict,
        f"after a large change mean |log mu - log pi| {new[cold.id]:.3f} on a new prompt, {new[warm.id]:.3f} on one "
        f"seen before ({old[cold.id]:.2f} from the old weights); {back:.3f} after changing back",
        f"{limit:.2f}",
        advice,
        {"cold": new[cold.id], "warm": new[warm.id], "old": old[cold.id], "back": back},
    )


def _advice(warm: float, cold: float, old: float, back: float, limit: float) -> str:
    if cold > limit and old < cold / 2:
        return "the engine still samples with the old weights: stale weights after the sync"
    if cold > limit:
        return "the engine samples with neither the new weights nor the old: a part of them is stale (a tied head?)"
    if warm > limit:
        return "the engine keeps keys and values of the old weights: reset its prefix cache at every weight sync"
    if back > limit:
        return "weights or cached prompts are stale after the second sync"
    return ""


@contextmanager
def changed(policy: Policy) -> Iterator[None]:
    """Add noise of about a tenth of its size to every trainable weight; restore the exact values at the end."""
    generator = torch.Generator().manual_seed(0)
    head = policy.model.get_output_embeddings().weight
    before = {name: p.detach().to("cpu", copy=True) for name, p in policy.trainable().items()}
    try:
        with torch.no_grad():
            for p in policy.trainable().values():
                size = float(p.square().mean().sqrt()) or 0.02  # adapters start at 0
                share = HEAD_CHANGE if p is head else CHANGE
                p.add_(share * size * torch.randn(p.shape, generator=generator).to(p.device))
        yield
    finally:
        with torch.no_grad():
            for name, p in policy.trainable().items():
                p.copy_(before[name])


@torch.no_grad()
def _gaps(policy: Policy, completions: Sequence[Episode]) -> list[Tensor]:
    logp = trainer_logp(policy, completions)
    return [(a - c.sequence.behavior_logp).abs() for a, c in zip(logp, completions, strict=True)]


def _by_problem(completions: Sequence[Episode], gaps: Sequence[Tensor]) -> dict[str, float]:
    ids = dict.fromkeys(c.problem_id for c in completions)
    return {
        i: float(torch.cat([g for c, g in zip(completions, gaps, strict=True) if c.problem_id == i]).mean())
        for i in ids
    }


def _prompts(problems: Sequence[Problem], size: int) -> tuple[Problem, Problem]:
    text = " ".join(p.prompt for p in problems)
    text = text * (1 + size // len(text))
    half = len(text) // 2
    # They differ in the first character, so they share no cached prefix.
    return (
        Problem.of_text("canary-warm", f"1. {text[:size]}", ""),
        Problem.of_text("canary-cold", f"2. {text[half:] + text[:half]}"[:size], ""),
    )
