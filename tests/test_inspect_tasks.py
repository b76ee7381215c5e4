"""Tasks of inspect: with the tiny model where inspect-ai is installed; a stand-in for it, and refusals, everywhere."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from drpo import cli
from support.hostile import refused, said

TASK = """\
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import exact, includes
from inspect_ai.solver import generate


@task
def letters():
    questions = ["one", "two", "three", "four", "five", "six"]
    dataset = [Sample(input=q, target="") for q in questions]
    return Task(dataset=dataset, solver=generate(), scorer=[includes(), exact()])


@task
def greedy():
    config = GenerateConfig(max_tokens=3)
    return Task(dataset=[Sample(input="one", target="")], solver=generate(), scorer=includes(), config=config)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("inspect_ai") is None, reason="inspect-ai is not installed: pip install 'drpo[inspect]'"
)
def test_tasks_of_inspect_run_on_a_model_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("my_task.py").write_text(TASK)
    few = ["--problems", "4", "--sampling.max-new-tokens", "8", "--sampling.temperature", "0", "--precision", "fp32"]
    assert cli.main(["eval", "tiny", "--inspect", "my_task.py@letters", *few, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"].values()
    assert result["scores"]["includes"]["accuracy"] == 1.0  # every text includes the empty one
    assert 0 <= result["scores"]["exact"]["mean"] <= 1 and (result["samples"], result["of"]) == (4, 6)
    assert {path.name for path in tmp_path.iterdir()} <= {"my_task.py", "__pycache__"}
    assert cli.main(["eval", "tiny", "--inspect", "my_task.py", *few, "--inspect-logs", "kept"]) == 0
    out = capsys.readouterr().out
    assert "greedy" in out and "letters" in out and len(list(Path("kept").iterdir())) == 2
    assert cli.main(["eval", "tiny", "--inspect", "none.py", *few]) == 2
    assert "--inspect none.py: inspect" in capsys.readouterr().err


class Config(SimpleNamespace):
    """What inspect's GenerateConfig was made with."""


def stand_in(asked: dict[str, Any], status: str = "success") -> ModuleType:
    """A module in inspect's place, which records how it is called, and returns a log."""
    inspect, model = ModuleType("inspect_ai"), ModuleType("inspect_ai.model")

    def evaluate(tasks: list[str], **settings: Any) -> list[Any]:
        asked.update(settings, tasks=tasks, logs_exist=Path(settings["log_dir"]).parent.is_dir())
        metrics = {"accuracy": SimpleNamespace(value=0.25), "stderr": SimpleNamespace(value=0.125)}
        results = SimpleNamespace(scores=[SimpleNamespace(name="match", metrics=metrics)], completed_samples=4)
        about = SimpleNamespace(task=tasks[0], dataset=SimpleNamespace(samples=9))
        return [SimpleNamespace(status=status, error=SimpleNamespace(message="no\nluck"), eval=about, results=results)]

    inspect.eval, inspect.model = evaluate, model
    model.GenerateConfig = Config
    model.get_model = lambda name, **settings: asked.update(model=name, **settings) or "the model"
    return inspect


def test_the_options_reach_inspect(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}
    library = stand_in(asked)
    monkeypatch.setitem(sys.modules, "inspect_ai", library)
    monkeypatch.setitem(sys.modules, "inspect_ai.model", library.model)
    few = [
        "--problems",
        "4",
        "--sampling.max-new-tokens",
        "8",
        "--sampling.samples",
        "2",
        "--seed",
        "3",
        "--device",
        "cpu",
    ]
    status, out, err = said(["eval", "tiny", "--inspect", "a_task", *few, "--json"])
    assert status == 0, err
    assert json.loads(out) == {
        "results": {"a_task": {"scores": {"match": {"accuracy": 0.25, "stderr": 0.125}}, "samples": 4, "of": 9}}
    }
    assert asked["config"] == Config(max_tokens=8, temperature=1.0, top_p=1.0, top_k=0, seed=3)
    assert (asked["tasks"], asked["limit"], asked["epochs"], asked["model"]) == (["a_task"], 4, 2, "the model")
    assert asked["do_sample"] and asked["device"] == "cpu" and asked["logs_exist"]
    assert not Path(asked["model_path"]).exists() and not Path(asked["log_dir"]).exists()  # both were scratch
    status, out, _ = said(["eval", "tiny", "--inspect", "a_task", "--sampling.temperature", "0"])
    assert status == 0 and "0.2500" in out and "4 samples, of a data set of 9" in out
    assert not asked["do_sample"] and asked["config"] == Config(max_tokens=256, seed=0)


def test_a_task_that_failed_is_one_line(monkeypatch: pytest.MonkeyPatch):
    library = stand_in({}, status="error")
    monkeypatch.setitem(sys.modules, "inspect_ai", library)
    monkeypatch.setitem(sys.modules, "inspect_ai.model", library.model)
    assert "--inspect a_task: inspect failed: no luck" in refused(["eval", "tiny", "--inspect", "a_task"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--inspect", "t", "--task", "gsm8k"], "--task: tasks of inspect have this themselves"),
        (["--inspect", "t", "--lm-eval-chat"], "--lm-eval-chat: tasks of inspect"),
        (["--inspect", "t", "--precision", "int8"], "--precision int8: inspect computes in auto"),
        (["--inspect-logs", "x"], "--inspect is missing"),
        (["--inspect", "t"], "inspect_ai is not installed; run pip install 'drpo[inspect]'"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: list[str], told: str, monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)  # no such module
    assert told in refused(["eval", "tiny", *arguments])
