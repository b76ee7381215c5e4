"""Plants the `Replacement` that $DRPO_PLANTED names, in any Python process that has this folder on its PYTHONPATH."""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType

NOT_PLANTED = 70


class _Planting(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and replaces something in it as soon as it is there."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        run, name = spec.loader.exec_module, self.name

        def run_and_plant(module: ModuleType) -> None:
            run(module)
            from planted import all_replacements

            sys.modules.setdefault(fullname, module)
            try:
                all_replacements()[name].plant()
            except Exception as error:  # a test that fails by it would look as if it had caught the bug
                print(f"{name!r} cannot be planted: {error!r}", file=sys.stderr, flush=True)
                os._exit(NOT_PLANTED)

        spec.loader.exec_module = run_and_plant  # type: ignore[method-assign]
        return spec


if "DRPO_PLANTED" in os.environ:
    module, _, name = os.environ["DRPO_PLANTED"].partition("=")
    sys.meta_path.insert(0, _Planting(module, name))
