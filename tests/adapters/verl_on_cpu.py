"""verl's own worker on a CPU: its FSDP engine registered for one, a tiny model, and batches as its trainer sends them.

Nothing of verl is changed. Import this before anything of verl.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["VERL_PLATFORM"] = "cpu"
os.environ["VERL_USE_EXTERNAL_MODULES"] = "adapters.verl_platform"
os.environ |= {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
# Processes that tests start, and Ray's workers, import that module too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed import init_process_group, is_initialized
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import TrainingWorker

VOCABULARY = 61


EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cpu")(FSDPEngineWithLMHead)


def tiny_model(path: str) -> None:
    """Write a Qwen2 of two layers and 61 words."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=VOCABULARY, tie_word_embeddings=False, **sizes, **heads)
    Qwen2ForCausalLM(config).save_pretrained(path)


def worker(path: str, store: str, learning_rate: float, rank: int = 0, n_ranks: int = 1) -> TrainingWorker:
    """verl's own worker around a model, with FSDP2 and AdamW, in float32; one of several where `n_ranks` says so."""
    os.environ |= {"WORLD_SIZE": str(n_ranks), "RANK": str(rank)}
    if not is_initialized():
        init_process_group("gloo", rank=rank, world_size=n_ranks, init_method=f"file://{store}")
    single = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    made = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=path,
                load_tokenizer=False,
                use_remove_padding=False,
                enable_gradient_checkpointing=False,
                override_config={"attn_implementation": "sdpa"},
            ),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                use_dynamic_bsz=False,
                micro_batch_size_per_gpu=2,
                infer_micro_batch_size_per_gpu=2,
                use_torch_compile=False,
                mixed_precision=single,
                dtype="float32",
            ),
            optimizer_config=FSDPOptimizerConfig(lr=learning_rate, weight_decay=0.0, clip_grad=1e9),
            checkpoint_config=CheckpointConfig(),
        )
    )
    made.reset()
    return made


def nested(rows: list[Tensor]) -> Tensor:
    """Rows of unequal length as verl holds them."""
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def batch_of(
    prompts: list[Tensor], responses: list[Tensor], columns: dict[str, list[Tensor]], **plain: Any
) -> TensorDict:
    """A mini-batch as verl's trainer sends it to its workers.

    Args:
        prompts: of each row, token ids.
        responses: of each row, token ids.
        columns: old_log_probs, advantages, response_mask: one value a token of the response.
        plain: what is not a tensor of rows, such as dp_size.
    """
    whole = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    tensors = {
        "prompts": nested(prompts),
        "responses": nested(responses),
        "input_ids": nested(whole),
        "position_ids": nested([torch.arange(len(row)) for row in whole]),
        "loss_mask": nested(columns["response_mask"]),
        **{name: nested(rows) for name, rows in columns.items()},
    }
    return tu.get_tensordict(tensors, non_tensor_dict=plain)


def with_this_python() -> dict[str, str]:
    """The environment in which `python` is the one that runs the tests."""
    return os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
