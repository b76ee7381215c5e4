"""Rollouts in process with transformers: any causal LM, on any device, no server."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drpo.errors import InputError
from drpo.model.loading import persistent_buffers
from drpo.model.nf4 import dense_
from drpo.model.positions import narrowed
from drpo.model.precision import FP32, Precision, resolve_precision
from drpo.model.quantize import quantize_, unrounded_inputs
from drpo.model.routing import RouteRecorder
from drpo.rollout.cache import GroupCache
from drpo.rollout.decode import Decoder, GroupDecoder, PlainDecoder, draw_rows
from drpo.rollout.fused import Step, contiguous_input, fused_step
from drpo.rollout.prefill import common_prefix
from drpo.rollout.stream import SampledToken, sampled_tokens
from drpo.rollout.trial import Way, can_continue, can_fuse, can_share_prefix, way_to_decode
from drpo.rollout.turn_cache import Continued, TurnCache
from drpo.rollout.uncached import UncachedDecoder
from drpo.rollout.waiting import Waiting, by_kept_prompt, by_prompt
from drpo.types import Generation, Request

KEPT_BYTES = 4 * 2**30
"""Upper bound of what is kept between two turns; see `TurnCache`."""


class TransformersEngine:
    """Samples with its own copy of a model's weights, in its own precision: any causal LM.

    A prompt runs once, and adjacent requests with it share its keys and values, or copy its recurrent states; finished
    rows leave the batch, and waiting ones join it where prompts are shared (`Waiting`). The same key samples the same
    tokens in any batch *as long as the logits are the same*: the random numbers depend on the key alone, but a matrix
    product may round differently with another number of rows, and a draw within that rounding of a boundary (about 1e-6
    in float32, 1e-2 in bf16) then selects another token.

    Of a row that goes on (`Request.goes_on`) the keys and values are kept until the next call, and a request that
    continues it (`Request.after`) reads only what is new: the last sampled token, and what follows it.

    Args:
        model: the model to copy; it does not change.
        precision: the copy's precision.
        device: the copy's device.
        max_rows: upper bound of rows decoded together; more rows wait, and join when half of a batch has finished.
        kept_bytes: upper bound of what is kept between two calls.
        routes: report the experts that a mixture's routers choose (`Generation.routes`).

    Raises:
        InputError: the model has no layers for the precision, or no experts whose routes it could report.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        precision: Precision = FP32,
        device: torch.device | None = None,
        max_rows: int = 256,
        kept_bytes: int = KEPT_BYTES,
        routes: bool = False,
    ) -> None:
        self.model = copy.deepcopy(model).to(device or model.device).eval().requires_grad_(False)
        dense_(self.model, precision.dtype)
        self._loaders = quantize_(self.model, precision)
        self._recorder = RouteRecorder(self.model) if routes else None
        self._loaders |= {name: buffer.copy_ for name, buffer in persistent_buffers(self.model).items()}
        self.model.get_output_embeddings().register_forward_pre_hook(contiguous_input)  # after a prompt it is a slice
        self.version = 0
        self._max_rows, self._kept_bytes = max_rows, kept_bytes
        self._weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.way: Way | None = None  # None until tested on the first prompt
        self._continues: bool | None = None  # whether kept rows can go on; None until tested
        self._shares_prefix: bool | None = None  # whether what prompts begin with can be read once; None until tested
        self._fuses: bool | None = None  # whether a written-out step computes tokens; None until tested
        self._kept = TurnCache(kept_bytes)

    @property
    def decoding_step(self) -> str:
        """What computes a token, by `can_fuse`: "fused", or "model"; the same for every copy of a run's model."""
        if self._fuses is None:
            with narrowed(self.model):
                self._fuses = can_fuse(self.model)
        return "fused" if self._fuses else "model"

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Load new parameters and persistent buffers, by name, in the engine's precision, and set the version.

        What was kept of earlier turns is dropped: it was computed with the old weights.
        """
        self.release()
        for name in self._loaders:
            if name not in state:
                raise InputError(f"weights for the rollout engine lack {name!r}")
        for name, load in self._loaders.items():
            load(state[name])
        self.version = version

    def release(self) -> None:
        """Drop what was kept of earlier turns."""
        self._kept = TurnCache(self._kept_bytes)

    def close(self) -> None:
        """Do nothing."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Return one generation per request, in order.

        Raises:
            BrokenLogpError: the model's logits are not finite.
        """
        with nullcontext() if self._recorder is None else self._recorder.listening():
            return self._generated(requests)

    def stream(self, request: Request) -> Iterator[SampledToken]:
        """Yield the tokens of `generate([request])` one by one, as they are sampled.

        Several streams may be under way together if one alone is advanced at a time: each has a cache of its own.

        Raises:
            BrokenLogpError: the model's logits are not finite.
        """
        yield from sampled_tokens(self._decoder([request.prompt_ids], 1), request, self.version)

    def _generated(self, requests: Sequence[Request]) -> list[Generation]:
        before = self._kept
        self.release()
        generations: dict[int, Generation] = {}
        for settings in dict.fromkeys((r.sampling, r.stop) for r in requests):
            rows = {i: r for i, r in enumerate(requests) if (r.sampling, r.stop) == settings}
            continued = {i: c for i, r in rows.items() if (c := before.take(r)) is not None}
            anew = by_prompt({i: r.prompt_ids for i, r in rows.items() if i not in continued}, self._max_rows)
            more = partial(self._read, Waiting([by_kept_prompt(continued), anew], self._max_rows), continued, rows)
            while (batch := more()) is not None:
                keeps = self.way is Way.GROUPED and any(r.goes_on for r in rows.values())
                keeps = keeps and self._can_continue(requests[0].prompt_ids)
                self._forget_routes()
                generations |= draw_rows(*batch, self.version, self._kept if keeps else None, more)
        return [generations[i] for i in range(len(requests))]

    def _read(
        self,
        waiting: Waiting,
        continued: dict[int, Continued],
        requests: Mapping[int, Request],
        cache: GroupCache | None = None,
    ) -> tuple[Decoder, dict[int, Request]] | None:
        """Read the rows that join those of a cache, or begin a batch; None if there are none."""
        if not len(waiting):
            return None
        parts = waiting.take(*(() if cache is None else (len(cache.prompt), cache.n_joining(self._weight_bytes))))
        if not parts:
            return None
        rows = [i for part in parts for i in part]
        if rows[0] in continued:
            decoder = self._continuing([continued.pop(i) for i in rows])
        else:
            decoder = self._decoder([requests[part[0]].prompt_ids for part in parts], len(parts[0]))
        return decoder, {i: requests[i] for i in rows}

    @torch.inference_mode()
    def _decoder(self, prompts: Sequence[Tensor], samples: int) -> Decoder:
        """Read the prompts."""
        if self.way is None:
            with unrounded_inputs(self.model), narrowed(self.model):
                self.way = way_to_decode(self.model, prompts[0])
        prefix = self._prefix(prompts) if self.way is Way.GROUPED else 0
        self._forget_routes()
        if self.way is Way.GROUPED:
            return GroupDecoder.of_prompts(self.model, prompts, samples, prefix, self._recorder, self._step())
        if self.way is Way.PLAIN:
            return PlainDecoder(self.model, prompts, samples, self._recorder)
        if self._recorder is not None:
            raise InputError(
                f"{type(self.model).__name__} is sampled without a cache, where the choices of its routers are not "
                "gathered; set --routing-replay trainer or off"
            )
        return UncachedDecoder(self.model, prompts, samples)

    def _prefix(self, prompts: Sequence[Tensor]) -> int:
        """How many tokens that all prompts begin with are read once."""
        n = common_prefix(self.model, prompts)
        if n and self._shares_prefix is None:
            with unrounded_inputs(self.model), narrowed(self.model):
                self._shares_prefix = can_share_prefix(self.model, prompts[0])
        return n if self._shares_prefix else 0

    @torch.inference_mode()
    def _continuing(self, rows: Sequence[Continued]) -> Decoder:
        """Read what follows the kept rows."""
        self._forget_routes()
        texts = [c.tokens for c in rows]
        return GroupDecoder.of_rows(self.model, [c.row for c in rows], texts, self._recorder, self._step())

    def _step(self) -> Step | None:
        """Return the fused step; made for every decoder, so that it has the model's weights as they are now."""
        return fused_step(self.model) if self.decoding_step == "fused" else None

    def _forget_routes(self) -> None:
        """Forget the choices of checks, and of steps whose tokens were not kept."""
        if self._recorder is not None:
            self._recorder.drop()

    def _can_continue(self, prompt: Tensor) -> bool:
        """Whether the model can go on with kept rows."""
        if self._continues is None:
            with unrounded_inputs(self.model), narrowed(self.model):
                self._continues = can_continue(self.model, prompt)
        return self._continues


def make_engine(model: PreTrainedModel, precision: str = "auto", routes: bool = False) -> TransformersEngine:
    """Return the engine at a precision named as in `--rollout-precision`.

    Args:
        model: the model to copy.
        precision: a name; see `drpo.model.precision`.
        routes: as for `TransformersEngine`.
    """
    return TransformersEngine(model, precision=resolve_precision(precision, model.device), routes=routes)
