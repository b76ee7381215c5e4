"""The adapter of a run in PEFT's format: what training added to the base model, and which model that is."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.errors import InputError
from drpo.files import set_usual_mode
from drpo.lazily import lazily
from drpo.model.policy import Policy
from drpo.model.saving import probe

peft = lazily("peft")

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""Of a tensor's name in PEFT's files."""


def write_adapter(
    policy: Policy,
    base: PreTrainedModel,
    base_name: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a policy's adapter as PEFT reads it, read it back onto the base model, and compare logits.

    Args:
        policy: trained with `lora_rank`.
        base: the model without adapters, loaded anew; it gets them.
        base_name: how others find that model.
        tokenizer: the model's, with the chat template of the run.
        folder: to write into; it exists and is empty.
        dtype: of the file's tensors.

    Raises:
        InputError: the policy has no adapters, or another function is read back.
    """
    tensors = adapter_tensors(policy.model)
    if not tensors:
        raise InputError("--adapter: the run trained all weights (lora_rank=0), so there is no adapter; leave it out")
    config: Any = copy.copy(policy.model.peft_config["default"])
    config.target_modules, config.exclude_modules = _targets(policy.model), None
    config.base_model_name_or_path, config.task_type, config.inference_mode = base_name, "CAUSAL_LM", True
    save_file({name: t.to(dtype).contiguous() for name, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    set_usual_mode(folder / WEIGHTS)
    _require_same(policy, base, folder, 1e-4 if dtype == torch.float32 else 0.1)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's adapters by their names in PEFT's files, on the CPU.

    Args:
        model: with adapters injected under PEFT's default name; without any, nothing is returned.
    """
    state: Mapping[str, Tensor] = model.state_dict()
    return {_PREFIX + name.replace(".default", ""): t.cpu() for name, t in state.items() if ".lora_" in name}


def _targets(model: nn.Module) -> list[str]:
    """The names of the adapted layers: their last parts where these name no other layer, else whole."""
    layer: Any = peft.tuners.lora.LoraLayer
    adapted = {name for name, module in model.named_modules() if isinstance(module, layer)}
    inside = tuple(f"{name}." for name in adapted)
    others = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(inside)} - adapted
    last = {name.rpartition(".")[2] for name in adapted}
    return sorted(adapted if last & {name.rpartition(".")[2] for name in others} else last)


@torch.no_grad()
def _require_same(policy: Policy, base: PreTrainedModel, folder: Path, tolerance: float) -> None:
    """Raise unless base model and adapter, read back, have the policy's logits."""
    ids = probe(base)
    expected = policy.logits(ids)
    try:
        adapted: Any = peft.PeftModel.from_pretrained(base, folder)
        logits = adapted.eval()(input_ids=ids[None].to(base.device), use_cache=False).logits[0].float().cpu()
    except Exception as error:  # any error means that PEFT does not read it
        raise InputError(f"{folder}: PEFT cannot read the adapter back ({str(error).strip()[:200]})") from None
    gap, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    if not gap <= tolerance * largest:
        raise InputError(
            f"{folder}: base model and adapter have other logits than the trained policy (by {gap:.3g}, largest "
            f"{largest:.3g}); do not use it; without --adapter the whole model is written"
        )
