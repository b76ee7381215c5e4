"""Checkpoints of other trainers: found, put together, evaluated; and ours as they read them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from drpo import cli
from drpo.errors import InputError
from drpo.model import external, loading
from drpo.train import stored
from support.pictures import without_pictures


def saved(folder: Path, seed: int = 0) -> PreTrainedModel:
    model, tokenizer = loading.tiny(vocab_seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    """This process as one rank of many; nothing is sent."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_part(whole: Tensor, shape: Sequence[int], place: Sequence[int], placements: Sequence[Any]) -> Tensor:
    """What the rank at `place` of the mesh holds; torch.chunk's cut, as FSDP2 makes it, uneven at the end."""
    for size, here, placement in zip(shape, place, placements, strict=True):
        if isinstance(placement, Shard):
            parts = whole.chunk(size, placement.dim)
            empty = whole.narrow(placement.dim, 0, 0)
            whole = parts[here] if here < len(parts) else empty
    return whole


def save_pieces(folder: Path, state: dict[str, Tensor], shape: tuple[int, ...], placements: Sequence[Any]) -> None:
    """The files that verl and SkyRL write: one a rank, with DTensors, and what is not sharded as plain tensors."""
    world = int(torch.tensor(shape).prod())
    names = ("ddp", "fsdp")[-len(shape) :]
    for rank in range(world):
        with as_rank(rank, world):
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            place = mesh.get_coordinate()
            parts = {
                name: DTensor.from_local(
                    local_part(value, shape, place, placements).clone(),
                    mesh,
                    placements,
                    run_check=False,
                    shape=value.shape,
                    stride=value.stride(),
                )
                if value.dim() > 1
                else value
                for name, value in state.items()
            }
            torch.save(parts, folder / f"model_world_size_{world}_rank_{rank}.pt")


LAYOUTS = {
    "transformers": ".",
    "TRL": "checkpoint-20",
    "verl": "global_step_20/actor/huggingface",
    "SkyRL's export": "global_step_20/policy",
    "prime-rl": "weights/step_20",
    "OpenRLHF": "global_step20_hf",
    "drpo": "model",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_newest_model_of_a_run_is_found(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """And where it is read from is said once, however often."""
    caplog.set_level("INFO", logger="drpo")
    newest = tmp_path / LAYOUTS[layout]
    older = tmp_path / LAYOUTS[layout].replace("20", "9")
    saved(older, seed=9)
    wanted = saved(newest, seed=20)
    assert external.locate(tmp_path) == newest
    found, tokenizer = loading.load(str(tmp_path))
    assert same(found, wanted) and tokenizer.decode(tokenizer("7 + 5")["input_ids"]) == "7 + 5"
    assert loading.n_parameters(str(tmp_path)) == wanted.num_parameters()
    inside = f"model={str(tmp_path)!r}: read from {newest}"
    assert caplog.messages == [inside] * (newest != tmp_path)


@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        pytest.param((1,), (Shard(0),), marks=pytest.mark.slow),
        pytest.param((2,), (Shard(0),), marks=pytest.mark.slow),
        ((3,), (Shard(0),)),  # 257 rows of the embedding do not divide
        ((2,), (Shard(1),)),
        ((2, 2), (Replicate(), Shard(0))),
        ((2, 2), (Shard(0), Shard(1))),
        pytest.param((2, 3), (Shard(0), Shard(0)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_pieces_of_fsdp_go_together(shape: tuple[int, ...], placements: Sequence[Any], tmp_path: Path):
    wanted, tokenizer = loading.tiny(vocab_seed=3)
    folder = tmp_path / "global_step_4" / "actor"
    (folder / "huggingface").mkdir(parents=True)
    wanted.config.save_pretrained(folder / "huggingface")
    tokenizer.save_pretrained(folder / "huggingface")
    save_pieces(folder, wanted.state_dict(), shape, placements)
    assert external.locate(tmp_path) == folder
    found, _ = loading.load(str(tmp_path))
    assert same(found, wanted)
    assert loading.n_parameters(str(tmp_path)) == wanted.num_parameters()
    assert loading.load_tokenizer(str(tmp_path)).eos_token == "<eos>"


def test_a_missing_piece_is_named(tmp_path: Path):
    save_pieces(tmp_path, {"w": torch.ones(4, 2)}, (3,), (Shard(0),))
    (tmp_path / "model_world_size_3_rank_1.pt").unlink()
    with pytest.raises(InputError, match=r"pieces of ranks \[0, 2\] are there, of \[3\]"):
        external.pieces_of(tmp_path)


def test_pieces_of_another_model_are_refused(tmp_path: Path):
    model, tokenizer = loading.tiny()
    (tmp_path / "huggingface").mkdir()
    model.config.save_pretrained(tmp_path / "huggingface")
    tokenizer.save_pretrained(tmp_path / "huggingface")
    state = model.state_dict()
    del state["model.norm.weight"]
    save_pieces(tmp_path, state, (2,), (Shard(0),))
    with pytest.raises(InputError, match=r"not those of the model in .*'model\.norm\.weight'"):
        loading.load(str(tmp_path))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("bomb-went-off"),))


def test_nothing_but_tensors_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Bomb()}, tmp_path / "model_world_size_1_rank_0.pt")
    with pytest.raises(InputError, match="cannot be read as tensors alone"):
        external.merge(external.pieces_of(tmp_path))
    assert not Path("bomb-went-off").exists()


def test_an_adapter_is_merged_into_its_base(tmp_path: Path):
    base, tokenizer = loading.tiny()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "run" / "checkpoint-3")
    ids = torch.arange(1, 30).unsqueeze(0)
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits
        found, _ = loading.load(str(tmp_path / "run"))
        assert torch.allclose(found(input_ids=ids).logits, wanted, atol=1e-5)
        plain, _ = loading.load(str(tmp_path / "base"))
        assert not torch.allclose(plain(input_ids=ids).logits, wanted, atol=1e-2)
    assert loading.n_parameters(str(tmp_path / "run")) == plain.num_parameters()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("notes.txt", r"no model is there \(no config.json with weights"),
        ("global_step_3/actor/dist_ckpt/x", "only Megatron's pieces"),
        ("global_step_3/actor/x.distcp", "only Megatron's pieces"),
        ("global_step_3/zero_to_fp32.py", "only DeepSpeed's pieces"),
    ],
)
def test_what_cannot_be_read_is_said(file: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(InputError, match=message):
        loading.load(str(tmp_path))
    assert cli.main(["eval", str(tmp_path), "--task", "addition(0, 9)"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_adapter_that_does_not_name_its_base_is_refused(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="base_model_name_or_path=None must name the model"):
        loading.load(str(tmp_path))


def test_eval_takes_the_checkpoints_of_another_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved(tmp_path / "checkpoint-2")
    assert cli.main(["eval", str(tmp_path), "--task", "addition(0, 9)", "--problems", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_problems"] == 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["--steps", "3", "--checkpoint-every", "1", "--keep-checkpoints", "5", "--eval-problems", "0"]
    with without_pictures():
        assert cli.main(["train", "smoke", *options, "--lora-rank", "2", "--no-doctor", "--out", str(folder)]) == 0
    return folder


def test_a_run_is_exported_as_it_stood_at_a_checkpoint_and_at_its_end(run: Path, tmp_path: Path):
    there = stored.steps(run / "checkpoints")
    assert sorted(there) == [1, 2, 3]
    logits = {}
    for step in (0, 1):
        out = tmp_path / str(step)
        assert cli.main(["export", str(run), str(out), "--step", str(step)]) == 0
        model = AutoModelForCausalLM.from_pretrained(out)
        assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
        logits[step] = model(input_ids=torch.tensor([[3, 4, 5]])).logits
    end = AutoModelForCausalLM.from_pretrained(run / "model")(input_ids=torch.tensor([[3, 4, 5]])).logits
    assert torch.equal(logits[0], end)
    assert len({round(value.sum().item(), 6) for value in logits.values()}) == 2


def test_the_last_checkpoint_exports_what_the_run_exported(run: Path, tmp_path: Path):
    whole = AutoModelForCausalLM.from_pretrained(run / "model")
    (run / "model").rename(tmp_path / "aside")
    try:
        assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    finally:
        (tmp_path / "aside").rename(run / "model")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), whole)


def test_a_run_without_checkpoints_names_its_end(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (run / "checkpoints").rename(tmp_path / "aside")
    try:
        assert cli.main(["export", str(run), str(tmp_path / "out"), "--step", "2"]) == 2
    finally:
        (tmp_path / "aside").rename(run / "checkpoints")
    said = f"drpo: export: --step 2: {run} has no weights of that step, only those after step 3\n"
    assert said == capsys.readouterr().err


def test_export_rounds_where_asked(tmp_path: Path):
    assert cli.main(["export", "tiny", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "export: name a run or a model first, then the folder to write"),
        (["tiny"], "export: name a run or a model first, then the folder to write"),
        (["tiny", "OUT", "--dtype", "int4"], "must be one of fp32, bf16, fp16"),
        (["tiny", "OUT", "--step", "3"], "tiny is not a run of drpo"),
        (["RUN", "OUT", "--step", "7"], "has no weights of that step, only those after step 1, 2, 3\n"),
        (["tiny", "RUN"], "exists and is not an empty folder"),
    ],
)
def test_export_refuses_in_one_line(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    named = [{"OUT": str(tmp_path / "out"), "RUN": str(run)}.get(a, a) for a in arguments]
    assert cli.main(["export", *named]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
