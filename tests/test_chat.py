"""Talking with a model: what is streamed is what is sampled, what is shown is the trained function's, and the command.

Not covered: tokenizers that rewrite earlier text, which no byte-level one does.
"""

import io
import json
import math
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from drpo.cli.chat import ChatConfig, ChatModel, converse
from drpo.cli.screen import Colours, Lines, coloured
from drpo.errors import BrokenLogpError, InputError, printable
from drpo.model import loading
from drpo.recipes.agents import calculator
from drpo.rollout import EpisodeDriver, TransformersEngine
from drpo.rollout.stream import SampledToken
from drpo.serving.dialogue import Dialogue
from drpo.serving.responses import token_bytes
from drpo.serving.sampler import Sampler
from drpo.serving.text import Piece, TextStream, TextToken
from drpo.train import loop
from drpo.train.config import ModelConfig, Run, configure, read_value, to_json
from drpo.train.config.sft import ConversationConfig, SFTConfig, SFTTrainerConfig
from drpo.train.optim import AdamW
from drpo.train.records import CONFIG, METRICS, MODEL, SUMMARY
from drpo.train.sft.loop import fine_tune
from drpo.types import Problem, Request, Sampling
from drpo.types.environment import Observation, StepResult, Turn
from drpo.types.problem import message
from support.base_model import TEMPLATE
from support.hostile import refused, said
from support.tiny_world import STOPS, tiny
from support.worlds import codes, sampling, tiny_run

FEW = Sampling(samples=1, max_new_tokens=24)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler.of(*tiny(STOPS), precision="fp32")


def prompt(text: str = "7 + 5 = ?") -> torch.Tensor:
    return torch.tensor(loading.tiny()[1](text)["input_ids"])


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


# The stream


@pytest.mark.parametrize(
    "how", [FEW, Sampling(1, 9, 0.7, top_logprobs=3), Sampling(1, 9, 0.0), Sampling(1, 9, 1.3, 0.8, 20)]
)
def test_what_is_streamed_is_what_is_generated(sampler: Sampler, how: Sampling):
    """Bit for bit, to the last token and to the most probable others."""
    for n in range(4):
        request = Request(prompt(), how, sampler.stop, ("q", n))
        (whole,), tokens = sampler.engine.generate([request]), list(sampler.engine.stream(request))
        assert [t.id for t in tokens] == whole.token_ids.tolist()
        assert [t.logp for t in tokens] == whole.behavior_logp.tolist()
        if whole.top_logprobs is not None:
            assert [[i for i, _ in t.top] for t in tokens] == whole.top_logprobs.ids.tolist()
            assert [[logp for _, logp in t.top] for t in tokens] == whole.top_logprobs.logp.tolist()


def test_streams_under_way_together_do_not_disturb_one_another(sampler: Sampler):
    requests = [Request(prompt("ab" * (1 + 3 * n)), FEW, frozenset(), ("q", n)) for n in range(3)]
    alone = [list(sampler.engine.stream(request)) for request in requests]
    streams = [sampler.engine.stream(request) for request in requests]
    together = list(zip(*streams, strict=True))
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_probability_shown_is_that_of_the_model(sampler: Sampler, temperature: float):
    """Against a plain forward pass over the whole text."""
    how = Sampling(1, 12, temperature, top_logprobs=2)
    tokens = [t for piece in sampler.stream(prompt(), how, ("q",)) for t in piece.sampled]
    ids = torch.cat([prompt(), torch.tensor([t.id for t in tokens])])
    with torch.no_grad():
        logp = torch.log_softmax(tiny()[0](ids[None]).logits[0] / temperature, -1)[len(prompt()) - 1 : -1]
    assert torch.allclose(torch.tensor([t.logp for t in tokens]), logp.gather(1, ids[len(prompt()) :, None])[:, 0])
    tops = torch.tensor([[p for _, p in t.top] for t in tokens])
    assert torch.allclose(tops, logp.topk(2).values, atol=1e-5)


def test_logits_that_are_not_finite_end_the_stream(sampler: Sampler):
    model, tokenizer = tiny()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(BrokenLogpError, match="the answer"):
        list(Sampler.of(model, tokenizer, precision="fp32").stream(prompt(), FEW, ("q",)))


def test_the_text_is_that_of_a_rollout(sampler: Sampler):
    """With the same key, that a reward would have read."""
    driver = EpisodeDriver(sampler.engine, sampler.tokenizer, sampler.stop, sampler.limits)
    ((episode,),) = driver.run([Problem.of_text("p", "7 + 5 = ?", "12")], FEW, (3,))
    pieces = list(sampler.stream(prompt(), FEW, (3, "p", 0)))
    assert text_of(pieces) == episode.text
    assert pieces[-1].finish_reason == episode.finish_reason
    assert [t.id for piece in pieces for t in piece.sampled] == episode.sequence.token_ids.tolist()


# Text, piece by piece

BYTES = loading.tiny()[1]
ID_OF = {data[0]: i for i in range(1, 257) if len(data := token_bytes(BYTES, i) or b"") == 1}
TEXTS = st.text("ab\n \u2264\U0001f600\ufffd", max_size=12) | st.text(max_size=8)


def streamed(ids: Sequence[int], stop: Sequence[str]) -> list[Piece]:
    stream, pieces = TextStream(BYTES, stop), []
    for i in ids:
        pieces.append(stream.add(SampledToken(i, -0.5)))
        if pieces[-1].finish_reason is not None:
            return pieces
    return [*pieces, stream.end("length")]


@given(TEXTS, st.lists(st.text("ab\n\u2264", min_size=1, max_size=3), max_size=3), st.binary(max_size=3))
@example("aab", ["ab"], b"")
@example("ab\u2264", ["\u2264b"], b"\xe2\x89")
@example("\ufffd", [], b"\xf0\x9f")
def test_the_pieces_are_the_whole(text: str, stop: list[str], rest: bytes):
    """No token is lost or comes twice, whatever is held back; the text ends before the first stop text."""
    data = text.encode("utf-8", "surrogatepass") + rest
    ids = [ID_OF[byte] for byte in data]
    whole, pieces = BYTES.decode(ids), streamed(ids, stop)
    ends = [at for s in stop if (at := whole.find(s)) >= 0]
    assert text_of(pieces) == whole[: min(ends, default=len(whole))]
    assert [t.id for piece in pieces for t in piece.sampled] == ids[: sum(len(p.sampled) for p in pieces)]
    assert pieces[-1].finish_reason == ("stop" if ends else "length") and not any(p.finish_reason for p in pieces[:-1])
    tokens = [t for piece in pieces for t in piece.tokens]
    if not ends:
        assert "".join(t.text for t in tokens) == whole and [t.token.id for t in tokens] == ids
    assert all(whole[t.offset :].startswith(t.text) for t in tokens)


@pytest.mark.parametrize(
    ("data", "offsets", "of_tokens"),
    [
        (b"7\r\xc3J", [0, 1, 2, 3], ["7", "\r", "\ufffd", "J"]),
        (b"\xc3\xc3J", [0, 1, 2], ["\ufffd", "\ufffd", "J"]),
        (b"\xc3\xe2\x89\xa4J", [0, 1, 1, 1, 2], ["\ufffd", "", "", "\u2264", "J"]),
        (b"a\xe2\x89\xa4\xe2\x89", [0, 1, 1, 1, 2, 2], ["a", "", "", "\u2264", "", "\ufffd"]),
    ],
)
def test_a_token_begins_behind_bytes_that_are_no_character(data: bytes, offsets: list[int], of_tokens: list[str]):
    tokens = [t for piece in streamed([ID_OF[byte] for byte in data], []) for t in piece.tokens]
    assert [t.offset for t in tokens] == offsets and [t.text for t in tokens] == of_tokens


@pytest.mark.parametrize("rest", [[], [0], [0, ID_OF[99]], [0, 0, ID_OF[0xE2]]])
def test_a_token_without_a_text_is_left_out(rest: list[int]):
    """Wherever it is: the tokens spell the text."""
    ids = [0, *BYTES("a\u2264")["input_ids"], 0, *BYTES("b")["input_ids"], *rest]
    pieces = streamed(ids, [])
    tokens = [t for piece in pieces for t in piece.tokens]
    assert [t.token.id for t in tokens] == [i for i in ids if i != 0]
    assert "".join(t.text for t in tokens) == text_of(pieces) == BYTES.decode(ids, skip_special_tokens=True)


def test_offsets_never_decrease():
    """SentencePiece's kind of tokenizers decodes neighbouring bytes together, so that a text may become shorter."""
    vocabulary = {"<unk>": 0, "a": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    pieces = [stream.add(SampledToken(2 + byte, -0.5)) for byte in b"\xc3\xa9\xe2\xa9\xa9\xc3"]
    assert [t.offset for piece in [*pieces, stream.end("length")] for t in piece.tokens] == [0, 0, 1, 3, 3, 3]


def test_what_may_begin_a_stop_text_is_held_back():
    pieces = streamed(BYTES("to be\n\n!")["input_ids"], ["\n\n?"])
    assert [p.text for p in pieces] == ["t", "o", " ", "b", "e", "", "", "\n\n!", ""]
    assert [len(p.tokens) for p in pieces] == [1, 1, 1, 1, 1, 0, 0, 3, 0]


# Conversations


class Replies:
    """An environment whose replies are written down."""

    max_turns = 3

    def open(self, problems: Sequence[Problem]) -> list[Observation]:
        return [Observation(p.messages) for p in problems]

    def step(self, turns: dict[int, Turn]) -> dict[int, StepResult]:
        self.turn += 1
        return {n: StepResult((message("user", f"and {self.turn}?"),)) for n in turns}

    def __init__(self) -> None:
        self.turn = 0

    def close(self) -> None:
        pass


FORGETFUL = TEMPLATE.replace("m.content +", "(m.content if loop.last else '-') +")


@pytest.mark.parametrize("template", [None, TEMPLATE, FORGETFUL])
def test_a_conversation_goes_on_as_in_training(template: str | None):
    """Three turns, read and sampled, are those of an episode with the same random numbers; also where it branches."""
    model, tokenizer = tiny(frozenset(range(1, 257, 3)))
    tokenizer.chat_template = template
    sampler = Sampler.of(model, tokenizer, precision="fp32")
    driver = EpisodeDriver(sampler.engine, tokenizer, sampler.stop, sampler.limits, Replies())
    ((episode,),) = driver.run([Problem.of_text("p", "7 + 5 = ?", "", system="Add.")], Sampling(1, 64), (1,))
    assert len(episode.turns) == 3
    dialogue = Dialogue((message("system", "Add."),))
    for turn, question in enumerate(["7 + 5 = ?", "and 1?", "and 2?"]):
        asked = dialogue.asked(tokenizer, question, sampler.stop)
        pieces = list(sampler.stream(asked.ids, Sampling(1, 64), (1, "p", 0, *([turn] if turn else []))))
        dialogue = asked.answered([t.id for p in pieces for t in p.sampled], text_of(pieces))
    last = episode.sequences[-1]
    assert dialogue.ids.tolist() == [*last.prompt_ids.tolist(), *last.token_ids.tolist()]
    assert dialogue.messages == episode.messages[:-1]  # which ends with a reply that no turn follows
    assert len(episode.sequences) == (3 if template == FORGETFUL else 1)


class Recorded(Lines):
    """Writes answers down, and is interrupted in some of them."""

    def __init__(self, interrupted: Sequence[int] = ()) -> None:
        super().__init__(False)
        self.answers: list[list[Piece]] = []
        self.notes: list[str] = []
        self._interrupted, self._open = interrupted, False

    def note(self, text: str) -> None:
        self.notes.append(text)

    def piece(self, piece: Piece) -> None:
        if not self._open:
            self.answers.append([])
        self._open = True
        self.answers[-1].append(piece)
        if len(self.answers) - 1 in self._interrupted and len(self.answers[-1]) == 3:
            raise KeyboardInterrupt

    def end(self, *_: Any) -> None:
        self._open = False


def read_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model reads before each answer, from now on."""
    read: list[str] = []
    stream = Sampler.stream

    def noted(self: Sampler, ids: torch.Tensor, *rest: Any) -> Iterator[Piece]:
        read.append(self.tokenizer.decode(ids))
        return stream(self, ids, *rest)

    monkeypatch.setattr(Sampler, "stream", noted)
    return read


def test_ctrl_c_ends_an_answer_and_not_the_conversation(monkeypatch: pytest.MonkeyPatch):
    sampler = Sampler.of(*tiny(), precision="fp32")
    read, screen = read_by(monkeypatch), Recorded(interrupted=[0])
    model = ChatModel("it", sampler, Dialogue())
    converse([model], ["one", "two"], screen, ChatConfig(FEW, 0, interactive=True))
    assert len(screen.answers[0]) == 3 and len(screen.answers[1]) == 25
    said_before = sampler.tokenizer.decode([t.id for p in screen.answers[0] for t in p.sampled])
    assert read == ["one", f"one{said_before}\n\ntwo"]
    with pytest.raises(KeyboardInterrupt):  # from a pipe there is nobody to go on
        converse([model], ["one"], Recorded(interrupted=[0]), ChatConfig(FEW, 0, interactive=False))


def test_reset_begins_anew_and_other_commands_are_no_questions(monkeypatch: pytest.MonkeyPatch):
    sampler = Sampler.of(*tiny(), precision="fp32")
    read, screen = read_by(monkeypatch), Recorded()
    lines = ["one", "/reset", "", "/help", "/rest", "//two", "/reset", "one"]
    converse([ChatModel("it", sampler, Dialogue())], lines, screen, ChatConfig(FEW, 0, interactive=True))
    assert read == ["one", "/two", "one"]
    assert "Ctrl-D" in screen.notes[1] and "no such command: /rest" in screen.notes[2]
    assert text_of(screen.answers[0]) != text_of(screen.answers[2])  # no question has the numbers of another
    with pytest.raises(InputError, match=r"chat: no such command: /rest; .* //text"):  # else a pipe lacks an answer
        converse([ChatModel("it", sampler, Dialogue())], ["/rest"], screen, ChatConfig(FEW, 0, interactive=False))


def test_a_question_that_does_not_fit_leaves_the_conversation_as_it_was(monkeypatch: pytest.MonkeyPatch):
    sampler = Sampler.of(*tiny(), precision="fp32")
    read, screen = read_by(monkeypatch), Recorded()
    model = ChatModel("it", sampler, Dialogue())
    converse([model], ["a", "b" * 3000, "c"], screen, ChatConfig(Sampling(1, 2), 0, interactive=True))
    assert len(read) == 2 and read[1].endswith("\n\nc") and "b" not in read[1]
    assert "2,048 positions" in screen.notes[0] and "/reset" in screen.notes[0]


def test_colours_are_those_of_the_probabilities(capsys: pytest.CaptureFixture[str]):
    def shown(p: float, text: str = "x") -> str:
        return coloured(TextToken(SampledToken(1, math.log(p)), 0, text))

    assert shown(0.95) == "x" and "\x1b[32m" in shown(0.5) and "\x1b[33m" in shown(0.49) and "31m" in shown(0.05)
    assert "\x1b]" not in shown(0.95, "\x1b]0;title\x07") and "\ufffd" in shown(0.95, "\x1b")
    token = SampledToken(BYTES("x")["input_ids"][0], math.log(0.25))
    pieces = [Piece("x", (TextToken(token, 0, "x"),), (token,), "length")]
    screen = Colours(True)
    screen.piece(pieces[0])
    screen.end(pieces, BYTES)
    out = capsys.readouterr().out
    assert "\x1b[33mx\x1b[0m" in out and '"x" 0.25' in out and "cut" in out


# The command


def of_run(folder: Path, **changes: Any) -> Run:
    """A run whose questions have a system message, and whose steps are large."""
    rows = [{"q": f"{i} + 1?", "a": str(i + 1)} for i in range(40)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = f"records('{folder / 'sums.jsonl'}', 'q', 'a', system='Add up.', holdout=4, reward_name='exact_number')"
    few = sampling(max_new_tokens=4, temperature=0.8)
    run = tiny_run(task=read_value("task", task), reward=codes, optimizer=AdamW(3e-2), steps=2, sampling=few)
    return configure(run, eval_problems=0, checkpoint_every=1, keep_checkpoints=5, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    loop.train(of_run(folder), folder / "run")
    return folder / "run"


def answers(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> str:
    """What the command writes for lines from a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status, out, err = said(["chat", *arguments, "--max-new-tokens", "8"])
    assert status == 0, err
    return out


def test_the_same_seed_gives_the_same_answers(run: Path, monkeypatch: pytest.MonkeyPatch):
    first = answers(monkeypatch, "3 + 1?\nand 2?\n", str(run))
    assert first == answers(monkeypatch, "3 + 1?\nand 2?\n", str(run)) and len(first) > 2
    assert first != answers(monkeypatch, "3 + 1?\nand 2?\n", str(run), "--seed", "1")


def test_a_run_is_read_as_it_was_trained(run: Path, monkeypatch: pytest.MonkeyPatch):
    """System message and temperature are the run's, the weights those of its end, or of a checkpoint."""
    read = read_by(monkeypatch)
    drawn: list[Request] = []
    stream = TransformersEngine.stream
    monkeypatch.setattr(TransformersEngine, "stream", lambda self, r: drawn.append(r) or stream(self, r))
    greedy = ("--temperature", "0")
    ends = answers(monkeypatch, "3 + 1?\n", str(run), *greedy)
    answers(monkeypatch, "3 + 1?\n", str(run))
    assert read == ["Add up.\n\n3 + 1?"] * 2
    assert drawn[0].sampling.temperature == 0 and drawn[1].sampling.temperature == 0.8
    assert ends == answers(monkeypatch, "3 + 1?\n", str(run / MODEL), "--system", "Add up.", *greedy)
    assert ends != answers(monkeypatch, "3 + 1?\n", str(run), "--step", "1", *greedy)
    answers(monkeypatch, "3 + 1?\n", str(run), "--system", "")
    assert read[-1] == "3 + 1?"


def test_beside_the_untrained_model(run: Path, monkeypatch: pytest.MonkeyPatch):
    """Each has a conversation of its own; `start` is the model of the configuration."""
    out = answers(monkeypatch, "1\n2\n", str(run), "--versus", "start", "--temperature", "0")
    parts = out.split(f"[{run}]\n")
    assert len(parts) == 3 and all(part.count("[start]\n") == 1 for part in parts[1:])
    untrained = answers(monkeypatch, "1\n2\n", "tiny", "--system", "Add up.", "--temperature", "0")
    assert "".join(part.split("[start]\n")[1] for part in parts[1:]) == untrained
    trained = answers(monkeypatch, "1\n2\n", str(run), "--temperature", "0")
    assert "".join(part.split("[start]\n")[0] for part in parts[1:]) == trained != untrained


def test_probabilities_are_numbers_where_there_are_no_colours(run: Path, monkeypatch: pytest.MonkeyPatch):
    out = answers(monkeypatch, "3 + 1?\n", str(run), "--show-probabilities", "--precision", "fp32")
    sampler = Sampler.of(*loading.load(str(run / MODEL)), precision="fp32")
    pieces = list(sampler.stream(prompt("Add up.\n\n3 + 1?"), Sampling(1, 8, 0.8), ("chat", 0, 0)))
    sampled = [t for piece in pieces for t in piece.sampled]
    names = [json.dumps(printable(BYTES.decode(t.id)), ensure_ascii=False) for t in sampled]
    lines = [f"{math.exp(t.logp):.4g}\t{name}" for t, name in zip(sampled, names, strict=True)]
    assert out == "\n".join([printable(text_of(pieces)), *lines, ""]) and "\x1b" not in out


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora_rank": 2}, pytest.param({"lora_rank": 2, "base_precision": "nf4"}, marks=pytest.mark.slow)],
)
def test_a_run_that_has_not_finished(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It speaks with the weights of its last checkpoint, adapters too; those of its end are the same."""
    loop.train(of_run(tmp_path, **changes), tmp_path / "run")
    greedy = (str(tmp_path / "run"), "--temperature", "0", "--precision", "fp32", "--versus", "start")
    finished = answers(monkeypatch, "3 + 1?\n", *greedy)
    shutil.rmtree(tmp_path / "run" / MODEL)
    (tmp_path / "run" / SUMMARY).unlink()
    assert answers(monkeypatch, "3 + 1?\n", *greedy) == finished


def test_a_fine_tuned_model_speaks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"prompt": f"{i}", "completion": f"{i + 1}"} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ConversationConfig(path=str(tmp_path / "data.jsonl"), holdout=0)
    config = SFTConfig(model=ModelConfig("tiny"), data=data, trainer=SFTTrainerConfig(steps=1))
    fine_tune(config, tmp_path / "run")
    finished = answers(monkeypatch, "1\n", str(tmp_path / "run"), "--versus", "start")
    shutil.rmtree(tmp_path / "run" / MODEL)
    assert answers(monkeypatch, "1\n", str(tmp_path / "run"), "--versus", "start") == finished
    record = json.loads((tmp_path / "run" / CONFIG).read_text())
    (tmp_path / "run" / CONFIG).write_text(json.dumps(record | {"model": record["model"] | {"name": "os:getcwd"}}))
    assert "--trust-remote-code" in refused(["chat", str(tmp_path / "run")])


def test_what_a_run_says_first_may_need_its_code_or_its_file(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    file, record = tmp_path / "run" / CONFIG, json.loads((run / CONFIG).read_text())
    for task, told in (("my_own:Task", "--trust-remote-code"), ("records('gone.jsonl', 'q', 'a')", "gone.jsonl")):
        file.write_text(json.dumps(record | {"data": record["data"] | {"task": task}}))
        line = refused(["chat", str(tmp_path / "run")])
        assert told in line and "--system TEXT" in line


def test_an_environment_opens_the_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the model reads before the first question has the tools that it was trained with."""
    trained = configure(calculator(), model="tiny", steps=1, prompts=2, updates=1, eval_problems=0)
    trained = configure(trained, **{"sampling.samples": 2, "sampling.max_new_tokens": 4})
    loop.train(trained, tmp_path / "run")
    read = read_by(monkeypatch)
    answers(monkeypatch, "3 + 1?\n", str(tmp_path / "run"))
    assert "<calc>" in read[0] and read[0].endswith("3 + 1?")


@pytest.mark.parametrize("kind", ["drpo sft", "drpo train"])
def test_a_run_without_a_checkpoint_says_which_command_goes_on(kind: str, run: Path, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    text = json.dumps(to_json(SFTConfig())) if kind == "drpo sft" else (run / CONFIG).read_text()
    (folder / CONFIG).write_text(text)
    (folder / METRICS).touch()
    told = f"drpo: {folder}: there is no checkpoint yet; `{kind} --resume {folder}` goes on with the run"
    for step in ([], ["--step", "3"]):
        assert refused(["chat", str(folder), "--temperature", "1", "--system", "", *step]) == told


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_pipe_that_is_no_text_is_refused(errors: str, monkeypatch: pytest.MonkeyPatch):
    pipe = io.TextIOWrapper(io.BytesIO(b"caf\xe9?\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", pipe)
    assert refused(["chat", "tiny"]) == "drpo: chat: the input is no utf-8 text; convert it to UTF-8"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name a run's folder or a model"),
        (["nowhere/x/y"], "nowhere/x/y"),
        (["tiny", "--versus", "start"], "is not a run"),
        (["tiny", "--versus", "smolm2-135m"], "smollm2-135m"),
        (["tiny", "--step", "3"], "is not a run of drpo"),
        (["tiny", "--temperature", "-1"], "temperature=-1"),
        (["tiny", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["tiny", "--stop", "not one token"], "stop='not one token'"),
        (["tiny", "--show-probability"], "--show-probabilities"),
    ],
)
def test_chat_refuses_in_one_line(arguments: list[str], told: str):
    assert told in refused(["chat", *arguments])


@pytest.mark.slow
def test_on_a_terminal(tmp_path: Path):
    """Ctrl-C ends an answer of a thousand tokens, Ctrl-D the program, with status 0; colours are there."""
    us, them = pty.openpty()
    command = [sys.executable, "-m", "drpo", "chat", "tiny", "--max-new-tokens", "1900", "--show-probabilities"]
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdin=them, stdout=them, stderr=them, start_new_session=True, env=environment
    ) as chat:
        os.close(them)
        seen = ""

        def until(text: str, seconds: float = 120.0) -> None:
            nonlocal seen
            end = time.monotonic() + seconds
            while text not in seen and time.monotonic() < end and select.select([us], [], [], 1.0) is not None:
                if select.select([us], [], [], 0.1)[0]:
                    seen += os.read(us, 2**16).decode(errors="replace")
            assert text in seen, seen[-2000:]
            seen = seen[seen.index(text) + len(text) :]

        until("> ")
        os.write(us, b"hello\n")
        until("\x1b[1;31m")  # tokens come
        chat.send_signal(signal.SIGINT)
        until("least probable")
        until("> ")
        os.write(us, b"\x04")
        assert chat.wait(30) == 0
        os.close(us)
