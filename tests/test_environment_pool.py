"""Environments in worker processes: what one does wrong costs its episode, and the others go on as if nothing was."""

import json
import random
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import psutil
import pytest
import torch

from drpo.environments import EnvironmentConfig, EnvironmentPool, LocalEnvironments, make
from drpo.environments.answers import checked_observation, checked_result, of_record, same, to_record
from drpo.environments.games import Guess
from drpo.environments.repair import Repair
from drpo.errors import InputError
from drpo.rewards import in_process
from drpo.train.loop import train
from drpo.train.records import METRICS, ROLLOUTS, read_line, read_records, require_types
from drpo.types import Failure, Problem, Sampling
from drpo.types.environment import Observation, StepResult, Turn
from support.environments import TEMPLATE, Chat, talkative
from support.naughty_environments import CONTROL, FINE, FORGED, HELLO, LIES, NOT_FINITE, Hostile, Naughty
from support.worlds import Letters, few_run

DEADLINE = 2.0  # seconds: other processes may have the cores for one
LATE = f"timed out after {DEADLINE:g} s"
OUTCOMES = {
    "raise": ("raised", "ValueError: bad news"),
    "unspeakable": ("raised", "Unspeakable"),
    "sys.exit": ("raised", "SystemExit: 2"),
    "interrupt": ("raised", "KeyboardInterrupt"),
    "late": ("timed_out", LATE),
    "hang and ignore SIGTERM": ("timed_out", LATE),
    "os._exit": ("died", "the environment process died (exit status 3)"),
    "kill -9": ("died", "the environment process died (exit status -9)"),
    "fork and die": ("died", "the environment process died (exit status 3)"),
    "close everything": ("died", "the environment process closed its pipe"),
    "talk into the pipe": ("died", "the environment process sent an invalid answer"),
    "allocate": ("raised", "MemoryError"),
    "allocate shared": ("raised", "OSError: [Errno 12] Cannot allocate memory"),
}
HARMLESS = ("fork", "fork and leave", "fork a daemon")


HOSTILE = {
    "fine": (60, {}, None),
    **{deed: (10, {"second": deed}, None) for deed in (*FINE, *HARMLESS, "print")},
    **{deed: (10, {"second": deed}, kind) for deed, (kind, _) in OUTCOMES.items()},
    **{lie: (10, {"second": lie}, "not_finite" if lie in NOT_FINITE else "not_a_number") for lie in LIES},
    "open that raises": (8, {"open": "raise"}, "raised"),
    "open that dies": (8, {"open": "abort"}, "died"),
    "open that hangs": (4, {"open": "late"}, "timed_out"),
    "reset that raises": (8, {"reset": "raise"}, "raised"),
    "reset that dies": (8, {"reset": "abort"}, "died"),
    "reset that lies": (8, {"reset": "lie"}, "not_a_number"),
    "reset without words": (8, {"reset": "empty"}, "not_a_number"),
    "answer for itself": (8, {"second": "answer for itself"}, "died"),
    "answer with a seal": (8, {"second": "answer with a seal"}, "died"),
    "hang in C": (4, {"second": "hang in C"}, "timed_out"),
    "allocate 6 GB": (8, {"second": "allocate 6 GB"}, "raised"),
    "close that raises": (8, {"close": ("", "raise")}, None),
    "close that dies": (8, {"close": ("", "os._exit")}, None),
    "close that hangs": (4, {"close": ("", "hang")}, None),
}
"""Name -> how many of them, what they do, and the kind of failure that comes of it."""


def problems(n: int, **data: object) -> list[Problem]:
    return [Problem.of_text(str(i), "?", "", data=data) for i in range(n)]


def turn(text: str) -> Turn:
    return Turn(text, (1, 2), "stop")


def say(environments, *texts: str | None, to: int = 0) -> list:
    """Tell each episode a text, the first the first; return what each answered."""
    turns = {i: turn(text) for i, text in enumerate(texts, to) if text is not None}
    answers = environments.step(turns)
    assert list(answers) == list(turns)
    return [answers.get(i) for i in range(to, to + len(texts))]


def content(result) -> str:
    assert isinstance(result, StepResult | Observation), result
    return result.messages[-1]["content"]


@pytest.fixture(scope="module")
def pool():
    with EnvironmentPool(Naughty(), 7, EnvironmentConfig(processes=2, seconds=DEADLINE, memory_gb=2)) as pool:
        yield pool


@pytest.fixture(autouse=True)
def closed(request):
    yield
    if "pool" in request.fixturenames:
        request.getfixturevalue("pool").close()


def test_every_misdeed_costs_its_episode_and_the_others_are_rebuilt(pool):
    deeds = [*OUTCOMES, *HARMLESS]
    local = LocalEnvironments(Naughty(), 7)
    episodes = problems(2 * len(deeds))
    assert pool.open(episodes) == local.open(episodes)
    assert say(pool, *["a"] * len(episodes)) == say(local, *["a"] * len(episodes))
    said = [deeds[i // 2] if i % 4 in (0, 3) else "b" for i in range(len(episodes))]  # some in each process
    failed = {i: Failure(*OUTCOMES[text]) for i, text in enumerate(said) if text in OUTCOMES}
    fine = [text if text == "b" else None for text in said]
    for i, (result, expected) in enumerate(zip(say(pool, *said), say(local, *fine), strict=True)):
        assert result == (failed.get(i) or expected) or content(result) == f"2: a {said[i]}", said[i]
    assert say(pool, *fine) == say(local, *fine)
    assert say(pool, *["more" if i in failed else None for i in range(len(said))]) == [
        failed.get(i) for i in range(len(said))
    ]


@pytest.mark.parametrize(
    ("data", "failure"),
    [
        ({"open": "raise"}, Failure("raised", "ValueError: bad news")),
        ({"open": "late"}, Failure("timed_out", LATE)),
        ({"reset": "os._exit"}, Failure("died", "the environment process died (exit status 3)")),
        ({"reset": "sys.exit"}, Failure("raised", "SystemExit: 2")),
        ({"reset": "empty"}, Failure("not_a_number", "reset returned no message")),
    ],
)
def test_an_episode_that_does_not_open_is_a_failure(pool, data, failure):
    bad = replace(problems(1)[0], data=data)
    results = pool.open([*problems(2), bad, *problems(1)])
    assert results[2] == failure and all(content(results[i]) for i in (0, 1, 3))
    assert content(say(pool, "a")[0]) == "1: a"
    assert say(pool, "a", to=2) == [failure]


def test_lies_are_told_from_answers(pool):
    assert all(isinstance(result, Observation) for result in pool.open(problems(len(LIES))))
    for lie, result in zip(LIES, say(pool, *LIES), strict=True):
        assert result == checked_result(LIES[lie][0])
        assert result.kind == ("not_finite" if lie in NOT_FINITE else "not_a_number")
        assert result.text.startswith("step returned ") and LIES[lie][1] in result.text and len(result.text) < 200
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert "not JSON" in checked_result(StepResult(({"role": "user", "content": "a", "deep": deep},))).text
    assert checked_observation(Observation(({"role": "wizard", "content": "a"},))).text == (
        "reset returned a message of role 'wizard' (str); it may be system, user, assistant, tool"
    )
    assert checked_observation(Observation((HELLO,), ({"name": "f"},))).text.startswith(
        "reset returned the tool {'name': 'f'} (dict); it is "
    )


def test_a_record_of_what_is_no_lie_can_be_read():
    for name, said in FINE.items():
        result = checked_result(said)
        messages = [{"role": "assistant", "content": "a", "tool_calls": result.calls}, *result.messages]
        record = {"step": 1, "messages": messages, "failed_calls": result.failed_calls}
        read = read_line(json.dumps(record).encode(), name)[1]
        require_types(ROLLOUTS, read, name)
        assert [m["content"] for m in read["messages"]] == [m["content"] for m in messages]
    large = checked_result(FINE["calls of a large number"]).calls[0]["function"]["arguments"]
    assert large == {"x": ["1000000000000000000000000000000"]}


def test_what_is_no_lie_arrives_as_it_was_said(pool):
    local = LocalEnvironments(Naughty(), 7)
    pool.open(problems(len(FINE))), local.open(problems(len(FINE)))
    for name, here, there in zip(FINE, say(pool, *FINE), say(local, *FINE), strict=True):
        assert same(here, there) and same(of_record(to_record(here)), here), name
        assert type(here.reward) is float and type(here.done) is bool and type(here.messages) is tuple
    forged, control = say(pool, "forged", "control", to=list(FINE).index("forged"))
    assert (content(forged), content(control)) == (FORGED, CONTROL)
    half = checked_result(StepResult(({"role": "user", "content": "a\ud83d, \ud83d\ude00\ude00"},)))
    assert content(half) == "a\ufffd, \U0001f600\ufffd"  # a tokenizer could not encode it


def test_an_episode_that_is_rebuilt_otherwise_is_a_failure_that_says_so(pool, tmp_path):
    pool.open(problems(7))
    once = f"once > {tmp_path / 'here'}"
    assert all(say(pool, "a", None, "random", None, once, None, "a")[::2])
    killed, _, other, _, raised, _, fine = say(pool, "kill -9", None, "b", None, "b", None, "b")
    again = "rebuilt after the death of its process"
    assert killed.kind == "died" and content(fine) == "2: a b"
    assert other == Failure("died", f"{again}, and turn 0 was not answered as before: must be deterministic")
    assert raised.kind == "raised" and raised.text.startswith(f"{again}: FileExistsError")


@pytest.mark.parametrize("place", [LocalEnvironments, EnvironmentPool])
def test_methods_may_be_coroutines_of_one_event_loop(place, tmp_path):
    path = tmp_path / "closed"
    with place(Naughty(waits=True)) as environments:
        environments.open(problems(2, close=(str(path), "")))
        say(environments, "a", "a")
        assert [content(result) for result in say(environments, "b", "c")] == ["2: a b", "2: a c"]
        (failure, _) = say(environments, "raise", None)
        assert failure == Failure("raised", "ValueError: bad news")
    assert sorted(path.read_text().splitlines()) == ["0 a b raise", "1 a c"]


def test_episodes_are_closed_and_what_is_late_is_killed(pool, tmp_path):
    path = tmp_path / "closed"
    deeds = {0: "raise", 1: "hang", 5: "os._exit"}
    opened = [replace(p, data={"close": (str(path), deeds.get(i, ""))}) for i, p in enumerate(problems(8))]
    pool.open(opened)
    pids = [content(result) for result in say(pool, *["pid"] * 8)]
    assert len(set(pids)) == 2 and pids == pids[:2] * 4
    pool.open(problems(2))  # closes those of before
    assert sorted(path.read_text().split()[::2]) == ["0", "1", "2", "4", "6"]  # what 1 took with it, nobody holds
    again = [content(result) for result in say(pool, "pid", "pid")]
    assert again[0] == pids[0] and again[1] != pids[1]


def test_what_an_episode_starts_lives_until_the_episodes_are_closed(pool):
    pool.open(problems(1))
    child = psutil.Process(int(content(say(pool, "start")[0])))
    assert content(say(pool, "a")[0]) == "2: start a" and child.is_running()
    pool.close()
    assert not child.is_running()


def test_steps_of_several_processes_run_at_once_and_their_number_changes_nothing(tmp_path):
    task, said = Guess(1, 100), ("50", "25", "7", "nothing", "99")
    asked = task.held_out(10)

    def played(environments):
        with environments:
            return [environments.open(asked), *(say(environments, *[text] * 10) for text in said)]

    assert played(EnvironmentPool(task, 3, EnvironmentConfig(processes=3))) == played(make(task, 3))
    with EnvironmentPool(Naughty(), 0, EnvironmentConfig(processes=4)) as environments:
        environments.open(problems(4))
        assert all(content(r) for r in say(environments, *[f"meet > {tmp_path / 'here'}"] * 4))


def test_a_declared_maker_runs_here():
    assert isinstance(make(Guess()), LocalEnvironments) and isinstance(make(Repair()), EnvironmentPool)
    assert isinstance(make(in_process(type("Here", (Naughty,), {}))()), LocalEnvironments)


def test_a_maker_that_processes_cannot_import_is_refused(pool):
    local = type("Local", (Naughty,), {})
    with pytest.raises(InputError, match=r"^environment .* cannot be sent to a child process: .*in_process$"):
        make(local())
    with pytest.raises(InputError, match=r"^problem '0' cannot be sent to the environment's process: "):
        pool.open(problems(1, f=lambda: 0))
    with pytest.raises(InputError, match=r"^environment_pool\.processes=0: must be at least 1"):
        EnvironmentConfig(processes=0)


def test_a_run_counts_what_environments_do_wrong_and_ends_normally(tmp_path):
    changes = {"prompts": 4, "sampling.samples": 2, "sampling.max_new_tokens": 4, "steps": 2, "eval_problems": 2}
    run = few_run(task=Letters(), environment=Hostile(3), async_steps=1, overlap=True, **changes)
    components = talkative(run, TEMPLATE)
    always = frozenset(range(257))  # no turn ends for want of tokens
    train(run, tmp_path, components=replace(components, driver=replace(components.driver, stop=always)))
    steps = read_records(tmp_path / METRICS)
    expected = {"environment_failed": 6, "reward_failed": 6, "reward_raised": 2, "reward_died": 2}
    expected |= {"reward_not_a_number": 2, "reward_timed_out": 0, "turns_max": 3}
    assert len(steps) == 2 and all({name: m[name] for name in expected} == expected for m in steps)


@pytest.mark.slow
def test_five_hundred_hostile_environments_cost_their_own_episodes_alone():
    """Each failure of a rollout is counted by its kind; all others are the episodes of a rollout without failures."""
    plan = [(name, data, kind) for name, (n, data, kind) in HOSTILE.items() for _ in range(n)]
    random.Random(0).shuffle(plan)
    asked = [Problem.of_text(f"{i} {name}", "?", "", data=data) for i, (name, data, _) in enumerate(plan)]
    run = few_run(task=Chat())
    driver = replace(talkative(run, TEMPLATE).driver, stop=frozenset(range(257)))  # no turn ends for want of tokens
    played = partial(played_with, driver)
    start = time.perf_counter()
    with EnvironmentPool(Naughty(4), 7, EnvironmentConfig(processes=2, seconds=DEADLINE, memory_gb=2)) as pool:
        episodes = played(pool, asked)
        assert all(e.played.failure is None for e in played(pool, problems(4)))
    names = [name for name, _, _ in plan]
    kinds = [e.played.failure and e.played.failure.kind for e in episodes]
    # What another episode has forked may hold the pipe that this one closes.
    kinds = ["died" if name == "close everything" else kind for name, kind in zip(names, kinds, strict=True)]
    print(f"{len(episodes)} episodes in {time.perf_counter() - start:.1f} s: {Counter(kinds)}")
    assert sum(name != "fine" for name in names) >= 500
    assert Counter(zip(names, kinds, strict=True)) == {(name, kind): n for name, (n, _, kind) in HOSTILE.items()}
    fine = [i for i, (name, data, kind) in enumerate(plan) if kind is None and (name in FINE or "second" not in data)]
    harmless = [replace(asked[i], data={"second": names[i]} if names[i] in FINE else {}) for i in fine]
    for i, alone in zip(fine, played(LocalEnvironments(Naughty(4), 7), harmless), strict=True):
        assert repr(episodes[i].messages) == repr(alone.messages) and episodes[i].played == alone.played
        assert all(map(torch.equal, *([s.token_ids for s in e.sequences] for e in (episodes[i], alone))))
    (forged, plain) = (episodes[names.index(name)] for name in ("forged", "fine"))
    assert ends(forged) == ends(plain)


def played_with(driver, environments, asked):
    groups = replace(driver, environments=environments).run(asked, Sampling(samples=1, max_new_tokens=12), (0,))
    return [episode for (episode,) in groups]


def ends(episode) -> int:
    """How many tokens that end a role's words nobody sampled."""
    return sum(int((s.token_ids[~s.sampled] == 0).sum() + (s.prompt_ids == 0).sum()) for s in episode.sequences)
