"""Adapters, GGUF files and uploads: what is written is the trained function, as other programs read it.

GGUF files are read by the reader of transformers and, where it is installed, by llama.cpp. The hub is a stand-in.
Plain folders are in tests/test_saving.py and tests/test_train.py.
"""

import copy
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import httpx2
import numpy as np
import peft
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from drpo.cli import hub
from drpo.cli.trained import restored
from drpo.errors import InputError
from drpo.model import loading
from drpo.model.adapter_folder import adapter_tensors
from drpo.model.gguf_file import SPLITS, write_gguf
from drpo.model.loading import named_tensors
from drpo.model.saving import probe, save_model
from drpo.train import loop
from drpo.train.config import configure
from drpo.train.optim import AdamW
from drpo.train.records import CHECKPOINTS, CONFIG
from drpo.train.stored import latest
from support.base_model import TEMPLATE
from support.families import build
from support.hostile import refused, said
from support.worlds import few_run

# GGUF

CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    **{
        name: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for name, pattern in SPLITS.items()
    },
}
CORPUS = ["What is 16 + 13? The sum of 16 and 13 is 29.", "It's 1234567 o'clock, isn't it?  Yes.\n\n  No!", "für élan"]


def tokenizer_of(cut: str) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with merges, special tokens and a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = CUTS[cut], decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0], pad_token=special[0])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


SIZES: dict[str, Any] = dict(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, eos_token_id=0, pad_token_id=0,
    bos_token_id=None,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.0)
KINDS: dict[str, tuple[Any, Any, str]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=False), "smollm"),
    "llama, tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True), "gpt-2"),
    "llama, biases": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        "llama-bpe",
    ),
    "llama3": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True), "llama-bpe"),
    "llama, linear": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LINEAR), "llama-bpe"),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True), "qwen2"),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False), "qwen2"),
}


def model_of(kind: str) -> PreTrainedModel:
    make, config, _ = KINDS[kind]
    config = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(config).eval()
        for parameter in model.parameters():  # norms and biases too
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


def field(reader: Any, name: str) -> Any:
    return reader.get_field(name).contents()


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0].float()


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("llama, biases", "llama3", "llama, linear")])
def test_transformers_reads_the_same_model_from_the_file(kind: str, tmp_path: Path):
    """Every tensor to the bit and the logits, in the order of transformers' rotation; texts have the same tokens."""
    model, tokenizer = model_of(kind), tokenizer_of(KINDS[kind][2])
    write_gguf(model, tokenizer, frozenset({0, 2}), tmp_path / "m.gguf", "fp32")
    of_qwen3 = {"config": model.config} if kind == "qwen3" else {}  # whose attention.key_length transformers leaves
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32, **of_qwen3).eval()
    ours, theirs = named_tensors(model), named_tensors(read)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    ids = torch.tensor(tokenizer(CORPUS[0])["input_ids"])
    assert torch.allclose(logits_of(read, ids), logits_of(model, ids), atol=1e-4)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert again(CORPUS[0])["input_ids"] == tokenizer(CORPUS[0])["input_ids"]
    assert again.chat_template == TEMPLATE and again.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["llama, biases", "llama3", "qwen3"])
def test_the_file_has_what_a_reader_asks_for(kind: str, dtype: str, tmp_path: Path):
    model, tokenizer = model_of(kind), tokenizer_of(KINDS[kind][2])
    write_gguf(model, tokenizer, frozenset({0, 2}), tmp_path / "m.gguf", dtype)
    reader: Any = gguf.GGUFReader(tmp_path / "m.gguf")
    arch = model.config.model_type
    assert field(reader, "general.architecture") == arch and field(reader, f"{arch}.block_count") == 2
    assert field(reader, f"{arch}.attention.key_length") == 8 and field(reader, f"{arch}.vocab_size") == 320
    assert field(reader, "tokenizer.ggml.pre") == KINDS[kind][2] and field(reader, "tokenizer.ggml.eot_token_id") == 2
    assert field(reader, "tokenizer.ggml.eos_token_id") == 0 and not field(reader, "tokenizer.ggml.add_bos_token")
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == 320 and tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    n = len(tokenizer)
    assert kinds[:4] == [3, 3, 3, 1] and kinds[n - 1] == 4 and tokens[n] == f"[PAD{n}]" and kinds[n] == 5
    rounded = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    down = model.model.layers[1].mlp.down_proj.weight.detach()
    assert np.array_equal(found["blk.1.ffn_down.weight"], down.to(rounded).float().numpy())
    assert np.array_equal(found["output_norm.weight"], model.model.norm.weight.detach().numpy())
    names = set(found)
    if kind == "llama, biases":
        assert {"blk.0.attn_q.bias", "blk.0.ffn_gate.bias", "blk.0.attn_output.bias"} <= names
        weight, bias = found["blk.0.attn_q.weight"], found["blk.0.attn_q.bias"]  # rows of both in the same order
        query = model.model.layers[0].self_attn.q_proj
        at = [int(np.abs(query.bias.detach().numpy() - b).argmin()) for b in bias]
        assert sorted(at) == list(range(32)) != at
        assert np.array_equal(weight, query.weight.detach().to(rounded).float().numpy()[at])
    assert ("rope_freqs.weight" in names) == (kind == "llama3")
    if kind == "llama3":
        i = torch.arange(4) / 4
        used = model.model.rotary_emb.inv_freq
        assert torch.allclose(10000.0**-i / torch.from_numpy(found["rope_freqs.weight"].copy()), used)
        assert found["rope_freqs.weight"][0] == 1.0 and found["rope_freqs.weight"][-1] == pytest.approx(8.0)
    if kind == "qwen3":
        assert {"blk.0.attn_q_norm.weight", "output.weight"} <= names


def changed(model: PreTrainedModel, **fields: Any) -> PreTrainedModel:
    for name, value in fields.items():
        setattr(model.config, name, value)
    return model


def test_what_is_not_written_is_refused_in_a_line(tmp_path: Path):
    llama, tokenizer = model_of("llama"), tokenizer_of("gpt-2")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    cases: list[tuple[PreTrainedModel, PreTrainedTokenizerBase, str]] = [
        (changed(model_of("llama"), rope_parameters=yarn), tokenizer, "rope_type='yarn'"),
        (changed(model_of("qwen2"), rope_parameters=LLAMA3), tokenizer, "rope_type='llama3'"),
        (changed(model_of("llama"), hidden_act="gelu"), tokenizer, "hidden_act='gelu'"),
        (changed(model_of("qwen2"), layer_types=["sliding_attention"] * 2), tokenizer, "sliding_attention"),
        (llama, loading.tiny()[1], "no byte-level BPE"),
    ]
    other = tokenizer_of("gpt-2")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    small = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 100}))
    for model, of_it, told in [*cases, (llama, other, "cuts texts"), (small, tokenizer, "do not fit")]:
        with pytest.raises(InputError, match="--gguf") as caught:
            write_gguf(model, of_it, frozenset({0}), tmp_path / "m.gguf", "fp32")
        assert told in str(caught.value) and "\n" not in str(caught.value)
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight[0, 0] = 1e6
    with pytest.raises(InputError, match="fp16 does not reach"):
        write_gguf(llama, tokenizer, frozenset({0}), tmp_path / "m.gguf", "fp16")
    assert not list(tmp_path.iterdir())


def test_other_families_are_named(tmp_path: Path):
    with pytest.raises(InputError, match="MistralForCausalLM is of a family that is not written; known: Llama"):
        write_gguf(build("mistral"), tokenizer_of("gpt-2"), frozenset({0}), tmp_path / "m.gguf", "fp32")


def test_a_damaged_file_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = gguf.GGUFWriter.write_tensors_to_file

    def half(self: Any, **options: Any) -> None:
        write(self, **options)
        with open(tmp_path / "m.gguf.writing", "r+b") as file:
            file.seek(-4, 2)
            file.write(b"\xff\xff\xff\x7f")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", half)
    with pytest.raises(InputError, match="read back"):
        write_gguf(model_of("llama"), tokenizer_of("gpt-2"), frozenset({0}), tmp_path / "m.gguf", "fp32")
    assert not list(tmp_path.iterdir())


LLAMA_CPP = "llama_cpp is not installed: pip install llama-cpp-python, in an environment of its own"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason=LLAMA_CPP)
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(kind: str, tmp_path: Path):
    """Tokens of texts and log-probabilities, from the file alone."""
    import llama_cpp

    model, tokenizer = model_of(kind), tokenizer_of(KINDS[kind][2])
    write_gguf(model, tokenizer, frozenset({0, 2}), tmp_path / "m.gguf", "fp32")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=128, logits_all=True, verbose=False)
    for text in (*CORPUS, "<|im_start|>user\nhi<|im_end|>\n", "<tool>x", "\U0001f600 42"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids, text
    ids = tokenizer(" ".join(CORPUS))["input_ids"][:100]
    llama.reset()
    llama.eval(ids)
    theirs = torch.from_numpy(np.array(llama.scores[: len(ids)])).log_softmax(-1)
    ours = logits_of(model, torch.tensor(ids)).log_softmax(-1)
    assert float((theirs - ours).abs().max()) < 0.02  # llama.cpp's attention has its keys in fp16


def test_the_command_writes_a_file(tmp_path: Path):
    save_model(model_of("llama"), tokenizer_of("smollm"), tmp_path / "model")
    target = tmp_path / "m.gguf"
    status, out, err = said(["export", str(tmp_path / "model"), str(target), "--gguf", "--dtype", "bf16"])
    assert status == 0 and "in bf16, as GGUF" in out, err
    assert field(gguf.GGUFReader(target), "general.file_type") == gguf.LlamaFileType.MOSTLY_BF16
    assert field(gguf.GGUFReader(target), "general.name") == "m"
    assert "exists" in refused(["export", str(tmp_path / "model"), str(target), "--gguf"])


# Adapters


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    run = configure(few_run(lora_rank=2, steps=2, optimizer=AdamW(3e-2)), checkpoint_every=1, eval_problems=0)
    loop.train(run, folder / "run")
    return folder / "run"


@pytest.mark.parametrize("step", [0, 1])
def test_peft_reads_the_adapter_of_a_run(lora: Path, step: int, tmp_path: Path):
    """On the model that the run began with it has the logits of the trained model."""
    target, whole = tmp_path / "adapter", tmp_path / "whole"
    for more in ([str(target), "--adapter"], [str(whole)]):
        assert said(["export", str(lora), *more, "--step", str(step)]).status == 0
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 4 and config["base_model_name_or_path"] == "tiny"
    assert sorted(config["target_modules"]) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    base = loading.tiny()[0]
    ids, before = probe(base), logits_of(base, probe(base))
    adapted = peft.PeftModel.from_pretrained(base, target).eval()
    trained = loading.load(str(whole))[0]
    assert torch.allclose(logits_of(adapted, ids), logits_of(trained, ids), atol=1e-5)
    assert not torch.allclose(before, logits_of(trained, ids), atol=1e-3)
    again, tokenizer = loading.load(str(target))  # drpo reads it too
    assert torch.allclose(logits_of(again, ids), logits_of(trained, ids), atol=1e-5)
    assert tokenizer.decode([1]) == loading.tiny()[1].decode([1])


def test_an_adapter_of_another_function_is_refused(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scaled = {name: 2 * t for name, t in adapter_tensors(_policy(lora)).items()}
    monkeypatch.setattr("drpo.model.adapter_folder.adapter_tensors", lambda model: scaled)
    line = refused(["export", str(lora), str(tmp_path / "adapter"), "--adapter"])
    assert "other logits than the trained policy" in line


def _policy(run: Path) -> Any:
    return restored(run, latest(run / CHECKPOINTS), False)[0].model


def test_a_run_without_an_adapter_says_so(lora: Path, tmp_path: Path):
    shutil.copytree(lora, tmp_path / "run")
    file, record = tmp_path / "run" / CONFIG, json.loads((lora / CONFIG).read_text())
    for fields, told in (
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"base_precision": "nf4"}, "nf4, and on others its adapter is another function"),
    ):
        file.write_text(json.dumps(record | {"model": record["model"] | fields}))
        assert told in refused(["export", str(tmp_path / "run"), str(tmp_path / "adapter"), "--adapter"])
    file.write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS)
    assert "its model is merged" in refused(["export", str(tmp_path / "run"), str(tmp_path / "adapter"), "--adapter"])
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tiny", "out", "--adapter"], "not a run of drpo"),
        (["tiny", "out", "--gguf"], "ends in .gguf"),
        (["tiny", "out.gguf"], "ends in .gguf"),
        (["tiny", "out.gguf", "--gguf", "--adapter"], "two files"),
        (["tiny", "out.gguf", "--gguf"], "no byte-level BPE"),
        (["tiny", "out", "--public"], "--push owner/name"),
        (["tiny", "out", "--overwrite"], "--push owner/name"),
        (["tiny", "nowhere/out.gguf", "--gguf"], "nowhere/out.gguf"),
    ],
)
def test_export_refuses_in_one_line(arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert told in refused(["export", *arguments])
    assert not list(tmp_path.iterdir())


# The hub


class Hub:
    """A stand-in for the hub: one account, its organisation, and what repositories hold."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.role, self.fails = "write", False

    def whoami(self) -> dict[str, Any]:
        if self.fails:
            raise httpx2.ConnectError("no route")
        return {"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": self.role}}}

    def repo_exists(self, repo: str) -> bool:
        return repo in self.repos

    def list_repo_files(self, repo: str) -> list[str]:
        return sorted(self.repos[repo])

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.repos.setdefault(repo, {".gitattributes": b""})
        self.private.setdefault(repo, private)
        return f"https://hub/{repo}"

    def upload_file(self, path_or_fileobj: Any, path_in_repo: str, repo_id: str) -> None:
        data = path_or_fileobj if isinstance(path_or_fileobj, bytes) else Path(path_or_fileobj).read_bytes()
        self.repos[repo_id][path_in_repo] = data

    def upload_folder(self, folder_path: Path, repo_id: str) -> None:
        if self.role == "breaks":
            raise httpx2.ReadTimeout("too slow")
        self.repos[repo_id] |= {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    stand_in = Hub()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(hub.hub_constants, "HF_HUB_OFFLINE", False)
    yield stand_in


def test_a_model_is_uploaded_once_it_is_written(there: Hub, lora: Path, tmp_path: Path):
    status, out, err = said(["export", str(lora), "out", "--push", "team/sums"])
    assert status == 0 and "https://hub/team/sums" in out, err
    files = there.repos["team/sums"]
    assert {p.name for p in (tmp_path / "out").iterdir()} <= files.keys() and there.private["team/sums"]
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert b"objective `" in files["README.md"] and b"base_model" not in files["README.md"]
    assert "files are there" in refused(["export", str(lora), "again", "--push", "team/sums"])
    more = ["export", str(lora), "again", "--adapter", "--push", "team/sums", "--overwrite", "--public"]
    assert said(more).status == 0 and "adapter_config.json" in there.repos["team/sums"]


def test_a_file_is_uploaded_alone(there: Hub, tmp_path: Path):
    save_model(model_of("llama"), tokenizer_of("smollm"), tmp_path / "model")
    assert said(["export", "model", "m.gguf", "--gguf", "--push", "me/sums", "--public"]).status == 0
    assert there.repos["me/sums"].keys() == {".gitattributes", "README.md", "m.gguf"}
    assert not there.private["me/sums"]


@pytest.mark.parametrize(
    ("repo", "change", "told"),
    [
        ("sums", {}, "name the owner too"),
        ("a/b/c", {}, "--push a/b/c"),
        ("me/x y", {}, "--push me/x y"),
        ("other/sums", {}, "does not belong to 'other'"),
        ("me/sums", {"role": "read"}, "may only read"),
        ("me/sums", {"fails": True}, "cannot be reached"),
        ("me/sums", {"token": None}, "hf auth login"),
        ("me/sums", {"offline": True}, "HF_HUB_OFFLINE"),
        ("me/full", {"repos": {"me/full": {"a.bin": b""}}}, "--overwrite"),
    ],
)
def test_an_upload_that_cannot_work_is_refused_before_anything_is_written(
    there: Hub, repo: str, change: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
):
    for name, value in change.items():
        if name == "token":
            monkeypatch.setattr(hub, "get_token", lambda: value)  # noqa: B023 (read in this case alone)
        elif name == "offline":
            monkeypatch.setattr(hub.hub_constants, "HF_HUB_OFFLINE", value)
        else:
            setattr(there, name, value)
    assert told in refused(["export", "tiny", "out", "--push", repo])
    assert not Path("out").exists() and all("out" not in files for files in there.repos.values())


def test_an_upload_that_breaks_off_leaves_the_folder(there: Hub):
    there.role = "breaks"
    line = refused(["export", "tiny", "out", "--push", "me/sums"])
    assert "hf upload me/sums out" in line and Path("out", "model.safetensors").exists()
