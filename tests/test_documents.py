"""What the documents say is run: every Python block, every `drpo` and `make` command, every link to a file."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from drpo import cli
from drpo.cli.compare import planned
from drpo.cli.doctor import DoctorOptions
from drpo.cli.lab import LabOptions
from drpo.cli.options import overridden, parse
from drpo.cli.serve import ServeOptions
from drpo.cli.train import TrainOptions
from drpo.lab.outcome import RESULTS, save_results
from drpo.recipes import find
from hand_comparison import large

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


OF_FRAMEWORKS = ROOT / "docs" / "frameworks"  # their Python is run where the framework is: tests/adapters/pages.py


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        if language == "python" and path.parent == OF_FRAMEWORKS:
            continue
        for i, text in enumerate(re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.M | re.S)):
            found.append((f"{path.name}:{i}", text))
    return found


def commands(program: str) -> list[str]:
    lines = [line.strip() for _, text in blocks("bash") for line in text.replace("\\\n", " ").splitlines()]
    return sorted({line for line in lines if line.split(" ")[0] == program})


@pytest.mark.parametrize(("name", "code"), blocks("python"), ids=[name for name, _ in blocks("python")])
def test_python_blocks_run_and_print_what_they_say(name: str, code: str, capsys: pytest.CaptureFixture[str]):
    exec(compile(code, name, "exec"), {"__name__": "example"})
    promised = re.findall(r"print\(.*\)\s*#\s*(.+)$", code, flags=re.M)
    assert capsys.readouterr().out.split("\n")[: len(promised)] == promised


def test_the_documents_have_examples_of_both_kinds():
    assert len(blocks("python")) >= 2 and len(commands("drpo")) >= 5 and "make demo" in commands("make")


def test_an_objective_as_the_readme_writes_one_trains():
    (code,) = [text for _, text in blocks("python") if "class MyClip" in text]
    names: dict = {"__name__": "example"}
    exec(code, names)
    logp = torch.tensor([-1.0, -0.1], requires_grad=True)
    tokens = names["Tokens"](
        logp, torch.tensor([-1.0, -3.0]), torch.ones(2), torch.ones(2).bool(), torch.zeros(2).long()
    )
    names["MyClip"]()(tokens).loss.sum().backward()
    assert torch.allclose(logp.grad, torch.tensor([-1.0, -2.0]))


@pytest.mark.parametrize("line", commands("drpo"))
def test_drpo_commands(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Cheap ones run; those that train the demo's model for minutes are read as far as the finished configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problems.jsonl").write_text(
        "".join(f'{{"question": "{i} + 1?", "answer": "{i + 1}"}}\n' for i in range(600))
    )
    _, command, *rest = shlex.split(line)
    others = {"train": TrainOptions, "doctor": DoctorOptions}
    if command in others and rest[0] not in ("--resume", "smoke") and "--help" not in rest:
        run, _ = overridden(find(rest[0]), rest[1:], "drpo", others[command])
        assert run.task.sample(2, 0, 0) and run.task.held_out(2)
        return
    if command == "compare" and rest[0] != "--resume":
        assert len({run.name for run in planned(rest[0], rest[1:])[0]}) > 2
        return
    if command == "lab":
        assert parse(LabOptions, rest, "drpo lab").objectives
        return
    if command == "serve":
        assert parse(ServeOptions, rest[1:], "drpo").port
        return
    if "runs/dppo" in rest:
        assert cli.main(["train", "smoke", "--steps", "2", "--out", "runs/dppo"]) == 0
    if command == "eval" and "exported" in rest:
        assert cli.main(["export", "tiny", "exported"]) == 0
    if "runs/compare-demo" in rest:
        Path("runs/compare-demo").mkdir(parents=True)
        save_results(large(seeds=2, updates=1, steps=4), Path("runs/compare-demo", RESULTS))
    try:
        status = cli.main([command, *rest])
    except SystemExit as end:
        status = end.code
    assert not status, capsys.readouterr().err


@pytest.mark.parametrize("line", commands("make"))
def test_make_commands_exist(line: str):
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.M)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target
