import io
import json
import os
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from drpo.errors import InputError
from drpo.rewards import REGISTRY, PythonTests, RewardConfig, RewardPool, Scored, exact_number, in_process
from drpo.rewards.characters import plain_characters
from drpo.rewards.contract import reads_transcript
from drpo.rewards.gym import GymScore, make_dataset
from drpo.rewards.math import math_verify
from drpo.rewards.worker import read_scores
from drpo.spec import format_spec, parse_spec
from drpo.types import Problem, RewardResult, Transcript
from drpo.workers.process import WorkerProcess
from drpo.workers.serve import HEADER, new_seal, unseal
from drpo.workers.serve import _given as given_requests
from support import naughty_rewards, unimportable_reward
from support.forks import fork

DATA = Path(os.environ.get("DRPO_SHARED", Path(__file__).parents[2] / "shared")) / "data"
QUESTION = Problem.of_text("7", "question", "0")


def problem(answer):
    return Problem.of_text("7", "question", answer)


# ---- exact_number ----

NUMBERS = st.decimals(-(10**12), 10**12, places=4) | st.integers(-(10**24), 10**24).map(Decimal)


def spelled(number, commas, dollar):
    text = f"{abs(number):{',' if commas else ''}f}"
    return ("-" if number.is_signed() and number else "") + ("$" if dollar else "") + text


@given(NUMBERS, st.booleans(), st.booleans(), st.sampled_from(["", ".", " dollars", "\n", "}", "$", "**", "%"]))
def test_exact_number_finds_the_last_number_however_it_is_written(number, commas, dollar, after):
    text = f"First 3-4 = -1, then 17. So: {spelled(number, commas, dollar)}{after}"
    assert exact_number(problem(f"{number:f}"), text) == 1.0
    assert exact_number(problem(spelled(number, commas, dollar)), f"{number:f}") == 1.0
    assert exact_number(problem(f"{number + 1:f}"), text) == 0.0
    assert exact_number(problem(f"{-number:f}"), text) == float(number == 0)


@given(st.integers(10**17, 10**40))
@example(10**20 + 1)
def test_exact_number_does_not_round(number):
    assert exact_number(problem(str(number)), str(number + 1)) == 0.0
    assert exact_number(problem(str(number)), f"{number}.0") == 1.0


@given(st.text())
def test_exact_number_marks_any_text(text):
    score = exact_number(problem("5"), text)
    assert score in (0.0, 1.0)
    assert score == 0.0 or re.search(r"[0-9]", plain_characters(text))


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("3-4", "4"),
        ("x-4", "4"),
        ("(3)-4", "4"),
        ("\\frac{1}{2}-4", "4"),
        ("3 - 4", "4"),
        ("x = -4", "-4"),
        ("(-4)", "-4"),
        ("\u22124", "-4"),
        ("-$4", "-4"),
        ("$-4$", "-4"),
        ("-\\$4", "-4"),
        ("It is 5.", "5"),
        ("It is 5.0.", "5"),
        ("007", "7"),
        ("336^\\circ", "336"),
        ("12,345", "12345"),
        ("1{,}234", "1234"),
        ("1,\\!234", "1234"),
        ("1,23", "23"),
        ("1,2345", "2345"),
        (".5", "0.5"),
        ("1e-05", "0.00001"),
        ("2.5E3", "2500"),
        ("25em", "25"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_exact_number_reads(text, last):
    assert exact_number(problem(last), text) == 1.0
    assert exact_number(problem(last.removeprefix("-") if last.startswith("-") else f"-{last}"), text) == 0.0


@pytest.mark.parametrize("text", ["", "none", "-", "$", ".", ",", "four", "\u0664"])
def test_exact_number_without_a_number_is_wrong(text):
    assert exact_number(problem("4"), text) == 0.0


@pytest.mark.parametrize("answer", ["336^\\circ", "336^{\\circ}", " 336\u00b0", "$336$", "336\\%", "336.00"])
def test_exact_number_accepts_answers_as_data_sets_write_them(answer):
    assert exact_number(problem(answer), "336") == 1.0


@pytest.mark.parametrize("answer", ["", "x", "3 4", "5%5", "1/0", "3-4", "18 dollars", "(1, 2)"])
def test_exact_number_refuses_an_answer_that_is_not_a_number(answer):
    with pytest.raises(
        InputError, match=re.escape(f"problem '7': exact_number needs a number as the answer, not {answer!r}")
    ):
        exact_number(problem(answer), "3")


def test_exact_number_is_linear_in_a_hostile_text():
    for text in ("1" * 200_000, "1," * 100_000, "-$" * 100_000, "1,234" * 40_000 + ",1", "1e" * 100_000):
        start = time.process_time()
        exact_number(problem("5"), text)
        assert time.process_time() - start < 3


# ---- math_verify ----


def golds(name):
    file = DATA / name / "test.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there; set DRPO_SHARED to the folder that holds data/")
    return [str(json.loads(line)["answer"]) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", ["aime24", "aime25", "amc23", "math500"])
def test_math_verify_on_real_answers(name):
    for answer in golds(name)[:40]:
        assert math_verify(problem(answer), f"So it is\n\\boxed{{{answer}}}.") == 1.0
        assert math_verify(problem(answer), "") == 0.0
        assert math_verify(problem(answer), "\\boxed{-98765432.1}") == 0.0


@pytest.mark.parametrize("name", ["aime24", "aime25", "amc23"])
def test_math_verify_agrees_with_exact_number_on_numeric_answers(name):
    answers = golds(name)
    for answer in answers:
        for other in answers[:4]:
            text = f"\\boxed{{{other}}}"
            assert math_verify(problem(answer), text) == exact_number(problem(answer), text)


@pytest.mark.parametrize(
    ("answer", "text", "score"),
    [
        ("\\frac{1}{2}", "\\boxed{0.5}", 1.0),
        ("1,080", "\\boxed{1080}", 1.0),
        ("27.0", "It makes $27$.", 1.0),
        ("025", "\\boxed{25}", 1.0),
        ("336^\\circ", "\\boxed{336}", 1.0),
        ("-4", "\\boxed{4}", 0.0),
        ("5", "\\boxed{5}. So the final answer is $4$", 1.0),
        ("4", "\\boxed{5}. So the final answer is $4$", 0.0),
        ("4", "So the final answer is $4$, not 5", 1.0),
        ("5", "\\boxed{4}" + " no, wrong." * 10 + " \\boxed{5}", 1.0),
        ("4", "\\boxed{4}" + " no, wrong." * 10 + " \\boxed{5}", 0.0),
        ("\\{4, 5\\}", "\\boxed{4} and \\boxed{5}", 1.0),
        ("5", "\\boxed{", 0.0),
    ],
)
def test_math_verify_prefers_the_last_box_and_compares_by_value(answer, text, score):
    assert math_verify(problem(answer), text) == score


def test_math_verify_works_off_the_main_thread():
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(math_verify, problem("\\frac{1}{2}"), "\\boxed{0.5}").result() == 1.0


@pytest.mark.parametrize("answer", ["", "  "])
def test_math_verify_refuses_an_answer_that_it_cannot_read(answer):
    with pytest.raises(InputError, match="problem '7': math-verify cannot read the answer"):
        math_verify(problem(answer), "\\boxed{1}")


# ---- a reasoning-gym scorer ----


def test_gym_score_reads_the_answer_tags_or_the_whole_text():
    entry = {"question": "?", "answer": "12", "metadata": {}}
    score, asked = GymScore("basic_arithmetic"), Problem.of_text("0", "?", "12", data=entry)
    assert score(asked, "<think>13</think> <answer>11</answer> no: <answer> 12 </answer> and 99") == 1.0
    assert score(asked, " 12\n") == 1.0
    assert score(asked, "<answer>13</answer>") == 0.0


def test_gym_score_marks_a_text_that_its_scorer_chokes_on_as_wrong_and_reports_a_broken_entry():
    entry = make_dataset("prime_factorization", {}, seed=0, size=1)[0]
    score = GymScore("prime_factorization")
    assert score(Problem.of_text("0", "?", "", data=entry), "banana") == 0.0
    with pytest.raises(KeyError):
        score(Problem.of_text("0", "?", "", data={}), "banana")


def test_gym_score_travels_without_its_dataset():
    score = GymScore("basic_arithmetic", {"min_terms": 2})
    small = len(pickle.dumps(score))
    score(Problem.of_text("0", "?", "12", data={"answer": "12", "metadata": {}}), "12")
    assert len(pickle.dumps(score)) == small
    assert pickle.loads(pickle.dumps(score)) == score


# ---- the pool ----

SECONDS = 2  # of a call: other processes may have the cores for one
LATE = f"timed out after {SECONDS} s"
ODD = "; a reward returns one number, a RewardResult, or None"
OUTCOMES = {
    "raise": (None, "raised", "ValueError: bad news"),
    "unspeakable": (None, "raised", "Unspeakable"),
    "sys.exit": (None, "raised", "SystemExit: 2"),
    "interrupt": (None, "raised", "KeyboardInterrupt"),
    "os._exit": (None, "died", "the reward process died (exit status 3)"),
    "abort": (None, "died", "the reward process died (exit status -6)"),
    "hang": (None, "timed_out", LATE),
    "hang in C": (None, "timed_out", LATE),
    "hang and ignore SIGTERM": (None, "timed_out", LATE),
    "fork and hang": (None, "timed_out", LATE),
    "fork and die": (None, "died", "the reward process died (exit status 3)"),
    "fork": (2.0, None, None),
    "fork and leave": (2.0, None, None),
    "fork a daemon": (2.0, None, None),
    "allocate": (None, "raised", "MemoryError"),
    "allocate 6 GB": (None, "raised", "OSError: [Errno 12] Cannot allocate memory"),
    "allocate shared": (None, "raised", "OSError: [Errno 12] Cannot allocate memory"),
    "print": (2.0, None, None),
    "close everything": (None, "died", "the reward process closed its pipe"),
    "talk into the pipe": (None, "died", "the reward process sent an invalid answer"),
    "answer for itself": (None, "died", "the reward process sent an invalid answer"),
    "answer with a seal": (None, "died", "the reward process sent an invalid answer"),
    "answer with none": (None, "died", "the reward process sent an invalid answer"),
    "none": (None, None, None),
    "nan": (None, "not_finite", "returned nan"),
    "inf": (None, "not_finite", "returned -inf"),
    "large": (None, "not_finite", "returned 1e+39, above 1e+30 in size"),
    "string": (None, "not_a_number", f"returned 'yes' (str){ODD}"),
    "list": (None, "not_a_number", f"returned [1.0] (list){ODD}"),
    "too few": (None, "not_a_number", f"returned [] (list){ODD}"),
    "array": (None, "not_a_number", f"returned array([1., 2.]) (ndarray){ODD}"),
    "tensor": (None, "not_a_number", f"returned tensor(1.) (Tensor){ODD}"),
    "complex": (None, "not_a_number", f"returned 1j (complex){ODD}"),
    "true": (1.0, None, None),
    "int": (3.0, None, None),
    "float32": (0.5, None, None),
    "int64": (2.0, None, None),
    "bool_": (1.0, None, None),
}
HARMLESS = ["raise", "unspeakable", "sys.exit", *naughty_rewards.VALUES]


def outcomes(marks):
    return [(m.score, m.failure and m.failure.kind, m.failure and m.failure.text) for m in marks]


def scored(*scores):
    return [(score, None, None) for score in scores]


def asking(texts):
    return [(QUESTION, text) for text in texts]


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2])
def pool(request):
    with RewardPool(naughty_rewards.obey, RewardConfig(processes=request.param, seconds=SECONDS, memory_gb=2)) as pool:
        yield pool


@pytest.mark.parametrize("declared", [False, True])
def test_a_reward_that_reads_the_transcript_returns_parts_and_rewards_of_turns(declared):
    """Across the process's pipe as in this process; one that reads the text alone receives nothing else."""
    messages = ({"role": "user", "content": "2?"}, {"role": "assistant", "content": "it is 5"})
    transcript = Transcript("q", messages, "it is 5", "length", (3, 4))
    class_of = in_process(naughty_rewards.Reader()) if declared else naughty_rewards.Reader()
    with RewardPool(class_of, RewardConfig()) as pool:
        others = [(QUESTION, replace(transcript, turns=turns)) for turns in ((2,), (3, 5))]
        (whole, *misfits) = pool.score([(QUESTION, transcript), *others])
    assert whole.result == RewardResult(7.0, {"length": 7.0, "cut": 1.0, "said": 7.0}, (0.0, (0.5, 0.0, 0.0, 2.0)))
    for misfit, why in zip(
        misfits, ("2 turns, but the episode has 1", "4 rewards of tokens for turn 1, which has 5"), strict=True
    ):
        assert misfit.result is None and misfit.failure.kind == "not_a_number"
        assert "naughty_rewards.Reader" in misfit.failure.text and why in misfit.failure.text
    assert reads_transcript(class_of) and not reads_transcript(naughty_rewards.obey)
    with RewardPool(exact_number) as pool:
        assert outcomes(pool.score([(Problem.of_text("q", "", "5"), transcript)])) == scored(1.0)


def test_every_misdeed_costs_its_own_mark_only_and_order_is_kept(pool):
    texts = [part for i, text in enumerate(OUTCOMES) for part in (str(i), text)]
    expected = [part for i, text in enumerate(OUTCOMES) for part in ((float(i), None, None), OUTCOMES[text])]
    marks = pool.score(asking([*texts, "99"]))
    assert outcomes(marks) == [*expected, *scored(99.0)]
    assert all(isinstance(mark, Scored) and type(mark.score) in (float, type(None)) for mark in marks)
    assert all(0 <= mark.seconds <= SECONDS for mark in marks)
    late = [mark.seconds for mark in marks if mark.failure and mark.failure.kind == "timed_out"]
    assert late == [SECONDS] * sum(kind == "timed_out" for _, kind, _ in OUTCOMES.values())


@pytest.mark.parametrize("deed", ["hang in C", "hang and ignore SIGTERM"])
def test_a_hang_is_over_at_its_deadline(pool, deed):
    start = time.perf_counter()
    assert outcomes(pool.score(asking([deed]))) == [OUTCOMES[deed]]
    assert time.perf_counter() - start < 60  # and not for ever, as it would: other processes may have the cores


FORKS = ["fork", "fork and leave", "fork a daemon", "fork and hang", "fork and die"]


@pytest.mark.parametrize("deed", FORKS)
def test_what_a_call_forks_ends_with_it(pool, deed, tmp_path):
    trace = tmp_path / "forked"
    assert outcomes(pool.score(asking([f"{deed} > {trace}"]))) == [OUTCOMES[deed]]
    born = [int(line) for line in trace.read_text().splitlines()]
    assert born and all(gone(pid) for pid in born)


def gone(pid):
    """Whether a process ends soon, or has; whoever adopted it may take a while to bury it."""
    for _ in range(60):
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
                continue
        return True
    return False


def test_nothing_outlives_a_killed_trainer(tmp_path):
    trace = tmp_path / "forked"

    def train_for_ever() -> None:
        with RewardPool(naughty_rewards.obey, RewardConfig(processes=2, seconds=100)) as pool:
            pool.score([(Problem.of_text("", "", ""), f"tell and hang > {trace}")] * 2)

    trainer = fork(tmp_path / "out", train_for_ever).process
    while not trace.exists() or trace.read_text().count("\n") < 2:
        assert trainer.is_alive()
        time.sleep(0.05)
    trainer.kill()
    trainer.join()
    assert all(gone(int(pid)) for pid in trace.read_text().split())


def test_the_pool_keeps_no_descriptors(pool):
    pool.score(asking(["1"]))
    before = psutil.Process().num_fds()
    pool.score(asking(["os._exit", "1"] * 5))
    assert psutil.Process().num_fds() == before


def test_a_large_item_and_many_small_ones_arrive(pool):
    large = [(Problem.of_text("7", "x" * 5_000_000, "0"), str(i)) for i in range(4)]
    assert outcomes(pool.score(large + asking(map(str, range(200))))) == scored(*map(float, range(4)), *range(200))


def test_calls_run_side_by_side(tmp_path):
    with RewardPool(naughty_rewards.obey, RewardConfig(processes=4, seconds=20)) as pool:
        assert outcomes(pool.score(asking([f"meet > {tmp_path / 'here'}"] * 4))) == scored(*[2.0] * 4)


def test_a_deadline_may_be_as_far_away_as_one_likes():
    with RewardPool(naughty_rewards.obey, RewardConfig(seconds=1e300)) as pool:
        assert outcomes(pool.score(asking(["1"]))) == scored(1.0)


def test_a_process_that_dies_between_calls_is_replaced():
    with RewardPool(naughty_rewards.obey, RewardConfig(seconds=SECONDS)) as pool:
        assert outcomes(pool.score(asking(["die later"])))[0][0] is None  # float("die later") raises
        time.sleep(0.6)
        assert outcomes(pool.score(asking(["1", "2"]))) == scored(1.0, 2.0)


def test_what_a_reward_writes_between_two_calls_is_no_answer_to_the_next():
    with RewardPool(naughty_rewards.obey, RewardConfig(seconds=SECONDS)) as pool:
        assert outcomes(pool.score(asking(["answer late"]))) == scored(2.0)
        time.sleep(0.3)
        found = outcomes(pool.score(asking(["1", "3"])))
        assert found in (scored(1.0, 3.0), [OUTCOMES["answer for itself"], *scored(3.0)])
        assert outcomes(pool.score(asking(["5"]))) == scored(5.0)


ANSWER = (
    '{"scores": [{"result": {"total": 1.0, "parts": {}, "turns": [], "weights": {}}, '
    '"failure": null, "seconds": 0.0, "usage": {}}]}'
)


@given(st.sampled_from([b"{}", b"1.0", b"null", ANSWER.encode()]), st.booleans())
def test_an_answer_without_its_items_seal_is_none(line, asked):
    with pytest.raises((ValueError, KeyError, TypeError)):
        unseal(line, new_seal(1) if asked else None)


def test_an_old_answer_and_anothers_are_none():
    old, new = new_seal(1), new_seal(2)
    line = json.dumps({"seal": old, **json.loads(ANSWER)}).encode()
    assert [s.score for s in read_scores(unseal(line, old))] == [1.0]
    for other in (new, new_seal(1), None):
        with pytest.raises(ValueError, match="not the answer"):
            unseal(line, other)


def test_quick_calls_are_sent_by_the_dozen_and_a_lost_one_costs_none_of_the_others(pool, monkeypatch):
    sent = []
    give_all = WorkerProcess.give_all

    def noted(self, requests, seconds):
        sent.append(len(requests))
        give_all(self, requests, seconds)

    monkeypatch.setattr(WorkerProcess, "give_all", noted)
    texts = [*map(str, range(400))]
    for place, deed in {150: "os._exit", 220: "answer for itself", 221: "hang", 300: "fork and die"}.items():
        texts[place] = deed
    expected = [OUTCOMES[text] if text in OUTCOMES else (float(text), None, None) for text in texts]
    assert outcomes(pool.score(asking(texts))) == expected
    assert max(sent) > 16 and len(sent) < 120


def test_a_call_that_is_not_quick_is_sent_alone(pool, monkeypatch):
    monkeypatch.setattr("drpo.rewards.pool._QUICK_SECONDS", 0.0)
    sent = []
    give_all = WorkerProcess.give_all
    monkeypatch.setattr(
        WorkerProcess, "give_all", lambda self, r, seconds: (sent.append(len(r)), give_all(self, r, seconds))
    )
    assert outcomes(pool.score(asking(map(str, range(40))))) == scored(*range(40))
    assert sent == [1] * 40


def test_a_process_reads_all_requests_that_come_at_once_before_it_handles_the_first():
    frames = [(b"one", True), (b"", True), (b"three", False), (b"four", False)]
    sealed = [(new_seal(i), *frame) for i, frame in enumerate(frames)]
    pipe = io.BytesIO(b"".join(HEADER.pack(len(body), more, seal.encode()) + body for seal, body, more in sealed))
    pairs = [(seal, body) for seal, body, _ in sealed]
    assert [list(given_requests(pipe)) for _ in range(3)] == [pairs[:3], pairs[3:], []]


def test_an_empty_list_has_no_marks(pool):
    assert pool.score([]) == []


def test_a_declared_reward_runs_here_with_the_same_outcomes():
    here = []

    @in_process
    def reward(problem, text):
        here.append(os.getpid())
        return naughty_rewards.obey(problem, text)

    with RewardPool(reward) as pool:
        assert outcomes(pool.score(asking(HARMLESS))) == [OUTCOMES[text] for text in HARMLESS]
    assert here == [os.getpid()] * len(HARMLESS)


def test_ctrl_c_is_not_a_mark():
    @in_process
    def reward(problem, text):
        raise KeyboardInterrupt

    with RewardPool(reward) as pool, pytest.raises(KeyboardInterrupt):
        pool.score(asking(["1"]))


def test_built_in_rewards_in_the_pool():
    for reward in (exact_number, math_verify):
        with RewardPool(reward) as pool:
            found = pool.score([(problem("5"), "\\boxed{5}"), (problem("5"), "\\boxed{6}")])
            assert outcomes(found) == scored(1.0, 0.0)
            (failed,) = pool.score([(problem(""), "5")])
            assert failed.score is None
            assert failed.failure.text.startswith("InputError: problem '7'")


def test_a_long_failure_is_one_short_line():
    @in_process
    def reward(problem, text):
        raise ValueError("x\n" * 1000)

    with RewardPool(reward) as pool:
        (mark,) = pool.score(asking(["1"]))
    assert len(mark.failure.text) == 200
    assert "\n" not in mark.failure.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"processes": 0}, "reward_pool.processes=0: must be at least 1"),
        ({"seconds": 0}, "reward_pool.seconds=0: must be finite and above 0"),
        ({"seconds": float("nan")}, "reward_pool.seconds=nan: must be finite and above 0"),
        ({"seconds": float("inf")}, "reward_pool.seconds=inf: must be finite and above 0"),
        ({"memory_gb": -1}, "reward_pool.memory_gb=-1: must be finite and 0 (no limit) or more"),
        ({"on_failure": "zeero"}, "reward_pool.on_failure='zeero'; did you mean 'zero'?"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        RewardConfig(**arguments)


def test_a_reward_without_a_name_is_refused():
    with pytest.raises(InputError, match=r"^reward .*<lambda> cannot be sent to a child process: .*in_process$"):
        RewardPool(lambda problem, text: 1.0)


def test_a_reward_that_a_child_cannot_import_is_refused():
    with pytest.raises(InputError) as caught, RewardPool(unimportable_reward.reward):
        pass
    assert str(caught.value).startswith(
        "reward support.unimportable_reward:reward cannot run in a child process: "
        "RuntimeError: no licence found; define it"
    )
    assert "\n" not in str(caught.value)


def test_a_problem_that_cannot_travel_is_refused(pool):
    with pytest.raises(InputError, match="problem '1' cannot be sent to the reward's process"):
        pool.score([(Problem.of_text("1", "", "", data={"f": lambda: 0}), "1")])


def test_specs_of_rewards():
    for name, reward in {"exact_number": exact_number, "math_verify": math_verify}.items():
        assert parse_spec(name, REGISTRY) is reward
        assert format_spec(reward, REGISTRY) == name
    for strict in (PythonTests(), PythonTests(2.0, partial=True)):
        assert parse_spec(format_spec(strict, REGISTRY), REGISTRY) == strict
    assert parse_spec("support.naughty_rewards:obey", REGISTRY) is naughty_rewards.obey
    with pytest.raises(InputError, match="unknown reward 'exact_numbr'; did you mean 'exact_number'"):
        parse_spec("exact_numbr", REGISTRY)
