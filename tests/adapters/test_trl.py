"""DRPOTrainer: real training of a tiny model in TRL, every gradient compared with the objective's own formula."""

import importlib
import inspect
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.adapters
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

from adapters.parity import record  # noqa: E402
from adapters.trl_runs import LONGEST, config  # noqa: E402
from drpo import objectives  # noqa: E402
from drpo.adapters.grpo import AGGREGATIONS  # noqa: E402
from drpo.adapters.trl import DRPOConfig, DRPOTrainer  # noqa: E402
from drpo.adapters.weighing import loss_tokens_key  # noqa: E402
from drpo.errors import InputError  # noqa: E402
from drpo.model import loading  # noqa: E402
from drpo.objectives import Tokens, total  # noqa: E402
from drpo.spec import parse_spec  # noqa: E402
from support.tiny_world import doubled  # noqa: E402

SPECS = ("drpo(0.2)", "drpo(12.5)", "dppo(0.15)", "spo(0.5)", "ppo(0.2, 0.28)", "gspo(0.1, 0.1)")


class NoisySampler:
    """Draws completions of unequal length, and reports log-probabilities that are off by a lot, and sometimes none."""

    def __init__(self, missing: bool = True) -> None:
        self.draw = torch.Generator().manual_seed(0)
        self.missing = missing

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[list[Any]]]:
        encode = trainer.processing_class
        prompt_ids = [encode(p if isinstance(p, str) else p[-1]["content"])["input_ids"] for p in prompts]
        lengths = torch.randint(1, LONGEST + 1, (len(prompts),), generator=self.draw).tolist()
        completion_ids = [torch.randint(1, 250, (n,), generator=self.draw).tolist() for n in lengths]
        rows = zip(prompt_ids, completion_ids, strict=True)
        logprobs = [self.scored(trainer.model, prompt, completion) for prompt, completion in rows]
        long = next((row for row in logprobs if len(row) > 4), None)
        if self.missing and long is not None:
            long[2] = math.nan  # a single one: more of them in a micro-batch are refused
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}

    def scored(self, model: nn.Module, prompt: list[int], completion: list[int]) -> list[float]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        noise = 0.7 * torch.randn(len(completion), generator=self.draw)
        # Towards probable tokens too, so that shifts of probability cross the radii, not just ratios.
        mu = torch.where(torch.rand(len(completion), generator=self.draw) < 0.3, -noise.abs() - 0.01, logp + noise)
        scored: list[float] = mu.clamp(max=-1e-3).tolist()
        return scored


class Compared(DRPOTrainer):
    """Beside every loss, the gradient of the objective's own formula over the same batch."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        self.worst, self.largest, self.n_losses, self.left = 0.0, 0.0, 0, 0

    def compute_loss(self, model: nn.Module, inputs: Any, *rest: Any, **named: Any) -> Tensor:
        kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        loss = super().compute_loss(model, inputs, *rest, **named)
        for name, value in kept.items():
            assert not isinstance(value, Tensor) or value.equal(inputs[name]) or value.isnan().any(), (
                f"{name} was changed"
            )
        parameters = [p for p in model.parameters() if p.requires_grad]
        theirs = torch.autograd.grad(loss, parameters, retain_graph=True)
        ours = torch.autograd.grad(self.direct(model, inputs), parameters)
        self.worst = max([self.worst, *((a - b).abs().max().item() for a, b in zip(theirs, ours, strict=True))])
        self.largest = max([self.largest, *(b.abs().max().item() for b in ours)])
        self.n_losses += 1
        return loss

    def direct(self, model: nn.Module, batch: Any) -> Tensor:
        """The objective, averaged as `loss_type` says; nothing of TRL's loss in it."""
        prompt, completion = batch["prompt_ids"], batch["completion_ids"]
        keep = batch["completion_mask"].bool()
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        logits = model(input_ids=torch.cat([prompt, completion], 1), attention_mask=attention).logits
        distribution = logits[:, prompt.shape[1] - 1 : -1].log_softmax(-1)
        logp = distribution.gather(2, completion.unsqueeze(2)).squeeze(2)
        mu = batch["sampling_per_token_logps"]
        mu = torch.where(mu.isnan(), logp.detach(), mu)
        sequence = torch.arange(len(logp)).unsqueeze(1).expand(logp.shape)
        advantage = batch["advantages"].unsqueeze(1).expand(logp.shape)
        tokens = Tokens(*(x.reshape(-1) for x in (logp, mu, advantage, keep, sequence)))
        objective = parse_spec(self.args.objective, objectives.REGISTRY)
        self.left += int(objectives.out_of_region(objective, tokens)[tokens.keep].sum())
        return total(objective, tokens, self.weights(keep, batch).reshape(-1))

    def weights(self, keep: Tensor, batch: Any) -> Tensor:
        """What each token counts, [B, T], with both micro-batches of the update."""
        ones, accumulated = torch.ones_like(keep, dtype=torch.float32), self.current_gradient_accumulation_steps
        return {
            "grpo": ones / keep.sum(1, keepdim=True) / len(keep) / accumulated,
            "bnpo": ones / keep.sum() / accumulated,
            "dr_grpo": ones / (len(keep) * LONGEST) / accumulated,
            "dapo": ones / batch["num_items_in_batch"],
        }[self.args.loss_type]


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(str(c)) % 5) for c in completions]


def trainer_of(kind: type[DRPOTrainer], args: DRPOConfig, sampler: Any) -> DRPOTrainer:
    torch.manual_seed(0)
    model, tokenizer = loading.tiny()
    model.save_pretrained(args.output_dir)  # where TRL looks for the reference policy
    model.config._name_or_path = args.output_dir
    data = Dataset.from_list([{"prompt": f"{i} + {i} = "} for i in range(16)])
    doubled(model)  # so that what is compared is the formula, not the rounding of two forward passes
    return kind(model, reward, args=args, train_dataset=data, processing_class=tokenizer, rollout_func=sampler)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("spec", SPECS)
def test_six_steps_with_the_objectives_own_gradient(spec: str, aggregation: str, tmp_path: Path):
    trainer = trainer_of(Compared, config(tmp_path, objective=spec, loss_type=aggregation), NoisySampler())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.n_losses == 12
    assert trainer.largest > 1e-3 and (trainer.left > 5 or "12.5" in spec)  # else nothing was compared
    assert any(not p.equal(before[name]) for name, p in trainer.model.named_parameters())
    error = trainer.worst / max(1.0, trainer.largest)
    record(f"TRL, loss_type={aggregation}", trl.__version__, spec, error)
    assert error < 1e-6
    history = [entry for entry in trainer.state.log_history if "drpo/out_of_region" in entry]
    assert len(history) == 6 and all(0 <= entry["drpo/out_of_region"] <= 1 for entry in history)
    assert max(entry["drpo/unscored"] for entry in history) > 0
    ran = f"drpo/{loss_tokens_key(parse_spec(spec, objectives.REGISTRY))}"
    assert all(entry[ran] > 0 for entry in history)


def test_a_wrong_weight_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The comparison itself: with the advantage left as it is, the gradient is the surrogate's, not DRPO's."""
    monkeypatch.setattr("drpo.adapters.trl.reweight", lambda objective, logp, mu, advantage, keep: advantage)
    trainer = trainer_of(Compared, config(tmp_path, max_steps=2), NoisySampler())
    trainer.train()
    assert trainer.worst > 1e-4


def test_terms_of_trl_are_added_to_the_objective(tmp_path: Path):
    """beta: the reference KL stays TRL's own, beside the objective."""
    trainer = trainer_of(DRPOTrainer, config(tmp_path, beta=0.1, max_steps=4), NoisySampler())
    trainer.train()
    assert [e["kl"] for e in trainer.state.log_history if "kl" in e][-1] > 0


def test_without_a_sampler_that_reports_log_probabilities(tmp_path: Path):
    with pytest.raises(InputError, match=r"use_vllm=False: .*recompute_behavior_logp=True"):
        trainer_of(DRPOTrainer, config(tmp_path), None)
    trainer = trainer_of(DRPOTrainer, config(tmp_path, recompute_behavior_logp=True), None)
    trainer.train()
    assert trainer.state.global_step == 6


def test_a_rollout_func_that_reports_none_is_refused(tmp_path: Path):
    class Silent(NoisySampler):
        def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
            return super().__call__(prompts, trainer) | {"logprobs": None}

    with pytest.raises(InputError, match="the sampler reported no log-probabilities"):
        trainer_of(DRPOTrainer, config(tmp_path), Silent()).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": None}, r"objective is not set: .*objective='drpo\(0.2\)'"),
        ({"objective": "drop(0.2)"}, "did you mean 'drpo'"),
        ({"objective": "dppo(0.1, divergence='topk_kl')"}, "top-K"),
        ({"epsilon": 0.2}, r"epsilon=0.2: the trust region is the objective's.*set epsilon=1.0"),
        ({"epsilon_high": 0.28}, "set epsilon_high=inf"),
        ({"delta": 4.0}, "set delta=None"),
        ({"off_policy_mask_threshold": 0.1}, "set off_policy_mask_threshold=None"),
        ({"importance_sampling_level": "sequence"}, "set importance_sampling_level='token'"),
        ({"vllm_importance_sampling_correction": True}, "set vllm_importance_sampling_correction=False"),
        ({"top_p": 0.9}, r"top_p=0.9: mu would not be the distribution"),
        ({"top_k": 20}, "set top_k=0"),
        ({"min_p": 0.1}, "set min_p=None"),
        ({"repetition_penalty": 1.1}, "set repetition_penalty=1.0"),
        ({"loss_type": "cispo"}, "loss_type='cispo': .*'dapo' or 'grpo' or 'bnpo' or 'dr_grpo'"),
    ],
)
def test_refusals_name_the_field_and_the_value_to_set(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message) as refused:
        config(tmp_path, **changes)
    assert "\n" not in str(refused.value)


def test_a_plain_grpo_config_is_refused(tmp_path: Path):
    plain = trl.GRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(InputError, match="needs a DRPOConfig"):
        trainer_of(DRPOTrainer, plain, NoisySampler())


class Elsewhere(nn.Module):
    """What Unsloth's trainer does: a `compute_loss` of its own, which never calls TRL's loss."""

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        return model(input_ids=ids).logits.mean()


def test_a_trainer_whose_own_loss_bypasses_the_objective_stops_at_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = trainer_of(DRPOTrainer, config(tmp_path), NoisySampler())
    monkeypatch.setattr(trl.GRPOTrainer, "compute_loss", Elsewhere.compute_loss)
    with pytest.raises(
        InputError, match=r"use drpo\.adapters\.unsloth\): the loss of drpo_0\.2 did not run in this step"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_unsloths_trainer_is_refused_before_and_after_our_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replaced = type("UnslothGRPOTrainer", (type("_UnslothGRPOTrainer", (trl.GRPOTrainer,), {}),), {})
    monkeypatch.setattr(trl, "GRPOTrainer", replaced)
    told = r"^Unsloth has replaced TRL's GRPOTrainer .*: use DRPOTrainer of drpo\.adapters\.unsloth, or do not import"
    with pytest.raises(InputError, match=told):
        trainer_of(DRPOTrainer, config(tmp_path), NoisySampler())
    monkeypatch.delitem(sys.modules, "drpo.adapters.trl")
    with pytest.raises(InputError, match=told):
        importlib.import_module("drpo.adapters.trl")


def test_configuration_survives_the_way_through_a_file(tmp_path: Path):
    written = config(tmp_path).to_dict()
    assert written["objective"] == "drpo(0.2)" and written["epsilon_high"] == math.inf


def test_what_the_adapter_relies_on_is_there():
    """Names of TRL that are not public: a version that moves them fails here first."""
    for name in ("_compute_loss", "_get_per_token_logps_and_entropies"):
        assert callable(getattr(trl.GRPOTrainer, name))
    text = inspect.getsource(trl.GRPOTrainer)
    for read in ('inputs.get("old_per_token_logps")', 'inputs["advantages"]', 'output["sampling_per_token_logps"]'):
        assert read in text
