"""Own data in one command: what is guessed, what is measured, recipes as files, and `drpo init`."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from drpo import cli
from drpo.cli.own_data import own_run
from drpo.errors import InputError
from drpo.recipes import find
from drpo.recipes.own_data import CAP_CPU, Measured, OwnData, fitted, n_held_out, neutral, read_own
from drpo.reductions import Horizon
from drpo.rewards import ExactMatch
from drpo.rewards.match import normalised
from drpo.tasks import REGISTRY
from drpo.tasks.columns import guess_fields
from drpo.train.config import configure, flat_json, load_run
from drpo.types import Problem
from newcomer_data import ALL
from support.pictures import without_pictures


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the working folder is appended
    for name, few in (("SAMPLED", 4), ("FIRST_CAP", 4), ("CAP_CPU", 8)):
        monkeypatch.setattr(f"drpo.recipes.own_data.{name}", few)
    for name in ("recipe", "other"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command is refused, with status 2."""
    assert cli.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("drpo: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("drpo: ")


def write(path: str, *rows: dict) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(n: int = 40) -> str:
    return write("sums.jsonl", *({"question": f"What is {i} + 1?", "answer": i + 1} for i in range(n)))


# ---- what the columns mean ----


@pytest.mark.parametrize(
    ("columns", "fields"),
    [
        ("question answer", "question answer"),
        ("Prompt id Label", "Prompt Label"),
        ("data_source prompt reward_model extra_info reward_model.ground_truth", "prompt reward_model.ground_truth"),
        ("problem solution answer", "problem answer"),
        ("question text answer", "question answer"),
        ("sentence label", "sentence label"),
        ("question french", "question french"),
    ],
)
def test_columns_with_usual_names_are_the_question_and_the_answer(columns: str, fields: str):
    asked, said = guess_fields(columns.split(), None, None, "my.csv")
    assert f"{asked.value} {said.value}" == fields


@pytest.mark.parametrize(
    ("columns", "named", "message"),
    [
        ("x y", {}, "which column is the question? Name it with --prompt-field; the columns are x, y"),
        ("input text output", {}, "which column is the question? Name it with --prompt-field"),
        ("question note more", {}, "which column is the answer? Name it with --answer-field; the columns are question"),
        ("question answer", {"prompt": "anwser"}, "no column 'anwser' (--prompt-field); did you mean 'answer'?"),
    ],
)
def test_columns_that_may_be_either_are_refused_in_a_line(columns: str, named: dict[str, str], message: str):
    with pytest.raises(InputError, match=re.escape(f"my.csv: {message}")):
        guess_fields(columns.split(), named.get("prompt"), named.get("answer"), "my.csv")


def test_a_column_that_is_named_is_not_guessed_for_the_other():
    asked, said = guess_fields(["text", "question"], None, "question", "my.csv")
    assert (asked.value, said.value) == ("text", "question")


# ---- what the answers say ----


@pytest.mark.parametrize(
    ("answers", "reward", "mark"),
    [
        (["3", "1,024", "-0.5", "1/2"], "exact_number", None),
        (["3", "Paris"], "exact_match", None),
        ([r"\sqrt{2}", "3"], "math_verify", None),
        (["1 + 2 = 3\n#### 3", "#### 4"], "exact_number", "####"),
    ],
)
def test_the_reward_follows_the_answers(answers: list[str], reward: str, mark: str | None):
    path = write("a.jsonl", *({"question": f"{i}: {a}?", "answer": a} for i in range(4) for a in answers))
    task = read_own(OwnData(path))
    assert (task.reward_name, task.answer_after) == (reward, mark)
    assert all(task.reward(p, f"\\boxed{{{p.answer}}}") == 1 for p in task.sample(4, 0, 0))


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("New York", 1),
        ("  new\nyork. ", 1),
        ('"**New York**"', 1),
        ("I think so.\nThe answer is: New York.", 1),
        ("It is here:\n\n**New York**", 1),
        (r"So \boxed{New York}, which is large.", 1),
        ("<answer>New York</answer>", 1),
        ("New York is a city", 0),
        ("New Yorks", 0),
        ("", 0),
    ],
)
def test_a_reply_matches_by_itself_or_by_the_answer_that_it_marks(reply: str, score: float):
    assert ExactMatch()(Problem.of_text("0", "Which city?", "New York"), reply) == score


def test_case_counts_where_it_is_said_and_signs_stay():
    problem = Problem.of_text("0", "In capitals?", "HELLO")
    assert (ExactMatch()(problem, "hello"), ExactMatch(case=True)(problem, "hello")) == (1, 0)
    assert ExactMatch(case=True)(problem, "HELLO!") == 1
    assert normalised("-5") != normalised("5") != normalised(".5") and normalised("{'a': 1}") == "{'a': 1}"


def test_a_word_in_place_of_a_number_is_told_to_be_brief_unless_the_user_says_how():
    path = write(
        "a.csv.jsonl", *({"question": f"The letter after {c}?", "answer": chr(ord(c) + 1)} for c in "abcdefgh")
    )
    system = read_own(OwnData(path)).system
    assert system is not None and "alone" in system
    assert read_own(OwnData(path, system="")).system == ""
    assert read_own(OwnData(path, shots=2)).system is None
    assert read_own(OwnData(path, reward="math_verify")).system is None


# ---- small sets, examples, what is measured ----


def test_a_fifth_is_held_out_and_never_more_than_half():
    assert [n_held_out(n) for n in (2, 10, 99, 101, 1000, 10**6)] == [1, 5, 49, 50, 200, 200]
    task = read_own(OwnData(sums(30), shots=2))
    assert (task.counts.train, task.counts.held_out, task.counts.shots) == (14, 14, 2)
    assert task.shots == (("What is 0 + 1?", "1"), ("What is 1 + 1?", "2"))
    run = neutral(read_own(OwnData(sums(4))))
    assert (run.data.prompts, run.trainer.updates) == (2, 2)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (1, (), "sums.jsonl: too few different questions to train and to evaluate on (1 row: 1 to train on"),
        (0, (), "sums.jsonl: there is no row in it"),
        (4, ("--shots", "3"), "--shots 3: from 0 to half of the 4 rows of sums.jsonl"),
        (4, ("--shots", "x"), "--shots 'x': must be a whole number"),
        (4, ("--prompt-field",), "--prompt-field: a value is missing"),
        (4, ("--prompt-feild", "x"), "unknown option '--prompt-feild'; did you mean '--prompt-field'?"),
        (4, ("--task", "gsm8k"), "--task: --data is the task"),
        (4, ("--reward", "exact_mach"), "did you mean 'exact_match'?"),
        (4, ("--model", "smolm"), "model='smolm': no folder"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_in_a_line(
    rows: int, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
):
    assert message in refusal(capsys, "train", "--data", sums(rows), *options)


def test_no_limit_of_the_demo_is_inherited_and_the_horizon_follows():
    run = configure(neutral(read_own(OwnData(sums()))), model="tiny")
    measured = fitted(run, given=())
    length = measured.rollout.sampling.max_new_tokens
    assert length % 8 == 0 and measured.objective.reduction == Horizon(length)
    assert measured == fitted(run, given=())  # sampled answers are the same each time
    said = configure(run, **{"sampling.max_new_tokens": 12, "learning_rate": 3e-4})
    fixed = fitted(said, given=("sampling.max_new_tokens", "learning_rate"))
    assert fixed == configure(said, reduction=Horizon(12))
    assert fitted(said, given=("sampling.max_new_tokens", "learning_rate", "reduction")) == said


def test_nine_of_ten_answers_and_the_longest_reference_fit():
    lengths = tuple(range(1, 101))
    assert Measured(1, longest=2, lengths=lengths, cap=128).max_new_tokens == 96
    assert Measured(1, longest=200, lengths=lengths, cap=128).max_new_tokens == 304
    assert "90% of 100 sampled answers" in str(Measured(1, 2, lengths, cap=128))
    assert "11 of 100 sampled answers were cut at 90" in str(Measured(1, 2, tuple(min(n, 90) for n in lengths), cap=90))


def test_a_method_reads_the_measured_length(capsys: pytest.CaptureFixture[str]):
    arguments = ["--data", sums(), "--model", "tiny", "--method", "dr_grpo"]
    run, options = own_run(arguments, "drpo")
    assert run.objective.reduction == Horizon(run.rollout.sampling.max_new_tokens) and options.method == "dr_grpo"
    assert flat_json(run)["objective"].startswith("ppo") and run.rollout.sampling.max_new_tokens != CAP_CPU
    run, _ = own_run([*arguments[:4], "--method", "grpo", "--sampling.max-new-tokens", "24"], "drpo")
    assert flat_json(run)["reduction"] == "sequence_mean" and run.rollout.sampling.max_new_tokens == 24


# ---- the commands ----


def test_one_command_trains_on_own_data_and_records_what_was_guessed(capsys: pytest.CaptureFixture[str]):
    options = ["--model", "tiny", "--steps", "1", "--prompts", "4", "--sampling.max-new-tokens", "4", "--plain"]
    with without_pictures():
        assert cli.main(["train", "--data", sums(), "--system", "Add.", *options, "--no-doctor"]) == 0
    err = capsys.readouterr().err
    for line in ("question: question", "exact_number (all 40 answers are numbers)", "40 rows: 20 to train on, 20 held"):
        assert line in " ".join(err.split())
    run = load_run(Path("runs/sums"))
    assert run.data.task == read_own(OwnData("sums.jsonl", system="Add."))
    assert run.data.task.system == "Add."
    assert run.objective.reduction == Horizon(4)


def test_a_written_recipe_is_the_run_that_was_shown(capsys: pytest.CaptureFixture[str]):
    data = ALL["dates"](Path(), rows=40).name
    arguments = ["init", data, "--model", "tiny", "--shots", "2", "--system", 'Say "when".', "--yes", "--no-doctor"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.count("as the model reads it") == 3 and 'Say "when".' in out and "next: drpo train recipe.py" in out
    assert "exact_match (" in err
    own = OwnData(data, system='Say "when".', shots=2)
    assert find("recipe.py") == fitted(configure(neutral(read_own(own)), model="tiny"), given=())
    compile(Path("recipe.py").read_text(), "recipe.py", "exec")
    assert "a file is there" in refusal(capsys, *arguments)


def test_where_a_recipe_cannot_be_written_nothing_is_sampled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("drpo.cli.init.fitted", lambda *_: pytest.fail("sampled"))
    assert "--out no/where.py: cannot be written" in refusal(capsys, "init", sums(), "--out", "no/where.py")


def test_without_a_terminal_nothing_is_asked(capsys: pytest.CaptureFixture[str]):
    assert "init: name the data" in refusal(capsys, "init")
    write("only.jsonl", *({"x": f"{i}?", "y": i} for i in range(8)))
    assert "the columns are x, y" in refusal(capsys, "init", "--model", "tiny")


def test_a_terminal_is_asked_until_the_answer_can_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    write("own.jsonl", *({"x": f"{i}?", "y": i} for i in range(8)))
    answers = io.StringIO("\ntiny\nz\nx\n\ny\nBe brief.\n1\n\n")
    monkeypatch.setattr(answers, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", answers)
    assert cli.main(["init", "--no-doctor"]) == 0
    out = capsys.readouterr().out
    assert "no column 'z'" in out and "[exact_number]" in out
    task = find("recipe.py").data.task
    assert (task.path, task.prompt, task.answer, task.system) == ("own.jsonl", "x", "y", "Be brief.")
    assert task.shots == (("0?", "0"),)


# ---- recipes as files ----

RUN = "from drpo.recipes.addition import smoke\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def recipe(:\n", "recipe.py line 1: no Python that can be read: "),
        ("x = 1\nraise ValueError('no')\n", "recipe.py line 2: ValueError: no"),
        ("import nowhere_at_all\n", "recipe.py line 1: ModuleNotFoundError: No module named 'nowhere_at_all'; modules"),
        ("import sys\nsys.exit(0)\n", "recipe.py line 2: SystemExit: 0"),
        ("def recipe():\n    return 1 / 0\n", "recipe.py line 2: ZeroDivisionError"),
        ("def recipe():\n    return 3\n", "recipe.py: recipe() returned int, not a drpo.train.config.Run"),
        ("recipe = 3\n", "recipe.py: recipe is a int, not"),
        ("", "recipe.py: it has no function recipe()"),
        ("def recipe(x):\n    pass\n", "recipe.py: TypeError: recipe() missing 1 required positional argument"),
        ("from drpo.types import Sampling\nSampling(samples=0)\n", "recipe.py line 2: sampling.samples=0: must be"),
        (
            "from drpo.train.config import Run, RewardsConfig\n"
            "recipe = Run(rewards=RewardsConfig(lambda problem, text: 1.0))\n",
            "recipe.py: reward <function",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "doctor", "compare"])
def test_a_recipe_file_that_does_not_work_is_refused_in_a_line(
    text: str, message: str, command: str, capsys: pytest.CaptureFixture[str]
):
    Path("recipe.py").write_text(text)
    assert message in refusal(capsys, command, "recipe.py")


def test_a_recipe_file_that_is_not_there_is_refused_and_one_without_its_ending_is_found(
    capsys: pytest.CaptureFixture[str],
):
    assert "recipe.py: No such file" in refusal(capsys, "train", "recipe.py")
    Path("other.py").touch()
    assert "did you mean 'other.py'?" in refusal(capsys, "train", "other")
    assert "drpo train --data x.csv" in refusal(capsys, "train", "x.csv")


def test_a_run_of_a_recipe_file_is_recorded_whole(capsys: pytest.CaptureFixture[str]):
    Path("recipe.py").write_text(f"{RUN}recipe = smoke()\n")
    with without_pictures():
        assert cli.main(["train", "recipe.py", "--steps", "1", "--sampling.max-new-tokens", "6", "--no-doctor"]) == 0
    Path("recipe.py").unlink()
    assert load_run(Path("runs/smoke")).objective.reduction == Horizon(6)


OWN_REWARD = f"""{RUN}from drpo.rewards import in_process
from drpo.train.config import configure

@in_process
def brief(problem, text):
    return float(len(text) < 9)

def recipe():
    return configure(smoke(), reward=brief, steps=1)
"""


@pytest.mark.slow
def test_a_run_that_needs_code_of_its_recipe_file_finds_it_again(capsys: pytest.CaptureFixture[str]):
    Path("recipe.py").write_text(OWN_REWARD)
    with without_pictures():
        assert cli.main(["train", "recipe.py", "--no-doctor", "--plain"]) == 0
    assert json.loads(Path("runs/smoke/config.json").read_text())["rewards"]["function"] == "recipe:brief"
    assert "--trust-remote-code" in refusal(capsys, "train", "--resume", "runs/smoke")
    assert cli.main(["train", "--resume", "runs/smoke", "--trust-remote-code", "--no-doctor"]) == 0


def test_code_of_a_recipe_file_is_recorded_by_the_name_that_imports_it():
    Path("recipe.py").write_text(OWN_REWARD)
    assert flat_json(find("recipe.py"))["reward"] == "recipe:brief"


def test_code_of_a_file_that_nothing_can_import_again_is_refused(capsys: pytest.CaptureFixture[str]):
    Path("json.py").write_text(OWN_REWARD)  # a library's name
    library = sys.modules["json"]
    assert "put the file into the working folder, under a name that no library has" in refusal(
        capsys, "train", "json.py"
    )
    assert sys.modules["json"] is library
    Path("json.py").write_text(f"{RUN}recipe = smoke()\n")
    assert find("json.py").name == "smoke"


def test_guessed_settings_are_specs_that_can_be_read_again():
    task = read_own(OwnData(ALL["letters"](Path(), rows=30).name, shots=2))
    run = neutral(task)
    assert REGISTRY.entries["records"] is type(run.data.task)
    assert task.reward_name == "exact_number" and (task.prompt, task.answer) == ("prompt", "label")
