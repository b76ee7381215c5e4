"""Mistakes between an engine, the driver of episodes and their scores: keys, stop tokens, order, distribution."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from planted import Replacement

ROLLOUT = "tests/test_rollout.py::"
ENGINES = "tests/test_engines.py::"
SEEDS = "tests/test_vllm_client.py::test_every_completion_has_a_seed_of_its_own"


def _asked(change: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """The engine does as if it had been asked something else."""
    return lambda right: lambda engine, requests: right(engine, [change(engine, r) for r in requests])


def _configured(engine: Any, request: Any) -> Any:
    return replace(request, sampling=replace(request.sampling, top_k=engine.model.generation_config.top_k or 0))


def _by_length(right: Any) -> Any:
    def generate(engine: Any, requests: Any) -> Any:
        rows = zip(right(engine, requests), requests, strict=True)
        return [g for g, _ in sorted(rows, key=lambda row: len(row[1].prompt_ids))]

    return generate


def _without_sample(right: Any) -> Any:
    return lambda ids, sampling, stop, key, name, **more: right(ids, sampling, stop, key[:-1], name, **more)


def _scores_reversed(right: Any) -> Any:
    def group(problem: Any, pairs: Any, zero: bool) -> Any:
        scores = [scored for _, scored in reversed(pairs)]
        return right(problem, list(zip((e for e, _ in pairs), scores, strict=True)), zero)

    return group


REPLACEMENTS = (
    Replacement(
        "scores are laid beside episodes in another order",
        "drpo.train.score:_group",
        _scores_reversed,
        ("tests/test_batch_policy.py::test_each_reward_stays_with_its_completion",),
    ),
    Replacement(
        "lengths leave out episodes without a reward",
        "drpo.types:ScoredGroup.all_episodes",
        lambda right: lambda self: self.episodes,
        ("tests/test_metrics.py::test_rollout_figures_are_the_oracles",),
    ),
    Replacement(
        "the samples of a prompt share their random numbers",
        "drpo.rollout.episodes:Request",
        _without_sample,
        (f"{ENGINES}test_every_part_of_a_key_matters", SEEDS),
    ),
    Replacement(
        "only one of the tokens that end a completion ends it",
        "drpo.rollout.transformers:TransformersEngine.generate",
        _asked(lambda engine, r: replace(r, stop=frozenset(sorted(r.stop)[:1]))),
        (
            f"{ENGINES}test_the_first_stop_token_ends_and_is_kept",
            f"{ROLLOUT}test_stopping_cuts_what_would_have_been_drawn",
        ),
    ),
    Replacement(
        "top-k comes from the model's generation config",
        "drpo.rollout.transformers:TransformersEngine.generate",
        _asked(_configured),
        (f"{ROLLOUT}test_the_models_generation_config_changes_nothing_but_the_stop_words",),
    ),
    Replacement(
        "completions are given to other problems when prompts are sorted",
        "drpo.rollout.transformers:TransformersEngine.generate",
        _by_length,
        ("tests/test_decode.py::test_any_shape_of_batch",),
    ),
    Replacement(
        "a broken report is taken",
        "drpo.types:TopK.require",
        lambda right: lambda *arguments: None,
        ("tests/test_topk.py::test_a_completion_refuses_a_broken_report",),
    ),
    Replacement(
        "an evaluation is of the weights that sample",
        "drpo.train.rollouts:Rollouts.current",
        lambda right: lambda self, state, version: (self.settle(), self._driver)[1],
        ("tests/test_rollouts.py::test_an_evaluation_sees_the_newest_weights_and_leaves_the_old_ones",),
    ),
)
