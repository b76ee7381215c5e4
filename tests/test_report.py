"""The numbers behind a run's page, and how they are packed."""

import base64
import gzip
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from drpo import models
from drpo.model_names import SMOLLM2
from drpo.objectives import DPPO, DRPO, GSPO, SPO, PPOClip, SymmetricMask, TokenLoss, Tokens, gradient_weight, ratio
from drpo.recipes.addition import smoke
from drpo.report import browser, decimals, distribution, facts
from drpo.report.panels import Panel, Series, run_panels
from drpo.report.payload import columns_bytes, finite, json_bytes, packed, read_columns
from drpo.report.seen import of_one_step, read_rollouts
from drpo.report.vocabulary import Piece, find_tokenizer, pieces
from drpo.rewards import exact_number
from drpo.train.loop import train
from drpo.train.optim import AdamW
from hand_run import RECORDS, record, write_run
from large_run import word_tokenizer
from test_train import tokens_of
from worlds import sampling, tiny_run

ALL = 10**9


class Own:
    """A user's objective, whose weights hang on all tokens that it is given."""

    tokenwise = False
    needs: frozenset[str] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        r = ratio(tokens)
        return TokenLoss(-r * tokens.advantage * r.detach().mean() ** 2)


OWN = Own()

# Decimals


@given(st.lists(st.floats(allow_infinity=False, width=32), min_size=1))
@example([0.0, 1e-20, 9.995e-21, 0.9995, 0.99949, 1.0, 10.0, 999.5, 1e-3, -1e-3])
@example([3.4e38, 1e16, 9.99e15, -1e16, 1e-30, -1e-30])
def test_a_decimal_is_the_number_to_three_digits_and_codes_are_ordered(values):
    codes = decimals.encode(np.array(values))
    back = decimals.decode(codes)
    for value, code, decimal in zip(values, codes.tolist(), back.tolist(), strict=True):
        if math.isnan(value):
            assert code == decimals.MISSING and math.isnan(decimal)
        elif value == 0:
            assert code == 0 and decimal == 0
        elif abs(value) >= 1e16:
            assert abs(code) == decimals.TOO_LARGE or abs(decimal) == 1e16
        elif abs(value) < 1e-20:
            assert abs(code) == 1 and code * value > 0
        else:
            unit = 10.0 ** (math.floor(math.log10(abs(value))) - 2)
            assert abs(decimal - value) <= 0.5000001 * unit
            assert f"{decimal:.2e}" == repr_of(decimal)
    known = [(v, c) for v, c in zip(values, codes.tolist(), strict=True) if not math.isnan(v)]
    assert all(a[1] <= b[1] for a in known for b in known if a[0] <= b[0])


def repr_of(decimal: float) -> str:
    """A decimal of at most three digits, as it is written with two behind the point."""
    return f"{float(f'{decimal:.3g}'):.2e}"


@given(st.floats(1e-19, 1e15), st.booleans())
def test_a_decimal_is_what_python_prints(value, negative):
    signed = -value if negative else value
    mantissa = value / 10.0 ** (math.floor(math.log10(value)) - 2)
    assume(abs(mantissa % 1 - 0.5) > 1e-6)  # between two decimals either will do
    assert f"{decimals.decode(decimals.encode(np.array([signed])))[0]:.2e}" == f"{signed:.2e}"


def test_neighbouring_decimals_are_one_code_apart():
    decades = [int(d) * 10.0**e for e in range(-4, 3) for d in range(100, 1000)]
    assert set(np.diff(decimals.encode(np.array(decades)).astype(int)).tolist()) == {1}


# Packing

COLUMNS = st.one_of(
    st.lists(st.integers(0, 255)).map(lambda x: np.array(x, dtype=np.uint8)),
    st.lists(st.integers(-32768, 32767)).map(lambda x: np.array(x, dtype=np.int16)),
    st.lists(st.integers(0, 2**32 - 1)).map(lambda x: np.array(x, dtype=np.uint32)),
)


@given(st.dictionaries(st.text(max_size=5), COLUMNS, max_size=4))
def test_columns_come_back_as_they_were(columns):
    back = read_columns(unpacked(packed(columns_bytes(columns))))
    assert list(back) == list(columns)
    for name, column in columns.items():
        assert back[name].dtype == column.dtype and np.array_equal(back[name], column)


def unpacked(text: str) -> bytes:
    return gzip.decompress(base64.b64decode(text))


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=8))
@example([math.nan, math.inf, [-math.inf]])
def test_json_of_a_page_is_strict_and_ascii(value):
    assert json.loads(json_bytes(value), parse_constant=pytest.fail) == finite(value)


def test_half_a_character_can_be_packed():
    assert json.loads(json_bytes("\ud83d")) == "\ud83d"


# Tokens


def test_what_an_update_saw_by_hand():
    rising, falling, skipped, *_ = of_one_step(RECORDS, DRPO(0.2))
    assert [rising.state, falling.state, skipped.state] == ["trained", "trained", "skipped"]
    assert skipped.seen is None and rising.seen is not None and falling.seen is not None
    np.testing.assert_allclose(rising.mu, [0.4, 0.1, 0.5, 0.9], rtol=1e-6)
    np.testing.assert_allclose(rising.seen.pi, [0.5, 0.5, 0.45, 0.9], rtol=1e-6)
    np.testing.assert_allclose(rising.seen.ratio, [1.25, 5.0, 0.9, 1.0], rtol=1e-5)
    np.testing.assert_allclose(rising.seen.shift, [0.1, 0.4, -0.05, 0.0], rtol=1e-5)
    np.testing.assert_allclose(rising.seen.weight, [0.5, -1.0, 1.25, 1.0], rtol=1e-5)
    np.testing.assert_allclose(falling.seen.weight, [0.5, 3.5, 0.95], rtol=1e-5)
    assert rising.seen.outside.tolist() == [False, True, False, False]
    assert falling.seen.outside.tolist() == [False, True, False]


def test_every_state_of_a_completion():
    old = {k: v for k, v in RECORDS[0].items() if k not in ("logp", "update", "advantage")}
    assert [c.state for c in of_one_step([*RECORDS[:5], old], DRPO(0.2))] == [
        *("trained", "trained", "skipped", "skipped", "unmarked", "unrecorded")
    ]


@pytest.mark.parametrize("objective", [GSPO(0.05, 0.05), OWN, DPPO(0.05, divergence="topk_tv")])
def test_the_weights_of_a_run_are_those_of_its_updates(tmp_path, objective):
    """Also where a weight hangs on its whole sequence, where the objective is a user's, and where it reads more."""
    train(tiny_run(objective=objective, steps=2, updates=2, optimizer=AdamW(1e-2)), tmp_path)
    rollouts = read_rollouts(tmp_path, objective, ALL)
    updates = {(c.record["step"], c.record["update"]) for c, _ in rollouts.trained()}
    assert len(updates) >= 2
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    for step, update in updates:
        of_update = [s for c, s in rollouts.trained() if (c.record["step"], c.record["update"]) == (step, update)]
        theirs = tokens_of([r for r in lines if (r["step"], r["update"]) == (step, update) and "logp" in r])
        expected = gradient_weight(objective, theirs)
        np.testing.assert_array_equal(np.concatenate([s.weight for s in of_update]), expected.numpy())
    assert len({float(w) for _, s in rollouts.trained() for w in s.weight}) > 1


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_a_run_of_any_seed_can_be_drawn(tmp_path, seed):
    rollouts = read_rollouts(tmp_path, write_run(tmp_path, seed=seed).objective, 10**6)
    assert distribution.scatter_data(rollouts, seed)


def test_of_a_run_that_is_too_large_whole_groups_are_read(tmp_path):
    records = [
        record("abcd", 0.5, step=s, problem=f"{s}-{p}", sample=i) for s in (1, 2) for p in range(40) for i in (0, 1)
    ]
    run = write_run(tmp_path, records)
    few = read_rollouts(tmp_path, run.objective, most_tokens=len(records) * 5 // 4)
    groups = [c.record["problem"] for c in few.completions]
    assert few.n_all == len(records) and 10 < len(groups) < len(records) / 2
    assert all(groups.count(name) == 2 for name in groups)
    again = read_rollouts(tmp_path, run.objective, most_tokens=len(records) * 5 // 4)
    assert [c.record["problem"] for c in again.completions] == groups
    assert len(read_rollouts(tmp_path, run.objective, ALL).completions) == len(records)


def test_the_browsers_columns_by_hand(tmp_path):
    run = write_run(tmp_path)
    rollouts = read_rollouts(tmp_path, run.objective, ALL)
    ids = browser.vocabulary(rollouts)
    columns = read_columns(columns_bytes(browser.columns(rollouts, ids)))
    assert ids[columns["token"]].tolist() == [i for r in RECORDS for i in r["token_ids"]]
    assert columns["length"].tolist() == [len(r["token_ids"]) for r in RECORDS]
    mu = decimals.decode(columns["mu"])
    assert mu[:7].tolist() == [0.4, 0.1, 0.5, 0.9, 0.4, 0.25, 0.5] and mu[-1] == 0.125
    trained = np.concatenate([columns["mu"][:7], columns["mu"][-1:]])
    assert decimals.decode(trained + columns["pi_above_mu"]).tolist() == [0.5, 0.5, 0.45, 0.9, 0.3, 0.75, 0.49, 0.125]
    assert decimals.decode(columns["ratio"]).tolist() == [1.25, 5.0, 0.9, 1.0, 0.75, 3.0, 0.98, 1.0]
    assert decimals.decode(columns["shift"]).tolist() == [0.1, 0.4, -0.05, 0.0, -0.1, 0.5, -0.01, 0.0]
    assert decimals.decode(columns["weight"]).tolist() == [0.5, -1.0, 1.25, 1.0, 0.5, 3.5, 0.95, 1.0]
    assert columns["outside"].tolist() == [0, 1, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("known", [True, False])
def test_texts_are_stored_only_where_the_tokens_do_not_say_them(tmp_path, known):
    run = write_run(tmp_path, [*RECORDS, {**record("abc", 0.5, step=3), "text": "something else"}])
    rollouts = read_rollouts(tmp_path, run.objective, ALL)
    ids = browser.vocabulary(rollouts)
    found = pieces(models.load_tokenizer("tiny"), ids.tolist()) if known else None
    table = browser.table(rollouts, ids, found)
    texts = [c.record["text"] for c in rollouts.completions]
    assert table["text"] == ([None] * len(RECORDS) + ["something else"] if known else texts)
    said = [table["text"][i] or spelled(table, c.token_ids, ids) for i, c in enumerate(rollouts.completions) if known]
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
    monkeypatch.setattr(models, "smollm2", lambda: pytest.fail("would be fetched"))
    assert find_tokenizer(tmp_path, tiny_run(model=SMOLLM2)) is None
    assert find_tokenizer(tmp_path, tiny_run(model="nobody/has-this")) is None
    word_tokenizer().save_pretrained(tmp_path / "model")
    assert len(find_tokenizer(tmp_path, tiny_run(model="nobody/has-this"))) > 20_000


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


def test_a_boundary_that_no_token_reaches_is_said_not_drawn():
    own, *others = distribution.region_data(DRPO(12.5))
    assert own == {"name": "drpo(12.5)", "own": True, "reachable": False}
    assert [r["name"] for r in others] == ["ppo(0.2, 0.28)", "spo(0.2)", "dppo(0.15, 0.15)"]
    assert all(r["reachable"] and len(r["mu"]) == len(r["low"]) == len(r["high"]) for r in others)
    assert not distribution.region_data(GSPO())[0]["own"]
    assert distribution.regions(SymmetricMask(0.1))[0] == SymmetricMask(0.1)
    mu = distribution.drawn_at(DRPO(0.2))
    first = mu[np.isfinite(distribution.boundary(DRPO(0.2), mu)[0])][0]
    assert first == pytest.approx(0.2, abs=1e-6)


@given(st.lists(st.integers(1, 40), min_size=1))
def test_step_ranges_cover_every_step_once(steps):
    ranges = distribution.step_ranges(steps)
    covered = [s for first, last in ranges for s in range(first, last + 1)]
    assert covered == list(range(min(steps), max(steps) + 1)) and len(ranges) <= distribution.MOST_RANGES


def test_the_histogram_counts_every_token_under_its_sign_and_step(tmp_path):
    run = write_run(tmp_path)
    data = distribution.histogram_data(read_rollouts(tmp_path, run.objective, ALL))
    assert data is not None
    whole, *parts = data["counts"]
    assert whole["steps"] == (1, 3) and [p["steps"] for p in parts] == [(1, 1), (2, 2), (3, 3)]
    assert [sum(c["positive"]) for c in data["counts"]] == [5, 4, 0, 1]
    assert [sum(c["negative"]) for c in data["counts"]] == [3, 3, 0, 0]
    assert (data["least"], data["greatest"]) == (pytest.approx(-1.0), pytest.approx(3.5))

    def bin_of(weight: float) -> int:
        return int(np.searchsorted(data["edges"], weight)) - 1

    assert whole["positive"][bin_of(0.5)] == 1 and whole["negative"][bin_of(0.5)] == 1
    assert whole["positive"][bin_of(-1.0)] == 1 and whole["negative"][bin_of(3.5)] == 1


def test_the_outermost_bins_count_what_lies_beyond(tmp_path, monkeypatch):
    monkeypatch.setattr(distribution, "_TAIL", 0.2)
    run = write_run(tmp_path)
    data = distribution.histogram_data(read_rollouts(tmp_path, run.objective, ALL))
    assert data is not None and data["edges"][0] > -1.0 and data["edges"][-1] < 3.5
    assert data["counts"][0]["positive"][0] == data["counts"][0]["negative"][-1] == 1


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1))
def test_bins_hold_0_and_1_and_rise(weights):
    edges = distribution.bin_edges(np.array(weights))
    assert len(edges) == distribution.N_BINS + 1 and (np.diff(edges) > 0).all()
    assert edges[0] < 0 and edges[-1] > 1


def test_the_scatter_is_a_fixed_choice_of_trained_tokens(tmp_path, monkeypatch):
    run = write_run(tmp_path)
    rollouts = read_rollouts(tmp_path, run.objective, ALL)
    all_of_them = distribution.scatter_data(rollouts, 0)
    assert all_of_them["n"] == 8 and all_of_them["mu"] == [0.4, 0.1, 0.5, 0.9, 0.4, 0.25, 0.5, 0.125]
    assert all_of_them["sign"] == [1, 1, 1, 1, -1, -1, -1, 1] and all_of_them["weight"][5] == 3.5
    monkeypatch.setattr(distribution, "N_SCATTERED", 3)
    some = [distribution.scatter_data(rollouts, seed) for seed in (0, 0, 1, 2, 3)]
    assert some[0] == some[1] and any(s != some[0] for s in some[2:])
    assert all(len(s["mu"]) == len(s["sign"]) == 3 and s["n"] == 8 for s in some)


def test_seconds_are_summed_by_phase_and_step():
    steps = [{"step": 0, "evaluation": 2.0}, {"step": 1, "update": 1.0, "rollout": 3.0}]
    after = [{"step": 1, "evaluation": 0.5}, {"step": 1, "evaluation": 0.25}]
    assert facts.timeline([*steps, *after]) == {
        "step": [0, 1],
        "phases": {"rollout": [0.0, 3.0], "update": [0.0, 1.0], "evaluation": [2.0, 0.75]},
    }
    assert facts.timeline([]) == {"step": [], "phases": {}}


def test_the_configuration_says_what_differs_and_from_what():
    told = facts.configuration(replace(smoke(), seed=3, sampling=sampling(samples=6), reward=exact_number))
    rows = {row[0]: row[1:] for row in told["rows"]}
    assert told["recipe"] == "smoke"
    assert rows["seed"] == ["3", "0", "0"] and rows["sampling.samples"] == ["6", "4", "8"]
    assert rows["objective"] == ["drpo(0.2)", "drpo(0.2)", "drpo(12.5)"]
    assert rows["reward"] == ["exact_number", "-", "-"]
    assert facts.configuration(tiny_run(name="mine"))["recipe"] is None


def test_accuracy_before_and_after():
    rows = [{"step": s, "accuracy": s / 4, "low": 0.0, "high": 1.0, "n_problems": 9, "n_samples": 1} for s in (0, 1, 2)]
    assert [a["step"] for a in facts.accuracies(rows)] == [0, 2]
    assert [a["step"] for a in facts.accuracies(rows[:1])] == [0] and facts.accuracies([]) == []


def test_panels_show_what_there_is_and_say_it_in_words():
    metrics = [
        {"step": 1, "reward_mean": 0.25, "shift_mean": 0.01},
        {"step": 2, "reward_mean": 0.5, "shift_mean": 0.03},
    ]
    panels = {p.title: p for p in run_panels(tiny_run(), metrics, [])}
    assert list(panels) == ["Training reward", "Shift |π-μ|"]
    assert [v.y for v in panels["Shift |π-μ|"].levels] == [0.2]
    far = {p.title: p for p in run_panels(tiny_run(objective=DRPO(12.5)), metrics, [])}["Shift |π-μ|"]
    assert far.levels == [] and "beyond what any token can reach" in far.caption
    assert isinstance(far, Panel) and far.series == [Series("mean", [1, 2], [0.01, 0.03])]
