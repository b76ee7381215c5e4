"""The documentation's site: its configuration, its pages, and its build."""

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LINKS = load(DOCS / "site_links.py")
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for inner in (nav.values() if isinstance(nav, dict) else nav) for page in pages(inner)]


def build_site(folder: Path) -> Path:
    """The site, built into a folder; the test is skipped where mkdocs is missing."""
    mkdocs = shutil.which("mkdocs") or ROOT / ".venv-docs" / "bin" / "mkdocs"
    if not Path(mkdocs).exists():
        pytest.skip("mkdocs is not here: make docs")
    command = [str(mkdocs), "build", "--strict", "--quiet", "--site-dir", str(folder / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"
