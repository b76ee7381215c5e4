"""The benchmarks' harness: whose turn it is, pairs, tables, floors, bad input, and a quick run without peers."""

import json
import math
import sys
from pathlib import Path

import psutil
import pytest
import torch
from benchmarks import folders
from benchmarks.__main__ import main
from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.floor import Step, head_flops
from benchmarks.machine import name as machine_name
from benchmarks.machine import physical_cores
from benchmarks.parts import PARTS, Scale, mismatch
from benchmarks.results import Results
from benchmarks.rounds import column, measure, ratios, summary, take_turns
from benchmarks.table import render
from benchmarks.worker_pool import WorkerError, WorkerPool, plain
from benchmarks.workers import drpo_neighbours, drpo_overlap, drpo_resampling, drpo_step, drpo_turns
from benchmarks.workers import head as head_worker
from benchmarks.workers.drpo_mismatch import figures
from benchmarks.workers.head_inputs import make

from drpo.model.loading import load, load_tokenizer
from drpo.model.names import SMOLLM2
from drpo.rollout import encode_prompt
from drpo.rollout.turn_ends import stop_ids
from drpo.types import Problem

MACHINE = {
    "processor": "AMD EPYC 9555",
    "cores": 2,
    "flags": {"avx2": True, "avx512_bf16": True, "amx_bf16": False},
    "memory_gib": 23,
    "accelerator": None,
    "system": "Linux",
    "python": "3.11.7",
    "torch": "2.13.0",
}


def entrant(name: str, **warm_up: int) -> Entrant:
    return Entrant(name, Worker(OURS, name, {}), {"size": 8}, warm_up)


def test_turns_go_round_and_the_warm_up_is_not_counted():
    asked = []

    def ask(who, request):
        asked.append((who.name, request["round"], request["size"]))
        return {"seconds": float(request["round"])}

    rounds, failures = take_turns([entrant("a", size=1), entrant("b")], ask, repeats=2)
    assert asked == [("a", 0, 1), ("b", 0, 8), ("a", 1, 8), ("b", 1, 8), ("a", 2, 8), ("b", 2, 8)]
    assert rounds == [{n: {"seconds": s} for n in "ab"} for s in (1.0, 2.0)] and not failures


def test_one_that_fails_is_named_and_the_others_go_on():
    def ask(who, request):
        if who.name == "b" and request["round"] == 2:
            raise WorkerError("out of memory")
        return {"seconds": 1.0}

    rounds, failures = take_turns([entrant("a"), entrant("b"), entrant("c")], ask, repeats=3)
    assert failures == {"b": "out of memory"}
    assert [sorted(r) for r in rounds] == [["a", "b", "c"], ["a", "c"], ["a", "c"]]


def test_a_case_that_has_had_its_time_ends_after_the_round_it_is_in():
    rounds, _ = take_turns([entrant("a"), entrant("b")], lambda e, r: {"seconds": 1.0}, repeats=5, seconds=0.0)
    assert [sorted(r) for r in rounds] == [["a", "b"]]


def test_ratios_are_taken_within_rounds_so_that_drift_cancels():
    # The machine halves its speed after the first round: medians would give 6 / 2 or 3 / 1, all pairs give 3.
    rounds = [{"a": {"seconds": 3.0 * k}, "b": {"seconds": 1.0 * k}} for k in (1, 2, 2)] + [{"a": {"seconds": 9.0}}]
    assert ratios(rounds, "a", "b") == [3.0, 3.0, 3.0]
    assert column(rounds, "b", "seconds") == [1.0, 2.0, 2.0]
    assert summary(column(rounds, "a", "seconds")) == (6.0, 3.0, 9.0) and summary([]) is None
    assert column([{"a": {"phases": {"update": 2}}}, {"a": {}}], "a", "phases.update") == [2.0]


def test_floor_by_hand():
    # 2 prompts of 5 tokens, 3 samples each of 4 tokens: 24 sampled. Places: prompts once per group 10 + 24 - 6 = 28,
    # once per sample 30 + 24 - 6 = 48. 2 + 6 = 8 operations per number: body 100, head 50 at the 24 sampled tokens.
    step = Step(body=100, head=50, prompts=2, rows=6, prompt_tokens=10, sampled=24)
    assert step.flops(shared=True) == 8 * (100 * 28 + 50 * 24) == 32_000
    assert step.flops(shared=False) == 8 * (100 * 48 + 50 * 24) == 48_000
    assert step.seconds(16_000.0, shared=True) == 2.0
    assert head_flops(2048, 49_152, 576) == 3 * 2 * 2048 * 49_152 * 576


def test_messages_lose_folders_and_addresses():
    said = plain("OSError: /home/me/a b/x.json: no file '/tmp/d/model.bin'\n(https://example.org/simple/) 3/4")
    assert said == "OSError: a b/x.json: no file 'model.bin' (<address> 3/4"


def test_hardware_names():
    assert machine_name(MACHINE) == "cpu-2core-epyc-avx512bf16"
    assert machine_name({**MACHINE, "accelerator": "NVIDIA H200"}) == "gpu-nvidia-h200"
    blocks = [f"processor\t: {i}\nphysical id\t: 0\ncore id\t\t: {i // 2}" for i in range(1)]
    assert physical_cores("\n\n".join(blocks)) == 1


def step_case() -> dict:
    def answer(seconds: float) -> dict:
        phases = {"rollout": seconds / 4, "reward": 0.0, "update": 3 * seconds / 4}
        counts = {"tokens": 24, "prompt_tokens": 30, "rows": 6, "skipped": 0}
        return {"seconds": seconds, "phases": phases, "peak_bytes": 2**30, "extra_bytes": 2**20, **counts}

    rate = {"seconds": 1.0, "rates": {"fp32": 8_000.0}}
    return {
        "part": "step",
        "name": "fp32, full",
        "baseline": "drpo",
        "entrants": ["drpo", "TRL", "matrix products", "other"],
        "parameters": {"prompts": 2, "samples": 3, "precision": "fp32"},
        "about": {
            "drpo": {"settings": "defaults", "shapes": {"body": 100, "head": 50}},
            "TRL": {"settings": "TRL 1.16"},
            "matrix products": {"settings": "best of 4"},
        },
        "failures": {"other": "not installed: no such package"},
        "rounds": [{"drpo": answer(12 * k), "TRL": answer(48 * k), "matrix products": rate} for k in (1, 2)],
    }


def test_the_table_says_medians_spreads_ratios_floors_and_failures():
    text = render({"machine": MACHINE, "cases": [step_case()]})
    drpo, trl = [[c.strip() for c in line.split("|")] for line in text.splitlines() if line.startswith("| fp32, full")][
        :2
    ]
    assert drpo[2:6] == ["drpo", "18.0 (12.0 to 24.0)", "225", "1"]
    assert trl[2:6] == ["TRL", "72.0 (48.0 to 96.0)", "56.2", "4.00x (4.00 to 4.00)"]
    # 48,000 operations at 8,000 a second are 6 s, 32,000 are 4: 2 and 4 times the floor, 3 and 6; medians 3 and 4.5.
    assert drpo[12] == "3.00 / 4.50"
    assert "**other has no figure** (everywhere): not installed: no such package" in text
    assert "AMD EPYC 9555, 2 cores (avx2, avx512_bf16), 23 GiB" in text
    assert "- TRL: TRL 1.16." in text


def test_every_part_has_cases_for_a_cpu_and_says_what_does_not_fit():
    scale = Scale(quick=False, repeats=5, cuda=False, memory_bytes=8 * 2**30, fast_bf16=True)
    cases = PARTS["head"](scale)
    assert len(cases) == 2 * 2 * 6
    large = next(c for c in cases if c.name == "fp32, V 151,936, H 896, T 16,384")
    assert "9.3 GiB" in large.skipped["log_softmax"] and "log_softmax" not in {e.name for e in large.entrants}
    assert not cases[0].skipped and {e.name for e in cases[0].entrants} >= {"products alone", "linear_policy_loss"}


def test_the_parts_of_the_head_are_what_their_names_say():
    x = make({"tokens": 4, "vocabulary": 8, "hidden": 2, "dtype": "fp32", "row": 4})
    heads = {part: head_worker.head(x, part) for part in ("", "bias", "scale", "soft cap", "all")}
    found = {part: (h.bias is not None, h.scale, h.soft_cap) for part, h in heads.items()}
    assert found == {
        "": (False, 1.0, None),
        "bias": (True, 1.0, None),
        "scale": (False, 0.5, None),
        "soft cap": (False, 1.0, 30.0),
        "all": (True, 0.5, 30.0),
    }


def test_mismatch_by_hand():
    # r = 1 and 2 at pi = 0.5 and 0.5: k3 = (0 + 1 - log 2) / 2, gaps 0 and 0.25, of which one is above 0.15.
    found = figures(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.25]).log())
    wanted = {"k3": (1 - math.log(2)) / 2, "mean_ratio": 1.5, "mean_gap": 0.125, "p99_gap": 0.2475, "far": 0.5}
    assert found == pytest.approx(wanted, abs=1e-6)


def test_overlap_measures_the_same_run_twice():
    """Sampling elsewhere takes its time in turn, and hides behind training in the background."""
    scale = Scale(quick=True, repeats=1, cuda=False, memory_bytes=8 * 2**30, fast_bf16=True)
    for case in PARTS["overlap"](scale):
        assert [e.request for e in case.entrants] == [{"overlap": False}, {"overlap": True}]
        _, repetition = drpo_overlap.prepare(case.entrants[0].worker.setup)
        for entrant in case.entrants:
            record = repetition(entrant.request)
            assert {"rollout", "update", "sync"} <= record["phases"].keys() and record["seconds"] > 0
            away = entrant.worker.setup["away_s"]
            assert away is None or record["seconds"] >= 2 * away


def test_a_neighbour_is_busy_during_a_step_and_gone_after_it(monkeypatch: pytest.MonkeyPatch):
    scale = Scale(quick=True, repeats=1, cuda=False, memory_bytes=8 * 2**30, fast_bf16=False)
    (case,) = PARTS["neighbours"](scale)
    here, seen = psutil.Process(), []
    monkeypatch.setattr(drpo_step, "prepare", lambda setup: ({}, lambda request: seen.append(here.children()) or {}))
    _, repetition = drpo_neighbours.prepare(case.entrants[0].worker.setup)
    began = set(here.children())
    for entrant in case.entrants:
        repetition(entrant.request)
    alone, beside = (set(children) - began for children in seen)
    assert not alone and len(beside) == 1 and not any(child.is_running() for child in beside)


@pytest.mark.slow
def test_resampling_counts_what_is_sampled_again():
    """No sum of the tiny model is right, so that every group is sampled again as often as it may be."""
    scale = Scale(quick=True, repeats=1, cuda=False, memory_bytes=8 * 2**30, fast_bf16=False)
    case, _ = PARTS["resampling"](scale)
    _, repetition = drpo_resampling.prepare(case.entrants[0].worker.setup)
    once, again = (repetition({**entrant.request, "round": 1}) for entrant in case.entrants)
    assert (once["groups"], once["sampled_groups"]) == (2, 2) and (again["groups"], again["sampled_groups"]) == (2, 8)
    assert again["tokens"] > 2 * once["tokens"] > 0 and once["groups_with_signal"] == again["groups_with_signal"] == 0


def test_turns_sample_equally_many_tokens_in_equal_contexts():
    scale = Scale(quick=True, repeats=1, cuda=False, memory_bytes=8 * 2**30, fast_bf16=False)
    case, *_ = PARTS["turns"](scale)
    _, repetition = drpo_turns.prepare(case.entrants[0].worker.setup)
    records = [repetition({**entrant.request, "round": 1}) for entrant in case.entrants]
    assert {(r["tokens"], r["context"]) for r in records} == {(24, 15 + case.parameters["heard"])}


def test_mismatch_measures_vllm_where_it_is(monkeypatch: pytest.MonkeyPatch):
    scale = Scale(quick=True, repeats=1, cuda=False, memory_bytes=8 * 2**30, fast_bf16=True)
    for there in (None, "a module"):
        monkeypatch.setattr(mismatch, "find_spec", lambda name, there=there: there)
        samplers, trainers = PARTS["mismatch"](scale)
        names = ["bf16", "int8", "fp8_weights", "fp8"]
        assert [e.name for e in samplers.entrants] == names + (["vLLM bf16"] if there else [])
        assert list(samplers.skipped) == ([] if there else ["vLLM bf16"])
        assert {e.worker.setup["engine"] for e in samplers.entrants} == {"transformers", *(["vllm"] if there else [])}
        assert [e.worker.setup["precision"] for e in trainers.entrants] == ["bf16", "fp8"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "heads"], "only='heads'; did you mean 'head'?"),
        (["--only", ","], "names nothing"),
        (["--peers", "verl"], "peers='verl'; known: trl, vllm, cce"),
        (["--repeats", "0"], "repeats=0: must be at least 1"),
        (["--repeats", "x"], "invalid int value"),
        (["--out", "here.txt"], "must end in .json"),
        (["--fast"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("benchmarks: ") and said in error


def test_results_stay_until_they_are_measured_again(tmp_path: Path):
    path = tmp_path / "r.json"
    Results(path, MACHINE).add(step_case())
    again = Results(path, MACHINE)
    again.add({**step_case(), "name": "another"})
    assert [c["name"] for c in json.loads(path.read_text())["cases"]] == ["fp32, full", "another"]
    assert "another" in path.with_suffix(".md").read_text()
    assert main(["--only", "head", "--quick", "--out", str(path), "--peers", "none"]) == 2  # of another machine
    path.write_text("{}")
    assert main(["--only", "head", "--quick", "--out", str(path), "--peers", "none"]) == 2


def test_a_worker_that_is_not_there_stands_in_the_record():
    case = Case("head", "x", "a", (entrant("no_such_module"), Entrant("peer", Worker("trl", "x", {}), {})))
    with WorkerPool({OURS: Path(sys.executable), "trl": "not installed: no network"}, threads=1) as pool:
        record = measure(case, pool, 1, lambda text: None)
    assert record["failures"]["peer"] == "not installed: no network"
    assert "No module named" in record["failures"]["no_such_module"] and record["rounds"] == [{}]


@pytest.mark.slow
def test_the_head_part_runs_quickly_without_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "quick.json"
    assert main(["--quick", "--only", "head", "--peers", "none", "--repeats", "1", "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    for case in found["cases"]:
        (answers,) = case["rounds"]
        assert set(answers) == {"products alone", "linear_logprob", "linear_policy_loss", "log_softmax"}
        assert all(a["seconds"] > 0 for a in answers.values())
        assert case["failures"] == {n: "skipped: not among --peers" for n in ("Liger GRPO", "CCE")}
    assert "Liger GRPO has no figure" in path.with_suffix(".md").read_text()
    assert str(Path.home()) not in path.read_text() and str(tmp_path) not in path.read_text()


@pytest.mark.slow
def test_the_parts_of_the_head_stand_beside_the_weight_alone(tmp_path: Path):
    path = tmp_path / "quick.json"
    assert main(["--quick", "--only", "head_parts", "--repeats", "1", "--out", str(path)]) == 0
    for case in json.loads(path.read_text())["cases"]:
        (answers,) = case["rounds"]
        assert list(answers) == ["the weight alone", "bias", "scale", "soft cap", "all"] and not case["failures"]
    assert "times the weight alone" in path.with_suffix(".md").read_text()


@pytest.mark.slow
def test_objectives_of_sequences_and_of_the_batch_stand_beside_one_of_tokens(tmp_path: Path):
    path = tmp_path / "quick.json"
    assert main(["--quick", "--only", "head_objectives", "--repeats", "1", "--out", str(path)]) == 0
    for case in json.loads(path.read_text())["cases"]:
        (answers,) = case["rounds"]
        assert {"drpo(0.2)", "cppo", "m2po"} <= set(answers) and not case["failures"]
    assert "times drpo(0.2)" in path.with_suffix(".md").read_text()


def test_a_completion_of_the_endless_twin_has_no_end_that_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Though the chat template of the plain model ends a turn; and both make the same prompt."""
    monkeypatch.setattr(folders, "HOME", tmp_path)
    plain, (model, tokenizer) = load_tokenizer(SMOLLM2), load(str(folders.folder(SMOLLM2, endless=True)))
    assert min(stop_ids(model, tokenizer)) >= model.config.vocab_size
    problem = Problem.of_text("p", "What is 2 + 3?", "5")
    assert encode_prompt(plain, problem).tolist() == encode_prompt(tokenizer, problem).tolist()
