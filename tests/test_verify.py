"""Records that are not what was written: noticed when a run is resumed, and by `drpo verify`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drpo import cli
from drpo.errors import InputError
from drpo.train.callbacks import NullCallback
from drpo.train.loop import train
from drpo.train.records import (
    CONFIG,
    EVALUATIONS,
    FILES,
    METRICS,
    MODEL,
    ROLLOUTS,
    SUMMARY,
    TIMING,
    Sum,
    parse_json,
    read_records,
)
from drpo.train.verify import verify
from support.hand_run import conversation
from support.runs import StopsAfter, assert_same_run
from support.worlds import sampling, tiny_run

RUN = tiny_run(steps=3, prompts=2, updates=1, sampling=sampling(samples=2), checkpoint_every=2, eval_every=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(RUN, folder)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(RUN, folder, StopsAfter(2))
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def without_first(path: Path) -> None:
    path.write_bytes(path.read_bytes().partition(b"\n")[2])


def without_last(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def spoilt(path: Path) -> None:
    """A digit in the midst of it becomes another: still a record."""
    data = bytearray(path.read_bytes())
    at = next(i for i in range(len(data) // 2, len(data)) if chr(data[i]) in "12345678")
    data[at] += 1
    path.write_bytes(data)


@pytest.mark.parametrize("said", ["[" * 10**5, '{"step": 2, "records": {"metrics.jsonl": 3}}'], ids=["deep", "records"])
def test_a_checkpoint_whose_state_makes_no_sense_is_one_line(
    stopped: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str], said: str
):
    folder = copy(stopped)
    for state in folder.glob("checkpoints/*/state.json"):
        state.write_text(said)
    wrong = [part.name for part in verify(folder) if not part.sound]
    assert wrong == [f"checkpoints/{path.name}" for path in sorted(folder.glob("checkpoints/*"))]
    assert cli.main(["export", str(folder), str(folder / "exported")]) == 2
    assert "state.json cannot be read" in capsys.readouterr().err
    with pytest.raises(InputError, match="cannot be read"):
        train(RUN, folder)


CHANGES = [(METRICS, Path.unlink, "missing"), (ROLLOUTS, without_first, "c"), (EVALUATIONS, spoilt, "changed"),
           (METRICS, without_last, "cut"), (ROLLOUTS, lambda path: path.write_bytes(b""), "cut")]  # fmt: skip


@pytest.mark.parametrize(("file", "change", "what"), CHANGES, ids=["deleted", "front", "middle", "end", "emptied"])
def test_a_run_does_not_go_on_with_records_that_are_not_its_own(
    stopped: Path, copy: Callable[[Path], Path], file: str, change: Callable[[Path], Any], what: str
):
    folder = copy(stopped)
    change(folder / file)
    before = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    with pytest.raises(InputError, match=rf"{file}: {what}.*--accept-records"):
        train(RUN, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.jsonl")} == before
    assert next(part.name for part in verify(folder) if not part.sound) == file


def test_it_goes_on_with_them_where_that_is_asked_for(stopped: Path, copy: Callable[[Path], Path]):
    folder = copy(stopped)
    (folder / ROLLOUTS).unlink()
    assert train(RUN, folder, accept_records=True)["finished"]
    assert {r["step"] for r in read_records(folder / ROLLOUTS)} == {3}
    assert all(part.sound for part in verify(folder))  # the new checkpoint has the sums of what is there


def test_a_finished_run_stays_finished_without_its_last_records(whole: Path, copy: Callable[[Path], Path]):
    folder = copy(whole)
    without_last(folder / METRICS)
    summary = train(RUN, folder, accept_records=True)
    assert summary["finished"] and summary["steps"] == RUN.trainer.steps and summary["evaluation_after"] is not None


def test_what_was_written_behind_a_checkpoint_is_no_change(stopped: Path, whole: Path, copy: Callable[[Path], Path]):
    folder = copy(stopped)
    with (folder / METRICS).open("a") as out:
        out.write('{"step": 3, "reward_mean": 0.5}\n{"step": 4, "re')
    train(RUN, folder)
    assert_same_run(whole, folder)


def test_a_checkpoint_without_sums_is_gone_on_from_and_that_is_said(stopped: Path, copy: Callable[[Path], Path]):
    folder = copy(stopped)
    state = folder / "checkpoints" / "step-000002" / "state.json"
    record = json.loads(state.read_text())
    del record["records"], record["sha256"]
    state.write_text(json.dumps(record))
    assert {part.name: part.message for part in verify(folder)}[METRICS].endswith("is of an earlier version")
    watch = StopsAfter(3)
    train(RUN, folder, watch)
    assert "without sums of the records" in watch.said


def test_records_that_vanish_during_the_run_end_it(tmp_path: Path):
    class Deletes(NullCallback):
        def stepped(self, step: int, *_: object) -> None:
            (tmp_path / "run" / METRICS).unlink()

    with pytest.raises(InputError, match=rf"{METRICS}: something else removed, cut or wrote it"):
        train(RUN, tmp_path / "run", Deletes())


def test_a_sum_goes_on_without_reading_again(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"ab" * 2**20)
    begun = Sum().read(tmp_path / "file", upto=3)
    (tmp_path / "file").write_bytes(b"aba" + b"c" * 5)
    assert begun.read(tmp_path / "file").record() == Sum().plus(b"aba").plus(b"c" * 5).record()


# drpo verify


def test_a_sound_run_is_sound(whole: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["verify", str(whole)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    names = [line.split()[1] for line in lines]
    assert {CONFIG, *FILES, "checkpoints/step-000003", MODEL, SUMMARY} <= set(names)


@pytest.mark.parametrize(
    "damaged", [CONFIG, *FILES, "checkpoints/step-000002/weights.safetensors", "model/model.safetensors", SUMMARY]
)
def test_whatever_is_damaged_is_named(
    whole: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str], damaged: str
):
    path = copy(whole) / damaged
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    if path.suffix == ".json":
        path.write_bytes(data[: len(data) // 2])
    assert cli.main(["verify", str(path.parents[len(Path(damaged).parts) - 1])]) == 1
    wrong = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    # A summary, and evaluations, are held against the others.
    assert wrong and damaged.startswith(wrong[0]) and set(wrong[1:]) <= {EVALUATIONS, SUMMARY}


@pytest.mark.parametrize("cut", [True, False])
def test_a_model_without_sums_has_at_least_the_right_length(whole: Path, copy: Callable[[Path], Path], cut: bool):
    model = copy(whole) / MODEL
    (model / "SHA256SUMS").unlink()
    if cut:
        tensors = model / "model.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-1])
    assert [part.sound for part in verify(model.parent) if part.name == MODEL] == [not cut]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        (EVALUATIONS, '{"step": 3, "reward_mean": "high"}'),
        (EVALUATIONS, '{"step": 3, "reward_mean": 0.5, "pass_at": [1]}'),
        (METRICS, '{"step": 3, "sampled_tokens": "12"}'),
        (METRICS, '{"step": 3, "updates": 2}'),
        (TIMING, '{"step": 3, "update": [1.0]}'),
        (ROLLOUTS, '{"step": 3, "text": 5}'),
        (ROLLOUTS, '{"step": 3, "text": "", "reward": "1"}'),
    ],
)
@pytest.mark.parametrize("command", ["report", "resume"])
def test_a_field_of_the_wrong_type_is_named_in_one_line(
    whole: Path, copy: Callable[[Path], Path], capsys: pytest.CaptureFixture[str], file: str, line: str, command: str
):
    folder = copy(whole)
    with (folder / file).open("a") as out:
        out.write(f"{line}\n")
    if command == "resume" and file == ROLLOUTS:
        pytest.skip("what behind the checkpoint is never read is taken back")
    arguments = (
        ["report", str(folder), "--trust-remote-code"] if command == "report" else ["train", "--resume", str(folder)]
    )
    if command == "resume":
        arguments += ["--trust-remote-code", "--no-doctor"]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and f"{file} line" in said and "wrong type" in said


BRANCH = {"prompt_ids": [1], "token_ids": [1, 2], "sampled": [[0, 1]], "behavior_logp": [-0.5]}
PLAYED = {"rewards": [], "done": True, "calls": [], "failed_calls": [], "failure": None}
UNFIT = [
    ({"messages": {"role": "user"}}, "at messages"),
    ({"messages": [{"role": 5}]}, r"at messages\[0\].role"),
    ({"messages": [{"role": "user", "content": 5}]}, r"at messages\[0\].content"),
    ({"messages": [{"role": "user", "content": "x"}]}, "0 messages of the assistant, but 3 turns"),
    ({"turns": [3, "3", 2]}, r"at turns\[1\]"),
    ({"turns": [3, 5]}, "2 turns"),
    ({"turns": [3, 3, 3]}, "turns must add up to the 8 sampled tokens"),
    ({"turns": [8, 1, -1]}, "turns must add up to"),
    ({"played": {**PLAYED, "rewards": [0.0, 0.5]}}, "2 played.rewards, but 3 turns"),
    ({"played": {**PLAYED, "failed_calls": [1]}}, "1 played.failed_calls, but 3 turns"),
    ({"played": {**PLAYED, "calls": 0}}, "played.calls"),
    ({"played": {"rewards": [0.0, 0.5, 0.0], "done": "yes"}}, "played.done"),
    ({"reward_turns": ["high", 0.0, 0.0]}, r"reward_turns\[0\]"),
    ({"sampled": [[0, 2**62]]}, "sampled must be spans that rise, within the 10 token_ids"),
    ({"sampled": [[0, 3], [2, 5]]}, "sampled must be spans that rise"),
    ({"sampled": [[-3, 3]]}, "sampled must be spans that rise"),
    ({"sampled": [[0, 3]]}, "6 behavior_logp of 3 sampled token_ids"),
    ({"advantages": [0.5]}, "1 advantages of 6 sampled token_ids"),
    ({"branches": [{}]}, "a branch has no token_ids"),
    ({"branches": [{**BRANCH, "sampled": [[0, 3]]}]}, "within the 2 token_ids"),
    ({"branches": [{**BRANCH, "behavior_logp": None}]}, r"at branches\[0\].behavior_logp"),
]


@pytest.mark.parametrize(("changes", "named"), UNFIT)
def test_turns_and_messages_that_do_not_fit_are_named_in_one_line(tmp_path: Path, changes: dict, named: str):
    path = tmp_path / ROLLOUTS
    path.write_text(json.dumps(conversation()) + "\n")
    assert len(read_records(path)) == 1
    path.write_text(json.dumps(conversation(**changes)) + "\n")
    with pytest.raises(InputError, match=named) as refused:
        read_records(path)
    assert len(str(refused.value).splitlines()) == 1 and f"{ROLLOUTS} line 1: " in str(refused.value)


def test_it_reads_without_torch(whole: Path):
    program = "import sys; from drpo import cli; status = cli.main(['verify', sys.argv[1]]);"
    program += "print(status, 'torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, whole], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[Infinity]",
        "1e400",
        '"\\ud800"',
        str(2**63 - 1),
        str(1 - 2**63),
        "-0",
        "-0.0",
        '{"a": 1, "a": 2}',
        "1." + "5" * 25,
        f"[{2**62}, 0.0000{2**62}]",
    ],
)
def test_a_record_means_what_json_says(text):
    assert repr(parse_json(text)) == repr(parse_json(text.encode())) == repr(json.loads(text))


@pytest.mark.parametrize(
    "text",
    [str(2**63), "9" * 30, "[01]", "1.", '"\x1f"', "[1,]", "", pytest.param("[" * 100_000, id="nested"), b"\xff"],
)
def test_what_is_no_json_or_too_large_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
