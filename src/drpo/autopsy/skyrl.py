"""SkyRL: the training batches of `trainer.dump_data_batch`, and the evaluations of `trainer.dump_eval_results`.

A batch is a pickle of plain containers and the bytes of arrays. The unpickler here knows a few names, builds nothing of
SkyRL's or NumPy's for them, and refuses all others.
"""

import io
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from drpo.autopsy.dumped import Column, Dumped, Format
from drpo.autopsy.lines import read_lines
from drpo.errors import InputError, describe

_HOME = "skyrl.backends.skyrl_train.training_batch"


class _Unread:
    """An array of NumPy, or its type: in it SkyRL 0.4.0 keeps routed experts and kept tokens. Empty here."""

    def __init__(self, *content: Any) -> None:
        """Take what NumPy would."""

    def __setstate__(self, state: Any) -> None:
        """Take what NumPy would."""


_KNOWN: Mapping[tuple[str, str], Any] = {
    (_HOME, "_rebuild_tensor_batch"): lambda kind, state: state,
    (_HOME, "TrainingInputBatch"): "TrainingInputBatch",
    (_HOME, "TensorFormat"): str,  # since SkyRL 0.4.0
    ("torch", "device"): str,
    **{(home, "_reconstruct"): _Unread for home in ("numpy._core.multiarray", "numpy.core.multiarray")},
    **{(home, "_frombuffer"): _Unread for home in ("numpy._core.numeric", "numpy.core.numeric")},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _Unread,
}
"""Module and name in the pickle -> what stands for it here."""
LARGEST = 2**31
"""Bytes of a batch; a larger file is refused, since it is read as a whole."""
_DTYPES = frozenset({"int64", "int32", "uint8", "bool", "float64", "float32", "float16"})


class _Plain(pickle.Unpickler):
    """Unpickles containers and bytes; never builds an object of a class that the file names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch of SkyRL needs")
        return _KNOWN[module, name]


def step_of(name: str) -> int | None:
    """Return the step in the name of a file or folder of SkyRL."""
    found = re.match(r"global_step_(\d{1,18})", name)
    return None if found is None else int(found[1])


def read_batch(path: Path) -> Iterator[Dumped]:
    """Yield the rollouts of a training batch, without rewards, which SkyRL removes; a prompt's are a group.

    Raises:
        InputError: it is too large, damaged, or not a batch of SkyRL.
    """
    step = step_of(path.name)
    if step is None:
        raise InputError(f"{path}: the name of a batch of SkyRL has its step, global_step_N_training_input.pkl")
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: larger than {LARGEST >> 30} GiB; no batch is")
    try:
        state = _Plain(io.BytesIO(path.read_bytes())).load()
        yield from _rollouts(state, step)
    except InputError:
        raise
    except Exception as error:  # whatever a stranger's bytes may lead to, such as a list in the place of a key
        raise InputError(f"{path}: no batch of SkyRL can be read there: {describe(error)}") from None


def _rollouts(state: Mapping[str, Any], step: int) -> Iterator[Dumped]:
    stored, told = state["batch_dict"], state["metadata"] or {}
    arrays = {name: _array(stored[name]) for name in _NEEDED if stored.get(name) is not None}
    missing = [name for name in ("sequences", "attention_mask", "response_mask") if name not in arrays]
    if missing:
        raise InputError(f"step {step}: a batch without {', '.join(missing)}")
    response = arrays["response_mask"].astype(bool)
    width = response.shape[1]
    sampled = response & arrays["loss_mask"].astype(bool) if "loss_mask" in arrays else response
    mean = (told.get("metrics") or {}).get("avg_final_rewards")
    for i in range(len(response) - int(told.get("pad_size", 0))):
        prompt = arrays["attention_mask"][i].astype(bool)
        prompt[len(prompt) - width :] &= ~response[i]
        of_row = {name: arrays[source][i][sampled[i]] for name, source in _COLUMNS.items() if source in arrays}
        ids = arrays["sequences"][i][len(prompt) - width :][sampled[i]]
        yield Dumped(
            step=step,
            group=blake2b(arrays["sequences"][i][prompt].tobytes(), digest_size=8).hexdigest(),
            reward=None,
            length=len(ids),
            reward_mean=None if mean is None else float(mean),
            token_ids=ids.astype(np.int64),
            **{name: values.astype(np.float32) for name, values in of_row.items()},
        )


_COLUMNS = {"behavior_logp": "rollout_logprobs", "logp": "action_log_probs", "advantages": "advantages"}
_NEEDED = ("sequences", "attention_mask", "response_mask", "loss_mask", *_COLUMNS.values())


def _array(stored: Mapping[str, Any]) -> Column:
    """Return the array that SkyRL's `_serialize_tensor` wrote."""
    if stored.get("format") == "torch":  # bfloat16, which NumPy does not have
        tensor = torch.load(io.BytesIO(stored["data"]), weights_only=True)
        return np.asarray(tensor.float().numpy())
    if stored["dtype"] not in _DTYPES:
        raise InputError(f"a batch with numbers of type {str(stored['dtype'])[:40]}")
    return np.frombuffer(stored["data"], dtype=stored["dtype"]).reshape(stored["shape"])


class _Evaluated(msgspec.Struct):
    input_prompt: str
    output_response: str
    score: float | list[float]
    stop_reason: str | None = None


def read_evaluation(path: Path) -> Iterator[Dumped]:
    """Yield the held-out rollouts of an evaluation's file; the step is in its folder's name.

    Raises:
        InputError: the folder's name has no step.
    """
    step = step_of(path.parent.name)
    if step is None:
        raise InputError(f"{path}: the folder of an evaluation of SkyRL has its step, global_step_N_evals")
    for _, row in read_lines(path, _Evaluated):
        yield Dumped(
            step=step,
            group=row.input_prompt,
            reward=sum(row.score) if isinstance(row.score, list) else row.score,
            length=len(row.output_response),
            prompt=row.input_prompt,
            text=row.output_response,
            cut=None if row.stop_reason is None else row.stop_reason == "length",
            held_out=True,
        )


_OPTIONS = {
    "--sampling.max-new-tokens": "generator.sampling_params.max_generate_length",
    "--sampling.samples": "generator.n_samples_per_prompt",
    "--sampling.temperature": "generator.sampling_params.temperature",
    "--updates": "trainer.update_epochs_per_batch",
    "--reference-kl": "trainer.algorithm.use_kl_loss",
    "--max-grad-norm": "trainer.policy.optimizer_config.max_grad_norm",
    "--reduction": "trainer.algorithm.loss_reduction",
}
_REMEDIES = {
    "reward": "SkyRL takes them out before it writes; a callback on its step has the generator's output",
    "finish_reason": "SkyRL's batch has none; the generator's output has stop_reasons",
    "behavior_logp": "generator.sampling_params.logprobs=1 has the engine return them",
    "logp": "SkyRL leaves the pass out for objectives that do not need it",
    "held_out": "trainer.dump_eval_results=true writes them; name the folder dumped_evals too",
}
BATCH = Format(
    name="SkyRL",
    version="0.4.0",
    suffix=".pkl",
    keys=frozenset(),
    read=read_batch,
    objective="ppo(0.2,0.2)",
    remedies=_REMEDIES,
    options=_OPTIONS,
)
EVALUATION = replace(
    BATCH,
    name="SkyRL's evaluations",
    suffix=".jsonl",
    keys=frozenset({"input_prompt", "output_response", "score", "stop_reason"}),
    read=read_evaluation,
)
