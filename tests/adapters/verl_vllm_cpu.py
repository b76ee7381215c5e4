"""vLLM's CPU build as verl's sampler; verl names this class in `engine_kwargs.vllm.worker_extension_cls`."""

from typing import Any

import vllm._custom_ops as ops
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


class PlainWeights(vLLMColocateWorkerExtension):
    """verl's own extension of vLLM's worker, and no packed copies of weights.

    On a CPU vLLM multiplies by packed copies and drops the weights, so that verl's `load_weights` has nothing to write
    to. Without oneDNN it multiplies by the weights themselves, as on a GPU.
    """

    def __new__(cls, **kwargs: Any) -> "PlainWeights":
        """Switch the packing off before the model is loaded."""
        ops._supports_onednn = False
        return super().__new__(cls, **kwargs)
