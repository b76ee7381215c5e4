"""A curriculum by measured pass rate: what is drawn, from which results, after a resume too, and what is refused.

Not covered: several processes (test_ranks.py), whether it helps (docs/methods.md has a measurement).
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from drpo.errors import InputError
from drpo.live.step_table import cells
from drpo.report.panels import PANELS, lines_of
from drpo.rewards import in_process
from drpo.rollout import ScriptedEngine
from drpo.tasks import Addition, Records, training_pool
from drpo.train import stored
from drpo.train.chapters import read_chapters
from drpo.train.config import Run, configure, from_json, to_json
from drpo.train.curriculum import Pools, State, choose, observe, shares
from drpo.train.loop import train
from drpo.train.metric_tables import CURRICULUM_METRICS, find
from drpo.train.records import CHECKPOINTS, METRICS, ROLLOUTS, SUMMARY, read_json, read_records
from drpo.train.rollouts import Rollouts
from drpo.train.setup import Components, build
from drpo.train.stored import CURRICULUM, read_curriculum
from drpo.train.verify import verify
from drpo.types import Problem, Request
from support.rollouts import with_engine
from support.runs import CopiesAt, assert_same_run
from support.worlds import Letters, sampling, tiny_run

NAMES = [f"p{i:02}" for i in range(40)]
EASY, HARD = frozenset(NAMES[:10]), frozenset(NAMES[10:20])


def rates(easy: frozenset[str] = EASY, hard: frozenset[str] = HARD) -> dict[str, float]:
    return {name: 1.0 if name in easy else 0.0 if name in hard else 0.5 for name in NAMES}


def stepped(state: State, step: int, rule: Pools, true: Mapping[str, float], seed: int = 0, n: int = 8) -> State:
    """The state after a step; its problems are those whose `step` is this one."""
    state = choose(rule, state, NAMES, n, step, seed, samples=8)
    return observe(state, step, {name: [true[name]] for name in state.ahead[0].problems})


def observed(rewards: list[float]) -> None:
    """Give a run one scored group of 'p01'."""
    group = SimpleNamespace(problem=SimpleNamespace(id="p01"), rewards=torch.tensor(rewards))
    Rollouts.require_rates(cast(Any, SimpleNamespace(_run=RUN)), cast(Any, [group]))


def drawn(state: State, step: int) -> set[str]:
    return {name for name, known in state.problems.items() if known.step == step}


def test_an_epoch_draws_every_active_problem_once_in_a_new_order_and_no_other() -> None:
    state, rule, seen = State(), Pools(revisit=0.0), []
    for step in range(25):
        state = choose(rule, state, NAMES, 4, step, 0, samples=8)
        (choice,) = state.ahead
        assert len(set(choice.problems)) == 4 and (choice.revisited, choice.filled) == (0, 0)
        seen += choice.problems
        state = observe(state, step, {name: [rates()[name]] for name in choice.problems})
    rest = sorted({*NAMES} - EASY - HARD)
    assert sorted(seen[:40]) == NAMES
    epochs = [seen[40:60], seen[60:80], seen[80:100]]
    assert all(sorted(epoch) == rest for epoch in epochs) and len({*map(tuple, epochs)}) == 3
    assert shares(rule, state, 40, samples=8) == {"active": 0.5, "easy": 0.25, "hard": 0.25, "drawn": 1.0}


def test_the_seed_and_the_step_alone_decide() -> None:
    first, again, other = (choose(Pools(), State(), NAMES, 8, 3, seed, samples=8) for seed in (0, 0, 1))
    assert first == again and first.ahead != other.ahead
    assert choose(Pools(), State(), NAMES, 8, 4, 0, samples=8).ahead[0].problems != first.ahead[0].problems


def test_what_retired_or_waits_comes_back_the_longest_away_first_and_is_measured_again() -> None:
    rule, state = Pools(revisit=0.25), State()
    for step in range(400):
        before = state
        state = stepped(state, step, rule, rates())
        back = drawn(state, step) & (EASY | HARD) & {n for n, known in before.problems.items() if known.means}
        away = sorted(before.problems[n].step for n in (EASY | HARD) & before.problems.keys())
        assert sorted(before.problems[n].step for n in back) == away[: len(back)]
    times = Counter(len(known.means) for name, known in state.problems.items() if name in EASY | HARD)
    assert times == {8: 20}  # all that is remembered: each came back
    swapped = rates(easy=HARD, hard=EASY)  # all forgotten, and all learnt
    for step in range(400, 440):
        state = stepped(state, step, rule, swapped)
    pools = {name: rule.pool(state.problems[name].means, samples=8) for name in EASY | HARD}
    assert all(pools[name] in ("active", "hard" if name in EASY else "easy") for name in pools)


def test_a_share_of_the_problems_comes_back() -> None:
    rule, state, back = Pools(revisit=0.1), State(), 0
    for step in range(500):
        state = choose(rule, state, NAMES, 8, step, 0, samples=8)
        back += state.ahead[0].revisited
        state = observe(state, step, {name: [rates()[name]] for name in state.ahead[0].problems})
    assert 0.08 < back / (500 * 8) < 0.12


def test_nothing_starves_a_rollout() -> None:
    state, rule = State(), Pools(revisit=0.0)
    for step in range(25):
        state = choose(rule, state, NAMES, 8, step, 0, samples=8)
        (choice,) = state.ahead
        assert len(set(choice.problems)) == 8
        assert choice.filled == (8 if step >= 5 else 0)  # all 40 are easy by then
        state = observe(state, step, {name: [1.0] for name in choice.problems})
    assert {len(known.means) for known in state.problems.values()} == {5}  # in turns


def test_a_rate_counts_from_eight_completions_on_and_is_of_the_last_groups() -> None:
    rule = Pools()
    assert [rule.pool((1.0,) * n, samples=2) for n in range(6)] == ["active"] * 4 + ["easy"] * 2
    assert rule.pool((0.0,) * 7, samples=1) == "active" and rule.pool((0.0,) * 8, samples=1) == "hard"
    assert rule.pool((0.0, 0.0, 1.0, 1.0), samples=8) == "easy" and rule.pool((0.0, 0.1), samples=8) == "hard"


def test_groups_that_were_sampled_again_count_and_a_group_without_a_score_does_not() -> None:
    state = choose(Pools(), State(), NAMES, 3, 0, 0, samples=8)
    a, b, c = state.ahead[0].problems
    after = observe(state, 0, {a: [0.0, 1.0], b: [], c: [0.5]})
    assert [after.problems[name].means for name in (a, b, c)] == [(0.0, 1.0), (), (0.5,)] and after.ahead == ()


# ---- in a run ----

LETTERS = "abcdefghijklmnop"


def answer(request: Request) -> str:
    """Letters to d are always right, those from m never, the others half of the time, k in the second attempt alone."""
    letter, sample = str(request.key[-2])[-1], int(request.key[-1])
    if letter <= "d" or letter >= "m":
        return "1" if letter <= "d" else "x"
    first = len(request.key) == 4
    return "1" if sample % 2 and not (letter == "k" and first) else "x"


def scripted(run: Run) -> Components:
    components = build(run)
    return with_engine(components, ScriptedEngine(components.tokenizer, answer))


RUN = tiny_run(
    steps=7,
    prompts=4,
    eval_problems=1,
    checkpoint_every=3,
    keep_checkpoints=5,
    curriculum=Pools(revisit=0.2),
    dynamic_sampling=1,
    async_steps=1,
    sampling=sampling(samples=8, max_new_tokens=2),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a run, and what a kill in its step 4 would have left."""
    whole, killed = (tmp_path_factory.mktemp("curriculum") / name for name in ("whole", "killed"))
    train(RUN, whole, CopiesAt(4, whole, killed), scripted(RUN), keep_model=True)
    return whole, killed


def test_killed_and_resumed_is_one_run_bit_for_bit(runs: tuple[Path, Path]) -> None:
    whole, killed = runs
    train(RUN, killed, components=scripted(RUN))
    assert_same_run(whole, killed)
    for step in (3, 6, 7):
        states = [folder / CHECKPOINTS / f"step-{step:06}" / CURRICULUM for folder in runs]
        assert states[0].read_bytes() == states[1].read_bytes()


def test_a_rollout_is_chosen_from_the_results_that_are_there_when_it_begins(runs: tuple[Path, Path]) -> None:
    """The choices again, from rollouts.jsonl alone: those of rollout s know the results up to s - async_steps - 1."""
    records, state = read_records(runs[0] / ROLLOUTS), State()
    for s in range(7):
        if s >= 2:
            of_step = [r for r in records if r["step"] == s - 1]
            means = {p: [r for r in of_step if r["problem"] == p] for p in {r["problem"] for r in of_step}}
            results = {p: [*r[0].get("earlier", ()), sum(x["reward"] for x in r) / 8] for p, r in means.items()}
            state = observe(state, s - 2, results)
        state = choose(RUN.data.curriculum, state, [f"letter-{c}" for c in LETTERS], 4, s, RUN.seed, samples=8)
        assert {r["problem"] for r in records if r["step"] == s + 1} == {*state.ahead[-1].problems}


def test_attempts_count_and_every_place_says_the_same(runs: tuple[Path, Path]) -> None:
    records, metrics = read_records(runs[0] / ROLLOUTS), read_records(runs[0] / METRICS)
    earlier = {r["problem"][-1]: r.get("earlier", []) for r in records}
    assert earlier["a"] == [1.0] and earlier["k"] == [0.0] and earlier["e"] == []
    table = read_json(runs[0] / CURRICULUM)["problems"]
    pools = {name[-1]: known["pool"] for name, known in table.items()}
    assert {*pools} == {*LETTERS} and table["letter-a"]["question"] == "a" and table["letter-k"]["pass_rate"] == 0.25
    assert all(pools[c] == ("easy" if c <= "d" else "hard" if c >= "m" else "active") for c in LETTERS)
    last = {name: metrics[-1][f"curriculum_{name}"] for name in ("active", "easy", "hard", "drawn")}
    assert last == {"active": 0.5, "easy": 0.25, "hard": 0.25, "drawn": 1.0}
    assert read_json(runs[0] / SUMMARY)["curriculum"] == last
    assert cells(7, metrics[-1], {})["easy"] == "25%" and "easy" not in cells(7, {}, {})
    (panel,) = (panel for panel in PANELS if panel.title == "Curriculum")
    assert {line.name: line.y[-1] for line in lines_of(panel, metrics)}["hard"] == 0.25
    assert all((meaning := find(name)) and meaning[0] in CURRICULUM_METRICS for name in metrics[0] if "curric" in name)


def test_verify_compares_the_pass_rates_with_the_records(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert [part for part in verify(runs[0]) if not part.sound] == []
    folder = Path(shutil.copytree(runs[0], tmp_path / "copy"))
    last = stored.latest(folder / CHECKPOINTS)
    assert last is not None
    state = json.loads((last / CURRICULUM).read_text())
    means = state["problems"]["letter-e"]["means"]
    means[-1] = 1.0
    (last / CURRICULUM).write_text(json.dumps(state))
    (wrong,) = (part for part in verify(folder) if part.name == CURRICULUM)
    assert not wrong.sound and wrong.message.startswith("the pass rate of problem letter-e in step-000007 is not that")


def test_a_reward_that_later_is_no_pass_rate_loses_no_step(tmp_path: Path) -> None:
    run = tiny_run(steps=3, prompts=2, eval_problems=0, checkpoint_every=0, curriculum=Pools())
    scores = chain(repeat(0.5, 2 * run.rollout.sampling.samples), repeat(2.0))  # from the second step on
    reward = in_process(lambda problem, text: next(scores))
    with pytest.raises(InputError, match="has a reward of 2; a pass rate is in"):
        train(run, tmp_path, components=replace(build(run), reward=reward))
    last = stored.latest(tmp_path / CHECKPOINTS)
    assert last is not None and last.name == "step-000001"


def test_a_resume_whose_data_has_changed_is_refused_in_a_line(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(runs[0], tmp_path / "copy"))
    fewer = Letters().training_problems()[:-1]
    monkeypatch.setattr(Letters, "training_problems", lambda self: fewer)
    run = configure(RUN, steps=8)
    with pytest.raises(InputError, match=r"cannot be read: its curriculum knows problem 'letter-p'.*put the data back"):
        train(run, folder, components=scripted(run))


@pytest.mark.slow
def test_in_the_background_is_the_same_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = configure(RUN, overlap=True)
    train(run, tmp_path / "run", components=scripted(run))
    assert_same_run(runs[0], tmp_path / "run")


@pytest.mark.slow
def test_changed_at_a_resume_it_is_a_chapter_and_what_was_measured_stays(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(runs[0], tmp_path / "copy"))
    run = configure(RUN, steps=9, curriculum=Pools(easy=0.5, hard=0.05))
    train(run, folder, components=scripted(run))
    (chapter,) = read_chapters(folder)
    assert chapter.changes["curriculum"] == ("pools(0.95, revisit=0.2)", "pools(0.5)")
    assert read_json(folder / CURRICULUM)["problems"]["letter-e"]["pool"] == "easy"
    assert all(part.sound for part in verify(folder))
    off = configure(run, steps=10, curriculum=None)
    train(off, folder, components=scripted(off))
    assert not (folder / CURRICULUM).exists() and "curriculum_easy" not in read_records(folder / METRICS)[-1]
    on = configure(run, steps=12)
    train(on, folder, components=scripted(on))
    last = stored.latest(folder / CHECKPOINTS)
    assert last is not None and (state := read_curriculum(last)) is not None
    assert state.begun == 10 and all(part.sound for part in verify(folder))


def test_a_held_out_problem_is_not_in_the_pool_and_ids_are_those_of_every_run(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"q": f"{i}?", "a": str(i)}) + "\n" for i in range(12)))
    task = Records(str(path), "q", "a", holdout=0)
    pool = training_pool(task, [Problem.of_text("x", "3?", "3")], 4, lambda p: p.prompt != "5?")
    assert {p.prompt for p in pool.values()} == {f"{i}?" for i in range(12) if i not in (3, 5)}
    assert all(pool[p.id] == p for p in task.training_problems() if p.prompt not in ("3?", "5?"))


def test_what_cannot_be_is_refused_in_a_line(tmp_path: Path) -> None:
    refused: Mapping[str, Any] = {
        r"curriculum=pools: the task Addition has no finite set of problems": lambda: tiny_run(
            task=Addition(), curriculum=Pools()
        ),
        r"curriculum hard=0.9: must be below easy=0.5": lambda: Pools(easy=0.5, hard=0.9),
        r"curriculum revisit=1: must be a number in \[0, 1\)": lambda: Pools(revisit=1),
        r"curriculum: 16 problems .* fewer than prompts=17.*set --prompts 16": lambda: build(
            tiny_run(prompts=17, curriculum=Pools())
        ),
        r"problem 'p\d+' has a reward of 2; a pass rate is in \[0, 1\]: scale": lambda: stepped(
            State(), 0, Pools(), dict.fromkeys(NAMES, 2.0)
        ),
        r"problem 'p01' has a reward of 2; a pass rate": lambda: observed([0.0, 0.0, 0.0, 2.0]),
        r"problem 'p01' has a reward of -1; a pass rate": lambda: observed([1.0, 1.0, 1.0, -1.0]),
    }
    for message, made in refused.items():
        with pytest.raises(InputError, match=message) as error:
            made()
        assert "\n" not in str(error.value)
    assert from_json(to_json(RUN)) == RUN
