"""`drpo serve-rollouts`: its options."""

from dataclasses import dataclass

from drpo.cli.options import leading, parse
from drpo.errors import as_typed
from drpo.model.names import require_there
from drpo.spec import import_named


@dataclass(frozen=True)
class ServeRolloutsOptions:
    """Start a vLLM server that `drpo train ... --engine http://127.0.0.1:8000` samples from and sends weights to.

      drpo serve-rollouts smollm2-135m --port 8001 -- --max-num-seqs 64

    It answers drpo's calls if they carry the token that it prints or that DRPO_SERVER_TOKEN holds.

    Options after -- are passed on to `vllm serve`; they win over drpo's settings.

    Args:
        host: the address to listen on; only loopback addresses. From another machine use a tunnel:
            ssh -N -L 8000:127.0.0.1:8000 HOST.
        port: the port to listen on.
        precision: of the weights and the compute: auto (bf16 where the processor has it), bf16, fp16, fp32, fp8.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    precision: str = "auto"


def serve_rollouts(arguments: list[str]) -> int:
    """`drpo serve-rollouts MODEL [--port N] [--precision P] [-- options of vllm serve]`; does not return."""
    model, rest = leading(arguments, "MODEL", "serve-rollouts: name a model first: smollm2-135m, a folder or a hub id")
    ours, further = (rest[: rest.index("--")], rest[rest.index("--") + 1 :]) if "--" in rest else (rest, [])
    options = parse(ServeRolloutsOptions, ours, f"drpo serve-rollouts {as_typed(model)}")
    require_there(model)
    import_named("drpo.cli.serve_rollouts", "serve_rollouts", "command")(model, options, further)
    return 0
