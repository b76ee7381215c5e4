"""What of cluster/verl needs no verl: the costs, the data and the reward."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3_5MoeTextConfig, Qwen3Config
from transformers import Qwen3MoeConfig as Qwen3Moe

CLUSTER = Path(__file__).resolve().parents[1] / "cluster" / "verl"
DATA = Path(os.environ.get("DRPO_SHARED", Path(__file__).parents[2] / "shared")) / "data"


def script(name: str) -> ModuleType:
    """A file of cluster/verl as a module."""
    spec = importlib.util.spec_from_file_location(f"cluster_verl_{name}", CLUSTER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cost, prepare_data, reward = script("cost"), script("prepare_data"), script("reward")


def config(kind: type[PretrainedConfig], shape, **more: int | bool) -> PretrainedConfig:
    sizes = {"vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers}
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
    return kind(**sizes, **heads, tie_word_embeddings=shape.tied, **more)


def configurations() -> dict[str, tuple]:
    """Each shape with the configuration of transformers that has its numbers."""
    moe = cost.QWEN3_30B_A3B
    chosen = {"num_experts": moe.experts, "num_experts_per_tok": moe.active, "moe_intermediate_size": moe.mlp}
    dense, small = cost.QWEN3_4B, cost.R1_DISTILL_1_5B
    return {
        "qwen3-4b": (dense, config(Qwen3Config, dense, intermediate_size=dense.mlp)),
        "qwen3-30b-a3b": (moe, config(Qwen3Moe, moe, **chosen)),
        "qwen3.5-35b-a3b": (cost.QWEN3_5_35B_A3B, Qwen3_5MoeTextConfig()),
        "r1-distill-1.5b": (small, config(Qwen2Config, small, intermediate_size=small.mlp)),
    }


@pytest.mark.parametrize("name", ["qwen3-4b", "qwen3-30b-a3b", "qwen3.5-35b-a3b", "r1-distill-1.5b"])
def test_parameters_are_those_of_the_model(name: str):
    shape, wanted = configurations()[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(wanted)
    counted = {path: parameter.numel() for path, parameter in model.named_parameters()}
    assert shape.parameters() == sum(counted.values())
    met = sum(n for path, n in counted.items() if "embed_tokens" not in path or shape.tied)
    if shape.experts:
        routed = sum(n for path, n in counted.items() if ".experts." in path)
        met -= routed - routed * shape.active // shape.experts
    assert shape.active_parameters() == pytest.approx(met, abs=shape.hidden)


def test_the_readmes_table_is_the_scripts():
    text = cost.README.read_text()
    assert text.split(cost.BEGIN)[1].split(cost.END)[0] == cost.table()


def test_every_setting_has_its_cost_and_its_line_in_the_readme():
    files = {path.stem for path in (CLUSTER / "config").glob("*.yaml")} - {"paper", "dense", "moe"}
    assert {setting.name for setting in cost.SETTINGS} == files
    before_costs = cost.README.read_text().split(cost.BEGIN)[0]
    assert all(f"\n| `{name}` | " in before_costs for name in files)


def test_costs_scale_as_they_must():
    setting = cost.SETTINGS[0]
    whole = cost.cost(setting)
    assert whole.tokens == 500 * 64 * 8 * 8192 and whole.eval_tokens == 51 * 60 * 16 * 8192
    faster = cost.Hardware(flops=2 * cost.Hardware.flops)
    assert cost.cost(setting, faster).train_hours == pytest.approx(whole.train_hours / 2)
    assert cost.cost(setting, faster).sample_hours == whole.sample_hours
    # An engine with no rows still reads its weights for each token.
    read = setting.shape.parameters() * 2 * cost.NEW_TOKENS / (3.35e12 * 0.5)
    assert cost.sampling_seconds(setting, 0, cost.Hardware()) == pytest.approx(read)


def a_source(folder: Path) -> Path:
    """Three tiny sets, with a repeated question and one whose answers disagree."""
    rows = [("1 + 1?", "2"), ("1 +  1?", "2"), ("2 + 2?", "4"), ("3 + 3?", "6"), ("3 + 3?", "7")]
    lines = [
        f'{{"prompt": [{{"role": "user", "content": "{text}"}}], "reward_model": {{"ground_truth": "{answer}"}}}}'
        for text, answer in rows
    ]
    (folder / "dapo_math_17k").mkdir()
    (folder / "dapo_math_17k" / "train.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("aime24", "aime25"):
        (folder / name).mkdir()
        questions = [f'{{"problem": "{name} {i}?", "answer": "{i:03d}"}}' for i in range(30)]
        (folder / name / "test.jsonl").write_text("\n".join(questions) + "\n")
    return folder


def test_prepared_data_is_in_verls_columns(tmp_path: Path):
    written = prepare_data.prepare(a_source(tmp_path), tmp_path / "out")
    assert written == {"dapo_math": 2, "aime24": 30, "aime25": 30}
    train = pq.read_table(tmp_path / "out" / "dapo_math.parquet").to_pylist()
    assert {row["reward_model"]["ground_truth"] for row in train} == {"2", "4"}
    for name in written:
        for i, row in enumerate(pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist()):
            assert row["data_source"] == name and row["ability"] == "math" and row["reward_model"]["style"] == "rule"
            assert row["extra_info"] == {"split": "train" if name == "dapo_math" else "test", "index": i}
            (message,) = row["prompt"]
            assert message["role"] == "user" and message["content"].endswith("put the final answer in \\boxed{}.")


def test_missing_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["prepare_data.py", "--source", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as refused:
        prepare_data.main()
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("prepare_data: ") and len(said.splitlines()) == 1


def test_the_shared_sets_are_prepared_and_their_answers_marked_right(tmp_path: Path):
    if not DATA.exists():
        pytest.skip(f"{DATA} is not there; set DRPO_SHARED to the folder that holds data/")
    written = prepare_data.prepare(DATA, tmp_path)
    assert written == {"dapo_math": 16906, "aime24": 30, "aime25": 30}
    for name in ("aime24", "aime25"):
        answers = [
            row["reward_model"]["ground_truth"] for row in pq.read_table(tmp_path / f"{name}.parquet").to_pylist()
        ]
        marks = [reward.compute_score(name, f"It is \\boxed{{{answer}}}.", answer) for answer in answers]
        assert marks == [{"score": 1.0, "acc": 1.0, "failed": 0.0}] * 30


def test_an_episode_with_tools_needs_a_boxed_answer():
    assert reward.compute_boxed_score("aime24", "calculator: 84\nDone.", "84")["score"] == 0.0
    assert reward.compute_boxed_score("aime24", r"calculator: 7 So \boxed{84}", "84")["score"] == 1.0


def test_a_marking_that_breaks_is_counted_and_not_right():
    assert reward.compute_score("aime24", "It is 3.", "") == {"score": 0.0, "acc": 0.0, "failed": 1.0}
    assert reward.compute_score("aime24", "I do not know.", "3", extra_info={}, other=1)["score"] == 0.0
