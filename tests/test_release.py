"""What is released: one version, a changelog, and (slow) a wheel and a source distribution that work."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import drpo

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_said_in_one_place():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
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
    done = subprocess.run(
        [build, "--outdir", str(folder / "dist"), str(folder / "source")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
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
    )
    assert names >= {*wanted, "mkdocs.yml", "Makefile", "constraints.txt", "CHANGELOG.md", "LICENSE", "README.md"}
    assert not any("__pycache__" in name or name.startswith(("runs/", ".")) for name in names)


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
        command = [str(python), "-I", "-m", "drpo", *arguments]
        done = subprocess.run(command, cwd=run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert drpo_says("--version").strip() == drpo.__version__
    assert json.loads(drpo_says("env", "--json"))["drpo"] == drpo.__version__
    drpo_says("weights", "drpo(0.2)", "--out", "w.png")
    drpo_says("train", "smoke", "--steps", "2", "--out", "run", "--plain")
    assert (run / "w.png").stat().st_size > 10_000 and (run / "run" / "report.html").is_file()
    ask = [str(python), "-I", "-c", "import drpo; print(drpo.__file__)"]
    where = subprocess.run(ask, cwd=run, capture_output=True, text=True, check=True)
    assert Path(where.stdout.strip()).is_relative_to(tmp_path / "venv")


def environment(folder: Path, wheel: Path) -> Path:
    """Make an environment with the wheel and, behind it on the path, the libraries that are installed here."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (libraries,) = {str(Path(pytest.__file__).parents[1])}
    # Not a .pth: those of the libraries' folder, an editable drpo among them, must not be read in turn.
    (site / "libraries.pth").write_text(f"{libraries}\n")
    return python
