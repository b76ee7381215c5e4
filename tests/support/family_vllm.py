"""What vLLM makes of the folders that are saved of each family: the column vLLM of the table in docs/models.md.

`PYTHONPATH=tests .venv-vllm/bin/python -m support.family_vllm` writes it anew, or only the rows of the families named
behind, and prints why vLLM did not load a folder.
"""

import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.lazily import lazily
from drpo.model import loading
from drpo.model.positions import sequence_limit
from drpo.model.saving import save_model
from drpo.rollout.cache import is_recurrent
from drpo.rollout.vllm import _vllm, device_options, length_options
from support.families import FAMILIES, PROBLEMS, build
from support.family_table import documented, trains, write
from support.forks import fork
from support.tiny_world import completion, own_logp

lora = lazily("vllm.lora.request")

TOLERANCE = 1e-3
"""Nats between vLLM and plain transformers, both in float32."""
FOUND = "largest difference: "


def listed(family: str) -> str:
    """ "known" where the class is in vLLM's list of architectures, else "no"."""
    architecture = documented()[family]["class"].strip("`")
    return "known" if architecture in _vllm().ModelRegistry.get_supported_archs() else "no"


def cell(family: str, folder: Path) -> tuple[str, str]:
    """What the table says, and what vLLM said last."""
    _, said = fork(folder / "out", load, family, folder / "model").end()
    gap = next((float(line.removeprefix(FOUND)) for line in said.splitlines() if line.startswith(FOUND)), None)
    last = (said.strip().splitlines() or ["nothing"])[-1]
    if gap is None:
        return listed(family), last
    return "loaded" if gap < TOLERANCE else "differs", last


def load(family: str, folder: Path) -> None:
    """Save a family's folder, let vLLM read it and sample, and print how far it is from plain transformers."""
    model, (_, tokenizer) = build(family, wider=True), loading.tiny()
    save_model(model, tokenizer, folder)
    print(f"\n{FOUND}{largest_difference(folder, model, tokenizer)}", flush=True)


def largest_difference(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Path | None = None
) -> float:
    """How far vLLM's log-probabilities of what it samples are from those of a plain forward pass, in nats.

    The forward pass is another process's: vLLM changes transformers' own classes in the process that it runs in.

    Args:
        folder: that vLLM reads.
        model: that it should be.
        tokenizer: its tokenizer.
        adapter: a LoRA's folder, beside the model of `folder`.
    """
    with get_context("fork").Pool(1) as plain:
        drawn = _sampled(folder, model, [tokenizer(problem.prompt)["input_ids"] for problem in PROBLEMS], adapter)
        return max(plain.apply(_difference, (model, *row)) for row in drawn)


Row = tuple[list[int], list[int], list[float]]
"""A prompt, the tokens sampled after it, and their log-probabilities as vLLM reports them."""


def _difference(model: PreTrainedModel, prompt_ids: list[int], tokens: list[int], reported: list[float]) -> float:
    logp = own_logp(model, completion(tokens, prompt_ids=prompt_ids), 1.0)
    return float((torch.tensor(reported) - logp).abs().max())


def _sampled(folder: Path, model: PreTrainedModel, prompts: list[list[int]], adapter: Path | None) -> list[Row]:
    vllm = _vllm()
    llm = vllm.LLM(
        model=str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        enforce_eager=True,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        seed=0,
        **({} if adapter is None else {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}),
        **{
            "max_model_len": 128,
            **length_options(sequence_limit(model)),
            **device_options(model.device, recurrent=is_recurrent(model)),
            "kv_cache_memory_bytes": 2**27,
        },
    )
    settings = vllm.SamplingParams(
        temperature=1.0, max_tokens=10, logprobs=0, seed=0, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        settings,
        use_tqdm=False,
        lora_request=None if adapter is None else lora.LoRARequest("trained", 1, str(adapter)),
    )
    rows = [(ids, output.outputs[0]) for ids, output in zip(prompts, outputs, strict=True)]
    return [
        (ids, list(out.token_ids), [row[t].logprob for row, t in zip(out.logprobs, out.token_ids, strict=True)])
        for ids, out in rows
    ]


if __name__ == "__main__":
    for name in sys.argv[1:] or [family for family, row in documented().items() if trains(row)]:
        assert name in FAMILIES, name
        with tempfile.TemporaryDirectory() as scratch:
            said, why = cell(name, Path(scratch))
        write({name: {"vLLM": said}})
        print(f"{name}: {said}: {why}", flush=True)
