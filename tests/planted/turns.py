"""Mistakes with episodes of several turns and branches: what is trained, what a sequence is, whose reward it was."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from planted import Replacement

T = "tests/test_turns.py::"
DOCTOR = "tests/test_doctor_turns.py::test_a_sound_run_has_no_fault"
TRAINED = f"{T}test_what_the_engine_sampled_is_trained_once_and_nothing_else"
CREDITED = f"{T}test_a_token_is_credited_with_its_turn_and_what_follows"
CHAINED = f"{T}test_a_critics_advantages_chain_through_turns_and_branches"
REDUCTIONS = f"{T}test_reductions_count_episodes_whatever_the_objective_takes_as_a_sequence"
FORMULA = f"{T}test_a_sequence_level_gradient_is_that_of_the_plain_formula"
SPLITTING = f"{T}test_splitting_a_batch_changes_nothing_and_splits_no_sequence"
SKIPPING = f"{T}test_a_row_is_skipped_where_its_sequence_has_no_advantage"


def _one_too_early(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*given: Any) -> Any:
        row = right(*given)
        return replace(row, sampled=row.sampled.roll(-1))

    return wrong


def _all_of_it(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*given: Any) -> Any:
        row = right(*given)
        import torch

        whole = torch.zeros(len(row.token_ids)).masked_scatter(row.sampled, row.behavior_logp)
        version = torch.zeros_like(row.token_ids)
        return replace(row, sampled=row.sampled | True, behavior_logp=whole, version=version)

    return wrong


def _without_its_end(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(self: Any, generation: Any, text: str, *rest: Any) -> None:
        if generation.finish_reason == "stop" and len(generation.token_ids) > 1:
            ids, logp = generation.token_ids[:-1], generation.behavior_logp[:-1]
            generation = replace(generation, token_ids=ids, behavior_logp=logp)
        right(self, generation, text, *rest)

    return wrong


def _encoded_again(right: Callable[..., Any]) -> Callable[..., Any]:
    tokenizer: list[Any] = []

    def wrong(self: Any, generation: Any, text: str, *rest: Any) -> None:
        import torch

        from drpo.model.loading import tiny

        if not tokenizer:
            tokenizer.append(tiny()[1])
        ended = [int(generation.token_ids[-1])] if generation.finish_reason == "stop" else []
        ids = torch.tensor([*tokenizer[0](text, add_special_tokens=False)["input_ids"], *ended] or [0])
        logp, n = torch.zeros(len(ids)), min(len(ids), len(generation.token_ids))
        logp[:n] = generation.behavior_logp[:n]
        right(self, replace(generation, token_ids=ids, behavior_logp=logp), text, *rest)

    return wrong


def _own_state(right: Callable[..., Any]) -> Callable[..., Any]:
    opened = count()
    return lambda *key: right(*key, next(opened))


def _twice(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(episode: Any, advantages: Any) -> Any:
        first, *branches = right(episode, advantages)
        return [first, *(replace(credit, advantage=2 * credit.advantage) for credit in branches)]

    return wrong


def _of_the_turn_before(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(episode: Any, scores: Any) -> Any:
        rewards = episode.played.rewards
        return right(replace(episode, played=replace(episode.played, rewards=(*rewards[1:], rewards[0]))), scores)

    return wrong


def _torn(right: Callable[..., Any]) -> Callable[..., Any]:
    """Each row is an episode of its own."""

    def wrong(groups: Sequence[Any], values: Any, **settings: Any) -> Any:
        def torn(group: Any) -> Any:
            rows = [(e, r, s) for e, r in zip(group.episodes, group.results, strict=True) for s in e.sequences]
            episodes = tuple(replace(e, turns=(s.n_sampled,), sequences=(s,)) for e, _, s in rows)
            return replace(group, episodes=episodes, results=tuple(replace(r, turns=()) for _, r, _ in rows))

        return right([torn(group) for group in groups], values, **settings)

    return wrong


def _rows(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda episodes, sequence: right(episodes, "row" if sequence == "episode" else sequence)


def _alone(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda rows: [[row] for row in rows]


REPLACEMENTS = (
    Replacement(
        "the mask of sampled tokens is off by one",
        "drpo.rollout.conversation:_sequence",
        _one_too_early,
        (TRAINED, DOCTOR),
    ),
    Replacement(
        "the glue between turns is trained", "drpo.rollout.conversation:_sequence", _all_of_it, (TRAINED, DOCTOR)
    ),
    Replacement(
        "a turn is decoded and encoded again",
        "drpo.rollout.conversation:Conversation.speak",
        _encoded_again,
        (TRAINED, DOCTOR),
    ),
    Replacement(
        "all groups have the same hidden state",
        "drpo.environments.local:derive",
        lambda right: lambda *key: right(*key[:2]),
        (DOCTOR,),
    ),
    Replacement(
        "each sample of a problem has a hidden state of its own",
        "drpo.environments.local:derive",
        _own_state,
        (DOCTOR,),
    ),
    Replacement(
        "the stop token of a turn is not trained",
        "drpo.rollout.conversation:Conversation.speak",
        _without_its_end,
        (TRAINED, DOCTOR),
    ),
    Replacement(
        "a turn's figures begin one token late",
        "drpo.train.metrics:_turns_of",
        lambda right: lambda episode: [(row, turn.roll(1)) for row, turn in right(episode)],
        ("tests/test_agents.py::test_killed_and_resumed_is_one_run_bit_for_bit",),
    ),
    Replacement("the advantage of a branch counts twice", "drpo.credit.rules:_by_turn", _twice, (CREDITED,)),
    Replacement(
        "a turn has the reward of the turn after it",
        "drpo.train.score:_scored",
        _of_the_turn_before,
        (CREDITED, CHAINED),
    ),
    Replacement("a critic's advantages end at a branch", "drpo.credit.rules:gae_credit", _torn, (CHAINED,)),
    Replacement(
        "reductions and objectives count branches as sequences",
        "drpo.batch:_numbers",
        _rows,
        (f"{REDUCTIONS}[episode-sequence_mean]", f"{REDUCTIONS}[row-horizon]", f"{FORMULA}[episode]"),
    ),
    Replacement(
        "rows of an episode are apart where the objective reads it whole",
        "drpo.batch:_together",
        _alone,
        (f"{SPLITTING}[gspo of episodes]", SKIPPING),
    ),
)
