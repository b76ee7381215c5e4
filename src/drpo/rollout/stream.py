"""Sampling one row token by token, for whoever reads along: the same tokens that `generate` returns at the end."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from drpo.model.device import has_float64
from drpo.rollout.decode import Decoder
from drpo.rollout.engine import generation
from drpo.rollout.sample import draw, top_logprobs, uniforms
from drpo.types import Request


@dataclass(frozen=True)
class SampledToken:
    """A token as it was sampled.

    Args:
        id: of the token.
        logp: its log-probability under the distribution that it was sampled from, nats, <= 0.
        top: ids and log-probabilities of the most probable tokens, the most probable first; empty unless requested.
    """

    id: int
    logp: float
    top: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def sampled_tokens(decoder: Decoder, request: Request, version: int) -> Iterator[SampledToken]:
    """Yield the tokens of one request as they are sampled, up to a stop token or `max_new_tokens`.

    Token t is drawn with the t-th random number of the request's key, as in `drpo.rollout.decode.draw_rows`.

    Args:
        decoder: has read the request's prompt, as its only row.
        request: the row.
        version: of the decoder's weights.

    Raises:
        BrokenLogpError: the model's logits are not finite.
    """
    sampling, logits = request.sampling, decoder.logits
    u = uniforms(request.key, sampling.max_new_tokens)
    u = u.to(logits.device) if has_float64(logits.device) else u
    for t in range(len(u)):
        token, logp = draw(logits, u[t : t + 1], sampling)
        top = top_logprobs(logits, sampling) if sampling.top_logprobs else None
        one = generation(request, token.cpu(), logp.cpu(), "length", version)  # which refuses what is not finite
        pairs = () if top is None else zip(top.ids[0].tolist(), top.logp[0].tolist(), strict=True)
        sampled = SampledToken(int(one.token_ids), float(one.behavior_logp), tuple(pairs))
        yield sampled
        if sampled.id in request.stop or t + 1 == len(u):
            return
        logits = decoder.step(token)
