"""A model's folder: tested before training, written after it, and read back to verify it."""

import copy
import hashlib
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from drpo.errors import InputError
from drpo.files import naming, remove
from drpo.model.loading import named_tensors, persistent_buffers

log = logging.getLogger("drpo")

UNSOUND = "unsound"
"""Suffix of a folder that does not hold the trained model."""


def probe(model: PreTrainedModel) -> Tensor:
    """Return a few token ids [8] to compare two models on.

    Args:
        model: any causal LM.
    """
    size = int(model.config.get_text_config().vocab_size)
    return 1 + 7 * torch.arange(8) % (size - 1)


def require_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write all but the weights into a temporary folder, and check that the same model can be built from it.

    Args:
        model: as loaded.
        tokenizer: the model's.

    Raises:
        InputError: the model's folder could not be written after training, or not be read back.

    Example:
        >>> from drpo.model.loading import tiny
        >>> require_savable(*tiny())
    """
    kind: Any = type(model)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable():
        raise InputError(f"model {kind.__name__}: it is loaded quantized and cannot be saved; give plain weights")
    try:
        with TemporaryDirectory(prefix="drpo-model-") as folder, naming(Path(folder)):
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            model.config.save_pretrained(folder)
            config = type(model.config).from_pretrained(folder, trust_remote_code=False)
        remove_tied_weights_from_state_dict(model.state_dict(), model)  # raises for undeclared shared memory
        with torch.device("meta"):
            rebuilt = _reader(model)._from_config(config)
    except OSError:
        raise  # the disk's fault, not the model's
    except Exception as error:  # transformers raises ValueError, TypeError and others
        raise InputError(
            f"model {kind.__name__}: its folder could not be written after training: {_line(error)}"
        ) from None
    shapes, rebuilt_shapes = ({n: t.shape for n, t in named_tensors(m).items()} for m in (model, rebuilt))
    if type(rebuilt) is not kind:
        raise InputError(
            f"model {kind.__name__}: transformers would read its folder as {type(rebuilt).__name__}; give it a "
            "configuration class with a model_type of its own, and register both"
        )
    if shapes != rebuilt_shapes:
        names = shapes.keys() | rebuilt_shapes.keys()
        odd = sorted(name for name in names if shapes.get(name) != rebuilt_shapes.get(name))
        raise InputError(
            f"model {kind.__name__}: built from its own configuration it has other tensors ({odd[0]!r} is missing on "
            "one side, or of another shape), so its folder could not be read back after training"
        )


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Round a model's parameters and persistent buffers in place, as transformers would load them in `dtype`.

    Tensors that the model family keeps in float32 stay, and buffers get the dtype that the class declares.

    Args:
        model: in float32.
        dtype: the dtype of the others.

    Returns:
        The same model.
    """
    kept = [re.compile(pattern) for pattern in model._get_dtype_plan(dtype)]
    kind: Any = type(model)
    with torch.device("meta"):
        declared = persistent_buffers(kind._from_config(copy.deepcopy(model.config), dtype=dtype))
    for name, tensor in [*model.named_parameters(), *persistent_buffers(model).items()]:
        if tensor.is_floating_point() and not any(pattern.search(name) for pattern in kept):
            tensor.data = tensor.data.to(declared[name].dtype if name in declared else dtype)
    return model


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    logits: Tensor | None = None,
) -> None:
    """Write a model's folder, read it back, and compare every tensor and the logits of a few tokens.

    The folder gets its name once it is verified; a wrong one is kept as `FOLDER.unsound`.

    Args:
        model: a plain transformers model, on any device. Keep no reference to it: once it is written, its memory is
            released for the copy that is read back.
        tokenizer: the model's.
        folder: the folder to write; an existing one is replaced.
        logits: [8, V] the trained model's on `probe`, float32, unrounded; None computes them from `model`.

    Raises:
        InputError: the folder cannot be written, or does not hold the trained model.
    """
    folder = folder.parent.resolve() / folder.name if folder.name else folder.resolve()
    scratch = folder.with_name(f"{folder.name}.{UNSOUND}")
    remove(scratch)
    try:
        with naming(scratch):
            scratch.mkdir(parents=True)
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            _copy_processors(model, scratch)
            _level_modes(scratch)
    except OSError:  # for example a full disk; the partial folder takes space
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    except Exception as error:
        raise InputError(f"{scratch}: the model cannot be written: {_line(error)}") from None
    written, ids, reader, dtype = fingerprints(model), probe(model), _reader(model), model.dtype
    logits = _logits(model, ids) if logits is None else logits
    del model
    if (problem := _unlike(scratch, reader, dtype, written, ids, logits)) is not None:
        raise InputError(f"{scratch}: what is read back from it is not what was trained: {problem}; do not use it")
    remove(folder)
    scratch.rename(folder)


def fingerprints(model: PreTrainedModel) -> dict[str, str]:
    """Return the SHA-256 of every tensor of a model, by name, with its dtype and shape.

    Args:
        model: any model.
    """
    return {name: _fingerprint(tensor) for name, tensor in named_tensors(model).items()}


def _fingerprint(tensor: Tensor) -> str:
    data: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


@torch.no_grad()
def _unlike(
    folder: Path,
    reader: Any,
    dtype: torch.dtype,
    written: Mapping[str, str],
    ids: Tensor,
    logits: Tensor | None,
) -> str | None:
    """Return how a written folder differs from the trained model; None if it does not."""
    try:
        model = reader.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()
    except Exception as error:  # any error means that the folder cannot be read
        return f"transformers cannot read it ({_line(error)})"
    stored = fingerprints(model)
    if odd := sorted(name for name in written.keys() | stored.keys() if written.get(name) != stored.get(name)):
        return f"{len(odd)} of {len(written)} tensors differ, {odd[0]!r} first"
    if logits is None:
        return None
    if (stored_logits := _logits(model, ids)) is None:
        return "it does not run"
    if torch.equal(stored_logits.nan_to_num(), logits.nan_to_num()):  # NaN where 16 bits overflow
        return None
    # The median over tokens, since a mixture may route a token near a tie to another expert.
    gap, largest = float((stored_logits - logits).abs().amax(1).median()), float(logits.abs().max())
    return None if gap <= 1e-3 * largest else f"its logits differ by {gap:.3g} (largest {largest:.3g}), tensors equal"


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor | None:
    """Return logits [N, V], float32 on the CPU, computed in the model's dtype; None if it does not run in it."""
    try:
        logits: Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
    except RuntimeError:
        return None
    return logits.float().cpu()


def _reader(model: PreTrainedModel) -> Any:
    """Return the class that reads a model's folder: transformers' for its configuration, else the model's."""
    kind: Any = type(model)
    if kind.is_remote_code():
        return kind
    mappings: list[Any] = [AutoModelForCausalLM._model_mapping, AutoModelForMultimodalLM._model_mapping]
    known = [mapping[type(model.config)] for mapping in mappings if type(model.config) in mapping]
    classes = [read for reads in known for read in (reads if isinstance(reads, tuple) else (reads,))]
    return kind if kind in classes or not classes else classes[0]


def _copy_processors(model: PreTrainedModel, folder: Path) -> None:
    """Copy the settings by which images and sound become inputs from where the model was loaded from."""
    if model.config.get_text_config() is model.config:
        return
    source = str(model.config._name_or_path)
    config = try_to_load_from_cache(source, "config.json") if source and not Path(source).is_dir() else None
    origin = Path(config).parent if isinstance(config, str) else Path(source)
    files = sorted(origin.glob("*processor_config.json")) if source else []
    for path in files:
        shutil.copy(path, folder)
    if not files:
        log.warning(
            "%s: there is no preprocessor_config.json or processor_config.json beside the model's weights, so the "
            "trained model's folder has none either; it is needed to give the model images or sound",
            source or type(model).__name__,
        )


def _level_modes(folder: Path) -> None:
    """Set the mode of the weights, which safetensors makes readable by the owner alone, to that of config.json."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
