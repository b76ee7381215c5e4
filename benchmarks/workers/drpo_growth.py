"""One update of this project on made-up completions of any size, and the head alone on any vocabulary."""

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.workers.drpo_step import configuration
from benchmarks.workers.measure import Meter
from benchmarks.workers.protocol import Record, Repetition, serve
from drpo.batch import make_batches
from drpo.train.setup import build
from drpo.train.step import update_policy
from drpo.types import Episode, Generation, Problem, RewardResult, Sampling, ScoredGroup, TokenSequence


def made_up(request: Mapping[str, Any], vocabulary: int) -> list[ScoredGroup]:
    """Return groups of random tokens, no two rewards alike, the same for equal requests.

    Args:
        request: "prompts", "samples", "prompt_tokens", "new_tokens".
        vocabulary: ids are below it.

    Returns:
        One group per prompt.
    """
    generator = torch.Generator().manual_seed(0)
    n = request["new_tokens"]
    sampling = Sampling(samples=request["samples"], max_new_tokens=n)

    def completion(problem: str, prompt: torch.Tensor, sample: int) -> Episode:
        tokens = torch.randint(0, vocabulary, (n,), generator=generator)
        # About what a trained model gives random tokens, so that no ratio is out of hand.
        logp = torch.full((n,), -15.0)
        sequence = TokenSequence.of(prompt, Generation(tokens, logp, "length", 0))
        return Episode(problem, sample, (), "", "", "length", sampling, (len(tokens),), (sequence,))

    groups = []
    for i in range(request["prompts"]):
        prompt = torch.randint(0, vocabulary, (request["prompt_tokens"],), generator=generator)
        completions = tuple(completion(str(i), prompt, s) for s in range(sampling.samples))
        rewards = tuple(map(RewardResult, torch.linspace(0, 1, sampling.samples).tolist()))
        groups.append(ScoredGroup(Problem.of_text(str(i), "", ""), completions, rewards))
    return groups


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Assemble the run; a request has what `made_up` wants."""
    run = configuration(setup)
    components = build(run)
    vocabulary = components.policy.model.get_output_embeddings().weight.shape[0]
    meter = Meter()

    def repetition(request: Mapping[str, Any]) -> Record:
        groups = made_up(request, vocabulary)
        meter.start()
        for batch in make_batches(groups, components.credit(groups, None), components.batch_config):
            # Nothing is to be learnt from random tokens; a rate of 0 costs AdamW the same arithmetic.
            update_policy(
                components.policy,
                components.optimizer,
                batch,
                run.objective.loss,
                0.0,
                run.optimizer.max_grad_norm,
                components.auxiliary,
            )
        record = meter.stop()
        return {**record, "tokens": sum(e.n_sampled for g in groups for e in g.episodes)}

    settings = f"precision {setup['precision']}, micro_batch_tokens {run.trainer.micro_batch_tokens}"
    return {"settings": settings}, repetition


if __name__ == "__main__":
    serve(prepare)
