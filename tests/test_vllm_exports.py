"""`drpo export` for vLLM: a plain folder, and an adapter beside its base, give it the trained log-probabilities.

Run by `make test-vllm`.
"""

import json
from pathlib import Path

import pytest
import torch

from drpo.model import loading
from drpo.model.saving import save_model
from drpo.rollout.vllm import _vllm, device_options
from drpo.train import loop
from drpo.train.config import configure
from drpo.train.optim import AdamW
from support.forks import fork
from support.hostile import said
from support.tiny_world import small
from support.worlds import few_run

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it in .venv-vllm")
pytestmark = pytest.mark.vllm

FOUND = "log-probabilities: "
PROMPT = [7, 3, 201, 44, 90, 12, 55, 140, 3, 9]
TOLERANCE = 2e-4
"""Nats, in float32: as for rollouts (tests/test_vllm.py)."""


def read(folder: Path, adapter: Path | None) -> None:
    """Let vLLM read a folder, with an adapter, and print the log-probability of each token of the prompt."""
    vllm = _vllm()
    from vllm.lora.request import LoRARequest

    llm = vllm.LLM(
        model=str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        generation_config="vllm",
        enforce_eager=True,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        max_model_len=128,
        enable_lora=adapter is not None,
        **({} if adapter is None else {"max_lora_rank": 8}),
        **device_options(torch.device("cpu")) | {"kv_cache_memory_bytes": 2**27},
    )
    asked = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    beside = None if adapter is None else LoRARequest("trained", 1, str(adapter))
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], asked, lora_request=beside, use_tqdm=False)
    rows = zip(output.prompt_logprobs[1:], PROMPT[1:], strict=True)
    print(f"\n{FOUND}{json.dumps([row[token].logprob for row, token in rows])}", flush=True)


def of_vllm(scratch: Path, folder: Path, adapter: Path | None = None) -> torch.Tensor:
    _, out = fork(scratch / "out", read, folder, adapter).end()
    lines = [line for line in out.splitlines() if line.startswith(FOUND)]
    assert lines, out[-3000:]
    return torch.tensor(json.loads(lines[-1].removeprefix(FOUND)))


def of_transformers(folder: Path) -> torch.Tensor:
    model, ids = loading.load(str(folder))[0], torch.tensor(PROMPT)
    with torch.no_grad():
        logp = model(ids[None]).logits[0].float().log_softmax(-1)
    return logp[:-1].gather(1, ids[1:, None])[:, 0]


def export(run: Path, target: Path, *options: str) -> Path:
    status, _, err = said(["export", str(run), str(target), *options])
    assert status == 0, err
    return target


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(*small(tied=False), folder)
    return folder


@pytest.fixture(scope="module")
def lora(base: Path) -> Path:
    """A run of adapters, whose updates move every log-probability of the prompt."""
    run = configure(
        few_run(lora_rank=2, steps=2, optimizer=AdamW(3e-2)), model=str(base), checkpoint_every=1, eval_problems=0
    )
    loop.train(run, base.parent / "run")
    return base.parent / "run"


def test_vllm_computes_with_a_plain_export_as_transformers_does(lora: Path, base: Path, tmp_path: Path):
    plain = export(lora, tmp_path / "plain")
    trained = of_transformers(plain)
    assert float((trained - of_transformers(base)).abs().min()) > 10 * TOLERANCE
    assert float((of_vllm(tmp_path, plain) - trained).abs().max()) < TOLERANCE


def test_vllm_computes_with_an_adapter_beside_its_base_as_with_the_plain_export(lora: Path, base: Path, tmp_path: Path):
    adapter, plain = export(lora, tmp_path / "adapter", "--adapter"), export(lora, tmp_path / "plain")
    assert float((of_vllm(tmp_path, base, adapter) - of_transformers(plain)).abs().max()) < TOLERANCE
