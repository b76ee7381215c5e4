"""Replay: a recorded batch as objectives read it, by hand, and on a real run's records."""

import json
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drpo import cli
from drpo.errors import InputError
from drpo.lab.replay import BUCKETS, SHOWN, context, reading, recorded, replay
from drpo.objectives import REGISTRY, Tokens, gradient_weight, total
from drpo.spec import parse_spec
from drpo.terminal import FILE_WIDTH, Sheet, Terminal, as_table
from drpo.train.loop import train
from drpo.train.optim import AdamW
from drpo.train.records import ROLLOUTS, read_records
from support.worlds import few_run

OBJECTIVES = ("drpo(0.2)", "ppo(0.2, 0.28)", "dppo(0.15)", "spo(0.2)", "none", "gspo(0.2, 0.3)", "mask(0.1)")

token = st.tuples(st.floats(-9, -0.01), st.floats(-9, -0.01))
completions = st.lists(
    st.tuples(st.sampled_from([-0.75, -0.25, 0.0, 0.5]), st.lists(token, min_size=1, max_size=6)),
    min_size=1,
    max_size=6,
)


def record(i: int, advantage: float, tokens: list[tuple[float, float]], **more) -> dict:
    return {
        "step": 1,
        "update": 0,
        "problem": f"p{i}",
        "sample": i,
        "advantage": advantage,
        "token_ids": [100 * i + t for t in range(len(tokens))],
        "logp": [pi for pi, _ in tokens],
        "behavior_logp": [mu for _, mu in tokens],
        **more,
    }


def written(folder: Path, records: list[dict], objective: str | None = None) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / ROLLOUTS).write_text("".join(json.dumps(r) + "\n" for r in records))
    if objective is not None:
        (folder / "config.json").write_text(json.dumps({"objective": {"loss": objective}}))
    return folder


@given(completions)
def test_the_batch_is_what_was_recorded_less_what_was_not_trained(tmp_path_factory, made):
    rows = [record(i, a, tokens) for i, (a, tokens) in enumerate(made)]
    skipped = [{k: v for k, v in record(9, 0.0, made[0][1]).items() if k != "logp"}]
    other = [record(8, 1.0, made[0][1], step=2)]
    found = recorded(written(tmp_path_factory.mktemp("run"), [*rows, *skipped, *other]), step=1)
    flat = [(pi, mu, a, i, 100 * i + t) for i, (a, tokens) in enumerate(made) for t, (pi, mu) in enumerate(tokens)]
    t = found.tokens
    columns = (t.logp, t.behavior_logp, t.advantage, t.sequence, found.token_ids)
    assert [tuple(row) for row in zip(*(c.tolist() for c in columns), strict=True)] == flat
    assert bool(t.keep.all()) and t.logp.dtype == torch.float64 and found.divergence is None
    last = len(flat) - 1
    ids = rows[-1]["token_ids"]
    assert context(found, last, before=2) == (tuple(ids[max(0, len(ids) - 3) : -1]), ids[-1])


MOVED = (
    torch.tensor(  # pi, mu, A; of drpo(0.2) the weights are 1/2, -1, 3/2, 1 and 1, the ratios 5/4, 9/5, 3/4, 1 and 1
        [(0.5, 0.4, 1.0), (0.9, 0.5, 1.0), (0.3, 0.4, 1.0), (0.02, 0.02, -1.0), (0.5, 0.5, 0.0)], dtype=torch.float64
    )
)


def test_a_reading_by_hand():
    pi, mu, advantage = MOVED.T
    tokens = Tokens(pi.log(), mu.log(), advantage, advantage < 2, torch.arange(5))
    found = reading(parse_spec("drpo(0.2)", REGISTRY), tokens)
    assert (found.silenced, found.pulled_back, found.weakened, found.strengthened) == (0, 0.2, 0.2, 0.2)
    assert found.mass == pytest.approx((0.625 + 1.8 + 1.125 + 1) / (1.25 + 1.8 + 0.75 + 1))
    assert found.effective == pytest.approx(5.55**2 / (0.625**2 + 1.8**2 + 1.125**2 + 1 + 1) / 5)
    assert found.largest == pytest.approx(1.8)
    assert (found.rising, found.falling) == pytest.approx(((0.625 - 1.8 + 1.125) / 3, -1))
    seen = [(b.tokens, b.mass, b.step) for b in found.buckets]
    third, fourth, fifth = (0.2, 1 / 4.55, 1), (0.4, 1.75 / 4.55, 0.875), (0.4, 1.8 / 4.55, -1.8)
    assert seen == [(0, 0, 0), (0, 0, 0), *map(pytest.approx, (third, fourth, fifth))]
    assert tuple(b.low for b in found.buckets) == BUCKETS[:-1]
    assert reading(parse_spec("ppo(0.2, 0.2)", REGISTRY), tokens).silenced == 0.4  # r = 5/4 and 9/5, A > 0


@given(completions, st.sampled_from(OBJECTIVES))
def test_buckets_share_out_the_tokens_and_what_moves_them(made, spec):
    flat = [(pi, mu, a, i) for i, (a, tokens) in enumerate(made) for pi, mu in tokens]
    logp, behavior_logp, advantage, sequence = (torch.tensor(c) for c in zip(*flat, strict=True))
    found = reading(parse_spec(spec, REGISTRY), Tokens(logp, behavior_logp, advantage, sequence >= 0, sequence))
    assert sum(b.tokens for b in found.buckets) == pytest.approx(1)
    assert sum(b.mass for b in found.buckets) == pytest.approx(1 if found.mass else 0, abs=1e-5)
    assert found.silenced + found.pulled_back + found.weakened + found.strengthened <= 1 + 1e-9


def far(tmp_path: Path) -> Path:
    """A batch that has moved: 60 tokens of 6 completions."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for i in range(6):
        mu = torch.rand(10, generator=g, dtype=torch.float64)
        pi = (mu + 0.4 * torch.randn(10, generator=g, dtype=torch.float64)).clamp(0.01, 0.99)
        pairs = list(zip(pi.log().tolist(), mu.log().tolist(), strict=True))
        rows.append(record(i, (-0.5, 0.5)[i % 2], pairs))
    return written(tmp_path / "run", rows)


def test_a_small_step_moves_tokens_as_predicted(tmp_path):
    """Tokens as parameters of their own, one step of plain gradient descent."""
    batch = recorded(far(tmp_path))
    for spec in OBJECTIVES:
        logp = batch.tokens.logp.clone().requires_grad_()
        tokens = Tokens(**{**vars(batch.tokens), "logp": logp})
        total(parse_spec(spec, REGISTRY), tokens, torch.ones_like(logp)).backward()
        rises = (-logp.grad)[batch.tokens.advantage > 0]
        found = reading(parse_spec(spec, REGISTRY), batch.tokens)
        assert found.rising == pytest.approx(float(rises.mean()))
        assert found.falling == pytest.approx(float((-logp.grad)[batch.tokens.advantage < 0].mean()))


def test_cosines_and_disputes(tmp_path):
    batch = recorded(far(tmp_path))
    found = replay(batch, [parse_spec(s, REGISTRY) for s in ("drpo(0.2)", "ppo(0.2, 0.28)", "drpo(0.2)")])
    for i, row in enumerate(found.cosines):
        assert row[i] == pytest.approx(1) and [other[i] for other in found.cosines] == pytest.approx(row)
    assert 0 < found.cosines[0][1] < 0.99
    ppo, same = found.disputes
    assert ppo.cosine == found.cosines[0][1] and len(ppo.tokens) == SHOWN and same.tokens == ()
    apart = [abs(t.first - t.second) for t in ppo.tokens]
    assert apart == sorted(apart, reverse=True)
    weights = [gradient_weight(parse_spec(s, REGISTRY), batch.tokens) for s in ("drpo(0.2)", "ppo(0.2, 0.28)")]
    t = batch.tokens
    r = (t.logp - t.behavior_logp).exp()
    difference = (t.advantage * r * (weights[0] - weights[1])).abs()
    assert int(difference.argmax()) == ppo.tokens[0].token
    top = ppo.tokens[0]
    assert top.first == pytest.approx(float((t.advantage * r * weights[0])[top.token]))
    assert top.second == pytest.approx(float((t.advantage * r * weights[1])[top.token]))
    assert top.token_id == int(batch.token_ids[top.token]) and top.place == top.token % 10
    assert (top.mu, top.pi) == pytest.approx((float(t.behavior_logp[top.token].exp()), float(t.logp[top.token].exp())))
    json.dumps(asdict(found), allow_nan=False)


def test_a_divergence_is_read_where_it_was_recorded_and_refused_elsewhere(tmp_path):
    pairs = [(-1.0, -1.5), (-0.2, -1.2)]
    rows = [record(0, 0.5, pairs, divergence=[0.01, 0.4])]
    spec = "dppo(0.1, divergence='topk_tv')"
    has = recorded(written(tmp_path / "has", rows, spec))
    (read,) = replay(has, [parse_spec(spec, REGISTRY)]).readings
    assert read.silenced == 0.5
    hasnt = recorded(written(tmp_path / "hasnt", [record(0, 0.5, pairs)], "drpo(0.2)"))
    for batch, asked, named in (
        (hasnt, spec, "recorded no divergence"),
        (has, "dppo(0.1, divergence='topk_kl')", "recorded topk_tv"),
    ):
        with pytest.raises(InputError, match=named) as refused:
            replay(batch, [parse_spec("none", REGISTRY), parse_spec(asked, REGISTRY)])
        assert "\n" not in str(refused.value) and "dppo" in str(refused.value)
    with pytest.raises(InputError, match="at least one"):
        replay(has, [])


@pytest.mark.parametrize(
    ("rows", "step", "named"),
    [
        ([], None, "missing or empty"),
        ([{"step": 1, "text": "x"}], None, "none of its 1 completions has logp"),
        ([record(0, 1.0, [(-1.0, -1.0)])], 3, "step=3.*1 alone"),
        ([record(0, 1.0, [(-1.0, -1.0)]), record(0, 1.0, [(-1.0, -1.0)], step=4)], 2, "step=2.*1 to 4"),
        ([{**record(0, 1.0, [(-1.0, -1.0)]), "behavior_logp": []}], None, "0 behavior_logp of 1 sampled"),
        ([{**record(0, 1.0, [(-1.0, -1.0)]), "advantage": None}], None, "cannot be used"),
    ],
)
def test_what_cannot_be_replayed_names_the_run(tmp_path, rows, step, named):
    with pytest.raises(InputError, match=named) as refused:
        recorded(written(tmp_path / "run", rows), step)
    assert str(tmp_path / "run") in str(refused.value) and "\n" not in str(refused.value)


def test_a_broken_file_names_itself(tmp_path):
    folder = written(tmp_path / "run", [])
    (folder / ROLLOUTS).write_text('{"step": 1, \n')
    with pytest.raises(InputError, match=ROLLOUTS):
        recorded(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A real run that is far off-policy: two updates on each rollout, at a great learning rate."""
    folder = tmp_path_factory.mktemp("replayed") / "run"
    train(few_run(steps=2, updates=2, prompts=8, optimizer=AdamW(0.02)), folder)
    return folder


def test_a_real_run_is_replayed_with_its_tokens_and_its_objective(run):
    records = [r for r in read_records(run / ROLLOUTS) if "logp" in r and r["step"] == 1]
    batch = recorded(run, 1)
    assert batch.token_ids.tolist() == [i for r in records for i in r["token_ids"]]
    assert batch.objective == "drpo(0.2)" and batch.updates == 2
    found = replay(batch, [parse_spec("drpo(0.2)", REGISTRY), parse_spec("none", REGISTRY)])
    assert found.trained_with == "drpo(0.2)" and found.tokens == len(batch.token_ids)
    assert found.cosines[0][1] < 1 and found.disputes[0].tokens
    assert recorded(run).step == 2


def test_the_command_prints_draws_and_writes(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ("drpo(0.2)", "ppo(0.2,0.28)")
    assert cli.main(["replay", str(run), "--objectives", *asked, "--step", "1"]) == 0
    assert not any(tmp_path.iterdir()) and (run / "replay.png").read_bytes().startswith(b"\x89PNG")
    assert f"drawn to {run / 'replay.png'}" in capsys.readouterr().out.replace("\n", "")
    files = ("--json", "r.json", "--out", "replay.png")
    assert cli.main(["replay", str(run), "--objectives", *asked, "--step", "1", *files]) == 0
    said = capsys.readouterr().out
    for word in ("step 1", "drpo(0.2)", "ppo(0.2, 0.28)", "mu < 0.001", "Cosine", "differ most", "trained with"):
        assert word in said
    assert (tmp_path / "replay.png").read_bytes().startswith(b"\x89PNG")
    written_down = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert [r["objective"] for r in written_down["readings"]] == ["drpo(0.2)", "ppo(0.2, 0.28)"]


def test_the_command_refuses_in_one_line(run, capsys):
    assert cli.main(["replay", str(run), "--objectives", "dppo(0.1, divergence='topk_tv')"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "reads topk_tv" in line and str(run) in line


def test_tokens_without_a_tokenizer_are_ids(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = far(tmp_path)
    assert cli.main(["replay", str(folder), "--objectives", "drpo(0.2)", "none"]) == 0
    assert "id " in capsys.readouterr().out


def test_no_number_of_a_table_is_cut(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    sheet = Sheet("", ("objective", "strengthened", "mass"), (("drpo(0.2)", "41.7%", "12345.678"),))
    for width in (16, 20, 80):
        out = StringIO()
        Terminal(file=out, width=width).print(as_table(sheet))
        assert "…" not in out.getvalue() and {*"12345.678"} <= {*out.getvalue()}
    assert Terminal(file=StringIO()).width == FILE_WIDTH  # wide enough for a replay's tables
    monkeypatch.setenv("COLUMNS", "70")
    assert Terminal(file=StringIO()).width == 70
