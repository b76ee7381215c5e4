"""Python runs this file first in every process that has its folder on PYTHONPATH, vLLM's engine included.

It waits for OpenRLHF, so that Ray's own processes stay as they are.
"""

import sys
from importlib.abc import MetaPathFinder


class First(MetaPathFinder):
    """Let adapters.openrlhf_on_cpu in before the first import of OpenRLHF."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "openrlhf":
            sys.meta_path.remove(self)
            from adapters import openrlhf_on_cpu

            openrlhf_on_cpu.install()


sys.meta_path.insert(0, First())
