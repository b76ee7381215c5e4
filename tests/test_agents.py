"""Training in environments, end to end: tokens in and out, credit, records, and a run that is killed and resumed."""

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drpo.environments.local import LocalEnvironments
from drpo.environments.pool import EnvironmentPool
from drpo.environments.tools import Tools
from drpo.errors import InputError
from drpo.rollout import EpisodeLimits
from drpo.spec import parse_spec
from drpo.tasks import REGISTRY, Addition
from drpo.train.config import Run, configure
from drpo.train.log import episode_of, in_flight_record
from drpo.train.loop import train
from drpo.train.records import METRICS, ROLLOUTS, read_records
from drpo.train.setup import Components, build
from drpo.types import Episode, Sampling
from support.environments import TEMPLATE, Chat, talkative
from support.forks import KillItself, fork
from support.runs import assert_same_run
from support.worlds import Broken, tiny_run


def chat_run(**changes: object) -> Run:
    return tiny_run(**{"task": Chat(), "sampling.max_new_tokens": 12, "eval_problems": 4, "steps": 2, **changes})


def episodes(components: Components, run: Run, n: int = 3) -> list[Episode]:
    problems = run.data.task.sample(n, 0, run.seed)
    return [e for group in components.driver.run(problems, run.rollout.sampling, (0, 0)) for e in group]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_every_prompt_begins_with_the_one_before_and_what_was_sampled(template: str | None) -> None:
    run = chat_run()
    components = talkative(run, template)
    played = episodes(components, run)
    assert {len(e.turns) for e in played} == {1, 2, 3}
    for e in played:
        (sequence,) = e.sequences
        assert sequence.n_sampled == sum(e.turns) == int(sequence.sampled.sum()) and sequence.sampled[-1]
        edges = torch.nn.functional.pad(sequence.sampled.int(), (1, 1)).diff().nonzero().flatten().tolist()
        assert [b - a for a, b in zip(edges[::2], edges[1::2], strict=True)] == list(e.turns)
        replies = [m["content"] for m in e.messages if m["role"] == "user"][1:]
        glued = components.tokenizer.decode(sequence.token_ids[~sequence.sampled])
        assert all(reply in glued for reply in replies[: len(e.turns) - 1])


def test_where_the_history_is_rendered_anew_the_episode_goes_on_in_a_branch() -> None:
    run = chat_run(task=Chat(role="tool"))
    components = talkative(run, TEMPLATE)
    played = [e for e in episodes(components, run) if len(e.turns) > 1]
    branched = [e for e in played if len(e.sequences) == len(e.turns)]  # in others a turn ends as the template ends one
    assert len(branched) > 2
    for e in branched:
        assert [s.n_sampled for s in e.sequences] == list(e.turns) and all(s.sampled.all() for s in e.sequences)


def test_an_episode_of_one_turn_is_that_of_plain_training_bit_for_bit(tmp_path: Path) -> None:
    """The same problems, answers and rewards, with an environment that ends each episode after its first turn."""
    plain = configure(chat_run(steps=1), task=Addition(), reward=None)
    played = configure(plain, task=Chat(turns=1, paid=False))
    for name, run in (("plain", plain), ("played", played)):
        train(run, tmp_path / name)
    for a, b in zip(*(read_records(tmp_path / name / ROLLOUTS) for name in ("plain", "played")), strict=True):
        assert a == {key: value for key, value in b.items() if key not in ("messages", "turns", "played")}
    figures = [read_records(tmp_path / name / METRICS) for name in ("plain", "played")]
    for a, b in zip(*figures, strict=True):
        assert a == {key: b[key] for key in a}


@pytest.mark.parametrize("limits", [EpisodeLimits(turns=2), EpisodeLimits(tokens=15)])
def test_limits_end_episodes(limits: EpisodeLimits) -> None:
    run = chat_run()
    components = talkative(run)
    driver = replace(components.driver, episode_limits=limits)
    played = episodes(replace(components, driver=driver), run)
    assert max(len(e.turns) for e in played) <= (limits.turns or 3)
    assert max(e.n_sampled for e in played) <= (limits.tokens or 24)
    assert any(e.played is not None and not e.played.done and e.finish_reason == "stop" for e in played)


@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_record_of_an_episode_in_flight_gives_it_back(role: str) -> None:
    run = chat_run(task=Chat(role=role))
    sampling = replace(run.rollout.sampling, top_logprobs=3)
    components = talkative(run, TEMPLATE)
    problems = run.data.task.sample(3, 0, run.seed)
    for e in [e for group in components.driver.run(problems, sampling, (0, 0)) for e in group]:
        record = json.loads(json.dumps(in_flight_record(e)))
        again = episode_of(record, sampling)
        assert in_flight_record(again) == record and again.turns == e.turns and again.played == e.played
        for a, b in zip(e.sequences, again.sequences, strict=True):
            for name in ("prompt_ids", "token_ids", "sampled", "behavior_logp", "version"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
            assert a.top_logprobs is not None and b.top_logprobs is not None
            assert torch.equal(a.top_logprobs.logp, b.top_logprobs.logp)


def chat(run: Run, folder: Path, *callback: object) -> None:
    train(run, folder, *callback, components=talkative(run, TEMPLATE))


def figures_by_turn(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the metrics of turns should be, from the log-probabilities of a step's rollouts."""
    of_turn: dict[int, list[tuple[float, float]]] = {}
    for record in records:
        turns = iter([turn for turn, n in enumerate(record["turns"], 1) for _ in range(n)])
        for row in [record, *record.get("branches", [])]:
            for mu, pi in zip(row["behavior_logp"], row.get("logp", row["behavior_logp"]), strict=True):
                turn = next(turns)
                of_turn.setdefault(turn, []).extend([(mu, pi)] if "logp" in row else [])
    means = {}
    for turn, pairs in of_turn.items():
        mu, pi = np.exp(np.array(pairs)).T
        means |= {f"prob_diff_mean/turn_{turn}": np.abs(pi - mu).mean(), f"ratio_mean/turn_{turn}": (pi / mu).mean()}
    return means


@pytest.mark.parametrize("role", [pytest.param("user", marks=pytest.mark.slow), "tool"])
def test_killed_and_resumed_is_one_run_bit_for_bit(one_thread: None, tmp_path: Path, role: str) -> None:
    few = {"prompts": 2, "eval_problems": 1}
    run = chat_run(task=Chat(role=role), steps=4, async_steps=1, overlap=True, checkpoint_every=2, **few)
    chat(run, tmp_path / "whole")
    killed = fork(tmp_path / "out", chat, run, tmp_path / "killed", KillItself(3, "update"))
    assert killed.end()[0] == -signal.SIGKILL
    chat(run, tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    figures = read_records(tmp_path / "whole" / METRICS)[-1]
    assert figures["turns_max"] == 3 and (figures["branches"] > 0) == (role == "tool")
    assert figures["reward_mean"] > 0 and figures["grad_norm"] > 0
    rollouts = read_records(tmp_path / "whole" / ROLLOUTS)
    by_turn = figures_by_turn([r for r in rollouts if r["step"] == 4])
    assert {k: v for k, v in figures.items() if "/turn_" in k} == pytest.approx(by_turn, rel=1e-4) and len(by_turn) == 6
    (first, *_) = [r for r in rollouts if len(r["turns"]) == 3]
    assert sum(first["reward_turns"]) == pytest.approx(first["reward"], abs=1e-6)
    assert ("branches" in first) == (role == "tool") and ("sampled" in first) == (role == "user")


def test_a_step_whose_updates_are_all_skipped_is_recorded(tmp_path: Path) -> None:
    chat(chat_run(steps=1, updates=1, prompts=2, eval_problems=0, objective=Broken()), tmp_path)
    (figures,) = read_records(tmp_path / METRICS)
    assert figures["skipped_updates"] == 1 and figures["turns_max"] == 3
    assert not any("/turn_" in name for name in figures)


def test_tools_go_with_the_problems_of_any_task() -> None:
    run = configure(chat_run(task=Addition()), environment=Tools("support.environments:double"))
    components = talkative(run)
    assert isinstance(components.driver.environments, EnvironmentPool)  # a user's functions run in processes
    driver = replace(components.driver, environments=LocalEnvironments(Tools("support.environments:double")))
    prompt = episodes(replace(components, driver=driver), run, n=1)[0].prompt
    assert '"name": "double"' in prompt and "What is" in prompt


def test_what_cannot_be_an_environment_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"environment=.*has environments of its own; leave it out"):
        chat_run(environment=Tools("support.environments:double"))
    with pytest.raises(InputError, match=r"environment=3: .*has no `max_turns`"):
        chat_run(task=Addition(), environment=3)
    for name in ("max_turns", "max_episode_tokens"):
        with pytest.raises(InputError, match=f"{name}=3: an episode of this task is a single turn"):
            chat_run(**{"task": Addition(), name: 3})
    with pytest.raises(InputError, match=r"environment='tools.*is text"):
        chat_run(task=Addition(), environment="tools")


def test_the_tasks_that_ship_have_names() -> None:
    driver = build(chat_run()).driver
    for spec in ("calculator(3, 3)", "guess(1, 20, turns=5)", "walk", "word_game", "lookup", "repair"):
        task = parse_spec(spec, REGISTRY)
        here = replace(driver, environments=LocalEnvironments(task))  # type: ignore[arg-type]
        (group,) = here.run(task.sample(1, 0, 0), Sampling(samples=2, max_new_tokens=4), (0, 0))
        assert all(e.played is not None and e.played.failure is None for e in group), spec
