"""Optimisers and schedules by spec: what each parameter gets, and that a resumed run goes on to the bit."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from drpo.credit.gae import GAE
from drpo.errors import InputError
from drpo.spec import format_spec, parse_spec
from drpo.train import stored
from drpo.train.config import Run, configure, learning_rate
from drpo.train.loop import train
from drpo.train.optim import OPTIMIZERS, SCHEDULES, AdamW, Constant, Linear, Muon
from drpo.train.records import CHECKPOINTS
from drpo.train.setup import build
from support.runs import StopsAfter, assert_same_run
from support.worlds import few_run


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.norm = nn.Embedding(7, 4), nn.Linear(4, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)

    def embeddings(self) -> list[nn.Parameter]:
        return [self.embedding.weight, self.head.weight]


def nets() -> list[Net]:
    torch.manual_seed(0)
    one, other = Net(), Net()
    other.load_state_dict(one.state_dict())
    return [one, other]


def test_muon_is_torchs_on_hidden_matrices_and_adamw_elsewhere():
    ours, theirs = nets()
    spec = Muon(1e-2, momentum=0.9, weight_decay=0.1, betas=(0.8, 0.9))
    optimizer = spec.build(list(ours.parameters()), ours.embeddings())
    matrix = theirs.hidden.weight
    settings = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    muon = torch.optim.Muon([matrix], **settings)
    rest = [p for p in theirs.parameters() if p is not matrix]
    adamw = AdamW(1e-2, (0.8, 0.9), 0.1).build(rest, theirs.embeddings())
    for step in range(3):
        for group in (*optimizer.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = 1e-2 / (step + 1)  # as `take_step` sets it
        for net in (ours, theirs):
            generator = torch.Generator().manual_seed(step)
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
        for one in (optimizer, muon, adamw):
            one.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert {k for k, s in optimizer.state.items() if "momentum_buffer" in s} == {ours.hidden.weight}
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in ours.parameters())


def test_the_tiny_models_embedding_head_and_norms_are_not_muons():
    components = build(few_run(optimizer=Muon(1e-3)))
    names = {id(p): name for name, p in components.policy.trainable().items()}
    muon, *others = ({names[id(p)] for p in group["params"]} for group in components.optimizer.param_groups)
    assert all(re.search(r"layers\.\d+\.(self_attn|mlp)\..*_proj\.weight", name) for name in muon)
    assert set().union(*others) == set(names.values()) - muon
    assert any("embed_tokens" in name for name in names.values()) and any("norm" in name for name in names.values())


def test_a_run_with_muon_is_resumed_to_the_bit(tmp_path: Path):
    run = few_run(steps=3, checkpoint_every=1, optimizer=Muon(1e-2), schedule=Linear(warmup=1))
    train(run, tmp_path / "whole")
    train(run, tmp_path / "cut", StopsAfter(2))
    assert stored.latest(tmp_path / "cut" / CHECKPOINTS).name == "step-000002"
    train(run, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("name", ["optimizer", "critic_optimizer"])
def test_muon_is_refused_where_matrices_are_divided(name: str):
    with pytest.raises(InputError, match=rf"^{name}=muon: it requires whole matrices; set --shard none"):
        configure(Run(), shard="fsdp", critic=GAE(), **{name: Muon()})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adamw(-1)", "adamw learning_rate=-1"),
        ("adamw('x')", "adamw learning_rate='x'"),
        ("adamw(1e-5, betas=(0.9, 1.0))", r"adamw betas=\(0\.9, 1\.0\)"),
        ("adamw(weight_decay=-1)", "adamw weight_decay=-1"),
        ("muon(momentum=1)", "muon momentum=1"),
        ("adam(1e-5)", "did you mean 'adamw'"),
        ("adamw(rate=1)", r"the arguments are \(.*\)$"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_by_name(text: str, said: str):
    with pytest.raises(InputError, match=said):
        parse_spec(text, OPTIMIZERS)


def test_specs_are_read_and_written_and_one_rate_is_replaced():
    for spec in (AdamW(2e-5), AdamW(1e-6, (0.8, 0.95), 0.0), Muon(1e-3, betas=(0.8, 0.9))):
        assert parse_spec(format_spec(spec, OPTIMIZERS), OPTIMIZERS) == spec
    schedule = parse_spec("constant(warmup=2)", SCHEDULES)
    run = configure(Run(), optimizer=Muon(1e-3, 0.8), schedule=schedule, learning_rate=2e-3)
    assert run.optimizer.policy == Muon(2e-3, 0.8) and run.optimizer.schedule == Constant(2)
    assert [learning_rate(run, step, 0) for step in range(3)] == [1e-3, 2e-3, 2e-3]
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        parse_spec("cosin", SCHEDULES)
    with pytest.raises(InputError, match="warmup=-1"):
        parse_spec("linear(-1)", SCHEDULES)
