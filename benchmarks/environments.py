"""An environment of its own for each peer, made where it does not exist, under a folder that git ignores."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.worker_pool import ROOT, plain

HOME = ROOT / ".bench"
REQUIREMENTS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Peer:
    """What to install.

    Args:
        files: requirement files, in order; torch first, so that no other build of it comes along.
        bare: files whose packages are installed without what they require.
        remove: packages to take out again.
        device: the only one it is for, "cuda" or "cpu"; None where it is for both.
    """

    files: tuple[str, ...]
    bare: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    device: str | None = None


PEERS: Mapping[str, Peer] = {
    # Liger requires triton, which its plain-torch losses do not use.
    "trl": Peer(files=("torch.txt", "trl.txt"), bare=("liger.txt",)),
    # What is removed comes as CUDA builds, which a CPU build of torch cannot load; vLLM needs none of it for text.
    "vllm": Peer(files=("torch.txt", "vllm.txt"), remove=("torchvision", "torchaudio", "torchcodec"), device="cpu"),
    "cce": Peer(files=("torch.txt", "cce.txt"), device="cuda"),
}


def python_of(name: str, watch: Callable[[str], None]) -> Path | str:
    """Return the python of a peer's environment, made where it does not exist or its requirements have changed.

    Args:
        name: in `PEERS`.
        watch: is told what is being installed.

    Returns:
        The path of its python, or in one line why there is none.
    """
    peer = PEERS[name]
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if peer.device not in (None, here):
        return f"skipped: it is for {peer.device}, and the work is done on {here} here"
    folder = HOME / name
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = _digest(peer)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    watch(f"installing {name} into {folder.relative_to(ROOT)}, once; this takes minutes")
    for command in _commands(peer, folder):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
            errors = [line for line in lines if line.startswith("ERROR")]
            return plain(f"not installed: {(errors or lines)[-1]}")
    stamp.write_text(wanted)
    return python


def _commands(peer: Peer, folder: Path) -> list[list[str]]:
    if folder.exists():
        shutil.rmtree(folder)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    commands = [[sys.executable, "-m", "venv", str(folder)]]
    commands += [[*pip, "install", "-r", str(REQUIREMENTS / file)] for file in peer.files]
    commands += [[*pip, "install", "--no-deps", "-r", str(REQUIREMENTS / file)] for file in peer.bare]
    if peer.remove:
        commands.append([*pip, "uninstall", "--yes", *peer.remove])
    return commands


def _digest(peer: Peer) -> str:
    """Changes with anything that decides what is installed."""
    texts = [(REQUIREMENTS / file).read_text() for file in (*peer.files, *peer.bare)]
    return hashlib.sha256(repr((peer, texts)).encode()).hexdigest()
