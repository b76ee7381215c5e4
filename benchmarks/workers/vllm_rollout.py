"""Rollouts of vLLM in process, with the log-probability of every sampled token, which training needs."""

from collections.abc import Mapping
from typing import Any

import vllm
from vllm import LLM, SamplingParams

from benchmarks.workers.measure import Meter
from benchmarks.workers.protocol import Record, Repetition, serve

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Load the model; a request has "prompts", "samples", "new_tokens", "round"."""
    llm = LLM(
        model=setup["model"],
        dtype=DTYPES[setup["precision"]],
        max_model_len=setup["max_length"],
        max_num_seqs=setup["max_rows"],
        seed=0,
    )
    meter = Meter()

    def repetition(request: Mapping[str, Any]) -> Record:
        how = SamplingParams(
            n=request["samples"],
            max_tokens=request["new_tokens"],
            temperature=1.0,
            ignore_eos=True,
            logprobs=0,  # of the sampled token alone
            seed=None,
        )
        llm.reset_prefix_cache()  # what earlier rounds read, as after new weights; a prompt's samples share it still
        messages = [[{"role": "user", "content": p}] for p in request["prompts"]]
        meter.start()
        outputs = llm.chat(messages, how, use_tqdm=False)
        record = meter.stop()
        return {**record, "tokens": sum(len(c.token_ids) for o in outputs for c in o.outputs)}

    about = f"vLLM {vllm.__version__}, in process, compiled, log-probability of every sampled token, prompts read anew"
    return {"settings": about}, repetition


if __name__ == "__main__":
    serve(prepare)
