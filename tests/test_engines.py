"""What every engine promises (`drpo.rollout.engine`): the same checks of each that runs on any machine.

Not covered: vLLM itself (test_vllm.py; a stand-in draws here) and what is one engine's own: batches, precisions and
architectures of transformers' (test_rollout.py, test_decode.py), requests and faults of vLLM's (test_vllm_client.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from drpo.errors import InputError
from drpo.types import Episode, Problem, Sampling
from support.engines import ENGINES
from support.rollouts import Prompted
from support.tiny_world import PROBLEMS, STOPS, distribution, own_logp, perturb, tiny

SAMPLING = Sampling(samples=3, max_new_tokens=6)
FEW = PROBLEMS[:2]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Prompted]:
    with ENGINES[request.param]() as engine:
        yield engine


def name_of(c: Episode) -> tuple[str, int]:
    return c.problem_id, c.sample


def same(a: Sequence[Episode], b: Sequence[Episode]) -> None:
    """The same completions in the same order; log-probabilities but for rounding."""
    assert [name_of(c) for c in a] == [name_of(c) for c in b]
    for one, other in zip(a, b, strict=True):
        assert one.sequence.token_ids.tolist() == other.sequence.token_ids.tolist(), name_of(one)
        assert one.finish_reason == other.finish_reason
        torch.testing.assert_close(one.sequence.behavior_logp, other.sequence.behavior_logp, rtol=0, atol=1e-5)


def test_generations_come_in_the_order_of_the_requests_and_say_where_they_come_from(engine: Prompted) -> None:
    tokenizer = tiny()[1]
    completions = engine.generate(PROBLEMS, SAMPLING, (0,))
    assert [name_of(c) for c in completions] == [(p.id, i) for p in PROBLEMS for i in range(3)]
    for c in completions:
        problem = next(p for p in PROBLEMS if p.id == c.problem_id)
        assert c.sequence.prompt_ids.tolist() == tokenizer(problem.prompt)["input_ids"]
        assert c.text == tokenizer.decode(c.sequence.token_ids, skip_special_tokens=True)
        assert "<eos>" not in c.text
        assert (c.sampling, c.version, c.sequence.top_logprobs) == (SAMPLING, 0, None)


@pytest.mark.parametrize("temperature", [0.6, pytest.param(1.0, marks=pytest.mark.slow), 1.5])
def test_log_probabilities_are_the_models_own(engine: Prompted, temperature: float) -> None:
    model = tiny(STOPS)[0]
    completions = engine.generate(PROBLEMS[::2], replace(SAMPLING, temperature=temperature), (0, 1))
    for c in completions:
        torch.testing.assert_close(c.sequence.behavior_logp, own_logp(model, c, temperature), rtol=0, atol=1e-5)
    others = {0.6, 1.0, 1.5} - {temperature}
    for c in completions[-3:]:  # the tolerance tells temperatures apart
        assert all((c.sequence.behavior_logp - own_logp(model, c, t)).abs().max() > 0.01 for t in others)


def test_the_most_probable_tokens_are_those_of_the_distribution(engine: Prompted) -> None:
    plain = engine.generate(FEW, replace(SAMPLING, temperature=1.5), (0,))
    reported = []
    for k in (1, 6, 257):
        completions = engine.generate(FEW, replace(SAMPLING, temperature=1.5, top_logprobs=k), (0,))
        same(plain, completions)
        reported += completions
    for c in reported:
        k = c.sampling.top_logprobs
        top, whole = c.sequence.top_logprobs, distribution(tiny(STOPS)[0], c, 1.5)
        assert top is not None and top.ids.shape == top.logp.shape == (len(c.sequence.token_ids), k)
        torch.testing.assert_close(top.logp, whole.topk(k).values, rtol=0, atol=2e-5)
        torch.testing.assert_close(top.logp, whole.gather(1, top.ids), rtol=0, atol=2e-5)
        assert all(len(set(row)) == k for row in top.ids.tolist())
        hit = top.ids == c.sequence.token_ids[:, None]
        torch.testing.assert_close(top.logp[hit], c.sequence.behavior_logp[hit.any(1)], rtol=1e-6, atol=1e-6)


def test_greedy_takes_the_most_probable(engine: Prompted) -> None:
    for c in engine.generate(FEW, replace(SAMPLING, temperature=0.0), (0,)):
        assert torch.equal(distribution(tiny(STOPS)[0], c, 1.0).argmax(-1), c.sequence.token_ids)


def test_the_first_stop_token_ends_and_is_kept(engine: Prompted) -> None:
    """Among them the tokenizer's EOS, which is its padding: what ends a completion is what was drawn."""
    asked = [(PROBLEMS[1:3], Sampling(samples=8, max_new_tokens=n)) for n in (1, 8)]
    completions = [c for problems, sampling in asked for c in engine.generate(problems, sampling, (0,))]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        max_new_tokens = c.sampling.max_new_tokens
        ended = [token in STOPS for token in c.sequence.token_ids.tolist()]
        assert len(ended) == len(c.sequence.behavior_logp) <= max_new_tokens
        assert not any(ended[:-1]) and c.finish_reason == ("stop" if ended[-1] else "length")
        assert ended[-1] or len(ended) == max_new_tokens


def test_the_key_alone_decides_what_is_drawn(engine: Prompted) -> None:
    """Not the order of requests, their number, the limit of tokens or torch's generator, which stays as it is."""
    torch.manual_seed(1)
    together = engine.generate(PROBLEMS, SAMPLING, (0, 7))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    by_name = {name_of(c): c for c in engine.generate(PROBLEMS[::-1], SAMPLING, (0, 7))}
    assert torch.equal(torch.get_rng_state(), before)
    same(together, [by_name[name_of(c)] for c in together])
    same(together, [c for p in PROBLEMS for c in engine.generate([p], SAMPLING, (0, 7))])
    more = engine.generate(PROBLEMS, replace(SAMPLING, samples=5), (0, 7))
    same(together, [c for c in more if c.sample < 3])
    for long, short in zip(
        together, engine.generate(PROBLEMS, replace(SAMPLING, max_new_tokens=4), (0, 7)), strict=True
    ):
        assert short.sequence.token_ids.tolist() == long.sequence.token_ids.tolist()[:4]


def test_every_part_of_a_key_matters(engine: Prompted) -> None:
    """Seed, step, problem and sample number each change the completion of one and the same prompt."""
    problems = [Problem.of_text(name, "7 + 5 = ", "12") for name in ("a", "b", "11")]
    drawn = {
        (seed, *name_of(c)): c.sequence.token_ids.tolist()
        for seed in ((0, 0), (1, 0), (0, 1), ("evaluation", 0))
        for c in engine.generate(problems, replace(SAMPLING, samples=4), seed)
    }
    long = [tuple(ids) for ids in drawn.values() if len(ids) > 2]  # shorter ones may be equal by chance
    assert len(drawn) == 4 * 3 * 4 and len(long) > 30 and len(set(long)) == len(long)


def test_new_weights_sample_once_they_are_loaded(engine: Prompted) -> None:
    """The engine keeps its own weights until then, and nothing of the old ones, such as a cached prompt, afterwards."""
    old, new = tiny(STOPS)[0], perturb(tiny(STOPS)[0], 0.2)
    before = engine.generate(PROBLEMS, SAMPLING, (0,))
    perturb(engine.trained.requires_grad_(), 0.1)
    same(before, engine.generate(PROBLEMS, SAMPLING, (0,)))
    engine.load_weights(dict(new.named_parameters()), version=4)
    after = engine.generate(PROBLEMS, SAMPLING, (0,))
    assert {c.version for c in before} == {0} and {c.version for c in after} == {4}
    for c in after:
        torch.testing.assert_close(c.sequence.behavior_logp, own_logp(new, c, 1.0), rtol=0, atol=1e-5)
    moved = torch.cat([(c.sequence.behavior_logp - own_logp(old, c, 1.0)).abs() for c in after])
    assert moved.mean() > 0.1  # far more than the tolerance
    perturb(new, 0.2)  # the trainer goes on
    same(after, engine.generate(PROBLEMS, SAMPLING, (0,)))


def test_a_state_that_lacks_a_weight_is_refused_whole(engine: Prompted) -> None:
    before = engine.generate(FEW, SAMPLING, (0,))
    new = perturb(tiny(STOPS)[0], 0.2)
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        engine.load_weights({n: p for n, p in new.named_parameters() if n != "model.norm.weight"}, version=5)
    after = engine.generate(FEW, SAMPLING, (0,))
    assert {c.version for c in after} == {0}
    same(before, after)


def test_a_request_that_cannot_be_served_is_refused_in_one_line(engine: Prompted) -> None:
    with pytest.raises(InputError, match=r"top_logprobs=258: the \w+ has 257 tokens"):
        engine.generate(FEW, replace(SAMPLING, top_logprobs=258), (0,))
    with pytest.raises(InputError, match="problem 'nothing'"):  # a prompt of no tokens
        engine.generate([Problem.of_text("nothing", "", "")], SAMPLING, (0,))
    assert engine.engine.generate([]) == []
