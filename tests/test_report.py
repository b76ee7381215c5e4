"""The numbers behind a run's page, and how they are packed."""

import html
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from drpo.lab.replay import recorded
from drpo.model import loading
from drpo.model.names import SMOLLM2
from drpo.objectives import (
    DPPO,
    DRPO,
    GSPO,
    REGISTRY,
    SPO,
    PPOClip,
    SymmetricMask,
    TokenLoss,
    Tokens,
    gradient_weight,
    ratio,
)
from drpo.recipes.addition import smoke
from drpo.report import browser, distribution, run_summary
from drpo.report.figures import COLORS, plain
from drpo.report.panels import MOST_POINTS, PANELS, Line, curves, drawn_lines, line_traces, numbers, thinned
from drpo.report.payload import column_bytes, finite, json_bytes, packed
from drpo.report.token_statistics import of_one_step, read_rollouts
from drpo.report.vocabulary import Piece, find_tokenizer, pieces
from drpo.rewards import exact_number
from drpo.spec import format_spec
from drpo.train.config import configure
from drpo.train.loop import train
from drpo.train.metric_tables import KINDS
from drpo.train.optim import AdamW
from drpo.train.records import METRICS, read_records
from support.environments import TEMPLATE, Chat, talkative
from support.hand_run import NASTY, RECORDS, completions, conversation, record, updated, write_run
from support.large_run import word_tokenizer
from support.pages import read_column, traces, unpacked
from support.runs import tokens_of
from support.worlds import few_run, sampling, tiny_run

ALL = 10**9


class Own:
    """A user's objective, whose weights hang on all tokens that it is given."""

    tokenwise = False
    needs: frozenset[str] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        r = ratio(tokens)
        return TokenLoss(-r * tokens.advantage * r.detach().mean() ** 2)


OWN = Own()

# Numbers and packing


@given(st.lists(st.floats(width=32, allow_infinity=False), min_size=1))
@example([0.0, 1e-20, 9.995e-21, 0.9995, 0.99949, 1.0, 10.0, 999.5, 1e-3, -1e-3, math.nan, 3.4e38, 1e-45])
def test_a_number_keeps_three_digits(values):
    decimals, places = browser.three_digits(np.array(values))
    for value, decimal in zip(values, (decimals[i] for i in places), strict=True):
        if math.isnan(value) or value == 0:
            assert math.isnan(decimal) if math.isnan(value) else decimal == 0
        else:
            unit = 10.0 ** (math.floor(math.log10(abs(value))) - 2)
            assert abs(decimal - value) <= 0.5000001 * unit and float(f"{decimal:.3g}") == decimal


def test_a_number_below_the_normal_ones_is_zero():
    decimals, places = browser.three_digits(np.array([math.exp(-740), 1.0]))
    assert [decimals[i] for i in places] == [0.0, 1.0]


@given(st.lists(st.integers(0, 2**32 - 1)).map(lambda x: np.array(x, dtype=np.uint32)))
def test_a_column_comes_back_as_it_was(column):
    assert np.array_equal(read_column(unpacked(packed(column_bytes(column)))), column)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=8))
@example([math.nan, math.inf, [-math.inf]])
def test_json_of_a_page_is_strict_and_ascii(value):
    assert json.loads(json_bytes(value), parse_constant=pytest.fail) == finite(value)


def test_half_a_character_can_be_packed():
    assert json.loads(json_bytes("\ud83d")) == "\ud83d"


# Tokens


def test_what_an_update_saw_by_hand():
    rising, falling, skipped, *_ = completions(of_one_step(RECORDS, DRPO(0.2)))
    assert [rising.state, falling.state, skipped.state] == ["trained", "trained", "skipped"]
    assert skipped.statistics is None and rising.statistics is not None and falling.statistics is not None
    np.testing.assert_allclose(rising.mu, [0.4, 0.1, 0.5, 0.9], rtol=1e-6)
    np.testing.assert_allclose(rising.statistics.pi, [0.5, 0.5, 0.45, 0.9], rtol=1e-6)
    np.testing.assert_allclose(rising.statistics.ratio, [1.25, 5.0, 0.9, 1.0], rtol=1e-5)
    np.testing.assert_allclose(rising.statistics.prob_diff, [0.1, 0.4, -0.05, 0.0], rtol=1e-5)
    np.testing.assert_allclose(rising.statistics.weight, [0.5, -1.0, 1.25, 1.0], rtol=1e-5)
    np.testing.assert_allclose(falling.statistics.weight, [0.5, 3.5, 0.95], rtol=1e-5)
    assert rising.statistics.out_of_region.tolist() == [False, True, False, False]
    assert falling.statistics.out_of_region.tolist() == [False, True, False]


def test_every_state_of_a_completion():
    states = of_one_step(RECORDS[:5], DRPO(0.2)).states
    assert states == ["trained", "trained", "skipped", "skipped", "unscored"]


@pytest.mark.parametrize("objective", [GSPO(0.05, 0.05), OWN, DPPO(0.05, divergence="topk_tv")])
def test_the_weights_of_a_run_are_those_of_its_updates(tmp_path, objective):
    """Also where a weight hangs on its whole sequence, where the objective is a user's, and where it reads more."""
    train(tiny_run(objective=objective, steps=2, updates=2, optimizer=AdamW(1e-2)), tmp_path)
    rollouts = read_rollouts(tmp_path, objective, ALL)
    updates = {(c.record["step"], c.record["update"]) for c, _ in updated(rollouts)}
    assert len(updates) >= 2
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    for step, update in updates:
        of_update = [s for c, s in updated(rollouts) if (c.record["step"], c.record["update"]) == (step, update)]
        theirs = tokens_of([r for r in lines if (r["step"], r["update"]) == (step, update) and "logp" in r])
        expected = gradient_weight(objective, theirs)
        np.testing.assert_array_equal(np.concatenate([s.weight for s in of_update]), expected.numpy())
    assert len({float(w) for _, s in updated(rollouts) for w in s.weight}) > 1


def test_an_episode_of_several_turns_by_hand():
    """Environment tokens have no statistics, an untrained branch has none either, and each token has its advantage."""
    rollouts = of_one_step([conversation()], DRPO(0.2))
    (talk,) = completions(rollouts)
    assert len(talk.token_ids) == 8 and 9 not in talk.token_ids and talk.lengths == (6, 2)
    assert talk.trained.tolist() == [True] * 6 + [False] * 2 and talk.statistics is not None
    np.testing.assert_allclose(talk.mu, [0.4] * 6 + [0.5] * 2, rtol=1e-6)
    np.testing.assert_allclose(talk.statistics.weight, [0.5, 1.0, 1.0, 1.5, -0.5, 1.0], rtol=1e-5)
    np.testing.assert_allclose(talk.statistics.advantage, [0.5] * 3 + [0.25] * 3)
    ids = browser.vocabulary(rollouts)
    table = browser.table(rollouts, ids, pieces(loading.load_tokenizer("tiny"), ids.tolist()))
    places, values = browser.columns(rollouts, ids)
    assert table["gaps"] == [[[6, 8]]] and (places["length"].tolist(), places["n_trained"].tolist()) == ([8], [6])
    assert [values["advantage"][i] for i in places["advantage"]] == [0.5] * 3 + [0.25] * 3
    (shown,) = table["conversation"]
    said = [(m["role"], m["text"], m["turn"], m["reward"], m["branch"], m["failed"]) for m in shown["messages"]]
    assert said[2:] == [
        ("assistant", "one", None, None, False, False),
        ("user", "2?", None, None, False, False),
        ("assistant", None, 0, 0.0, False, False),  # the page has its text in the tokens
        ("tool", "4", None, None, False, False),
        ("assistant", None, 1, 0.5, False, False),
        ("user", f"Error: {NASTY}", None, None, False, True),
        ("assistant", None, 2, 0.0, True, False),
    ]
    assert shown["messages"][4]["calls"] == ('double({"x": 2})',)
    assert [text for text, _ in shown["remarks"]] == [
        "3 turns", "ended by the environment", "1 call", "1 failed call", "1 branch"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("role", "changes"),
    [("user", {"objective": GSPO(0.05, 0.05), "sequence": "turn"}), ("tool", {"objective": GSPO(0.05, 0.05)})],
)
def test_of_a_run_in_environments_every_reader_has_what_the_trainer_had(tmp_path, role, changes):
    """With environment tokens within the sequences, or with branches that are one sequence of the objective."""
    task = {"task": Chat(role=role), "sampling.max_new_tokens": 12, "eval_problems": 0, "steps": 1}
    run = few_run(**task, **changes)
    train(run, tmp_path, components=talkative(run, TEMPLATE))
    rollouts = read_rollouts(tmp_path, run.objective.loss, ALL, run.objective.sequence)
    figures = read_records(tmp_path / METRICS)
    for m in figures:
        seen = [s for c, s in updated(rollouts) if c.record["step"] == m["step"]]
        weight, moved = (np.concatenate([getattr(s, n) for s in seen]) for n in ("weight", "prob_diff"))
        assert len(weight) == m["trained_tokens"] > 0
        assert weight.mean(dtype=float) == pytest.approx(m["weight_mean"], rel=1e-6)
        assert np.abs(moved).mean(dtype=float) == pytest.approx(m["prob_diff_mean"], rel=1e-4, abs=1e-9)
        batch = recorded(tmp_path, m["step"])
        units = [len(c.record["turns"]) if changes.get("sequence") else 1 for c, _ in updated(rollouts)]
        assert len(batch.tokens.logp) == len(weight) and len(batch.tokens.sequence.unique()) == sum(units)
    assert sum(len(c.token_ids) for c in completions(rollouts)) == sum(m["sampled_tokens"] for m in figures)
    assert max(len(c.lengths) for c in completions(rollouts)) == (3 if role == "tool" else 1)
    assert "Turns and tools" in panels_of(figures)


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_a_run_of_any_seed_can_be_drawn(tmp_path, seed):
    rollouts = read_rollouts(tmp_path, write_run(tmp_path, seed=seed).objective.loss, 10**6)
    assert distribution.scatter_plots(rollouts, DRPO(0.2), seed)


def test_of_a_run_that_is_too_large_whole_groups_are_read(tmp_path):
    records = [
        record("abcd", 0.5, step=s, problem=f"{s}-{p}", sample=i) for s in (1, 2) for p in range(40) for i in (0, 1)
    ]
    run = write_run(tmp_path, records)
    few = read_rollouts(tmp_path, run.objective.loss, most_tokens=len(records) * 5 // 4)
    groups = [c.record["problem"] for c in completions(few)]
    assert few.n_all == len(records) and 10 < len(groups) < len(records) / 2
    assert all(groups.count(name) == 2 for name in groups)
    again = read_rollouts(tmp_path, run.objective.loss, most_tokens=len(records) * 5 // 4)
    assert [c.record["problem"] for c in completions(again)] == groups
    assert len(read_rollouts(tmp_path, run.objective.loss, ALL)) == len(records)


def test_the_browsers_columns_by_hand(tmp_path):
    run = write_run(tmp_path)
    rollouts = read_rollouts(tmp_path, run.objective.loss, ALL)
    ids = browser.vocabulary(rollouts)
    places, values = browser.columns(rollouts, ids)
    told = {name: [values[name][i] for i in places[name]] for name in values}
    assert ids[places["token"]].tolist() == [i for r in RECORDS for i in r["token_ids"]]
    assert places["length"].tolist() == [len(r["token_ids"]) for r in RECORDS]
    assert told["mu"][:7] == [0.4, 0.1, 0.5, 0.9, 0.4, 0.25, 0.5] and told["mu"][-1] == 0.125
    assert told["pi"] == [0.5, 0.5, 0.45, 0.9, 0.3, 0.75, 0.49, 0.125]
    assert told["ratio"] == [1.25, 5.0, 0.9, 1.0, 0.75, 3.0, 0.98, 1.0]
    assert told["prob_diff"] == [0.1, 0.4, -0.05, 0.0, -0.1, 0.5, -0.01, 0.0]
    assert told["weight"] == [0.5, -1.0, 1.25, 1.0, 0.5, 3.5, 0.95, 1.0]
    assert places["out_of_region"].tolist() == [0, 1, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("known", [True, False])
def test_texts_are_stored_only_where_the_tokens_do_not_say_them(tmp_path, known):
    run = write_run(tmp_path, [*RECORDS, {**record("abc", 0.5, step=3), "text": "something else"}])
    rollouts = read_rollouts(tmp_path, run.objective.loss, ALL)
    ids = browser.vocabulary(rollouts)
    found = pieces(loading.load_tokenizer("tiny"), ids.tolist()) if known else None
    table = browser.table(rollouts, ids, found)
    texts = [c.record["text"] for c in completions(rollouts)]
    assert table["text"] == ([None] * len(RECORDS) + ["something else"] if known else texts)
    said = [table["text"][i] or spelled(table, c.token_ids, ids) for i, c in enumerate(completions(rollouts)) if known]
    assert said == (texts if known else [])


def spelled(table, token_ids, ids) -> str:
    places = [ids.tolist().index(i) for i in token_ids]
    return "".join(table["pieces"][p] for p in places if p not in table["special"])


def test_pieces_join_to_the_text_with_the_spaces_of_either_kind_of_tokenizer():
    tokenizer = word_tokenizer()
    ids = [5, 17, 300, 0]
    assert "".join(p.text for p in pieces(tokenizer, ids) if not p.special) == tokenizer.decode(ids[:-1])
    assert pieces(tokenizer, [0]) == [Piece("<eos>", special=True)]

    class SentencePiece:
        all_special_ids = ()

        def decode(self, ids, **_):
            return ("the", "re")[ids[0]]

        def convert_ids_to_tokens(self, ids):
            return [("\u2581the", "re")[i] for i in ids]

    assert [p.text for p in pieces(SentencePiece(), [0, 1])] == [" the", "re"]


def test_a_tokenizer_comes_from_this_machine_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("DRPO_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "smollm2", lambda: pytest.fail("would be fetched"))
    assert find_tokenizer(tmp_path, few_run(model=SMOLLM2)) is None
    assert find_tokenizer(tmp_path, few_run(model="nobody/has-this")) is None
    word_tokenizer().save_pretrained(tmp_path / "model")
    assert len(find_tokenizer(tmp_path, few_run(model="nobody/has-this"))) > 20_000


@pytest.mark.parametrize("damaged", ["", "[]", "{}", '{"version": '])
def test_a_damaged_tokenizer_is_none(tmp_path: Path, damaged: str):
    loading.load_tokenizer("tiny").save_pretrained(tmp_path / "model")
    assert find_tokenizer(tmp_path, few_run(model="tiny")) is not None
    (tmp_path / "model" / "tokenizer.json").write_text(damaged)
    assert find_tokenizer(tmp_path, few_run(model="tiny")) is None


# Regions, bins, seconds

INSIDE = 1e-3


@pytest.mark.parametrize("objective", [PPOClip(0.2, 0.28), SPO(0.3), DPPO(0.15), DRPO(0.2), DRPO(0.1, power=0.5)])
@pytest.mark.parametrize("mu", [0.02, 0.3, 0.7])
def test_boundaries_are_where_the_weights_say_that_regions_end(objective, mu):
    """Pushed outwards, a token has a weight inside, and none (or a negative one) outside."""
    low, high = (float(x[0]) for x in distribution.boundary(objective, np.array([mu])))
    for edge, advantage, way in ((low, -1.0, -1), (high, 1.0, 1)):
        if not math.isnan(edge):
            before, after = (weight_at(objective, mu, edge + way * x * edge, advantage) for x in (-INSIDE, INSIDE))
            assert before > 0 and after <= 0, (edge, before, after)
    assert 0 < mu < 1 and (math.isnan(low) or low < mu) and (math.isnan(high) or high > mu)


def weight_at(objective, mu: float, pi: float, advantage: float) -> float:
    one = torch.ones(1, dtype=torch.float64)
    tokens = Tokens((pi * one).log(), (mu * one).log(), advantage * one, one.bool(), one.long())
    return float(gradient_weight(objective, tokens))


def test_a_boundary_that_no_token_reaches_is_said_not_drawn(tmp_path):
    rollouts = read_rollouts(tmp_path, write_run(tmp_path).objective.loss, ALL)
    for objective, own in ((DRPO(12.5), 0), (DRPO(0.2), 2)):
        log, linear = distribution.scatter_plots(rollouts, objective, 0)
        assert len(traces(log, f"{format_spec(objective, REGISTRY)}, this run's")) == own
        assert ("No token can reach the boundary of drpo(12.5)" in log.caption) == (own == 0)
        assert len(traces(linear, "ppo(0.2, 0.28)")) == 2
    assert GSPO() not in distribution.regions(GSPO())
    assert distribution.regions(SymmetricMask(0.1))[0] == SymmetricMask(0.1)
    mu = distribution.drawn_at(DRPO(0.2))
    first = mu[np.isfinite(distribution.boundary(DRPO(0.2), mu)[0])][0]
    assert first == pytest.approx(0.2, abs=1e-6)


# Figures


def test_the_scatter_is_a_fixed_choice_of_trained_tokens(tmp_path, monkeypatch):
    run = write_run(tmp_path)
    rollouts = read_rollouts(tmp_path, run.objective.loss, ALL)

    def drawn(seed: int) -> dict[str, list[tuple[float, float, float]]]:
        log, linear = distribution.scatter_plots(rollouts, run.objective.loss, seed)
        assert [t.x for t in log.figure.data] == [t.x for t in linear.figure.data]
        assert (log.figure.layout.xaxis.type, linear.figure.layout.xaxis.type) == ("log", None)
        points = {name: traces(log, name) for name in ("A > 0", "A < 0")}
        return {n: sorted(p for t in of for p in zip(t.x, t.y, t.customdata, strict=True)) for n, of in points.items()}

    rising = [(0.1, 0.5, -1.0), (0.125, 0.125, 1.0), (0.4, 0.5, 0.5), (0.5, 0.45, 1.25), (0.9, 0.9, 1.0)]
    assert drawn(0) == {"A > 0": rising, "A < 0": [(0.25, 0.75, 3.5), (0.4, 0.3, 0.5), (0.5, 0.49, 0.95)]}
    monkeypatch.setattr(distribution, "N_SCATTERED", 3)
    some = [drawn(seed) for seed in (0, 0, 1, 2)]
    assert some[0] == some[1] and any(s != some[0] for s in some[2:])
    assert all(sum(map(len, s.values())) == 3 for s in some)


@pytest.mark.parametrize("tail", [5e-4, 0.2])
def test_the_histogram_counts_every_token_under_its_sign(tmp_path, monkeypatch, tail):
    """Also those beyond the outermost bins."""
    monkeypatch.setattr(distribution, "_TAIL", tail)
    run = write_run(tmp_path)
    plot = distribution.histogram_plot(read_rollouts(tmp_path, run.objective.loss, ALL))
    assert plot is not None and "8 trained tokens" in plot.caption and "from -1 to 3.5" in plot.caption
    positive, negative = (np.array(traces(plot, name)[0].y) for name in ("A > 0", "A < 0"))
    left, width = np.array(plot.figure.data[0].x), plot.figure.data[0].width
    edges = np.append(left, left[-1] + width)
    for counts, weights in ((positive, [-1.0, 0.5, 1.25, 1.0, 1.0]), (negative, [0.5, 3.5, 0.95])):
        assert counts.tolist() == np.histogram(np.clip(weights, edges[0], edges[-1]), edges)[0].tolist()
        assert counts.sum() == len(weights)
    assert (edges[0] > -1) == (edges[-1] < 3.5) == (tail == 0.2)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1))
def test_bins_hold_0_and_1_and_rise(weights):
    edges = distribution.bin_edges(np.array(weights))
    assert len(edges) == distribution.N_BINS + 1 and (np.diff(edges) > 0).all()
    assert edges[0] < 0 and edges[-1] > 1


def test_seconds_are_summed_by_phase_and_step():
    steps = [{"step": 0, "evaluation": 2.0}, {"step": 1, "update": 1.0, "rollout": 3.0}]
    after = [{"step": 1, "evaluation": 0.5}, {"step": 1, "evaluation": 0.25}]
    phases = run_summary.phase_seconds([*steps, *after])
    assert phases == {"rollout": {0: 0.0, 1: 3.0}, "update": {0: 0.0, 1: 1.0}, "evaluation": {0: 2.0, 1: 0.75}}
    plot = run_summary.timeline_plot(phases)
    assert {t.name: dict(zip(t.x, t.y, strict=True)) for t in plot.figure.data} == phases
    assert run_summary.shares(phases).rows[2] == ("evaluation", "2.75", "40.7%")
    assert run_summary.phase_seconds([]) == {}
    many = run_summary.timeline_plot({"update": dict.fromkeys(range(999), 2.0) | {999: 4.0}})
    assert "mean of 5 steps" in many.caption
    (bars,) = many.figure.data
    assert len(bars.x) == run_summary.MOST_BARS and bars.y[0] == 2.0 and bars.y[-1] == pytest.approx(2.4)


def test_the_configuration_says_what_differs_and_from_what():
    run = configure(smoke(), seed=3, sampling=sampling(samples=6), reward=exact_number)
    base, differing, every = run_summary.configuration(run)
    assert base == "the recipe smoke" and every.head == ("field", "this run", "recipe smoke", "default")
    told = {row[0]: row[1:] for row in differing.rows}
    assert told["seed"] == ("3", "0", "0") and told["sampling.samples"] == ("6", "4", "8")
    assert told["reward"] == ("exact_number", "-", "-") and "objective" not in told
    assert ("objective", "drpo(0.2)", "drpo(0.2)", "drpo(12.5)") in every.rows
    assert run_summary.configuration(few_run(name="mine"))[0] == "the defaults"


def test_accuracy_before_and_after():
    change = {"difference": 0.25, "difference_low": -0.1, "difference_high": 0.6}
    rows = [
        {"step": s, "reward_mean": s / 4, "low": 0.0, "high": 1.0, "n_problems": 9, "n_samples": 1} for s in (0, 1, 2)
    ]
    before, after = run_summary.held_out([*rows[:2], rows[2] | change])
    assert before == ("0.0%", "before training: 0.0% (95 % interval 0.0% to 100.0%, 9 problems, avg@1)")
    assert after[0] == "50.0%" and "+25.0 points from step 0 (paired, 95 % interval -10.0 to +60.0 points)" in after[1]
    assert run_summary.held_out(rows[:1]) == [before] and run_summary.held_out([]) == []
    unbounded = rows[0] | {"reward_mean": -3.0, "low": math.nan, "high": math.nan}
    assert run_summary.held_out([unbounded]) == [("-3", "before training: -3 (9 problems, avg@1)")]


def panels_of(metrics, evaluations=(), **changes):
    """Title -> panel, lines, horizontal lines and figure."""
    drawn = drawn_lines(few_run(**changes), metrics, evaluations)
    return {panel.title: (lines, levels, curves("panel", panel, {"": lines}, levels)) for panel, lines, levels in drawn}


def test_a_critic_has_curves_of_its_own():
    drawn = panels_of([{"step": 1, "explained_variance": 0.5, "value_loss": 2.0, "value_grad_norm": 3.0}])
    assert list(drawn) == ["Critic: explained variance", "Critic: loss", "Critic: gradient norm"]
    assert [lines[0].y for lines, _, _ in drawn.values()] == [[0.5], [2.0], [3.0]]


def test_every_curve_is_the_records_and_has_a_gap_where_these_have_no_number():
    broken = [1.5, None, math.nan, math.inf, -math.inf, 0.5]
    keys = [key for panel in PANELS for key in panel.lines]
    assert set(keys) <= {key for table in KINDS.values() for key in table}
    metrics = [
        {"step": s, **{key: y + i for i, key in enumerate(keys) if y is not None}} for s, y in enumerate(broken, 1)
    ]
    drawn = panels_of(metrics)
    assert list(drawn) == [panel.title for panel in PANELS]
    at = iter(range(len(keys)))
    for panel in PANELS:
        lines, levels, plot = drawn[panel.title]
        for trace, name in zip(plot.figure.data, panel.lines.values(), strict=False):
            i = next(at)
            assert trace.name == name and list(trace.x) == [1, 2, 3, 4, 5, 6]
            assert list(trace.y) == [1.5 + i, None, None, None, None, 0.5 + i] and not trace.connectgaps
        layout = plot.figure.layout
        assert (layout.xaxis.title.text, layout.yaxis.title.text) == ("step", panel.unit)
        assert (layout.yaxis.type == "log") == panel.log
        assert numbers([(panel, lines, levels)]).rows[0][-1] == "2 of 6"
        assert len(plot.figure.data) == len(lines) + len(levels)


def test_a_run_of_one_step_and_one_of_none_have_figures():
    lines, levels, plot = panels_of([{"step": 1, "reward_mean": 0.25}])["Training reward"]
    assert list(plot.figure.data[0].y) == [0.25] and "markers" in plot.figure.data[0].mode and levels == []
    assert panels_of([]) == {} and panels_of([{"step": 1, "reward_mean": None}]) == {}
    assert lines[0].known == [0.25]


def test_accuracy_has_its_intervals():
    nothing = {"low": None, "high": math.nan}
    rows = [{"step": 0, "reward_mean": 0.25, "low": 0.1, "high": 0.5}, {"step": 4, "reward_mean": 0.5, **nothing}]
    rows.append({"step": 8, "reward_mean": 0.75, "low": 0.6, "high": 0.9})
    _, _, plot = panels_of([], rows)["Held-out reward"]
    ground, trace = plot.figure.data
    assert list(trace.x) == [0, 4, 8] and list(trace.y) == [0.25, 0.5, 0.75] and "95 % intervals" in plot.caption
    assert list(ground.x) == [0, 8, 8, 0] and list(ground.y) == [0.5, 0.9, 0.6, 0.1]  # the upper ends, and back
    assert "95 %" not in panels_of([], rows[1:2])["Held-out reward"][2].caption


def test_a_radius_is_drawn_where_a_token_can_reach_it():
    metrics = [{"step": 1, "prob_diff_mean": 0.01}]
    assert panels_of(metrics)["Probability difference |π-μ|"][1] == [("radius", 0.2)]
    assert panels_of(metrics, objective=DRPO(12.5))["Probability difference |π-μ|"][1] == []


@given(st.lists(st.none() | st.floats(-9, 9), min_size=MOST_POINTS + 1, max_size=3 * MOST_POINTS))
@settings(max_examples=5)
def test_a_long_curve_keeps_its_extremes_and_its_gaps(y):
    assume(any(value is not None for value in y))
    kept = thinned(y)
    assert len(kept) <= 1.5 * MOST_POINTS + 2 and kept == sorted(set(kept)) and kept[-1] == len(y) - 1
    known = [value for value in y if value is not None]
    shown = [y[i] for i in kept]
    assert min(known) in shown and max(known) in shown and (None in shown) == (None in y)
    (trace,) = line_traces(Line("x", range(len(y)), y), 0)
    assert trace["x"] == kept and trace["y"] == shown


@given(st.text(alphabet=st.sampled_from('<>&;/="ab')))
def test_no_text_of_a_figure_is_markup(text):
    """Plotly reads <b>, <a href>, <br> and entities in every text; %{y} only in a template, which is ours."""
    figure = plain({"data": [{"name": text, "hovertemplate": "<b>%{y}</b>"}], "layout": {"title": {"text": [text]}}})
    (trace,) = figure["data"]
    assert trace["hovertemplate"] == "<b>%{y}</b>" and figure["layout"]["title"]["text"] == [trace["name"]]
    assert "<" not in trace["name"] and html.unescape(trace["name"]) == text


def test_colours_are_plain_to_see_on_both_grounds():
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    for color in COLORS:
        for ground in ("#ffffff", "#171c23"):  # --surface of style.css
            low, high = sorted([luminance(color), luminance(ground)])
            assert (high + 0.05) / (low + 0.05) >= 3, (color, ground)


def test_plotly_is_loaded_only_where_a_report_is_written():
    for path in sorted(Path(browser.__file__).parents[1].rglob("*.py")):
        assert not re.findall(r"^(?:import|from) plotly\b", path.read_text(), flags=re.M), path  # `lazily` alone does
