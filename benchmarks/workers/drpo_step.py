"""One training step of this project, made of the very pieces that `drpo.train.loop` is made of."""

from collections.abc import Mapping
from typing import Any

from benchmarks.workers.marks import hashed
from benchmarks.workers.measure import Meter, synchronize
from benchmarks.workers.protocol import Record, Repetition, serve
from drpo.batch import make_batches
from drpo.model import loading
from drpo.objectives import DRPO
from drpo.reductions import Horizon
from drpo.rewards import Reward, RewardPool, exact_number, in_process
from drpo.tasks import Addition, sample_unseen
from drpo.train.config import Run, configure
from drpo.train.log import Clock
from drpo.train.optim import AdamW
from drpo.train.score import score
from drpo.train.setup import Components, build
from drpo.train.step import update_policy
from drpo.types import Problem, Sampling


@in_process
def hashed_text(problem: Problem, text: str) -> float:
    """Mark by a hash of the text."""
    return hashed(text)


REWARDS: Mapping[str, Reward] = {"hash": hashed_text, "exact": exact_number}


def configuration(setup: Mapping[str, Any]) -> Run:
    """Return the run that a setup stands for; what a setup does not name is the default of `Run`.

    Args:
        setup: model (a folder, or a function's name), precision, reward, prompts, samples, new_tokens, learning_rate;
            micro_batch_tokens, checkpoint_activations and engine, if they are not the defaults.

    Returns:
        One optimiser update per rollout.
    """
    optional = ("micro_batch_tokens", "checkpoint_activations", "engine")
    return configure(
        Run(),
        **{name: setup[name] for name in optional if name in setup},
        name="bench",
        model=setup["model"],
        task=Addition(setup["low"], setup["high"]),
        reward=REWARDS[setup["reward"]],
        objective=DRPO(0.2),
        reduction=Horizon(setup["new_tokens"]),
        sampling=Sampling(samples=setup["samples"], max_new_tokens=setup["new_tokens"]),
        prompts=setup["prompts"],
        updates=1,
        optimizer=AdamW(setup["learning_rate"]),
        precision=setup["precision"],
        rollout_precision=setup["precision"],
        eval_problems=0,
    )


def step(run: Run, components: Components, pool: RewardPool, number: int) -> Record:
    """Run one step as the loop does.

    Args:
        run: the configuration.
        components: what `build` made of it.
        pool: runs the reward.
        number: which step; it chooses the problems and the random numbers.

    Returns:
        Seconds per phase, tokens sampled, and how many completions were skipped.
    """
    clock = Clock()
    with clock("rollout"):
        problems = sample_unseen(run.data.task, components.held_out, run.data.prompts, number, run.seed)
        rollout = components.driver.run(problems, run.rollout.sampling, (run.seed, number))
    with clock("reward"):
        groups = score(problems, rollout, pool)
    with clock("update"):
        batches = make_batches(groups, components.credit(groups, None), components.batch_config)
        for batch in batches:
            update_policy(
                components.policy,
                components.optimizer,
                batch,
                run.objective.loss,
                run.optimizer.policy.learning_rate,
                run.optimizer.max_grad_norm,
                components.auxiliary,
            )
        synchronize()
    with clock("sync"):
        components.driver.engine.load_weights(components.policy.state(), version=number + 1)
        synchronize()
    episodes = [e for group in rollout for e in group]
    return {
        "phases": clock.seconds,
        "tokens": sum(e.n_sampled for e in episodes),
        "prompt_tokens": sum(len(e.sequence.prompt_ids) for e in episodes),
        "rows": len(episodes),
        "skipped": sum(b.n_skipped for b in batches),
    }


def shapes(components: Components) -> dict[str, int]:
    """Count the numbers that a token meets in matrix products.

    Args:
        components: with the model.

    Returns:
        "body": of all matrices but the embedding and the head; "head": of the head.
    """
    model = components.policy.model
    head = model.get_output_embeddings().weight
    apart = {id(head), id(model.get_input_embeddings().weight)}
    body = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in apart)
    return {"body": body, "head": head.numel()}


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Assemble the run; a request's "round" is the number of the step."""
    run = configuration(setup)
    components = build(run)
    pool = RewardPool(components.reward)
    components.driver.engine.load_weights(components.policy.state(), version=0)
    meter = Meter()

    def repetition(request: Mapping[str, Any]) -> Record:
        meter.start()
        record = step(run, components, pool, request["round"])
        return {**record, **meter.stop()}

    settings = f"objective drpo(0.2), micro_batch_tokens {run.trainer.micro_batch_tokens}, everything else the default"
    return {"settings": settings, "shapes": shapes(components)}, repetition


if __name__ == "__main__":
    loading.log.setLevel("WARNING")
    serve(prepare)
