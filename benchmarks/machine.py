"""The machine at hand: what a measurement depends on, and a name for files that says no more than that."""

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

# CPU flags on which the speed of matrix products depends.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_FAMILIES = ("epyc", "xeon", "ryzen", "threadripper", "core", "graviton", "apple")


def describe() -> dict[str, Any]:
    """Return the hardware and the versions; no name of the host, no path.

    Returns:
        Plain values for JSON: processor, cores, flags, memory_gib, accelerator, torch, python.
    """
    text = _read("/proc/cpuinfo")
    present = set(_field(text, "flags").split())
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _field(text, "model name") or platform.processor() or platform.machine(),
        "cores": physical_cores(text),
        "flags": {flag: flag in present for flag in FLAGS},
        "memory_gib": round(memory_bytes() / 2**30),
        "accelerator": accelerator,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
    }


def physical_cores(cpuinfo: str) -> int:
    """Return how many cores this process may use, two hardware threads of one core counted once.

    Args:
        cpuinfo: the text of /proc/cpuinfo, empty where there is none.

    Example:
        >>> physical_cores("processor: 0\\nphysical id: 0\\ncore id: 0\\n\\nprocessor: 1\\nphysical id: 0\\ncore id: 0")
        1
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for block in cpuinfo.split("\n\n"):
        number = _field(block, "processor")
        if number.isdigit() and int(number) in allowed and _field(block, "core id"):
            cores.add((_field(block, "physical id"), _field(block, "core id")))
    return len(cores) or len(allowed)


def cores() -> int:
    """Return the number of threads that every competitor gets."""
    return physical_cores(_read("/proc/cpuinfo"))


def memory_bytes() -> int:
    """Return the size of main memory, or of the GPU's where there is one, in bytes."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def name(machine: dict[str, Any]) -> str:
    """Return a name for files, made of the hardware alone.

    Args:
        machine: as `describe` returns it.

    Example:
        >>> name({"processor": "AMD EPYC", "cores": 2, "flags": {"avx512_bf16": True}, "accelerator": None})
        'cpu-2core-epyc-avx512bf16'
        >>> name({"processor": "any", "cores": 8, "flags": {}, "accelerator": "NVIDIA H200"})
        'gpu-nvidia-h200'
    """
    if machine["accelerator"]:
        return f"gpu-{_slug(machine['accelerator'])}"
    words = _slug(machine["processor"]).split("-")
    family = next((f for f in _FAMILIES if f in words), "-".join(words[:3]))
    best = next((f for f in reversed(FLAGS) if machine["flags"].get(f)), None)
    return "-".join(["cpu", f"{machine['cores']}core", family, *([best.replace("_", "")] if best else [])])


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(text: str, label: str) -> str:
    found = re.search(rf"^{label}\s*:\s*(.*)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else ""
