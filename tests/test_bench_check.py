"""`make bench-check`: what is compared, what is a loss, and when it refuses; on made-up results, never on time."""

import json
from pathlib import Path

import pytest
from benchmarks import check, machine
from benchmarks.check import Ratio, compare, main, medians, round_seconds, short_cases, to_measure
from benchmarks.parts import Scale
from benchmarks.results import FOLDER

from drpo.errors import InputError

HERE = {"processor": "AMD EPYC", "cores": 2, "flags": {"avx2": True}, "accelerator": None, "torch": "2.13.0"}
HEAD = "fp32, V 49,152, H 576, T 2,048"
CPU = Scale(quick=False, repeats=2, cuda=False, memory_bytes=24 * 2**30, fast_bf16=False)


def head(*rounds: tuple[float, float], name: str = HEAD, **failures: str) -> dict:
    """A case of the head: seconds of the products and of the loss in each round."""
    answers = [
        {"products alone": {"seconds": a}, "linear_policy_loss": {"seconds": b}, "log_softmax": {"seconds": 9.0}}
        for a, b in rounds
    ]
    return {"part": "head", "name": name, "parameters": {}, "about": {}, "failures": failures, "rounds": answers}


def step(regime: str, *seconds: float) -> dict:
    counts = {"rows": 6, "prompt_tokens": 30, "tokens": 24}
    rates = {"seconds": 1.0, "rates": {"fp32": 8_000.0}}
    return {
        "part": "step",
        "name": regime,
        "parameters": {"prompts": 2, "precision": "fp32", "regime": regime},
        "about": {"drpo": {"shapes": {"body": 100, "head": 50}}},
        "failures": {},
        "rounds": [{"drpo": {"seconds": s, **counts}, "matrix products": rates} for s in seconds],
    }


def results(tmp_path: Path, *cases: dict) -> Path:
    path = tmp_path / "committed.json"
    path.write_text(json.dumps({"schema": 1, "machine": HERE, "cases": list(cases)}))
    return path


def test_ratios_are_those_of_the_same_round():
    # The machine halves its speed after the first round; in each the loss takes 1.5 times the products.
    (ratio,) = medians(head((1.0, 1.5), (2.0, 3.0), (2.0, 3.0))).items()
    assert ratio == (f"head: {HEAD}: linear_policy_loss / products alone", 1.5)
    # 32,000 operations at 8,000 a second are 4 s.
    assert medians(step("full", 8.0, 12.0)) == {"step: full: drpo / its floor": 2.5}
    assert not medians(step("natural", 8.0, 12.0)) and not medians(head((1.0, 1.5)))
    assert not medians({**head((1.0, 1.5), (1.0, 1.5)), "part": "turns"})


def test_seconds_are_no_loss_and_a_ratio_of_more_than_a_tenth_above_is():
    committed = [head((1.0, 1.5), (1.0, 1.5))]
    (slow_machine,) = compare([head((3.0, 4.5), (3.0, 4.5))], committed)
    (faster,) = compare([head((1.0, 1.1), (1.0, 1.1))], committed)
    (near,) = compare([head((1.0, 1.64), (1.0, 1.64))], committed)
    (slower,) = compare([head((1.0, 1.66), (1.0, 1.66))], committed)
    assert [r.is_loss for r in (slow_machine, faster, near, slower)] == [False, False, False, True]
    assert str(slower).endswith("linear_policy_loss / products alone: 1.66, was 1.50 (+11%)")
    assert not compare([head((1.0, 9.0), (1.0, 9.0), name="another")], committed)


def test_long_cases_and_those_of_one_round_are_left_out(tmp_path: Path):
    cases = [head((1.0, 2.0), (1.0, 2.0)), head((9.0, 9.0), (9.0, 9.0), name="long"), head((1.0, 2.0), name="once")]
    assert round_seconds(cases[1]) == 18.0
    assert short_cases(cases, tmp_path) == {("head", HEAD)}
    with pytest.raises(InputError, match="has head, and no short case of head, rollout, step"):
        short_cases(cases[1:], tmp_path / "x.json")


def test_only_what_is_compared_is_measured_again():
    (case,) = to_measure({("head", HEAD), ("head", "of another version")}, CPU)
    assert [e.name for e in case.entrants] == ["products alone", "linear_logprob", "linear_policy_loss"]


@pytest.mark.parametrize(
    ("measured", "status", "said"),
    [
        ([head((1.0, 1.5), (1.0, 1.5))], 0, ["1 of 1 ratios within 10%"]),
        ([head((1.0, 2.0), (1.0, 2.0)), head((1.0, 1.6), (1.0, 1.6))], 0, ["1 of 1 ratios within 10%"]),
        ([head((1.0, 2.0), (1.0, 2.0)), head((1.0, 1.8), (1.0, 1.8))], 1, ["1.80, was 1.50 (+20%)", "0 of 1"]),
        ([head(linear_policy_loss="out of memory")], 1, ["linear_policy_loss: out of memory", "0 of 0"]),
    ],
    ids=["as before", "slow once", "slow twice", "broken"],
)
def test_a_loss_is_measured_twice(measured, status, said, monkeypatch, tmp_path: Path, capsys):
    """One line for each loss, and one that counts."""
    monkeypatch.setattr(machine, "describe", lambda: HERE)
    turns = iter(measured)
    monkeypatch.setattr(check, "_measured", lambda cases, repeats: [next(turns)])
    path = results(tmp_path, head((1.0, 1.5), (1.0, 1.5)))
    assert main(["--against", str(path)]) == status
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines, strict=True))
    assert next(turns, None) is None


def test_it_refuses_in_one_line(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr(machine, "describe", lambda: {**HERE, "processor": "Intel Xeon", "cores": 64})
    (tmp_path / "broken.json").write_text("{}")
    for arguments, said in [
        ([], "no results of cpu-64core-xeon-avx2 (Intel Xeon, 64 cores); there are: cpu-2core-epyc-avx2, "),
        (["--against", str(tmp_path / "none.json")], "no results of none"),
        (["--against", str(tmp_path / "broken.json")], "cannot be read as results"),
        (["--against", str(results(tmp_path, head((1.0, 1.5))))], "no short case of head"),
        (["--repeats", "1"], "must be at least 2"),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("bench-check: ") and said in error


def test_the_committed_results_can_be_compared_with():
    path = FOLDER / "cpu-2core-epyc-avx512bf16.json"
    cases = json.loads(path.read_text())["cases"]
    assert {part for part, _ in short_cases(cases, path)} == {"head", "rollout", "step"}
    found = compare(cases, cases)
    assert len(found) > 6 and not any(ratio.is_loss for ratio in found)
    assert all(Ratio(r.name, 1.11 * r.before, r.before).is_loss for r in found)
