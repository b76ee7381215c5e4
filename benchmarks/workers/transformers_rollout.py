"""Rollouts of `transformers`' own generate, without log-probabilities."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.workers.measure import Meter
from benchmarks.workers.protocol import Record, Repetition, serve

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Load the model; a request has "prompts", "samples", "new_tokens", "round"."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(setup["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(setup["model"], dtype=DTYPES[setup["precision"]]).eval().to(device)
    pad = tokenizer.pad_token_id
    # The folder's own would end rows early, and would fill in what a request's configuration leaves out.
    model.generation_config = GenerationConfig(pad_token_id=pad)
    meter = Meter()

    @torch.inference_mode()
    def repetition(request: Mapping[str, Any]) -> Record:
        n = request["new_tokens"]
        how = GenerationConfig(do_sample=True, top_p=1.0, top_k=0, temperature=1.0, max_new_tokens=n, pad_token_id=pad)
        torch.manual_seed(request["round"])
        meter.start()
        texts = [_rendered(tokenizer, p) for p in request["prompts"] for _ in range(request["samples"])]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        out = model.generate(**batch, generation_config=how)[:, batch["input_ids"].shape[1] :]
        tokenizer.batch_decode(out, skip_special_tokens=True)
        return {**meter.stop(), "tokens": out.numel()}

    return {"settings": f"transformers {transformers.__version__}; no log-probabilities"}, repetition


def _rendered(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


if __name__ == "__main__":
    serve(prepare)
