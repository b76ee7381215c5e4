"""Dumps of other frameworks: planted failures are named from each format that can show them, and bad input is refused.

Not covered: whether the thresholds are right for large runs (tests/test_warnings.py), and formats of other versions.
"""

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from drpo import cli
from drpo.autopsy import lines, skyrl
from drpo.autopsy.dumped import Dumped
from drpo.autopsy.formats import FORMATS, find_dumps, format_of
from drpo.autopsy.judge import LACKING, SAMPLE_TOKENS, Judgement, judge, onset, sampled
from drpo.autopsy.own import read_jsonl
from drpo.autopsy.steps import advantages_of, broken_logp, records_of, scored_groups, step_figures, step_tokens
from drpo.errors import InputError
from drpo.lab.replay import batch_of, recorded, replay
from drpo.objectives import DRPO, ImportanceSampling, PPOClip
from drpo.train.config import Run
from drpo.train.loop import train
from drpo.train.records import METRICS, read_records
from drpo.train.warned import raised
from support import dumps
from support.dumps import FAILURES, Written, failing, held_out, own_records, sound, write_json_lines
from support.pages import payload
from support.worlds import few_run

DATA = Path(__file__).parent / "data" / "autopsy"
PPO = PPOClip(0.2, 0.28)


def judged(path: Path, *apart: Path, objective: Any = PPO) -> Judgement:
    return judge(find_dumps([path]), objective, find_dumps(list(apart)) if apart else None)


def written(kind: Written, folder: Path, name: str) -> tuple[Path, ...]:
    """A failing run in a format, and its held-out rollouts where these tell the failure."""
    path = kind.write(folder / "run", failing(name))
    if name != "reward_hacking" or kind.evaluate is None:
        return (path,)
    evaluations = [*held_out(5, 0.8), *held_out(12, 0.2)]
    beside = kind.evaluate(folder / ("held_out" if kind.apart else "run"), evaluations)
    return (path, beside) if kind.apart else (path,)


@pytest.mark.parametrize("form", dumps.FORMATS)
def test_planted_failures_are_named_from_each_format_that_can_show_them(form: str, tmp_path: Path):
    kind = dumps.FORMATS[form]
    for name in kind.shows:
        found = judged(*written(kind, tmp_path / name, name))
        assert found.warnings and found.warnings[0]["name"] == name, (name, found.warnings)


def test_a_dozen_failures_are_planted_and_each_is_shown_by_some_format():
    assert len(FAILURES) >= 12 and {name for kind in dumps.FORMATS.values() for name in kind.shows} == set(FAILURES)


@pytest.mark.parametrize("form", dumps.FORMATS)
def test_of_a_sound_run_nothing_is_said(form: str, tmp_path: Path):
    kind = dumps.FORMATS[form]
    paths = (kind.write(tmp_path / "run", sound()),)
    if kind.evaluate is not None:
        beside = kind.evaluate(
            tmp_path / ("held_out" if kind.apart else "run"), [*held_out(5, 0.2), *held_out(12, 0.8)]
        )
        paths += (beside,) if kind.apart else ()
    found = judged(*paths)
    assert found.warnings == () and found.n_rollouts == len(sound())
    assert all(finding.verdict == "ok" for finding in found.findings)
    assert len(found.evaluations) == (0 if kind.evaluate is None else 2)


# ---- what the frameworks' own code has written ----


def test_dumps_of_the_frameworks_own_code_are_read():
    by_name = {path.name: format_of(path) for path in DATA.rglob("*") if path.is_file()}
    assert {name: kind and kind.name for name, kind in by_name.items()} == {
        "verl.jsonl": "verl",
        "trl.parquet": "TRL",
        "prime_rl_export.jsonl": "prime-rl's token exports",
        "global_step_1_training_input.pkl": "SkyRL",
        "global_step_3_training_input.pkl": "SkyRL",
        "letters.jsonl": "SkyRL's evaluations",
        "aggregated_results.jsonl": None,
        "open_instruct.jsonl": "open-instruct",
    }
    found = {name: list(kind.read(next(DATA.rglob(name)))) for name, kind in by_name.items() if kind}
    rewards = {name: [r.reward for r in rollouts] for name, rollouts in found.items()}
    assert rewards["verl.jsonl"] == rewards["open_instruct.jsonl"] == rewards["letters.jsonl"] == [1, 0, 0, 1]
    assert rewards["trl.parquet"] == [1.5, 0.5, 0.0, 1.5]  # of two functions, of which one returned None once
    ids, mu, logp = [(5, 6, 7), (5, 8), (9, 7), (4, 7, 7)], (-0.5, -1.25, -0.25), (-0.5, -1.0, -0.25)
    for name in ("prime_rl_export.jsonl", "global_step_1_training_input.pkl", "open_instruct.jsonl"):
        assert [tuple(r.token_ids) for r in found[name]] == ids and tuple(found[name][0].behavior_logp) == mu
        assert [float(r.advantages[0]) for r in found[name]] == [0.5, -0.5, -0.5, 0.5]
    for name in ("prime_rl_export.jsonl", "global_step_1_training_input.pkl"):
        assert tuple(found[name][0].logp) == logp
    of_0_4 = found["global_step_3_training_input.pkl"]  # with routed experts, kept tokens and one of an environment
    assert [tuple(r.token_ids) for r in of_0_4] == [(5, 7), *ids[1:]] and tuple(of_0_4[0].logp) == (-0.75, -2.75)
    assert [r.cut for r in found["open_instruct.jsonl"]] == [False, False, True, False]
    for name in (
        "verl.jsonl",
        "trl.parquet",
        "global_step_1_training_input.pkl",
        "letters.jsonl",
        "open_instruct.jsonl",
    ):
        assert [len(g.episodes) + len(g.unscored) for g in scored_groups(found[name])] == [2, 2], name


def shape(value: Any) -> Any:
    """The fields of a record, nested ones too, with their types; numbers are alike."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, bool | int | float) else type(value).__name__


def first_record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text().splitlines()[0])


def test_what_tests_write_has_the_fields_of_what_the_frameworks_write(tmp_path: Path):
    rollouts = sound(1)
    for own, theirs in (
        (dumps.verl(tmp_path / "v", rollouts) / "1.jsonl", "verl.jsonl"),
        (dumps.prime_export(tmp_path, rollouts) / "token_exports/step_1/rank_0.jsonl", "prime_rl_export.jsonl"),
        (dumps.open_instruct(tmp_path, rollouts) / "letters_rollouts_000000.jsonl", "open_instruct.jsonl"),
        (
            dumps.skyrl_evaluation(tmp_path, rollouts) / "dumped_evals/global_step_1_evals/letters.jsonl",
            "global_step_1_evals/letters.jsonl",
        ),
    ):
        ours, real = shape(first_record(own)), shape(first_record(DATA / theirs))
        assert ours.items() <= real.items(), theirs
    schema = pq.read_schema(DATA / "trl.parquet")
    for field in pq.read_schema(dumps.trl(tmp_path / "t", rollouts) / "completions_00001.parquet"):
        kinds = {str(schema.field(field.name).type), str(field.type)}
        assert len(kinds) == 1 or kinds == {"string", "large_string"}, field
    (batch,) = (dumps.skyrl(tmp_path, rollouts) / "dumped_data").iterdir()
    ours, real = (skyrl._Plain(path.open("rb")).load() for path in (batch, DATA / "global_step_1_training_input.pkl"))
    assert ours["batch_dict"].keys() == real["batch_dict"].keys() and ours.keys() == real.keys()
    assert ours["metadata"].keys() == real["metadata"].keys()


# ---- the figures are the trainer's ----


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder, run = tmp_path_factory.mktemp("own") / "run", few_run()
    train(run, folder)
    return run, folder


def test_a_run_of_our_own_is_judged_as_its_own_metrics_are(own_run: tuple[Run, Path]):
    """From its rollouts alone: the metrics that both have are equal, and so are the warnings."""
    run, folder = own_run
    own = read_records(folder / METRICS)
    found = judged(folder, objective=run.objective.loss)
    assert [w["name"] for w in found.warnings] == [w["name"] for w in raised(own)]
    assert len(found.metrics) == len(own)
    compared = {"reward_mean", "reward_std", "groups_all_wrong", "groups_with_signal", "truncated", "length_terminated"}
    compared |= {"sampled_tokens", "ratio_mean", "k3", "prob_diff_p99", "weight_min", "trained_tokens", "ratio_max"}
    for ours, theirs in zip(found.metrics, own, strict=True):
        both = compared & theirs.keys()
        assert len(both) > 9
        assert {k: ours[k] for k in both} == pytest.approx({k: theirs[k] for k in both}, rel=1e-5, abs=1e-6)


def test_the_replay_is_that_of_the_run(own_run: tuple[Run, Path]):
    folder = own_run[1]
    found = judged(folder)
    step, rollouts = list(found.sample.items())[-1]
    assert sum(r.length for r in rollouts) < SAMPLE_TOKENS  # all of them
    ours = replay(batch_of(folder, list(records_of(step, rollouts)), None, "episode"), [DRPO(0.2), PPO])
    theirs = replay(recorded(folder, step), [DRPO(0.2), PPO])
    assert ours.tokens == theirs.tokens and ours.readings[0].mass == pytest.approx(theirs.readings[0].mass, rel=1e-5)
    assert ours.cosines[0] == pytest.approx(theirs.cosines[0], abs=1e-6)


def a_rollout(**fields: Any) -> Dumped:
    plain: dict[str, Any] = {"step": 1, "group": "g", "reward": 1.0, "length": 2, "text": "ab"}
    return Dumped(**(plain | fields))


def column(*values: float) -> Any:
    return np.array(values, dtype=np.float32)


def with_tokens(**fields: Any) -> Dumped:
    plain = {"token_ids": np.array([1, 2]), "behavior_logp": column(-1, -2), "logp": column(-1, -1)}
    return a_rollout(**(plain | {"advantages": column(1.0)} | fields))


def test_figures_by_hand():
    rows = [with_tokens(), with_tokens(advantages=column(-1.0, 0.0))]
    record = step_figures(1, rows, ImportanceSampling())
    assert record["ratio_mean"] == pytest.approx((1 + np.e) / 2) and broken_logp(rows) == (0, set())
    assert record["k3"] == pytest.approx((np.e - 2) / 2) and record["entropy"] == pytest.approx(1.5)
    assert record["grad_norm"] == pytest.approx(np.sqrt(1 + np.e**2 + 1) / 4)
    assert record["groups_with_signal"] == 1 and record["frac_reward_zero_std"] == 1
    given = step_figures(1, [with_tokens(entropy=column(3, 5))], PPO)
    assert given["entropy"] == 4 and "groups_with_signal" not in given  # a single rollout is no group


def test_what_a_dump_lacks_is_absent_and_not_zero():
    record = step_figures(1, [a_rollout(reward=None), a_rollout(reward=None)], PPO)
    assert record == {"step": 1, "length_terminated": 2.0}
    cut = step_figures(1, [a_rollout(cut=True), a_rollout(cut=None)], PPO)
    assert "truncated" not in cut and "sampled_tokens" not in cut and "entropy" not in cut


def test_rounding_errors_are_no_signal_and_a_critics_advantages_are():
    def figure(*advantages: float, reward: float = 0.3) -> float:
        rows = [a_rollout(reward=reward, advantages=column(a)) for a in advantages]
        return float(step_figures(1, rows, PPO)["groups_with_signal"])

    assert figure(3e-4, 3e-4) == 0 and figure(0.2, -0.2) == 1
    unequal = [a_rollout(reward=r, advantages=column(a)) for r, a in ((0.0, -1e-3), (1e-3, 1e-3))]
    assert step_figures(1, unequal, PPO)["groups_with_signal"] == 1
    assert [float(a[0]) for a in advantages_of([a_rollout(reward=1.0), a_rollout(reward=0.0)])] == [0.5, -0.5]


def test_broken_log_probabilities_are_left_out_and_said(tmp_path: Path):
    nan = float("nan")
    broken = [with_tokens(logp=column(nan, -1)), with_tokens(behavior_logp=column(-1, 0.5))]
    tokens = step_tokens(broken, [column(1)] * 2)
    assert tokens is not None and broken_logp(broken)[0] == 2 and tokens.lengths == [1, 1]
    for rows in ([with_tokens(logp=column(nan, nan))], [with_tokens(logp=None, behavior_logp=column(0.5, nan))]):
        assert broken_logp(rows)[0] == 2  # all of them
    records = own_records(sound())
    records[20]["logp"][0] = nan
    found = judged(write_json_lines(tmp_path / "a.jsonl", records))
    assert [(w["name"], w["first_step"], w["ongoing"]) for w in found.warnings] == [("broken_logp", 3, False)]
    assert found.warnings[0]["text"].startswith("logp is no number at 1 token")


@pytest.mark.parametrize("column", ["behavior_logp", "logp"])
@pytest.mark.parametrize("first", [1, 9])
@pytest.mark.parametrize(("value", "how"), [(float("nan"), "no number"), (0.5, "positive")])
def test_broken_log_probabilities_are_the_headline(
    column: str, first: int, value: float, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records = own_records(sound())
    for record in records:
        if record["step"] >= first:
            record[column] = [value] * len(record[column])
    path = write_json_lines(tmp_path / "a.jsonl", records)
    assert cli.main(["autopsy", str(path), "--objectives", "none"]) == 0
    why = capsys.readouterr().out.splitlines()[0]
    assert why.startswith(f"why: broken_logp, since step {first}: {column} is {how} at ")


def test_a_reward_that_is_no_number_is_a_failure_of_the_reward(tmp_path: Path):
    records = own_records(sound())
    for record in records[::3]:
        record["reward"] = float("nan")
    found = judged(write_json_lines(tmp_path / "a.jsonl", records))
    assert found.warnings[0]["name"] == "failing_rewards"


@pytest.mark.parametrize("every", [1, 3])
def test_rewards_fail_in_a_dump_without_tokens_too(every: int, tmp_path: Path):
    known = ("step", "problem", "prompt", "text", "reward")
    records = [{name: record[name] for name in known} for record in own_records(sound())]
    for record in records[::every]:
        record["reward"] = float("nan")
    found = judged(write_json_lines(tmp_path / "a.jsonl", records))
    assert {"token_ids", "behavior_logp"} <= set(found.lacking)
    assert found.warnings[0]["name"] == "failing_rewards" and {"completions", "sampled_tokens"}.isdisjoint(
        found.metrics[0]
    )


def test_rewards_that_are_all_no_numbers_have_failed_and_are_not_missing(tmp_path: Path):
    found = judged(write_json_lines(tmp_path / "a.jsonl", [r | {"reward": float("nan")} for r in own_records(sound())]))
    assert found.warnings[0]["name"] == "failing_rewards" and "100%" in found.warnings[0]["text"]
    assert "reward" not in found.lacking and found.metrics[0]["reward_failed"] == 8


@pytest.mark.parametrize(("first", "last"), [(1, 14), (1, 9), (6, 14), (6, 10)])
def test_steps_that_trained_on_nothing_are_counted_from_first_to_last(first: int, last: int, tmp_path: Path):
    rollouts = [replace(r, reward=0.0, advantage=0.0) if first <= r.step <= last else r for r in sound()]
    found = judged(dumps.own_jsonl(tmp_path, rollouts))
    (warning,) = (w for w in found.warnings if w["name"] == "nothing_correct")
    assert (warning["first_step"], warning["last_step"], warning["steps"]) == (first, last, last - first + 1)
    assert warning["text"].startswith(f"the last {last - first + 1} steps trained on nothing")


def test_the_sample_is_of_whole_groups_and_the_same_every_time():
    rollouts = [a_rollout(group=str(i // 4), length=300) for i in range(80)]
    kept = sampled(7, rollouts)
    assert kept == sampled(7, rollouts) and 3000 < sum(r.length for r in kept) <= SAMPLE_TOKENS
    assert all(sum(r.group == k.group for r in kept) == 4 for k in kept)
    assert len({r.group for r in sampled(8, rollouts)} ^ {r.group for r in kept}) > 0
    assert len(sampled(1, [replace(r, length=9000) for r in rollouts])) == 4  # one group at least


# ---- steps, files, folders ----


def test_a_dump_that_counts_from_0_is_counted_from_1(tmp_path: Path):
    rollouts = [replace(r, step=r.step - 1) for r in failing("sampler_mismatch")]
    found = judged(dumps.own_jsonl(tmp_path, rollouts))
    assert found.warnings[0]["name"] == "sampler_mismatch" and found.warnings[0]["first_step"] == 1
    assert found.metrics[0]["step"] == 1 and any("counts from 0" in note for note in found.notes)


def test_of_a_step_that_comes_again_the_later_one_counts(tmp_path: Path):
    again = [replace(r, reward=1.0) for r in sound() if r.step >= 10]
    found = judged(dumps.own_jsonl(tmp_path, [*sound(), *again]))
    assert [m["step"] for m in found.metrics] == list(range(1, 15)) and found.metrics[-1]["reward_mean"] == 1
    assert any("5 steps came twice" in note for note in found.notes)


def test_rollouts_in_no_order_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rollouts = sorted(sound(3), key=lambda r: r.sample * 1000 + r.group * 100 + r.step)
    path = dumps.own_jsonl(tmp_path, rollouts)
    assert cli.main(["autopsy", str(path)]) == 2
    assert "sort the rollouts by step" in capsys.readouterr().err


def test_files_are_read_in_the_order_of_their_numbers_and_others_are_left_out(tmp_path: Path):
    folder = tmp_path / "1\u00b22"  # a digit that is no decimal
    dumps.verl(folder, sound())
    (folder / "metrics.jsonl").write_text('{"loss": 1}\n')
    (folder / "broken.jsonl").write_text("what\n")
    (folder / "empty.jsonl").write_text("")
    found = find_dumps([folder])
    assert [path.name for path, _ in found.files] == [f"{i}.jsonl" for i in range(1, 15)]
    assert {path.name for path in found.left_out} == {"metrics.jsonl", "broken.jsonl", "empty.jsonl"}
    assert any("3 files left out" in note for note in judge(found, PPO).notes)


def test_of_prime_rl_the_traces_and_the_exports_are_joined_step_by_step(tmp_path: Path):
    rollouts = failing("gradient_spike")
    dumps.prime_export(dumps.prime_traces(tmp_path, rollouts), rollouts)
    found = judged(tmp_path)
    assert found.n_rollouts == 2 * len(rollouts) and {f.name[:8] for f in found.formats} == {"prime-rl"}
    assert all({"reward_mean", "k3", "groups_with_signal"} <= m.keys() for m in found.metrics)
    assert found.warnings[0]["name"] == "gradient_spike" and found.lacking == ("held_out",)
    assert {f.check for f in found.findings} == {"signal", "ratio", "alignment"}


def test_an_older_trace_by_itself_is_read(tmp_path: Path):
    (path,) = dumps.prime_traces(tmp_path, sound(1)).rglob("effective/traces.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    old = [{**row["traces"][0], "run": {"type": "train", "step": 1}, "info": {"group_id": "7"}} for row in rows]
    alone = write_json_lines(tmp_path / "old" / "traces.jsonl", old)
    assert [(r.group, r.reward, r.length) for r in format_of(alone).read(alone)] == [
        ("7", made.reward, len(made.ids)) for made in sound(1)
    ]


# ---- strangers ----


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["autopsy", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("drpo: ")
    return err


def test_bad_input_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good = own_records(sound(2))

    def file(*records: Any, name: str = "a.jsonl") -> Path:
        return write_json_lines(tmp_path / name, records)

    assert "name the files first" in refusal(capsys) and "name the files first" in refusal(capsys, "--json")
    assert "no file there" in refusal(capsys, tmp_path / "nowhere")
    assert "no rollouts in this folder" in refusal(capsys, tmp_path)
    assert "no dump that is known" in refusal(capsys, file({"loss": 1.0}))
    assert "--held-out" in refusal(capsys, file(*good), "--held-out", file({"loss": 1.0}, name="b.jsonl"))
    assert "line 2" in refusal(capsys, file(good[0], {**good[1], "reward": "high"}))
    assert "line 2" in refusal(capsys, file(good[0], [1]))
    assert "2 behavior_logp of 1" in refusal(capsys, file(good[0], {**good[1], "behavior_logp": [-1.0, -2.0],
                                                                   "token_ids": [1], "logp": [-1.0]}))  # fmt: skip
    assert "numbers alone" in refusal(capsys, file(good[0], {**good[1], "logp": ["x"]}))
    assert "too large" in refusal(capsys, file(good[0], {**good[1], "token_ids": [2**70]}))
    assert "--step 99" in refusal(capsys, file(*good), "--step", 99)
    assert "no rollouts that were trained on" in refusal(capsys, file({**good[0], "held_out": True}))
    assert "unknown objective" in refusal(capsys, file(*good), "--objective", "dppo_topk_tv(0.2)")
    assert "did you mean" in refusal(capsys, file(*good), "--objective", "dropo(0.2)")


def test_a_missing_field_and_an_empty_file_are_named(tmp_path: Path):
    (record,) = own_records(sound(1))[:1]
    for missing in ("step", "problem"):
        path = write_json_lines(tmp_path / f"{missing}.jsonl", [{k: v for k, v in record.items() if k != missing}])
        with pytest.raises(InputError, match=f"its first record has no `{missing}`, which our own form"):
            find_dumps([path])
    for text in ("", "\n\n"):
        (tmp_path / "empty.jsonl").write_text(text)
        with pytest.raises(InputError, match=r"empty\.jsonl: the file is empty"):
            find_dumps([tmp_path / "empty.jsonl"])


def test_damaged_files_are_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("a.parquet", "global_step_1_training_input.pkl", "b.jsonl"):
        for data in (b"", b"\x00\xff", b"PAR1" * 9, b"{" * 100_000, b"\x80\x05K\x01.", b'{"step": 1e999}\n'):
            (tmp_path / name).write_bytes(data)
            refusal(capsys, tmp_path / name)


def test_a_line_that_a_crash_cut_is_left_out_and_noted(tmp_path: Path):
    path = dumps.own_jsonl(tmp_path, sound(2))
    path.write_bytes(path.read_bytes()[:-1])
    assert lines.cut_line(path) is None  # only its end of line is missing
    path.write_bytes(path.read_bytes()[:-40])
    found, n = judged(path), len(sound(2))
    assert found.n_rollouts == n - 1
    assert f"{path} line {n}: cut, as by a crash; this rollout is left out" in found.notes


def test_a_line_that_is_too_long_is_refused_before_it_is_parsed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lines, "LONGEST", 5000)
    path = write_json_lines(tmp_path / "a.jsonl", own_records(sound(1)))
    with path.open("a") as file:
        file.write('{"x": "' + "y" * 6000 + '"}\n')
    assert "longer than" in refusal(capsys, path)


def test_rows_of_parquet_that_are_too_large_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("drpo.autopsy.parquet.LARGEST", 1000)
    assert "bytes; no rollouts do" in refusal(capsys, dumps.own_parquet(tmp_path, sound(2)))


def own_table(path: Path, **columns: pa.Array) -> Path:
    fields = {"step": [1] * 4, "problem": ["a"] * 4, "reward": [0.0, 1.0, 1.0, 0.0], "text": ["x"] * 4}
    logps = [[-0.1, -0.2]] * 4
    pq.write_table(pa.table({**fields, "behavior_logp": logps, "logp": logps, **columns}), path)
    return path


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pa.array([[1, None], [2, 3], [3, 4], [5, 6]]), "row 1: token_ids must be a list of whole numbers"),
        (pa.array([[1.5, 2.0]] * 4), "row 1: token_ids must be a list of whole numbers"),
        (pa.array([[2**63 + 1, 2]] * 4, pa.list_(pa.uint64())), "cannot be read after row 0"),
        (pa.array([["a", "b"]] * 4), "token_ids"),
    ],
)
def test_ids_of_parquet_that_are_no_whole_numbers_are_refused(
    ids: pa.Array, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert message in refusal(capsys, own_table(tmp_path / "a.parquet", token_ids=ids), "--out", tmp_path / "a.html")


def test_lists_of_a_fixed_size_are_read(tmp_path: Path):
    path = own_table(tmp_path / "a.parquet", token_ids=pa.array([[1, 2]] * 4, pa.list_(pa.int32(), 2)))
    assert judged(path).n_rollouts == 4


@pytest.mark.parametrize("page", [True, False])
def test_a_rollout_without_tokens_is_judged_with_the_others(page: bool, tmp_path: Path):
    """As overlong filtering leaves one in prime-rl's dumps."""
    masks = ([0, 0, 0], [0, 1, 1], [0, 1, 1], [0, 1, 1])
    lists = {"advantages": [0.5] * 3, "inference_logprobs": [-0.1] * 3, "trainer_logprobs": [-0.1, -0.2, -0.1]}
    records = [
        {"step": step, "token_ids": [1, 2, 3], "loss_mask": mask, **lists, "entropy": [0.1] * 3}
        for step in (0, 1)
        for mask in masks
    ]
    path, out = write_json_lines(tmp_path / "a.jsonl", records), tmp_path / "a.html"
    assert cli.main(["autopsy", str(path), *(["--out", str(out)] if page else [])]) in (0, 1)
    assert out.exists() == page


def test_one_advantage_of_an_episode_with_branches_is_that_of_all_its_tokens(tmp_path: Path):
    branch = {"token_ids": [3, 4, 5], "advantage": 0.5}
    record = {"step": 1, "problem": "a", "reward": 1.0, "token_ids": [1, 2], "advantage": 0.5, "branches": [branch]}
    (rollout,) = read_jsonl(write_json_lines(tmp_path / "a.jsonl", [record]))
    assert rollout.advantages is not None and rollout.advantages.tolist() == [0.5] * 5


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path("owned"),)


def test_a_batch_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "global_step_1_training_input.pkl"
    for harm in (Harmful(), {"batch_dict": {"sequences": Harmful()}}, [torch.zeros(1)], print):
        path.write_bytes(pickle.dumps(harm))
        assert "no batch of SkyRL" in refusal(capsys, path)
    assert not (tmp_path / "owned").exists()


def test_texts_of_strangers_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = own_records(failing("truncation"))
    for row in rows:
        row |= {
            "problem": f"\x1b[2J{row['problem']}",
            "text": "\x1b]0;title\x07",
            "reward_parts": {"\x1b[31ma": 1.0, "b": 2.0},
        }
    path = write_json_lines(tmp_path / "\x1b[31m.jsonl", rows)
    assert cli.main(["autopsy", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert "\x1b" not in refusal(capsys, tmp_path / "\x1b[31mnowhere")


# ---- the command ----


def test_the_first_line_says_why_and_from_which_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = dumps.verl(tmp_path, failing("reward_collapse"))
    assert cli.main(["autopsy", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("why: reward_collapse, since step 10: the training reward fell from 0.75 to 0.")
    text = "\n".join(said)
    assert "14 files in the form of verl 0.9.0: 14 steps, 1 to 14; 112 rollouts" in text
    lacks = [line for line in said if line.startswith("not in the dump: ")]
    assert len(lacks) == len(LACKING) - 1 and any("trainer.validation_data_dir" in line for line in lacks)
    assert "signal" in text and "of completions cut" not in text and "cosine" not in text.lower()


def test_json_has_everything_and_the_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = dumps.own_jsonl(tmp_path, failing("gradient_spike"))
    assert cli.main(["autopsy", str(path), "--json", "--objectives", "drpo(0.2)", "ppo(0.2,0.28)"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["began"] == 13 and found["warnings"][0]["name"] == "gradient_spike"
    assert found["replay"]["step"] == 13 and len(found["replay"]["readings"]) == 2
    assert [m["step"] for m in found["metrics"]] == list(range(1, 15)) and found["rollouts"] == 112
    assert found["lacking"][0]["name"] == "held_out" and found["verdict"][0].startswith(
        "why: gradient_spike, at step 13"
    )
    assert cli.main(["autopsy", str(path), "--json", "--step", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["replay"]["step"] == 2


def test_advice_names_the_frameworks_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["autopsy", str(dumps.open_instruct(tmp_path, failing("truncation")))]) == 0
    assert "more --response_length (--sampling.max-new-tokens)" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["trl", "own_jsonl", "open_instruct"])
def test_it_opens_in_the_report(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = dumps.FORMATS[form].write(tmp_path / "run", failing("no_signal"))
    assert cli.main(["autopsy", str(path), "--out", str(tmp_path / "report.html")]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    table = json.loads(payload(page, "rollouts"))
    assert len(table["step"]) == 112 and "no_signal, since step 1" in page
    states = {"trl": "unknown", "own_jsonl": "trained", "open_instruct": "unknown"}
    assert set(table["state"]) == {states[form]}
    assert ("Length in characters" in page) == (form == "trl")


def test_nothing_is_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = dumps.own_jsonl(tmp_path / "run", sound())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["autopsy", str(path)]) == 0
    assert list((tmp_path / "here").iterdir()) == []


# ---- the page ----

PAGE = (Path(__file__).parents[1] / "docs" / "autopsy.md").read_text()


def test_the_example_of_the_page_is_what_the_command_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    dumps.own_jsonl(tmp_path / "dump", failing("rising_out_of_region"))
    assert cli.main(["autopsy", "dump", "--objectives", "drpo(0.2)", "ppo(0.2,0.28)"]) == 0
    (block,) = re.findall(r"^```text\n(.*?)^```$", PAGE, flags=re.M | re.S)
    said = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    for line in filter(None, map(str.rstrip, block.splitlines())):
        assert line in said or line == "...", line


def test_the_page_names_every_format_and_its_version():
    for kind in FORMATS:
        assert kind.name in PAGE and kind.version in PAGE, kind.name
        assert set(kind.remedies) <= set(LACKING)
        assert all(f"docs/autopsy.md#{anchor}" not in text or f"## {anchor}" in PAGE for text in kind.remedies.values()
                   for anchor in re.findall(r"docs/autopsy\.md#([\w-]+)", text))  # fmt: skip


def test_the_lines_for_verl_write_what_is_read(tmp_path: Path):
    """With a stand-in for verl's batch: the columns of `DataProto` that its trainer has before the update."""
    code = next(
        text for text in re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S) if "rollout_log_probs" in text
    )
    names: dict[str, Any] = {}
    exec(code, names)
    batch = {
        "responses": torch.tensor([[5, 6, 0], [7, 0, 0]]),
        "response_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "rollout_log_probs": torch.tensor([[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]]),
        "old_log_probs": torch.tensor([[-1.0, -2.5, 0.0], [-0.5, 0.0, 0.0]]),
        "advantages": torch.tensor([[0.5, 0.5, 0.0], [-0.5, 0.0, 0.0]]),
        "token_level_scores": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]),
    }
    proto = type("Batch", (), {"batch": batch, "non_tensor_batch": {"uid": np.array(["a", "a"])}})()
    names["write_rollouts"](tmp_path / "out.jsonl", proto, step=3, limit=2)
    one, two = format_of(tmp_path / "out.jsonl").read(tmp_path / "out.jsonl")
    assert (one.step, one.group, one.reward, one.cut, two.cut, two.reward) == (3, "a", 1.0, True, False, 0.0)
    assert list(one.token_ids) == [5, 6] and list(one.logp) == [-1.0, -2.5] and list(two.behavior_logp) == [-0.5]


def test_figures_are_complete_in_json(tmp_path: Path):
    found = judged(dumps.own_jsonl(tmp_path, sound()))
    assert onset(found) == 14 and json.dumps([asdict(f) for f in found.findings])
