"""A recipe in a file of the user's: Python with a function `recipe()` that returns a `Run`, or a `Run` of that name."""

import sys
import traceback
from importlib import invalidate_caches
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from drpo.errors import InputError, describe
from drpo.train.config import REGISTRIES, Run, flat_json

_UNFOUND = "drpo_recipe_file"
"""Name of a file's module that `import` does not find."""


def run_of_file(path: Path) -> Run:
    """Return the run that a file builds. Its code runs.

    Code of the file that a run needs (a reward, a task) is recorded as `module:name`, as if it stood in a module of
    its own; so the file must be one that `import` finds from the working folder.

    Args:
        path: of the file; `require_recipe` says what else is asked of it.

    Raises:
        InputError: the code raises, or builds no run; the message names the file and the line.
    """
    module = _module(path)
    made = getattr(module, "recipe", None)
    if callable(made):
        try:
            made = made()
        except BaseException as error:
            raise _refusal(path, error) from None
        if not isinstance(made, Run):
            raise InputError(f"{path}: recipe() returned {type(made).__name__}, not a drpo.train.config.Run")
    if made is None:
        raise InputError(f"{path}: it has no function recipe() and no Run of that name")
    if not isinstance(made, Run):
        raise InputError(f"{path}: recipe is a {type(made).__name__}, not a drpo.train.config.Run or a function")
    _require_importable(path, made)
    return made


def _module(path: Path) -> ModuleType:
    """Run a file as the module that `import` finds it by from the working folder, if it does."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that no file of the folder replaces a library
    name = _name_of(path)
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path  # its name ends with .py
    module = sys.modules[name] = module_from_spec(spec)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder is the user's
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        raise _refusal(path, error) from None
    finally:
        sys.dont_write_bytecode = writes
    return module


def _name_of(path: Path) -> str:
    """The name by which `import` finds a file from the working folder; without one, a name that nothing else has."""
    whole, here = path.resolve(), Path.cwd().resolve()
    if not whole.is_relative_to(here):
        return _UNFOUND
    invalidate_caches()  # the file may be new
    name = ".".join(whole.relative_to(here).with_suffix("").parts)
    loaded = getattr(sys.modules.get(name), "__file__", None)
    try:
        spec = None if name in sys.modules else find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return _UNFOUND
    origin = loaded or (spec and spec.origin)
    return name if origin and Path(origin).resolve() == whole else _UNFOUND


def _refusal(path: Path, error: BaseException) -> BaseException:
    """An error of a user's file as one line; a keyboard's interrupt stays."""
    if isinstance(error, KeyboardInterrupt):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path.absolute())]
    where = f"{path} line {lines[-1]}" if lines else f"{path}"
    reason = str(error) if isinstance(error, InputError) else describe(error)
    hint = "; modules are looked for in the working folder" if isinstance(error, ModuleNotFoundError) else ""
    return InputError(f"{where}: {reason}{hint}")


def _require_importable(path: Path, run: Run) -> None:
    """Raise if the run needs code of a file that nothing can import again."""
    try:
        specs = {name: str(text) for name, text in flat_json(run).items() if name in REGISTRIES}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    for name, text in specs.items():
        if text.startswith(f"{_UNFOUND}:"):
            code = text.partition(":")[2]
            raise InputError(
                f"{path}: {name} is {code} of this file, which `import` does not find here under its name; put the "
                "file into the working folder, under a name that no library has"
            )
