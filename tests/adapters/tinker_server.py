"""SkyRL's local server of Tinker's interface, with its JAX engine on a CPU: `tinker_server.py FOLDER PORT`.

FOLDER/model is the base model; FOLDER/weights.json holds the weights of the latest backward pass. Server, engine and
wire format are SkyRL 0.4.0's own, made for Tinker's client 0.25. Added is what newer clients require: the metric
"loss:sum" of a model pass and "sample_sequence_ids" of a sample. Replaced is how the engine is started (SkyRL goes
through `uv run`, which would fetch packages).
"""

import json
import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Depends, Request
from skyrl.tinker import api
from skyrl.tinker.config import EngineConfig, config_to_argv
from sqlmodel.ext.asyncio.session import AsyncSession

SAMPLE = "/api/v1/asample"


def watch_passes(file: Path) -> None:
    """Write down the weights that arrive, and let the results say the loss that Tinker's custom losses look for."""
    parse, serialize = api.parse_forward_backward_request, api.serialize_result

    def parsed(body: bytes) -> tuple[dict[str, Any], bool]:
        asked, forward_only = parse(body)
        if not forward_only:
            data = asked["forward_backward_input"]["data"]
            file.write_text(json.dumps([datum["loss_fn_inputs"]["weights"]["data"] for datum in data]))
        return asked, forward_only

    def serialized(kind: Any, result: dict[str, Any]) -> bytes:
        if "loss_fn_outputs" in result:
            total = sum(sum(one["elementwise_loss"]["data"]) for one in result["loss_fn_outputs"])
            result["metrics"] = result.get("metrics", {}) | {"loss:sum": total}
        return serialize(kind, result)

    api.parse_forward_backward_request, api.serialize_result = parsed, serialized


def serve(folder: Path, port: int) -> None:
    app = api.app
    watch_passes(folder / "weights.json")
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != SAMPLE]

    @app.post(SAMPLE)
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
        backend="jax",
        backend_config={"max_lora_adapters": 16, "max_lora_rank": 8},
        checkpoints_base=str(folder / "checkpoints"),
        database_url=f"sqlite:///{folder / 'tinker.db'}",
    )
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
