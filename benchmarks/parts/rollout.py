"""Tokens per second of rollouts: this project's engine, transformers' generate, vLLM."""

from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.folders import folder
from benchmarks.parts.scale import Scale
from drpo.model.names import SMOLLM2
from drpo.tasks import Addition

GROUP = 8


def cases(scale: Scale) -> list[Case]:
    """Return a case for each number of rows and of new tokens, in the fastest precision.

    Args:
        scale: of the machine. vLLM does not know the tiny model, so a quick run asks the real one for a few tokens.
    """
    lengths, rows = ((4,), (1, 8)) if scale.quick else ((32, 256), (1, 16, 64, 256))
    return [_case(scale, n_rows, n) for n in lengths for n_rows in rows]


def _case(scale: Scale, rows: int, new_tokens: int) -> Case:
    precision = scale.precisions[0]
    samples = GROUP if rows >= GROUP else rows
    prompts = [p.prompt for p in Addition().sample(rows // samples, step=0, seed=0)]
    request = {"prompts": prompts, "samples": samples, "new_tokens": new_tokens}
    # Compiling and first touches need all rows, but not all tokens.
    warm = {"new_tokens": min(8, new_tokens)}

    def entrant(name: str, environment: str, module: str, *, endless: bool = False) -> Entrant:
        model = str(folder(SMOLLM2, endless=endless))
        setup = {"model": model, "precision": precision, "max_length": 512, "max_rows": 256}
        return Entrant(name, Worker(environment, module, setup), request, warm)

    entrants = (
        entrant("drpo", OURS, "drpo_rollout", endless=True),
        entrant("transformers", OURS, "transformers_rollout"),
        entrant("vLLM", "vllm", "vllm_rollout"),
    )
    parameters = {"rows": rows, "samples": samples, "new_tokens": new_tokens, "precision": precision}
    return Case("rollout", f"{rows} rows x {new_tokens} tokens", "drpo", entrants, parameters)
