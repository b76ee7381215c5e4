"""What the documents say is run or read: every block of code, every command, every link and its anchor."""

import ast
import io
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import tyro
import yaml
from packaging.requirements import Requirement

from drpo import cli, objectives
from drpo.cli.commands.compare import NOT_OPTIONS, CompareOptions
from drpo.cli.commands.doctor import DoctorOptions
from drpo.cli.commands.export import ExportOptions, require_consistent
from drpo.cli.commands.serve import ServeOptions
from drpo.cli.commands.serve_rollouts import ServeRolloutsOptions
from drpo.cli.commands.sft import SFTOptions, SFTResumeOptions
from drpo.cli.commands.train import TrainOptions
from drpo.cli.compare import planned
from drpo.cli.eval_options import read_options
from drpo.cli.options import parse
from drpo.cli.overrides import overridden
from drpo.cli.own_data import own_run
from drpo.cli.sft import configured
from drpo.environments.tools import ToolEpisode
from drpo.errors import InputError
from drpo.lab.claims import parse_plan
from drpo.lab.trial_result import save_results
from drpo.recipes import find
from drpo.recipes.addition import demo
from drpo.spec import parse_spec
from drpo.train.config import flat_json
from drpo.train.records import RESULTS
from drpo.types import Problem
from drpo.types.environment import Turn
from stability import StabilityOptions
from support import dumps
from support.hand_comparison import large
from support.pictures import without_pictures
from theory import TheoryOptions

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("cluster/*/README.md")])
OF_FRAMEWORKS = ROOT / "docs" / "frameworks"  # their Python is run where the framework is: tests/adapters/pages.py
OWN = {
    "mine": ("guides/own_objective", 0),
    "my_envs": ("bringing_environments", 0),
    "my_rewards": ("guides/own_reward", 0),
    "my_tasks": ("guides/own_task", 0),
    "my_tools": ("agents", 0),
    "my_games": ("agents", 1),
}
"""Modules of one's own that commands name -> the page, and the number of its block of Python that is in them."""

LANGUAGES = {
    "python": "run",
    "bash": "each line is run or read, by its program",
    "yaml": "read",
    "toml": "read",
    "text": "compared with what it is the output of",
    "diff": "what the added lines name of drpo is looked up; the rest is another project's file",
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)


class Block(NamedTuple):
    """A block of code of a page."""

    name: str
    language: str
    text: str


def all_blocks() -> list[Block]:
    found = []
    for path in DOCUMENTS:
        where = path.relative_to(ROOT).as_posix()
        found += [
            Block(f"{where}:{i}", language, text) for i, (language, text) in enumerate(FENCE.findall(path.read_text()))
        ]
    return found


BLOCKS = all_blocks()
PYTHON = [b for b in BLOCKS if b.language == "python" and (ROOT / b.name).parent != OF_FRAMEWORKS]


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", path.read_text())


class Command(NamedTuple):
    """A line of a shell, without the variables set in front."""

    program: str
    rest: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join([self.program, *self.rest])


PROGRAMS = ("drpo", "make", "pip", "uv", "torchrun", "accelerate", "python")


def lines_of_shells() -> list[str]:
    """All lines of bash, and those set in by four blanks that begin with a program."""
    fenced = "\n".join(b.text for b in BLOCKS if b.language == "bash")
    set_in = [text for path in DOCUMENTS for text in re.findall(r"^    (.*)$", prose(path), flags=re.M)]
    lines = fenced.replace("\\\n", " ").splitlines() + [s for s in set_in if s.split(" ")[0] in PROGRAMS]
    return sorted({line.strip() for line in lines if line.strip()})


def command(line: str) -> Command:
    """A line as a command; a shell's own comment and the sign for the background are dropped."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0], flags=re.S):
        words.pop(0)
    return Command(words[0], tuple(words[1:-1] if words[-1] == "&" else words[1:]))


COMMANDS = sorted({command(line) for line in lines_of_shells()})
LAUNCHERS = ("torchrun", "accelerate")


def drpo_arguments() -> list[str]:
    """What drpo is given, by itself or by a launcher of several processes."""
    found = {shlex.join(c.rest) for c in COMMANDS if c.program == "drpo"}
    for c in COMMANDS:
        if c.program in LAUNCHERS:
            at = c.rest.index("-m")
            assert c.rest[at + 1] == "drpo", c
            found.add(shlex.join(c.rest[at + 2 :]))
    return sorted(found)


def of(*programs: str) -> list[Command]:
    return [c for c in COMMANDS if c.program in programs]


def test_every_block_has_a_language_that_is_run_or_read():
    assert {b.language for b in BLOCKS} <= LANGUAGES.keys(), [b.name for b in BLOCKS if b.language not in LANGUAGES]
    unknown = [c for c in COMMANDS if c.program not in PROGRAMS and not c.program.startswith("cluster/")]
    assert not unknown


@pytest.fixture(autouse=True)
def _modules_of_their_own() -> Iterator[None]:
    """A module of one's own, such as `mine`, is that of a test's folder, and gone after it."""
    yield
    for module in OWN:
        sys.modules.pop(module, None)


@pytest.mark.parametrize("block", PYTHON, ids=[b.name for b in PYTHON])
def test_python_blocks_run_and_print_what_they_say(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in (m for m in OWN if f"from {m} import" in block.text):
        write_own_module(module, tmp_path)
    exec(compile(block.text, block.name, "exec"), {"__name__": "example"})
    promised = re.findall(r"print\(.*\)\s*#\s*(.+)$", block.text, flags=re.M)
    assert capsys.readouterr().out.split("\n")[: len(promised)] == promised


def test_the_documents_have_examples_of_both_kinds():
    assert len(PYTHON) >= 2 and len(drpo_arguments()) >= 5 and Command("make", ("demo",)) in COMMANDS


def test_an_objective_as_the_readme_writes_one_trains():
    (code,) = [b.text for b in PYTHON if "class MyClip" in b.text]
    names: dict = {"__name__": "example"}
    exec(code, names)
    logp = torch.tensor([-1.0, -0.1], requires_grad=True)
    tokens = names["Tokens"](
        logp, torch.tensor([-1.0, -3.0]), torch.ones(2), torch.ones(2).bool(), torch.zeros(2).long()
    )
    names["MyClip"]()(tokens).loss.sum().backward()
    assert torch.allclose(logp.grad, torch.tensor([-1.0, -2.0]))


def test_the_tool_of_the_page_can_be_called():
    names: dict = {}
    exec(next(b.text for b in PYTHON if b.name.startswith("docs/agents.md:")), names)
    episode = ToolEpisode(Problem.of_text("0", "?", ""), {"price": names["price"]})
    assert episode.reset().tools[0]["function"]["parameters"]["required"] == ["item"]
    (reply,) = episode.step(
        Turn('<tool_call>{"name": "price", "arguments": {"item": "bread"}}</tool_call>', (), "stop")
    ).messages
    assert reply == {"role": "tool", "name": "price", "content": "4"}


def own_module(arguments: Sequence[str]) -> str | None:
    """The module of one's own that a command names, or that the run was made with which it names."""
    named = [c for c in of("drpo") if set(c.rest) & {w for w in arguments if w.startswith("runs/")}]
    words = [*arguments, *(word for c in named for word in c.rest)]
    return next((module for module in OWN for word in words if re.search(rf"\b{module}:", word)), None)


def write_own_module(module: str, folder: Path) -> None:
    """Write a module of one's own as its page has it."""
    page, number = OWN[module]
    blocks = [b.text for b in PYTHON if b.name.startswith(f"docs/{page}.md:")]
    (folder / f"{module}.py").write_text(blocks[number])


LIBRARIES = {"textarena(": "textarena", "gem(": "gem", "skyrl_gym(": "skyrl_gym"}
"""Tasks of optional libraries -> the library."""


LITTLE = ("--steps", "2", "--eval-problems", "4", "--reward-pool.processes", "1", "--no-doctor")
OF_A_RUN = re.compile(r"\bruns/[\w-]+")


def chains() -> dict[str, list[str]]:
    """Commands that follow each other in one folder: those of the same run, its maker first.

    Of commands on runs that differ in the run's name alone there is one; every other command is by itself.
    """
    found: dict[str, list[str]] = {}
    shapes = set()
    for line in sorted(drpo_arguments(), key=lambda line: (not line.startswith("train smoke"), line)):
        runs = OF_A_RUN.findall(line)
        shape = OF_A_RUN.sub("runs/...", line), own_module(shlex.split(line))
        if line.startswith("train --resume") and shape in shapes:
            continue
        shapes.add(shape)
        found.setdefault(runs[0] if runs and not line.startswith("compare") else line, []).append(line)
    return found


CHAINS = chains()


DUMPS: Mapping[str, Callable[[Path], Path]] = {
    "dump": lambda folder: dumps.own_jsonl(folder, dumps.failing("rising_out_of_region")),
    "rollouts": lambda folder: dumps.verl(folder, dumps.sound()),
    "validation": lambda folder: dumps.verl(folder, dumps.held_out(5, 0.5)),
    "output/completions": lambda folder: dumps.trl(folder, dumps.sound()),
    "run/rollouts": lambda folder: dumps.prime_traces(folder.parent, dumps.sound()),
    "run/token_exports": lambda folder: dumps.prime_export(folder.parent, dumps.sound()),
    "exports/dumped_data": lambda folder: dumps.skyrl(folder.parent, dumps.sound()),
    "exports/dumped_evals": lambda folder: dumps.skyrl_evaluation(folder.parent, dumps.held_out(5, 0.5)),
    "traces": lambda folder: dumps.open_instruct(folder, dumps.sound()),
}
"""Folder of an autopsy -> what writes it."""


def write_dumps(arguments: Sequence[str]) -> None:
    """Write the dumps that an autopsy names."""
    for word in arguments:
        if word in DUMPS and not Path(word).exists():
            DUMPS[word](Path(word))


def make_what_it_reads(arguments: Sequence[str]) -> None:
    """Put files and folders that a command names where it will look for them."""
    rows = [f'{{"question": "{i} + 1?", "answer": "{i + 1}"}}\n' for i in range(600)]
    Path("problems.jsonl").write_text("".join(rows))
    Path("recipe.py").write_text("from drpo.recipes.addition import demo as recipe\n")
    Path("chatml.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    module = own_module(arguments)
    if module is not None:
        write_own_module(module, Path())
    if arguments[0] == "autopsy":
        write_dumps(arguments)
    if "runs/compare-demo" in arguments:
        Path("runs/compare-demo").mkdir(parents=True)
        save_results(large(seeds=2, updates=1, steps=4), Path("runs/compare-demo", RESULTS))
    if arguments[0] == "eval" and "exported" in arguments:
        assert cli.main(["export", "tiny", "exported"]) == 0
    makes = arguments[0] in ("train", "compare") and "--resume" not in arguments
    reads = arguments[2].partition("/checkpoints")[:1] if arguments[1:2] == ["--from"] else () if makes else arguments
    for folder in (word for word in reads if word.startswith("runs/") and not Path(word).exists()):
        with without_pictures():
            assert cli.main(["train", "smoke", *LITTLE, "--out", folder]) == 0


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_drpo_commands(
    chain: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Cheap ones run; those that train the demo's model for minutes are read as far as the finished configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for line in chain:
        asked, *rest = shlex.split(line)
        make_what_it_reads([asked, *rest])
        with monkeypatch.context() as patch:
            read_or_run(line, asked, rest, patch, capsys)


def is_parsed_alone(asked: str, rest: Sequence[str]) -> bool:
    """Parse the options of a command that would serve, or that other tests run; whether it is one."""
    if asked == "serve":  # tests/test_serve.py asks a server
        return parse(ServeOptions, rest[1:], "drpo").port > 0
    if asked == "serve-rollouts":
        return parse(ServeRolloutsOptions, rest[1 : rest.index("--") if "--" in rest else None], "drpo").port > 0
    if asked == "eval" and {"--lm-eval", "--inspect"} & set(rest):  # evaluated where the harness is installed
        options = read_options("tiny", rest[1:])[1]
        return bool(options.lm_eval or options.inspect)
    if asked == "export" and {"--adapter", "--gguf", "--push"} & set(rest):  # tests/test_export.py does
        require_consistent(rest[0], rest[1], parse(ExportOptions, rest[2:], "drpo"))
        return True
    return False


def read_or_run(
    line: str, asked: str, rest: list[str], patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command as `test_drpo_commands` treats it."""
    others = {"train": TrainOptions, "doctor": DoctorOptions}
    if any(word.startswith(task) and find_spec(LIBRARIES[task]) is None for task in LIBRARIES for word in rest):
        with pytest.raises(InputError, match="run pip install"):
            overridden(find(rest[0]), rest[1:], "drpo", others[asked])
        return
    if asked == "init":
        Path("recipe.py").unlink()
        patch.setattr("drpo.cli.init.fitted", lambda run, given: run)  # which samples a hundred answers
        assert cli.main([asked, *rest, "--model", "tiny", "--no-doctor"]) == 0
        return
    if asked == "train" and rest[0] == "--data":
        patch.setattr("drpo.cli.own_data.measured_changes", lambda run, given: {})  # which loads the demo's model
        run, _ = own_run(rest, "drpo")
        assert run.data.task.sample(2, 0, 0) and run.data.task.held_out(2)
        return
    trains = asked == "train" and rest[0] == "smoke"
    if asked in others and rest[0] not in ("--resume", "--from") and "--help" not in rest and not trains:
        run, _ = overridden(find(rest[0]), rest[1:], "drpo", others[asked])
        assert run.data.task.sample(2, 0, 0) and run.data.task.held_out(2)
        return
    if asked == "compare" and rest[0] != "--resume":
        base, options = overridden(find(rest[0]), rest[1:], "drpo", CompareOptions, without=NOT_OPTIONS)
        assert len({run.name for run in planned(base, options)}) > 2
        return
    if asked == "sft":  # tests/test_sft.py trains and resumes
        resumes = rest[0] == "--resume"
        options = parse(SFTResumeOptions if resumes else SFTOptions, rest[1 + resumes :], "drpo")
        assert resumes or configured(rest[0], options, {}).data.path == rest[0]
        return
    if is_parsed_alone(asked, rest):
        return
    if asked == "chat":
        patch.setattr(sys, "stdin", io.StringIO("3 + 4?\n"))
    if asked == "train" and rest[0] in ("--resume", "--from"):
        patch.setattr("drpo.cli.train._sound", lambda *given: True)
    words = [asked, "smoke", *LITTLE, *rest[1:]] if trains else [asked, *rest]
    with nullcontext() if trains and "mine:" in line else without_pictures():  # one's own objective is drawn as well
        try:
            status = cli.main(words)
        except SystemExit as end:
            status = end.code
    assert not status, (line, capsys.readouterr().err)


@pytest.mark.parametrize("asked", of("make"), ids=str)
def test_make_commands_exist(asked: Command):
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in asked.rest)


EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


OPTIONS = {"studies/theory.py": TheoryOptions, "studies/stability.py": StabilityOptions}


def install_fault(words: Sequence[str]) -> str | None:
    """What is wrong with what pip is to install, or None."""
    for word in (w for w in words if not w.startswith("--")):
        path, _, extras = word.partition("[")
        if path.startswith(("/path/to/drpo", ".", "dist/")):
            unknown = {name.strip() for name in extras.rstrip("]").split(",") if name} - EXTRAS.keys()
            if unknown:
                return f"{word}: drpo has no extra {unknown}"
        elif Requirement(word).name == "drpo":
            return f"{word}: drpo is on no index"
    return None


def test_what_is_installed_can_be():
    spoken = re.findall(r"`((?:uv )?pip install [^`]+)`", "\n".join(path.read_text() for path in DOCUMENTS))
    asked = [*of("pip", "uv"), *map(command, spoken)]
    assert len(asked) > 10
    for c in asked:
        words = c.rest if c.program == "pip" else c.rest[1:]
        assert words[0] == "install" and install_fault(words[1:]) is None, install_fault(words[1:])
    assert install_fault(["drpo[wandb]"]) and install_fault(["/path/to/drpo[warndb]"])


@pytest.mark.parametrize("asked", of("python"), ids=str)
def test_python_commands_name_what_there_is(asked: Command):
    first, *rest = asked.rest
    assert find_spec(rest[0]) is not None if first == "-m" else (ROOT / first).is_file()
    if first in OPTIONS:
        tyro.cli(OPTIONS[first], args=rest)


@pytest.mark.parametrize("asked", [c for c in COMMANDS if c.program.startswith("cluster/")], ids=str)
def test_recipes_of_clusters_exist(asked: Command):
    script, (setting, method) = ROOT / asked.program, asked.rest[:2]
    assert script.is_file()
    if script.parent.name == "trl":
        assert (script.parent / f"{setting}.yaml").is_file() and f"    {method}) objective=" in script.read_text()
    else:
        config = script.parent / "config"
        assert (config / f"{setting}.yaml").is_file() and (config / "objective" / f"{method}.yaml").is_file()


def test_configurations_can_be_read_and_name_objectives_that_there_are():
    found = {b.name: tomllib.loads(b.text) for b in BLOCKS if b.language == "toml"}
    (claims,) = [b.text for b in BLOCKS if b.name == "docs/statistics.md:0"]
    assert parse_plan(claims).seeds == (5, 10)
    loss = found["docs/frameworks/prime_rl.md:1"]["trainer"]["loss"]
    assert parse_spec(loss["kwargs"]["objective"], objectives.REGISTRY) and stands(loss["import_path"])
    read = {b.name: yaml.safe_load(b.text) for b in BLOCKS if b.language == "yaml"}
    assert parse_spec(read["docs/frameworks/slime.md:2"]["drpo_objective"], objectives.REGISTRY)
    assert (len(found), len(read)) == (2, 1)


def stands(dotted: str) -> bool:
    """Whether a dotted name is a module of ours, or stands at the top of one; nothing is imported."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        where = ROOT / "src" / Path(*parts[:n])
        for path in (where.with_suffix(".py"), where / "__init__.py"):
            if path.is_file():
                names = set()
                for node in ast.parse(path.read_text()).body:
                    names |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
                    names |= {a.asname or a.name for a in node.names} if isinstance(node, ast.ImportFrom) else set()
                return n == len(parts) or parts[n] in names
    return False


def test_diffs_name_what_there_is():
    added = [s for b in BLOCKS if b.language == "diff" for s in re.findall(r"^\+(.*)$", b.text, flags=re.M)]
    named = [name for line in added for name in re.findall(r"\bdrpo(?:\.\w+)+", line.replace("drpo.yaml", ""))]
    named += [
        f"{m}.{n.strip()}"
        for m, ns in re.findall(r"from (drpo\S+) import (.*)", "\n".join(added))
        for n in ns.split(",")
    ]
    assert len(named) > 5 and all(map(stands, named)), [n for n in named if not stands(n)]
    assert not stands("drpo.adapters.trl.NoTrainer")


def test_the_transcript_is_of_the_demo():
    """Its figures are of one run; the lines before them say what the recipe is."""
    (block,) = [b for b in BLOCKS if b.language == "text" and b.name.startswith("README.md")]
    run = demo()
    specs, prompts, samples = flat_json(run), run.data.prompts, run.rollout.sampling.samples
    completions, updates = prompts * samples, run.trainer.updates
    assert (
        f"demo: {run.model.name} learns with {specs['objective']}, {specs['optimizer']}\n"
        f"{prompts} prompts x {samples} samples = {completions} completions a step, "
        f"{updates} updates of {completions // updates} completions each, {run.trainer.steps} steps\n"
    ) in block.text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_page_has_the_marks_of_a_merge(path: Path):
    assert not re.findall(r"^(?:<{7}|>{7}) .*$", path.read_text(), flags=re.M)


LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as the site and code hosts make them."""
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", t) for t in re.findall(r"^#+ (.*)$", prose(path), flags=re.M)]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def dead_links(path: Path) -> list[str]:
    """A page's links that lead nowhere in the repository."""
    dead = []
    for target in LINK.findall(prose(path)):
        file, _, anchor = target.partition("#")
        if ":" in file:
            continue
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(path: Path):
    assert not dead_links(path)


def test_a_dead_link_is_noticed(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A title: one\n[a](page.md#a-title-one) [b](#a-title-two) [c](none.md) [d](page.md#none)\n")
    assert dead_links(page) == ["#a-title-two", "none.md", "page.md#none"]
