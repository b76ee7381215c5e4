"""DRPOTrainer with tools and environments: TRL's `tool_mask` holds in the loss, its gradient and the metrics.

TRL runs the loop of calls itself (`_tool_call_loop`) and writes 0 into `tool_mask`, and a log-probability of 0, where a
tool's answer and the template around it stand. Its `_compute_loss` multiplies by `completion_mask * tool_mask`.
"""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.adapters
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

from adapters.cases import OF_2026  # noqa: E402
from adapters.episodes import Padded, own_loss, require_masks  # noqa: E402
from adapters.parity import record  # noqa: E402
from adapters.trl_runs import config  # noqa: E402
from drpo.adapters import objective_of, reweight  # noqa: E402
from drpo.adapters.grpo import AGGREGATIONS  # noqa: E402
from drpo.adapters.trl import DRPOTrainer  # noqa: E402
from drpo.model import loading  # noqa: E402
from drpo.reductions import Horizon, sequence_mean, token_mean  # noqa: E402
from support.tiny_world import doubled  # noqa: E402

SPECS = ("drpo(0.2)", "drpo(12.5)", "dppo(0.15)", "spo(0.5)", "ppo(0.2, 0.28)", "gspo(0.1, 0.1)", *OF_2026)
LONGEST = 400
REDUCTIONS = {"dapo": token_mean, "bnpo": token_mean, "grpo": sequence_mean, "dr_grpo": Horizon(LONGEST)}
"""TRL's `loss_type` -> our reduction that averages in the same way, in an update of one micro-batch."""
CALL = '<tool_call>\n{"name": "double", "arguments": {"x": 3}}\n</tool_call>'
SAID = ([CALL, "6"], ["I know: 6"], [CALL, CALL, "12, I think"], [CALL, ""])
"""What the policy says in the turns of each of four samples."""


def double(x: int) -> int:
    """Double a number.

    Args:
        x: the number.
    """
    return 2 * x


class Doubler:
    """An environment of TRL's with one tool."""

    def reset(self, **_: Any) -> None:
        self.calls = 0

    def double(self, x: int) -> str:
        """Double a number.

        Args:
            x: the number.
        """
        self.calls += 1
        return f"{2 * x} after {self.calls} calls"


class Scripted(DRPOTrainer):
    """In place of an engine: turns as they stand in `SAID`, with log-probabilities that are off."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        self.noise, self.turns, self.batches = torch.Generator().manual_seed(0), [0] * len(SAID), []

    def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any, **named: Any) -> tuple[Any, Any]:
        first = len(prompt_ids) == len(SAID)
        rows = list(range(len(SAID))) if first else [i for i, said in enumerate(SAID) if len(said) > self.turns[i]]
        said = [SAID[i][self.turns[i]] + "<|im_end|>" for i in rows]
        for i in rows:
            self.turns[i] += 1
        ids = [self.processing_class(text)["input_ids"] for text in said]
        return ids, [self.scored(prompt, one) for prompt, one in zip(prompt_ids, ids, strict=True)]

    def scored(self, prompt: list[int], completion: list[int]) -> list[float]:
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        scored: list[float] = (logp + 0.5 * torch.randn(len(logp), generator=self.noise)).clamp(max=-1e-3).tolist()
        return scored

    def compute_loss(self, model: nn.Module, inputs: Any, *rest: Any, **named: Any) -> Tensor:
        self.batches.append(dict(inputs))
        return super().compute_loss(model, inputs, *rest, **named)


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(i % 3) for i in range(len(completions))]


def trainer_of(folder: Path, **named: Any) -> Scripted:
    """One update of four samples of one prompt, in a tiny model with Qwen3's chat template."""
    torch.manual_seed(0)
    model, tokenizer = loading.tiny()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    args = config(
        folder, recompute_behavior_logp=True, max_steps=1, num_iterations=1, gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "What is 3 + 3?"}]}] * 4)
    doubled(model)  # so that what is compared is the formula, not the rounding of two forward passes
    return Scripted(model, reward, args=args, train_dataset=data, processing_class=tokenizer, **named)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def in_trl(trainer: DRPOTrainer, aggregation: str, patch: pytest.MonkeyPatch, spec: str, batch: Padded) -> Any:
    """TRL's own `_compute_loss` of a batch made by hand, and all that it logs."""
    logp, none = batch.logp, torch.zeros_like(batch.target)
    n_results = 3 if "aux_loss" in inspect.getsource(trl.GRPOTrainer._compute_loss) else 2
    forward = (logp, torch.zeros_like(logp), None)[:n_results]
    patch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", lambda *_, **__: forward)
    trainer._objective, trainer.loss_type = objective_of(spec, "objective"), aggregation
    trainer.current_gradient_accumulation_steps = 1
    trainer._metrics["train"].clear()
    inputs = {
        "prompt_ids": none[:, :1],
        "prompt_mask": none[:, :1] + 1,
        "completion_ids": batch.target,
        "completion_mask": batch.inside.long(),
        "tool_mask": torch.where(batch.inside, batch.keep, True).long(),  # TRL pads it with ones
        "advantages": batch.advantage[:, 0],
        "num_items_in_batch": batch.keep.sum(),
        "sampling_per_token_logps": batch.behavior_logp,
    }
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)  # which logs the figures too
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def test_tokens_of_tools_have_no_part_in_trls_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = trainer_of(tmp_path, tools=[double])
    for aggregation in AGGREGATIONS:
        for spec in SPECS:
            worst = require_masks(
                lambda name, batch, how=aggregation: in_trl(trainer, how, monkeypatch, name, batch),
                spec,
                value=False,  # the surrogate has the objective's gradient alone
                reduction=REDUCTIONS[aggregation],
            )
            record(f"TRL, tools, loss_type={aggregation}", trl.__version__, spec, worst)
    assert "drpo/prob_diff_max" in trainer._metrics["train"]


def test_a_mask_without_tools_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The comparison itself: a mean ratio over all tokens of the episode is another one."""
    right = reweight
    monkeypatch.setattr("drpo.adapters.trl.reweight", lambda *columns: right(*columns[:4], torch.ones_like(columns[4])))
    trainer = trainer_of(tmp_path, tools=[double])
    with pytest.raises(AssertionError):
        require_masks(lambda *of: in_trl(trainer, "dapo", monkeypatch, *of), "gspo(0.1, 0.1)", value=False)


@pytest.mark.parametrize("named", [{"tools": [double]}, {"environment_factory": Doubler}], ids=["tools", "environment"])
def test_a_step_with_tools_has_our_own_trainers_gradient(named: dict[str, Any], tmp_path: Path):
    trainer = trainer_of(tmp_path, **named)
    trainer.train()
    (batch,) = trainer.batches
    keep, sampled = batch["completion_mask"] * batch["tool_mask"], batch["sampling_per_token_logps"]
    decode = trainer.processing_class.decode
    # Our own count of what was sampled, and of what was not.
    told = [sum(len(trainer.processing_class(turn + "<|im_end|>")["input_ids"]) for turn in said) for said in SAID]
    assert sorted(keep.sum(1).tolist()) == sorted(told)
    assert int(batch["num_items_in_batch"]) == sum(told)
    between = (batch["completion_mask"] * (1 - batch["tool_mask"])).bool()
    assert between.any() and (sampled[between] == 0).all()
    assert "<tool_response>\n6" in decode(batch["completion_ids"][between])
    assert "tool_call>" not in decode(batch["completion_ids"][between])

    model, n = trainer.model, batch["completion_ids"].shape[1]
    parameters = [p for p in model.parameters() if p.requires_grad]
    for aggregation, spec in (("dapo", "drpo(0.2)"), ("grpo", "gspo(0.1, 0.1)")):
        trainer._objective, trainer.loss_type = objective_of(spec, "objective"), aggregation
        theirs = torch.autograd.grad(trainer._compute_loss(model, dict(batch)), parameters)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        logits = model(input_ids=ids, attention_mask=attention).logits[:, -n - 1 : -1]
        advantage = batch["advantages"].unsqueeze(1).expand(keep.shape)
        padded = Padded(
            logits, batch["completion_ids"], sampled, advantage, keep.bool(), batch["completion_mask"].bool()
        )
        ours = torch.autograd.grad(own_loss(spec, padded, REDUCTIONS[aggregation]), parameters)
        largest = max(b.abs().max().item() for b in ours)
        worst = max((a - b).abs().max().item() for a, b in zip(theirs, ours, strict=True))
        assert worst < 1e-6 * max(1.0, largest) and largest > 1e-3, (aggregation, spec)
