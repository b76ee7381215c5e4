"""Rollouts by vLLM in this process, with weights that are replaced in place after every update."""

import copy
import functools
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from drpo.errors import EngineError, InputError
from drpo.model.loading import named_tensors
from drpo.model.positions import Limit, sequence_limit
from drpo.model.precision import has_fast_bf16
from drpo.rollout.vllm_request import parameters, read_generation, require_vocabulary
from drpo.rollout.vllm_worker import EXTENSION
from drpo.rollout.weight_sync import WeightSync
from drpo.types import Generation, Request, Sampling

log = logging.getLogger("drpo")

TESTED = "0.32"
"""The series of vLLM releases that the tests are run with; another one is used with a warning."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

CPU_CACHE_BYTES = 2 * 2**30
"""Keys and values on a CPU, unless VLLM_CPU_KVCACHE_SPACE says otherwise; memory is used as the cache fills."""

GPU_MEMORY_SHARE = 0.4
"""Of a GPU's memory that vLLM takes, weights and cache; the trainer needs the rest."""


class VLLMEngine:
    """Samples with vLLM's own copy of a model, in the trainer's process.

    Log-probabilities are those of the distribution that vLLM sampled from, temperature and truncation included. Every
    request has a seed of its own, so that the same key draws the same tokens as long as the logits are the same (see
    `TransformersEngine`).

    Where the process has joined others (torch.distributed), all of them must make their engines together; afterwards
    each asks its own whenever it likes.

    On a GPU that the trainer shares, vLLM sleeps between rollouts: its weights go to main memory and its cache is given
    up. *That, and fp8, have not been run: no GPU was at hand.*

    Args:
        model: the model to copy; left as it is. Its device says whether vLLM should be one for CPUs or for GPUs.
        precision: of the copy: auto, bf16, fp16, fp32, and on a GPU of compute capability 8.9 or newer fp8 (vLLM's own:
            weights and activations, scales made when weights arrive).

    Attributes:
        version: of the weights.

    Raises:
        InputError: vLLM is missing, or cannot run the model at this precision on this machine.
    """

    def __init__(self, model: PreTrainedModel, *, precision: str = "auto") -> None:
        self._weight_sync, self._vocabulary = WeightSync(model), int(model.config.get_text_config().vocab_size)
        self.version = 0
        self._sleeps = model.device.type == "cuda"
        self._asleep = False
        self._failed: EngineError | None = None
        numerics = {**precision_options(precision, model.device), **length_options(sequence_limit(model))}
        shared = {"gpu_memory_utilization": GPU_MEMORY_SHARE, "enable_sleep_mode": True} if self._sleeps else {}
        several = {"distributed_executor_backend": "external_launcher"} if _world_size() > 1 else {}
        with (
            tempfile.TemporaryDirectory(prefix="drpo-vllm-") as folder,  # vLLM reads it once, while it starts
            _place(model.device),
        ):
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
            self._llm = _start(folder, {**numerics, **device_options(model.device), **shared, **several})
        try:
            self.load_weights(named_tensors(model), version=0)
            self._try()
        except Exception as error:
            self.close()
            raise _unfit(type(model).__name__, error) from error

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Return what was sampled for each request, in order.

        Raises:
            InputError: a prompt leaves no room for an answer, or vLLM's output cannot be used.
            EngineError: vLLM failed.
        """
        require_vocabulary(requests, self._vocabulary)
        longest = int(self._llm.llm_engine.model_config.max_model_len)
        for request in requests:
            if len(request.prompt_ids) >= longest:
                raise InputError(
                    f"{request.name}: its prompt has {len(request.prompt_ids)} tokens, which leaves no room for an "
                    f"answer in the {longest} that vLLM has room for"
                )
        try:
            outputs = self._ask(requests)
        except Exception as error:  # whatever it is, it came from within vLLM, which is of no use afterwards
            self._failed = _broken("sampled", error)
            raise self._failed from error
        return [self._read(request, output) for request, output in zip(requests, outputs, strict=True)]

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Put new weights into the live model, forget all cached keys and values, and stamp the version.

        Raises:
            EngineError: vLLM failed, perhaps before, in the background, where nobody has heard of it yet.
        """
        if self._failed is not None:  # its unfinished requests would be found by another check, with another word
            raise self._failed
        weights = self._weight_sync.checkpoint(state)
        try:
            self._wake()
            self._llm.collective_rpc("drpo_load", args=(list(weights.items()),))
        except Exception as error:  # as in `generate`
            self._failed = _broken("took the weights", error)
            raise self._failed from error
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, whose keys are those of the old weights")
        self.version = version

    def close(self) -> None:
        """Shut vLLM down, and give back its memory."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            _vllm().distributed.cleanup_dist_env_and_memory()

    def _ask(self, requests: Sequence[Request]) -> list[Any]:
        """vLLM's output for each request, in order."""
        self._wake()
        how = [_vllm().SamplingParams(**parameters(r), flat_logprobs=True) for r in requests]
        outputs = self._llm.generate(
            [{"prompt_token_ids": r.prompt_ids.tolist()} for r in requests], how, use_tqdm=False
        )
        self._sleep()
        return [output.outputs[0] for output in outputs]

    def _read(self, request: Request, output: Any) -> Generation:
        """Log-probabilities stand in one row a position: the sampled token's, then the top ones."""
        columns: dict[str, Any] = {"logp": None}
        if (reported := output.logprobs) is not None:
            rows = zip(reported.start_indices, reported.end_indices, strict=True)
            pairs = [[*zip(reported.token_ids[a:b], reported.logprobs[a:b], strict=True)] for a, b in rows]
            columns = {"logp": [row[0][1] for row in pairs], "top": [row[1:] for row in pairs]}
        return read_generation(
            request,
            token_ids=output.token_ids,
            finish_reason=output.finish_reason,
            vocabulary=self._vocabulary,
            version=self.version,
            **columns,
        )

    def _try(self) -> None:
        """Draw one token: some models are refused by their attention kernel only then."""
        self._ask([Request(torch.tensor([0]), Sampling(max_new_tokens=1), frozenset(), key=(0, "trial"))])

    def _sleep(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False


def precision_options(precision: str, device: torch.device) -> dict[str, Any]:
    """Return vLLM's options for a precision on a device.

    Raises:
        InputError: a precision that vLLM does not have there.

    Example:
        >>> precision_options("bf16", torch.device("cpu"))
        {'dtype': 'bfloat16'}
    """
    if precision == "auto":
        return {"dtype": "bfloat16" if has_fast_bf16(device) else "float32"}
    if precision in DTYPES:
        return {"dtype": DTYPES[precision]}
    if precision != "fp8":
        known = ", ".join(("auto", *DTYPES, "fp8"))
        raise InputError(
            f"rollout_precision={precision!r}: vLLM samples with {known}; set one of them, or --engine transformers"
        )
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError(
            "rollout_precision='fp8': vLLM has it on GPUs of compute capability 8.9 or newer only, which this machine "
            "does not have; set --rollout-precision bf16, or --engine transformers"
        )
    return {"dtype": "bfloat16", "quantization": "fp8"}


def length_options(limit: Limit) -> dict[str, Any]:
    """Return vLLM's options for a model whose rotary embedding has a limit.

    vLLM chooses longrope's factors once, by the longest sequence that it makes room for, and scales `dynamic` always.

    Raises:
        InputError: vLLM computes the embedding otherwise at every length.

    Example:
        >>> length_options(Limit()), length_options(Limit(4096, "longrope"))
        ({}, {'max_model_len': 4096})
    """
    if limit.tokens is None:
        return {}
    if limit.kind != "longrope":
        raise InputError(
            f"engine='vllm': it computes {limit.kind} rotary embeddings otherwise than the trainer; set --engine "
            "transformers"
        )
    return {"max_model_len": limit.tokens}


def device_options(device: torch.device) -> dict[str, Any]:
    """Return the options that vLLM needs on this kind of device.

    Example:
        >>> device_options(torch.device("cpu"))["enable_chunked_prefill"]
        False
    """
    if device.type != "cpu":
        return {}
    # A prompt that is read in parts draws random numbers that must be taken back, which a CPU's generator cannot do
    # (vLLM 0.32 ends with "CPU Generator does not use offset").
    return {"kv_cache_memory_bytes": CPU_CACHE_BYTES, "enable_chunked_prefill": False}


def _start(folder: str, options: Mapping[str, Any]) -> Any:
    """vLLM's LLM over the model whose configuration is in the folder, its weights yet to come."""
    with _threads_kept(), warnings.catch_warnings(action="ignore", category=FutureWarning):
        vllm = _vllm()
        try:
            return vllm.LLM(
                model=folder,
                skip_tokenizer_init=True,
                load_format="dummy",
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                max_logprobs=-1,
                enable_prefix_caching=True,
                worker_extension_cls=EXTENSION,
                seed=0,
                **{"max_model_len": -1, **options},  # -1: the model's own, or what the cache has room for
            )
        except Exception as error:  # whatever it is, it is this model or machine that vLLM cannot use
            raise _unfit("the model", error) from error


@functools.cache
def _vllm() -> Any:
    """The module, set to work in this process, to be quiet and to report nothing to its makers."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Twice: vLLM reads the variable once it is imported, and says some things before.
    logging.getLogger("vllm").setLevel(os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR"))
    try:
        import vllm  # noqa: PLC0415 (an optional backend)
    except ImportError as error:
        raise InputError(
            f"engine='vllm': vLLM cannot be imported ({error}); docs/vllm.md says how to install it, or set "
            "--engine transformers"
        ) from None
    warn_untested(vllm.__version__)
    _spare_world()
    return vllm


@contextmanager
def _threads_kept() -> Iterator[None]:
    """On a CPU vLLM sets torch's threads to one and puts a function that does nothing in place of `set_num_threads`."""
    function, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = function
        torch.set_num_threads(threads)


def _world_size() -> int:
    """Processes that have joined one another, this one included."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def _place(device: torch.device) -> Iterator[None]:
    """Tell vLLM, which in a world of several processes asks the launcher's variables, which of them this is.

    The launcher's LOCAL_RANK counts the node's devices; vLLM takes it for an index into those that the process sees.
    """
    if _world_size() == 1:
        yield
        return
    ours = {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(device.index or 0)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _spare_world() -> None:
    """Let vLLM destroy torch's default group only where it made it, a world of one.

    It does so whenever an engine ends, one that is merely collected included; the trainer's processes go on.
    """
    from vllm.distributed import parallel_state as state  # noqa: PLC0415 (an optional backend)

    destroy_all, destroy_group = state.destroy_distributed_environment, dist.destroy_process_group

    def destroy() -> None:
        if _world_size() > 1:
            dist.destroy_process_group = lambda group=None: None if group is None else destroy_group(group)
        try:
            destroy_all()
        finally:
            dist.destroy_process_group = destroy_group

    state.destroy_distributed_environment = destroy


@functools.cache
def warn_untested(version: str) -> None:
    """Say, once for each version, that it is not one that the tests are run with."""
    if not version.startswith(f"{TESTED}."):
        log.warning(
            "vLLM %s: drpo is tested with %s.x only; `make test-vllm` tells whether this one works", version, TESTED
        )


def _unfit(model: str, error: Exception) -> InputError:
    reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    return InputError(f"engine='vllm': vLLM cannot run {model} here ({reason.strip()}); set --engine transformers")


def _broken(doing: str, error: Exception) -> EngineError:
    logging.getLogger("vllm").info("vLLM failed while it %s", doing, exc_info=error)
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return EngineError(
        f"engine='vllm': vLLM failed while it {doing} ({type(error).__name__}: {reason}); VLLM_LOGGING_LEVEL=INFO "
        "shows where"
    )
