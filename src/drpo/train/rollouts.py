"""The rollouts of a run, in order: which weights each is sampled with, and which are sampled ahead of training.

Rollout s is sampled when step s - async_steps begins, with the weights that the engine then has. The engine receives
new weights when a step begins whose number is a multiple of `sync_every`. So completions are at most
async_steps + sync_every - 1 steps old, however long anything takes, and sampling in the background changes nothing.

With `dynamic_sampling` a rollout is scored as soon as it is sampled, and groups whose rewards are all equal are sampled
again with the same weights, each attempt with random numbers of its own. Ranks do so apart from each other.

With a curriculum the problems of rollout s are chosen when it begins, from the results of rollouts 0 to
s - async_steps - 1: those that are trained by then, however long anything takes. All ranks choose, and choose the same.
"""

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile
from pathlib import Path
from statistics import fmean
from types import TracebackType

import msgspec
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from drpo.credit import teaches_nothing
from drpo.errors import InputError
from drpo.files import set_usual_mode
from drpo.ranks import SINGLE_PROCESS, Ranks
from drpo.rewards import RewardPool
from drpo.rewards.usage import total as total_usage
from drpo.rollout import EpisodeDriver
from drpo.tasks import is_finite, sample_unseen, training_pool
from drpo.train import curriculum
from drpo.train.config import Run
from drpo.train.log import episode_of, in_flight_record, write_json
from drpo.train.records import read_records
from drpo.train.score import score
from drpo.train.stored import CURRICULUM, read_curriculum
from drpo.types import Episode, Key, Problem, ScoredGroup

IN_FLIGHT, OLD_WEIGHTS = "in_flight.jsonl", "old_weights.safetensors"
_LONGEST_QUESTION = 200
"""Characters of a question in the table of pass rates."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """What a rank sampled for a step.

    Args:
        problems: the problems.
        episodes: the episodes of each.
        scored: their groups, where they were scored as they were sampled (`--dynamic-sampling`); empty elsewhere.
    """

    problems: list[Problem]
    episodes: list[tuple[Episode, ...]]
    scored: list[ScoredGroup] = field(default_factory=list)


class Rollouts:
    """Samples the episodes of each step, and loads weights into the engine.

    Args:
        run: the configuration: how stale completions may be, and whether they are sampled in the background.
        driver: samples episodes; nothing else may call its engine meanwhile.
        held_out: problems that training never samples.
        ranks: the processes that sample together, each a shard of a rollout's problems.
        apart: context of a weight sync, in which ranks make no collective calls; None for `ranks.reraise_on_all`.
        fits: returns False for a drawn problem that is left out; None leaves none out.
        rewards: score episodes where groups of equal rewards are sampled again; None is fine elsewhere.
    """

    def __init__(
        self,
        run: Run,
        driver: EpisodeDriver,
        held_out: Sequence[Problem],
        ranks: Ranks = SINGLE_PROCESS,
        apart: Callable[[], AbstractContextManager[None]] | None = None,
        fits: Callable[[Problem], bool] | None = None,
        rewards: RewardPool | None = None,
    ) -> None:
        self._run, self._driver, self._held_out, self._ranks = run, driver, held_out, ranks
        self._rewards = rewards
        self._apart = apart or ranks.reraise_on_all
        self._fits = fits
        self._left_out = 0
        self._pool = self._training_pool()
        self._chosen = curriculum.State()
        self._ahead: deque[Future[Rollout]] = deque()
        self._next = 0  # the first rollout that is not yet begun
        self._loaded: int | None = None  # version of the weights that the engine has
        self._old: tuple[Mapping[str, Tensor], int] | None = (
            None  # the weights of the last sync and their version, where sync_every > 1
        )
        self._thread = ThreadPoolExecutor(1, "rollout") if run.rollout.overlap else None

    def __enter__(self) -> "Rollouts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def refresh(self, state: Callable[[], Mapping[str, Tensor]], version: int) -> None:
        """Load the weights that this step's rollouts are sampled with into the engine.

        Args:
            state: returns the policy's current weights.
            version: of these weights, in steps done.
        """
        self.settle()
        if self._run.rollout.sync_every == 1:
            self._load(state, version)
            return
        if self._old is None or version % self._run.rollout.sync_every == 0:
            self._old = ({name: value.clone() for name, value in state().items()}, version)
        old, age = self._old
        self._load(lambda: old, age)

    def take(self, step: int) -> Rollout:
        """Return this rank's rollout of a step, after beginning the one `async_steps` ahead.

        Raises:
            Whatever the engine raised while it sampled them.
        """
        while self._next <= min(step + self._run.rollout.async_steps, self._run.trainer.steps - 1):
            self._choose(self._next)
            self._ahead.append(self._begin(self._next))
            self._next += 1
        self._ahead[0].result()  # a failed rollout stays in the queue, so that later ones keep their step
        return self._ahead.popleft().result()

    def require_rates(self, groups: Sequence[ScoredGroup]) -> None:
        """Raise if there is a curriculum, and rewards are no pass rates.

        Args:
            groups: of a rollout, of all ranks.

        Raises:
            InputError: they are not.
        """
        if self._run.data.curriculum is not None:
            curriculum.require_rates({g.problem.id: g.rewards.tolist() for g in groups})

    def observe(self, step: int, groups: Sequence[ScoredGroup]) -> dict[str, float]:
        """Take the results of a rollout into the curriculum; return its `CURRICULUM_METRICS`, {} without one.

        Args:
            step: index of the rollout.
            groups: of all ranks, which `require_rates` let pass.
        """
        rule, choice = self._run.data.curriculum, self._chosen.choice(step)
        if rule is None or choice is None:
            return {}
        means = {g.problem.id: _means(g) for g in groups}
        self._chosen = curriculum.observe(self._chosen, step, means)
        shares = curriculum.shares(rule, self._chosen, len(self._pool), self._run.rollout.sampling.samples)
        counts = {"revisited": choice.revisited, "filled": choice.filled}
        return {f"curriculum_{name}": figure for name, figure in (shares | counts).items()}

    def write_pass_rates(self, folder: Path, step: int) -> None:
        """Write what the curriculum knows of each problem that was drawn into a run's folder, after `step` steps.

        Without a curriculum what an earlier chapter may have left is removed.
        """
        rule, samples = self._run.data.curriculum, self._run.rollout.sampling.samples
        if rule is None:
            (folder / CURRICULUM).unlink(missing_ok=True)
            return
        problems = {
            name: {
                "question": _cut(self._pool[name].prompt),
                "pool": rule.pool(known.means, samples),
                "pass_rate": curriculum.pass_rate(known.means, samples),
                "last_groups": known.means,
                "last_step": known.step + 1,
            }
            for name, known in sorted(self._chosen.problems.items(), key=lambda item: (len(item[0]), item[0]))
        }
        write_json(folder / CURRICULUM, {"step": step, "problems": problems})

    def settle(self) -> None:
        """Wait until sampling in the background has ended, so that new weights do not reach it."""
        wait(self._ahead)

    def current(self, state: Callable[[], Mapping[str, Tensor]], version: int) -> EpisodeDriver:
        """Return the driver with the policy's current weights in its engine, for an evaluation."""
        self.settle()
        self._load(state, version)
        return self._driver

    def save(self, folder: Path, step: int) -> None:
        """Write the rollouts sampled ahead, and the older weights that later ones are sampled with.

        A rollout that failed is left out, with those after it: a resumed run samples them with the weights it has.
        """
        self.settle()
        done = list(takewhile(lambda rollout: rollout.exception() is None, self._ahead))
        done = done[: -self._ranks.all_reduce_max(-len(done))]
        local_records = [
            {"step": step + i, **in_flight_record(e)}
            for i, r in enumerate(done)
            for group in r.result().episodes
            for e in group
        ]
        records = sorted(self._ranks.gather(local_records), key=lambda r: int(r["step"]))
        if not self._ranks.is_main:
            return
        if self._pool:
            (folder / CURRICULUM).write_bytes(msgspec.json.encode(self._chosen))
        if records:
            (folder / IN_FLIGHT).write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        if self._old is not None and step % self._run.rollout.sync_every:
            state, version = self._old
            save_file(dict(state), folder / OLD_WEIGHTS, metadata={"version": str(version)})
            set_usual_mode(folder / OLD_WEIGHTS)

    def restore(self, folder: Path, step: int, ahead: bool = True) -> None:
        """Restore what `save` wrote into the folder of a checkpoint after `step` steps.

        Args:
            folder: of the checkpoint.
            step: steps done.
            ahead: restore the rollouts sampled ahead; False has them sampled again.

        Raises:
            InputError: the files cannot be read.
        """
        try:
            if self._pool:
                self._chosen = self._known(read_curriculum(folder) or curriculum.State(begun=step))
            records = read_records(folder / IN_FLIGHT) if ahead else []
            rollouts = [
                self._local_part(self._problems(number), [episode_of(r, self._run.rollout.sampling) for r in of_one])
                for number, of_one in groupby(records, key=lambda r: int(r["step"]))
            ]
            if (folder / OLD_WEIGHTS).exists():
                with safe_open(folder / OLD_WEIGHTS, "pt") as held:
                    state = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 (not a mapping)
                    self._old = (state, int(held.metadata()["version"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"checkpoint {folder} cannot be read: {error}") from None
        self._ahead = deque(map(_done, rollouts))
        self._next = step + len(rollouts)

    def _local_part(self, problems: list[Problem], episodes: Sequence[Episode]) -> Rollout:
        """Return this rank's shard of a whole rollout."""
        local_problems = self._ranks.shard(problems)
        by_problem: dict[str, list[Episode]] = {problem.id: [] for problem in problems}
        for episode in sorted(episodes, key=lambda e: e.sample):
            by_problem[episode.problem_id].append(episode)
        return Rollout(local_problems, [tuple(by_problem[problem.id]) for problem in local_problems])

    def _training_pool(self) -> dict[str, Problem]:
        """Return the problems that the curriculum chooses from, by id; none without one."""
        data = self._run.data
        if data.curriculum is None or not is_finite(data.task):
            return {}
        fits = self._counted_fit if self._fits else None
        return training_pool(data.task, self._held_out, data.prompts, fits)

    def _known(self, state: curriculum.State) -> curriculum.State:
        """Return a curriculum's state whose problems are all there."""
        gone = next((name for name in state.problems if name not in self._pool), None)
        if gone is not None:
            raise InputError(f"its curriculum knows problem {gone!r}, which the task no longer has: put the data back")
        return state

    def _choose(self, step: int) -> None:
        """Let the curriculum choose the problems of a rollout, unless it has."""
        rule, n, samples = self._run.data.curriculum, self._run.data.prompts, self._run.rollout.sampling.samples
        if rule is not None and self._chosen.choice(step) is None:
            self._chosen = curriculum.choose(rule, self._chosen, [*self._pool], n, step, self._run.seed, samples)

    def _problems(self, step: int) -> list[Problem]:
        if (choice := self._chosen.choice(step)) is not None:
            return [self._pool[name] for name in choice.problems]
        fits = self._counted_fit if self._fits else None
        return sample_unseen(self._run.data.task, self._held_out, self._run.data.prompts, step, self._run.seed, fits)

    def _counted_fit(self, problem: Problem) -> bool:
        fine = self._fits is None or self._fits(problem)
        self._left_out += not fine
        return fine

    def left_out(self) -> int:
        """Return how many problems were left out since the last call."""
        count, self._left_out = self._left_out, 0
        return count

    def _begin(self, step: int) -> Future[Rollout]:
        return _done(self._draw(step)) if self._thread is None else self._thread.submit(self._draw, step)

    def _draw(self, step: int) -> Rollout:
        problems = self._ranks.shard(self._problems(step))
        episodes = self._sample(problems, (self._run.seed, step))
        if not self._run.rollout.dynamic_sampling or self._rewards is None:
            return Rollout(problems, episodes)
        scored = score(problems, episodes, self._rewards)
        for attempt in range(1, 1 + self._run.rollout.dynamic_sampling):
            advantage = self._run.objective.advantage
            equal = [i for i, g in enumerate(scored) if len(g.episodes) > 1 and teaches_nothing(g, advantage)]
            again = [problems[i] for i in equal]
            sampled = self._sample(again, (self._run.seed, step, attempt))
            new = [
                tuple(replace(e, attempt=attempt, earlier=self._earlier(scored[i])) for e in group)
                for i, group in zip(equal, sampled, strict=True)
            ]
            for i, group, of_one in zip(equal, score(again, new, self._rewards), new, strict=True):
                usage = total_usage((scored[i].usage, group.usage))
                scored[i], episodes[i] = replace(group, usage=usage), of_one
        return Rollout(problems, episodes, scored)

    def _earlier(self, group: ScoredGroup) -> tuple[float, ...]:
        """The mean rewards of a group that is sampled again, and of those before it, where a curriculum counts them."""
        return _means(group) if self._pool else ()

    def _sample(self, problems: Sequence[Problem], key: Key) -> list[tuple[Episode, ...]]:
        return self._driver.run(problems, self._run.rollout.sampling, key) if problems else []

    def _load(self, state: Callable[[], Mapping[str, Tensor]], version: int) -> None:
        if self._loaded != version:
            self._loaded = None  # unknown, should the sync fail
            whole = state()  # a collective call where the policy is sharded
            with self._apart():
                self._driver.engine.load_weights(whole, version)
            self._loaded = version


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_QUESTION else f"{text[: _LONGEST_QUESTION - 3]}..."


def _means(group: ScoredGroup) -> tuple[float, ...]:
    """The mean reward of a group, if any was scored, after those of the attempts before it."""
    rewards = group.rewards.tolist()
    earlier = group.all_episodes[0].earlier if group.all_episodes else ()
    return (*earlier, fmean(rewards)) if rewards else earlier


def _done(rollout: Rollout) -> Future[Rollout]:
    future: Future[Rollout] = Future()
    future.set_result(rollout)
    return future
