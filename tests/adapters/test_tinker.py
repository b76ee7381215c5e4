"""drpo through Tinker's own client: what it sends for the loss, and real steps against SkyRL's local server on a CPU.

Not covered: Tinker's hosted service. SkyRL's server gets help on the wire (tests/adapters/tinker_server.py says where),
and what its JAX engine makes of the weights is its own: see `test_skyrls_jax_engine_divides_by_the_weights`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from adapters.cases import OF_2026, SEQUENCE, SPECS, Rows, direct_gradient, rows
from adapters.pages import run_page
from adapters.parity import record
from drpo import objectives
from drpo.errors import InputError
from drpo.model import loading
from drpo.objectives import DRPO, Tokens, gradient
from drpo.spec import parse_spec

tinker = pytest.importorskip("tinker", reason="Tinker's client is not installed; `make test-skyrl` installs it")
pytestmark = pytest.mark.adapters

from tinker import AdamParams, Datum, ModelInput, SamplingParams  # noqa: E402

from drpo.adapters import require_ran  # noqa: E402
from drpo.adapters.tinker import drpo_loss  # noqa: E402

VERSION = metadata.version("tinker")
PROMPT = [5, 6, 7]


def datum(tokens: Sequence[int], prompt: Sequence[int] = PROMPT, **inputs: Tensor) -> Datum:
    """Prompt and completion as Tinker trains them: inputs without the last token, targets without the first."""
    whole = [*prompt, *tokens]
    ahead = torch.zeros(len(prompt) - 1)
    padded = {name: torch.cat([ahead, values.float()]) for name, values in inputs.items()}
    return Datum(model_input=ModelInput.from_ints(whole[:-1]), loss_fn_inputs={"target_tokens": whole[1:], **padded})


def of_rows(batch: Rows, *, masked: bool) -> list[Datum]:
    """Each row a datum; tokens that are not kept have no advantage, or a mask says so."""
    made = []
    for i, keep in enumerate(batch.keep):
        spread = batch.advantage[i].expand(keep.shape)
        inputs = {"advantages": spread, "mask": keep} if masked else {"advantages": spread * keep}
        made.append(datum(range(1, 1 + len(keep)), logprobs=batch.behavior_logp[i], **inputs))
    return made


def sent(data: list[Datum], logp: Sequence[Tensor], loss: Any) -> tuple[list[Tensor], dict[str, float]]:
    """What Tinker's client sends for a loss at these log-probabilities, -d loss / d logp, and the metrics."""
    leaves = [each.clone().requires_grad_() for each in logp]
    total, metrics = loss(data, leaves)
    total.backward()
    return [-leaf.grad for leaf in leaves], metrics


def behind(values: Tensor, prompt: Sequence[int] = PROMPT) -> list[Tensor]:
    """Rows behind a prompt's tokens, whose log-probabilities are anything."""
    return [torch.cat([torch.full((len(prompt) - 1,), -3.0), row]) for row in values]


@pytest.mark.parametrize(
    ("spec", "masked"), [(s, m) for s in (*SPECS, *OF_2026, SEQUENCE) for m in (False, True) if m or "k2" not in s]
)
def test_gradient_of_the_loss(spec: str, masked: bool):
    worst = 0.0
    for seed in range(8):
        batch = rows(seed)
        weights, _ = sent(of_rows(batch, masked=masked), behind(batch.logp), drpo_loss(spec))
        wanted = direct_gradient(spec, batch, torch.ones_like(batch.logp))
        ahead = len(PROMPT) - 1
        assert all((row[:ahead] == 0).all() for row in weights)
        found = -torch.stack([row[ahead:] for row in weights]).double()
        worst = max(worst, ((found - wanted).abs() / wanted.abs().clamp(min=1)).max().item())
    record("Tinker, custom loss" + (", mask" if masked else ""), VERSION, spec, worst)
    assert worst < 1e-6


def test_sequence_level_objectives_see_one_sequence_a_datum():
    batch = rows(4)
    weights, _ = sent(of_rows(batch, masked=True), behind(batch.logp), drpo_loss("gspo(0.2, 0.3)"))
    found = -torch.stack([row[len(PROMPT) - 1 :] for row in weights]).double()
    wanted = direct_gradient("gspo(0.2, 0.3)", batch, torch.ones_like(batch.logp))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_metrics_are_of_trained_tokens():
    batch = rows(2)
    moved = (batch.logp.exp() - batch.behavior_logp.exp()).abs()[batch.keep]
    _, seen = sent(of_rows(batch, masked=True), behind(batch.logp), drpo_loss("drpo(0.2)"))
    assert set(seen) == {
        f"drpo/{n}" for n in ("prob_diff_mean", "prob_diff_max", "out_of_region", "weight_min", "unscored")
    } | {"drpo/loss_tokens/drpo_0.2"}
    assert seen["drpo/prob_diff_mean"] == pytest.approx(moved.mean().item(), rel=1e-5)
    trained = batch.keep & (batch.advantage != 0).unsqueeze(1)
    moved = (batch.logp.exp() - batch.behavior_logp.exp()).abs()[trained]
    _, seen = sent(of_rows(batch, masked=False), behind(batch.logp), drpo_loss("drpo(0.2)"))
    assert seen["drpo/prob_diff_mean"] == pytest.approx(moved.mean().item(), rel=1e-5)


def test_a_step_with_tinkers_own_loss_is_noticed():
    """`forward_backward(data, "ppo")` in place of `forward_backward_custom`: its metrics have no record of ours."""
    batch = rows(2)
    _, seen = sent(of_rows(batch, masked=True), behind(batch.logp), drpo_loss("drpo(0.2)"))
    require_ran(seen, DRPO(0.2))
    with pytest.raises(InputError, match="trained with a loss of its own"):
        require_ran({"loss:sum": 1.0}, DRPO(0.2))


def test_refusals():
    logp, ones = [torch.full((4,), -1.0)], torch.ones(2)
    full = {"logprobs": -ones, "advantages": ones}
    for missing in full:
        given = {name: values for name, values in full.items() if name != missing}
        with pytest.raises(InputError, match=rf"data\[0\]\.loss_fn_inputs has no '{missing}'"):
            drpo_loss("drpo(0.2)")([datum([1, 2], **given)], logp)
    short = datum([1, 2], **full, mask=torch.ones(1))
    with pytest.raises(InputError, match=r"data\[0\]\.loss_fn_inputs\['mask'\] \[3\]: must have .*, \[4\]"):
        drpo_loss("drpo(0.2)")([short], logp)
    with pytest.raises(InputError, match="has no 'mask': this objective trains tokens without an advantage"):
        drpo_loss("drpo(0.2, advantage_weighted=False)")([datum([1, 2], **full)], logp)
    with pytest.raises(InputError, match="reads the sampler's top-K"):
        drpo_loss("dppo(0.15, divergence='topk_tv')")
    with pytest.raises(InputError, match="objective is not set"):
        drpo_loss()


def test_page():
    run_page("tinker")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def save_tiny_qwen(folder: Path) -> None:
    tokenizer = loading.tiny()[1]
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=0, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """SkyRL's server with a tiny random Qwen3, and its address; ended with its engine, whatever happens."""
    pytest.importorskip("skyrl", reason="SkyRL is not installed")
    folder, port = tmp_path_factory.mktemp("tinker"), free_port()
    save_tiny_qwen(folder / "model")
    command = [sys.executable, str(Path(__file__).with_name("tinker_server.py")), str(folder), str(port)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 600
        while not answers(f"http://127.0.0.1:{port}/api/v1/healthz"):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.25)
        yield folder, f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def ready(made: Any) -> Any:
    """A client: newer versions hand out a future of it."""
    return made.result() if hasattr(made, "result") else made


@pytest.fixture
def client(world: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Tinker's training client on a fresh LoRA."""
    folder, url = world
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    service = tinker.ServiceClient(base_url=url, api_key="tml-of-nobody")
    yield ready(service.create_lora_training_client(base_model=str(folder / "model"), rank=4, seed=0))


def sampled(client: Any, n: int) -> list[Any]:
    sampler = ready(client.save_weights_and_get_sampling_client())
    wish = SamplingParams(max_tokens=8, temperature=1.0, seed=1)
    return sampler.sample(prompt=ModelInput.from_ints(PROMPT), sampling_params=wish, num_samples=n).result().sequences


def direct_weights(spec: str, data: list[Datum], logp: list[Tensor]) -> list[Tensor]:
    """Minus the objective's gradient in float64, a datum at a time."""
    made = []
    for one, pi in zip(data, logp, strict=True):
        mu, advantage = (one.loss_fn_inputs[name].to_torch().double() for name in ("logprobs", "advantages"))
        tokens = Tokens(pi.double(), mu, advantage, advantage != 0, torch.zeros(len(pi), dtype=torch.long))
        made.append(-gradient(parse_spec(spec, objectives.REGISTRY), tokens))
    return made


@pytest.mark.parametrize("spec", [*SPECS, SEQUENCE, "icepop(0.5, 5.0)", "cppo(0.2)"])
def test_real_steps_through_the_client(world: tuple[Path, str], client: Any, spec: str):
    """Sample, lose, step, four times: what arrives at the server is minus the objective's gradient where it stands."""
    sequences = sampled(client, 4)
    assert all(len(s.tokens) == len(s.logprobs) > 0 for s in sequences)
    advantages = (1.0, -0.5, 2.0, -1.5)
    data = [
        datum(s.tokens, logprobs=torch.tensor(s.logprobs), advantages=torch.full((len(s.tokens),), a))
        for s, a in zip(sequences, advantages, strict=True)
    ]
    met: list[list[Tensor]] = []

    def watched(data: list[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        met.append([each.detach() for each in logprobs])
        return drpo_loss(spec)(data, logprobs)

    worst, shifts = 0.0, []
    for step in range(4):
        future = client.forward_backward_custom(data, watched)
        client.optim_step(AdamParams(learning_rate=2e-3)).result()
        shifts.append(future.result().metrics["drpo/prob_diff_max"])
        arrived = [torch.tensor(row).double() for row in json.loads((world[0] / "weights.json").read_text())]
        for found, wanted in zip(arrived, direct_weights(spec, data, met[step]), strict=True):
            worst = max(worst, ((found - wanted).abs() / wanted.abs().clamp(min=1)).max().item())
    assert shifts[0] < 1e-5 and shifts[-1] > 0.2, shifts
    record("Tinker's client, SkyRL's server", VERSION, spec, worst)
    assert worst < 1e-6


def test_an_advantage_above_0_makes_its_tokens_likelier(client: Any):
    (one,) = sampled(client, 1)
    mu = torch.tensor(one.logprobs)
    data = [datum(one.tokens, logprobs=mu, advantages=torch.ones(len(mu)))]
    for _ in range(3):
        client.forward_backward_custom(data, drpo_loss("drpo(0.2)"))
        client.optim_step(AdamParams(learning_rate=1e-3))
    (out,) = client.forward(data, "cross_entropy").result().loss_fn_outputs
    assert out["logprobs"].to_torch()[len(PROMPT) - 1 :].mean() > mu.mean() + 0.05


def test_skyrls_jax_engine_divides_by_the_weights(client: Any):
    """A trap that the page names: Tinker sums `-logp * weights`, SkyRL's JAX engine divides by their sum too."""
    norms = {}
    for weight in (1.0, 3.0, -1.0):
        one = datum([9, 8, 4], weights=torch.full((3,), weight))
        client.forward_backward([one], "cross_entropy").result()
        norms[weight] = client.optim_step(AdamParams(learning_rate=0.0)).result().metrics["skyrl.ai/grad_norm"]
    assert norms[3.0] == pytest.approx(norms[1.0], rel=1e-4)
    assert norms[-1.0] > 1e6 * norms[1.0]
