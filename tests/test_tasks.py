import json
import os
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import reasoning_gym.utils
from hypothesis import given
from hypothesis import strategies as st

from drpo.errors import InputError
from drpo.rewards import exact_number
from drpo.rewards.math import math_verify
from drpo.spec import format_spec, parse_spec
from drpo.tasks import REGISTRY, Addition, Known, ReasoningGym, Records
from drpo.tasks.cleaning import Question, collapse, without
from drpo.tasks.rows import reach, read_rows
from drpo.types import Problem

DATA = Path(os.environ.get("DRPO_SHARED", Path(__file__).parents[2] / "shared")) / "data"


def prompts(problems):
    return [problem.prompt for problem in problems]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def questions(n):
    return [{"q": f"question {i}", "a": str(i)} for i in range(n)]


def records(path, **changes):
    return Records(**{"path": str(path), "prompt": "q", "answer": "a", "reward_name": "exact_number"} | changes)


def refused(message):
    """The whole message, which is one line."""
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


# ---- every task ----


@pytest.fixture(params=["addition", "one pair short", "gym", "small gym", "records", "records with test"])
def task(request, tmp_path):
    rows = questions(100)
    makers = {
        "addition": lambda: Addition(1, 9),
        "one pair short": lambda: Addition(1, 2),
        "gym": lambda: ReasoningGym("basic_arithmetic", {"max_terms": 2, "max_digits": 1}),
        "small gym": lambda: ReasoningGym("coin_flip", {"min_trials": 3, "max_trials": 3}),
        "records": lambda: records(write(tmp_path / "all.jsonl", rows)),
        "records with test": lambda: records(
            write(tmp_path / "train.jsonl", rows), test=write(tmp_path / "test.jsonl", rows[:30])
        ),
    }
    return makers[request.param]()


def test_training_and_held_out_problems_are_disjoint(task):
    held_out = prompts(task.held_out(10**6 if not isinstance(task, ReasoningGym) else 50))
    drawn = [prompt for step in range(12) for prompt in prompts(task.sample(40, step, seed=3))]
    assert held_out
    assert len(set(held_out)) == len(held_out)
    assert set(held_out).isdisjoint(drawn)


def test_sampling_is_a_pure_function_with_unique_ids(task):
    fresh = parse_spec(format_spec(task, REGISTRY), REGISTRY)
    assert fresh == task
    assert [task.sample(8, step, 1) for step in (4, 0, 4)] == [fresh.sample(8, step, 1) for step in (4, 0, 4)]
    assert len({problem.id for problem in task.sample(40, 2, 0)}) == 40
    assert len({str(prompts(task.sample(40, step, seed))) for step in range(3) for seed in range(3)}) == 9


def test_held_out_problems_are_the_same_and_a_prefix(task):
    task.sample(3, 5, 9)
    all_of_them = task.held_out(30)
    assert task.held_out(2) == all_of_them[:2]
    assert len({problem.id for problem in all_of_them}) == len(all_of_them)
    assert task.held_out(0) == []


def test_the_reference_answer_is_right_and_another_is_wrong(task):
    for problem in [*task.sample(5, 0, 0), *task.held_out(5)]:
        assert task.reward(problem, problem.answer) == 1.0
        assert task.reward(problem, "no idea") == 0.0


# ---- addition ----


@given(st.integers(-30, 30), st.integers(0, 12))
def test_addition_holds_out_at_most_half_and_reaches_all_other_pairs(low, more):
    task = Addition(low, low + more)
    n_pairs = (more + 1) ** 2
    held_out = task.held_out(10**6) if n_pairs > 1 else []
    assert len(held_out) == min(n_pairs // 2, 512)
    for problem in task.sample(20, 0, 0):
        a, b = map(int, re.fullmatch(r"What is (-?\d+) \+ (-?\d+)\?", problem.prompt).groups())
        assert low <= a <= low + more >= b >= low
        assert int(problem.answer) == a + b


def test_addition_is_uniform_over_the_pairs_that_are_not_held_out():
    task = Addition(1, 4)
    counts = Counter(prompts(task.sample(8000, 0, 0)))
    assert len(counts) == 8
    assert all(abs(count - 1000) < 150 for count in counts.values())  # five standard deviations


def test_addition_draws_each_slot_for_itself():
    task = Addition()
    assert prompts(task.sample(4, 7, 1)) == prompts(task.sample(9, 7, 1))[:4]
    assert set(prompts(task.sample(50, 0, 0))) != set(prompts(task.sample(50, 1, 0)))
    assert Addition(1, 10**9).held_out(1000)[511]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Addition(5, 4), "addition: high=4 must be at least low=5"),
        (lambda: Addition(1.0, 4), "addition: low=1.0 must be an integer"),
        (lambda: Addition(1, True), "addition: high=True must be an integer"),
        (lambda: Addition(3, 3).held_out(1), "addition: low=3 and high=3 leave no pair to hold out"),
    ],
)
def test_addition_refuses(make, message):
    with refused(message):
        make()


# ---- reasoning-gym ----


def test_gym_problems_carry_the_system_message_and_what_the_scorer_needs():
    task = ReasoningGym("countdown", {"max_numbers": 4}, system="Be brief.")
    problem = task.sample(1, 0, 0)[0]
    assert problem.messages[0] == {"role": "system", "content": "Be brief."}
    assert len(problem.data["metadata"]["numbers"]) == 4
    assert "<answer>" in ReasoningGym("countdown").sample(1, 0, 0)[0].messages[0]["content"]
    assert task.reward(problem, f"I say <answer>{problem.answer}</answer>") == 1.0


def test_gym_asks_as_the_library_does():
    assert ReasoningGym("countdown").system == reasoning_gym.utils.SYSTEM_PROMPTS["default"]


def test_gym_seeds_are_different_streams():
    first, second = (ReasoningGym("basic_arithmetic", seed=seed) for seed in (0, 1))
    assert set(prompts(first.sample(5, 0, 0))).isdisjoint(prompts(second.sample(5, 0, 0)))
    assert set(prompts(first.held_out(5))).isdisjoint(prompts(second.held_out(5)))


@pytest.mark.slow
def test_gym_streams_go_on_past_one_dataset():
    assert len(set(prompts(ReasoningGym("countdown").sample(150, 0, 0)))) == 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("countdwn",), "unknown reasoning-gym dataset 'countdwn'; did you mean 'countdown'?"),
        (
            ("countdown", {"max_number": 4}),
            "reasoning-gym dataset 'countdown' has no argument 'max_number'; did you mean 'max_numbers'?",
        ),
        (
            ("countdown", {"seed": 4}),
            "reasoning-gym dataset 'countdown': 'seed' is set by the task, not by its arguments",
        ),
        (
            ("countdown", {"min_numbers": 1}),
            "reasoning-gym dataset 'countdown' with {'min_numbers': 1}: min_numbers must be greater than 1",
        ),
    ],
)
def test_gym_refuses(arguments, message):
    with refused(message):
        ReasoningGym(*arguments)


class Unlucky:
    """A dataset that fails on some of its items."""

    def __init__(self, works):
        self.works = works

    def __getitem__(self, i):
        if not self.works(i):
            raise ValueError("no luck")
        return {"question": f"question {i}", "answer": "1"}


def test_gym_skips_an_item_that_cannot_be_made_and_gives_up_when_none_can(monkeypatch):
    dataset = Unlucky(lambda i: i % 2)
    monkeypatch.setattr("drpo.tasks.reasoning_gym.make_dataset", lambda *args, **kwargs: dataset)
    task = ReasoningGym("countdown", seed=98)
    assert len(task.sample(100, 0, 0)) == 100
    dataset.works = lambda i: False
    with refused("reasoning-gym dataset 'countdown' with {}: it cannot make questions: no luck"):
        task.sample(1, 0, 0)


@pytest.mark.parametrize("held_out", [True, False])
def test_gym_gives_up_on_a_dataset_with_too_few_questions(monkeypatch, held_out):
    entries = [{"question": "the only one", "answer": "1"}] * 64
    monkeypatch.setattr("drpo.tasks.reasoning_gym.make_dataset", lambda *args, **kwargs: entries)
    monkeypatch.setattr("drpo.tasks.reasoning_gym._is_held_out", lambda entry: held_out)
    task = ReasoningGym("countdown", seed=99)
    if held_out:
        assert prompts(task.held_out(5)) == ["the only one"]
        with refused(
            "reasoning-gym dataset 'countdown' with {}: 256 questions in a row are all held out; it has too few"
        ):
            task.sample(1, 0, 0)
    else:
        assert len(task.sample(300, 0, 0)) == 300
        with refused(
            "reasoning-gym dataset 'countdown' with {}: none of 256 questions in a row is held out; it has too few"
        ):
            task.held_out(1 + 1)


# ---- records: order ----


@given(st.integers(1, 40), st.integers(1, 25), st.integers(0, 2**62))
def test_records_go_through_every_epoch_once(size, n, seed):
    task = records("unread")
    train = [Question(str(i), str(i)) for i in range(size)]
    task.__dict__["_data"] = SimpleNamespace(train=train)  # where cached_property keeps it
    steps = -(-3 * size // n)
    stream = [p.answer for step in range(steps) for p in task.sample(n, step, seed)]
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size], key=int) == [str(i) for i in range(size)]
    assert stream == [p.answer for p in task.sample(n * steps, 0, seed)]


def test_records_take_another_order_every_epoch_and_seed(tmp_path):
    task = records(write(tmp_path / "a.jsonl", questions(30)), holdout=0)
    orders = {tuple(prompts(task.sample(30, epoch, seed))) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9


# ---- records: what is dropped ----

TEXTS = st.text("aA b", max_size=5)


@given(st.lists(st.tuples(TEXTS, st.sampled_from("12"))))
def test_collapse_keeps_one_of_each_question_that_has_one_answer(pairs):
    kept, repeats, conflicting = collapse([Question(*pair) for pair in pairs])
    answers = {}
    for text, answer in pairs:
        answers.setdefault(text.replace(" ", ""), set()).add(answer)
    assert {q.text.replace(" ", "") for q in kept} == {text for text, found in answers.items() if len(found) == 1}
    assert len(kept) + conflicting == len(answers) == len(pairs) - repeats
    assert [q.text for q in kept] == [t for t, _ in dict.fromkeys(pairs) if t in {q.text for q in kept}][: len(kept)]


@given(st.lists(TEXTS), st.lists(TEXTS), st.none() | st.integers(1, 4))
def test_without_drops_what_agrees_with_the_held_out_set(texts, held_out, prefix):
    def same(text):
        return text.replace(" ", "").lower()[:prefix]

    kept = without([Question(t, "") for t in texts], [Question(t, "") for t in held_out], prefix)
    assert [q.text for q in kept] == [t for t in texts if not any(same(t) == same(other) for other in held_out)]


def test_records_count_what_they_drop(tmp_path):
    train = [
        {"q": "What is 1+1?", "a": 2},
        {"q": "What  is 1 + 1?", "a": "2"},
        {"q": "Who?", "a": "me"},
        {"q": "Who?", "a": "you"},
        {"q": "Is it in  the Test?", "a": "yes"},
        {"q": "empty", "a": ""},
        {"q": None, "a": "1"},
    ]
    test = [{"q": "is it in the test?", "a": "yes"}, {"q": "is it in the test?", "a": "twice"}]
    task = records(write(tmp_path / "train.jsonl", train), test=write(tmp_path / "test.jsonl", test))
    assert str(task.counts) == (
        "7 rows: 1 to train on, 2 held out; dropped: 2 without a question or an answer, 2 repeated, "
        "1 with conflicting answers, 1 in the held-out set"
    )
    assert prompts(task.sample(1, 0, 0)) == ["What is 1+1?"]
    assert task.sample(1, 0, 0)[0].answer == "2"
    assert task.sample(1, 0, 0)[0].data == train[0]


NUMBERS = {
    "1e-05": "0.00001",
    "5e-07": "0.0000005",
    "1e16": "10000000000000000",
    "-2.5E-3": "-0.0025",
    "72.0": "72",
    "0.5": "0.5",
    "0.1": "0.1",
    "100": "100",
    "123456789012345678901234567890": "123456789012345678901234567890",
    "true": "True",
    "NaN": None,
    "-Infinity": None,
    "1e999": None,
    "null": None,
}


def test_numbers_are_read_as_people_write_them(tmp_path):
    """Digits without an exponent; what is no number is no answer."""
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(f'{{"q": "{text}?", "a": {text}}}' for text in NUMBERS))
    task = records(str(path), holdout=0)
    read = {p.prompt.split("?")[0]: p.answer for p in task.sample(task.counts.train, 0, 0)}
    assert read == {text: answer for text, answer in NUMBERS.items() if answer is not None}
    assert task.counts.incomplete == sum(answer is None for answer in NUMBERS.values())
    assert all(math_verify(Problem.of_text("0", "", read[text]), f"\\boxed{{{read[text]}}}") == 1.0 for text in read)


@pytest.mark.parametrize("kind", ["float", "float32", "decimal"])
def test_numbers_of_a_table_are_read_likewise(tmp_path, kind):
    values = [Decimal("0.00001"), Decimal("72"), None] if kind == "decimal" else [1e-05, 72.0, float("nan")]
    typed = pyarrow.array(values, pyarrow.float32() if kind == "float32" else None)
    table = pyarrow.table({"q": ["a", "b", "c"], "a": typed})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    task = records(str(tmp_path / "a.parquet"), holdout=0)
    assert sorted(p.answer for p in task.sample(2, 0, 0)) == ["0.00001", "72"]
    assert task.counts.incomplete == 1


def test_an_integer_too_long_for_python_is_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": 1, "a": ' + "1" * 5000 + "}")
    with pytest.raises(InputError, match="line 1: not JSON"):
        records(str(path)).sample(1, 0, 0)


@pytest.mark.parametrize(("n", "holdout", "held_out"), [(10, 3, 3), (10, 99, 5), (1, 99, 0), (10, 0, 0)])
def test_records_set_at_most_half_aside(tmp_path, n, holdout, held_out):
    task = records(write(tmp_path / "a.jsonl", questions(n)), holdout=holdout)
    assert (task.counts.held_out, task.counts.train) == (held_out, n - held_out)


def test_records_overlap_by_prefix_also_without_a_test_set(tmp_path):
    rows = [{"q": f"{i % 5} then {i}", "a": str(i)} for i in range(50)]
    task = records(write(tmp_path / "a.jsonl", rows), holdout=2, overlap_prefix=1)
    held_out = {prompt[0] for prompt in prompts(task.held_out(2))}
    assert held_out.isdisjoint(prompt[0] for prompt in prompts(task.sample(task.counts.train, 0, 0)))
    assert task.counts.overlapping == 10 * len(held_out) - 2


# ---- records: what is asked ----


def test_records_ask_through_the_template_and_take_the_answer_after_the_mark(tmp_path):
    rows = [{"q": "{x} and {prompt}?", "a": "1 #### 2 ####\t1,234 "}]
    task = records(
        write(tmp_path / "a.jsonl", rows), template="Q: {prompt} \\boxed{}", answer_after="####", system="Be brief."
    )
    (problem,) = task.sample(1, 0, 0)
    assert problem.prompt == "Q: {x} and {prompt}? \\boxed{}"
    assert (problem.answer, problem.messages[0]["content"]) == ("1,234", "Be brief.")


def said(problem):
    return [(m["role"][0], m["content"]) for m in problem.messages]


def from_(*roles):
    return [{"role": role, "content": "1?"} for role in roles]


def test_records_read_a_prompt_that_is_a_list_of_messages(tmp_path):
    rows = [
        {"q": [*from_("user", "assistant"), {"role": "user", "content": "1 + 1?"}]},
        {"q": [{"role": "system", "content": "Own."}, {"role": "user", "content": "2 + 2?", "name": "Ada"}]},
        {"q": [{"role": "user", "content": "2 +2?"}]},  # the same question as the one before
        {"q": "3 + 3?"},
    ]  # fmt: skip
    rows = [row | {"a": "2"} for row in rows]
    task = records(
        write(tmp_path / "a.jsonl", rows), holdout=0, template="Q {prompt}", system="Be brief.", shots=[("0?", "0")]
    )
    assert (task.counts.repeats, task.counts.train) == (1, 3)
    of = {p.prompt: p for p in task.sample(3, 0, 0)}
    assert said(of["Q 1 + 1?"]) == [
        ("s", "Be brief."), ("u", "Q 0?"), ("a", "0"), ("u", "1?"), ("a", "1?"), ("u", "Q 1 + 1?"),
    ]  # fmt: skip
    assert said(of["Q 2 + 2?"]) == [("s", "Own."), ("u", "Q 0?"), ("a", "0"), ("u", "Q 2 + 2?")]
    assert of["Q 2 + 2?"].messages[-1]["name"] == "Ada"
    assert said(of["Q 3 + 3?"]) == [("s", "Be brief."), ("u", "Q 0?"), ("a", "0"), ("u", "Q 3 + 3?")]
    assert parse_spec(format_spec(task, REGISTRY), REGISTRY) == task


def test_parquet_gives_messages_without_what_they_do_not_have(tmp_path):
    asked = [{"role": "user", "content": "1 + 1?", "name": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"q": asked, "a": "2"}]), tmp_path / "a.parquet")
    (problem,) = records(tmp_path / "a.parquet", holdout=0).sample(1, 0, 0)
    assert problem.messages == ({"role": "user", "content": "1 + 1?"},)


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        (from_("user", "assistant"), "the last message of 'q' is assistant's"),
        ([], "'q' has no message"),
        (from_("user", "system", "user"), "'q' has a system message that is not the first"),
        (["1?"], "q.0 is no message with role and content: '1?'"),
        ([{"role": "user", "content": 1}], "q.0.content is no text: 1"),
    ],
)
def test_what_is_no_prompt_of_messages_is_refused_by_its_row(asked, wrong, tmp_path):
    with pytest.raises(InputError, match=rf"a.jsonl row 1: .*{re.escape(wrong)}"):
        records(write(tmp_path / "a.jsonl", [{"q": asked, "a": "1"}])).sample(1, 0, 0)


def test_what_is_no_example_is_refused():
    for shots in (["ab"], [("1?", 2)], [("1?",)]):
        with pytest.raises(InputError, match="records: shots: "):
            records("a.jsonl", shots=shots)


def test_a_text_is_no_messages():
    with pytest.raises(InputError, match=r"problem '0': messages='1 \+ 1\?': .*Problem\.of_text"):
        Problem("0", "1 + 1?", "2")


def test_records_name_their_reward():
    assert records("a").reward is exact_number
    assert records("a", reward_name="math_verify").reward is math_verify
    assert records("a", reward_name="support.naughty_rewards:obey").reward.__name__ == "obey"
    with refused("unknown reward 'math_verfy'; did you mean 'math_verify'?"):
        _ = records("a", reward_name="math_verfy").reward


# ---- reading ----


def test_every_kind_of_file_holds_the_same_rows(tmp_path):
    rows = [{"q": "a\u2028b", "n": {"x": [{"y": 1}]}}, {"q": "c", "n": {"x": [{"y": 2}]}}]
    write(tmp_path / "train.jsonl", rows)
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n")
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "whole.parquet")
    for i, row in enumerate(rows):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"parts-0000{i}-of-00002.parquet")
    for name in ("train.jsonl", "lines.json", "array.json", "whole.parquet"):
        assert read_rows(str(tmp_path / name), "unused") == rows
    for split in ("train", "whole", "parts"):
        assert read_rows(str(tmp_path), split) == rows
    assert reach(rows[1], "n.x.0.y", "row 2") == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian.jsonl", "{folder}/trian.jsonl: no such file; did you mean 'train.jsonl'?"),
        ("zzz/train.jsonl", "{folder}/zzz/train.jsonl: no such file; the folder {folder}/zzz does not exist"),
        ("nowhere", "{folder}/nowhere: no such file or folder"),
        ("", "{folder}: no split 'train'; known: bad, binary, list, text, trains"),
        ("empty", "{folder}/empty: no .jsonl, .json, .csv or .parquet file in this folder"),
        ("bad.jsonl", "{folder}/bad.jsonl line 3: not JSON: Expecting ',' delimiter: line 1 column 9 (char 8)"),
        ("list.jsonl", "{folder}/list.jsonl line 1: [1] is not an object with named fields"),
        ("list.json", "{folder}/list.json item 2: 'two' is not an object with named fields"),
        (
            "short.csv",
            "{folder}/short.csv line 2: 3 values, where line 1 names 2 fields (q, a); put quotes around a value that "
            "holds commas",
        ),
        ("twice.csv", "{folder}/twice.csv line 1: two fields are named 'q'"),
        ("open.csv", "{folder}/open.csv line 2: not CSV: unexpected end of data"),
        ("semicolons.csv", "{folder}/semicolons.csv line 1: one field, 'q;a'; separate the values by commas"),
        (
            "object.json",
            "{folder}/object.json: one object over several lines; write an array of objects, or one object a line",
        ),
        ("link.jsonl", "{folder}/link.jsonl: no such file; it is a link to gone, which is not there"),
        ("pipe", "{folder}/pipe: neither a file nor a folder; write the data to a file, which a run reads again"),
        (
            "binary.jsonl",
            "{folder}/binary.jsonl: cannot be read: 'utf-8' codec can't decode byte 0xff in position 0: invalid start "
            "byte; convert it to UTF-8",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"q": 1}\n\n{"q": 1 "a"}')
    (tmp_path / "list.jsonl").write_text("[1]")
    (tmp_path / "list.json").write_text('[{}, "two"]')
    (tmp_path / "short.csv").write_text("q,a\n1, 2,3\n")
    (tmp_path / "twice.csv").write_text("q,q\n1,2\n")
    (tmp_path / "open.csv").write_text('q,a\n"1,2\n')
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "semicolons.csv").write_text("q;a\n1;2\n")
    (tmp_path / "object.json").write_text('{\n  "q": 1\n}')
    (tmp_path / "link.jsonl").symlink_to("gone")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.parquet").write_text("no parquet")
    if name != "":
        (tmp_path / "train.jsonl").write_text("{}")
    else:
        (tmp_path / "trains.jsonl").write_text("{}")
        message = message.replace("known: bad, binary, list, text, trains", "did you mean 'trains'?")
    with refused(message.format(folder=tmp_path)):
        read_rows(str(tmp_path / name), "train")


def test_a_folder_may_be_called_as_a_file_and_a_name_of_a_table_may_have_blanks_around_it(tmp_path):
    (tmp_path / "my.jsonl").mkdir()
    (tmp_path / "my.jsonl" / "train.csv").write_text("q, a\n1, 2\n")
    assert read_rows(str(tmp_path / "my.jsonl"), "train") == [{"q": "1", "a": " 2"}]


def test_a_table_of_commas_has_texts_and_quoted_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeffq,a\r\n"1, 2\nand 3?",\r\n\r\n01.0,"say ""so"""\r\n'.encode())
    assert read_rows(str(tmp_path / "a.csv"), "unused") == [
        {"q": "1, 2\nand 3?", "a": None},
        {"q": "01.0", "a": 'say "so"'},
    ]
    assert read_rows(str(tmp_path), "a") == read_rows(str(tmp_path / "a.csv"), "unused")


def test_examples_are_neither_trained_nor_evaluated_on(tmp_path):
    path = write(tmp_path / "a.jsonl", questions(20))
    task = records(path, shots=(("Question  3", "3"), ("other", "0")), holdout=5)
    asked = prompts([*task.sample(task.counts.train, 0, 0), *task.held_out(99)])
    assert "question 3" not in asked and len(set(asked)) == 19
    assert str(task.counts) == "20 rows: 14 to train on, 5 held out; dropped: 1 shown as examples"
    tested = records(path, shots=(("question 3", "3"),), test=write(tmp_path / "test.jsonl", questions(4)))
    assert "question 3" not in prompts(tested.held_out(9)) and tested.counts.held_out == 3


@pytest.mark.parametrize("name", ["binary.jsonl", "text.parquet"])
def test_a_file_of_another_kind_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00 neither text nor parquet")
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path / name))}: cannot be read: [^\n]+$"):
        read_rows(str(tmp_path / name), "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "qq"}, "{path} row 1: no field 'qq'; the fields are q, a, deep, many; did you mean 'q'?"),
        ({"prompt": "zzz"}, "{path} row 1: no field 'zzz'; the fields are q, a, deep, many"),
        ({"prompt": "deep.z"}, "{path} row 1: no field 'deep.z'; the fields are x"),
        ({"prompt": "q.z"}, "{path} row 1: no field 'q.z'; 'z' is looked up in 'question'"),
        ({"prompt": "many.2"}, "{path} row 1: no field 'many.2'; '2' is looked up in a list of 2"),
        ({"prompt": "many"}, "{path} row 1: many.0 is no message with role and content: 1"),
        (
            {"answer": "deep"},
            "{path} row 1: field 'deep' is a dict, not text or a number: {{'x': 1}}; 'deep.x' reaches into it",
        ),
        ({"answer_after": "####"}, "{path} row 1: the answer has no '####': '3'"),
        ({"holdout": 0}, None),
    ],
)
def test_a_field_that_is_not_there_is_one_line(tmp_path, changes, message):
    path = write(tmp_path / "a.jsonl", [{"q": "question", "a": "3", "deep": {"x": 1}, "many": [1, 2]}])
    if message is None:
        records(path, **changes).sample(1, 0, 0)
        with pytest.raises(InputError, match="nothing is held out; set test or holdout"):
            records(path, **changes).held_out(1)
        return
    with refused(message.format(path=path)):
        records(path, **changes).sample(1, 0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "{question}"}, "records: template='{question}' must contain {prompt}"),
        ({"holdout": -1}, "records: holdout=-1 must be 0 or more"),
        ({"overlap_prefix": 0}, "records: overlap_prefix=0 must be 1 or more, or None"),
        ({"test": "test"}, "records: path='a.jsonl' is one file, so test='test' must be a file too"),
        ({"split": None}, "records: split=None and test=None leave nothing to read"),
    ],
)
def test_records_refuse_arguments_that_cannot_be_right(changes, message):
    with refused(message):
        records("a.jsonl", **changes)


def test_records_without_anything_to_train_on(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "", "a": ""}])
    with pytest.raises(InputError, match=r"a\.jsonl: nothing to train on \(1 row: 0 to train"):
        records(path).sample(1, 0, 0)


# ---- the hub ----


@pytest.fixture
def hub(monkeypatch):
    """What is asked of the hub; it answers with ten rows that have every field of every known set."""
    asked = []

    def load(source, config, split, trust_remote_code):
        asked.append((source, config, split))
        return [
            {"question": f"{split} {i}", "problem": f"{split} {i}", "prompt": f"{split} {i}"}
            | {"answer": f"#### {i}", "solution": f"{i}"}
            for i in range(10)
        ]

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize(
    ("name", "asked", "train"),
    [
        ("gsm8k", [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")], 10),
        ("math500", [("HuggingFaceH4/MATH-500", None, "test")], 0),
        ("aime24", [("HuggingFaceH4/aime_2024", None, "train")], 0),
        ("aime25", [("math-ai/aime25", None, "test")], 0),
        ("amc23", [("math-ai/amc23", None, "test")], 0),
        ("dapo_math", [("open-r1/DAPO-Math-17k-Processed", "all", "train")], 5),
    ],
)
def test_known_sets_ask_the_hub_for_their_parts(hub, name, asked, train):
    task = parse_spec(name, REGISTRY)
    assert task.counts.train == train
    assert hub == asked
    assert task.held_out(1)[0].prompt.endswith("put the final answer in \\boxed{}.")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def load(source, config, split, trust_remote_code):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with refused(
        "'data/gsm8k' is neither a file or folder here nor a hub dataset that can be loaded "
        "(config None, split 'train'): ConnectionError: no route"
    ):
        records("data/gsm8k").sample(1, 0, 0)


# ---- the real sets ----


def known(name, folder=None):
    path = DATA / (folder or name)
    if not path.is_dir():
        pytest.skip(f"{path} is not there; set DRPO_SHARED to the folder that holds data/")
    return parse_spec(f"{name}({str(path)!r})", REGISTRY)


@pytest.mark.parametrize(
    ("name", "n", "answer"),
    [("math500", 500, "\\frac{14}{3}"), ("aime24", 30, "025"), ("aime25", 30, "336^\\circ"), ("amc23", 40, "27")],
)
def test_evaluation_sets_are_whole_and_are_not_for_training(name, n, answer):
    task = known(name)
    problems = task.held_out(1000)
    assert len(problems) == n
    assert answer in {problem.answer for problem in problems}
    with refused(f"{DATA / name}: for evaluation only; it has nothing to train on"):
        task.sample(1, 0, 0)
    assert all(task.reward(problem, f"\\boxed{{{problem.answer}}}") == 1.0 for problem in problems[:30])


def test_gsm8k_has_its_two_parts():
    task = known("gsm8k")
    assert (task.counts.train, task.counts.held_out) == (7473, 1319)
    assert all(exact_number(problem, problem.answer) == 1.0 for problem in task.held_out(1319))


def test_dapo_math_is_cleaned():
    task = known("dapo_math", "dapo_math_17k")
    counts = task.counts
    assert (counts.rows, counts.repeats, counts.conflicting) == (17917, 17917 - 16921, 15)
    assert counts.held_out == 256
    assert counts.train == 16921 - 15 - 256 - counts.overlapping

    def start(problem):
        return "".join(problem.prompt.split()).casefold()[:80]

    assert {start(p) for p in task.held_out(256)}.isdisjoint(start(p) for p in task.sample(counts.train, 0, 0))


def test_a_prefix_removes_what_dapo_shares_with_math500_and_amc23():
    sets = {name: known(name).held_out(1000) for name in ("math500", "amc23", "aime24", "aime25")}
    texts = {name: [Question(p.data["problem"], "") for p in problems] for name, problems in sets.items()}
    rows = read_rows(str(DATA / "dapo_math_17k"), "train")
    dapo = [Question(reach(row, "prompt.0.content", ""), "") for row in rows]
    for prefix, shared in ((None, {"math500": 4, "amc23": 6}), (80, {"math500": 11, "amc23": 20})):
        for name, held_out in texts.items():
            assert len(without(held_out, dapo, prefix)) == len(held_out) - shared.get(name, 0)


# ---- spec ----


@pytest.mark.parametrize(
    "text",
    [
        "addition",
        "addition(10, 99)",
        "reasoning_gym('countdown', {'max_numbers': 4})",
        "reasoning_gym('countdown', seed=3)",
        "records('a.jsonl', 'q', 'a', test='b.jsonl')",
        "gsm8k",
        "gsm8k('/data/gsm8k')",
    ],
)
def test_specs_of_tasks(text):
    task = parse_spec(text, REGISTRY)
    assert parse_spec(format_spec(task, REGISTRY), REGISTRY) == task
    assert hash(task) == hash(parse_spec(text, REGISTRY))


def test_known_sets_take_a_path_as_their_first_argument():
    task = parse_spec("gsm8k('/data/gsm8k')", REGISTRY)
    assert isinstance(task, Known)
    assert task.records.path == "/data/gsm8k"
    assert task != parse_spec("math500('/data/gsm8k')", REGISTRY)


def test_aime_is_both_years_in_turn_and_for_evaluation_only(monkeypatch: pytest.MonkeyPatch):
    def years(path: str, split: str, config: str | None) -> list[dict[str, str]]:
        return [{"problem": f"{path} {i}", "answer": str(i)} for i in range(3)]

    monkeypatch.setattr("drpo.tasks.records.read_rows", years)
    task = parse_spec("aime", REGISTRY)
    problems = task.held_out(5)
    assert ["2024" in p.prompt for p in problems] == [True, False, True, False, True]
    assert len({p.id for p in task.held_out(60)}) == len({p.prompt for p in task.held_out(60)}) == 6
    with pytest.raises(InputError, match="evaluation only"):
        task.sample(1, step=0, seed=0)
