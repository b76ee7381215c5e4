"""What is released: one version, a changelog, and (slow) a wheel and a source distribution that work."""

import ast
import email
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import drpo
from drpo.extras import EXTRA
from support.sources import parsed

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_said_in_one_place():
    assert PROJECT["dynamic"] == ["version", "readme"] and "version" not in PROJECT
    assert re.fullmatch(r"\d+\.\d+\.\d+", drpo.__version__)
    sources = [p for p in (ROOT / "src").rglob("*.py") if drpo.__version__ in p.read_text()]
    assert sources == [ROOT / "src" / "drpo" / "__init__.py"]


def test_the_changelog_has_the_version_and_no_heading_that_is_none():
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", text, flags=re.M)
    released = r"\d+\.\d+\.\d+ (\(unreleased\)|- \d{4}-\d{2}-\d{2})"
    assert headings and all(re.fullmatch(rf"\[?Unreleased\]?|{released}", h) for h in headings), headings
    assert any(h.startswith(drpo.__version__) for h in headings)


def test_the_metadata_are_those_of_a_package():
    assert PROJECT["license"] == "Apache-2.0" and (ROOT / PROJECT["license-files"][0]).is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert not any(c.startswith("License ::") for c in PROJECT["classifiers"])  # the expression says it


def load_setup() -> ModuleType:
    """The module setup.py, which builds nothing unless it is run."""
    spec = importlib.util.spec_from_file_location("setup_of_drpo", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_link_of_the_index_s_readme_leads_nowhere():
    index_readme, readme = load_setup().index_readme, (ROOT / "README.md").read_text()
    without, links = index_readme(readme, None), re.compile(r"\]\(([^)]*)\)")
    fences = re.compile(r"^```.*?^```$", flags=re.M | re.S)
    assert fences.findall(without) == fences.findall(readme) != []
    assert set(links.findall(fences.sub("", without))) == {"https://arxiv.org/abs/2606.09821"}
    for path in set(links.findall(fences.sub("", readme))) - {"https://arxiv.org/abs/2606.09821"}:
        assert path.partition("#")[0] in without and (ROOT / path.partition("#")[0]).exists()
    at = index_readme(readme, "https://host/owner/drpo")
    assert "](https://host/owner/drpo/raw/main/docs/figures/weights.png)" in at
    assert all(link.startswith("https://") for link in links.findall(fences.sub("", at)))
    assert index_readme("[a](b.md#c) [b.md](b.md)\n```\n[a](b)\n```\n[x](#y)", None) == (
        "a (`b.md`) b.md\n```\n[a](b)\n```\n[x](#y)"
    )


def test_the_addresses_are_those_that_the_repository_states():
    readme = (ROOT / "README.md").read_text()
    assert all(address in readme for address in PROJECT["urls"].values())
    assert all(address.startswith("https://") for address in PROJECT["urls"].values())


def ran(*command: str | Path, cwd: Path | None = None) -> str:
    """What a program prints that must succeed; where it fails, the test shows what it said."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout[-2000:] + done.stderr[-4000:])
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, made from a copy: a build leaves things behind."""
    beside = Path(sys.executable).with_name("pyproject-build")
    build = str(beside) if beside.exists() else shutil.which("pyproject-build")
    if build is None:
        pytest.skip("build is not installed")
    folder = tmp_path_factory.mktemp("release")
    left_out = shutil.ignore_patterns(".git", ".venv*", ".adapters", "runs", "site", "dist", "build", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=left_out, symlinks=True)
    ran(build, "--outdir", folder / "dist", folder / "source")
    return folder / "dist"


@pytest.mark.slow
def test_the_source_distribution_holds_tests_and_documents(built: Path):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = (
        "tests/test_release.py",
        "studies/theory.py",
        "tests/golden/objectives.json",
        "docs/index.md",
        "docs/figures/weights.png",
        "docker/cpu.Dockerfile",
        "setup.py",
    )
    assert names >= {*wanted, "mkdocs.yml", "Makefile", "constraints.txt", "CHANGELOG.md", "LICENSE", "README.md"}
    assert not any("__pycache__" in name or name.startswith(("runs/", ".")) for name in names)


@pytest.mark.slow
def test_the_wheel_s_description_is_a_page_of_an_index(built: Path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Description-Content-Type"] == "text/markdown" and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE" and metadata["Project-URL"].startswith("Paper, https://")
    page = metadata.get_payload(decode=True).decode()
    assert page.strip() == load_setup().index_readme((ROOT / "README.md").read_text(), None).strip()
    renderer = pytest.importorskip("readme_renderer.markdown", reason="readme_renderer is not installed")
    html = renderer.render(page)
    assert html is not None and "<table>" in html and 'href="docs' not in html and 'src="docs' not in html


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_that_has_not_this_checkout(built: Path, tmp_path: Path):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    pages = {f"drpo/report/page/{p.name}" for p in (ROOT / "src" / "drpo" / "report" / "page").iterdir()}
    assert names >= {"drpo/py.typed", *pages} and not any(name.startswith(("tests", "studies")) for name in names)
    python = environment(tmp_path / "venv", wheel)
    run = tmp_path / "elsewhere"
    run.mkdir()

    def drpo_says(*arguments: str) -> str:
        return ran(python, "-I", "-m", "drpo", *arguments, cwd=run)

    assert drpo_says("--version").strip() == drpo.__version__
    assert json.loads(drpo_says("env", "--json"))["drpo"] == drpo.__version__
    drpo_says("weights", "drpo(0.2)", "--out", "w.png")
    drpo_says("train", "smoke", "--steps", "2", "--out", "run", "--plain")
    assert (run / "w.png").stat().st_size > 10_000 and (run / "run" / "report.html").is_file()
    where = ran(python, "-I", "-c", "import drpo; print(drpo.__file__)", cwd=run)
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")


LIBRARIES_OF_FRAMEWORKS = set(
    [
        "areal",
        "httpx",
        "hydra",
        "omegaconf",
        "ray",
        "roll",
        "skyrl",
        "slime",
        "swift",
        "tinker",
        "torchtitan",
        "trl",
        "verifiers",
        "verl",
    ]
)


def required(extra: str) -> set[str]:
    """The names of what an extra of pyproject.toml lists itself, without its own extras."""
    names = {canonicalize_name(Requirement(r).name) for r in PROJECT["optional-dependencies"][extra]}
    return names - {"drpo"}


def test_the_wheel_alone_is_the_mathematics():
    assert {Requirement(r).name for r in PROJECT["dependencies"]} == {"torch", "numpy"}
    assert PROJECT["scripts"] == {"drpo": "drpo.__main__:main"}  # which imports no library itself
    # Each extra is enough by itself: it holds the trainer, or is a part of it.
    for extra, requirements in PROJECT["optional-dependencies"].items():
        own = {name for r in requirements if Requirement(r).name == "drpo" for name in Requirement(r).extras}
        assert own == {"report": set(), "train": {"report"}, "dev": {"train", "gym"}}.get(extra, {"train"}), extra


def test_every_library_is_of_an_extra_which_the_message_names():
    for library, extra in EXTRA.items():
        listed = {e for e in PROJECT["optional-dependencies"] if canonicalize_name(library) in required(e)}
        assert not listed - {"dev"} or extra in listed, (library, extra, listed)  # the others come with those listed
        assert extra in PROJECT["optional-dependencies"]
    for extra in ("report", "train", "gym"):
        assert required(extra) <= {canonicalize_name(library) for library, e in EXTRA.items() if e == extra}
    of_modules = {
        name.split(".")[0]
        for path in (ROOT / "src" / "drpo").rglob("*.py")
        for node in parsed(path).body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    others = of_modules - {"drpo", "torch", "numpy", "triton", *sys.stdlib_module_names} - LIBRARIES_OF_FRAMEWORKS
    assert others <= EXTRA.keys(), others - EXTRA.keys()


@pytest.mark.parametrize(
    ("arguments", "absent", "told"),
    [
        (["train", "demo"], "rich", "drpo: rich is not installed; run pip install 'drpo[train]'\n"),
        (
            ["eval", "tiny", "--task", "gsm8k"],
            "transformers",
            "drpo: transformers is not installed; run pip install 'drpo[train]'\n",
        ),
        pytest.param(
            ["doctor", "smoke", "--task", "reasoning_gym('chain_sum')"],
            "reasoning_gym",
            "run pip install 'drpo[gym]'\n",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_command_without_its_library_names_the_extra(arguments: list[str], absent: str, told: str):
    block = f"import sys; sys.modules[{absent!r}] = None; sys.argv = ['drpo', *{arguments!r}]"
    script = f"{block}; import drpo.__main__ as command; sys.exit(command.main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2 and done.stderr.endswith(told) and done.stderr.count("\n") == 1, done.stderr


def closure(requirements: Sequence[Requirement]) -> dict[str, importlib.metadata.Distribution]:
    """What is installed here of some requirements and all that they require."""
    have: dict[str, importlib.metadata.Distribution] = {}
    seen, todo = set(), [(r, "") for r in requirements]
    while todo:
        requirement, asking = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras), asking)
        if key in seen or (requirement.marker is not None and not requirement.marker.evaluate({"extra": asking})):
            continue
        seen.add(key)
        have[key[0]] = importlib.metadata.distribution(requirement.name)
        for text in have[key[0]].requires or ():
            todo += [(Requirement(text), extra) for extra in ("", *requirement.extras)]
    return have


def own_environment(folder: Path, wheel: Path, extra: str) -> Path:
    """Make an environment with the wheel, and those of the libraries that are installed here that an extra brings."""
    ran(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    ran(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    extras, asked = set(), {extra}
    while extras != asked:
        extras = set(asked)
        of_extras = [Requirement(line) for line in lines]
        of_extras = [r for r in of_extras if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
        asked |= {name for r in of_extras if r.name == "drpo" for name in r.extras}
    plain = [Requirement(str(r).partition(";")[0]) for r in of_extras if r.name != "drpo"]
    for distribution in closure(plain).values():
        for top in {Path(file).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            there, here = Path(str(distribution.locate_file(top))), site / top
            if there.exists() and not here.exists():
                here.symlink_to(there)
    return python


OBJECTIVE = """
import torch
from drpo.objectives import DRPO, Tokens, gradient_weight
logp, keep, sequence = torch.zeros(2, requires_grad=True), torch.ones(2, dtype=bool), torch.zeros(2, dtype=int)
tokens = Tokens(logp, torch.zeros(2), torch.ones(2), keep, sequence)
print(gradient_weight(DRPO(0.2), tokens).tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "report", "train", "gym"])
def test_each_extra_by_itself_is_enough_for_what_it_is_for(extra: str, built: Path, tmp_path: Path):
    (wheel,) = built.glob("*.whl")
    python = own_environment(tmp_path / "venv", wheel, extra)
    run = tmp_path / "elsewhere"
    run.mkdir()

    def says(*arguments: str, status: int = 0) -> str:
        program = [str(python.with_name("drpo")), *arguments]
        done = subprocess.run(program, cwd=run, capture_output=True, text=True, check=False)
        assert done.returncode == status, (arguments, done.stderr)
        return done.stdout + done.stderr

    assert ran(python, "-I", "-c", OBJECTIVE) == "[1.0, 1.0]\n"
    if not extra:
        for arguments in ([], ["--version"], ["train", "demo"], ["weights"]):
            assert says(*arguments, status=2) == "drpo: rich is not installed; run pip install 'drpo[train]'\n"
        return
    assert says("--version").strip() == drpo.__version__
    says("weights", "drpo(0.2)", "--out", "w.png")
    shutil.copytree(smoke_run(tmp_path), run / "run")
    if extra == "report":
        says("report", "run")
        for arguments in (
            ["replay", "run"],
            ["autopsy", "run/rollouts.jsonl"],
            ["verify", "run"],
            ["explain", "entropy"],
        ):
            says(*arguments)
        assert "peft is not installed" in says(
            "train", "smoke", "--lora-rank", "4", "--out", "new", "--no-doctor", status=2
        )
        return
    says("train", "smoke", "--steps", "2", "--out", "new", "--plain")
    says("export", "new", "exported")
    task = ["eval", "tiny", "--task", "reasoning_gym('chain_sum')", "--problems", "2", "--sampling.max-new-tokens", "4"]
    if extra == "gym":
        says(*task)
    else:
        assert "run pip install 'drpo[gym]'" in says(*task, status=2)


def smoke_run(folder: Path) -> Path:
    """A finished run, made with what is installed here."""
    options = ("--steps", "2", "--plain", "--no-doctor", "--out", "made")
    ran(sys.executable, "-m", "drpo", "train", "smoke", *options, cwd=folder)
    return folder / "made"


def environment(folder: Path, wheel: Path) -> Path:
    """Make an environment with the wheel and, behind it on the path, the libraries that are installed here."""
    ran(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    ran(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    (libraries,) = {str(Path(pytest.__file__).parents[1])}
    # Not a .pth: those of the libraries' folder, an editable drpo among them, must not be read in turn.
    (site / "libraries.pth").write_text(f"{libraries}\n")
    return python
