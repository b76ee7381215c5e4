"""Later turns of an episode read only what is new, and say what they would say if they read everything anew.

Not covered: GPUs, and speed (`python -m benchmarks.turns`).
"""

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from drpo.model.positions import narrowed
from drpo.model.precision import resolve_precision
from drpo.rollout import TransformersEngine, cache, decode, prefill
from drpo.rollout.trial import Way, can_continue
from drpo.rollout.turn_cache import Continued
from drpo.rollout.waiting import by_kept_prompt
from drpo.types import Generation, Request, Sampling
from support.architectures import GROUPED, PLAIN
from support.environments import TEMPLATE, Chat, talkative
from support.tiny_world import STOPS, perturb, tiny
from support.worlds import tiny_run

SAMPLING = Sampling(max_new_tokens=12, top_logprobs=3)
STOP = STOPS | {0}
TURNS = 3
COPIES, LENGTHS = 3, (19, 3, 26)


def ids(n: int, seed: int) -> Tensor:
    return torch.randint(1, 257, (n,), generator=torch.Generator().manual_seed(seed))


def made(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return build().eval()


@dataclass
class Row:
    """A conversation: what it has come to, and the turns."""

    number: int
    context: Tensor
    requests: list[Request]
    generations: list[Generation]

    def hear(self, n: int) -> None:
        self.context = torch.cat([self.context, self.generations[-1].token_ids, ids(n, 100 + self.number + n)])


def begun() -> list[Row]:
    prompts = [ids(n, n) for n in LENGTHS for _ in range(COPIES)]
    return [Row(i, prompt, [], []) for i, prompt in enumerate(prompts)]


def heard(turn: int, row: int) -> int:
    """How many tokens a row hears after a turn: none, one, or up to forty."""
    return (row * 7 + turn * 5) % 11 if row % 4 else 40 * (turn % 2)


def take_turn(engine: TransformersEngine, rows: Sequence[Row], turn: int, goes_on: bool = True) -> list[Row]:
    """Have every row say something; return those that go on."""
    for row in rows:
        after = row.generations[-1] if row.generations else None
        row.requests.append(Request(row.context, SAMPLING, STOP, (7, row.number, turn), after=after, goes_on=goes_on))
    for row, said in zip(rows, engine.generate([row.requests[-1] for row in rows]), strict=True):
        row.generations.append(said)
        row.hear(heard(turn, row.number))
    return [row for row in rows if row.generations[-1].finish_reason == "stop"]


def talk(engine: TransformersEngine) -> list[Row]:
    rows = going_on = begun()
    for turn in range(TURNS):
        going_on = take_turn(engine, going_on, turn, goes_on=turn + 1 < TURNS)
    return rows


def assert_same(some: Sequence[Row], others: Sequence[Row]) -> None:
    for a, b in zip(some, others, strict=True):
        for x, y in zip(a.generations, b.generations, strict=True):
            assert x.token_ids.tolist() == y.token_ids.tolist() and x.finish_reason == y.finish_reason
            torch.testing.assert_close(x.behavior_logp, y.behavior_logp, rtol=0, atol=2e-5)
            assert x.top_logprobs is not None and y.top_logprobs is not None
            torch.testing.assert_close(x.top_logprobs.logp, y.top_logprobs.logp, rtol=0, atol=5e-5)


@torch.no_grad()
def assert_own(model: PreTrainedModel, rows: Sequence[Row]) -> None:
    """What was reported are the model's own log-probabilities, by one pass over whole texts, without a cache."""
    turns = [pair for row in rows for pair in zip(row.requests, row.generations, strict=True)]
    texts = [torch.cat([request.prompt_ids, said.token_ids]) for request, said in turns]
    logits = model(input_ids=torch.nn.utils.rnn.pad_sequence(texts, batch_first=True), use_cache=False).logits
    for b, (request, said) in enumerate(turns):
        begin = len(request.prompt_ids) - 1
        logp = torch.log_softmax(logits[b, begin : begin + len(said.token_ids)], -1)
        logp = logp.gather(-1, said.token_ids[:, None])[:, 0]
        torch.testing.assert_close(said.behavior_logp, logp, rtol=0, atol=2e-5)


def reading(engine: TransformersEngine) -> list[int]:
    """Notes how many positions each forward pass reads, where it is more than one a row."""
    read: list[int] = []

    def note(_: object, __: object, given: dict[str, Tensor]) -> None:
        if given["input_ids"].shape[1] > 1:
            read.append(given["input_ids"].numel())

    engine.model.register_forward_pre_hook(note, with_kwargs=True)
    return read


@pytest.mark.parametrize(
    "family",
    [
        "gemma3, mixed windows",
        "mixtral, experts",
        pytest.param("gpt2, learned positions", marks=pytest.mark.slow),
        pytest.param("llama, one key-value head", marks=pytest.mark.slow),
    ],
)
def test_kept_rows_say_what_they_would_say_if_read_anew(family: str) -> None:
    model = made(GROUPED[family])
    rows = talk(TransformersEngine(model))
    assert max(len(row.generations) for row in rows) == TURNS > min(len(row.generations) for row in rows)
    assert_same(rows, talk(TransformersEngine(model, kept_bytes=0)))
    assert_own(model, rows)


@pytest.mark.parametrize("family", PLAIN)
def test_models_that_share_no_prompts_read_everything_anew(family: str) -> None:
    model = made(PLAIN[family])
    engine = TransformersEngine(model)
    assert_own(model, talk(engine))
    assert engine._continues is None


@pytest.mark.parametrize(("max_rows", "idle"), [(4, 0.0), (256, 1e9)])
def test_any_shape_of_batch(max_rows: int, idle: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows dropped at once or at the end, few and many to a batch, read in slices of a few tokens."""
    monkeypatch.setattr(decode, "IDLE_STEPS", idle)
    monkeypatch.setattr(decode, "SCORES", 3000)
    model, _ = tiny()
    rows = talk(TransformersEngine(model, max_rows=max_rows))
    assert_same(rows, talk(TransformersEngine(model)))
    assert_own(model, rows)


def test_a_later_turn_reads_only_what_is_new() -> None:
    engine = TransformersEngine(tiny()[0])
    going_on = take_turn(engine, rows := begun(), 0)
    read = reading(engine)
    going_on = take_turn(engine, going_on, 1)
    engine.generate(())  # what is not continued by the next call is kept no longer
    new = [1 + heard(0, row.number) for row in rows if len(row.generations) == 2]
    assert sum(n for n in new if n > 1) <= sum(read) <= sum(new) * (1 + 2 * prefill.PADDING)
    read.clear()
    take_turn(engine, going_on, 2)
    assert sum(read) >= sum(len(row.requests[-1].prompt_ids) for row in going_on)


def test_what_was_computed_with_old_weights_is_not_used() -> None:
    model, _ = tiny()
    engine = TransformersEngine(model)
    going_on = take_turn(engine, begun(), 0)
    with torch.no_grad():
        new = perturb(copy.deepcopy(model), 0.1)
    engine.load_weights(dict(new.named_parameters()), version=1)
    take_turn(engine, going_on, 1)
    for row in going_on:
        row.requests, row.generations = row.requests[1:], row.generations[1:]
    assert_own(new, going_on)


@pytest.mark.parametrize("change", [0, -1])
def test_a_prompt_that_does_not_begin_with_what_was_kept_is_read_anew(change: int) -> None:
    """The first token of the prompt is another, or the last that was sampled."""
    model, _ = tiny()
    engine = TransformersEngine(model)
    going_on = take_turn(engine, rows := begun(), 0)
    for row in going_on:
        at = 0 if change == 0 else len(row.requests[0].prompt_ids) + len(row.generations[0].token_ids) - 1
        row.context[at] = (row.context[at] + 1) % 257
    take_turn(engine, going_on, 1)
    assert_own(model, rows)


def test_a_generation_is_continued_once_and_by_others_anew() -> None:
    model, _ = tiny()
    engine = TransformersEngine(model)
    going_on = take_turn(engine, begun(), 0)
    twins = [copy.copy(row) for row in going_on]
    for row in twins:
        row.requests, row.generations = list(row.requests), list(row.generations)
    take_turn(engine, [*going_on, *twins], 1)
    assert_same(going_on, twins)
    assert_own(model, going_on)


def kept_bytes(engine: TransformersEngine) -> int:
    """Of the tensors that the engine keeps."""
    rows = [row for _, row in engine._kept._rows.values()]
    layers = [pair for x in (*rows, *{row.prompt for row in rows}) for pair in x.layers]
    return sum(x.untyped_storage().nbytes() for pair in layers for x in pair)


def test_memory_is_what_the_formula_says_and_bounded() -> None:
    model, _ = tiny()
    engine = TransformersEngine(model)
    going_on = take_turn(engine, begun(), 0)
    config = model.config
    of_token = 4 * config.num_hidden_layers * config.num_key_value_heads * 2 * config.head_dim
    prompts = {row.number // COPIES: len(row.requests[0].prompt_ids) for row in going_on}
    n_tokens = sum(prompts.values()) + sum(len(row.generations[0].token_ids) - 1 for row in going_on)
    assert kept_bytes(engine) == n_tokens * of_token > 0
    half = TransformersEngine(model, kept_bytes=n_tokens * of_token // 2)
    take_turn(half, others := begun(), 0)
    assert 0 < kept_bytes(half) <= n_tokens * of_token // 2 and 0 < len(half._kept) < len(going_on)
    take_turn(half, [row for row in others if row.number in {r.number for r in going_on}], 1)
    take_turn(engine, going_on, 1)
    assert_same(going_on, [row for row in others if len(row.generations) == 2])


def test_nothing_is_kept_that_nobody_can_continue() -> None:
    engine = TransformersEngine(tiny()[0])
    rows = begun()
    going_on = take_turn(engine, rows, 0)
    assert len(engine._kept) == len(going_on) > 0
    del rows[:], going_on[:]
    gc.collect()
    assert len(engine._kept) == 0
    take_turn(engine, rows := begun(), 0, goes_on=False)
    assert len(engine._kept) == 0
    take_turn(engine, rows := begun(), 0)
    engine.release()
    assert len(engine._kept) == 0


def test_rows_of_a_prompt_go_together() -> None:
    prompts = [cache.KeptPrompt(((torch.zeros(1, n, 1), torch.zeros(1, n, 1)),)) for n in (5, 2)]
    rows = {i: Continued(cache.KeptRow(prompts[i % 2], ()), torch.zeros(1)) for i in range(6)}
    assert by_kept_prompt(rows) == [[1], [3], [5], [0], [2], [4]]


FEW = ("qwen3", "gemma3, mixed windows", "gpt2, learned positions", "mixtral, experts")


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f not in FEW)) for f in GROUPED])
def test_going_on_is_tried_before_it_is_used(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(GROUPED[family])
    with narrowed(model):
        assert can_continue(model, ids(9, 9))
        assert can_continue(copy.deepcopy(model).to(torch.bfloat16), ids(9, 9))
        monkeypatch.setattr(cache.GroupCache, "expect", lambda self, written: None)  # padding is written
        assert not can_continue(model, ids(9, 9))


def test_a_model_that_cannot_go_on_reads_everything_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.GroupCache, "expect", lambda self, written: None)
    model, _ = tiny()
    engine = TransformersEngine(model)
    assert_own(model, talk(engine))
    assert engine.way is Way.GROUPED and not engine._continues


def test_bf16_goes_on_within_its_rounding() -> None:
    model, _ = tiny()
    bf16 = resolve_precision("bf16", model.device)
    first_logp = []
    for engine in (TransformersEngine(model, precision=bf16), TransformersEngine(model, precision=bf16, kept_bytes=0)):
        going_on = take_turn(engine, begun(), 0)
        take_turn(engine, going_on, 1)
        first_logp.append(torch.stack([row.generations[1].top_logprobs.logp[0, 0] for row in going_on]))  # type: ignore[union-attr]
    assert len(first_logp[0]) > 4 and (first_logp[0] - first_logp[1]).abs().mean() < 0.02


# ---- the driver ----


class Spy:
    """Notes what an engine is asked."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine, self.asked, self.said = engine, list[list[Request]](), list[list[Generation]]()
        self.released = 0

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        self.asked.append(list(requests))
        self.said.append(self.engine.generate(requests))
        return self.said[-1]

    def release(self) -> None:
        self.released += 1


@pytest.mark.parametrize("role", ["user", "tool"])
def test_the_driver_says_what_a_turn_continues(role: str) -> None:
    """After a branch (what tools say is not in the template) it continues nothing.

    A turn that ended as the template ends one is no branch: rendered anew, the conversation begins with it.
    """
    run = tiny_run(task=Chat(role=role), **{"sampling.max_new_tokens": 12})
    components = talkative(run, TEMPLATE)
    spy = Spy(components.driver.engine)  # type: ignore[arg-type]
    driver = replace(components.driver, engine=spy)
    driver.run(run.data.task.sample(2, 0, 0), Sampling(samples=3, max_new_tokens=12), (0, 0))
    assert [{r.goes_on for r in asked} for asked in spy.asked] == [{True}, {True}, {False}]
    assert spy.released == 1
    for said, asked in zip(spy.said, spy.asked[1:], strict=False):
        for r in asked:
            assert r.after in said or (role == "tool" and r.after is None)
    assert (role == "tool") == any(r.after is None for asked in spy.asked[1:] for r in asked)
    assert all(r.after is None for r in spy.asked[0])
