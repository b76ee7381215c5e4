"""A model's folder: tried before training begins, written, and read back to see that it holds what was trained."""

import copy
import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from drpo.errors import InputError
from drpo.files import naming, remove
from drpo.model.loading import named_tensors, persistent_buffers

UNSOUND = "unsound"
"""What is added to the name of a folder that does not hold what was trained."""


def probe(model: PreTrainedModel) -> Tensor:
    """Return a few token ids [8] on which two models can be compared.

    Args:
        model: any causal LM.
    """
    size = int(model.config.get_text_config().vocab_size)
    return 1 + 7 * torch.arange(8) % (size - 1)


def require_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write all but the weights into a temporary folder, and see that the same model can be built from it.

    Args:
        model: as loaded.
        tokenizer: of the model.

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
        remove_tied_weights_from_state_dict(model.state_dict(), model)  # raises where tensors share memory unsaid
        with torch.device("meta"):
            again = _reader(model)._from_config(config)
    except OSError:
        raise  # the disk, not the model
    except Exception as error:  # transformers raises ValueError, TypeError and others
        raise InputError(
            f"model {kind.__name__}: its folder could not be written after training: {_line(error)}"
        ) from None
    shapes, found = ({n: t.shape for n, t in named_tensors(m).items()} for m in (model, again))
    if type(again) is not kind:
        raise InputError(
            f"model {kind.__name__}: transformers would read its folder as {type(again).__name__}; give it a "
            "configuration class with a model_type of its own, and register both"
        )
    if shapes != found:
        odd = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise InputError(
            f"model {kind.__name__}: built from its own configuration it has other tensors ({odd[0]!r} is missing on "
            "one side, or of another shape), so its folder could not be read back after training"
        )


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Round a model's parameters and persistent buffers, in place, but for what its family keeps in float32, and for
    buffers whose dtype its class names.

    Args:
        model: in float32.
        dtype: of the rest.

    Returns:
        The same model.
    """
    kept = [re.compile(pattern) for pattern in model._get_dtype_plan(dtype)]
    kind: Any = type(model)
    with torch.device("meta"):
        own = persistent_buffers(kind._from_config(copy.deepcopy(model.config), dtype=dtype))
    for name, tensor in [*model.named_parameters(), *persistent_buffers(model).items()]:
        if tensor.is_floating_point() and not any(pattern.search(name) for pattern in kept):
            tensor.data = tensor.data.to(own[name].dtype if name in own else dtype)
    return model


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    logits: Tensor | None = None,
) -> None:
    """Write a model's folder, read it back once, and compare every tensor, and the logits of a few tokens.

    The folder appears under its name when it is sound; an unsound one is kept as `FOLDER.unsound`.

    Args:
        model: plain, on any device. Drop it meanwhile: it is needed no more once it is written, and the copy that is
            read back takes its room.
        tokenizer: of the model.
        folder: to write; an existing one is replaced.
        logits: [8, V] of the trained model on `probe`, float32, on no grid; None takes those of `model` itself.

    Raises:
        InputError: it cannot be written, or what is read back is not what was trained.
    """
    folder = folder.parent.resolve() / folder.name if folder.name else folder.resolve()
    scratch = folder.with_name(f"{folder.name}.{UNSOUND}")
    remove(scratch)
    try:
        with naming(scratch):
            scratch.mkdir(parents=True)
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            _level_modes(scratch)
    except OSError:  # a full disk among others: what is half written takes the room that is lacking
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
        model: any.
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
    """What is wrong with a folder that was written; None where nothing is."""
    try:
        model = reader.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()
    except Exception as error:  # whatever it is, nobody else can read it either
        return f"transformers cannot read it ({_line(error)})"
    found = fingerprints(model)
    if odd := sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name)):
        return f"{len(odd)} of {len(written)} tensors differ, {odd[0]!r} first"
    if logits is None:
        return None
    if (again := _logits(model, ids)) is None:
        return "it does not run"
    if torch.equal(again.nan_to_num(), logits.nan_to_num()):  # also where 16 bits do not hold them
        return None
    # Of each token, since a mixture may send one that stands between two experts to the other.
    gap, largest = float((again - logits).abs().amax(1).median()), float(logits.abs().max())
    return None if gap <= 1e-3 * largest else f"its logits differ by {gap:.3g} (largest {largest:.3g}), tensors equal"


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor | None:
    """[N, V] float32, on the CPU, in the precision that the model is in; None where it does not run in that."""
    try:
        logits: Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
    except RuntimeError:
        return None
    return logits.float().cpu()


def _reader(model: PreTrainedModel) -> Any:
    """The class through which a model's folder is read: transformers' for its configuration, else its own."""
    own: Any = type(model)
    mapping: Any = AutoModelForCausalLM._model_mapping
    if own.is_remote_code() or type(model.config) not in mapping:
        return own
    known = mapping[type(model.config)]
    return own if isinstance(known, tuple) and own in known else known


def _level_modes(folder: Path) -> None:
    """Give weights, which safetensors writes for their owner alone, the mode of the configuration beside them."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
