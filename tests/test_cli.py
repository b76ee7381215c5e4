"""The command line: what it teaches, what it refuses in one line with status 2, and that it runs.

`cli.main` is called in this process; one test runs the installed command.
"""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from drpo import cli
from drpo.__main__ import main as program
from drpo.cli import COMMANDS
from drpo.cli.commands.compare import CompareOptions
from drpo.cli.commands.train import TrainOptions
from drpo.cli.compare import planned
from drpo.cli.overrides import helps, overridden
from drpo.errors import InputError
from drpo.objectives import DRPO, SPO
from drpo.recipes import RECIPES, find
from drpo.report.weights import draw_png
from drpo.spec import import_named
from drpo.train.config import REGISTRIES, Run, flat_json, from_json, to_json
from drpo.train.fields import FIELDS, sections
from drpo.train.optim import AdamW
from support.forks import fork


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = cli.main(arguments)
    except SystemExit as end:  # what --help does
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


BAD = [
    (("trian",), "did you mean 'train'"),
    (("train",), "known: demo"),
    (("train", "dmo"), "did you mean 'demo'"),
    (("train", "smoke", "--stepz", "3"), "did you mean '--steps'"),
    (
        ("train", "smoke", "--warmup", "5"),
        "unknown option '--warmup'; the learning rate's is --schedule 'linear(warmup=STEPS)'",
    ),
    (("train", "smoke", "--steps", "x"), "--steps 'x': must be a whole number"),
    (("train", "smoke", "--objective", "collections:OrderedDict"), "has no `tokenwise`"),
    (("train", "smoke", "--task", "collections:OrderedDict"), "has no `sample`"),
    (("train", "smoke", "--eval-task", "collections:OrderedDict"), "has no `sample`"),
    (("train", "smoke", "--reward", "collections:OrderedDict"), "must be a function of (problem, text)"),
    (("train", "smoke", "--reward", "operator:itemgetter(1)"), "make itemgetter a frozen dataclass"),
    (("train", "smoke", "--optimizer", "operator:itemgetter(1)"), "has no `learning_rate`"),
    (("train", "smoke", "--schedule", "math:sqrt"), "schedule=sqrt: must be a schedule with `warmup` and"),
    (("train", "smoke", "--advantage", "collections:OrderedDict"), "has no `__call__`"),
    (("train", "smoke", "--critic-optimizer", "adamw(1e-3)"), "there is no critic"),
    (("train", "smoke", "--critic", "gae", "--advantage", "zscore"), "advantage=zscore: with a critic"),
    (("train", "smoke", "--shard", "fsdp"), "--shard fsdp: this is one process"),
    (("compare", "smoke", "--shard", "fsdp"), "unknown option '--shard'"),
    (("train", "smoke", "--name", "../../x"), "name='../../x'"),
    (("train", "smoke", "--name", ".."), "name='..'"),
    (("train", "smoke", "--model", "smolm2-135m"), "model='smolm2-135m': no folder, and no hub id"),
    (("export", "smolm2-135m", "new"), "did you mean 'smollm2-135m'"),
    (("eval", "nowhere"), "model='nowhere'"),
    (("train", "smoke", "--learning-rate", "x"), "--learning-rate 'x': must be a number"),
    (("train", "smoke", "--steps", "x"), "--steps"),
    (("train", "smoke", "--steps"), "--steps"),
    (("train", "smoke", "--steps", "0"), "steps=0"),
    (("train", "smoke", "--optimizer", "adamw(1e-5, betas=1)"), "betas=1"),
    (("train", "smoke", "--objective", "drop(3)"), "did you mean 'drpo'"),
    (("train", "smoke", "--objective", "drpo(-1)"), "delta=-1"),
    (("train", "smoke", "--objective", "drpo(delta_=1)"), "delta_"),
    (("train", "smoke", "--objective", "__import__('os').system('true')"), "not of the form"),
    (("train", "smoke", "--objective", "nowhere_to_be_found:x"), "nowhere_to_be_found"),
    (("train", "smoke", "--advantage", "zscor"), "did you mean 'zscore'"),
    (("train", "smoke", "--reduction", "horizon(0)"), "horizon"),
    (("train", "smoke", "--reward", "exact_numbr"), "did you mean 'exact_number'"),
    (("train", "smoke", "--task", "adition(1)"), "did you mean 'addition'"),
    (("train", "smoke", "--task", "reasoning_gym('chain_sums')"), "chain_sum"),
    (("train", "smoke", "--task", "records('none.jsonl', prompt='q', answer='a')"), "none.jsonl"),
    (("train", "smoke", "--task", "records('there.jsonl', prompt='question', answer='anwser')"), "'answer'"),
    (("train", "smoke", "--task", "records('broken.jsonl', prompt='question', answer='answer')"), "broken.jsonl"),
    (("train", "smoke", "--sampling.top-p", "0.9"), "top_p=0.9"),
    (("train", "smoke", "--sampling.top-k", "20"), "top_k=20"),
    (("train", "smoke", "--sampling.samples", "1"), "samples=1"),
    (("train", "smoke", "--sampling.temperature", "0"), "temperature=0"),
    (("train", "smoke", "--schedule", "cosin"), "did you mean 'cosine'"),
    (("train", "smoke", "--engine", "http://[::1"), "engine='http://[::1'"),
    (("train", "smoke", "--engine", "http://"), "engine='http://'"),
    (("train", "smoke", "--engine", "http://h:1,http://h:99999"), "engine='http://h:99999'"),
    (("train", "smoke", "--engine", "http://h:port"), "engine='http://h:port'"),
    (("train", "smoke", "--lora-rank", "1000000000"), "at most 16,384"),
    (("train", "smoke", "--sampling.max-new-tokens", "1000000000"), "max_new_tokens=1000000000"),
    (("train", "smoke", "--reward-pool.processes", "100000000"), "processes=100000000"),
    (("train", "smoke", "--stall", "1e300"), "--stall 1e+300"),
    (("train", "smoke", "--stall", "nan"), "--stall nan"),
    (("train", "smoke", "--restarts", "-1"), "--restarts -1"),
    (("watch", ".", "--every", "1e300"), "--every 1e+300"),
    (("sft", "--resume", "my run"), "drpo sft DATA --out 'my run'"),
    (("verify",), "folder"),
    (("verify", "nowhere"), "nowhere: no such folder"),
    *(
        ((*command, f"made/{part}"), f"made/{part}: a part of a run; name the run's own folder, made")
        for command in (("train", "--resume"), ("sft", "--resume"), ("verify",), ("watch",), ("report",), ("replay",))
        for part in ("model", "checkpoints", "checkpoints/step-000002")
    ),
    (("verify", "compared"), "drpo verify compared/trials/NAME"),
    (("train", "smoke", "--track", "trackio", "wand"), "did you mean 'wandb'"),
    (("train", "smoke", "--model", "./nowhere"), "./nowhere"),
    (("train", "--resume", "nowhere"), "nowhere"),
    (("train", "--resume"), "folder"),
    (("train", "--from"), "folder"),
    (("train", "--from", "nowhere"), "nowhere"),
    (("train", "smoke", "--from", "nowhere"), "--from: comes first"),
    (("watch",), "folder"),
    (("watch", "nowhere"), "nowhere"),
    (("watch", "."), "no run there"),
    (("watch", ".", "--every", "0"), "--every 0"),
    (("watch", ".", "--evry", "2"), "did you mean '--every'"),
    (("eval",), "model"),
    (("eval", "tiny"), "--task"),
    (("eval", "tiny", "--task", "adition"), "did you mean 'addition'"),
    (("weights", "drop(1)"), "did you mean 'drpo'"),
    (("weights", "drpo(1)", "--mu", "2"), "--mu 2"),
    (("recipes", "x"), "'x'"),
    (("export", "tiny", "there.jsonl"), "there.jsonl"),
    (("replay",), "folder"),
    (("replay", "nowhere"), "nowhere"),
    (("replay", "begun", "--objectives", "drop(1)"), "did you mean 'drpo'"),
    (("replay", "nowhere", "--json", "no/where.json"), "--json no/where.json"),
    (("train", "smoke", "--out", "there.jsonl"), "--out there.jsonl"),
    (("train", "smoke", "--name", "x" * 300), "--out runs/xxx"),
    (("weights", "--out", "w.xyz"), "--out w.xyz"),
    (("weights", "--out", "no/where.png"), "--out no/where.png"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_that_names_it_and_status_2(capsys, elsewhere, arguments, named):
    (elsewhere / "there.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n' * 3)
    (elsewhere / "begun").mkdir()
    (elsewhere / "compared" / "trials").mkdir(parents=True)
    for part in ("model", "checkpoints/step-000002"):
        (elsewhere / "made" / part).mkdir(parents=True)
    (elsewhere / "made" / "config.json").write_text("{}")
    (elsewhere / "broken.jsonl").write_bytes(b'{"question": "1 + 1?", "answer": "2"}\n{"quest')
    status, out, err = said(capsys, *arguments)
    assert status == 2
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("drpo: ") and named in lines[0], err
    assert "Traceback" not in out + err


TYPED = r"\b(?:drpo (?!explain )[a-z-]+|command\})(?: [A-Z]+| my\.jsonl)*(?: --(?:resume|from|data|model|out))? \{(\w+)"
"""A command in a message, up to a name that it puts in."""


def test_what_a_message_says_to_type_can_be_typed():
    """Names with spaces are in quotes there, in every module and in what a command prints."""
    sources = sorted(Path(cli.__file__).parents[1].rglob("*.py"))
    bare = {(p.name, name) for p in sources for name in re.findall(TYPED, p.read_text()) if name != "as_typed"}
    assert bare == {("written.py", "file")}  # a template, whose `file` is quoted already
    assert re.findall(TYPED, 'f"go on with `drpo train --resume {folder}`"') == ["folder"]


def test_ctrl_c_before_a_command_begins_is_one_line(capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("drpo.__main__.import_named", interrupted)
    assert program() == 130 and capsys.readouterr().err == "drpo: interrupted\n"


def test_a_working_folder_that_was_deleted(capsys, elsewhere, monkeypatch):
    (elsewhere / "gone").mkdir()
    monkeypatch.chdir("gone")
    (elsewhere / "gone").rmdir()
    assert said(capsys, "recipes")[0] == 0
    assert "cannot be written" in said(capsys, "export", "tiny", "new")[2]
    with pytest.raises(InputError, match="nowhere_at_all"):
        import_named("nowhere_at_all", "x", "reward")


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_overview_names_every_command(capsys, arguments):
    status, out, _ = said(capsys, *arguments)
    assert status == 0 and all(f"  drpo {name}" in out for name in COMMANDS)


@pytest.mark.parametrize(
    "command",
    [(name,) for name in COMMANDS]
    + [("train", "smoke"), ("train", "--resume"), ("train", "--from"), ("compare", "--resume")],
    ids=" ".join,
)
def test_help_names_its_command_and_gives_an_example(capsys, command):
    status, out, _ = said(capsys, *command, "--help")
    name = f"drpo {' '.join(command)}"
    assert status == 0 and out.startswith(f"usage: {name}")
    examples = [line for line in out.splitlines() if line.lstrip().startswith(f"drpo {command[0]}")]
    assert len(examples) == 1 or name == "drpo recipes", out
    assert "(default: )" not in " ".join(out.replace("│", " ").split())


def test_how_many_trainings_there_are_is_said_in_the_help_and_before_they_begin(capsys, monkeypatch):
    _, out, _ = said(capsys, "compare", "--help")
    assert f"{len(planned(find('demo'), CompareOptions()))} trainings" in out

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("drpo.cli.compare.train_trials", stop)
    status, out, _ = said(
        capsys, "compare", "smoke", "--objectives", "none", "drpo(0.2)", "--seeds", "0", "--steps", "7"
    )
    assert status == 130 and "2 of 2 trainings to do, of tiny, 14 steps in all, in runs/compare-smoke" in out


def test_a_switch_that_turns_off_is_suggested_as_one(capsys):
    assert "did you mean '--no-doctor'" in said(capsys, "train", "smoke", "--no-doctr")[2]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *((("eval",), name) for name in ("runs/nope", "./nope", "../nope", "/nope", "~/nope", "a/b/c", "nope/")),
        (("export",), "runs/nope"),
        (("train", "smoke", "--model"), "./nope"),
    ],
)
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(capsys, monkeypatch, command, name):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("asked the hub"))
    after = ("new",) if command == ("export",) else ()
    status, _, err = said(capsys, *command, name, *after)
    assert status == 2 and f"model={name!r}: no such folder" in err and len(err.splitlines()) == 1


def test_what_the_hub_says_of_its_attempts_is_not_shown():
    program = "import sys; sys.argv = ['drpo', '--version']; from drpo import cli; cli.main()\n"
    program += "from huggingface_hub import hf_hub_download; import logging\n"
    program += "print(logging.getLogger('huggingface_hub').getEffectiveLevel())"
    unset = {name: value for name, value in os.environ.items() if name != "HF_HUB_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=unset)
    assert int(done.stdout.split()[-1]) >= logging.ERROR


def test_help_of_a_recipe_explains_every_field_and_shows_its_default(capsys):
    status, out, _ = said(capsys, "train", "demo", "--help")
    assert status == 0
    flat = " ".join(out.replace("│", " ").split())
    assert all(f"--{name.replace('_', '-')}" in flat for name in FIELDS)
    for name in set(REGISTRIES) - {"eval_task", "critic", "critic_optimizer"}:
        about = re.split(rf"--{name.replace('_', '-')} \S*[A-Z_]+\(\.\.\.\)", flat)[1].partition("(default:")[0]
        assert all(re.search(rf"\b{entry}\b", about) for entry in REGISTRIES[name].entries), name
    assert "'drpo(0.2)'" in flat and flat.index("most-used") < flat.index("--learning-rate") < flat.index("--lora-rank")


def test_every_field_of_a_run_is_an_option_in_one_section_of_the_help():
    assert sorted(leaves(to_json(Run()))) == sorted(set(FIELDS.values()) - {FIELDS["learning_rate"]})
    assert sorted(FIELDS) == sorted(name for names in sections().values() for name in names)
    assert len(sections()["most_used"]) == 12


def leaves(record: dict[str, Any], at: str = "") -> Iterator[str]:
    for name, value in record.items():
        yield from leaves(value, f"{at}{name}.") if isinstance(value, dict) else [f"{at}{name}"]


def test_every_group_says_what_its_fields_are_and_has_a_dozen_at_most():
    for group in (f.type for f in fields(Run) if is_dataclass(f.type)):
        assert list(helps(group)) == [f.name for f in fields(group)] and len(fields(group)) <= 12


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_is_built_recorded_and_listed(capsys, name):
    run = find(name)
    assert from_json(json.loads(json.dumps(to_json(run)))) == run
    _, out, _ = said(capsys, "recipes")
    function = getattr(import_module(RECIPES[name].module), name)
    width = max(map(len, RECIPES))
    assert f"{name:<{width}}  {function.__doc__.splitlines()[0]}\n" in out


def test_overrides_reach_the_run():
    options = ["--objective", "dppo(0.15)", "--seed", "3", "--sampling.samples", "6"]
    options += ["--optimizer", "adamw(1e-5, betas=(0.8, 0.9))"]
    run, _ = overridden(
        find("smoke"),
        [*options, "--task", "addition(2, 7)", "--out", "here", "--learning-rate", "2e-5"],
        "drpo",
        TrainOptions,
    )
    record = flat_json(run)
    assert (record["objective"], record["seed"], record["task"]) == ("dppo(0.15, 0.15)", 3, "addition(2, 7)")
    assert run.rollout.sampling.samples == 6 and run.optimizer.policy == AdamW(2e-5, (0.8, 0.9))
    changed = ("objective", "seed", "task", "sampling.samples", "optimizer")
    assert flat_json(find("smoke")) | {name: record[name] for name in changed} == record


def test_train_then_resume_then_eval(capsys, elsewhere, request):
    assert said(capsys, "train", "smoke", "--steps", "2")[0] == 0
    folder = elsewhere / "runs" / "smoke"
    left = {p.name for p in folder.iterdir()}
    assert left >= {"summary.json", "report.html", "model", "config.json", "metrics.jsonl"}
    request.getfixturevalue("without_pictures")
    assert said(capsys, "train", "smoke", "--steps", "1", "--eval-problems", "0", "--no-doctor")[0] == 0
    assert (elsewhere / "runs" / "smoke-2").exists()  # a taken name is not written over
    status, _, err = said(capsys, "train", "smoke", "--out", str(folder))
    assert status == 2 and "--resume" in err
    assert said(capsys, "train", "--resume", str(folder), "--no-doctor")[0] == 0
    status, out, _ = said(capsys, "eval", str(folder), "--problems", "4", "--json", "--sampling.top-k", "5")
    assert status == 0 and json.loads(out)["n_problems"] == 4 and json.loads(out)["step"] == 2
    status, _, err = said(capsys, "eval", str(folder), "--problems", "-5")
    assert status == 2 and "--problems -5: must be from 1" in err
    options = ("--task", "addition(1, 9)", "--problems", "4", "--sampling.samples", "2")
    status, out, _ = said(capsys, "eval", "tiny", *options)
    assert status == 0 and "pass@2" in out and "95 % interval" in out


@pytest.mark.parametrize(
    "arguments", [("train", "smoke", "--model", "./nowhere", "--out", "new"), ("export", "./nowhere", "new")]
)
def test_a_folder_of_which_nothing_has_come_is_removed(capsys, elsewhere, arguments):
    status, _, err = said(capsys, *arguments)
    assert status == 2 and "./nowhere" in err and not list(elsewhere.iterdir())


OF_A_RUN = (
    "watch run --once",
    *(f"{c} run" for c in ("report", "verify", "replay", "train --resume")),
)


@pytest.mark.parametrize("command", OF_A_RUN)
@pytest.mark.parametrize(("old", "version"), [("lag", "e0b217a"), ("marking", "6ad2188")])
def test_a_run_of_an_earlier_version_is_refused(capsys, elsewhere, command: str, old: str, version: str):
    (elsewhere / "run").mkdir()
    (elsewhere / "run" / "config.json").write_text(json.dumps(to_json(find("smoke")) | {old: 0, "lag": 0}))
    (elsewhere / "run" / "rollouts.jsonl").write_text('{"step": 1, "finish": "stop"}\n')
    status, out, err = said(capsys, *command.split())
    assert status == 2 and not out and err.count("\n") == 1, err
    assert "run/config.json: of an earlier version" in err and f"commit {version} of the repository reads it" in err


@pytest.mark.usefixtures("without_pictures")
def test_a_mean_of_scores_that_leave_0_to_1_is_no_share(capsys, elsewhere):
    (elsewhere / "negative.py").write_text(
        "from drpo.rewards import in_process\n@in_process\ndef reward(problem, text):\n    return -0.8125\n"
    )
    task = ("--eval-problems", "4", "--steps", "1", "--no-doctor")
    status, out, _ = said(capsys, "train", "smoke", *task, "--reward", "negative:reward")
    held_out = [line for line in out.splitlines() if "mean reward" in line]
    assert status == 0 and len(held_out) == 4 and all("-0.8125" in line for line in held_out)  # two lines, two rows
    assert "nan" not in out and not any("%" in line or "interval" in line for line in held_out)
    options = ("--task", "addition(1, 9)", "--problems", "4", "--reward", "negative:reward")
    status, out, _ = said(capsys, "eval", "tiny", *options)
    assert status == 0 and "-0.8125" in out and "nan" not in out and "interval" not in out and "pass@" not in out
    _, out, _ = said(capsys, "eval", "tiny", *options, "--json")
    assert json.loads(out)["low"] is None and "NaN" not in out


def test_no_option_names_a_file_in_the_current_folder_by_itself():
    """But for `drpo init`, whose purpose is to write one; the folders of runs are below runs/."""
    named = {
        (command.module.rpartition(".")[2], option.name): option.default
        for command in COMMANDS.values()
        for options in vars(import_module(command.module)).values()
        if isinstance(options, type) and is_dataclass(options)
        for option in fields(options)
        if isinstance(option.default, Path)
    }
    assert named == {("init", "out"): Path("recipe.py")}


def test_weights_draws_on_the_screen_alone_unless_it_is_told_a_file(capsys, elsewhere):
    status, out, _ = said(capsys, "weights", "drpo(0.2)", "--mu", "0.3")
    assert status == 0 and "drpo(0.2)" in out and "drawn to" not in out and not any(elsewhere.iterdir())
    status, out, _ = said(capsys, "weights", "drpo(0.2)", "ppo(0.2, 0.28)", "--mu", "0.3", "--out", "w.png")
    assert status == 0 and "drpo(0.2)" in out and (elsewhere / "w.png").read_bytes().startswith(b"\x89PNG")
    (edge,) = [line for line in out.splitlines() if "drawn at the edge" in line]
    assert edge == "beyond -2 to 3, drawn at the edge: w of drpo(0.2) from -2.5 to 2.5"
    _, out, _ = said(capsys, "weights", "drpo(0.2)", "ppo(0.2, 0.28)", "--mu", "0.7", "--out", "w.png")
    assert "drawn at the edge: w of drpo(0.2) from -0.5 to 4.5" in out
    _, out, _ = said(capsys, "weights", "drpo(0.5)", "--mu", "0.5", "--out", "w.png")
    assert "drawn at the edge" not in out


def test_the_figure_says_which_weights_it_cuts_off(tmp_path: Path):
    objectives = [DRPO(0.5), SPO(0.2)]
    draw_png(objectives, [0.5], tmp_path / "w.svg")
    assert "cut off: w of spo(0.2) from -4 to 6" in (tmp_path / "w.svg").read_text()
    draw_png(objectives[:1], [0.5], tmp_path / "w.svg")
    assert "cut off" not in (tmp_path / "w.svg").read_text()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """The command with one's own objective and reward, and Ctrl-C after a step: the folder, status, what it said."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "mine.py").write_text(
        "from drpo.objectives import TokenLoss\n"
        "class Loss:\n"
        "    tokenwise, needs = True, frozenset()\n"
        "    def __call__(self, tokens):\n"
        "        return TokenLoss(-tokens.advantage * tokens.logp)\n"
        "loss = Loss()\n"
        "def reward(problem, text):\n"
        "    return float(len(text) % 2)\n"
    )
    command = ("train", "smoke", "--steps", "100000", "--out", "long", "--no-doctor")
    own = ("--objective", "mine:loss", "--reward", "mine:reward", "--eval-problems", "0")
    command_in_fork = fork(folder / "out", cli.main, (*command, *own), folder=folder)
    end = time.monotonic() + 120
    while command_in_fork.process.is_alive() and time.monotonic() < end:
        if (folder / "long" / "metrics.jsonl").exists():
            os.kill(command_in_fork.process.pid or 0, signal.SIGINT)
            break
        time.sleep(0.05)
    status, out = command_in_fork.end()
    return folder / "long", status, out


def test_ones_own_objective_and_reward_by_name(interrupted):
    folder, _, out = interrupted
    assert (folder / "metrics.jsonl").exists(), out
    record = json.loads((folder / "config.json").read_text())
    assert (record["objective"]["loss"], record["rewards"]["function"]) == ("mine:loss", "mine:reward")


def test_ctrl_c_ends_with_a_checkpoint_and_status_130(interrupted):
    folder, status, out = interrupted
    assert status == 130, out
    assert "drpo train --resume long" in out and "Traceback" not in out
    assert list((folder / "checkpoints").glob("step-*"))
