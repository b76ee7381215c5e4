"""Rollouts: what is reported is the distribution that was sampled, and nothing but the seed decides what is drawn.

Not covered: vLLM, GPUs, hub models, models with a recurrent state, and real weights (the tiny random model has flat
distributions; real ones are peaked). That a seed gives the same completion in any batch is shown for fixed seeds in
float32; a draw within about 1e-6 of a boundary may come out differently on another machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import processors
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from drpo.errors import InputError
from drpo.model.precision import Precision
from drpo.rollout import ScriptedEngine, encode_prompt
from drpo.rollout.engine import generation
from drpo.rollout.sample import draw, uniforms
from drpo.rollout.turn_ends import stop_ids
from drpo.train.config import Run, configure
from drpo.types import Episode, Generation, Problem, Request, Sampling
from support.architectures import FAMILIES
from support.rollouts import Prompted, transformers_engine
from support.tiny_world import PROBLEMS, STOPS, own_logp, perturb, tiny

TEMPERATURES = (0.6, 1.0, 1.5)
SAMPLING = Sampling(samples=4, max_new_tokens=12)


def generated(
    model: PreTrainedModel, problems: Sequence[Problem] = PROBLEMS, sampling: Sampling = SAMPLING, **options: object
) -> list[Episode]:
    return transformers_engine(model, **options).generate(problems, sampling, (0, 0))  # type: ignore[arg-type]


def key(c: Episode) -> tuple[str, int]:
    return c.problem_id, c.sample


def same(a: Sequence[Episode], b: Sequence[Episode]) -> None:
    """The same completions in the same order; log-probabilities but for rounding."""
    assert [key(c) for c in a] == [key(c) for c in b]
    for one, other in zip(a, b, strict=True):
        assert one.sequence.token_ids.tolist() == other.sequence.token_ids.tolist(), key(one)
        assert one.finish_reason == other.finish_reason
        assert one.text == other.text
        assert one.sequence.prompt_ids.tolist() == other.sequence.prompt_ids.tolist()
        torch.testing.assert_close(one.sequence.behavior_logp, other.sequence.behavior_logp, rtol=0, atol=1e-5)


# ---- the reported distribution ----


@pytest.mark.parametrize("temperature", [0.6, *(pytest.param(t, marks=pytest.mark.slow) for t in (1.0, 1.5))])
def test_behavior_logp_in_bfloat16_is_the_bfloat16_models_own(temperature: float) -> None:
    """Within 0.1 nats: logits of about 6 rounded to 8 bits, by another route (cached keys, other shapes)."""
    model, _ = tiny(STOPS)
    engine = transformers_engine(model, precision=Precision(torch.bfloat16))
    completions = engine.generate(PROBLEMS, replace(SAMPLING, temperature=temperature), (0,))
    gaps = torch.cat([c.sequence.behavior_logp - own_logp(engine.model, c, temperature) for c in completions])
    assert gaps.abs().max() < 0.1 / temperature
    assert gaps.mean().abs() < 0.01 / temperature
    assert all(c.sequence.behavior_logp.dtype == torch.float32 for c in completions)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=[pytest.mark.slow] * (f not in ("gemma3, mixed windows", "gpt2, learned positions")))
        for f in FAMILIES
    ],
)
def test_other_architectures_report_their_own_distribution_and_do_not_see_padding(family: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model.generation_config = GenerationConfig(eos_token_id=sorted(STOPS))
    few, sampling = PROBLEMS[1:], replace(SAMPLING, samples=2)
    together = generated(model, few, sampling)
    for c in together:
        torch.testing.assert_close(c.sequence.behavior_logp, own_logp(model, c, 1.0), rtol=0, atol=2e-5)
    same(together, [c for p in few for c in generated(model, [p], sampling)])


# ---- what decides the draw ----


BATCHES: dict[str, Callable[[PreTrainedModel], list[Episode]]] = {
    "with another between": lambda m: generated(
        m, [PROBLEMS[0], Problem.of_text("other", "x" * 90, ""), *PROBLEMS[1:]]
    ),
    "one row at a time": lambda m: generated(m, max_rows=1),
    "two prompts at a time": lambda m: generated(m, max_rows=9),
}


def test_of_no_problem_there_is_no_episode() -> None:
    """As on a process whose share of a small evaluation is empty."""
    assert transformers_engine(tiny(STOPS)[0]).driver.run([], Sampling(samples=2), ("nothing",)) == []


def test_neighbours_do_not_matter() -> None:
    """Nor does the left padding that unequal prompts need, nor the rows that end and leave.

    Of the order of prompts and of each alone: test_engines.py.
    """
    model, _ = tiny(STOPS)
    together = generated(model)
    assert len({len(c.sequence.prompt_ids) for c in together}) == len(PROBLEMS)
    assert len({len(c.sequence.token_ids) for c in together}) > 3
    for batch in BATCHES.values():
        found = {key(c): c for c in batch(model)}
        same(together, [found[key(c)] for c in together])


def test_uniforms_are_uniform_and_start_the_same_at_any_length() -> None:
    long = uniforms((0, 3, "p", 1), 5000)
    assert long.dtype == torch.float64
    assert (long >= 0).all()
    assert (long < 1).all()
    assert stats.kstest(long.numpy(), "uniform").pvalue > 1e-3
    for n in (1, 7, 16, 17, 4999):
        assert torch.equal(uniforms((0, 3, "p", 1), n), long[:n])
    names = [(0, 3, "p", 1), (1, 3, "p", 1), (0, 4, "p", 1), (0, 3, "q", 1), (0, 3, "p", 2), (0, "3", "p", 1)]
    names.append((3, 0, "p", 1))
    firsts = [float(uniforms(name, 1)) for name in names]
    assert len(set(firsts)) == len(names)


# ---- where a completion ends ----


def test_stopping_cuts_what_would_have_been_drawn() -> None:
    """The same draws with and without stop words: the shorter completion is the longer one up to its first stop."""
    endless = generated(tiny()[0], sampling=Sampling(samples=16, max_new_tokens=12))
    ending = generated(tiny(STOPS)[0], sampling=Sampling(samples=16, max_new_tokens=12))
    for long, short in zip(endless, ending, strict=True):
        n = next(
            (i + 1 for i, token in enumerate(long.sequence.token_ids.tolist()) if token in STOPS),
            len(long.sequence.token_ids),
        )
        assert short.sequence.token_ids.tolist() == long.sequence.token_ids.tolist()[:n]
        torch.testing.assert_close(short.sequence.behavior_logp, long.sequence.behavior_logp[:n], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("configured", "expected"), [(None, {0}), (5, {0, 5}), ([5, 7], {0, 5, 7}), ([0, 7], {0, 7})])
def test_stop_words_are_the_tokenizers_and_the_models(configured: int | list[int] | None, expected: set[int]) -> None:
    model, tokenizer = tiny()
    model.generation_config = GenerationConfig(eos_token_id=configured)
    assert stop_ids(model, tokenizer) == expected
    model.generation_config = None
    assert stop_ids(model, tokenizer) == {0}


def test_completions_can_take_part_in_a_gradient() -> None:
    """They are ordinary tensors, not inference ones."""
    model, _ = tiny()
    c = generated(model, PROBLEMS[:1])[0]
    weight = torch.ones(len(c.sequence.token_ids), requires_grad=True)
    (weight * c.sequence.behavior_logp).sum().backward()
    assert torch.equal(weight.grad, c.sequence.behavior_logp)
    model.get_input_embeddings()(c.sequence.prompt_ids).sum().backward()


# ---- one draw ----


LOGITS = torch.tensor([-torch.inf, 2.0, 0.5, -torch.inf, 1.0, -3.0, 2.0, -9.0, 0.0, 1.5, -1.0, -torch.inf])


def grid(n: int) -> Tensor:
    """The midpoints of n equal parts of [0, 1)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def drawn(logits: Tensor, u: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    return draw(logits.expand(len(u), -1), u, sampling)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_frequencies_are_the_softmax(temperature: float) -> None:
    """By a chi-square test with random numbers, and to one count of all with evenly spaced ones."""
    p = torch.softmax(LOGITS.double() / temperature, dim=-1)
    n = 10_000
    random = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    token, _ = drawn(LOGITS, random, Sampling(temperature=temperature))
    possible = p > 0
    counts = torch.bincount(token, minlength=len(p))
    assert not counts[~possible].any()
    assert stats.chisquare(counts[possible].numpy(), (n * p[possible]).numpy()).pvalue > 1e-3
    token, _ = drawn(LOGITS, grid(n), Sampling(temperature=temperature))
    assert (torch.bincount(token, minlength=len(p)) - n * p).abs().max() < 1.1


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_draw_reports_its_own_probability(dtype: torch.dtype, temperature: float) -> None:
    logits = LOGITS.to(dtype)
    token, logp = drawn(logits, grid(500), Sampling(temperature=temperature))
    wanted = torch.log_softmax(logits.double() / temperature, dim=-1)[token]
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), wanted, rtol=0, atol=1e-6)


ENDS = (0.0, 5e-324, 2.0**-53, 0.5, 1 - 2.0**-53)


@pytest.mark.parametrize("u", ENDS)
def test_the_ends_of_the_interval_draw_a_possible_token(u: float) -> None:
    rows = torch.stack([LOGITS, LOGITS.flip(0), torch.where(torch.arange(12) == 7, 0.0, -torch.inf), torch.zeros(12)])
    rows = torch.cat([rows, 1e4 * torch.eye(12)[5:6], torch.linspace(0, -300, 12)[None]])
    token, logp = draw(rows, torch.full((len(rows),), u, dtype=torch.float64), Sampling())
    assert torch.isfinite(logp).all()
    assert (logp <= 0).all()
    assert token[2] == 7
    assert token[4] == 5
    if u == 0:
        assert token.tolist()[:2] == [1, 1]  # the first that is possible
    if u > 0.9:
        assert token.tolist()[:2] == [10, 10]  # the last that is


@pytest.mark.parametrize("seed", range(3))
def test_each_row_uses_its_own_number(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, 257, generator=generator)
    u = torch.rand(50, generator=generator, dtype=torch.float64)
    token, logp = draw(logits, u, Sampling())
    order = torch.randperm(50, generator=generator)
    again, logp_again = draw(logits[order], u[order], Sampling())
    assert torch.equal(again, token[order])
    assert torch.equal(logp_again, logp[order])
    for row in range(50):
        alone, _ = draw(logits[row : row + 1], u[row : row + 1], Sampling())
        assert alone == token[row]


def test_greedy_takes_the_most_probable_whatever_the_number() -> None:
    token, logp = drawn(LOGITS, grid(20), Sampling(temperature=0, top_k=3))
    assert token.tolist() == [1] * 20  # the first of the two most probable
    torch.testing.assert_close(logp, torch.log_softmax(LOGITS, dim=-1)[token])


def test_at_the_lowest_temperature_every_log_probability_is_finite() -> None:
    token, logp = drawn(1e30 * WITHOUT_TIES, grid(20), Sampling(temperature=1e-6))
    assert token.tolist() == [1] * 20 and (logp == 0).all()


def kept_words(p: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """The words that top-k and top-p leave: the most probable, one by one, until k of them or mass p."""
    kept: set[int] = set()
    mass = 0.0
    for word in np.argsort(-p, kind="stable"):
        if p[word] == 0 or (top_k and len(kept) == top_k) or (top_p < 1 and mass >= top_p):
            break
        kept.add(int(word))
        mass += p[word]
    return kept


WITHOUT_TIES = torch.tensor([-torch.inf, 2.0, 0.5, -torch.inf, 1.1, -3.0, 1.9, -9.0, 0.0, 1.5, -1.0, -torch.inf])


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [
        (1, 1.0),
        (2, 1.0),
        (5, 1.0),
        (50, 1.0),
        (0, 1e-6),
        (0, 1e-60),
        (0, 0.5),
        (0, 0.9),
        (0, 0.999),
        (3, 0.9),
        (6, 0.3),
    ],
)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_truncation_leaves_only_the_allowed_and_renormalises(top_k: int, top_p: float, temperature: float) -> None:
    p = torch.softmax(WITHOUT_TIES.double() / temperature, dim=-1).numpy()
    kept = kept_words(p, top_k, top_p)
    mass = sum(p[word] for word in kept)
    n = 4_000
    token, logp = drawn(WITHOUT_TIES, grid(n), Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert {word for word in kept if n * p[word] / mass > 1} <= set(token.tolist()) <= kept
    torch.testing.assert_close(logp.double(), torch.tensor(np.log(p[token.numpy()] / mass)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (2, 1.0), (0, 0.8)])
def test_the_mean_ratio_under_truncation_is_the_kept_mass(top_k: int, top_p: float) -> None:
    """Why truncated sampling is refused for training: on-policy, the ratio would not average 1 but the mass kept."""
    token, behavior_logp = drawn(WITHOUT_TIES, grid(10_000), Sampling(top_k=top_k, top_p=top_p))
    logp = torch.log_softmax(WITHOUT_TIES, dim=-1)
    p = logp.double().exp().numpy()
    mass = sum(p[word] for word in kept_words(p, top_k, top_p))
    ratio = float((logp[token] - behavior_logp).double().exp().mean())
    assert ratio == pytest.approx(mass, abs=1e-4)
    assert (ratio == pytest.approx(1, abs=1e-4)) == (top_k == 0 and top_p == 1)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"top_p": 0.9}, "sampling.top_p=0.9"),
        ({"top_k": 20}, "sampling.top_k=20"),
        ({"temperature": 0.0}, "sampling.temperature=0"),
        ({"samples": 1}, "sampling.samples=1"),
    ],
)
def test_training_refuses_a_distribution_that_it_cannot_correct_for(settings: dict[str, float], named: str) -> None:
    sampling = Sampling(**settings)  # fine for evaluation
    with pytest.raises(InputError, match=named):
        sampling.require_trainable()
    with pytest.raises(InputError, match=named):
        configure(Run(), sampling=sampling)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_training_takes_any_positive_temperature(temperature: float) -> None:
    assert configure(Run(), sampling=Sampling(temperature=temperature)).rollout.sampling.temperature == temperature


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": 9e-7},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"samples": 0},
        {"max_new_tokens": 0},
    ],
)
def test_sampling_out_of_range(settings: dict[str, float]) -> None:
    ((field, value),) = settings.items()
    with pytest.raises(InputError, match=rf"sampling\.{field}={value}: must be"):
        Sampling(**settings)


def test_the_models_generation_config_changes_nothing_but_the_stop_words() -> None:
    plain, _ = tiny(STOPS)
    model, _ = tiny(STOPS)
    model.generation_config = GenerationConfig(
        eos_token_id=sorted({0, *STOPS}), do_sample=True, temperature=0.3, top_k=20, top_p=0.5, repetition_penalty=1.5
    )
    same(generated(plain), generated(model))
    for c in generated(model):
        torch.testing.assert_close(c.sequence.behavior_logp, own_logp(plain, c, 1.0), rtol=0, atol=1e-5)


# ---- the engine's copy of the weights ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_sync_canary(dtype: torch.dtype) -> None:
    """After a large change and a load, every parameter arrived: the engine samples with the trainer's weights."""
    model, _ = tiny(STOPS)
    engine = transformers_engine(model, precision=Precision(dtype))
    stale = engine.generate(PROBLEMS, SAMPLING, (0,))
    perturb(model, 0.3)
    moved = torch.cat([own_logp(model, c, 1.0) - c.sequence.behavior_logp for c in stale])
    assert moved.abs().mean() > 0.5  # far more than the tolerances below
    engine.load_weights(dict(model.named_parameters()), version=1)
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).to(dtype)), name
    fresh = engine.generate(PROBLEMS, SAMPLING, (0,))
    gaps = torch.cat([own_logp(model, c, 1.0) - c.sequence.behavior_logp for c in fresh])
    assert gaps.abs().mean() < (1e-5 if dtype == torch.float32 else 0.1)


def test_a_bfloat16_engine_rounds_its_parameters_and_nothing_else() -> None:
    model, _ = tiny()
    copies = {name: value.clone() for name, value in model.state_dict().items()}
    engine = transformers_engine(model, precision=Precision(torch.bfloat16))
    engine.generate(PROBLEMS[:1], SAMPLING, (0,))
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in engine.model.parameters())
    rotary = dict(engine.model.named_buffers())
    assert rotary
    for name, buffer in model.named_buffers():
        assert rotary[name].dtype == torch.float32
        assert torch.equal(rotary[name], buffer)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, copies[name]), name
    assert all(p.requires_grad for p in model.parameters())


# ---- prompts ----


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "system", "shot", "expected"),
    [
        (None, None, False, "1 + 1?"),
        (None, "Be brief.", False, "Be brief.\n\n1 + 1?"),
        (None, "Be brief.", True, "Be brief.\n\n0?\n\n0\n\n1 + 1?"),
        (TEMPLATE, None, False, "[user]1 + 1?[assistant]"),
        (TEMPLATE, "Be brief.", False, "[system]Be brief.[user]1 + 1?[assistant]"),
        (TEMPLATE, "Be brief.", True, "[system]Be brief.[user]0?[assistant]0[user]1 + 1?[assistant]"),
        (TEMPLATE, "", False, "[system][user]1 + 1?[assistant]"),
    ],
)
def test_prompt_goes_through_the_chat_template_where_there_is_one(
    template: str | None, system: str | None, shot: bool, expected: str
) -> None:
    model, tokenizer = tiny()
    tokenizer.chat_template = template
    problem = Problem.of_text("p", "1 + 1?", "2", system=system)
    if shot:
        turns = ({"role": "user", "content": "0?"}, {"role": "assistant", "content": "0"})
        problem = replace(problem, messages=(*problem.messages[:-1], *turns, problem.messages[-1]))
    ids = encode_prompt(tokenizer, problem)
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids) == expected
    engine = transformers_engine(model, tokenizer)
    for c in engine.generate([problem, PROBLEMS[3]], SAMPLING, (0,))[:4]:
        assert torch.equal(c.sequence.prompt_ids, ids)
        torch.testing.assert_close(c.sequence.behavior_logp, own_logp(model, c, 1.0), rtol=0, atol=1e-5)


def test_the_templates_special_tokens_are_not_added_twice() -> None:
    _, tokenizer = tiny()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    problem = Problem.of_text("p", "hi", "")
    assert encode_prompt(tokenizer, problem).tolist().count(bos) == 1
    tokenizer.chat_template = "<bos>" + TEMPLATE
    ids = encode_prompt(tokenizer, problem).tolist()
    assert ids.count(bos) == 1
    assert ids[0] == bos


# ---- what a completion refuses ----


def answered(token_ids: list[int], logp: Tensor | None) -> Generation:
    """What an engine answers for completion 3 of problem 'q7'."""
    request = Request(torch.tensor([1]), SAMPLING, frozenset(), (0, "q7", 3), "completion 3 of problem 'q7'")
    return generation(request, torch.tensor(token_ids, dtype=torch.int64), logp, "length", 0)  # type: ignore[arg-type]


FINE = -0.5
BROKEN = {
    "NaN": ([FINE, float("nan"), FINE], "behavior_logp[1]=nan", 42),
    "-inf": ([FINE, FINE, -torch.inf], "behavior_logp[2]=-inf", 43),
    "+inf": ([torch.inf, FINE, FINE], "behavior_logp[0]=inf", 41),
    "positive": ([FINE, 1e-6, FINE], "behavior_logp[1]=", 42),
    "the first of several": ([FINE, 0.1, float("nan")], "behavior_logp[1]=0.1", 42),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_log_probabilities_are_named(case: str) -> None:
    values, said, token = BROKEN[case]
    with pytest.raises(InputError) as caught:
        answered([41, 42, 43], torch.tensor(values))
    for text in ("completion 3 of problem 'q7'", said, f"token id {token}"):
        assert text in str(caught.value)


def test_zero_is_a_log_probability() -> None:
    assert answered([41, 42], torch.tensor([0.0, -0.0])).behavior_logp.tolist() == [0.0, 0.0]


def test_missing_log_probabilities_are_named() -> None:
    with pytest.raises(InputError, match=r"completion 3 of problem 'q7': behavior_logp is missing"):
        answered([41, 42], None)


@pytest.mark.parametrize(("n_tokens", "n_logp"), [(3, 2), (3, 4), (1, 0), (0, 0), (0, 1)])
def test_one_log_probability_for_each_token(n_tokens: int, n_logp: int) -> None:
    said = f"completion 3 of problem 'q7': {n_tokens} token_ids but {n_logp} behavior_logp"
    with pytest.raises(InputError, match=said):
        answered([1] * n_tokens, torch.full((n_logp,), FINE))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_with_broken_weights_says_so(bad: float) -> None:
    """NaN logits have no distribution to draw from: the completion is named, whatever the draw makes of them."""
    model, _ = tiny()
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(bad)
    with pytest.raises(InputError, match=r"completion 0 of problem 'p0'.*finite"):
        generated(model)


# ---- the scripted engine of other tests ----


def test_scripted_engine_keeps_the_protocol() -> None:
    model, tokenizer = tiny()
    engine = Prompted(ScriptedEngine(tokenizer, script=lambda r: f"{r.key[-2]}:" + "x" * r.key[-1]), model)
    completions = engine.generate(PROBLEMS[:2], Sampling(samples=3, max_new_tokens=5), ())
    assert [key(c) for c in completions] == [(p.id, i) for p in PROBLEMS[:2] for i in range(3)]
    for c in completions:
        ids = c.sequence.token_ids.tolist()
        assert (ids[-1] == 0) == (c.finish_reason == "stop")
        assert 0 not in ids[:-1]
        assert len(ids) <= 5
    engine.load_weights({}, version=4)
    assert (engine.version, engine.loaded) == (4, [4])
