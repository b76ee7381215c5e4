"""What a vLLM server answers, as arguments of `read_generation`."""

import io
import math
from base64 import b64decode
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

FLOOR = -9999.0
"""What vLLM's server sends for a log-probability that is missing, NaN or -inf."""


def columns(choice: Mapping[str, Any], *, routes: bool) -> dict[str, Any]:
    """Return a choice of the server's answer as arguments of `read_generation`.

    Args:
        choice: as JSON has it.
        routes: read which experts were chosen too.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: it is not vLLM's.
    """
    sent = {"token_ids": choice["token_ids"], "finish_reason": choice["finish_reason"]}
    chosen = {"chosen": _chosen(choice.get("routed_experts"))} if routes else {}
    if (reported := choice.get("logprobs")) is None:
        return {**sent, **chosen, "logp": None}
    positions = reported["content"]
    logp = [_known(position["logprob"], math.nan) for position in positions]
    lists = [position["top_logprobs"] for position in positions]
    top = [[(pair["token_id"], _known(pair["logprob"], -math.inf)) for pair in pairs] for pairs in lists]
    return {**sent, **chosen, "logp": logp, "top": top}


def _known(logp: float, otherwise: float) -> float:
    return float(logp) if logp > FLOOR else otherwise


def _chosen(text: str | None) -> np.ndarray | None:
    """Return an array sent as base64 of NumPy's file format; its header says how large it is, and is not trusted."""
    if text is None:
        return None
    try:
        file = io.BytesIO(b64decode(text, validate=True))
        np.lib.format.read_magic(file)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        order: Literal["F", "C"] = "F" if by_columns else "C"
        return np.frombuffer(file.read(), dtype).reshape(shape, order=order)
    except Exception as error:  # whatever a header that is not NumPy's makes its parser raise
        raise ValueError(f"routed_experts: {error}") from None
