"""SkyRL's local server of Tinker's interface, with its JAX engine on a CPU: `tinker_server.py FOLDER PORT`.

FOLDER/model is the base model; FOLDER/weights.json holds the weights of the latest backward pass. Server and engine are
SkyRL 0.3.0's own. Replaced are the two ends of the wire on which Tinker's client has moved on (protobuf since 0.22.3),
and how the engine is started (SkyRL goes through `uv run`, which would fetch packages).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import Depends, Request, Response
from skyrl.tinker import api
from skyrl.tinker.config import EngineConfig, config_to_argv
from sqlmodel.ext.asyncio.session import AsyncSession
from tinker.proto import tinker_public_pb2 as wire

TENSORS = {wire.DTYPE_FLOAT32: np.float32, wire.DTYPE_INT64: np.int64}
REPLACED = ("/api/v1/forward_backward", "/api/v1/retrieve_future", "/api/v1/asample")
STOPS = {"stop": wire.STOP_REASON_STOP, "length": wire.STOP_REASON_LENGTH}


def request_of(message: wire.ForwardBackwardRequest) -> dict[str, Any]:
    """A model pass as SkyRL's server reads it."""
    data = [
        {
            "model_input": {
                "chunks": [
                    {"tokens": np.frombuffer(chunk.encoded_text.tokens, np.int32).tolist()}
                    for chunk in datum.model_input
                ]
            },
            "loss_fn_inputs": {
                name: {"data": np.frombuffer(tensor.dense, TENSORS[tensor.dtype]).tolist()}
                for name, tensor in datum.loss_fn_inputs.items()
            },
        }
        for datum in message.data
    ]
    return {"data": data, "loss_fn": message.loss_fn}


def batched(rows: list[list[float]]) -> wire.BatchedTensor:
    """Rows of unequal length, end to end."""
    ends = np.cumsum([0, *(4 * len(row) for row in rows)], dtype=np.int64)
    values = np.concatenate([np.asarray(row, np.float32) for row in rows])
    return wire.BatchedTensor(data=values.tobytes(), offsets=ends.tobytes(), dtype=wire.DTYPE_FLOAT32)


def pass_of(result: dict[str, Any]) -> bytes:
    """A model pass as Tinker's client reads it, with the loss that its custom losses look for."""
    outputs = result["loss_fn_outputs"]
    record = wire.ArrayRecord(num_datums=len(outputs))
    for name in outputs[0]:
        record.fields[name].CopyFrom(batched([one[name]["data"] for one in outputs]))
    total = sum(sum(one["elementwise_loss"]["data"]) for one in outputs)
    message = wire.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", loss_fn_outputs=[record])
    message.metrics["loss:sum"] = total
    return message.SerializeToString()


def sample_of(result: dict[str, Any]) -> bytes:
    """Samples as Tinker's client reads them."""
    sequences = [
        wire.SampledSequence(
            stop_reason=STOPS[one["stop_reason"]],
            tokens=np.asarray(one["tokens"], np.int32).tobytes(),
            logprobs=np.asarray(one["logprobs"], np.float32).tobytes(),
        )
        for one in result["sequences"]
    ]
    return wire.SampleResponse(sequences=sequences).SerializeToString()


def serve(folder: Path, port: int) -> None:
    app = api.app
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in REPLACED]

    @app.post(REPLACED[0])
    async def model_pass(request: Request, session: AsyncSession = Depends(api.get_session)) -> Any:  # noqa: B008
        message = wire.ForwardBackwardRequest.FromString(await request.body())
        given = request_of(message)
        if message.forward_only:
            return await api.forward(api.ForwardRequest(model_id=message.model_id, forward_input=given), session)
        weights = [datum["loss_fn_inputs"]["weights"]["data"] for datum in given["data"]]
        (folder / "weights.json").write_text(json.dumps(weights))
        return await api.forward_backward(
            api.ForwardBackwardRequest(model_id=message.model_id, forward_backward_input=given), session
        )

    @app.post(REPLACED[1])
    async def retrieve(body: api.RetrieveFutureRequest, request: Request) -> Any:
        result = await api.retrieve_future(body, request)
        if "protobuf" not in request.headers.get("accept", ""):
            return result
        message = pass_of(result) if "loss_fn_outputs" in result else sample_of(result)
        return Response(message, media_type="application/x-protobuf")

    @app.post(REPLACED[2])
    async def sample(
        body: api.SampleRequest,
        request: Request,
        session: AsyncSession = Depends(api.get_session),  # noqa: B008
    ) -> Any:
        promise = await api.asample(body, request, session)
        names = [f"{promise.request_id}-{i}" for i in range(body.num_samples)]
        return promise.model_dump() | {"sample_sequence_ids": names}

    api._build_uv_run_cmd_engine = lambda _, config: [
        sys.executable, "-m", "skyrl.tinker.engine", *config_to_argv(config),
    ]  # fmt: skip
    app.state.engine_config = EngineConfig(
        base_model=str(folder / "model"),
        backend_config={"max_lora_adapters": 16, "max_lora_rank": 8},
        checkpoints_base=str(folder / "checkpoints"),
        database_url=f"sqlite:///{folder / 'tinker.db'}",
    )
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
