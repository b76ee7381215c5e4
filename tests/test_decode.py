"""Decoding many rows together gives what one row alone gives, with every logit computed anew: no cache, no batch.

Not covered: GPUs, and speed.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from drpo.rollout import cache, decode, prefill, sample
from drpo.rollout.attention import UnsupportedError, grouped_attention
from drpo.rollout.decode import GroupDecoder, PlainDecoder, draw_rows
from drpo.rollout.routes import ReadRoutes
from drpo.rollout.sample import BLOCK, draw, uniforms
from drpo.rollout.temperatures import temper_by_position
from drpo.rollout.time_steps import limit_time_steps
from drpo.rollout.trial import Way, can_share_prefix, way_to_decode
from drpo.rollout.turn_ends import stop_ids
from drpo.types import Episode, Problem, Request, Sampling
from support.architectures import FAMILIES, GROUPED, PLAIN
from support.families import build
from support.rollouts import transformers_engine
from support.tiny_world import PROBLEMS, STOPS, distribution, tiny

SAMPLING = Sampling(samples=2, max_new_tokens=12)


def made(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build().eval()
    model.generation_config = GenerationConfig(eos_token_id=sorted(STOPS))
    return model


def exact(p: Tensor, u: float) -> int:
    """The first index whose cumulative probability exceeds u, in float64."""
    cumulative = p.double().cumsum(0)
    return int((cumulative > u * cumulative[-1]).nonzero()[0])


# ---- completions ----


def check(model: PreTrainedModel, completions: Sequence[Episode], stops: frozenset[int]) -> None:
    """Each token is the one drawn from the logits behind all before it, of one row alone, without a cache."""
    for c in completions:
        logp, ids = distribution(model, c, 1.0), c.sequence.token_ids
        u = uniforms((7, c.problem_id, c.sample), c.sampling.max_new_tokens)[: len(ids)]
        drawn = [exact(torch.softmax(row, -1), number) for row, number in zip(logp, u.tolist(), strict=True)]
        assert ids.tolist() == drawn, (c.problem_id, c.sample)
        ends = [i in stops for i in drawn]
        assert not any(ends[:-1]) and (ends[-1] or len(ids) == c.sampling.max_new_tokens)
        torch.testing.assert_close(c.sequence.behavior_logp, logp.gather(-1, ids[:, None])[:, 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", [*GROUPED, *PLAIN])
def test_completions_are_those_of_one_row_alone_without_a_cache(family: str) -> None:
    model = made({**GROUPED, **PLAIN}[family])
    _, tokenizer = tiny()
    completions = transformers_engine(model).generate(PROBLEMS, SAMPLING, (7,))
    assert len({len(c.sequence.token_ids) for c in completions}) > 3
    check(model, completions, stop_ids(model, tokenizer))


NEAR = tuple(Problem.of_text(f"n{n}", "12 * 34 + 5 - 67 = " * 2 + "?" * n, "") for n in (4, 0, 3))
"""Prompts of nearly the same length, which are read together, with a little padding."""


@pytest.mark.parametrize(
    ("problems", "samples", "max_rows"),
    [(PROBLEMS[2:3], 1, 256), (PROBLEMS, 1, 2), (PROBLEMS[1::-1], 3, 4), (NEAR, 2, 256)],
)
def test_any_shape_of_batch(problems: Sequence[Problem], samples: int, max_rows: int, small_blocks: None) -> None:
    """One row; turns of other prompts than those asked for side by side; long enough for the cache to grow."""
    model, tokenizer = tiny()
    sampling = Sampling(samples=samples, max_new_tokens=2 * cache.BLOCK + 3)
    completions = transformers_engine(model, max_rows=max_rows).generate(problems, sampling, (7,))
    assert [(c.problem_id, c.sample) for c in completions] == [(p.id, i) for p in problems for i in range(samples)]
    assert max(len(c.sequence.token_ids) for c in completions) > 2 * cache.BLOCK
    check(model, completions, stop_ids(model, tokenizer))


# ---- attention that shares prompts ----


def prompts(*lengths: int) -> list[Tensor]:
    return [torch.randint(1, 257, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that grows after a few tokens."""
    monkeypatch.setattr(cache, "BLOCK", 8)


@pytest.mark.parametrize("family", GROUPED)
@torch.inference_mode()
def test_shared_prompts_give_the_logits_of_copied_ones(family: str, small_blocks: None) -> None:
    """Through drops that leave groups of unequal sizes and drop whole groups, and through a growing cache."""
    model = made(GROUPED[family])
    decoders = [kind(model, prompts(19, 3, 26, 20), 3) for kind in (GroupDecoder.of_prompts, PlainDecoder)]
    torch.testing.assert_close(decoders[0].logits, decoders[1].logits, rtol=0, atol=2e-5)
    rows = 12
    drops = {3: [0, 1, 2, 3, 5, 6, 9, 10, 11], 6: [0, 1, 2, 4, 6, 8], cache.BLOCK + 1: [0, 1, 4]}
    for step in range(cache.BLOCK + 4):
        if step in drops:
            for decoder in decoders:
                decoder.keep(torch.tensor(drops[step]))
            rows = len(drops[step])
        token = torch.randint(1, 257, (rows,), generator=torch.Generator().manual_seed(step))
        shared, copied = (d.step(token) for d in decoders)
        torch.testing.assert_close(shared, copied, rtol=0, atol=5e-5)


def begun(*lengths: int, common: int = 40) -> list[Tensor]:
    """Prompts that begin with the same tokens, and go on with so many others, the first of them different."""
    (first,) = prompts(common)
    return [torch.cat([first, torch.tensor([i + 1]), *prompts(n - 1)]) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("family", GROUPED)
@torch.inference_mode()
def test_what_prompts_begin_with_is_read_once(family: str, small_blocks: None) -> None:
    """With the rest of two of them padded, in three passes; windows count padding, so there it is not done."""
    model, asked = made(GROUPED[family]), begun(9, 3, 26, 20)
    n = prefill.common_prefix(model, asked)
    assert n == (0 if any(cache.windows(model)) else 40)
    positions: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, options: positions.append(options["input_ids"].numel()), with_kwargs=True
    )
    once = GroupDecoder.of_prompts(model, asked, 2, n)
    assert n == 0 or positions == [40, 3, 9, 2 * 26]
    whole = GroupDecoder.of_prompts(model, asked, 2)
    torch.testing.assert_close(once.logits, whole.logits, rtol=0, atol=2e-5)
    for step in range(cache.BLOCK + 3):
        if step == 5:
            for decoder in (once, whole):
                decoder.keep(torch.tensor([1, 2, 3, 6]))
        token = torch.arange(8 if step < 5 else 4) + step
        torch.testing.assert_close(once.step(token), whole.step(token), rtol=0, atol=5e-5)


def test_prompts_with_a_common_beginning_have_the_completions_of_one_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny(STOPS)
    monkeypatch.setattr(prefill, "PREFIX_TOKENS", 4)
    used: list[int] = []
    monkeypatch.setattr(
        "drpo.rollout.transformers.common_prefix", lambda *given: used.append(prefill.common_prefix(*given)) or used[-1]
    )
    asked = [Problem.of_text(f"p{n}", f"What is {n} + 2?", "") for n in (1, 22, 333)]
    check(model, transformers_engine(model).generate(asked, SAMPLING, (7,)), stop_ids(model, tokenizer))
    assert used == [len("What is ")]
    monkeypatch.setattr("drpo.rollout.transformers.can_share_prefix", lambda *_: False)
    monkeypatch.setattr(decode.GroupDecoder, "of_prompts", _without_prefix(decode.GroupDecoder.of_prompts))
    check(model, transformers_engine(model).generate(asked, SAMPLING, (7,)), stop_ids(model, tokenizer))


def _without_prefix(of_prompts: Callable[..., GroupDecoder]) -> Callable[..., GroupDecoder]:
    def whole(
        model: PreTrainedModel, asked: Sequence[Tensor], samples: int, prefix: int = 0, *rest: object
    ) -> GroupDecoder:
        assert prefix == 0
        return of_prompts(model, asked, samples, prefix, *rest)

    return whole


def test_few_tokens_in_common_are_read_with_each_prompt() -> None:
    model, _ = tiny(STOPS)
    assert prefill.common_prefix(model, begun(1, 5, common=prefill.PREFIX_TOKENS - 1)) == 0
    assert prefill.common_prefix(model, begun(1, 5, common=prefill.PREFIX_TOKENS)) == prefill.PREFIX_TOKENS
    assert prefill.common_prefix(model, begun(5)) == prefill.common_prefix(model, prompts(40, 41)) == 0


@pytest.mark.parametrize("family", [*GROUPED, *PLAIN])
def test_prompts_are_shared_where_attention_is_ordinary(family: str) -> None:
    model = made({**GROUPED, **PLAIN}[family])
    assert way_to_decode(model, prompts(9)[0]) is (Way.GROUPED if family in GROUPED else Way.PLAIN)
    assert family not in GROUPED or can_share_prefix(model, prompts(9)[0])


def test_a_grouped_attention_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny(STOPS)
    before = transformers_engine(model).generate(PROBLEMS, SAMPLING, (7,))
    monkeypatch.setattr(cache.GroupCache, "bias", lambda self, layer, n_queries: torch.zeros(1, 1, 1, 1))
    assert way_to_decode(model, prompts(9)[0]) is Way.PLAIN
    after = transformers_engine(model).generate(PROBLEMS, SAMPLING, (7,))
    assert [c.sequence.token_ids.tolist() for c in after] == [c.sequence.token_ids.tolist() for c in before]


@pytest.mark.parametrize(
    "request_",
    [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(())}, {"sliding_window": 8}],
)
@torch.inference_mode()
def test_a_request_that_is_not_served_is_refused(request_: dict[str, object]) -> None:
    model, _ = tiny()
    groups = GroupDecoder.of_prompts(model, prompts(5), 2).cache
    groups.room()
    key, value = groups.update(torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8), 0)
    arguments = (model.model.layers[0].self_attn, torch.randn(2, 4, 1, 8), key, value, None)
    assert grouped_attention(*arguments, groups=groups, dropout=0.0, softcap=None)[0].shape == (2, 1, 4, 8)
    with pytest.raises(UnsupportedError):
        grouped_attention(*arguments, groups=groups, **request_)
    with pytest.raises(UnsupportedError):
        grouped_attention(arguments[0], arguments[1], key.clone(), value, None, groups=groups)
    with pytest.raises(UnsupportedError):
        grouped_attention(*arguments)


def test_the_models_own_attention_is_put_back() -> None:
    model, _ = tiny()
    engine = transformers_engine(model)
    engine.generate(PROBLEMS, SAMPLING, (7,))
    assert engine.model.config._attn_implementation == model.config._attn_implementation


# ---- recurrent states ----


@pytest.mark.parametrize(
    ("family", "way"),
    [
        ("lfm2", Way.PLAIN),
        ("nemotron_h", Way.PLAIN),
        ("rwkv", Way.UNCACHED),
    ],
)
def test_a_recurrent_state_is_repeated_and_dropped_with_its_row(family: str, way: Way) -> None:
    """Short convolutions; Mamba 2, with limits of its time steps; a cache of its own, which is left alone."""
    model, (_, tokenizer) = made(lambda: build(family)), tiny()
    engine = transformers_engine(model)
    completions = engine.generate(PROBLEMS, SAMPLING, (7,))
    assert engine.way is way
    check(model, completions, stop_ids(model, tokenizer))


@torch.inference_mode()
def test_steps_keep_the_limits_of_time_steps() -> None:
    """Which transformers applies to a whole text, but not to a token behind a cache."""
    model, texts = made(lambda: build("nemotron_h")), prompts(9, 5)
    (mixer,) = (module for module in model.modules() if hasattr(module, "time_step_limit"))
    mixer.time_step_limit = (2.0, 3.0)
    apart = PlainDecoder(model, texts, 1).step(torch.tensor([1, 2]))
    hooks = limit_time_steps(model)
    near = PlainDecoder(model, texts, 1).step(torch.tensor([1, 2]))
    whole = torch.stack([model(torch.cat([t, torch.tensor([i + 1])])[None]).logits[0, -1] for i, t in enumerate(texts)])
    assert len(hooks) == 1 and not limit_time_steps(tiny()[0])
    torch.testing.assert_close(near, whole, rtol=0, atol=2e-5)
    assert float((apart - whole).abs().max()) > 1e-4


@torch.inference_mode()
def test_a_temperature_is_that_of_the_position_whatever_padding_is_before_it() -> None:
    """Which transformers takes from the place in the padded row; here from position 7 on, in Llama 4 from 8191."""
    model, texts = made(lambda: build("llama4_text")), prompts(5, 12)
    (attention,) = (m for m in model.modules() if getattr(m, "use_rope", 1) == 0)
    attention.floor_scale, attention.attn_scale = 8, 2.0

    def step() -> Tensor:
        return PlainDecoder(model, texts, 1).step(torch.tensor([1, 2]))

    whole = torch.stack([model(torch.cat([t, torch.tensor([i + 1])])[None]).logits[0, -1] for i, t in enumerate(texts)])
    apart = step()
    temper_by_position(model)
    torch.testing.assert_close(step(), whole, rtol=0, atol=2e-5)
    assert float((apart - whole).abs().max()) > 1e-3


# ---- prompts of other lengths ----


@pytest.mark.parametrize(
    "lengths", [[5], [40] * 16, [1, 400, 2, 390, 40, 41, 44], list(range(1, 200)), [6000] * 5, [20_000, 3]]
)
def test_prompts_are_read_with_little_padding_and_within_bounds(lengths: list[int]) -> None:
    parts = list(prefill.parts_of(lengths))
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    for part in parts:
        places = len(part) * max(lengths[i] for i in part)
        assert len(part) == 1 or places <= prefill.PREFILL_TOKENS
        assert places - sum(lengths[i] for i in part) <= prefill.PADDING * places
    assert len(list(prefill.parts_of([40] * 16))) == 1


# ---- rows that have ended ----


class Scripted:
    """A decoder whose row b says word b + 1 until its `ends[b]`-th token, the stop word 0, or for ever where that is 0.

    `rows` notes how many rows each step took.
    """

    full = False

    def __init__(self, ends: Sequence[int]) -> None:
        self.ends, self.names, self.rows = torch.tensor(ends), torch.arange(len(ends)), list[int]()
        self.logits, self.routes = self._say(), ReadRoutes(None, len(ends))

    def _say(self) -> Tensor:
        word = torch.where(self.ends == len(self.rows) + 1, 0, self.names + 1)
        return torch.where(torch.arange(200) == word[:, None], 0.0, -torch.inf)

    def step(self, token: Tensor) -> Tensor:
        self.rows.append(len(token))
        return self._say()

    def keep(self, rows: Tensor) -> None:
        self.names, self.ends = self.names[rows], self.ends[rows]


def rows_of(most: int, stop: frozenset[int]) -> dict[int, Request]:
    """A hundred of them; the random numbers do not matter where one token is certain."""
    return {b: Request(torch.tensor([1]), Sampling(max_new_tokens=most), stop, (b,)) for b in range(100)}


@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("idle", [0.0, decode.IDLE_STEPS, 1e9])
def test_dropping_ended_rows_changes_no_row(idle: float, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "IDLE_STEPS", idle)
    monkeypatch.setitem(decode.LOOK_EVERY, "cpu", every)
    ends = [int(n) for n in torch.randint(0, 60, (100,), generator=torch.Generator().manual_seed(0))]
    drawn = draw_rows(Scripted(ends), rows_of(40, frozenset({0, 199})), version=0)
    assert len(drawn) == len(ends)
    for b, end in enumerate(ends):
        row, ended = drawn[b], 0 < end <= 40
        assert (row.finish_reason == "stop") == ended
        assert row.token_ids.tolist() == ([b + 1] * (end - 1) + [0] if ended else [b + 1] * 40)
        assert row.behavior_logp.tolist() == [0.0] * len(row.token_ids)


def test_ended_rows_do_not_go_on_for_long() -> None:
    """One in a hundred that ends soon stays for a while; half of them do not; and nothing is done for none."""
    few, half, all_ = Scripted([1] + [0] * 99), Scripted([1] * 50 + [0] * 50), Scripted([2] * 100)
    for decoder in (few, half, all_):
        draw_rows(decoder, rows_of(120, frozenset({0})), version=0)
    assert 20 < few.rows.count(100) < 100
    assert half.rows.count(100) <= 1
    assert all_.rows == [100]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=[pytest.mark.slow] * (f not in ("qwen3", "gemma3, mixed windows", "mixtral, experts")))
        for f in FAMILIES
    ],
)
def test_dropping_rows_changes_no_completion(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(FAMILIES[family])
    found = []
    for idle, every in ((0.0, 1), (1e9, 1), (0.1, 8)):
        monkeypatch.setattr(decode, "IDLE_STEPS", idle)
        monkeypatch.setitem(decode.LOOK_EVERY, "cpu", every)
        completions = transformers_engine(model).generate(PROBLEMS, SAMPLING, (7,))
        found.append([(c.sequence.token_ids.tolist(), c.finish_reason) for c in completions])
    assert found[0] == found[1] == found[2]


# ---- one draw among many words ----


EDGES = torch.tensor([0.0, 5e-324, 2.0**-53, 1e-9, 0.25, 0.5, 0.75, 1 - 1e-9, 1 - 2.0**-53], dtype=torch.float64)


def spread(words: int) -> dict[str, Tensor]:
    """Distributions over so many words: flat, peaked, and with long stretches of words that cannot be."""
    generator = torch.Generator().manual_seed(words)
    logits = 3 * torch.randn(words, generator=generator)
    place = torch.arange(words)
    return {
        "flat": torch.zeros(words),
        "random": logits,
        "peaked": logits * 8,
        "nothing at the ends": logits.where((place >= words // 3) & (place <= words // 2), -torch.inf),
        "nothing in the middle": logits.where((place <= words // 3) | (place > words - 2), -torch.inf),
        "one alone": logits.where(place == words - 1, -torch.inf),
    }


@pytest.mark.parametrize(
    "words", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 1000, pytest.param(49_152, marks=pytest.mark.slow)]
)
def test_a_draw_inverts_the_distribution_function(words: int) -> None:
    """The token drawn is the exact one, or the exact one of a number within rounding."""
    random = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u = torch.cat([EDGES, random])
    for name, logits in spread(words).items():
        token, logp = draw(logits.expand(len(u), -1), u, Sampling())
        p = torch.softmax(logits.double(), -1)
        cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), p.cumsum(0)])
        assert (p[token] > 0).all(), name
        assert (u >= cumulative[token] - 1e-6).all(), name
        assert (u < cumulative[token + 1] + 1e-6).all(), name
        torch.testing.assert_close(logp.double(), p[token].log(), rtol=0, atol=1e-5)
        assert int(token[0]) == int((p.float() > 0).nonzero()[0]), name


def test_evenly_spaced_numbers_give_every_word_its_share() -> None:
    """Across blocks: so many numbers give each of 600 words its probability to within one count."""
    n, logits = 20_000, spread(600)["random"]
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    token = torch.cat([draw(logits.expand(len(part), -1), part, Sampling())[0] for part in u.split(5000)])
    counts = torch.bincount(token, minlength=600)
    assert (counts - n * torch.softmax(logits.double(), -1)).abs().max() < 1.1


def test_rows_are_drawn_from_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, u = 3 * torch.randn(7, 300), torch.rand(7, dtype=torch.float64)
    whole = draw(logits, u, Sampling())
    monkeypatch.setattr(sample, "CHUNK_ELEMENTS", 700)
    for one, other in zip(draw(logits, u, Sampling()), whole, strict=True):
        assert torch.equal(one, other)


def test_the_logits_are_left_as_they_are() -> None:
    logits = spread(300)["random"][None].clone()
    for temperature in (0.0, 1.0, 2.0):
        draw(logits, torch.tensor([0.5], dtype=torch.float64), Sampling(temperature=temperature, top_k=5))
    assert torch.equal(logits[0], spread(300)["random"])
