"""Sums of rewards: how they are written, what a run records of them, and GDPO's advantage; format and length rewards.

GDPO's whole recipe is held by test_methods.py. Not covered: several processes.
"""

import asyncio
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from drpo.cli import main
from drpo.credit import group_credit, teaches_nothing
from drpo.credit.advantages import gdpo, zscore
from drpo.credit.overlong import Shaped
from drpo.doctor import scoring
from drpo.errors import InputError
from drpo.rewards import (
    REGISTRY,
    Format,
    Length,
    Regex,
    RewardConfig,
    RewardPool,
    WeightedSum,
    exact_number,
    in_process,
    usage,
)
from drpo.rollout import ScriptedEngine
from drpo.spec import Unimported, format_spec, parse_spec, runs_code
from drpo.tasks import Addition
from drpo.train.config import load_run, read_value
from drpo.train.loop import train
from drpo.train.records import EVALUATIONS, METRICS, ROLLOUTS, read_records
from drpo.train.setup import build
from drpo.types import Problem, Request, RewardResult, ScoredGroup, Transcript
from support.forks import KillItself, fork
from support.rollouts import with_engine
from support.runs import assert_same_run
from support.tiny_world import completion
from support.worlds import digits, flaky, not_a_number, tiny_run

ADD = Problem.of_text("p", "1 + 1?", "2")


def said(text: str, *turns: int) -> Transcript:
    return Transcript("p", (), text, "stop", turns or (len(text),))


@in_process
@dataclass(frozen=True)
class Per:
    """A reward with parts, and rewards of two turns, the second by token."""

    size: float = 1.0

    def __call__(self, problem: Problem, transcript: Transcript) -> RewardResult:
        return RewardResult(self.size, {"inner": 7.0}, (0.5 * self.size, (0.0, self.size)))


@in_process
def per_turn(problem: Problem, transcript: Transcript) -> RewardResult:
    return RewardResult(0.0, turns=(1.0, 2.0))


# -------------------------------------------------------------------------------------------------------- as it is read


def test_a_sum_is_read_and_written_again():
    for text, written in (
        ("math_verify*1 + format*0.2", "math_verify + 0.2*format"),
        ("Exact_Number-length(100, shape='cosine')*0.1", "exact_number - 0.1*length(100, shape='cosine')"),
        ("0.5*exact_match*length(9)+ +exact_match", "0.5*exact_match*length(9) + exact_match"),
        ("-(format('think') - 2*support.worlds:digits)", "-format + 2.0*support.worlds:digits"),
        ("2*(support.worlds:digits)", "2.0*support.worlds:digits"),
        ("0*format + test_reward_sums:Per(2.0)*1e-3", "0.0*format + 0.001*test_reward_sums:Per(2.0)"),
        ("regex('a + b:c*2') + format", "regex('a + b:c*2') + format"),
    ):
        reward = parse_spec(text, REGISTRY)
        assert isinstance(reward, WeightedSum)
        assert format_spec(reward, REGISTRY) == written and parse_spec(written, REGISTRY) == reward
    assert parse_spec("exact_number", REGISTRY) is exact_number
    assert parse_spec("regex('a + b')", REGISTRY) == Regex("a + b")  # a sum within quotes is none
    assert parse_spec("exact_number + 0.2*format", REGISTRY) == WeightedSum.of((exact_number, 1.0), (Format(), 0.2))


def test_what_is_no_sum_of_rewards_is_refused_in_a_line():
    for text, message in (
        ("exact_number + 3", "a sum is written 'a + 0.2*b'"),
        ("exact_number/2", "a sum is written"),
        ("True*format", "a sum is written"),
        ("1e999*format", "a sum is written"),
        ("(format + exact_number)*(format + exact_number)", "a sum is written"),
        ("+".join(["format"] * 5000), "format"),
        ("exact_number + formt", "unknown reward 'formt'; did you mean 'format'?"),
        ("exact_number + 0.2*length", "length"),
        ("0*exact_number - 0*format", "weights are all 0 is always 0: exact_number, format"),
        ("math: sqrt", "not of the form module:name"),
        ("exact_number + os:sep", "each part of a sum must be a function"),
        ("format('thnk')", "format form='thnk'; did you mean 'think'?"),
        ("format(('<a>',))", "tags in pairs"),
        ("regex('(')", "regex pattern='(': missing )"),
        ("length(10, 20)", "length start=20: must be from 0 to limit=10"),
        ("length(0)", "length limit=0: must be at least 1 token"),
        ("length(9, shape='kosine')", "did you mean 'cosine'?"),
    ):
        with pytest.raises(InputError) as refused:
            parse_spec(text, REGISTRY)
        assert message in str(refused.value) and "\n" not in str(refused.value), text[:40]


def test_code_within_a_sum_is_not_imported_from_a_folder_that_is_not_trusted():
    for text in (
        "format + 0.2*my:own",
        "format('a') + my:own(1)",
        "records('x', reward_name='format + 0.2*my:own')",
        "records('x', reward_name='my\\x3aown')",
        "records('x', reward_name='my' ':own')",
        "records('x', reward_name=' my:own')",
        "records('x' # it's\n, reward_name='my:own')",
    ):
        assert runs_code(text), text
    assert not runs_code("records('C:/x.jsonl', 'q', 'a', system='Reply as key:value, or a + b: c')")
    assert not runs_code("math_verify + 0.2*format")


# ------------------------------------------------------------------------------------------------------ as it is scored


def test_each_term_is_a_part_before_its_weight():
    reward = parse_spec("exact_number - 0.25*length(20, start=10) + 2*exact_number*length(20, start=10)", REGISTRY)
    result = reward(ADD, said("It is 2.", 12))
    assert result.parts == {"exact_number": 1.0, "length": 0.8, "exact_number*length": 0.8}
    assert result.weights == {"exact_number": 1.0, "length": -0.25, "exact_number*length": 2.0}
    assert result.total == 1.0 - 0.25 * 0.8 + 2 * 0.8 == result.whole
    assert reward(ADD, said("It is 3.", 12)).total == -0.25 * 0.8
    twice = WeightedSum.of((Length(5), 1.0), (Length(50), 1.0))
    assert twice.names == ("length", "length_2")


def test_rewards_of_turns_are_weighted_and_parts_of_parts_are_kept():
    result = WeightedSum.of((Per(2.0), 0.5), (per_turn, 10.0))(ADD, said("x", 3, 2))
    assert (result.total, result.turns) == (1.0, (0.5 + 10, (0.0, 1.0 + 20)))
    assert result.parts == {"per": 2.0 + 1.0 + 2.0, "per_turn": 3.0, "per/inner": 7.0}
    assert math.isclose(sum(w * result.parts[name] for name, w in result.weights.items()), result.whole)
    product = parse_spec("test_reward_sums:Per*test_reward_sums:per_turn", REGISTRY)(ADD, said("x", 3, 2))
    assert (product.total, product.turns) == (2.5 * 3, ())


CALLS: list[str] = []


@in_process
def counting(problem: Problem, text: str) -> float:
    CALLS.append(text)
    return 0.5


def test_a_reward_of_several_terms_is_called_once():
    CALLS.clear()
    result = WeightedSum.of((counting, 1.0), (counting, 1.0))(ADD, said("x"))
    assert CALLS == ["x"] and result.parts == {"counting": 0.5, "counting_2": 0.5}


def test_where_a_part_fails_or_abstains_so_does_the_sum():
    reward = WeightedSum.of((exact_number, 1.0), (flaky, 0.1))
    with RewardPool(reward) as pool:
        failed, abstained, scored = pool.score([(ADD, text) for text in ("222", "2222", "22222")])
    assert failed.failure is not None and (failed.failure.kind, failed.result) == ("raised", None)
    assert failed.failure.text == "flaky: ValueError: a multiple of three"
    assert abstained.failure is None and abstained.result is None
    assert scored.result is not None and scored.result.parts == {"exact_number": 0.0, "flaky": 1.0}
    with RewardPool(WeightedSum.of((exact_number, 1.0), (not_a_number, 0.0))) as pool:
        (wrong,) = pool.score([(ADD, "2")])
    assert wrong.failure is not None
    assert (wrong.failure.kind, wrong.failure.text) == ("not_finite", "not_a_number: returned nan")
    with RewardPool(WeightedSum.of((exact_number, 1e31), (exact_number, 1.0))) as pool:
        (wrong,) = pool.score([(ADD, "2")])
    assert wrong.failure is not None and wrong.failure.kind == "not_finite"


@in_process
async def awaited(problem: Problem, text: str) -> float:
    usage.count("calls")
    await asyncio.sleep(0 if text == "2" else 60)
    return float(text == "2")


def test_async_rewards_are_awaited_within_a_sum():
    reward = WeightedSum.of((awaited, 1.0), (exact_number, 0.5), (flaky, 0.0))
    with RewardPool(reward, RewardConfig(seconds=0.2)) as pool:
        right, late = pool.score([(ADD, "2"), (ADD, "3 + 2")])
    assert late.failure is not None and late.failure.kind == "timed_out" and late.failure.text.startswith("awaited: ")
    assert right.result is None and right.usage == {"endpoint_calls": 1}  # flaky abstains
    with RewardPool(WeightedSum.of((awaited, 1.0), (exact_number, 0.5))) as pool:
        (right,) = pool.score([(ADD, "2")])
    assert right.result is not None and right.result.total == 1.5


@in_process
class Batched:
    """All completions of a rollout at once."""

    def score_all(self, items: Sequence[tuple[Problem, str]]) -> list[float]:
        return [len(items) / 10] * len(items)

    def __call__(self, problem: Problem, text: str) -> float:
        raise AssertionError("one at a time")


def test_a_reward_that_takes_all_at_once_does_so_within_a_sum():
    with RewardPool(WeightedSum.of((Batched(), 1.0), (exact_number, 2.0))) as pool:
        assert [scored.score for scored in pool.score([(ADD, "2"), (ADD, "3"), (ADD, "2")])] == [2.3, 0.3, 2.3]
        assert pool.score([]) == []


@pytest.mark.slow
def test_a_pattern_that_never_ends_costs_its_completion_alone():
    reward = WeightedSum.of((exact_number, 1.0), (Regex("(2+)+"), 0.5))
    with RewardPool(reward, RewardConfig(seconds=0.4)) as pool:
        late, right = pool.score([(ADD, "2" * 40 + "x"), (ADD, "2")])
    assert late.failure is not None and late.failure.kind == "timed_out" and late.failure.text.startswith("regex: ")
    assert right.result == RewardResult(
        1.5, {"exact_number": 1.0, "regex": 1.0}, weights={"exact_number": 1.0, "regex": 0.5}
    )


def test_weights_of_a_reward_of_ones_own_have_parts():
    with RewardPool(in_process(lambda p, t: RewardResult(1.0, {"a": 1.0}, weights={"b": 1.0}))) as pool:
        (scored,) = pool.score([(ADD, "x")])
    assert scored.failure is not None and "a weight of 'b'" in scored.failure.text


# ------------------------------------------------------------------------------------------------------ form and length


def test_formats_are_held_strictly():
    whole = "<think>one</think> <answer>2</answer>"
    for reward, right, wrong in (
        (
            Format(),
            ["<think>a</think>b", " <think>\na\n</think>\n\n b "],
            ["b", "<think></think>b", "<think>a</think>"],
        ),
        (
            Format(),
            [whole],
            ["x<think>a</think>b", "<think>a</think>b</think>", "</think>a<think>b", "<THINK>a</THINK>b"],
        ),
        (Format(opened=True), ["a</think>b"], ["<think>a</think>b", "</think>b", "a</think>", "a"]),
        (
            Format("think_answer"),
            [whole],
            [whole + ".", whole * 2, "<think>a</think>b", "<answer>2</answer> <think>a</think>"],
        ),
        (Format(("<r>", "</r>")), ["<r>a</r>b"], ["<think>a</think>b"]),
        (Format("boxed"), [r"\boxed{2}"], ["2", r"\boxed{2"]),
        (Regex("a.b"), ["a\nb", " a-b\n"], ["a.bc", "xa.b"]),
    ):
        assert [reward(ADD, text) for text in right] == [1.0] * len(right), reward
        assert [reward(ADD, text) for text in wrong] == [0.0] * len(wrong), reward
    soft = Format("think_answer", partial=True)
    assert [soft(ADD, text) for text in (whole, "<think>a</think>", "2", whole + whole)] == [1.0, 0.25, 0.0, 0.0]
    assert Format()(ADD, "<think>" * 200_000) == 0.0


def test_length_counts_tokens_of_all_turns():
    cosine, step = Length(20, 10, "cosine"), Length(20, 20)
    values = [
        (Length(20, 10)(ADD, t), cosine(ADD, t), step(ADD, t)) for t in (said("", 5, 5), said("", 9, 6), said("", 20))
    ]
    assert values == [(1.0, 1.0, 1.0), (0.5, pytest.approx(0.5), 1.0), (0.0, 0.0, 1.0)]
    assert step(ADD, said("", 21)) == 0.0 and cosine(ADD, said("", 12)) == pytest.approx(
        (1 + math.cos(0.2 * math.pi)) / 2
    )


# -------------------------------------------------------------------------------------------------------------- GDPO's


def group_of(parts: Sequence[Sequence[float]], weights: Sequence[float], **more: object) -> ScoredGroup:
    """A group of which each row of parts is a reward of the sum."""
    columns = [dict(zip("abc", column, strict=False)) for column in zip(*parts, strict=True)]
    named = dict(zip("abc", weights, strict=False))
    results = [RewardResult(sum(named[n] * x for n, x in p.items()), p, weights=named, **more) for p in columns]
    episodes = tuple(completion([7] * (2 + i), problem=f"{parts}", sample=i) for i in range(len(results)))
    return ScoredGroup(ADD, episodes, tuple(results))


def advantages(groups: Sequence[ScoredGroup], drop_equal: bool = False) -> list[float]:
    credits = group_credit(groups, advantage=gdpo, drop_equal=drop_equal)
    assert all(bool((c.advantage == c.advantage[0]).all()) for c in credits)
    return [float(c.advantage[0]) for c in credits]


def test_parts_that_differ_are_a_signal_where_the_sums_are_equal():
    """1 - 2/3 and 0 - 1/3 are no multiples of one another in floating point, and what cancels is 0 all the same."""
    hidden, cancelled = group_of([[1, 0, 0], [0, 0.5, 0.5]], [1, 2]), group_of([[1, 0, 0], [0, 1, 1]], [1, 1])
    flat, clear = group_of([[1, 1, 1], [0, 0, 0]], [1, 1]), group_of([[1, 0, 0], [1, 1, 0]], [1, 0.5])
    assert hidden.equal_rewards and cancelled.equal_rewards
    assert [teaches_nothing(g, gdpo) for g in (hidden, cancelled, flat, clear)] == [False, True, True, False]
    assert [teaches_nothing(g, zscore) for g in (hidden, cancelled, flat, clear)] == [True, True, True, False]
    found = advantages([hidden, cancelled, flat, clear])
    assert found[3:9] == [0.0] * 6 and all(found[:3])
    assert [len(advantages([g], drop_equal=True)) for g in (hidden, cancelled, flat, clear)] == [3, 0, 0, 3]
    # over all completions, whatever their length, the mean is 0 and the standard deviation 1
    assert math.isclose(sum(found), 0, abs_tol=1e-6) and math.isclose(sum(a * a for a in found) / 12, 1, rel_tol=1e-6)


def test_one_reward_is_zscores_over_the_rollout():
    rewards = [[1.0, 0.0, 0.0], [3.0, 2.0, 1.0]]
    wanted = torch.cat([zscore(torch.tensor(r)) for r in rewards])
    groups = [replace(group_of([r], [1.0]), results=tuple(map(RewardResult, r))) for r in rewards]
    assert advantages(groups) == pytest.approx((wanted / wanted.square().mean().sqrt()).tolist())


def test_what_is_no_part_is_compared_as_one_more():
    """The rewards of an environment's turns, and the penalty of an overlong completion."""
    parts = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    bare = group_of(parts, [1.0, 0.5])
    turns = replace(
        bare, results=tuple(replace(r, turns=(x,)) for r, x in zip(bare.results, (0.0, 0.0, 4.0), strict=True))
    )
    assert advantages([turns]) == pytest.approx(advantages([group_of([*parts, [0, 0, 4.0]], [1.0, 0.5, 1.0])]))
    (long,) = Shaped(1)([bare], limit=4)  # of 2, 3 and 4 tokens
    assert advantages([long]) == pytest.approx(advantages([group_of([*parts, [0, 0, -1.0]], [1.0, 0.5, 1.0])]))
    assert advantages([bare]) != pytest.approx(advantages([turns]), abs=0.01)


def test_what_does_not_go_with_it_is_refused_in_a_line():
    for changes, message in (
        ({"whiten": True}, "whiten=True: gdpo normalises the rollout itself"),
        ({"kl_in_reward": 0.1}, "kl_in_reward=0.1: gdpo compares whole episodes"),
        ({"discount": 0.9}, "discount=0.9: gdpo compares whole episodes"),
    ):
        with pytest.raises(InputError, match=message):
            tiny_run(advantage=gdpo, **changes)


# ---------------------------------------------------------------------------------------------------------------- a run

SUM = "0.5*support.worlds:digits + 0.5*exact_match - 0.1*length(8)"


def summed_run(**changes: object):  # type: ignore[no-untyped-def]
    return tiny_run(reward=read_value("reward", SUM), advantage=gdpo, **changes)


def test_a_run_records_the_sum_and_each_part(tmp_path: Path) -> None:
    run = summed_run(steps=1)
    train(run, tmp_path, keep_model=False)
    assert load_run(tmp_path) == run
    assert load_run(tmp_path, trust_remote_code=False).rewards.function == Unimported(SUM)
    (metrics,), evaluation = read_records(tmp_path / METRICS), read_records(tmp_path / EVALUATIONS)[0]
    names = ("digits", "exact_match", "length")
    mean = sum(w * metrics[f"reward_parts/{name}"] for w, name in zip((0.5, 0.5, -0.1), names, strict=True))
    assert math.isclose(mean, metrics["reward_mean"], rel_tol=1e-6, abs_tol=1e-9)
    assert metrics["reward_parts/digits"] > 0 and set(evaluation["reward_parts"]) == set(names)
    for record in read_records(tmp_path / ROLLOUTS):
        digit_share = digits(ADD, record["text"])
        assert record["reward_parts"]["digits"] == pytest.approx(digit_share)
        assert record["reward"] == pytest.approx(0.5 * digit_share - 0.1 * record["reward_parts"]["length"], abs=1e-6)


@in_process
def one(problem: Problem, text: str) -> float:
    return float("1" in text)


@in_process
def two_without(problem: Problem, text: str) -> float:
    return 2 * (1 - one(problem, text))


@pytest.mark.parametrize("advantage", [gdpo, zscore])
def test_dynamic_sampling_keeps_the_groups_that_have_an_advantage(tmp_path: Path, advantage) -> None:  # type: ignore[no-untyped-def]
    """Each completion's sum is the same, its parts are not: to GDPO that is a signal."""
    reward = WeightedSum.of((one, 1.0), (two_without, 0.5))
    run = tiny_run(steps=1, eval_problems=0, dynamic_sampling=1, reward=reward, advantage=advantage)
    components, asked = build(run), []

    def script(request: Request) -> str:
        asked.append(request)
        return "1" if int(request.key[-1]) % 2 else "x"

    engine = ScriptedEngine(components.tokenizer, script)
    train(run, tmp_path, components=with_engine(components, engine), keep_model=False)
    (metrics,) = read_records(tmp_path / METRICS)
    trained = ["advantage" in record for record in read_records(tmp_path / ROLLOUTS)]
    signals = advantage is gdpo
    assert metrics["frac_reward_zero_std"] == 1 and metrics["groups_with_signal"] == float(signals)
    assert all(trained) if signals else not any(trained)
    assert len(asked) == (16 if signals else 32)


@pytest.mark.slow
def test_killed_and_resumed_is_one_run_bit_for_bit(one_thread: None, tmp_path: Path) -> None:
    run, folder = summed_run(steps=6, dynamic_sampling=1, checkpoint_every=3, async_steps=1), tmp_path / "killed"
    train(run, tmp_path / "whole")
    assert fork(tmp_path / "out", train, run, folder, KillItself(5, "update")).end()[0] == -signal.SIGKILL
    assert train(run, folder)["finished"]
    assert_same_run(tmp_path / "whole", folder)


@pytest.mark.slow
def test_the_commands_work_with_a_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, evaluated, replayed; and a part of one's own is not imported from a folder that is not trusted."""
    run, own = str(tmp_path / "run"), str(tmp_path / "own")
    options = ["--steps", "2", "--eval-problems", "4", "--plain"]
    assert main(
        ["train", "smoke", "--reward", "Exact_Number*1 + format*0.2", "--method", "GDPO", "--out", run, *options]
    ) in (0, 1)
    assert main(["eval", run, "--problems", "4"]) == 0
    assert "format" in capsys.readouterr().out
    assert main(["replay", run, "--out", str(tmp_path / "replay.png")]) == 0
    assert main(["eval", run, "--problems", "4", "--reward", "exact_number - 0.1*length(8)"]) == 0
    assert "length" in capsys.readouterr().out
    assert main(["train", "smoke", "--reward", "format + support.worlds:digits", "--out", own, *options]) in (0, 1)
    assert main(["eval", own, "--problems", "4"]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main(["eval", own, "--problems", "4", "--trust-remote-code"]) == 0
    assert main(["train", "smoke", "--rewards", "format"]) == 2
    assert "did you mean '--reward'?" in capsys.readouterr().err


def test_the_doctor_asks_that_one_part_tells_right_from_wrong():
    problems = Addition(1, 50).held_out(6)

    def verdict(text: str) -> tuple[str, str]:
        finding, mutated = scoring.reward(parse_spec(text, REGISTRY), problems)
        assert mutated.verdict == "ok"
        return finding.verdict, finding.figure

    assert verdict("0.2*format + 0.8*exact_number")[0] == "ok"
    assert verdict("length(900) + exact_number")[1].startswith("exact_number: reference answers 1.00, others' 0.00")
    assert verdict("length(900) + format")[0] == "broken"
