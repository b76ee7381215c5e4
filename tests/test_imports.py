"""The order of the rooms: nothing on the right is imported by anything on the left, at any depth of a file."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from drpo.lazily import lazily
from support.sources import parsed

SOURCE = Path(__file__).resolve().parents[1] / "src" / "drpo"
STUDIES = {path.stem for path in (SOURCE.parents[1] / "studies").iterdir()}

# A room may import rooms of lower rank, and its own. Rooms of equal rank do not know of each other.
RANK = {
    "errors": -1,
    "checks": 0,
    "files": 1,
    "lazily": 1,
    "extras": 0,
    "credentials": 1,
    "terminal": 1,
    "progress": 0,
    "seeds": 1,
    "spec": 1,
    "types": 1,
    "objectives": 2,
    "reductions": 2,
    "credit": 2,
    "ops": 3,
    "methods": 3,
    "adapters": 3,
    "workers": 3,
    "ranks": 3,
    "model": 4,
    "rewards": 4,
    "tasks": 5,
    "environments": 6,
    "rollout": 5,
    "batch": 6,
    "train": 9,
    "recipes": 10,
    "doctor": 10,
    "lab": 11,
    "report": 12,
    "live": 13,
    "serving": 13,
    "autopsy": 13,
    "cli": 14,
    "__main__": 15,
    "__init__": 0,
}
MATHEMATICS = (
    "objectives",
    "reductions",
    "credit",
    "methods",
    "ops",
    "types",
    "checks",
    "errors",
    "extras",
    "seeds",
    "spec",
)
# An optional backend may be missing, and may be imported where it is used: (file, module).
OPTIONAL = {
    ("ops/triton.py", "triton"),
    ("rollout/vllm.py", "vllm"),
    ("rollout/vllm_patches.py", "vllm"),
    ("live/track.py", "torch.utils.tensorboard"),
    ("live/track.py", "trackio"),
    ("live/track.py", "wandb"),
    ("cli/lm_harness.py", "lm_eval"),
    ("cli/inspect_tasks.py", "inspect_ai"),
}


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path, within: ast.AST | None = None) -> list[str]:
    """Every module that a file, or a part of it, imports, wherever in it."""
    names: list[str] = []
    for node in ast.walk(within or parsed(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def optional(path: Path, name: str) -> bool:
    here = str(path.relative_to(SOURCE))
    return any(here == file and f"{name}.".startswith(f"{module}.") for file, module in OPTIONAL)


def test_every_room_has_a_rank():
    assert {room(path) for path in files()} <= set(RANK)


def test_imports_point_one_way():
    for path in files():
        here = room(path)
        for name in imported(path):
            parts = name.split(".")
            assert parts[0] not in STUDIES, f"{path} imports the study {parts[0]}"
            if parts[0] == "drpo" and len(parts) > 1 and parts[1] in RANK:
                there = parts[1]
                assert there == here or RANK[there] < RANK[here], f"{path} imports {there}"


def test_no_import_inside_a_function():
    for path in files():
        nodes = list(ast.walk(parsed(path)))
        if not any(isinstance(node, ast.Import | ast.ImportFrom) and node.col_offset for node in nodes):
            continue
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = [name for name in imported(path, node) if not optional(path, name)]
                assert not inner, f"{path}: {node.name} imports inside"


def test_mathematics_imports_itself_torch_and_the_standard_library_only():
    allowed = {"torch", "drpo", *sys.stdlib_module_names}
    mathematics = [path for path in files() if room(path) in MATHEMATICS]
    assert mathematics
    for path in mathematics:
        roots = {name.split(".")[0] for name in imported(path) if not optional(path, name)}
        assert roots <= allowed, f"{path} imports {roots - allowed}"
        rooms = {name.split(".")[1] for name in imported(path) if name.startswith("drpo.")}
        assert rooms <= set(MATHEMATICS), f"{path} imports {rooms - set(MATHEMATICS)}"


@pytest.mark.slow
def test_importing_the_objectives_loads_torch_and_nothing_else():
    missing = dict.fromkeys(module for _, module in OPTIONAL)  # None in sys.modules: no such module
    script = (
        f"import sys, torch; sys.modules.update({missing}); before = set(sys.modules);"
        "import drpo.objectives, drpo.ops, drpo.methods;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names) - {'torch', 'drpo'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_a_configuration_and_a_reward_read_needs_no_torch():
    script = "import sys; from drpo.types import Problem, Sampling; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_looking_at_all_modules_does_not_import_a_lazy_library(tmp_path, monkeypatch):
    """As `inspect.getmodule` does, which torch calls while it is imported: all libraries were imported by it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "imported_later.py").write_text("answer = 42")
    library = lazily("imported_later")
    inspect.getmodule(inspect.currentframe())
    assert not any(hasattr(module, "__file__") and module is library for module in [*sys.modules.values()])
    assert "imported_later" not in sys.modules and not hasattr(library, "__file__")
    assert library.answer == 42 and sys.modules["imported_later"].answer == 42


def named_in(path: Path) -> set[str]:
    """What a module of drpo can be asked for: what it names anywhere, and the modules of a package."""
    names = {name.stem for name in path.parent.iterdir()} if path.name == "__init__.py" else set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_what_other_folders_import_from_drpo_is_there():
    """Where a framework is imported too, nothing else here would notice that a name has changed."""
    root, asked = SOURCE.parents[1], 0
    for path in (p for folder in ("benchmarks", "cluster", "docker", "studies") for p in (root / folder).rglob("*.py")):
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "drpo":
                continue
            place = SOURCE.parent.joinpath(*str(node.module).split("."))
            module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            gone = {alias.name for alias in node.names} - named_in(module)
            assert "__getattr__" in named_in(module) or not gone, f"{path} imports {gone} from {node.module}"
            asked += 1
    assert asked > 50
