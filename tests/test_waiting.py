"""Rows that wait join a batch as its rows finish, and each says what it would say in any other batch.

Not covered: GPUs, and speed (docs/performance.md).
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from drpo.rollout import TransformersEngine, cache, decode
from drpo.rollout.decode import GroupDecoder
from drpo.rollout.waiting import by_prompt
from drpo.types import Generation, Request, Sampling
from support.architectures import GROUPED, PLAIN
from support.tiny_world import STOPS, tiny


def made(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return {**GROUPED, **PLAIN}[family]().eval()


def ids(n: int) -> Tensor:
    return torch.randint(1, 257, (n,), generator=torch.Generator().manual_seed(n))


def last_logits(model: PreTrainedModel, texts: Sequence[Tensor]) -> Tensor:
    return torch.stack([model(input_ids=text[None], use_cache=False).logits[0, -1] for text in texts])


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("family", ["qwen3", "gemma3, mixed windows"])
@torch.inference_mode()
def test_joined_rows_have_the_logits_of_each_row_alone(
    family: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New prompts, and rows that go on from a kept one; the columns that nobody uses are gone."""
    monkeypatch.setattr(cache, "BLOCK", 8)
    model = made(family)
    decoder = GroupDecoder.of_prompts(model, [ids(26), ids(3)], samples)
    texts = [ids(n) for n in (26, 3) for _ in range(samples)]

    def advance(n: int) -> None:
        for _ in range(n):
            token = torch.arange(len(texts)) + len(texts[0]) % 7
            logits = decoder.step(token)
            texts[:] = [torch.cat([text, t[None]]) for text, t in zip(texts, token, strict=True)]
        torch.testing.assert_close(logits, last_logits(model, texts), rtol=0, atol=5e-5)

    def columns() -> tuple[int, int]:
        return decoder.cache.layers[0].prompt_keys.shape[2], decoder.cache.layers[0].length

    advance(9)
    kept, text = decoder.cache.kept_row(0, 7), texts[0][: 26 + 6]
    last = torch.arange(samples, 2 * samples)
    decoder.keep(last)
    texts[:] = texts[samples:]
    decoder.join(GroupDecoder.of_prompts(model, [ids(5), ids(21)], samples))
    texts += [ids(n) for n in (5, 21) for _ in range(samples)]
    assert columns() == (21, 9)
    advance(3)
    decoder.keep(torch.arange(samples, len(texts)))
    texts[:] = texts[samples:]
    decoder.join(GroupDecoder.of_rows(model, [kept], [ids(4)]))
    texts.append(torch.cat([text, ids(4)]))
    assert columns() == (26, 6 + 4)
    advance(2 * cache.BLOCK)
    again = decoder.cache.kept_row(len(texts) - 1, 2 * cache.BLOCK + 1)
    assert (again.prompt.length, again.length) == (26, 6 + 4 + 2 * cache.BLOCK)
    torch.testing.assert_close(again.layers[0][0][:, :6], kept.layers[0][0])


def asked(n_samples: Sequence[int], most: int = 16) -> list[Request]:
    """Groups of so many rows, whose prompts have different lengths."""
    sampling = Sampling(max_new_tokens=most, top_logprobs=2)
    return [
        Request(ids(5 + 11 * (g % 3) + g), sampling, STOPS, (7, g, i))
        for g, n in enumerate(n_samples)
        for i in range(n)
    ]


def assert_same(some: Sequence[Generation], others: Sequence[Generation]) -> None:
    for a, b in zip(some, others, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() and a.finish_reason == b.finish_reason
        torch.testing.assert_close(a.behavior_logp, b.behavior_logp, rtol=0, atol=2e-5)
        assert a.top_logprobs is not None and b.top_logprobs is not None
        torch.testing.assert_close(a.top_logprobs.logp, b.top_logprobs.logp, rtol=0, atol=5e-5)
        assert (a.routes is None) == (b.routes is None)
        if a.routes is not None and b.routes is not None:
            assert torch.equal(a.routes.prompt, b.routes.prompt) and torch.equal(a.routes.tokens, b.routes.tokens)


@pytest.fixture
def rows_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each decoding step took."""
    rows, step = list[int](), GroupDecoder.step
    monkeypatch.setattr(GroupDecoder, "step", lambda self, token: rows.append(len(token)) or step(self, token))
    return rows


@pytest.mark.parametrize(
    ("family", "n_samples", "max_rows"),
    [
        ("qwen3", [4] * 6, 8),
        ("gemma3, mixed windows", [1] * 20, 5),
        ("mixtral, experts", [4, 2] * 4, 6),
    ],
)
@pytest.mark.parametrize("every", [1, 8])
def test_few_rows_at_a_time_say_what_all_at_once_say(
    family: str,
    n_samples: list[int],
    max_rows: int,
    every: int,
    rows_of_steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In fewer steps than batches one after another, but where the tiny weights allow few joins."""
    monkeypatch.setitem(decode.LOOK_EVERY, "cpu", every)
    model, requests, routes = made(family), asked(n_samples), family == "mixtral, experts"
    engine = TransformersEngine(model, max_rows=max_rows, routes=routes)
    engine.generate(requests[:1])
    rows_of_steps.clear()
    few = engine.generate(requests)
    steps, most = len(rows_of_steps), max(rows_of_steps)
    assert_same(few, TransformersEngine(model, routes=routes).generate(requests))
    lengths = [len(g.token_ids) for g in few]
    assert most <= max_rows and min(lengths) < 4 and max(lengths) == 16
    parts = by_prompt({i: r.prompt_ids for i, r in enumerate(requests)}, max_rows)
    ordered = [lengths[i] for part in parts for i in part]
    batches = [max(ordered[start : start + max_rows]) - 1 for start in range(0, len(ordered), max_rows)]
    assert steps < sum(batches) or every > 1 or family == "mixtral, experts"


def test_rows_of_equal_length_run_batch_by_batch(rows_of_steps: list[int]) -> None:
    model, _ = tiny()
    requests = [Request(ids(5), Sampling(max_new_tokens=6), frozenset(), (b,)) for b in range(10)]
    engine = TransformersEngine(model, max_rows=4)
    engine.generate(requests[:1])
    rows_of_steps.clear()
    engine.generate(requests)
    assert rows_of_steps == [4] * 10 + [2] * 5
