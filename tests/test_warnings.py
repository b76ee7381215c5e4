"""Failures of training are named, sound runs raise nothing, and every place that shows warnings shows the same.

Not covered: whether the thresholds are right for large models and long runs.
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from drpo import cli
from drpo.cli import explain
from drpo.doctor import distribution
from drpo.live.follow import Follower
from drpo.live.track import TRACKERS, Tracked
from drpo.live.watch import draw_view
from drpo.objectives import PPOClip
from drpo.report.run_summary import run_summary
from drpo.report.words import warnings_in_words
from drpo.train import warning_rules
from drpo.train.callbacks import CallbackList, NullCallback
from drpo.train.config import Run, load_run
from drpo.train.loop import train
from drpo.train.metric_tables import KINDS
from drpo.train.records import EVALUATIONS, METRICS, SUMMARY, read_records
from drpo.train.run_warnings import BY_NAME, RULES
from drpo.train.setup import build
from drpo.train.warned import RunWarning, WarningLog, raised
from support import histories
from support.failures import FAILURES, Failure, learns
from support.histories import Records, changed, evaluation, sound
from support.worlds import Letters, tiny_run


def names(metrics: Records, evaluations: Records | None = None) -> set[str]:
    return {warning["name"] for warning in raised(metrics, evaluations or [])}


def after(step: int, then: Any, before: Any) -> Callable[[int], Any]:
    return lambda now: then if now > step else before


DEAD = {"grad_norm": lambda s: 0.0, "entropy": lambda s: None, "frac_reward_zero_std": lambda s: 1.0}
FLAT = {"reward_mean": lambda s: 0.1 - 0.001 * s}
PLANTED: dict[str, tuple[str, Callable[[], Records]]] = {
    "a reward that is the same for all": (
        "no_signal",
        lambda: changed(**DEAD, groups_all_wrong=lambda s: 0.0, groups_all_correct=lambda s: 0.0, **FLAT),
    ),
    "a task that is too hard": ("nothing_correct", lambda: changed(groups_all_wrong=lambda s: 0.94)),
    "a reward that pays for nothing": ("nothing_correct", lambda: changed(**DEAD, groups_all_wrong=lambda s: 1.0)),
    "a reward that pays for anything": (
        "everything_correct",
        lambda: changed(**DEAD, groups_all_wrong=lambda s: 0.0, groups_all_correct=lambda s: 1.0),
    ),
    "a judge that does not keep to its form": (
        "failing_endpoint",
        lambda: changed(endpoint_calls=after(0, 60, 60), endpoint_failed=after(8, 4, 1)),
    ),
    "a verifier that times out": ("failing_rewards", lambda: changed(reward_failed=after(8, 20, 1))),
    "too few tokens": ("truncation", lambda: changed(truncated=lambda s: 0.9)),
    "a learning rate at which the policy repeats itself": (
        "entropy_collapse",
        lambda: changed(entropy=lambda s: 1.5 * 0.6**s, **FLAT),
    ),
    "an entropy bonus that is too large": (
        "entropy_explosion",
        lambda: changed(entropy=lambda s: 1.5 + 0.2 * s, **FLAT),
    ),
    "a temperature that the sampler does not have": (
        "sampler_mismatch",
        lambda: changed(updates=lambda s: [{"ratio_mean": 0.9, "k3": 0.05}]),
    ),
    "weights that the sampler does not have": (
        "sampler_mismatch",
        lambda: changed(updates=lambda s: [{"ratio_mean": 1.0, "k3": 0.36}]),
    ),
    "too many updates of a rollout": ("rising_out_of_region", lambda: changed(out_of_region=lambda s: 0.02 * s)),
    "a batch that breaks the gradient": ("gradient_spike", lambda: changed(grad_norm=after(15, 40.0, 1.0))),
    "texts that grow for nothing": (
        "length_drift",
        lambda: changed(length_terminated=lambda s: 12.0 + 2 * s, truncated=lambda s: 0.0, **FLAT),
    ),
    "texts that shrink to nothing": (
        "length_drift",
        lambda: changed(length_terminated=lambda s: max(2.0, 30.0 - 3 * s), truncated=lambda s: 0.0, **FLAT),
    ),
    "a policy that forgets": ("reward_collapse", lambda: changed(reward_mean=after(9, 0.1, 0.6))),
    "a curriculum that has run out": (
        "curriculum_exhausted",
        lambda: changed(
            curriculum_filled=after(9, 3, 0),
            curriculum_active=lambda s: 0.1,
            curriculum_easy=lambda s: 0.9,
            curriculum_hard=lambda s: 0.0,
        ),
    ),
    "gradients that are not finite": (
        "repeated_skips",
        lambda: changed(skipped_updates=lambda s: 1 if s % 3 == 0 else None),
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_failure_is_named_and_nothing_else(fault: str) -> None:
    name, history = PLANTED[fault]
    assert names(history()) == {name}


def test_a_reward_that_is_hacked_is_seen_in_the_held_out_one() -> None:
    falling = [evaluation(0, 0.2), evaluation(8, 0.6), evaluation(16, 0.3)]
    assert names(sound(), falling) == {"reward_hacking"}
    assert names(sound(), [falling[0], evaluation(8, 0.35), falling[2]]) == set()  # within the intervals
    assert names(changed(**FLAT), falling) == set()  # which no training reward has bought
    unbounded = [evaluation(0, 0.0, float("nan")), evaluation(8, 0.0, float("nan")) | {"difference_high": -0.1}]
    assert names(sound(), unbounded) == {"reward_hacking"}


def test_entropy_is_warned_of_where_no_reward_has_come_of_it() -> None:
    """A reward that never gained is enough, and the page says so."""
    falling = {"entropy": lambda s: 1.5 * 0.6**s}
    assert names(changed(**falling, reward_mean=lambda s: 0.575)) == {"entropy_collapse"}
    assert names(changed(**falling)) == set()  # it rises
    page = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text()
    assert "less than half of the reward's best gain is left" in page and "never gained" in page
    assert "reward's best gain is left (or it never gained)" in BY_NAME["entropy_collapse"].threshold


def test_fifteen_ways_to_fail_and_every_warning_are_planted() -> None:
    assert len(PLANTED) + 1 >= 15
    assert {name for name, _ in PLANTED.values()} | {"reward_hacking"} == {rule.name for rule in RULES}


def test_sound_runs_raise_none() -> None:
    """Made ones, recorded ones of recipes, and those of a comparison with a sampler as fine as the trainer."""
    assert all(names(sound(steps), [evaluation(0, 0.2), evaluation(steps, 0.8)]) == set() for steps in (1, 9, 16, 200))
    runs = histories.recorded()
    assert len(runs) >= 5 and {name: found for name, run in runs.items() if (found := names(*run))} == {}
    trials = histories.without_noise(histories.committed("addition.json"))
    assert len(trials) == 18
    assert {name: found for name, trial in trials.items() if (found := names(*histories.of_trial(trial)))} == {}


def test_committed_runs_that_failed_are_named() -> None:
    trials = {t.name: t for t in histories.committed("addition.json") if t.config["rollout_precision"] != "auto"}
    (lost,) = (name for name in trials if name.startswith("spo") and trials[name].rewards[-1] == 0)
    assert "reward_collapse" in names(*histories.of_trial(trials[lost]))
    assert sum("truncation" in names(*histories.of_trial(trial)) for trial in trials.values()) > 9


# ---- when they are said ----


def log_of(held: list[bool]) -> Iterator[tuple[int, int, int]]:
    """The steps at which a warning is said that holds where it is told to."""
    log = WarningLog()
    for step, holds in enumerate(held, 1):
        for said in log.add([{"step": step, "skipped_updates": 99 if holds else -99}]):
            yield step, said.steps, said.times


def test_one_is_said_when_it_begins_and_when_it_has_lasted_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warning_rules, "SKIPPED_STEPS", 1)
    assert list(log_of([False] + [True] * 12)) == [(2, 1, 1), (5, 4, 1), (11, 10, 1)]
    said = list(log_of([True, False] * 20))
    assert [times for _, _, times in said] == [1, 2, 4, 8, 16]  # which comes and goes


@pytest.mark.parametrize("streaks", [[(1, 16)], [(1, 9)], [(6, 16)], [(2, 5), (9, 14)]])
def test_steps_without_a_signal_are_counted_from_the_first_to_the_last(streaks: list[tuple[int, int]]) -> None:
    idle = {step for first, last in streaks for step in range(first, last + 1)}
    nothing = {"grad_norm": 0.0, "groups_with_signal": 0.0, "groups_all_wrong": 1.0, "groups_all_correct": 0.0}
    (warning,) = raised([m | nothing if m["step"] in idle else m for m in sound()])
    first, last = streaks[-1]
    assert warning["text"].startswith(f"the last {last - first + 1} steps trained on nothing")
    assert (warning["first_step"], warning["last_step"]) == (streaks[0][0], last)
    assert (warning["steps"], warning["times"]) == (len(idle), len(streaks))


def test_where_it_held_is_told_in_words() -> None:
    metrics = [m | {"skipped_updates": 3} if m["step"] in (1, 15) else m for m in sound()]
    (warning,) = raised(metrics)
    assert (warning["first_step"], warning["last_step"], warning["steps"], warning["times"]) == (1, 16, 12, 2)
    assert warning["ongoing"] and warning["page"] == "docs/warnings.md#repeated_skips"
    assert warnings_in_words([warning]).startswith("repeated_skips (since step 1, at 12 steps); drpo explain")


@given(fault=st.sampled_from(sorted(PLANTED)), cut=st.integers(0, histories.STEPS))
def test_a_run_that_resumes_has_the_warnings_of_one_that_did_not(fault: str, cut: int) -> None:
    metrics, evaluations = PLANTED[fault][1](), [evaluation(0, 0.2), evaluation(8, 0.6), evaluation(16, 0.3)]
    whole, log = WarningLog(), WarningLog()
    said = [w for m in metrics for w in whole.add([m], [e for e in evaluations if e["step"] == m["step"]])]
    before = [e for e in evaluations if e["step"] <= cut]
    first = log.add(metrics[:cut], before)
    later = log.add(metrics[cut:], evaluations[len(before) :])
    assert [*first, *later] == said
    assert log.warned == WarningLog(metrics, evaluations).warned


@given(
    figures=st.lists(
        st.dictionaries(
            st.sampled_from(sorted({name for rule in RULES for name in rule.reads})),
            st.sampled_from([0, 0.0, 1.0, -1.0, 0.5, float("nan"), float("inf")]),
        ),
        max_size=14,
    )
)
def test_any_figures_can_be_asked(figures: list[dict[str, float]]) -> None:
    steps = [{"step": i, **record} for i, record in enumerate(figures, 1)]
    found = raised(steps, [evaluation(3, 0.5), evaluation(4, 0.1)])
    assert {warning["name"] for warning in found} <= BY_NAME.keys()
    assert json.dumps(found, allow_nan=False)


def test_the_doctor_asks_for_the_same_k3() -> None:
    assert warning_rules.K3_OFF == distribution.K3_BROKEN
    assert warning_rules.OUTSIDE == distribution.OUT_OF_REGION_BROKEN


# ---- where they are shown ----


class Heard(NullCallback):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[RunWarning] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warned(self, warning: RunWarning) -> None:
        self.warnings.append(warning)


class Keeper:
    """A tracker that keeps its alerts."""

    def __init__(self) -> None:
        self.alerts: list[tuple[int, str, str]] = []

    def __call__(self, run: Run, folder: Path, step: int) -> "Keeper":
        return self

    def log(self, step: int, figures: Any) -> None:
        """Nothing."""

    def alert(self, step: int, warning: RunWarning) -> None:
        self.alerts.append((step, warning.name, warning.text))

    def close(self) -> None:
        """Nothing."""


def test_terminal_summary_report_trackers_and_watch_show_the_same(tmp_path: Path) -> None:
    heard, keeper = Heard(), Keeper()
    with Tracked("stand-in", keeper, print) as tracked:
        summary = train(tiny_run(steps=4, task=Letters("never")), tmp_path, CallbackList(heard, tracked))
    (warning,) = summary["warnings"]
    assert summary["warnings"] == json.loads((tmp_path / SUMMARY).read_text())["warnings"]
    assert (warning["first_step"], warning["steps"], warning["ongoing"]) == (1, 4, True)
    said = "trained on nothing: no update had a gradient; all wrong in "
    assert warning["text"].startswith(f"the last 4 steps {said}")
    assert warning["text"].endswith("(drpo explain nothing_correct)")
    assert keeper.alerts == [(w.last_step, w.name, w.text) for w in heard.warnings]
    ((step, name, text),) = keeper.alerts
    assert (step, name) == (3, "nothing_correct")
    assert text.startswith(f"the last 3 steps {said}") and text in heard.notes
    metrics, evaluations = (read_records(tmp_path / name) for name in (METRICS, EVALUATIONS))
    shown = dict(run_summary(load_run(tmp_path), {}, metrics, evaluations))
    assert shown["warning nothing_correct"] == f"since step 1: {warning['text']}"
    view = Follower(tmp_path).look()
    assert view.warnings == summary["warnings"]
    console = Console(file=io.StringIO(), width=200)
    console.print(draw_view(view, 200))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "warnings: nothing_correct (since step 1); drpo explain NAME" in text


def test_watch_takes_what_is_new_and_begins_anew_where_a_run_was_rewound(tmp_path: Path) -> None:
    path, metrics = tmp_path / METRICS, PLANTED["too few tokens"][1]()
    follower = Follower(tmp_path)
    for records in (metrics[:3], metrics[:12], metrics, metrics[:4], [m | {"truncated": 0.0} for m in metrics]):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        assert follower.look().warnings == raised(records)


def test_trackers_have_alerts_or_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stand-ins for their packages; test_track.py has the real ones, where these are installed."""
    calls: list[tuple[Any, ...]] = []

    class Stub:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: calls.append((name, args, kwargs))

    warning = RunWarning("truncation", 4, 9, 6, 1, 6, "cut")
    for name, attribute in (("tensorboard", "_writer"), ("wandb", "_run"), ("trackio", "_run")):
        tracker = object.__new__(TRACKERS[name])  # type: ignore[call-overload]
        setattr(tracker, attribute, Stub())
        tracker.alert(9, warning)
    assert calls == [
        ("add_text", ("warnings/truncation", "cut", 9), {}),
        ("alert", (), {"title": "truncation", "text": "step 9: cut", "level": "WARN"}),
        ("alert", (), {"title": "truncation", "text": "cut", "step": 9}),
    ]


# ---- drpo explain ----


def explained(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["explain", *words]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_metric_and_a_warning_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for written in ("k3", "updates/0/k3", "drpo/k3"):
        text = explained(capsys, written)
        assert "mean of r - 1 - log r" in text and "sampler_mismatch" in text and "normal" in text
    rule = next(rule for rule in RULES if rule.name == "entropy_collapse")
    text = explained(capsys, "entropy_collapse")
    assert all(" ".join(part.split()) in text for part in (rule.means, rule.threshold, rule.reason, rule.advice))
    assert "95 % interval" in explained(capsys, "evaluation/low")
    assert "unbiased pass@k" in explained(capsys, "pass_at")


def test_what_an_option_names_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    text = explained(capsys, "GDPO")
    assert "--method gdpo" in text and "gdpo: --advantage" in text and "arXiv 2601.05242" in text
    for name, said in (("judge", "scale: lowest and highest score"), ("drpo(0.2)", "w = 1 - sign(A) (pi - mu)")):
        assert said in explained(capsys, name) and ">>>" not in explained(capsys, name)
    assert explained(capsys, "adamw").count("--optimizer") == 1
    for name in {*explain.names()} - {"reward"}:  # which is first of all the metric seconds/reward
        assert explained(capsys, name).startswith(f"{name}: ")


def test_alone_it_lists_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    text = explained(capsys)
    assert all(name in text for name in [rule.name for rule in RULES] + [n for table in KINDS.values() for n in table])


def test_a_typo_is_answered_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    for typo, meant in (("entropy_colapse", "entropy_collapse"), ("ratio_meen", "ratio_mean"), ("gpro", "grpo")):
        assert cli.main(["explain", typo]) == 2
        assert f"did you mean '{meant}'?" in capsys.readouterr().err
    assert cli.main(["explain", "zzz"]) == 2 and "drpo explain lists all names" in capsys.readouterr().err
    assert cli.main(["explain", "k3", "entropy"]) == 2 and "takes one name" in capsys.readouterr().err


# ---- real runs of the tiny model ----


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_a_real_run_that_fails_is_named(failure: Failure, tmp_path: Path) -> None:
    summary = train(failure.run, tmp_path, components=failure.components(build(failure.run)), keep_model=False)
    assert failure.warning in {warning["name"] for warning in summary["warnings"]}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("changes", [{}, {"updates": 4}, {"objective": PPOClip(0.2, 0.28)}], ids=str)
def test_a_real_run_that_learns_raises_none(changes: dict[str, Any], seed: int, tmp_path: Path) -> None:
    summary = train(learns(seed=seed, **changes), tmp_path, keep_model=False)
    assert summary["warnings"] == []
