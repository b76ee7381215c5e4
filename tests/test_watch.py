"""A run's folder read from outside while it is written, and the picture of it.

Not covered: how a real terminal draws the picture; rich and plotext are trusted with that.
"""

import io
import json
import os
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from drpo import cli
from drpo.cli.commands import watch as command
from drpo.errors import InputError
from drpo.live import follow
from drpo.live.follow import Follower, Lines, View, find_trials, last_record
from drpo.live.step_table import brief_conversation, sample_panel
from drpo.live.watch import draw_view, draw_views, duration, sparkline
from drpo.train.log import FILES, RunLog
from drpo.train.loop import train
from drpo.train.records import (
    CONFIG,
    ENVIRONMENT,
    EVALUATIONS,
    METRICS,
    ROLLOUTS,
    SUMMARY,
    TIMING,
    TRIALS,
    read_records,
)
from support.hand_run import conversation
from support.runs import put
from support.worlds import few_run, tiny_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(tiny_run(steps=6, eval_every=2, name="tiny-world"), folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, written in the order in which a run writes."""
    for name in (CONFIG, ENVIRONMENT, *FILES, SUMMARY):
        shutil.copyfile(finished / name, tmp_path / name)
    return tmp_path


def drawn(view: View | list[View], width: int = 110, height: int = 60) -> str:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(draw_views(view, width) if isinstance(view, list) else draw_view(view, width))
    return console.file.getvalue()  # type: ignore[attr-defined]


# ---- lines that grow ----

appended = st.tuples(st.just("append"), st.integers(1, 4))
cut = st.tuples(st.just("cut"), st.integers(1, 30))
rewound = st.tuples(st.just("rewind"), st.integers(0, 8))
looked = st.tuples(st.just("look"), st.just(0))


@given(events=st.lists(st.one_of(appended, cut, rewound, looked), max_size=25), differs=st.booleans())
def test_what_is_read_in_parts_is_what_is_there(tmp_path_factory, events, differs: bool):
    """Appended, cut in the midst of a line or of a letter, and rewound as a run that resumes does, in any order."""
    path = tmp_path_factory.mktemp("lines") / ROLLOUTS
    lines, pending, step, attempt = Lines(path), b"", 0, 0
    for event, n in [*events, ("look", 0)]:
        if event == "append":
            whole = b"".join(
                json.dumps({"step": step + i + 1, "text": "πμ" * i, "attempt": attempt * differs}, ensure_ascii=False)
                .encode() + b"\n"
                for i in range(n)
            )  # fmt: skip
            step += n
            with path.open("ab") as file:
                file.write(pending + whole)
            pending = b""
        elif event == "cut" and not pending:  # the beginning of a line, the rest of which comes with the next ones
            line = json.dumps({"step": step + 1, "text": "Δ" * 20}, ensure_ascii=False).encode() + b"\n"
            step += 1
            with path.open("ab") as file:
                file.write(line[:n])
            pending = line[n:]
        elif event == "rewind":
            RunLog(path.parent).rewind(n)
            step, pending, attempt = max([r["step"] for r in read_records(path)], default=0), b"", attempt + 1
        elif event == "look":
            lines.refresh()
            assert lines.records == read_records(path)


def test_a_run_that_resumed_and_went_further_is_read_anew(tmp_path: Path):
    """Between two looks, so that the file is no shorter than it was."""
    log, lines = RunLog(tmp_path), Lines(tmp_path / TIMING)
    log.write(TIMING, *({"step": i, "update": 1.5} for i in range(1, 6)))
    lines.refresh()
    log.rewind(2)
    log.write(TIMING, *({"step": i, "update": 2.5} for i in range(3, 9)))
    lines.refresh()
    assert lines.records == read_records(tmp_path / TIMING) and len(lines.records) == 8


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log, lines, parsed = RunLog(tmp_path), Lines(tmp_path / METRICS), []
    monkeypatch.setattr(follow, "_record", lambda line: parsed.append(line) or json.loads(line))
    log.write(METRICS, *({"step": i} for i in range(1000)))
    lines.refresh()
    parsed.clear()
    lines.refresh()
    log.write(METRICS, {"step": 1000}, {"step": 1001})
    lines.refresh()
    assert len(parsed) == 2 and len(lines.records) == 1002


def test_a_file_that_goes_away_is_forgotten(tmp_path: Path):
    lines = Lines(tmp_path / METRICS)
    lines.refresh()
    RunLog(tmp_path).write(METRICS, {"step": 1})
    lines.refresh()
    assert lines.records == [{"step": 1}]
    (tmp_path / METRICS).unlink()
    lines.refresh()
    assert lines.records == []


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path):
    (tmp_path / METRICS).write_bytes(b'{"step": 1}\nnonsense\n\xff\xfe\n[1]\n{"no": "step"}\n\n{"step": 2}\n')
    lines = Lines(tmp_path / METRICS)
    lines.refresh()
    assert lines.records == [{"step": 1}, {"step": 2}]


@given(lengths=st.lists(st.integers(0, 300), max_size=8), tail=st.integers(0, 40))
def test_the_last_record_whatever_the_length_of_lines(tmp_path_factory, lengths: list[int], tail: int):
    folder = tmp_path_factory.mktemp("last")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow, "_LAST_BYTES", 16)
        assert last_record(folder / ROLLOUTS) is None
        RunLog(folder).write(ROLLOUTS, *({"step": i, "text": "ü" * n} for i, n in enumerate(lengths)))
        with (folder / ROLLOUTS).open("a") as file:
            file.write('{"step": 99, "text": "not yet whole'[:tail])
        assert last_record(folder / ROLLOUTS) == (read_records(folder / ROLLOUTS) or [None])[-1]


# ---- a view ----


def test_a_view_is_what_the_run_wrote(finished: Path):
    view, summary = Follower(finished).look(), json.loads((finished / SUMMARY).read_text())
    metrics = read_records(finished / METRICS)
    assert (view.step, view.steps, view.status(), view.summary) == (6, 6, "finished", summary)
    assert view.curve("reward_mean") == ([m["step"] for m in metrics], [m["reward_mean"] for m in metrics])
    assert view.phases() == pytest.approx(summary["seconds"])
    assert sum(sum(view.seconds(i).values()) for i in range(1, 7)) == pytest.approx(summary["training_seconds"])
    assert [(e.step, e.reward_mean) for e in view.evaluations] == [
        (e["step"], e["reward_mean"]) for e in read_records(finished / EVALUATIONS)
    ]
    assert view.sample == read_records(finished / ROLLOUTS)[-1]
    text = drawn(view)
    for shown in ("tiny-world", "6/6 steps", "finished", "rollout", "held-out mean reward after 6 steps", "a sample"):
        assert shown in text
    assert "value loss" not in text
    critic = [m | {"explained_variance": 0.25, "value_loss": 0.5} for m in view.metrics]
    for line in (r"explained variance +\S+ +0.25 to 0.25", r"value loss +\S+ +0.5 to 0.5"):
        assert re.search(line, drawn(replace(view, metrics=critic)))


def test_a_run_that_goes_on_is_running_until_its_own_summary(folder: Path):
    follower = Follower(folder)
    assert follower.look().status() == "finished"
    summary = json.loads((folder / SUMMARY).read_text())
    (folder / SUMMARY).write_text(json.dumps(summary | {"finished": False, "stopped_by_signal": 2}))
    assert follower.look().status() == "stopped by signal 2"
    later = time.time() + 5
    os.utime(folder / ENVIRONMENT, (later, later))  # what a session that resumes writes first
    assert follower.look().summary is None and follower.look().status() == "running"
    os.utime(folder / SUMMARY, (later + 5, later + 5))
    assert follower.look().status() == "stopped by signal 2"
    (folder / SUMMARY).write_text(json.dumps(summary | {"finished": False}))
    os.utime(folder / SUMMARY, (later + 5, later + 5))
    assert follower.look().status() == "ended early"
    (folder / SUMMARY).unlink()
    for name in (CONFIG, *FILES):
        os.utime(folder / name, (later - 1805, later - 1805))
    assert follower.look().status() == "silent for 30 min"


def test_time_left_is_at_the_pace_of_the_last_ten_steps(folder: Path):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(put(config, {"steps": 106})))
    for name in (METRICS, TIMING, SUMMARY):
        (folder / name).unlink()
    assert Follower(folder).look().left_s() is None
    log = RunLog(folder)
    log.write(METRICS, *({"step": i} for i in range(1, 17)))
    pace = [100.0] * 6 + [1.0] * 5 + [3.0] * 5
    log.write(TIMING, *({"step": i + 1, "rollout": s / 2, "update": s / 2} for i, s in enumerate(pace)))
    log.write(TIMING, {"step": 16, "evaluation": 1000.0})
    view = Follower(folder).look()
    assert view.left_s() == pytest.approx(90 * 2.0)
    assert "about 0:03:00 of steps left" in drawn(view)


@given(data=st.data())
def test_a_folder_cut_short_anywhere_is_drawn(finished: Path, tmp_path_factory, data):
    """Each file missing, or written up to some byte; but config.json and summary.json are replaced at once."""
    folder = tmp_path_factory.mktemp("cut")
    for name in (CONFIG, ENVIRONMENT, SUMMARY):
        if data.draw(st.booleans()):
            shutil.copyfile(finished / name, folder / name)
    for name in FILES:
        whole = (finished / name).read_bytes()
        if data.draw(st.booleans()):
            (folder / name).write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    view = Follower(folder).look()
    text = drawn(view, height=data.draw(st.sampled_from([24, 60])))
    assert ("waiting for" in text) == (not (folder / CONFIG).exists())
    assert drawn([view])


def test_figures_that_are_no_numbers_are_left_out_of_curves(folder: Path):
    RunLog(folder).write(METRICS, {"step": 7, "reward_mean": float("nan"), "prob_diff_mean": None})
    view = Follower(folder).look()
    assert view.curve("reward_mean")[0] == [1, 2, 3, 4, 5, 6]
    assert drawn([view])


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "x"}'])
def test_a_configuration_that_is_none_is_one_line(folder: Path, text: str):
    (folder / CONFIG).write_text(text)
    with pytest.raises(InputError, match=CONFIG):
        Follower(folder).look()


# ---- several runs ----


def test_a_comparison_is_a_row_for_each_run(folder: Path, tmp_path_factory):
    comparison = tmp_path_factory.mktemp("comparison")
    assert find_trials(comparison) == []
    for name in ("b", "a"):
        shutil.copytree(folder, comparison / TRIALS / name)
    (comparison / TRIALS / "a" / SUMMARY).unlink()
    (comparison / TRIALS / "a" / METRICS).write_text(
        "".join(json.dumps({"step": i, "reward_mean": i / 10}) + "\n" for i in (1, 2, 3, 4, 5, 6))
    )
    (comparison / TRIALS / "c").mkdir()
    (comparison / TRIALS / "notes.txt").write_text("not a run")
    rows = drawn([Follower(trial).look() for trial in find_trials(comparison)]).splitlines()
    assert len(rows) == 4
    assert rows[1].split()[:4] == ["a", "6/6", "0.600", "0.400"] and "running" in rows[1]
    assert rows[2].startswith("b") and "finished" in rows[2]
    assert rows[3].split()[:4] == ["c", "0/0", "-", "-"] and "not begun" in rows[3]


@given(
    values=st.lists(st.floats(-2, 2), max_size=60),
    width=st.integers(1, 40),
    scale=st.sampled_from([(-1.0, 1.0), (0.0, 0.0), (-2.0, 2.0)]),
)
def test_a_sparkline_fits_and_rises_with_the_values(values: list[float], width: int, scale: tuple[float, float]):
    bars = sparkline(values, width, *scale)
    assert len(bars) == min(width, len(values))
    assert list(sparkline(sorted(values), width, *scale)) == sorted(sparkline(sorted(values), width, *scale))


def test_the_scale_of_a_sparkline_is_the_one_given():
    assert sparkline([0.0, 1.0], 9, 0.0, 1.0) == "▁█"
    assert sparkline([0.0, 1.0], 9, 0.0, 4.0) == "▁▃"
    assert sparkline([], 9, 0.0, 1.0) == ""
    assert duration(59.6) == "0:01:00"


# ---- the command ----


def test_it_follows_a_run_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From an empty folder on; the run is in another thread, and slow enough to be seen at work."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=110, height=60)
    monkeypatch.setattr(command, "Terminal", lambda **_: console)

    class Slow:
        """Watches by taking its time."""

        def __getattr__(self, name: str):
            return lambda *arguments: time.sleep(0.1) if name == "stepped" else None

    run = threading.Thread(target=lambda: train(few_run(steps=5), tmp_path, Slow()))  # type: ignore[arg-type]
    begin = threading.Timer(0.2, run.start)
    begin.start()
    assert cli.main(["watch", str(tmp_path), "--every", "0.04"]) == 0
    begin.join()
    run.join()
    text = screen.getvalue()
    seen = [text.find(f"{shown} steps, ") for shown in ("0/5", "2/5", "5/5")]
    assert -1 < text.find("waiting for") < seen[0] < seen[1] < seen[2]
    assert "5/5 steps, finished" in text


def test_a_sample_cannot_steer_the_terminal():
    console = Console(file=io.StringIO(), width=60)
    console.print(sample_panel({"prompt": "a\x1b[2Jb", "text": "c\r\x07d\n\te\x9b3mπ", "reward": 1.0}))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a�[2Jb" in text and "c��d" in text and "e�3mπ" in text


def test_a_sample_of_bytes_is_said_in_words():
    console = Console(file=io.StringIO(), width=100)
    for text in ("\x00\ufffd\x1f+", "It is 7."):
        console.print(sample_panel({"prompt": "3 + 4?", "text": text, "reward": 0.0}))
    noise, words = console.file.getvalue().split("a sample, ")[1:]  # type: ignore[attr-defined]
    assert "(no text: 3 of 4 characters cannot be shown, as of a random model)" in noise and "\ufffd" not in noise
    assert "It is 7." in words and "no text" not in words


def test_a_sample_of_an_episode_in_an_environment_is_a_conversation(folder: Path):
    (_, _, last) = read_records(folder / METRICS)[-3:]
    turns = {"turns": 2.5, "turns_max": 4, "turn_tokens": 3.0, "episodes_done": 0.75, "calls": 0, "branches": 0.5}
    RunLog(folder).write(METRICS, {**last, "step": last["step"] + 1, **turns})
    RunLog(folder).write(ROLLOUTS, conversation(step=last["step"] + 1))
    text = drawn(Follower(folder).look(), width=150)
    assert "turns: 2.5 on average, 4 at most, 3.0 tokens each, 75% of episodes done, 0.5 branches" in text
    head = next(line for line in text.splitlines() if line.startswith("step"))
    assert head.split()[-3:] == ["turns", "done", "s"] and "  2.5   75%" in text
    title = "a sample, reward 0.5, 3 turns, ended by the environment, 1 call, 1 failed call, 1 branch"
    sample = text[text.index(title) :]
    rows = [line.strip("│ ") for line in sample.splitlines()[1:]]
    assert [row.split()[0] for row in rows[:5]] == ["(3", "user", "assistant", "calls", "tool"]
    assert rows[3] == 'calls double({"x": 2})' and rows[4].split() == ["tool", "double", "4"]
    said = ("cd  [reward 0.5]", "[failed call]", "branch: the history is rendered anew")
    assert all(text in sample for text in said)


def test_the_line_of_a_sample_is_the_conversation_in_brief():
    said = brief_conversation(conversation())
    assert said.startswith("user '2?' -> assistant 'ab' (reward 0) -> tool '4' -> assistant 'cd' (reward 0.5) -> user ")
    assert "onerror" not in said and said.endswith("""...\" -> assistant 'e' (reward 0)""")


def test_ctrl_c_ends_the_watching_alone(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / SUMMARY).unlink()
    console = Console(file=io.StringIO(), force_terminal=True, width=110, height=60)
    monkeypatch.setattr(command, "Console", lambda **_: console)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", interrupted)
    assert cli.main(["watch", str(folder)]) == 0


def test_one_picture_where_there_is_no_terminal(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / SUMMARY).unlink()
    assert cli.main(["watch", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "6/6 steps, running" in out and "\x1b" not in out
    (folder / "empty").mkdir()
    assert cli.main(["watch", str(folder / "empty"), "--once"]) == 0
    assert "waiting for" in capsys.readouterr().out
    (folder / "empty" / TRIALS).mkdir()
    assert cli.main(["watch", str(folder / "empty"), "--once"]) == 0
    assert "waiting for the runs" in capsys.readouterr().out
