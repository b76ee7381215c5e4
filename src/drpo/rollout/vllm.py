"""Rollouts by vLLM in this process, with weights synced in place after every update."""

import copy
import functools
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drpo.errors import EngineError, InputError
from drpo.model.loading import named_tensors
from drpo.model.positions import Limit, sequence_limit
from drpo.model.precision import has_fast_bf16
from drpo.model.routing import experts_by_layer
from drpo.rollout.cache import is_recurrent
from drpo.rollout.routes import with_shared_prompts
from drpo.rollout.vllm_patches import (
    EXTENSION,
    launcher_variables,
    spare_world,
    threads_kept,
    transformers_kept,
    world_size,
)
from drpo.rollout.vllm_request import parameters, read_generation, require_known
from drpo.rollout.weight_sync import WeightSync
from drpo.types import Generation, Request, Sampling

log = logging.getLogger("drpo")

TESTED = "0.32"
"""The series of vLLM releases that the tests run with; other releases cause a warning."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

CPU_CACHE_BYTES = 2 * 2**30
"""Bytes of the key-value cache on a CPU, unless VLLM_CPU_KVCACHE_SPACE is set; memory is used as the cache fills."""

GPU_MEMORY_SHARE = 0.4
"""Share of a GPU's memory for vLLM's weights and cache; the trainer needs the rest."""


class VLLMEngine:
    """Samples with vLLM's own copy of a model, in the trainer's process.

    Log-probabilities are those of the distribution that vLLM sampled from, after temperature and truncation. Every
    request has its own seed, so the same key samples the same tokens if the logits are the same (see
    `TransformersEngine`).

    With several processes (torch.distributed), all ranks must create their engines together; afterwards each rank uses
    its engine independently.

    Later turns of an episode find their prompt's beginning in vLLM's prefix cache, which is reset when weights are
    loaded and not before.

    On a GPU shared with the trainer, vLLM sleeps between rollouts, but not between the turns of one: its weights move
    to main memory and its cache is released. *This and fp8 are untested: no GPU was available.*

    Args:
        model: the model to copy; it does not change. Its device selects vLLM's CPU or GPU build.
        precision: the copy's: auto, bf16, fp16, fp32, and on a GPU of compute capability 8.9 or newer fp8 (vLLM's
            weights and activations, with scales computed when weights are loaded).
        routes: report the experts that a mixture's routers choose (`Generation.routes`).

    Attributes:
        version: the weights' version.
        later_tokens: prompt tokens of all later turns so far.
        cached_tokens: how many of these vLLM found in its prefix cache.

    Raises:
        InputError: vLLM is missing, or cannot run the model at this precision on this machine; or routes of a model
            without experts, or of a vLLM that does not report them.
    """

    def __init__(self, model: PreTrainedModel, *, precision: str = "auto", routes: bool = False) -> None:
        self._experts = experts_by_layer(model) if routes else None
        self._weight_sync, self._vocabulary = WeightSync(model), int(model.config.get_text_config().vocab_size)
        self.version = 0
        self.later_tokens, self.cached_tokens = 0, 0
        self._sleeps = model.device.type == "cuda"
        self._asleep = False
        self._failed: EngineError | None = None
        numerics = {**precision_options(precision, model.device), **length_options(sequence_limit(model))}
        shared = {"gpu_memory_utilization": GPU_MEMORY_SHARE, "enable_sleep_mode": True} if self._sleeps else {}
        several = {"distributed_executor_backend": "external_launcher"} if world_size() > 1 else {}
        with (
            tempfile.TemporaryDirectory(prefix="drpo-vllm-") as folder,  # vLLM reads it once, while it starts
            launcher_variables(model.device),
        ):
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
            options = {**numerics, **device_options(model.device, recurrent=is_recurrent(model)), **shared, **several}
            self._llm = _start(folder, options, routes)
        try:
            self.load_weights(named_tensors(model), version=0)
            self._try()
        except Exception as error:
            self.close()
            raise _unfit(type(model).__name__, error) from error

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Return one generation per request, in order.

        Raises:
            InputError: a prompt leaves no room for an answer, or vLLM's output is invalid.
            EngineError: vLLM failed.
        """
        require_known(requests, self._vocabulary)
        longest = int(self._llm.llm_engine.model_config.max_model_len)
        for request in requests:
            if len(request.prompt_ids) >= longest:
                raise InputError(
                    f"{request.name}: its prompt has {len(request.prompt_ids)} tokens, which leaves no room for an "
                    f"answer in the {longest} that vLLM has room for"
                )
        try:
            outputs = self._ask(requests)
        except BaseException as error:  # it cannot be used afterwards: requests may be unfinished
            self._failed = _broken("sampled", error)
            if isinstance(error, Exception):
                raise self._failed from error
            raise
        return with_shared_prompts([self._read(r, output) for r, output in zip(requests, outputs, strict=True)])

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Load new weights into the live model, clear the key-value cache, and set the version.

        Raises:
            EngineError: vLLM failed, now or in an earlier call.
        """
        if self._failed is not None:  # else its unfinished requests would raise a less clear error below
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

    def release(self) -> None:
        """Let vLLM sleep, if it shares a GPU; tell how much of the later turns' prompts was cached."""
        if self.later_tokens:
            share = self.cached_tokens / self.later_tokens
            log.debug("vLLM's prefix cache had %.0f %% of the prompts of later turns so far", 100 * share)
        if self._failed is None:
            self._sleep()

    def close(self) -> None:
        """Shut vLLM down and release its memory."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            _vllm().distributed.cleanup_dist_env_and_memory()

    def _ask(self, requests: Sequence[Request]) -> list[Any]:
        """Return vLLM's output for each request, in order."""
        self._wake()
        sampling = [_vllm().SamplingParams(**parameters(r), flat_logprobs=True) for r in requests]
        prompts = [{"prompt_token_ids": r.prompt_ids.tolist()} for r in requests]
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        if not any(r.goes_on for r in requests):  # else `release` follows
            self._sleep()
        for request, output in zip(requests, outputs, strict=True):
            if request.after is not None:
                self.later_tokens += len(request.prompt_ids)
                self.cached_tokens += output.num_cached_tokens or 0
        return [output.outputs[0] for output in outputs]

    def _read(self, request: Request, output: Any) -> Generation:
        """Return the generation of an output; its row of each position holds the sampled token, then the top ones."""
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
            chosen=output.routed_experts if self._experts else None,
            experts=self._experts,
            **columns,
        )

    def _try(self) -> None:
        """Sample one token: some attention kernels reject a model only then, and routes may be missing."""
        request = Request(torch.tensor([0]), Sampling(max_new_tokens=1), frozenset(), key=(0, "trial"))
        self._read(request, self._ask([request])[0])

    def _sleep(self) -> None:
        if self._sleeps and not self._asleep:
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

    vLLM chooses longrope's factors once, by its maximum sequence length, and always scales `dynamic`.

    Raises:
        InputError: vLLM computes the embedding differently at every length.

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


def device_options(device: torch.device, *, recurrent: bool = False) -> dict[str, Any]:
    """Return the options that vLLM needs on this kind of device.

    Args:
        device: the device.
        recurrent: the model has layers with a recurrent state.

    Raises:
        InputError: a device that vLLM does not have.

    Example:
        >>> device_options(torch.device("cpu"))["enable_chunked_prefill"]
        False
    """
    if device.type == "mps":
        raise InputError("engine='vllm': it has no Apple GPU; set --device cpu, or --engine transformers")
    if device.type != "cpu":
        return {}
    # Chunked prefill rewinds the random generator, which is impossible on a CPU (vLLM 0.32 raises "CPU Generator does
    # not use offset").
    options = {"kv_cache_memory_bytes": CPU_CACHE_BYTES, "enable_chunked_prefill": False}
    # Without it vLLM does not cache the states of a prefix.
    return options | ({"enable_prefix_caching": False} if recurrent else {})


def routes_options(vllm: Any) -> dict[str, Any]:
    """Return the options with which vLLM reports the experts that its routers choose.

    Raises:
        InputError: this version does not.
    """
    name = "enable_return_routed_experts"
    if not hasattr(vllm.EngineArgs, name):
        raise InputError(
            f"routing_replay=sampler: vLLM {vllm.__version__} does not report which experts its routers choose; "
            f"{TESTED} does; install it, or set --engine transformers"
        )
    return {name: True}


def _start(folder: str, options: Mapping[str, Any], routes: bool) -> Any:
    """Return vLLM's LLM for the configuration in a folder, with dummy weights."""
    with threads_kept(), warnings.catch_warnings(action="ignore", category=FutureWarning):
        vllm = _vllm()
        reports = routes_options(vllm) if routes else {}
        try:
            with transformers_kept() as changed:
                llm = vllm.LLM(
                    model=folder,
                    skip_tokenizer_init=True,
                    load_format="dummy",
                    generation_config="vllm",
                    logprobs_mode="processed_logprobs",
                    max_logprobs=-1,
                    worker_extension_cls=EXTENSION,
                    seed=0,
                    # -1: the model's, or as much as fits into the cache
                    **{"enable_prefix_caching": True, "max_model_len": -1, **options, **reports},
                )
                llm.collective_rpc("drpo_own_classes", args=(changed,))
                return llm
        except Exception as error:  # any error means that vLLM does not support this model or machine
            raise _unfit("the model and report its experts" if routes else "the model", error) from error


@functools.cache
def _vllm() -> Any:
    """Import vLLM, configured to run in this process, quietly and without usage statistics."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Both are needed: vLLM reads the variable at import, and logs some lines before.
    logging.getLogger("vllm").setLevel(os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR"))
    try:
        import vllm  # noqa: PLC0415 (an optional backend)
    except ImportError as error:
        raise InputError(
            f"engine='vllm': vLLM cannot be imported ({error}); docs/vllm.md says how to install it, or set "
            "--engine transformers"
        ) from None
    warn_untested(vllm.__version__)
    spare_world()
    return vllm


@functools.cache
def warn_untested(version: str) -> None:
    """Warn, once per version, if the tests do not run with it."""
    if not version.startswith(f"{TESTED}."):
        log.warning(
            "vLLM %s: drpo is tested with %s.x only; `make test-vllm` tells whether this one works", version, TESTED
        )


def _unfit(model: str, error: Exception) -> InputError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    refused = re.search(
        r"(?:Value error|Assertion failed), (.+?)(?: \[type=|$)", str(error), flags=re.M
    )  # pydantic's last line is a link
    reason = refused[1] if refused else lines[-1] if lines else type(error).__name__
    return InputError(f"engine='vllm': vLLM cannot run {model} here ({reason.strip()}); set --engine transformers")


def _broken(doing: str, error: BaseException) -> EngineError:
    logging.getLogger("vllm").info("vLLM failed while it %s", doing, exc_info=error)
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return EngineError(
        f"engine='vllm': vLLM failed while it {doing} ({type(error).__name__}: {reason}); VLLM_LOGGING_LEVEL=INFO "
        "shows where"
    )
