"""Supervised fine-tuning: what is trained is what the template makes, as transformers' loss has it; runs and resumes.

Not covered: GPUs, fsdp, models with weights of worth (a warm start that RL profits from is a study, not a test).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from drpo.cli import main
from drpo.errors import InputError
from drpo.model import loading
from drpo.model.policy import Policy
from drpo.model.precision import FP32
from drpo.rollout.trained_turns import trained_sequences
from drpo.tasks.conversations import Conversation, conversation, read_conversations
from drpo.train.callbacks import NullCallback
from drpo.train.chapters import Chapter, read_chapters
from drpo.train.config.groups import CheckpointConfig, ModelConfig
from drpo.train.config.sft import ConversationConfig, SFTConfig, SFTTrainerConfig, load_sft
from drpo.train.optim import Constant
from drpo.train.records import EVALUATIONS, METRICS, read_records
from drpo.train.sft.continued import with_changes
from drpo.train.sft.data import at_step, example, read_examples, updates_of_epoch
from drpo.train.sft.likelihood import NegativeLogLikelihood, likelihood_batch
from drpo.train.sft.loop import fine_tune
from drpo.train.verify import verify
from drpo.types import Message, ScoredGroup, TokenSequence
from support.base_model import END, TEMPLATE, base_model
from support.hostile import refused, said

Messages = Sequence[Message]
SUMS: Messages = (
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and 1?"},
    {"role": "assistant", "content": "It is 3."},
)
FORGETFUL = TEMPLATE.replace("m.content +", "(m.content if loop.last else m.content.split('</think>')[-1]) +")


def ids_of(sequence: TokenSequence) -> list[int]:
    return [*sequence.prompt_ids.tolist(), *sequence.token_ids.tolist()]


def trained_texts(tokenizer: PreTrainedTokenizerBase, sequence: TokenSequence) -> list[str]:
    """The trained stretches of a sequence, decoded."""
    texts, before = [""], False
    for token, trained in zip(sequence.token_ids.tolist(), sequence.sampled.tolist(), strict=True):
        texts += [""] if trained and not before else []
        texts[-1] += tokenizer.decode([token]) if trained else ""
        before = trained
    return [text for text in texts if text]


def test_what_is_trained_is_what_the_template_makes_token_for_token() -> None:
    _, tokenizer = base_model()
    (sequence,) = trained_sequences(tokenizer, "line 1", SUMS)
    whole = tokenizer.apply_chat_template([dict(m) for m in SUMS], tokenize=True, return_dict=False)
    assert ids_of(sequence) == whole[:-1] and tokenizer.decode(whole[-1:]) == "\n"  # behind the last turn
    assert trained_texts(tokenizer, sequence) == [f"2{END}", f"It is 3.{END}"]
    prompt = tokenizer.apply_chat_template([dict(m) for m in SUMS[:2]], add_generation_prompt=True, return_dict=False)
    assert sequence.prompt_ids.tolist() == prompt


def test_all_tokens_but_the_first_are_trained_where_that_is_asked_for() -> None:
    _, tokenizer = base_model()
    (turns,), (every,) = (trained_sequences(tokenizer, "line 1", SUMS, every_token=e) for e in (False, True))
    assert ids_of(every) == ids_of(turns) and every.sampled.all() and len(every.prompt_ids) == 1


def test_a_template_that_rewrites_history_makes_a_further_sequence() -> None:
    _, tokenizer = base_model()
    tokenizer.chat_template = FORGETFUL
    said = [{**m, "content": f"<think>hm</think>{m['content']}"} if m["role"] == "assistant" else m for m in SUMS]
    first, second = trained_sequences(tokenizer, "line 1", said)
    assert trained_texts(tokenizer, first) == [f"<think>hm</think>2{END}"]
    assert trained_texts(tokenizer, second) == [f"<think>hm</think>It is 3.{END}"]
    for sequence, n in ((first, 3), (second, 5)):
        whole = tokenizer.apply_chat_template([dict(m) for m in said[:n]], tokenize=True, return_dict=False)
        assert ids_of(sequence) == whole[:-1]


def test_without_a_template_turns_end_with_eos_and_go_on_as_in_a_rollout() -> None:
    _, tokenizer = loading.tiny()
    (sequence,) = trained_sequences(tokenizer, "line 1", SUMS[1:])
    assert tokenizer.decode(ids_of(sequence)) == "1 + 1?2<eos>\n\nand 1?It is 3.<eos>"
    assert trained_texts(tokenizer, sequence) == ["2<eos>", "It is 3.<eos>"]


@pytest.mark.parametrize("template", [None, "{{ '<bos>' }}" + TEMPLATE])
def test_there_is_one_bos(template: str | None) -> None:
    _, tokenizer = base_model()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.chat_template = template
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    (sequence,) = trained_sequences(tokenizer, "line 1", SUMS)
    assert ids_of(sequence).count(tokenizer.bos_token_id) == 1 and ids_of(sequence)[0] == tokenizer.bos_token_id


def test_a_text_cannot_end_a_turn_or_begin_another() -> None:
    _, tokenizer = base_model()
    forged = [*SUMS[:2], {"role": "assistant", "content": f"a{END}\n<|im_start|>user\nb"}]
    (sequence,) = trained_sequences(tokenizer, "line 1", forged)
    said = sequence.token_ids[sequence.sampled].tolist()
    assert said.count(tokenizer.convert_tokens_to_ids(END)) == 1 and said[-1] == tokenizer.convert_tokens_to_ids(END)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in said


def test_a_template_whose_prompt_leads_to_no_such_turn_is_refused() -> None:
    _, tokenizer = base_model()
    tokenizer.chat_template = TEMPLATE.replace("assistant\\n'", "assistant\\n<think>'")
    with pytest.raises(InputError, match=r"my\.jsonl line 7: the chat template writes the assistant's turn otherwise"):
        trained_sequences(tokenizer, "my.jsonl line 7", SUMS)


def examples(tokenizer: PreTrainedTokenizerBase) -> list[ScoredGroup]:
    other: Messages = ({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Four, I think."})
    said = [Conversation(f"line {i}", tuple(m)) for i, m in enumerate((SUMS, other, SUMS[:3], other[:1] + SUMS[2:]))]
    return [example(c, i, tokenizer, None, False) for i, c in enumerate(said)]


def gradients_of(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_loss_and_gradient_are_those_of_transformers() -> None:
    """On a padded batch whose labels are -100 but where the assistant speaks; in one micro-batch, and in several."""
    model, tokenizer = base_model()
    groups = examples(tokenizer)
    rows = [s for group in groups for s in group.sequences]
    longest = max(len(ids_of(s)) for s in rows)
    inputs, labels = torch.zeros(len(rows), longest, dtype=torch.int64), torch.full((len(rows), longest), -100)
    for i, s in enumerate(rows):
        n, prompt = len(ids_of(s)), len(s.prompt_ids)
        inputs[i, :n] = torch.tensor(ids_of(s))
        labels[i, prompt:n] = torch.where(s.sampled, s.token_ids, -100)
    seen = (torch.arange(longest)[None] < torch.tensor([[len(ids_of(s))] for s in rows])).long()
    plain = model(input_ids=inputs, attention_mask=seen, labels=labels).loss
    wanted = gradients_of(model, plain)
    policy = Policy(model, precision=FP32, temperature=1.0)
    for most in (4096, 100, 1):
        batch = likelihood_batch(groups, most, policy.shares_prompts)
        assert (len(batch.micro_batches) == 1) == (most == 4096)
        loss = torch.stack([policy.loss(m, NegativeLogLikelihood()).loss for m in batch.micro_batches]).sum()
        assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
        for name, gradient in gradients_of(model, loss).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_every_conversation_is_trained_on_before_one_is_again() -> None:
    groups = examples(base_model()[1])[:3]
    updates = [[group.problem.id for group in at_step(groups, 2, step, seed=1)] for step in range(4)]
    assert all(len(set(update)) == len(update) <= 2 for update in updates)
    drawn = [[*updates[i], *updates[i + 1]] for i in (0, 2)]
    assert sorted(drawn[0]) == sorted(drawn[1]) == ["0", "1", "2"]


@pytest.mark.parametrize(("n", "batch"), [(1, 8), (7, 8), (8, 8), (9, 8), (25, 8), (5, 2)])
def test_the_updates_of_an_epoch_are_equal_and_have_no_conversation_twice(n: int, batch: int) -> None:
    groups: list[Any] = list(range(n))  # which `at_step` does not look into
    parts = updates_of_epoch(n, batch)
    for epoch in range(4):
        updates = [at_step(groups, batch, epoch * parts + i, seed=0) for i in range(parts)]
        assert sorted(i for update in updates for i in update) == groups
        sizes = [len(update) for update in updates]
        assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1


def write(path: Path, *rows: Mapping[str, Any] | str) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def data(folder: Path, n: int = 24) -> Path:
    rows = [{"prompt": f"{i} + {i}?", "completion": f"{2 * i}"} for i in range(n)]
    return write(folder / "my.jsonl", {"messages": SUMS}, *rows)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 3: not JSON"),
        ({"question": "1?", "answer": "2"}, "line 3: the fields are question, answer; a row is"),
        ({"prompt": "1?", "completion": None}, "line 3: nothing in 'completion'; a row is"),
        ({"messages": "hello"}, "line 3: 'messages' is no list of messages"),
        ({"messages": [{"role": "user", "content": "1?"}]}, "line 3: no message is the assistant's"),
        ({"messages": SUMS[2:]}, "line 3: the first message is the assistant's"),
        ({"messages": [{"role": "human", "content": "1?"}]}, "line 3: messages.0.role is 'human'; known: system"),
        ({"prompt": "1?", "completion": [{"role": "assistant", "content": 7}]}, "line 3: completion.0.content is no"),
        ({"messages": SUMS, "tools": "[1"}, "line 3: tools is not JSON"),
    ],
)
def test_a_bad_row_is_named_by_its_line(row: Mapping[str, Any] | str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", {"messages": SUMS}, "", row)
    with pytest.raises(InputError, match=re.escape(f"{path} {said}")):
        read_conversations(str(path))


def test_a_run_that_cannot_begin_leaves_one_line_and_no_folder(tmp_path: Path) -> None:
    path, out = write(tmp_path / "my.jsonl", {"messages": SUMS[:2]}), tmp_path / "run"
    said = refused(["sft", str(path), "--model", "tiny", "--out", str(out)])
    assert f"{path} line 1: no message is the assistant's" in said and not out.exists()
    for arguments, fault in ((["nowhere.jsonl"], "no such file"), ([str(path), "--steps", "0"], "must be at least 1")):
        assert fault in refused(["sft", *arguments])


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED = TEMPLATE.replace("m.content +", "m.content + (m.tool_calls | tojson if m.tool_calls else '') +")


def spoken(said: Mapping[str, Any]) -> Conversation:
    return conversation({"messages": [SUMS[1], {"role": "assistant", **said}, SUMS[3], SUMS[4]]}, "my.jsonl line 7")


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("content", ["", "Well.", None])
def test_calls_that_the_template_does_not_write_are_refused(template: str | None, content: str | None) -> None:
    _, tokenizer = base_model()
    tokenizer.chat_template = template
    told = (
        r"my\.jsonl line 7: message 2, the assistant's, has tool_calls, which .* does not write.*--chat-template FILE"
    )
    with pytest.raises(InputError, match=told):
        example(spoken({"content": content, "tool_calls": [CALL]}), 0, tokenizer, None, False)


def test_calls_that_the_template_writes_are_trained_on() -> None:
    _, tokenizer = base_model()
    tokenizer.chat_template = CALLED
    (sequence,) = (
        example(spoken({"content": "", "tool_calls": [CALL]}), 0, tokenizer, None, False).episodes[0].sequences
    )
    assert [json.loads(t.removesuffix(END)) for t in trained_texts(tokenizer, sequence)[:1]] == [[CALL]]


@pytest.mark.parametrize("template", [TEMPLATE, CALLED])
@pytest.mark.parametrize("said", [{"content": ""}, {"content": "", "tool_calls": []}])
def test_an_empty_turn_is_refused(template: str, said: Mapping[str, Any]) -> None:
    _, tokenizer = base_model()
    tokenizer.chat_template = template
    with pytest.raises(
        InputError, match=r"my\.jsonl line 7: message 2, the assistant's, is empty, so there is nothing"
    ):
        example(spoken(said), 0, tokenizer, None, False)


def test_rows_of_messages_and_of_prompts_are_read_alike(tmp_path: Path) -> None:
    asked, answered = [{"role": "user", "content": "1?"}], [{"role": "assistant", "content": "2", "name": None}]
    rows = [{"prompt": "1?", "completion": "2"}, {"prompt": asked, "completion": answered}]
    one, two, three = [
        *read_conversations(str(write(tmp_path / "my.jsonl", *rows))),
        conversation({"messages": asked + answered}, "x"),
    ]
    assert one.messages == two.messages == three.messages and two.where == f"{tmp_path}/my.jsonl line 2"


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", {"messages": SUMS}, "", {"prompt": "1?", "completion": "2"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [c.where for c in read_conversations(str(path))] == [f"{path} line 1", f"{path} line 3"]


def test_a_limit_of_tokens_below_two_is_refused_with_the_limit() -> None:
    with pytest.raises(InputError, match="max_tokens=1: must be at least 2"):
        ConversationConfig(max_tokens=1)


def test_resume_is_told_how_where_it_cannot_act(tmp_path: Path) -> None:
    nope, path = tmp_path / "nope", data(tmp_path)
    assert f"`drpo sft DATA --out {nope}` begins one" in refused(["sft", "--resume", str(nope)])
    for given in (["--resume", str(nope)], [f"--resume={nope}"]):
        assert "give it alone: drpo sft --resume RUN" in refused(["sft", str(path), *given])


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(10)]
    path, test, (_, tokenizer) = tmp_path / "my.jsonl", tmp_path / "test.jsonl", loading.tiny()
    write(path, *rows, *rows)
    read = read_examples(ConversationConfig(path=str(path)), tokenizer, None)
    asked = [{str(group.problem.messages) for group in some} for some in (read.train, read.held_out)]
    assert len(read.held_out) == 2 and asked[0].isdisjoint(asked[1]) and len(read.train) + read.repeated == 18
    assert 1 <= read.repeated <= 2 and f"; dropped: {read.repeated} repeated in the held-out ones" in str(read)
    write(test, *rows[:3], {"messages": SUMS})
    read = read_examples(ConversationConfig(path=str(path), test=str(test)), tokenizer, None)
    assert (len(read.train), len(read.held_out), read.repeated) == (14, 4, 6)
    with pytest.raises(InputError, match="all 20 conversations are held out too"):
        read_examples(ConversationConfig(path=str(path), test=str(path)), tokenizer, None)


def test_long_conversations_are_left_out_and_counted(tmp_path: Path) -> None:
    path, (_, tokenizer) = data(tmp_path), loading.tiny()
    config = ConversationConfig(path=str(path), max_tokens=20, holdout=5)
    read = read_examples(config, tokenizer, None)
    assert (len(read.train), len(read.held_out), read.too_long) == (22, 2, 1)
    assert read_examples(config, tokenizer, limit=8).too_long > 1
    with pytest.raises(InputError, match=r"23 conversations is longer than max_tokens=3 \(the shortest has 8\); set"):
        read_examples(replace(config, max_tokens=3), tokenizer, None)


def test_a_conversation_that_cannot_fit_is_not_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shorter(conversation: Conversation, *others: Any) -> ScoredGroup:
        assert len(conversation.messages[0]["content"]) < 1000
        return example(conversation, *others)

    monkeypatch.setattr("drpo.train.sft.data.example", shorter)
    path, long, (_, tokenizer) = tmp_path / "my.jsonl", "1 + 1? " * 150_000, loading.tiny()
    rows = [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(10)]
    write(path, *rows, {"prompt": long, "completion": "2"}, {"prompt": "2?", "completion": long})
    read = read_examples(ConversationConfig(path=str(path), holdout=0), tokenizer, None)
    assert (len(read.train), read.too_long) == (10, 2)
    write(path, {"prompt": long, "completion": "2"})
    with pytest.raises(InputError, match=r"max_tokens=2048 \(the shortest has 105,000 or more\); set --max-tokens"):
        read_examples(ConversationConfig(path=str(path), holdout=0), tokenizer, None)


def test_long_work_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("drpo.progress.EVERY", 0.0)
    monkeypatch.setattr("drpo.progress.log.info", lambda text, *values: lines.append(text % values))
    path = data(tmp_path)
    read_examples(ConversationConfig(path=str(path)), loading.tiny()[1], None)
    assert lines[-1] == f"{path}: conversations tokenised: {len(lines)} of {len(lines)} so far"


def config_of(path: Path, **model: Any) -> SFTConfig:
    return SFTConfig(
        model=ModelConfig("tiny", precision="fp32", device="cpu", **model),
        data=ConversationConfig(path=str(path)),
        trainer=SFTTrainerConfig(steps=4, batch=8, eval_every=2, micro_batch_tokens=64),
        checkpoints=CheckpointConfig(every=2),
    )


class StopsAfter(NullCallback):
    """Ends a run as Ctrl-C twice does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def stepped(self, step: int, *_: Any) -> None:
        if step == self._step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("model", [{}, pytest.param({"lora_rank": 2}, marks=pytest.mark.slow)])
def test_resumed_is_one_run_bit_for_bit(model: dict[str, Any], tmp_path: Path) -> None:
    config, whole, parts = config_of(data(tmp_path), **model), tmp_path / "whole", tmp_path / "parts"
    fine_tune(config, whole)
    for step in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            fine_tune(config, parts, StopsAfter(step))
        if step == 3:  # as after a power failure: what was done since the checkpoint before is lost
            shutil.rmtree(parts / "checkpoints" / "step-000003")
    fine_tune(config, parts)
    for name in ("metrics.jsonl", "evaluations.jsonl", "config.json", "model/model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert [m["step"] for m in read_records(whole / METRICS)] == [1, 2, 3, 4]
    evaluations = read_records(whole / EVALUATIONS)
    assert [e["step"] for e in evaluations] == [0, 2, 4] and evaluations[-1]["nll"] < evaluations[0]["nll"]
    shutil.rmtree(parts / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint is there, though 4 steps are recorded"):
        fine_tune(config, parts)  # and not from the start, over what is recorded
    assert len(read_records(parts / METRICS)) == 4


class StopsInEvaluation(NullCallback):
    """Ends a run in its second evaluation of the held-out loss."""

    def __init__(self) -> None:
        self._evaluations = 0

    def phase(self, name: str) -> None:
        self._evaluations += name == "evaluation"
        if self._evaluations == 2:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_stopped_in_an_evaluation_claims_no_step_that_it_has_not_recorded(tmp_path: Path) -> None:
    config, whole, parts = config_of(data(tmp_path)), tmp_path / "whole", tmp_path / "parts"
    fine_tune(config, whole)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(config, parts, StopsInEvaluation())
    assert main(["verify", str(parts)]) == 0
    fine_tune(config, parts)
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    options = ("--model", "tiny", "--batch", "8", "--learning-rate", "1e-3", "--plain")
    assert main(["sft", str(data(folder)), *options, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.slow
def test_the_other_commands_take_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["watch", str(run), "--once"], ["verify", str(run)], ["report", str(run)]):
        assert main(command) == 0, command
    shown = capsys.readouterr().out
    assert "held-out loss" in shown and "finished" in shown and "Held-out loss" in (run / "report.html").read_text()
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    smoke = ["train", "smoke", "--model", str(run), "--steps", "1", "--eval-problems", "2", "--no-doctor", "--plain"]
    assert main([*smoke, "--out", str(tmp_path / "rl")]) in (0, 1)
    assert (tmp_path / "rl" / "model").is_dir()
    for command in (["train", "--from"], ["train", "--resume"]):
        assert "drpo train RECIPE --model" in refused([*command, str(run)])


@pytest.mark.slow
def test_a_run_is_not_begun_over_another_and_a_finished_one_stays(run: Path) -> None:
    model = (run / "model" / "model.safetensors").read_bytes()
    assert "drpo sft --resume" in refused(["sft", str(run.parent / "my.jsonl"), "--out", str(run)])
    assert main(["sft", "--resume", str(run), "--plain"]) == 0
    assert (run / "model" / "model.safetensors").read_bytes() == model


@pytest.mark.slow
def test_two_processes_train_the_same_model(tmp_path: Path) -> None:
    options = ("sft", str(data(tmp_path)), "--model", "tiny", "--batch", "8", "--precision", "fp32", "--plain")
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "drpo")
    done = subprocess.run(
        [*torchrun, *options, "--out", str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_records(tmp_path / name / METRICS) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_lengthened_it_is_one_long_run_and_a_changed_rate_is_a_chapter(tmp_path: Path) -> None:
    config = config_of(data(tmp_path))
    constant = replace(config, optimizer=replace(config.optimizer, schedule=Constant()))
    whole, parts, linear = (tmp_path / name for name in ("whole", "parts", "linear"))
    fine_tune(constant.with_steps(6), whole)
    fine_tune(constant, parts)
    fine_tune(config, linear)
    fine_tune(with_changes(load_sft(parts), {"steps": 6}), parts)
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    assert (whole / "model/model.safetensors").read_bytes() == (parts / "model/model.safetensors").read_bytes()
    assert read_chapters(parts) == [Chapter(4, {"steps": (4, 6)})]
    told = StopsAfter(5)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(with_changes(load_sft(linear), {"steps": 6}), linear, told)
    fine_tune(load_sft(linear), linear)  # as `drpo sft --resume` alone goes on in the same chapter
    (chapter,) = read_chapters(linear)
    assert chapter.differs == ("schedule linear counts on all steps: until here the learning rates were those of 4",)
    assert [part.sound for part in verify(linear) if part.name == "chapters.jsonl"] == [True]


def test_the_resume_command_changes_settings_and_refuses_what_cannot_act(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    resume = ["sft", "--resume", str(folder)]
    steps = load_sft(folder).trainer.steps
    assert f"{steps} steps are done; give more" in refused([*resume, "--steps", "1"])
    assert "so nothing would change; add --steps" in refused([*resume, "--learning-rate", "1e-4"])
    assert "must be from 0" in refused([*resume, "--stall", "-1"])
    more = [*resume, "--steps", str(steps + 1), "--learning-rate", "1e-4", "--schedule", "constant", "--plain"]
    shown = said(more)
    assert shown.status == 0 and f"from step {steps + 1}: steps {steps} -> {steps + 1}" in shown.out
    last = read_records(folder / METRICS)[-1]
    assert last["step"] == steps + 1 and last["learning_rate"] == 1e-4
    assert "chapter 2" in (folder / "report.html").read_text()
