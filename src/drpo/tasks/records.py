"""Tasks from rows with a question and an answer: files, folders, hub datasets."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import Any

from drpo.errors import InputError, counted
from drpo.rewards import REGISTRY, Reward
from drpo.seeds import derive
from drpo.spec import parse_spec
from drpo.tasks.cleaning import Question, collapse, without
from drpo.tasks.messages import conversation_text, read_messages
from drpo.tasks.rows import Row, is_file, reach, read_rows
from drpo.types import Problem
from drpo.types.problem import message


@dataclass(frozen=True)
class Counts:
    """Counts of kept and dropped rows.

    Args:
        rows: rows read for training.
        incomplete: rows dropped for lack of a question or an answer (NaN and infinities are no answers).
        repeats: rows dropped because they repeat an earlier question.
        conflicting: distinct questions dropped because they have several answers.
        overlapping: distinct questions dropped because they are in the held-out set.
        shots: distinct questions dropped because the examples of every prompt have them, with their answers.
        train: questions to train on.
        held_out: questions to evaluate on.
    """

    rows: int
    incomplete: int
    repeats: int
    conflicting: int
    overlapping: int
    shots: int
    train: int
    held_out: int

    def __str__(self) -> str:
        """Return one line for the log."""
        dropped = {
            "without a question or an answer": self.incomplete,
            "repeated": self.repeats,
            "with conflicting answers": self.conflicting,
            "in the held-out set": self.overlapping,
            "shown as examples": self.shots,
        }
        why = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n)
        kept = f"{counted(self.rows, 'row')}: {self.train:,} to train on, {self.held_out:,} held out"
        return f"{kept}; dropped: {why}" if why else f"{kept}; none dropped"


@dataclass(frozen=True)
class _Split:
    train: list[Question]
    held_out: list[Question]
    counts: Counts


@dataclass(frozen=True)
class Records:
    r"""Questions and answers from a file, a folder or the hub; read when first used.

    Training draws questions without replacement, in a new order every epoch: rollout `step` of n problems takes
    positions step * n to (step + 1) * n - 1 of the concatenated epochs. Repeated questions, questions with conflicting
    answers and questions of the held-out set are dropped first; `counts` reports them.

    Args:
        path: a .jsonl, .json, .csv or .parquet file; a folder of such files named by split; or a hub id, "owner/name".
        prompt: the field with the question: a text, or a list of messages that ends with the user's, as in TRL and
            verl. Dotted names reach into nested fields: "prompt.0.content".
        answer: the field with the answer: text, a number (1e-05 is read as 0.00001, 72.0 as 72) or a boolean.
        system: the system message for questions without one; or None.
        template: the text of the user's message; "{prompt}" is replaced by the question, or by the last message of a
            list.
        split: the part of a folder or hub dataset to train on; None for evaluation only.
        config: the configuration of a hub dataset.
        test: the evaluation set: another file, or a split of the same folder or hub dataset. It is not cleaned.
        holdout: number of questions held out if there is no `test`; at most half of them.
        answer_after: the answer is the text after the last occurrence of this mark in its field: "####".
        overlap_prefix: number of first characters that decide whether a question is in the held-out set, without white
            space and case; None compares all.
        reward_name: a built-in reward, or your own as "module:function".
        shots: examples that precede every question as earlier turns: pairs of a question, to which `template` is
            applied too, and a reply. Questions of the data that are among them are dropped.

    Raises:
        InputError: an invalid argument, on construction; invalid data, on first use.

    Example:
        >>> task = Records("problems.jsonl", "question", "answer", shots=[("1 + 1?", "2"), ("2 + 5?", "7")])
    """

    path: str
    prompt: str
    answer: str
    system: str | None = None
    template: str = "{prompt}"
    split: str | None = "train"
    config: str | None = None
    test: str | None = None
    holdout: int = 256
    answer_after: str | None = None
    overlap_prefix: int | None = None
    reward_name: str = "math_verify"
    shots: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise InputError(f"records: template={self.template!r} must contain {{prompt}}")
        if self.holdout < 0:
            raise InputError(f"records: holdout={self.holdout} must be 0 or more")
        if self.overlap_prefix is not None and self.overlap_prefix < 1:
            raise InputError(f"records: overlap_prefix={self.overlap_prefix} must be 1 or more, or None")
        if self.test is not None and is_file(self.path) and not is_file(self.test):
            raise InputError(f"records: path={self.path!r} is one file, so test={self.test!r} must be a file too")
        if self.split is None and self.test is None:
            raise InputError("records: split=None and test=None leave nothing to read")
        for shot in self.shots:
            if isinstance(shot, str) or [type(text) for text in shot] != [str, str]:
                raise InputError(f"records: shots: {shot!r} must be a question and its reply, two texts")

    @cached_property
    def reward(self) -> Reward:
        """The reward `reward_name`."""
        return parse_spec(self.reward_name, REGISTRY)

    @property
    def counts(self) -> Counts:
        """The counts of kept and dropped rows; reads the data."""
        return self._data.counts

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Take the next n questions of the epochs; see `Task.sample`."""
        if self.split is None:
            raise InputError(f"{self.path}: for evaluation only; it has nothing to train on")
        train = self._data.train
        if not train:
            raise InputError(f"{self.path}: nothing to train on ({self.counts})")
        places = (divmod(step * n + slot, len(train)) for slot in range(n))
        questions = (train[_order(len(train), seed, epoch)[i]] for epoch, i in places)
        return [self._problem(f"{step}-{slot}", question) for slot, question in enumerate(questions)]

    def training_problems(self) -> list[Problem]:
        """Return all questions to train on, in a fixed order; see `FiniteTask`."""
        return [self._problem(f"train-{i}", question) for i, question in enumerate(self._data.train)]

    def held_out(self, n: int) -> list[Problem]:
        """Return the first n evaluation questions, in a fixed shuffled order; see `Task.held_out`."""
        held_out = self._data.held_out
        if n and not held_out:
            raise InputError(f"{self.path}: nothing is held out; set test or holdout ({self.counts})")
        return [self._problem(f"held-out-{i}", question) for i, question in enumerate(held_out[:n])]

    @cached_property
    def _data(self) -> _Split:
        rows = [] if self.split is None else read_rows(self.path, self.split, self.config)
        complete = self._questions(rows, self.path)
        distinct, repeats, conflicting = collapse(complete)
        shown = [Question(ask, reply) for ask, reply in self.shots]
        questions = without(distinct, shown, None)
        n_shots = len(distinct) - len(questions)
        if self.test is None:
            questions = _shuffled(questions)
            size = min(self.holdout, len(questions) // 2)
            held_out, questions = questions[:size], questions[size:]
        else:
            # Shuffled, because sets are often sorted by difficulty and the first n must represent all.
            tested = self._questions(self._test_rows(self.test), f"{self.path} {self.test}")
            held_out = _shuffled(without(tested, shown, None))
        train = without(questions, held_out, self.overlap_prefix)
        counts = Counts(
            rows=len(rows),
            incomplete=len(rows) - len(complete),
            repeats=repeats,
            conflicting=conflicting,
            overlapping=len(questions) - len(train),
            shots=n_shots,
            train=len(train),
            held_out=len(held_out),
        )
        return _Split(train, held_out, counts)

    def _test_rows(self, test: str) -> list[Row]:
        return read_rows(test, "test") if is_file(test) else read_rows(self.path, test, self.config)

    def _questions(self, rows: Iterable[Row], source: str) -> list[Question]:
        """Return the questions of the rows that have a question and an answer."""
        questions = []
        for number, row in enumerate(rows, 1):
            where = f"{source} row {number}"
            asked = reach(row, self.prompt, where)
            messages = read_messages(asked, self.prompt, where) if isinstance(asked, list) else ()
            text = conversation_text(messages) if messages else as_text(asked, self.prompt, where)
            answer = self._final(as_text(reach(row, self.answer, where), self.answer, where), where)
            if text and answer:
                questions.append(Question(text, answer, row, messages))
        return questions

    def _final(self, answer: str, where: str) -> str:
        if self.answer_after is None or not answer:
            return answer
        _, mark, final = answer.rpartition(self.answer_after)
        if not mark:
            raise InputError(f"{where}: the answer has no {self.answer_after!r}: {answer[-60:]!r}")
        return final.strip()

    def _problem(self, name: str, question: Question) -> Problem:
        messages = question.messages or (message("user", question.text),)
        leading = messages[:1] if messages[0]["role"] == "system" else ()
        system = leading or (() if self.system is None else (message("system", self.system),))
        shots = [
            m for ask, reply in self.shots for m in (message("user", self._templated(ask)), message("assistant", reply))
        ]
        *earlier, last = messages[len(leading) :]
        last = {**last, "content": self._templated(last["content"])}
        return Problem(name, (*system, *shots, *earlier, last), question.answer, question.row)

    def _templated(self, text: str) -> str:
        return self.template.replace("{prompt}", text)  # not str.format: templates of mathematics contain braces


def as_text(value: Any, name: str, where: str) -> str:
    """Return a field's value as text; "" for None, NaN and infinities.

    Args:
        value: text, a number or a boolean.
        name: of the field, for the error message.
        where: the row, for the error message.

    Raises:
        InputError: another kind of value.

    Example:
        >>> as_text(" 72 ", "answer", "row 1"), as_text(72.0, "answer", "row 1")
        ('72', '72')
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float | Decimal):
        return _digits(Decimal(str(value)))
    if isinstance(value, int):
        return str(value)
    inner = next(iter(value), None) if isinstance(value, Mapping) else 0 if isinstance(value, list) and value else None
    reached = "" if inner is None else f"; {f'{name}.{inner}'!r} reaches into it"
    shown = repr(value)[:60]
    raise InputError(f"{where}: field {name!r} is a {type(value).__name__}, not text or a number: {shown}{reached}")


def _digits(value: Decimal) -> str:
    """Format a number without an exponent, as math-verify reads it; "" for NaN and infinities."""
    if not value.is_finite():
        return ""
    digits = f"{value:f}"
    return digits.rstrip("0").removesuffix(".") if "." in digits else digits


def _shuffled(questions: list[Question]) -> list[Question]:
    return [questions[i] for i in _order(len(questions), "held out", 0)]


@lru_cache(maxsize=8)
def _order(size: int, seed: int | str, epoch: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(derive("records", seed, epoch)).shuffle(order)
    return tuple(order)
