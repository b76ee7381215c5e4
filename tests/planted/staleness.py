"""Mistakes in who samples with which weights: too fresh, too old, or not the same after a crash."""

from planted import Bug

ROLLOUTS = "tests/test_rollouts.py::"
VERSIONS = f"{ROLLOUTS}test_every_rollout_is_sampled_with_the_weights_it_should_be"
EVALUATED = f"{ROLLOUTS}test_an_evaluation_sees_the_newest_weights_and_leaves_the_old_ones"
SAME = f"{ROLLOUTS}test_in_the_background_is_the_same_run_bit_for_bit"
RESUMED = f"{ROLLOUTS}test_killed_and_resumed_is_one_run_bit_for_bit"
DIES = f"{ROLLOUTS}test_a_sampler_that_dies_costs_no_finished_step"
MEETS = f"{ROLLOUTS}test_the_next_rollout_is_sampled_while_this_one_is_trained_on"
FILE = "train/rollouts.py"

BUGS = (
    Bug(
        14,
        "weights are handed over while the old ones are still sampling",
        FILE,
        """        self.settle()
        if self._run.refresh_every == 1:""",
        """        if self._run.refresh_every == 1:""",
        (f"{SAME}[1-1-scripted]",),
    ),
    Bug(
        14,
        "the old weights are a view of those in training",
        FILE,
        "{name: value.clone() for name, value in state().items()}",
        "dict(state())",
        (EVALUATED,),
    ),
    Bug(
        14,
        "the weights of an evaluation go on sampling",
        FILE,
        "self._load(lambda: old, age)",
        "self._load(lambda: old, age) if version == age else None",
        (EVALUATED,),
    ),
    Bug(
        14,
        "a hand-over that failed counts as done",
        FILE,
        """            self._loaded = None  # unknown, should the hand-over fail
            whole = state()  # which divided ranks gather together
            with self._apart():
                self._driver.engine.load_weights(whole, version)
            self._loaded = version""",
        """            self._loaded = version
            self._driver.engine.load_weights(state(), version if version % 4 else 0)""",
        (VERSIONS,),
    ),
    Bug(
        7,
        "rollouts are one step older than asked for",
        FILE,
        "step + self._run.lag,",
        "step + self._run.lag + 1,",
        (VERSIONS,),
    ),
    Bug(
        7,
        "the age of completions is counted from the next step",
        "train/metrics.py",
        '"lag_max": max(step - 1 - e.version for e in episodes)',
        '"lag_max": max(step - e.version for e in episodes)',
        (VERSIONS,),
    ),
    Bug(
        20,
        "rollouts in flight are drawn again after a crash",
        FILE,
        "        self._ahead = deque(map(_done, ahead))\n        self._next = step + len(ahead)",
        "        self._next = step",
        (f"{RESUMED}[1-1-True]",),
    ),
    Bug(
        20,
        "the old weights are forgotten in a crash",
        FILE,
        "if self._old is not None and step % self._run.refresh_every:",
        "if self._old is not None and not self._run.refresh_every:",
        (f"{RESUMED}[0-3-False]",),
    ),
    Bug(
        20,
        "a rollout that failed shifts those behind it",
        FILE,
        "        self._ahead[0].result()  # one that failed stays where it is, so that what follows keeps its number\n",
        "",
        (f"{DIES}[generate-1-True]",),
    ),
    Bug(
        20,
        "a sampler that dies in a hand-over costs the steps before it",
        "train/session.py",
        'self._between_steps = name != "update"',
        'self._between_steps = name in ("rollout", "reward")',
        (f"{DIES}[load-0-False]",),
    ),
    Bug(
        20,
        "the background is a queue, and nothing runs meanwhile",
        FILE,
        "_done(self._draw(step)) if self._thread is None else self._thread.submit(self._draw, step)",
        "_done(self._draw(step))",
        (MEETS,),
    ),
)
