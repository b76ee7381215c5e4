"""Checks of token ids: where completions end, and that the trained ids are the sampled ids."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from drpo.doctor.finding import Finding, judge
from drpo.doctor.probe_batch import ProbeBatch, by_completion, micro_batches
from drpo.model.policy import Policy
from drpo.rollout import encode_prompt
from drpo.rollout.turn_ends import turn_end
from drpo.types import Episode, Problem

EXPECTED = 20.0
"""The expected number of ends from which their absence is significant: e^-20 by chance."""


def stops(batch: ProbeBatch, stop: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Finding:
    """Whether completions end at the tokens that end a turn, and only there."""
    ended = [c for c in batch.completions if c.finish_reason == "stop"]
    wrong = [w for w in (_wrong_end(c, frozenset(stop), max_new_tokens) for c in batch.completions) if w]
    expected = float(batch.stops.double().sum())
    turn = turn_end(tokenizer)
    named = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in list(stop)[:4])
    if wrong:
        advice = f"{wrong[0]}: the engine's EOS is not the model's"
    elif not ended and expected > EXPECTED:
        advice = f"no completion ends, though {expected:.0f} were expected: the engine's EOS is not the model's"
    else:
        advice = ""
    verdict, advice = judge(not advice, advice)
    if verdict == "ok" and turn is not None and turn not in stop:
        token = tokenizer.convert_ids_to_tokens(turn)
        verdict, advice = "note", f"the chat template ends a turn with {token!r}, which --stop does not name"
    return Finding(
        "stops",
        verdict,
        f"{len(ended)} of {len(batch.completions)} completions end with one of {named}; {len(wrong)} end wrongly",
        "an EOS at the end of those that stop, and nowhere else",
        advice,
        {"ended": len(ended), "wrong": len(wrong), "expected": expected},
    )


def _wrong_end(c: Episode, stop: frozenset[int], max_new_tokens: int) -> str | None:
    *inner, last = c.sequence.token_ids.tolist()
    who = f"completion {c.sample} of problem {c.problem_id!r}"
    if any(t in stop for t in inner):
        return f"{who} continues after an EOS"
    if c.finish_reason == "stop" and last not in stop:
        return f"{who} is said to have stopped, but its last token {last} is no EOS"
    if c.finish_reason == "length" and (last in stop or c.n_sampled != max_new_tokens):
        return f"{who} is said to be cut, but has {c.n_sampled} of {max_new_tokens} tokens and ends with {last}"
    return None


def round_trip(
    policy: Policy, batch: ProbeBatch, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase
) -> Finding:
    """Whether the engine read the prompts that were sent, and the trainer trains on the sampled ids."""
    prompts = {p.id: encode_prompt(tokenizer, p) for p in problems}
    micros = micro_batches(policy, batch.completions)
    trained = by_completion(micros, [m.target for m in micros])
    sampled = torch.cat([c.sequence.token_ids for c in batch.completions])
    vocab_size = policy.model.config.get_text_config().vocab_size
    sound = {
        "the engine read other prompts than those sent": all(
            torch.equal(c.sequence.prompt_ids, prompts[c.problem_id]) for c in batch.completions
        ),
        "ids are outside the model's vocabulary": bool(((sampled >= 0) & (sampled < vocab_size)).all()),
        "the ids that are trained are not those that were sampled": all(
            torch.equal(ids, c.sequence.token_ids) for ids, c in zip(trained, batch.completions, strict=True)
        ),
        "completions' text is not that of their ids": all(_text(tokenizer, c) == c.text for c in batch.completions),
    }
    faults = [fault for fault, so in sound.items() if not so]
    other = sum(_encoded(tokenizer, c.text) != _without_special(tokenizer, c) for c in batch.completions)
    verdict, advice = judge(
        not faults, f"{'; '.join(faults)}: hand token ids from the engine to the trainer, never text"
    )
    return Finding(
        "tokens",
        verdict,
        f"{len(sampled)} ids go from the sampler into training as they are; encoding their text again would change "
        f"{other} of {len(batch.completions)} completions",
        "no id changes",
        advice,
        {"tokens": len(sampled), "would_change": other},
    )


def _text(tokenizer: PreTrainedTokenizerBase, c: Episode) -> str:
    text: str = tokenizer.decode(c.sequence.token_ids, skip_special_tokens=True)
    return text


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _without_special(tokenizer: PreTrainedTokenizerBase, c: Episode) -> list[int]:
    special = set(tokenizer.all_special_ids)
    return [i for i in c.sequence.token_ids.tolist() if i not in special]
