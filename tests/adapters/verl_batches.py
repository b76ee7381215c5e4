"""Rows for verl's worker, and the loss that it should have on them."""

import math

import torch
from torch import Tensor

from adapters import verl_on_cpu as cpu
from drpo import objectives
from drpo.spec import parse_spec


def sampled(seed: int) -> tuple[list[Tensor], list[Tensor], dict[str, list[Tensor]]]:
    """Four rows of unequal length with made-up scores, and with the last token of a row masked."""
    draw = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, cpu.VOCABULARY, (n,), generator=draw) for n in (3, 5, 4, 3)]
    responses = [torch.randint(0, cpu.VOCABULARY, (n,), generator=draw) for n in (6, 2, 7, 4)]
    columns: dict[str, list[Tensor]] = {"old_log_probs": [], "advantages": [], "response_mask": []}
    for i, response in enumerate(responses):
        near_uniform = math.log(1 / cpu.VOCABULARY) + 0.3 * torch.randn(len(response), generator=draw)
        columns["old_log_probs"].append(near_uniform)
        columns["advantages"].append(torch.full((len(response),), (1.0, -0.7, 0.4, -0.2)[i]))
        columns["response_mask"].append(torch.arange(len(response)) < len(response) - (i == 2))
    return prompts, responses, columns


def directly(model: torch.nn.Module, batch: tuple, spec: str) -> Tensor:
    """The token mean of the objective, row by row, without anything of verl."""
    prompts, responses, columns = batch
    summed, count = torch.zeros(()), 0
    for prompt, response, mu, a, keep in zip(prompts, responses, *columns.values(), strict=True):
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logp = logits.float().log_softmax(-1).gather(1, response[:, None])[:, 0]
        tokens = objectives.Tokens(logp, mu, a, keep, torch.zeros_like(response))
        summed = summed + objectives.total(parse_spec(spec, objectives.REGISTRY), tokens, keep.float())
        count += int(keep.sum())
    return summed / count


def full(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
